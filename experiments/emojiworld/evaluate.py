"""Evaluates generation of held-out things in the style of a requested house.

    python experiments/emojiworld/evaluate.py --data=out/emojiworld --model=out/emoji \\
        --baseline=out/emoji_baseline --out=out/emoji_evaluation

Each of the 891 held-out drawings is requested by its caption, with a memory of all
drawings that excludes the thing's drawings of the same house (and its twin set).
`--out` gets `results.json`, `results.md`, `samples.png` (prompt, retrieved, with
retrieval, without, the house's own drawing) and `memorised.png` (samples next to the
nearest training drawing), and `scorers.npz`, which are trained once. Finished results
are kept after an interruption; more seeds or conditions can be added by the same
command with other flags. `--limit=50` evaluates fifty drawings, evenly spread over the
things.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]

import jax
import numpy as np
from tqdm import tqdm

import racm3_jax
from emojiworld.captions import names_thing
from emojiworld.conditions import (
    CAPTIONED,
    DRAWN,
    NEEDS_BASELINE,
    SCORED,
    Asker,
    Sampling,
    open_memory,
    swap_things,
)
from emojiworld.drawings import Drawings, read_drawings
from emojiworld.figures import (
    Nearest,
    combine_bits,
    combine_outcomes,
    compare_conditions,
    compute_distance,
    format_ceilings,
    format_table,
    saved_bits,
    text_to_image_ranks,
)
from emojiworld.scorers import Verdicts, open_verdicts, reconstruct
from emojiworld.world import BY_NAME
from racm3_jax import own_files
from racm3_jax.evaluation.clip_score import CLIPFeatures
from racm3_jax.evaluation.document_sets import describe_documents
from racm3_jax.evaluation.intervals import Share
from racm3_jax.evaluation.parts import Parts
from racm3_jax.evaluation.pictures import Panel, Row, draw_sheet
from racm3_jax.evaluation.protocol import describe_memory, fingerprint_params
from racm3_jax.generation.tasks import Generator
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.tokenizers.mixed import MixedTokenizer

# Sampled with every seed; the others with the first seed only.
MAIN = ("retrieval", "guided", "baseline")
_SHEET_ROWS = 12
_SEARCH = "search"


class Run(NamedTuple):
    """An evaluation with opened models.

    Attributes:
      asker: runs them.
      parts: the finished results.
      drawings: all of them.
      items: indices of the evaluated ones.
      generator: with retrieval.
      seeds: of the sampling.
    """

    asker: Asker
    parts: Parts
    drawings: Drawings
    items: np.ndarray
    generator: Generator
    seeds: tuple[int, ...]

    @property
    def things(self) -> list[str]:
        return self.drawings.thing[self.items].tolist()

    @property
    def icon_sets(self) -> list[str]:
        return self.drawings.icon_set[self.items].tolist()

    def seeds_of(self, condition: str) -> tuple[int, ...]:
        """The seeds of a condition."""
        return self.seeds if condition in MAIN else self.seeds[:1]

    def has(self, variant: str) -> bool:
        return not self.parts.missing([variant])

    def num_missing(self, variant: str) -> int:
        """Number of unfinished items."""
        size, num = self.parts.chunk_size, len(self.items)
        chunks = range(self.parts.num_chunks)
        waiting = [c for c in chunks if not self.parts.path(variant, c).exists()]
        return sum(min(size, num - c * size) for c in waiting)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, runs what is missing, writes the results."""
    options = parse(arguments)
    try:
        run = open_run(options)
        ask(run, options.conditions.split(",") if options.conditions else list(DRAWN))
        write_results(run, options.out)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of fetch.py")
    parser.add_argument("--model", required=True, help="work directory of RA-CM3")
    parser.add_argument(
        "--baseline", help="work directory of the baseline without retrieval"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3, help="of the sampling")
    parser.add_argument("--conditions", default="", help="only these: retrieval,copy")
    parser.add_argument(
        "--limit", type=int, default=0, help="number of drawings; 0: all"
    )
    parser.add_argument("--temperature", type=float, default=Sampling.temperature)
    parser.add_argument("--top_p", type=float, default=Sampling.top_p)
    parser.add_argument(
        "--chunk_size",
        type=int,
        default=64,
        help="items lost by an interruption",
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


def open_run(options: argparse.Namespace) -> Run:
    """Opens drawings and models, and builds the memory, once."""
    drawings = read_drawings(options.data)
    items = np.flatnonzero(drawings.split == "held_out")
    if 0 < options.limit < len(items):
        items = items[np.arange(options.limit) * len(items) // options.limit]
    generator = open_generator(options.model, drawings, options.out / "memory")
    baseline = racm3_jax.load(options.baseline) if options.baseline else None
    sampling = Sampling(options.temperature, options.top_p)
    asker = Asker(
        *(generator, baseline, drawings, items, sampling, options.out),
        devices=find_devices(),
    )
    settings = {
        "data": describe_documents(drawings.documents),
        "items": describe_documents(asker.targets),
        "sampling": dataclasses.asdict(sampling),
        "model": fingerprint_params(generator),
        "baseline": baseline and fingerprint_params(baseline),
        "tokenizer": generator.tokenizer.fingerprint(),
        "memory": describe_memory(generator.retriever),
        "chunk_size": options.chunk_size,
    }
    parts = Parts(options.out, len(items), options.chunk_size, settings)
    seeds = tuple(range(1, options.seeds + 1))
    return Run(asker, parts, drawings, items, generator, seeds)


def find_devices() -> tuple[Any, ...]:
    """The devices over which items are split; (None,) for one device."""
    devices = tuple(jax.local_devices())
    return devices if len(devices) > 1 else (None,)


def open_generator(model: str, drawings: Drawings, folder: Path) -> Generator:
    """The model with a memory of all drawings, and its training's strategy."""
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
    """The models of a memory."""

    tokenizer: MixedTokenizer
    embedder: DocumentEmbedder


def ask(run: Run, conditions: list[str]) -> None:
    """Runs what is missing, the main conditions first."""
    with_baseline = run.parts.settings["baseline"] is not None
    wanted = [c for c in conditions if c != NEEDS_BASELINE or with_baseline]
    jobs: list[tuple[str, str, Any]] = [("retrieval", _SEARCH, run.asker.search)]
    for condition in wanted:
        for seed in run.seeds_of(condition):
            one = functools.partial(run.asker.draw, condition, seed)
            jobs.append((condition, f"{condition}-seed{seed}", one))
        if condition in CAPTIONED:
            one = functools.partial(run.asker.caption, condition)
            jobs.append((condition, f"caption-{condition}", one))
        if condition in SCORED:
            one = functools.partial(run.asker.score, condition)
            jobs.append((condition, f"bits-{condition}", one))
    for number, (condition, variant, compute) in enumerate(jobs, 1):
        started = time.monotonic()
        if not run.has(variant):
            run.asker.prepare(condition)
        with tqdm(
            desc=f"{number} of {len(jobs)}, {variant}",
            total=len(run.items),
            initial=len(run.items) - run.num_missing(variant),
            unit="drawing",
            delay=1.0,
        ) as bar:
            counted = functools.partial(_count, bar, compute)
            made = run.parts.make(variant, counted, devices=find_devices())
        seconds = time.monotonic() - started
        print(
            f"{number} of {len(jobs)}, {variant}: {made} chunks, {seconds:.0f} s",
            flush=True,
        )


def _count(bar: tqdm, compute: Any, items: range, device: Any) -> Any:
    """Computes a chunk, and updates the bar."""
    found = compute(items, device)
    bar.update(len(items))
    return found


def write_results(run: Run, folder: Path) -> None:
    """Scores the results and writes all outputs."""
    codec = run.generator.tokenizer.image
    verdicts, ceilings = open_verdicts(folder / "scorers.npz", run.drawings, codec)
    train = run.drawings.split == "train"
    # Generated images are compared with reconstructions of real ones.
    usual = reconstruct(codec, run.drawings.images[~train])
    nearest = Nearest(run.drawings.images[train], list(usual))
    outcomes, rows = judge(run, verdicts, nearest)
    clip = judge_search(run)
    assert run.generator.embedder is not None
    differences = {
        reference: compare_conditions(
            {c: o for c, o in outcomes.items() if c != reference},
            outcomes[reference],
            run.things,
        )
        for reference in ("baseline", "copy")
        if reference in outcomes
    }
    record = {
        "settings": dict(run.parts.settings),
        "seeds": list(run.seeds),
        "num_items": len(run.items),
        "num_things": len(set(run.things)),
        "features": CLIPFeatures(run.generator.embedder).settings,
        "figures": {
            condition: {
                name: figure if isinstance(figure, float) else figure.to_json()
                for name, figure in row.items()
            }
            for condition, row in rows.items()
        },
        "clip": {name: share.to_json() for name, share in clip.items()},
        "differences": differences,
        "bits_saved": _saved(run),
        "similarity_of_real": nearest.usual,
        "scorers": ceilings,
    }
    own_files.write_json(folder / "results.json", record)
    words = "; ".join(f"{name} {share}" for name, share in clip.items())
    table = (
        f"{format_table(rows, DRAWN)}\n\nWhat the scorers make of held-out drawings:\n\n"
        f"{format_ceilings(ceilings)}\n\nCLIP: {words}.\n"
    )
    own_files.write_markdown(folder / "results.md", table)
    own_files.write_png(folder / "samples.png", draw_samples(run))
    own_files.write_png(folder / "memorised.png", draw_memorised(run, nearest))
    print(table)


def judge(
    run: Run, verdicts: Verdicts, nearest: Nearest
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, Any]]]:
    """(outcomes, metrics) of every finished condition, by name."""
    assert run.generator.embedder is not None
    features = CLIPFeatures(run.generator.embedder)
    real = run.drawings.images[run.items]
    all_outcomes, rows = {}, {}
    for condition in DRAWN:
        found = [
            judge_cell(run, condition, s, verdicts, nearest)
            for s in run.seeds_of(condition)
        ]
        cells = [cell for cell in found if cell is not None]
        if not cells:
            continue
        outcomes = {n: np.stack([c[n] for c in cells]) for n in cells[0]}
        if run.has(f"caption-{condition}"):
            texts = run.parts.load(f"caption-{condition}")["text"]
            named = [
                names_thing(str(t), g) for t, g in zip(texts, run.things, strict=True)
            ]
            outcomes["named"] = np.array([named], float)
        row: dict[str, Any] = {}
        for name, values in outcomes.items():
            share = combine_outcomes(values, run.things)
            if share is not None:
                row[name] = share
        if len(run.items) > 1:
            images = run.parts.load(f"{condition}-seed{run.seeds[0]}")["images"]
            row["fid"] = compute_distance(images, real, features)
        if run.has(f"bits-{condition}"):
            bits = run.parts.load(f"bits-{condition}")["bits"]
            row["bits"] = combine_bits(bits, run.things)
        all_outcomes[condition], rows[condition] = outcomes, row
    return all_outcomes, rows


