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

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from racm3_jax import own_files, run, wiring
from racm3_jax.buckets import refuse_url
from racm3_jax.documents.readers import refuse_inside
from racm3_jax.documents.sources import parse_sources
from racm3_jax.evaluation.perplexity import compute_likelihoods
from racm3_jax.evaluation.report import CaptionRow, caption_rows, write_report
from racm3_jax.fit_plan import Plan, decide, plan_dropped_if_refused
from racm3_jax.generation.tasks import Generator
from racm3_jax.metrics import read_jsonl
from racm3_jax.types import Document

# Held-out documents of the sheet and of the report's metrics.
_NUM_SHOWN, _NUM_JUDGED = 8, 64
_EXPLANATION = (
    "The captions and images below were held out from all trainings: the model knows "
    "only similar documents, from its training and from what it retrieved."
)


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
    with plan_dropped_if_refused(workdir):
        chain.data, chain.plan = decide(
            workdir, source, group_key, holdout, sizes or {}, chain.say
        )
        chain.tokenizer()
    for stage in (chain.clip, chain.memory, chain.generator):
        stage()
    chain.report()


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
