"""`racm3 fit`: all models of your own pictures, one stage after the other.

    source -> plan.json        sizes, by the pictures and the machine
           -> tokenizer/       configs/own_tokenizer.py
           -> clip/            configs/own_clip.py
           -> generator/       its memory, then configs/own_generator.py
           -> samples.png, report.html

Killed at any time and run again, the same command goes on where it was: each stage is a
training that resumes, or a build that does. Afterwards `generator/` is the work directory
of every other command.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from racm3_jax import own_files, run, wiring
from racm3_jax.buckets import refuse_url
from racm3_jax.documents.readers import find_shards, read_documents
from racm3_jax.documents.sources import parse_sources
from racm3_jax.evaluation.perplexity import compute_likelihoods
from racm3_jax.evaluation.pictures import retrieved_panels
from racm3_jax.evaluation.report import CaptionRow, write_report
from racm3_jax.generation.tasks import Generator
from racm3_jax.metrics import read_jsonl
from racm3_jax.types import Document

PLAN_NAME = "plan.json"
SIZES = (64, 128, 256)
# Records whose images are measured before sizes are chosen.
_NUM_MEASURED = 100
# Held-out documents of the sheet and of the report's figures.
_NUM_SHOWN, _NUM_JUDGED = 8, 64
_EXPLANATION = (
    "The captions and pictures below were held out: no training has seen them. What the "
    "model knows of their like it has from training and from the documents it retrieved."
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the three trainings; each is a flag of `racm3 fit`.

    Attributes:
      image_size: pixels of a side: 64, 128 or 256; a code covers 8 by 8 of them.
      num_codes: of the image tokenizer.
      d_model: width of the generator, a multiple of 64.
      num_layers: of the generator.
      batch_size: images of a step of the tokenizer, pairs of one of CLIP.
      num_variants: changes of the images that the generator learns from, beside none.
      tokenizer_steps: at most; each training ends when its held-out loss no longer falls.
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
                f"--image_size is {self.image_size}; it is one of 64, 128 and 256"
            )
        if self.d_model % 64:
            raise ValueError(
                f"--d_model is {self.d_model}; it must be a multiple of 64"
            )


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What is known of a source before anything is trained.

    Attributes:
      count: its records.
      side: of the median image, the shorter one, in pixels.
    """

    count: int
    side: int


class StoppedEarly(Exception):
    """A signal stopped a stage, after a save: the same command goes on."""


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
      workdir: gets a folder a stage.
      load_config: (name, argument) of a file of `configs/` -> its config.
      group_key: see `documents.sources`.
      holdout: likewise; "" holds out a tenth, at most about 500 documents.
      sizes: of the plan, that are not to be chosen.

    Raises:
      ValueError: a source without pictures, or `workdir` holds another plan.
      StoppedEarly: a signal stopped a stage.
    """
    refuse_url(workdir, "the work directory of a fit")
    own_files.check(
        workdir / "samples.png",
        workdir / "report.html",
        change="give another --workdir",
    )
    chain = _Chain(workdir, load_config)
    chain.data, chain.plan = _decide(
        workdir, source, group_key, holdout, sizes or {}, chain.say
    )
    for stage in (chain.tokenizer, chain.clip, chain.memory, chain.generator):
        stage()
    chain.report()


def look_at(source: str) -> Pictures:
    """Counts the records of a source, and measures the first images.

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
            f"--source={source} shows no image in its first {_NUM_MEASURED} documents: "
            "give a folder of images with captions"
        )
    return Pictures(count, int(statistics.median(sides)))


def choose_plan(pictures: Pictures, cores: int, accelerated: bool) -> Plan:
    """Sizes for these pictures on this machine.

    On a CPU the trainings together take some 20 minutes on two cores; more pictures than
    a few thousand are then seen less often, or at 64 pixels.
    """
    fitting = [size for size in SIZES if size <= max(pictures.side, SIZES[0])]
    largest = 256 if accelerated else 128 if pictures.count <= 5000 or cores > 8 else 64
    image_size = min(fitting[-1], largest)
    is_small = pictures.count < 5000
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
        num_codes=512 if pictures.count < 500 else 1024,
        d_model=256,
        num_layers=4,
        batch_size=16,
        num_variants=3 if is_small else 0,
        tokenizer_steps=1000,
        clip_steps=800,
        generator_steps=1000 if is_small else 3000,
    )