def judge_search(run: Run) -> dict[str, Share]:
    """Retrieval quality of the CLIP, by kind of query."""
    found = run.parts.load(_SEARCH)
    ranks = text_to_image_ranks(found["text"], found["image"])
    outcomes = {
        "text query, right thing first": _shown(run, found["by_text"][:, None]),
        "image query, right thing first": _shown(run, found["by_image"][:, None]),
        "text to image, recall at 1": ranks < 1,
        "text to image, recall at 5": ranks < 5,
    }
    shares = {
        name: combine_outcomes(np.asarray(values, float)[None], run.things)
        for name, values in outcomes.items()
    }
    return {name: share for name, share in shares.items() if share is not None}


def judge_cell(
    run: Run, condition: str, seed: int, verdicts: Verdicts, nearest: Nearest
) -> dict[str, np.ndarray] | None:
    """The outcomes of one condition and seed; None if unfinished."""
    if not run.has(f"{condition}-seed{seed}"):
        return None
    found = run.parts.load(f"{condition}-seed{seed}")
    images = found["images"]
    outcomes = verdicts.judge(images, run.icon_sets, run.things)
    if condition == "swapped":
        _, shown = swap_things(run.drawings)
        others = [shown[thing] for thing in run.things]
        followed = verdicts.judge(images, run.icon_sets, others)
        outcomes["followed"] = followed["top1"]
    elif condition != "reconstruction" and (found["retrieved"] >= 0).any():
        outcomes["shown"] = _shown(run, found["retrieved"])
    outcomes["memorised"] = nearest.memorised(images)
    return outcomes


