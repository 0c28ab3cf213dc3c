"""Can a model generate unseen things in the style of a given vendor?

    python experiments/emojiworld/evaluate.py --data=out/emojiworld --model=out/emoji \\
        --baseline=out/emoji_baseline --out=out/emoji_evaluation

Each of the 891 held-out images is generated from its caption, with a memory of all images
except those of the thing by the same vendor (in any of its icon sets).
`--out` gets `results.json`, `results.md`, `samples.png` (prompt, retrieved, with
retrieval, without, the vendor's own image), `memorised.png` (samples next to the nearest
training image) and `scorers.npz`, which are trained once. Finished parts are kept, so the
same command resumes, and adds seeds or conditions with other flags. `--limit=50` generates
fifty images, evenly spread over the things.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]

import jax
import numpy as np

import racm3_jax
from emojiworld.conditions import (
    DRAWN,
    NEEDS_BASELINE,
    ConditionRunner,
    Sampling,
    open_memory,
)
from emojiworld.drawings import Drawings, read_drawings
from emojiworld.suite import EmojiSuite
from racm3_jax.evaluation.fingerprints import (
    describe_documents,
    describe_generator,
    fingerprint_params,
)
from racm3_jax.generation.tasks import Generator
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.tokenizers.mixed import MixedTokenizer


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line; generates what is missing; writes the results."""
    options = parse(arguments)
    try:
        open_suite(options).run()
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The checked flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of fetch.py")
    parser.add_argument("--model", required=True, help="work directory of RA-CM3")
    parser.add_argument(
        "--baseline", help="work directory of the one without retrieval"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3, help="of the sampling")
    parser.add_argument("--conditions", default="", help="only these: retrieval,copy")
    parser.add_argument(
        "--limit", type=int, default=0, help="images to generate; 0 is all"
    )
    parser.add_argument("--temperature", type=float, default=Sampling.temperature)
    parser.add_argument("--top_p", type=float, default=Sampling.top_p)
    parser.add_argument(
        "--chunk_size", type=int, default=64, help="lost at most by a kill"
    )
    options = parser.parse_args(arguments)
    for name in filter(None, options.conditions.split(",")):
        if name not in DRAWN:
            parser.error(f"--conditions={name}: choose from {', '.join(DRAWN)}")
        if name == NEEDS_BASELINE and not options.baseline:
            parser.error("--conditions=baseline needs --baseline=FOLDER")
    if options.seeds < 1 or options.chunk_size < 1 or options.limit < 0:
        parser.error("--seeds and --chunk_size are at least 1, --limit at least 0")
    return options


def open_suite(options: argparse.Namespace) -> EmojiSuite:
    """Opens images and models, and builds the memory, once."""
    drawings = read_drawings(options.data)
    items = np.flatnonzero(drawings.split == "held_out")
    if 0 < options.limit < len(items):
        items = items[np.arange(options.limit) * len(items) // options.limit]
    generator = open_generator(options.model, drawings, options.out / "memory")
    baseline = racm3_jax.load(options.baseline) if options.baseline else None
    sampling = Sampling(options.temperature, options.top_p)
    runner = ConditionRunner(
        *(generator, baseline, drawings, items, sampling, options.out),
        devices=find_devices(),
    )
    described = describe_generator(generator)
    record = {
        "data": describe_documents(drawings.documents),
        "items": describe_documents(runner.targets),
        "sampling": dataclasses.asdict(sampling),
        "baseline": baseline and fingerprint_params(baseline),
        "chunk_size": options.chunk_size,
    } | {name: described[name] for name in ("model", "tokenizer", "memory")}
    return EmojiSuite(
        options.out,
        record,
        generator,
        runner,
        drawings,
        items,
        chunk_size=options.chunk_size,
        seeds=range(1, options.seeds + 1),
        conditions=options.conditions.split(",") if options.conditions else list(DRAWN),
        devices=find_devices(),
    )


def find_devices() -> tuple[Any, ...]:
    """The devices that divide the items; (None,) for one device."""
    devices = tuple(jax.local_devices())
    return devices if len(devices) > 1 else (None,)


def open_generator(model: str, drawings: Drawings, folder: Path) -> Generator:
    """The model with a memory of all images, and the strategy of its training."""
    directory = Path(model)
    if not (directory / "model").is_dir():
        raise ValueError(
            f"no trained model in {model}: give the --workdir of a training"
        )
    parts = Parted(
        MixedTokenizer.load(directory / "tokenizer"),
        DocumentEmbedder.load(directory / "clip"),
    )
    memory = open_memory(drawings.documents, parts, folder)
    return racm3_jax.load(model, memory=memory)


class Parted(NamedTuple):
    """The parts that a memory is built with."""

    tokenizer: MixedTokenizer
    embedder: DocumentEmbedder


if __name__ == "__main__":
    main()
