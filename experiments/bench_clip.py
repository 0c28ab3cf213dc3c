"""Benchmark: image embedding with CLIP on a CPU, vs. `transformers` at the same shape.

    python experiments/bench_clip.py --shapes b_32 l_14 --out=racm3_out/bench_clip

Equal random weights; float32; the same uint8 images, normalised by each side. Each side
has its own process with `--threads` cores and threads; they take turns on an idle machine
and are compared by the medians of `--repeats` calls after two warm-up calls. Needs the
[parity] extra.

The table shows the GFLOP/s of matmuls of each side, next to those of one
large matmul in each library, the upper limit. `python experiments/speed_table.py` makes
the table of results/README.md from the record in results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import bench_sides
import numpy as np

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
SIDES = ("ours", "transformers")
Call = Callable[[], Any]


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


def write_models(config: Any, folder: Path) -> None:
    """Random weights as transformers saves them (`hf`), and converted (`ours`)."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    from racm3_jax.porting.clip import convert_clip
    from racm3_jax.porting.clip_text import byte_symbols

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
    )
    model.save_pretrained(folder / "hf")
    symbols = byte_symbols()
    merges = [f"{symbols[0]} {symbols[i]}" for i in range(config.vocab_size - 514)]
    (folder / "hf" / "merges.txt").write_text("\n".join(["#version", *merges]))
    convert_clip(folder / "hf", folder / "ours")


def make_images(config: Any, batch: int) -> Any:
    """Random uint8 images, [batch, size, size, 3]."""
    size = config.image_size
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (batch, size, size, 3)).astype(np.uint8)


def make_ours(folder: Path, batch: int) -> Call:
    """Embeds images with our CLIP."""
    from racm3_jax.retrieval.embedder import DocumentEmbedder

    embedder = DocumentEmbedder.load(folder / "ours")
    embedder.batch_size = batch
    images = make_images(embedder.config, batch)
    return lambda: embedder.embed_images(images)


def make_theirs(folder: Path, config: Any, batch: int) -> Call:
    """Embeds the same images with transformers."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    model = transformers.CLIPModel.from_pretrained(folder / "hf").eval()
    images = torch.from_numpy(make_images(config, batch))
    mean = torch.tensor(config.image_mean)
    std = torch.tensor(config.image_std)

    def run_theirs() -> Any:
        with torch.inference_mode():
            x = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)
            features = model.get_image_features(pixel_values=x.contiguous())
            features = getattr(features, "pooler_output", features)
            return (features / features.norm(dim=-1, keepdim=True)).numpy()

    return run_theirs


def make_product(side: str, size: int) -> Call:
    """One large float32 matmul: the upper limit."""
    if side == "transformers":
        import torch  # pyright: ignore[reportMissingImports]

        x = torch.randn(size, size)
        return lambda: torch.mm(x, x)
    import jax
    import jax.numpy as jnp

    y = jax.random.normal(jax.random.key(0), (size, size))
    dot = jax.jit(jnp.dot)
    return lambda: dot(y, y).block_until_ready()


def run_side(side: str, folder: Path, batch: int) -> None:
    """A side's process: seconds of a call.

    Requests are {"shape": name}, {"product": size}; the embeddings of the last call are
    in `folder`/SHAPE/SIDE.npy.
    """
    if side == "transformers":
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(len(os.sched_getaffinity(0)))
    calls: dict[str, Call] = {}

    def make_call(request: dict[str, Any]) -> Call:
        if "product" in request:
            return make_product(side, request["product"])
        models = folder / request["shape"]
        if side == "ours":
            return make_ours(models, batch)
        return make_theirs(models, make_config(SHAPES[request["shape"]]), batch)

    def answer(request: dict[str, Any]) -> float:
        key = json.dumps(request)
        if key not in calls:
            calls.clear()
            calls[key] = make_call(request)
            calls[key]()
            embeddings = calls[key]()
            if "shape" in request:
                np.save(folder / request["shape"] / f"{side}.npy", embeddings)
        started = time.perf_counter()
        calls[key]()
        return time.perf_counter() - started

    bench_sides.serve(answer)


def count_flops(config: Any) -> float:
    """FLOPs of the matmuls of one image."""
    length, width = config.num_patches + 1, config.vision_width
    layer = 2 * length * width * (4 * width + 8 * width) + 4 * length**2 * width
    patches = 2 * config.num_patches * 3 * config.patch_size**2 * width
    return config.vision_layers * layer + patches + 2 * width * config.d_embed


def run(
    shapes: list[str], *, batch: int, repeats: int, threads: int, load: float
) -> dict[str, Any]:
    """Runs the benchmark; returns what is written as JSON."""
    ceiling = 64 if shapes == ["tiny"] else 2048
    cores = sorted(os.sched_getaffinity(0))[:threads]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in shapes:
            write_models(make_config(SHAPES[shape]), folder / shape)
        command = [__file__, f"--folder={folder}", f"--batch={batch}"]
        sides = [
            bench_sides.Side(side, [*command, f"--side={side}"], cores)
            for side in SIDES
        ]

        def measure(request: dict[str, Any]) -> dict[str, Any]:
            answers = bench_sides.ask_in_turns(sides, request, repeats)
            return bench_sides.summarise(answers)

        found = measure({"product": ceiling})["median_seconds"]
        results: dict[str, Any] = {
            "threads": threads,
            "load_at_start": load,
            "batch": batch,
            "repeats": repeats,
            "cpu": platform.processor() or platform.machine(),
            "versions": {
                name: metadata.version(name)
                for name in ("jax", "torch", "transformers")
            },
            "gflops_of_one_product": {
                k: 2e-9 * ceiling**3 / v for k, v in found.items()
            },
            "shapes": {},
        }
        for shape in shapes:
            found = measure({"shape": shape})
            seconds = found["median_seconds"]
            gflops = 1e-9 * batch * count_flops(make_config(SHAPES[shape]))
            ours, theirs = (np.load(folder / shape / f"{side}.npy") for side in SIDES)
            results["shapes"][shape] = {
                "seconds": seconds,
                "fastest": found["fastest_seconds"],
                "images_per_second": {k: batch / v for k, v in seconds.items()},
                "gflops": {k: gflops / v for k, v in seconds.items()},
                "times_faster": found["ours_is_faster"]["transformers"],
                "largest_difference": float(
                    np.linalg.norm(ours - theirs, axis=1).max()
                ),
            }
        for side in sides:
            side.close()
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
        f"{results['threads']} threads, batches of {results['batch']}"
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
    parser.add_argument("--side", choices=SIDES, help="internal: run as this side")
    parser.add_argument("--folder", type=Path, help="internal: its weights")
    bench_sides.add_busy_flag(parser)
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if arguments.side:
        run_side(arguments.side, arguments.folder, arguments.batch)
        return
    cores = len(os.sched_getaffinity(0))
    if arguments.threads > cores:
        parser.error(f"--threads={arguments.threads}, but there are {cores} cores")
    tiny = arguments.shapes == ["tiny"]
    load = bench_sides.check_load(parser, arguments.busy or tiny)
    results = run(
        arguments.shapes,
        batch=arguments.batch,
        repeats=arguments.repeats,
        threads=arguments.threads,
        load=load,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    aside = arguments.out / ".bench_clip.json.tmp"
    aside.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(aside, arguments.out / "bench_clip.json")
    print(format_table(results))


if __name__ == "__main__":
    main()