def _shown(run: Run, rows: np.ndarray) -> np.ndarray:
    """1 if one of the documents shows the thing."""
    there = rows[rows >= 0]
    facts = run.asker.memory.metadata(there)
    things = np.full(rows.shape, "", object)
    things[rows >= 0] = [str(fact.get("thing", "")) for fact in facts]
    return (things == np.array(run.things, object)[:, None]).any(1).astype(float)


def _saved(run: Run) -> dict[str, Any]:
    """The fraction of bits saved by documents, vs. each model without."""
    if not run.has("bits-retrieval"):
        return {}
    bits = run.parts.load("bits-retrieval")["bits"]
    return {
        other: saved_bits(
            bits, run.parts.load(f"bits-{other}")["bits"], run.things
        ).to_json()
        for other in ("baseline", "no_documents")
        if run.has(f"bits-{other}")
    }


def draw_samples(run: Run) -> np.ndarray:
    """Prompt, retrieved, with retrieval, without, the house's own drawing."""
    first = run.seeds[0]
    with_documents = f"retrieval-seed{first}"
    without = [c for c in ("baseline", "no_documents") if run.has(f"{c}-seed{first}")]
    blank = np.full((8, 8, 3), 236, np.uint8)
    found = run.parts.load(with_documents) if run.has(with_documents) else None
    plain = run.parts.load(f"{without[0]}-seed{first}")["images"] if without else None
    rows = []
    for i in _choose_rows(run):
        own = Panel(run.drawings.images[run.items[i]])
        retrieved = [Panel(blank)]
        if found is not None:
            retrieved = _read_panels(run, found["retrieved"][i]) or retrieved
        drawn = Panel(blank if found is None else found["images"][i])
        other = Panel(blank if plain is None else plain[i])
        prompt = run.asker.targets[i].text
        rows.append(Row(prompt, (retrieved, (drawn,), (other,), (own,))))
    headings = ("prompt", "retrieved", "with retrieval", "without", "own drawing")
    return draw_sheet(headings, rows)


