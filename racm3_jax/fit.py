"""`racm3 fit`: trains all models on your own images, one stage after the other.

    source -> plan.json        sizes, chosen for the images and the machine
           -> tokenizer/       configs/own_tokenizer.py
           -> clip/            configs/own_clip.py
           -> generator/       its memory, then configs/own_generator.py
           -> samples.png, report.html

The same command resumes after an interruption at any time: each stage is a resumable
training or build. Afterwards `generator/` is the work directory for all other commands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from racm3_jax import own_files, run, wiring
from racm3_jax.buckets import refuse_url
from racm3_jax.documents.readers import find_shards, read_documents, refuse_inside
from racm3_jax.documents.sources import Corpus, parse_sources, source_corpus
from racm3_jax.evaluation.perplexity import compute_likelihoods
from racm3_jax.evaluation.report import CaptionRow, caption_rows, write_report
from racm3_jax.generation.tasks import Generator
from racm3_jax.metrics import read_jsonl
from racm3_jax.types import Document

PLAN_NAME = "plan.json"
SIZES = (64, 128, 256)
# Number of records whose images are measured before choosing sizes.
_NUM_MEASURED = 100
# Held-out documents of the sheet and of the report's metrics.
_NUM_SHOWN, _NUM_JUDGED = 8, 64
_EXPLANATION = (
    "The captions and images below were held out from all trainings: the model knows "
    "only similar documents, from its training and from what it retrieved."
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the three trainings; each is a flag of `racm3 fit`.

    Attributes:
      image_size: side in pixels: 64, 128 or 256; a code covers 8x8 pixels.
      num_codes: of the image tokenizer.
      d_model: width of the generator, a multiple of 64.
      num_layers: of the generator.
      batch_size: images per tokenizer step, pairs per CLIP step.
      num_variants: augmented versions of each image for the generator, besides the
        original.
      tokenizer_steps: at most; each training stops when its held-out loss no longer
        falls.
      clip_steps: at most.
      generator_steps: at most.
    """

    image_size: int
    num_codes: int
    d_model: int
    num_layers: int
    batch_size: int
    num_variants: int
    tokenizer_steps: int
    clip_steps: int
    generator_steps: int

    def __post_init__(self) -> None:
        if self.image_size not in SIZES:
            raise ValueError(
                f"--image_size is {self.image_size}; it must be 64, 128 or 256"
            )
        if self.d_model % 64:
            raise ValueError(
                f"--d_model is {self.d_model}; it must be a multiple of 64"
            )


@dataclasses.dataclass(frozen=True)
class SourceStats:
    """Statistics of a source.

    Attributes:
      count: number of records.
      side: shorter side of the median image, in pixels.
    """

    count: int
    side: int


class StoppedEarly(Exception):
    """A signal stopped a stage, after a save: the same command resumes."""


