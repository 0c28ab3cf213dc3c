"""Benchmark: image embedding with CLIP on a CPU, vs. `transformers` at the same shape.

    python experiments/bench_clip.py --shapes b_32 l_14 --out=racm3_out/bench_clip

Equal random weights; float32; the same uint8 images, normalised by each side. Both use
`--threads` threads (the process is bound to this number of cores, which XLA uses),
alternate in one process, and are compared by the medians of `--repeats` calls after two
warm-up calls. Needs the [parity] extra.

The table shows the GFLOP/s of matmuls of each side, next to those of one
large matmul in each library, the upper limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "heads": 2},
    "b_32": {
        "image_size": 224,
        "patch_size": 32,
        "width": 768,
        "layers": 12,
        "heads": 12,
    },
    "b_16": {
        "image_size": 224,
        "patch_size": 16,
        "width": 768,
        "layers": 12,
        "heads": 12,
    },
    "l_14": {
        "image_size": 224,
        "patch_size": 14,
        "width": 1024,
        "layers": 24,
        "heads": 16,
    },
}
Call = Callable[[], Any]


def bind_threads(threads: int) -> None:
    """Sets the same cores and threads for both libraries, before importing them."""
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise SystemExit(f"--threads={threads}, but there are {len(cores)} cores")
    os.sched_setaffinity(0, cores[:threads])
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"


def make_config(shape: dict[str, int]) -> Any:
    """Our config; the text tower is minimal, as it is not run."""
    from racm3_jax.retrieval.clip import CLIPConfig

    return CLIPConfig(
        vocab_size=520,
        image_size=shape["image_size"],
        patch_size=shape["patch_size"],
        vision_width=shape["width"],
        vision_layers=shape["layers"],
        vision_heads=shape["heads"],
        text_width=64,
        text_layers=1,
        text_heads=1,
        context_length=9,
        d_embed=64,
    )


def make_models(config: Any) -> tuple[Any, Any]:
    """(our embedder, their model) with the same weights, converted from theirs."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    from racm3_jax.porting.clip import convert_clip
    from racm3_jax.porting.clip_text import byte_symbols
    from racm3_jax.retrieval.embedder import DocumentEmbedder

    torch.manual_seed(0)
    shared = {"projection_dim": config.d_embed, "hidden_act": config.activation}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=shared
            | {
                "vocab_size": config.vocab_size,
                "hidden_size": config.text_width,
                "intermediate_size": 4 * config.text_width,
                "num_hidden_layers": config.text_layers,
                "num_attention_heads": config.text_heads,
                "max_position_embeddings": config.context_length,
                "bos_token_id": config.start,
                "eos_token_id": config.end,
                "pad_token_id": config.end,
            },
            vision_config=shared
            | {
                "image_size": config.image_size,
                "patch_size": config.patch_size,
                "hidden_size": config.vision_width,
                "intermediate_size": 4 * config.vision_width,
                "num_hidden_layers": config.vision_layers,
                "num_attention_heads": config.vision_heads,
            },
            projection_dim=config.d_embed,
        )
    ).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "hf")
        symbols = byte_symbols()
        merges = [f"{symbols[0]} {symbols[i]}" for i in range(config.vocab_size - 514)]
        (folder / "hf" / "merges.txt").write_text("\n".join(["#version", *merges]))
        convert_clip(folder / "hf", folder / "ours")
        return DocumentEmbedder.load(folder / "ours"), model


def make_calls(config: Any, batch: int) -> tuple[dict[str, Call], float]:
    """The calls to time, and the largest difference between their embeddings."""
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]

    ours, theirs = make_models(config)
    ours.batch_size = batch
    size = config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3))
    images = pixels.astype(np.uint8)
    as_torch = torch.from_numpy(images)
    mean = torch.tensor(config.image_mean)
    std = torch.tensor(config.image_std)

    def run_theirs() -> Any:
        with torch.inference_mode():
            x = ((as_torch.float() / 255 - mean) / std).permute(0, 3, 1, 2)
            features = theirs.get_image_features(pixel_values=x.contiguous())
            features = getattr(features, "pooler_output", features)
            return (features / features.norm(dim=-1, keepdim=True)).numpy()

    def run_ours() -> Any:
        return ours.embed_images(images)

    difference = float(np.linalg.norm(run_ours() - run_theirs(), axis=1).max())
    return {"ours": run_ours, "transformers": run_theirs}, difference


