"""CLIP from files against `transformers`, and tokens against CLIP's definition.

Run: OMP_NUM_THREADS=1 pytest -m parity tests/porting/test_clip_weights_parity.py
The tokens need CLIP's merges: set CLIP_MERGES=.../bpe_simple_vocab_16e6.txt.gz.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from caption_strings import make_strings
from clip_reference import ReferenceTokenizer
from porting_fakes import CLIP_CONFIG, clip_state, write_hf_clip

from racm3_jax.documents.images import read_image
from racm3_jax.porting.clip import convert_clip
from racm3_jax.porting.clip_text import build_clip_tokenizer, byte_symbols, read_merges
from racm3_jax.porting.files import open_tensors
from racm3_jax.retrieval.clip import CLIPConfig
from racm3_jax.retrieval.clip_images import fit_image
from racm3_jax.retrieval.embedder import DocumentEmbedder

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # torch and transformers are noisy
]


def shape(**changes) -> CLIPConfig:
    return dataclasses.replace(CLIP_CONFIG, **changes)


SHAPES = {
    "tiny": CLIP_CONFIG,
    "gelu": shape(activation="gelu", text_layers=2),
    "wide_vision": shape(vision_width=192, vision_heads=3, patch_size=4),
    "long_text": shape(context_length=77, text_width=128, text_heads=2, d_embed=64),
    "b_32_two_layers": shape(
        image_size=224, patch_size=32, vision_width=768, vision_heads=12, d_embed=512
    ),
    "l_14_336_one_layer": shape(
        image_size=336, patch_size=14, vision_width=1024, vision_heads=16,
        vision_layers=1, d_embed=768,
    ),
    "vit_l_14": CLIPConfig(
        vocab_size=49408, image_size=224, patch_size=14, vision_width=1024,
        vision_layers=24, vision_heads=16, text_width=768, text_layers=12,
        text_heads=12, context_length=77, d_embed=768,
    ),
}  # fmt: skip


def photographs() -> list[np.ndarray]:
    """The images shipped with scikit-image and scikit-learn."""
    skimage = pytest.importorskip("skimage")
    sklearn = pytest.importorskip("sklearn")
    names = [
        "astronaut.png",
        "brick.png",
        "camera.png",
        "cell.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "retina.jpg",
        "rocket.jpg",
    ]
    paths = [Path(skimage.__file__).parent / "data" / name for name in names]
    flowers = Path(sklearn.__file__).parent / "datasets" / "images"
    paths += [flowers / "china.jpg", flowers / "flower.jpg"]
    found = [path for path in paths if path.exists()]
    assert len(found) >= 10
    return [read_image(path) for path in found]


def many_merges(number: int) -> list[str]:
    """Merges that are built from bytes only."""
    symbols = byte_symbols()
    return [f"{symbols[i // 256]} {symbols[i % 256]}" for i in range(number)]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "vit_l_14" else n for n in SHAPES],
)
def test_files_embed_as_in_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    config = SHAPES[name]
    source = tmp_path / "hf"
    write_hf_clip(source, config, clip_state(config))
    merges = ["#version", *many_merges(config.vocab_size - 514)]
    (source / "merges.txt").write_text("\n".join(merges))
    model = transformers.CLIPModel.from_pretrained(source).eval()
    convert_clip(source, tmp_path / "out")
    embedder = DocumentEmbedder.load(tmp_path / "out", batch_size=4)

    rng = np.random.default_rng(0)
    size = config.image_size
    photos = [photo for photo in photographs() if same_cut(photo, size)]
    assert len(photos) >= 10
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    theirs = processor(images=photos, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=theirs)
        expected = getattr(expected, "pooler_output", expected).numpy()
    cosine = (embedder.embed_images(photos) * unit(expected)).sum(1)
    assert cosine.min() >= 0.99999, cosine

    ours = np.stack([fit_image(photo, size) for photo in photos])
    pixels = processor(images=list(ours), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels)
        expected = getattr(expected, "pooler_output", expected).numpy()
    assert_close(embedder.embed_images(ours), unit(expected))

    texts = ["".join(map(chr, rng.integers(97, 123, n))) for n in (1, 3, 90)]
    tokens = embedder.tokenizer.encode_batch(texts)
    with torch.no_grad():
        expected = model.get_text_features(input_ids=torch.from_numpy(tokens).long())
        expected = getattr(expected, "pooler_output", expected).numpy()
    assert_close(embedder.embed_texts(texts), unit(expected))


def same_cut(photo: np.ndarray, size: int) -> bool:
    """Whether transformers crops the same pixels as OpenAI's code.

    Half of an odd margin is rounded down by one and to even by the other: they differ by a
    pixel when the margin is 3 more than a multiple of 4. Ours is OpenAI's.
    """
    longer, shorter = max(photo.shape[:2]), min(photo.shape[:2])
    return (int(size * longer / shorter) - size) % 4 != 3


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    error = np.linalg.norm(ours - theirs, axis=1)
    assert error.max() < 1e-5, error


def test_fit_image_is_openais_preprocessing():
    """Against its definition: Resize, CenterCrop of torchvision, on Pillow's images."""
    from PIL import Image

    for photo in photographs():
        for size in (224, 336, 61):
            image = Image.fromarray(photo)
            width, height = image.size
            if width <= height:
                image = image.resize(
                    (size, int(size * height / width)), Image.Resampling.BICUBIC
                )
            else:
                image = image.resize(
                    (int(size * width / height), size), Image.Resampling.BICUBIC
                )
            left = round((image.width - size) / 2.0)
            top = round((image.height - size) / 2.0)
            expected = image.crop((left, top, left + size, top + size))
            np.testing.assert_array_equal(fit_image(photo, size), np.asarray(expected))