def main(
    source: str,
    workdir: Path,
    load_config: Callable[[str, str], Any],
    *,
    group_key: str = "",
    holdout: str = "",
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Runs every stage that is not done yet; see the module.

    Args:
      source: see `documents.sources`.
      workdir: gets one folder per stage.
      load_config: (name, argument) of a file of `configs/` -> its config.
      group_key: see `documents.sources`.
      holdout: see `documents.sources`; "" holds out a tenth, at most about 500
        documents.
      sizes: fields of the plan to use instead of the chosen ones.

    Raises:
      ValueError: a source with too few images or captions, `workdir` is inside the
        source, or has another plan.
      StoppedEarly: a signal stopped a stage.
    """
    refuse_url(workdir, "the work directory of a fit")
    for place, _ in parse_sources(source):
        refuse_inside(place, workdir, "give another --workdir")
    own_files.check(
        workdir / "samples.png",
        workdir / "report.html",
        change="give another --workdir",
    )
    chain = _Chain(workdir, load_config)
    with _plan_dropped_if_refused(workdir):
        chain.data, chain.plan = _decide(
            workdir, source, group_key, holdout, sizes or {}, chain.say
        )
        chain.tokenizer()
    for stage in (chain.clip, chain.memory, chain.generator):
        stage()
    chain.report()


@contextlib.contextmanager
def _plan_dropped_if_refused(workdir: Path) -> Iterator[None]:
    """Removes a new plan if no training was started with it.

    So that a corrected command is not refused.
    """
    plan, used = workdir / PLAN_NAME, workdir / "tokenizer" / "config.json"
    was_made, was_new = workdir.exists(), not plan.exists()
    was_used = used.exists()
    try:
        yield
    except (ValueError, OSError):
        if was_new and used.exists() == was_used:
            with contextlib.suppress(OSError):
                plan.unlink()
                if not was_made:
                    workdir.rmdir()  # if it is empty
        raise


def inspect_source(source: str) -> SourceStats:
    """Counts the records of a source and measures the first images.

    Raises:
      ValueError: no image among the first records.
    """
    places = [place for place, _ in parse_sources(source)]
    count = sum(
        sum(1 for _ in shard.open()) for place in places for shard in find_shards(place)
    )
    first = itertools.chain.from_iterable(map(read_documents, places))
    sides = [
        min(image.shape[:2])
        for document in itertools.islice(first, _NUM_MEASURED)
        for image in document.images
    ]
    if not sides:
        raise ValueError(
            f"--source={source} has no image in its first {_NUM_MEASURED} documents: "
            "give a folder of images with captions"
        )
    return SourceStats(count, int(statistics.median(sides)))


def choose_plan(stats: SourceStats, cores: int, accelerated: bool) -> Plan:
    """Sizes for these images on this machine.

    All trainings together take about 20 minutes on two CPU cores; with more than a few
    thousand images, each is seen less often, or at 64 pixels.
    """
    fitting = [size for size in SIZES if size <= max(stats.side, SIZES[0])]
    largest = 256 if accelerated else 128 if stats.count <= 5000 or cores > 8 else 64
    image_size = min(fitting[-1], largest)
    is_small = stats.count < 5000
    if accelerated:
        return Plan(
            image_size=image_size,
            num_codes=1024 if is_small else 4096,
            d_model=384 if is_small else 768,
            num_layers=6 if is_small else 12,
            batch_size=64,
            num_variants=7,
            tokenizer_steps=4000 if is_small else 20_000,
            clip_steps=2000 if is_small else 10_000,
            generator_steps=4000 if is_small else 20_000,
        )
    return Plan(
        image_size=image_size,
        num_codes=512 if stats.count < 500 else 1024,
        d_model=256,
        num_layers=4,
        batch_size=16,
        num_variants=3 if is_small else 0,
        tokenizer_steps=1000,
        clip_steps=800,
        generator_steps=1000 if is_small else 3000,
    )


def choose_holdout(count: int) -> str:
    """The fraction of a tenth of the documents, about 4 to 500, for `--holdout`."""
    return f"{min(max(0.1, 4 / count), 0.5, 500 / count):.4g}"


def count_groups(source: str, group_key: str, holdout: str, enough: int) -> int:
    """The number of groups to train on, with an image and a caption; at most `enough`.

    Raises:
      ValueError: no image has a caption, or fewer than two groups are for training or
        held out.
    """
    corpus = source_corpus(source, group_key, holdout)
    num_train = _count(corpus, corpus.train(), max(enough, 2))
    num_heldout = _count(corpus, corpus.heldout(), 2)
    what = f"groups by {group_key}" if group_key else "images"
    if not num_train + num_heldout:
        raise ValueError(
            f"--source={source} has no image with a caption: write captions next to the "
            "images (cat.jpg, cat.txt) or into a table (captions.csv)"
        )
    for number, purpose in ((num_train, "for training"), (num_heldout, "held out")):
        if number < 2:
            raise ValueError(
                f"with --holdout={holdout}, {number} captioned {what} are {purpose}; at "
                "least 2 are needed: change --holdout, or add images with captions"
            )
    return min(num_train, enough)


def _count(corpus: Corpus, documents: Iterable[Document], enough: int) -> int:
    found = set()
    for document in documents:
        if document.text.strip() and document.images:
            found.add(corpus.group(document))
            if len(found) == enough:
                break
    return len(found)


def _decide(
    workdir: Path,
    source: str,
    group_key: str,
    holdout: str,
    sizes: Mapping[str, int],
    say: Callable[[str], None],
) -> tuple[dict[str, str], Plan]:
    """The plan of a work directory: made by the first call, reused afterwards.

    Raises:
      ValueError: the first call had other settings.
    """
    path = workdir / PLAN_NAME
    data = {"source": source, "group_key": group_key, "holdout": holdout}
    if path.exists():
        own_files.check(path, key="plan", change="give another --workdir")
        kept = json.loads(path.read_text(encoding="utf-8"))
        asked = data | dict(sizes)
        known = kept["asked"] | kept["plan"]
        changed = [name for name, value in asked.items() if known.get(name) != value]
        if changed:
            raise ValueError(
                f"{workdir} was started with another --{changed[0]} "
                f"({known.get(changed[0])!r}): give that again, or another --workdir"
            )
        say(f"resuming with {path}")
        return kept["data"], Plan(**kept["plan"])
    stats = inspect_source(source)
    accelerated = jax.default_backend() != "cpu"
    cores = os.cpu_count() or 1
    plan = choose_plan(stats, cores, accelerated)
    plan = dataclasses.replace(plan, **sizes)
    asked = dict(data)
    if not holdout:
        data["holdout"] = choose_holdout(stats.count)
    plan = _with_possible_batch(plan, data, "batch_size" in sizes)
    machine = jax.devices()[0].device_kind if accelerated else f"{cores} cores"
    say(
        f"{stats.count:,} documents, images of about {stats.side} pixels, "
        f"{machine}: sizes follow from them unless given"
    )
    chosen = {"holdout": data["holdout"]} | dataclasses.asdict(plan)
    for name, value in chosen.items():
        say(f"  --{name}={value}")
    workdir.mkdir(parents=True, exist_ok=True)
    record = {"asked": asked, "data": data, "plan": dataclasses.asdict(plan)}
    own_files.write_json(path, record)
    return data, plan


def _with_possible_batch(plan: Plan, data: Mapping[str, str], is_given: bool) -> Plan:
    """The plan with a batch of as many images as there are, if they are few.

    Raises:
      ValueError: the given batch is larger, or see `count_groups`.
    """
    num_groups = count_groups(**data, enough=plan.batch_size)
    if num_groups == plan.batch_size:
        return plan
    if is_given:
        raise ValueError(
            f"--batch_size is {plan.batch_size}, but only {num_groups} captioned images "
            "of different groups are for training: give a number up to that"
        )
    # Equal parts for all devices.
    devices = jax.device_count()
    batch_size = max(num_groups // devices, 1) * devices
    return dataclasses.replace(plan, batch_size=batch_size)


class _Chain:
    """The stages, with their progress messages."""

    data: dict[str, str]
    plan: Plan

    def __init__(self, workdir: Path, load_config: Callable[[str, str], Any]) -> None:
        self.workdir = workdir
        self._load_config = load_config
        self._console = Console(highlight=False)
        self._started = time.monotonic()
        # Of trainings that this call ran from their first step.
        self._done_cost = self._done_seconds = 0.0

    def say(self, text: str) -> None:
        seconds = time.monotonic() - self._started
        self._console.print(f"[dim]{seconds:5.0f} s[/dim]  {text}", soft_wrap=True)

    def tokenizer(self) -> None:
        config = self._config("own_tokenizer.py", str(self.plan.image_size))
        config.vqgan.num_codes = self.plan.num_codes
        config.batch_size = self.plan.batch_size
        self._train("tokenizer", config, self.plan.tokenizer_steps, "vqgan")

    def clip(self) -> None:
        config = self._config("own_clip.py", "")
        config.batch_size = self.plan.batch_size
        self._train("clip", config, self.plan.clip_steps, "clip")

    def memory(self) -> None:
        config, path = self._generator_config(), self._generator / "memory"
        if (path / "manifest.json").exists():
            self.say(f"memory: {path} exists")
            return
        memory = wiring.build_memory(
            config,
            path,
            wiring.read_memory_documents(config),
            wiring.build_tokenizer(config),
            wiring.build_embedder(config),
        )
        self.say(f"memory: {len(memory):,} documents in {path}")
        memory.close()

    def generator(self) -> None:
        steps = self.plan.generator_steps
        self._train("generator", self._generator_config(), steps, "model")

    @property
    def _generator(self) -> Path:
        return self.workdir / "generator"

    def _config(self, name: str, argument: str) -> Any:
        config = self._load_config(name, argument)
        for key, value in self.data.items():
            config[key] = value
        return config

    def _generator_config(self) -> Any:
        config = self._config("own_generator.py", str(self.plan.image_size))
        config.tokenizer.image = str(self.workdir / "tokenizer" / "vqgan")
        config.tokenizer.text = str(self.workdir / "clip" / "text")
        config.embedder = str(self.workdir / "clip" / "clip")
        config.model.d_model = self.plan.d_model
        config.model.num_layers = self.plan.num_layers
        config.model.head_dim = 64
        config.model.num_heads = self.plan.d_model // 64
        config.model.d_ff = 4 * self.plan.d_model
        config.augmentation.num_variants = self.plan.num_variants
        return config

    def _train(self, name: str, config: Any, num_steps: int, exported: str) -> None:
        folder = self.workdir / name
        costs = _costs(self.plan)
        cost = costs[name]
        if (folder / exported / "manifest.json").exists():
            self.say(f"{name}: {folder / exported} exists")
            return
        left = sum(list(costs.values())[list(costs).index(name) :])
        guess = ""
        if self._done_cost:
            minutes = round(self._done_seconds * left / self._done_cost / 60)
            guess = f"; about {minutes} min left in total"
        self.say(f"{name}: up to {num_steps:,} steps{guess}")
        config.train.num_steps = num_steps
        config.optimizer.warmup_steps = min(
            config.optimizer.warmup_steps, max(1, num_steps // 10)
        )
        config.train.eval_every = min(config.train.eval_every, max(1, num_steps // 10))
        is_new, started = not folder.exists(), time.monotonic()
        state, has_ended = run.run_training(config, folder)
        if not has_ended:
            raise StoppedEarly(
                f"stopped and saved {name} after step {int(state.step)} of {num_steps}; "
                "the same command resumes"
            )
        if is_new:
            self._done_cost += cost
            self._done_seconds += time.monotonic() - started
        figures = _best_metrics(folder)
        self.say(
            f"{name}: step {int(state.step)}, held out: {_format_metrics(figures)}"
        )

    def report(self) -> None:
        """The sheet and the report, from held-out documents."""
        generator = run.load(self._generator)
        corpus = wiring.build_corpus(self._generator_config())
        documents = wiring.read_heldout(corpus, _NUM_JUDGED)
        shown = documents[:_NUM_SHOWN]
        sheet = self.workdir / "samples.png"
        wiring.generate_heldout(generator, shown, 2, 0, sheet, "held-out caption")
        self.say(f"images of {len(shown)} held-out captions: {sheet}")
        facts = {
            "source": self.data["source"],
            "documents in the memory": str(len(generator.retriever.memory)),  # type: ignore[union-attr]
            "held out": f"{self.data['holdout']}; {len(documents)} documents evaluated",
        }
        for name in ("tokenizer", "clip"):
            facts[name] = _format_metrics(_best_metrics(self.workdir / name))
        for what, num_retrieved in (("with retrieval", 2), ("without", 0)):
            found = compute_likelihoods(
                generator, documents, num_retrieved=num_retrieved
            )
            facts[f"generator {what}"] = _format_metrics(found.means())
        curves = {
            f"Loss: {name}": self.workdir / name / "loss.png"
            for name in ("tokenizer", "clip", "generator")
        }
        write_report(
            self.workdir / "report.html",
            title="RA-CM3 on your own images",
            explanation=_EXPLANATION,
            sheet=sheet,
            captions=_caption(generator, shown),
            loss_curves=curves,
            facts=facts,
        )
        self.say(f"report: {self.workdir / 'report.html'}")
        self.say(
            f'generate more: racm3 generate --workdir={self._generator} --prompt="…"'
        )


def _costs(plan: Plan) -> dict[str, float]:
    """Relative cost of each training, to estimate the remaining time."""
    pixels = (plan.image_size / 128) ** 2
    return {
        "tokenizer": plan.tokenizer_steps * plan.batch_size * pixels,
        "clip": plan.clip_steps * plan.batch_size * 0.1,
        "generator": plan.generator_steps
        * 16
        * pixels
        * (plan.d_model / 256) ** 2
        * (plan.num_layers / 4),
    }


def _best_metrics(folder: Path) -> dict[str, float]:
    """The metrics of the evaluation with the lowest loss."""
    lines = [line for line in read_jsonl(folder) if line.get("eval/loss") is not None]
    best = min(lines, key=lambda line: line["eval/loss"], default={})
    return {
        name.removeprefix("eval/"): value
        for name, value in best.items()
        if name.startswith("eval/") and value is not None
    }


_REPORTED = (
    *("loss", "psnr", "codebook_usage", "contrast_accuracy"),
    *("text_perplexity", "image_perplexity", "bits_per_image"),
)


def _format_metrics(figures: Mapping[str, float]) -> str:
    shown = [f"{name} {figures[name]:.4g}" for name in _REPORTED if name in figures]
    return ", ".join(shown)


def _caption(generator: Generator, documents: list[Document]) -> list[CaptionRow]:
    images = [document.images[0] for document in documents]
    named = generator.caption_batch(images, num_retrieved=2, temperature=0.0)
    alone = generator.caption_batch(images, num_retrieved=0, temperature=0.0)
    return caption_rows(generator, documents, named, alone)