def make_products(size: int) -> dict[str, Call]:
    """One large float32 matmul in each library: the upper limit."""
    import jax
    import jax.numpy as jnp
    import torch  # pyright: ignore[reportMissingImports]

    x = torch.randn(size, size)
    y = jnp.asarray(x.numpy())
    dot = jax.jit(jnp.dot)
    return {
        "ours": lambda: dot(y, y).block_until_ready(),
        "transformers": lambda: torch.mm(x, x),
    }


def count_flops(config: Any) -> float:
    """FLOPs of the matmuls of one image."""
    length, width = config.num_patches + 1, config.vision_width
    layer = 2 * length * width * (4 * width + 8 * width) + 4 * length**2 * width
    patches = 2 * config.num_patches * 3 * config.patch_size**2 * width
    return config.vision_layers * layer + patches + 2 * width * config.d_embed


def time_calls(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Median seconds of each call, alternating so that all have the same conditions."""
    for call in calls.values():
        call()
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def run(shapes: list[str], *, batch: int, repeats: int, threads: int) -> dict[str, Any]:
    """Runs the benchmark; returns what is written as JSON."""
    import jax
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    ceiling = 64 if shapes == ["tiny"] else 2048
    seconds = time_calls(make_products(ceiling), repeats)
    results: dict[str, Any] = {
        "threads": {"torch": torch.get_num_threads(), "cores": threads},
        "batch": batch,
        "repeats": repeats,
        "cpu": platform.processor() or platform.machine(),
        "versions": {
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "gflops_of_one_product": {k: 2e-9 * ceiling**3 / v for k, v in seconds.items()},
        "shapes": {},
    }
    for name in shapes:
        config = make_config(SHAPES[name])
        calls, difference = make_calls(config, batch)
        seconds = time_calls(calls, repeats)
        gflops = 1e-9 * batch * count_flops(config)
        results["shapes"][name] = {
            "seconds": seconds,
            "images_per_second": {k: batch / v for k, v in seconds.items()},
            "gflops": {k: gflops / v for k, v in seconds.items()},
            "times_faster": seconds["transformers"] / seconds["ours"],
            "largest_difference": difference,
        }
    return results


def format_table(results: dict[str, Any]) -> str:
    """The results as a table."""
    titles = ["shape", "ours, images/s", "transformers, images/s", "ours is faster"]
    titles += ["GFLOP/s of each", "difference"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, row in results["shapes"].items():
        ours, theirs = row["images_per_second"].values()
        mine, other = row["gflops"].values()
        lines.append(
            f"| {name} | {ours:.2f} | {theirs:.2f} | {row['times_faster']:.2f}x | "
            f"{mine:.0f}, {other:.0f} | {row['largest_difference']:.1e} |"
        )
    mine, other = results["gflops_of_one_product"].values()
    lines.append(
        f"one large matmul: {mine:.0f} GFLOP/s in XLA, {other:.0f} in torch; "
        f"{results['threads']['cores']} threads, batches of {results['batch']}"
    )
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, runs, writes and prints."""
    parser = argparse.ArgumentParser(description="Embedding images with CLIP.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["b_32", "l_14"])
    parser.add_argument("--out", type=Path, default=Path("racm3_out/bench_clip"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of both"
    )
    arguments = parser.parse_args()
    bind_threads(arguments.threads)
    results = run(
        arguments.shapes,
        batch=arguments.batch,
        repeats=arguments.repeats,
        threads=arguments.threads,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    aside = arguments.out / ".bench_clip.json.tmp"
    aside.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(aside, arguments.out / "bench_clip.json")
    print(format_table(results))


if __name__ == "__main__":
    main()