def _decide(
    workdir: Path,
    source: str,
    group_key: str,
    holdout: str,
    sizes: Mapping[str, int],
    say: Callable[[str], None],
) -> tuple[dict[str, str], Plan]:
    """The plan of a work directory: made by the first call, kept by the others.

    Raises:
      ValueError: the first call said something else.
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
                f"{workdir} was begun with another --{changed[0]} "
                f"({known.get(changed[0])!r}): give that again, or another --workdir"
            )
        say(f"going on with {path}")
        return kept["data"], Plan(**kept["plan"])
    pictures = look_at(source)
    accelerated = jax.default_backend() != "cpu"
    cores = os.cpu_count() or 1
    plan = choose_plan(pictures, cores, accelerated)
    plan = dataclasses.replace(plan, **sizes)
    asked = dict(data)
    if not holdout:
        data["holdout"] = f"{min(0.1, 500 / pictures.count):.4f}"
    machine = jax.devices()[0].device_kind if accelerated else f"{cores} cores"
    say(
        f"{pictures.count:,} documents, images of about {pictures.side} pixels, "
        f"{machine}; held out: {data['holdout']}"
    )
    for name, value in dataclasses.asdict(plan).items():
        say(f"  --{name}={value}")
    workdir.mkdir(parents=True, exist_ok=True)
    record = {"asked": asked, "data": data, "plan": dataclasses.asdict(plan)}
    own_files.write_json(path, record)
    return data, plan


class _Chain:
    """The stages, with what they say on the way."""

    data: dict[str, str]
    plan: Plan

    def __init__(self, workdir: Path, load_config: Callable[[str, str], Any]) -> None:
        self.workdir = workdir
        self._load_config = load_config
        self._console = Console(highlight=False)
        self._started = time.monotonic()
        self._done_cost = 0.0

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
            self.say(f"memory: {path} is there")
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
            self.say(f"{name}: {folder / exported} is there")
            return
        left = sum(list(costs.values())[list(costs).index(name) :])
        spent = time.monotonic() - self._started
        guess = ""
        if self._done_cost:
            minutes = spent * left / self._done_cost / 60
            guess = f"; about {minutes:.0f} minutes are left in all"
        self.say(f"{name}: up to {num_steps:,} steps{guess}")
        config.train.num_steps = num_steps
        config.optimizer.warmup_steps = min(
            config.optimizer.warmup_steps, max(1, num_steps // 10)
        )
        config.train.eval_every = min(config.train.eval_every, max(1, num_steps // 10))
        state, has_ended = run.run_training(config, folder)
        if not has_ended:
            raise StoppedEarly(
                f"stopped and saved {name} after step {int(state.step)} of {num_steps}; "
                "the same command goes on"
            )
        self._done_cost += cost
        figures = _last_figures(folder)
        self.say(f"{name}: step {int(state.step)}, held out: {_words(figures)}")

    def report(self) -> None:
        """The sheet and the page, from held-out documents."""
        generator = run.load(self._generator)
        corpus = wiring.build_corpus(self._generator_config())
        documents = wiring.read_heldout(corpus, _NUM_JUDGED)
        shown = documents[:_NUM_SHOWN]
        sheet = self.workdir / "samples.png"
        wiring.draw_heldout(generator, shown, 2, 0, sheet, "held-out caption")
        self.say(f"drew {len(shown)} held-out captions: {sheet}")
        facts = {
            "source": self.data["source"],
            "documents in the memory": str(len(generator.retriever.memory)),  # type: ignore[union-attr]
            "held out": f"{self.data['holdout']}; {len(documents)} documents are judged",
        }
        for name in ("tokenizer", "clip"):
            facts[name] = _words(_last_figures(self.workdir / name))
        for what, num_retrieved in (("with retrieval", 2), ("without", 0)):
            found = compute_likelihoods(
                generator, documents, num_retrieved=num_retrieved
            )
            facts[f"generator {what}"] = _words(found.means())
        curves = {
            f"Loss: {name}": self.workdir / name / "loss.png"
            for name in ("tokenizer", "clip", "generator")
        }
        write_report(
            self.workdir / "report.html",
            title="RA-CM3 on your own pictures",
            explanation=_EXPLANATION,
            sheet=sheet,
            captions=_caption(generator, shown),
            loss_curves=curves,
            facts=facts,
        )
        self.say(f"report: {self.workdir / 'report.html'}")
        self.say(f'draw more: racm3 generate --workdir={self._generator} --prompt="…"')


def _costs(plan: Plan) -> dict[str, float]:
    """Work of each training, in one unit: what time is left is told by it."""
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


def _last_figures(folder: Path) -> dict[str, float]:
    """What the evaluation with the lowest loss found."""
    lines = [line for line in read_jsonl(folder) if line.get("eval/loss") is not None]
    best = min(lines, key=lambda line: line["eval/loss"], default={})
    return {
        name.removeprefix("eval/"): value
        for name, value in best.items()
        if name.startswith("eval/") and value is not None
    }


_TOLD = (
    *("loss", "psnr", "codebook_usage", "contrast_accuracy"),
    *("text_perplexity", "image_perplexity", "bits_per_image"),
)


def _words(figures: Mapping[str, float]) -> str:
    told = [f"{name} {figures[name]:.4g}" for name in _TOLD if name in figures]
    return ", ".join(told)


def _caption(generator: Generator, documents: list[Document]) -> list[CaptionRow]:
    images = [document.images[0] for document in documents]
    named = generator.caption_batch(images, num_retrieved=2, temperature=0.0)
    alone = generator.caption_batch(images, num_retrieved=0, temperature=0.0)
    return [
        CaptionRow(
            image=document.images[0],
            truth=document.text,
            retrieved=retrieved_panels(generator, with_memory),
            with_retrieval=with_memory.texts[0],
            without=without.texts[0],
        )
        for document, with_memory, without in zip(documents, named, alone, strict=True)
    ]
