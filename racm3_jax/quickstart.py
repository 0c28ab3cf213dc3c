"""`racm3 quickstart`: the main job end to end on flagworld, from the shipped weights.

    documents -> tokens, embeddings -> ScaNN memory -> some training with live retrieval
    -> generated and captioned held-out nations -> samples.png, report.html

Every stage saves its result in the work directory; a second run reuses finished stages
and resumes training.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from racm3_jax import own_files, run, wiring
from racm3_jax.buckets import refuse_url
from racm3_jax.evaluation.pictures import save_outputs
from racm3_jax.evaluation.report import CaptionRow, caption_rows, write_report
from racm3_jax.flagworld import FlagworldConfig, read_flagworld
from racm3_jax.generation.tasks import Generator
from racm3_jax.types import Document
from racm3_jax.wiring.workdirs import claim_workdir, given_back_if_refused

_EXPLANATION = (
    "The nations below were never trained on; the model knows their flags and names "
    "only from the documents that it retrieved."
)


class Stages:
    """Prints progress messages with the elapsed time."""

    def __init__(self) -> None:
        # https://no-color.org; rich by itself would still dim.
        colors = None if os.environ.get("NO_COLOR") else "auto"
        self.console = Console(highlight=False, color_system=colors)
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        seconds = time.monotonic() - self.started
        self.console.print(f"[dim]{seconds:5.0f} s[/dim]  {text}")


def main(config: Any, workdir: Path, config_name: str) -> None:
    """Runs the whole quickstart in `workdir`; see the module.

    Args:
      config: its config.
      workdir: folder of the results.
      config_name: of the config and its changed settings, for the report.

    Raises:
      ValueError: `workdir` holds a run of another config.
    """
    wiring.read_training(config)
    refuse_url(workdir, "the work directory of the quickstart")
    stages = Stages()
    own_files.check(
        workdir / "samples.png",
        workdir / "report.html",
        change="give another --workdir",
    )
    with given_back_if_refused(workdir):
        claim_workdir(config, workdir)
        world = wiring.build_world(config)
        tests = choose_tests(world, config.num_prompts)
        prompts = [test.text for test in tests]
        stages.say("opening the tokenizer and CLIP")
        tokenizer = wiring.build_tokenizer(config)
        embedder = wiring.build_embedder(config)
    if not (workdir / "samples.png").exists():
        generate_first_image(workdir / "samples.png", world, tests[:2], config.seed)
        stages.say(f"first image, from hand-picked documents: {workdir}/samples.png")

    documents = memory_documents(config, world)
    memory = wiring.build_memory(
        config,
        workdir / "memory",
        documents,
        tokenizer,
        embedder,
        num_documents=count_documents(config),
    )
    num_documents = len(memory)
    memory.close()
    stages.say(f"memory of {num_documents:,} documents, {config.memory.index} index")

    run.train(config, workdir)
    stages.say(f"trained to step {config.train.num_steps}; {workdir / 'metrics.jsonl'}")

    generator = run.load(workdir)
    twin = wiring.load_generator(
        wiring.resolve("shipped:flagworld"), None, model="twin"
    )
    generated = generator.text_to_image_batch(
        prompts, num_retrieved=2, seed=config.seed, guidance=2.0, guide_documents=True
    )
    plain = twin.text_to_image_batch(prompts, num_retrieved=0, seed=config.seed)
    save_outputs(workdir / "samples.png", generator, generated, plain)
    stages.say(f"images of {len(prompts)} held-out nations: {workdir / 'samples.png'}")

    captions = _caption(generator, twin, tests, config.seed)
    right = sum(
        test.metadata["nation"] in row.with_retrieval
        for test, row in zip(tests, captions, strict=True)
    )
    write_report(
        workdir / "report.html",
        title="RA-CM3 on flagworld",
        explanation=_EXPLANATION,
        sheet=workdir / "samples.png",
        captions=captions,
        loss_curves={
            "This training": workdir / "loss.png",
            "How the shipped models were trained from scratch": wiring.resolve(
                "shipped:flagworld/loss.png"
            ),
        },
        facts={
            "memory": f"{num_documents:,} documents",
            "training steps": str(config.train.num_steps),
            "captions that name the right nation": f"{right} of {len(captions)}",
            "config": config_name,
        },
    )
    stages.say(f"captions name the right nation {right} of {len(captions)} times")
    stages.say(f"report: {workdir / 'report.html'}")


def choose_tests(world: FlagworldConfig, num_prompts: int) -> list[Document]:
    """One test document of each of the first held-out nations."""
    by_nation: dict[str, Document] = {}
    for document in read_flagworld(world, "heldout_test"):
        by_nation.setdefault(document.metadata["nation"], document)
        if len(by_nation) == num_prompts:
            break
    return list(by_nation.values())


def memory_documents(config: Any, world: FlagworldConfig) -> Iterator[Document]:
    """All held-out documents, and the configured number of training documents."""
    yield from read_flagworld(world, "heldout_memory")
    train = read_flagworld(world, "train")
    yield from itertools.islice(train, config.num_train_documents)


def count_documents(config: Any) -> int:
    """Number of documents from `memory_documents`."""
    world = config.world
    held_out = world.num_heldout * world.documents_per_heldout
    train = world.num_nations * world.documents_per_nation
    return held_out + min(config.num_train_documents, train)


def generate_first_image(
    path: Path, world: FlagworldConfig, tests: list[Document], seed: int
) -> None:
    """Generates each test's nation from two of its documents, as a first result."""
    shipped = wiring.load_generator(wiring.resolve("shipped:flagworld"), None)
    own: dict[str, list[Document]] = {t.metadata["nation"]: [] for t in tests}
    for document in read_flagworld(world, "heldout_memory"):
        documents = own.get(document.metadata["nation"])
        if documents is not None and len(documents) < 2:
            documents.append(document)
        if all(len(documents) == 2 for documents in own.values()):
            break
    generated = [
        shipped.text_to_image(
            test.text, documents=own[test.metadata["nation"]], seed=seed
        )
        for test in tests
    ]
    plain = [shipped.text_to_image(t.text, num_retrieved=0, seed=seed) for t in tests]
    save_outputs(path, shipped, generated, plain)


def _caption(
    generator: Generator, twin: Generator, tests: list[Document], seed: int
) -> list[CaptionRow]:
    images = [test.images[0] for test in tests]
    named = generator.caption_batch(images, num_retrieved=2, seed=seed, temperature=0.0)
    guessed = twin.caption_batch(images, num_retrieved=0, seed=seed, temperature=0.0)
    return caption_rows(generator, tests, named, guessed)
