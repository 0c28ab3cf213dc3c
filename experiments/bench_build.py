"""Benchmark: photographs a second of a memory build, and where the time goes.

    python experiments/bench_build.py --num_photos=1000 --out=bench_build

JPEG files of 640 x 480 pixels, crops of the photographs of scikit-image (extra [parity]),
with the shipped tokenizer and CLIP, in a process of its own for each build: `search`
makes what search and generation need, `training` the queries with dropout, too. They
take turns, `--repeats` times. The clock starts after the models are loaded and includes
what is compiled. The load is checked first. Writes `results.json`. Tiny form:
--num_photos=20 --repeats=1 --busy.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from bench_sides import Side, add_busy_flag, ask_in_turns, check_load, serve, write_json
from PIL import Image

VARIANTS = {"search": 0, "training": 4}
SIZE = (640, 480)


def write_photos(folder: Path, number: int) -> None:
    """Different crops of photographs, as JPEG files with captions."""
    import skimage

    files = sorted((Path(skimage.__file__).parent / "data").glob("*.*"))
    pictures = [Image.open(p) for p in files if p.suffix in (".png", ".jpg", ".jpeg")]
    pictures = [p.convert("RGB") for p in pictures if p.mode == "RGB"]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(number):
        picture = pictures[i % len(pictures)]
        side = rng.uniform(0.5, 0.95) * min(picture.width / 4, picture.height / 3)
        width, height = int(4 * side), int(3 * side)
        left = int(rng.integers(picture.width - width + 1))
        top = int(rng.integers(picture.height - height + 1))
        crop = picture.crop((left, top, left + width, top + height)).resize(SIZE)
        crop.save(folder / f"{i:05d}.jpg", quality=90)
        (folder / f"{i:05d}.txt").write_text(f"photograph {i} of a collection")


def run_side(photos: Path, out: Path, variants: int) -> None:
    """The process of a side: one build."""
    from racm3_jax.commands.memory import load_models
    from racm3_jax.memory.builder import build_memory
    from racm3_jax.memory.config import CorpusConfig
    from racm3_jax.progress import StageClock

    def answer(request: Any) -> dict[str, Any]:
        del request
        clock = StageClock()
        models = load_models("shipped:flagworld/tokenizer", "shipped:flagworld/clip")
        config = CorpusConfig(num_query_variants=variants)
        tokenizer, embedder = models
        build_memory(
            f"folder:{photos}",
            tokenizer=tokenizer,
            embedder=embedder,
            path=out,
            config=config,
            clock=clock,
        )
        shutil.rmtree(out)
        return clock.seconds

    serve(answer)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_photos", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("bench_build"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=VARIANTS, help="internal: run as this side")
    add_busy_flag(parser)
    arguments = parser.parse_args()
    out, photos = arguments.out, arguments.out / "photos"
    if arguments.side:
        run_side(photos, out / arguments.side, VARIANTS[arguments.side])
        return
    load = check_load(parser, arguments.busy)
    if out.exists():
        parser.error(f"{out} exists: give a new --out")
    write_photos(photos, arguments.num_photos)
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.repeats):
        for name in VARIANTS:
            # A process for every build, as for every command.
            side = Side(name, [__file__, f"--out={out}", f"--side={name}"], cores)
            found[name] += ask_in_turns([side], {}, 1)[name]
            side.close()
    shutil.rmtree(photos)
    results = {
        "photos": arguments.num_photos,
        "size": list(SIZE),
        "threads": arguments.threads,
        "machine": platform.machine(),
        "load_at_start": load,
        "repeats": arguments.repeats,
        "builds": {name: summarise_builds(runs) for name, runs in found.items()},
    }
    for build in results["builds"].values():
        build["photos_per_second"] = arguments.num_photos / build["median_seconds"]
    write_json(out / "results.json", results)
    for name, build in results["builds"].items():
        words = ", ".join(f"{s} {x:.1f} s" for s, x in build["stages"].items())
        print(f"{name}: {build['photos_per_second']:.0f} photographs/s ({words})")


def summarise_builds(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Median and fastest seconds, and the stages of the median build."""
    ordered = sorted(runs, key=lambda stages: sum(stages.values()))
    return {
        "median_seconds": statistics.median(sum(r.values()) for r in ordered),
        "fastest_seconds": sum(ordered[0].values()),
        "stages": ordered[len(ordered) // 2],
    }


if __name__ == "__main__":
    sys.exit(main())
