"""A training gate: does the newest checkpoint read its documents?

    python experiments/reading_gate.py WORKDIR
    python experiments/reading_gate.py WORKDIR --follow --every=2000
    python experiments/reading_gate.py WORKDIR --export=FOLDER

On flagworld it tests held-out nations with one right and one wrong document, in both
orders: fractions of the questions that follow the right document, at the first token of
the name and at the first code of the flag. On any other source with a `group_key` it
measures bits of held-out images and captions after right and wrong documents
(`document_bits.py`). Appends a line to WORKDIR/gate.jsonl; the training is not affected. With `--follow` it waits for more checkpoints until the last step. With
`--export` it writes the checkpoint's weights in half precision instead, for
`--config.init_from=FOLDER` of another training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from document_bits import make_questions, measure_bits
from ml_collections import ConfigDict

from racm3_jax import wiring
from racm3_jax.checkpoints import Checkpoints, save_weights
from racm3_jax.flagworld.reading import (
    ReadingQuestion,
    make_reading_questions,
    measure_reading,
)
from racm3_jax.generation.tasks import Generator
from racm3_jax.model.transformer import init_params
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.training.optimizer import OptimizerConfig, build_optimizer
from racm3_jax.training.step import init_state
from racm3_jax.wiring.generators import ask_as_trained
from racm3_jax.wiring.parts import build_mesh, build_model_config, construct


class Gate:
    """Opens checkpoints of one work directory and tests them."""

    def __init__(self, workdir: Path, num_questions: int, num_documents: int) -> None:
        config = ConfigDict(json.loads((workdir / "config.json").read_text()))
        self.config: Any = config
        self.segment_order = config.pipeline.get("segment_order", "stored")
        self.checkpoints = Checkpoints(workdir / "checkpoints")
        self.tokenizer = wiring.build_tokenizer(config)
        self.model_config = build_model_config(config, self.tokenizer.vocab)
        self.like = init_state(
            lambda key: init_params(self.model_config, key, boxed=True),
            build_optimizer(
                construct(
                    OptimizerConfig,
                    config.optimizer,
                    "optimizer",
                    num_steps=config.train.num_steps,
                )
            ),
            build_mesh(config),
            jax.random.key(0),
        )
        self.measure: Callable[[Generator], dict[str, Any]]
        if config.get("world") is not None:
            asked = make_reading_questions(
                wiring.build_world(config), num_questions, num_documents=num_documents
            )
            self.measure = lambda generator: _ask_nations(generator, asked)
        else:
            strategy = construct(StrategyConfig, config.strategy, "strategy")
            questions = make_questions(
                wiring.build_corpus(config),
                num_questions,
                num_documents=num_documents,
                exclude_keys=strategy.parsed_exclude_keys,
            )
            turned = self.segment_order == "as_main"
            self.measure = lambda generator: measure_bits(
                generator, questions, images_first=turned
            )

    def ask(self, step: int) -> dict[str, Any]:
        """What the checkpoint of that step does with its documents."""
        state, _ = self.checkpoints.restore(step, self.like)
        params = jax.device_get(state.params)
        generator = Generator(self.model_config, params, self.tokenizer, None, None)
        return {"step": step} | self.measure(generator)

    def export(self, step: int, folder: Path) -> None:
        """Only the weights, in half precision."""
        state, _ = self.checkpoints.restore(step, self.like)
        save_weights(
            folder,
            jax.device_get(state.params),
            kind="generator",
            config=dataclasses.asdict(self.model_config),
            extra={"step": step, "defaults": ask_as_trained({}, self.segment_order)},
            dtype="float16",
        )


def _ask_nations(
    generator: Generator, questions: Sequence[ReadingQuestion]
) -> dict[str, Any]:
    """Results with the right document first and last, by question."""
    line: dict[str, Any] = {"questions": len(questions)}
    for order, place in (("right_first", 0), ("right_last", -1)):
        found = measure_reading(generator, questions, right_place=place)
        named = {f"{asked}_{order}": result for asked, result in found.items()}
        turned = measure_reading(
            generator, questions, right_place=place, image_first=True
        )
        named[f"name_{order}_images_in_front"] = turned["name"]
        for name, result in named.items():
            line[name] = {
                "first": round(result.first.value, 3),
                "whole": round(result.whole.value, 3),
                "p_right": round(result.probability_right, 3),
                "p_wrong": round(result.probability_wrong, 3),
            }
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--follow", action="store_true")
    parser.add_argument("--export", type=Path)
    arguments = parser.parse_args()
    gate = Gate(arguments.workdir, arguments.questions, arguments.documents)
    if arguments.export:
        step = gate.checkpoints.latest_good(quarantine=False)
        if step is None:
            raise SystemExit(f"{arguments.workdir} has no complete checkpoint yet")
        gate.export(step, arguments.export)
        print(f"step {step} is in {arguments.export}")
        return
    last, end = -1, int(gate.config.train.num_steps)
    while True:
        # Ignore a checkpoint that is being written.
        step = gate.checkpoints.latest_good(quarantine=False)
        if (
            step is not None
            and step > last
            and (step % arguments.every == 0 or step == end)
        ):
            line = gate.ask(step)
            print(json.dumps(line), flush=True)
            with (arguments.workdir / "gate.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            last = step
        if not arguments.follow or last >= end:
            return
        time.sleep(15)


if __name__ == "__main__":
    main()