@pytest.mark.skipif("CLIP_MERGES" not in os.environ, reason="needs CLIP's merges file")
def test_ten_thousand_strings_have_clips_tokens():
    pytest.importorskip("ftfy")
    pytest.importorskip("regex")
    merges = read_merges(Path(os.environ["CLIP_MERGES"]))[: 49408 - 514]
    strings = make_strings(10_000)
    ours = build_clip_tokenizer(merges, 49408).encode_batch(strings)
    reference = ReferenceTokenizer(merges)
    differing = [
        text
        for text, found in zip(strings, ours, strict=True)
        if reference.encode(text) != found.tolist()
    ]
    # Only where ftfy guesses a wrong decoding, which is not imitated.
    guessed = [
        text
        for text in strings
        if reference.clean(text) != reference.clean(text, guess_encoding=False)
    ]
    assert set(differing) <= set(guessed), set(differing) - set(guessed)
    assert len(guessed) <= 10
    assert sum(len(found) >= 100 for found in ours) >= 100


def test_files_that_torch_writes(tmp_path):
    """Every dtype, views, parameters, nesting and TorchScript, from torch itself."""
    torch = pytest.importorskip("torch")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(3, 4)
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.inner(x) * self.scale

    model = Model()
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        **model.state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "double": base.double(),
        "long": torch.arange(3),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    torch.save(
        {"epoch": 3, "lr": 1e-4, "callbacks": {Path: {}}, "state_dict": state},
        tmp_path / "lightning.ckpt",
    )
    source = open_tensors(tmp_path / "lightning.ckpt")
    assert source.tensors.keys() == state.keys()
    for name, expected in state.items():
        found = source.read(name)
        assert found.shape == tuple(expected.shape)
        np.testing.assert_array_equal(
            found.astype(np.float64), expected.detach().double().numpy(), name
        )
    torch.jit.script(model).save(tmp_path / "script.pt")
    source = open_tensors(tmp_path / "script.pt")
    assert source.tensors.keys() == model.state_dict().keys()
    for name, expected in model.state_dict().items():
        np.testing.assert_array_equal(source.read(name), expected.numpy())
    torch.save(torch.nn.Linear(2, 2), tmp_path / "object.pt")
    with pytest.raises(ValueError, match=r"calls torch\.nn\.modules\.linear\.Linear"):
        open_tensors(tmp_path / "object.pt")