def _choose_rows(run: Run) -> list[int]:
    """Items spread over the things, with alternating icon sets."""
    sets, places = list(BY_NAME), []
    things = list(dict.fromkeys(run.things))
    step = max(1, len(things) // _SHEET_ROWS)
    for n, thing in enumerate(things[::step][:_SHEET_ROWS]):
        own = [i for i, t in enumerate(run.things) if t == thing]
        turned = [*sets[n % len(sets) :], *sets[: n % len(sets)]]
        places.append(min(own, key=lambda i: turned.index(run.icon_sets[i])))
    return places


def _read_panels(run: Run, rows: np.ndarray) -> list[Panel]:
    """The documents of these rows, decoded as the model sees them."""
    documents = run.asker.memory.documents(rows[rows >= 0])
    decoded = [run.generator.tokenizer.decode(document) for document in documents]
    return [Panel(d.images[-1], d.text) for d in decoded if d.images]


def draw_memorised(run: Run, nearest: Nearest) -> np.ndarray:
    """The samples nearest to training drawings, each with that drawing."""
    variants = [f"{c}-seed{run.seeds[0]}" for c in MAIN]
    train = np.flatnonzero(run.drawings.split == "train")
    rows = []
    for variant in filter(run.has, variants):
        images = run.parts.load(variant)["images"]
        places, likeness = nearest.find(images)
        for i in np.argsort(-likeness, kind="stable")[: _SHEET_ROWS // 2]:
            own = train[places[i]]
            text = f"{run.asker.targets[i].text} ({variant}, {likeness[i]:.2f})"
            document = run.drawings.documents[own]
            panels = (
                (Panel(images[i]),),
                (Panel(run.drawings.images[own], document.text),),
            )
            rows.append(Row(text, panels))
    return draw_sheet(("prompt", "sample", "nearest of training"), rows)


if __name__ == "__main__":
    main()
