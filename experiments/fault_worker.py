"""The training of experiments/faults.py: `racm3_jax.run.train` at small size.

A Transformer of 30,000 parameters on random rows, in one process or, with the three
RACM3_ variables, in several; state, checkpoints, metrics and resuming are the
package's. --without=NAME disables a guard to show its effect.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from racm3_jax import run, sharding, wiring
from racm3_jax.commands.configs import find_config, load_config_file
from racm3_jax.model.config import tiny
from racm3_jax.model.transformer import Transformer, head_weights, init_params
from racm3_jax.training.loss import make_generator_loss
from racm3_jax.training.optimizer import OptimizerConfig, build_optimizer
from racm3_jax.training.step import (
    TrainState,
    TrainStep,
    init_state,
    make_train_step,
)
from racm3_jax.types import Batch
from racm3_jax.vocab import Vocab
from racm3_jax.wiring.jobs import Job

ROWS, LENGTH = 8, 32
VOCAB = Vocab(num_text_ids=20, num_image_codes=10, image_length=2, num_sentinels=14)


def make_batch(step: int, poisoned: bool) -> Batch:
    """This process's rows of the step's batch; a pure function of the step."""
    rng = np.random.default_rng((7, step))

    def ids(high: int) -> np.ndarray:
        return rng.integers(0, high, (ROWS, LENGTH)).astype(np.int32)

    batch = Batch(
        inputs=ids(VOCAB.size),
        targets=ids(VOCAB.size),
        loss_weights=rng.choice([0.0, 0.1, 1.0], (ROWS, LENGTH)).astype(np.float32),
        segment_ids=np.sort(ids(3), axis=1),
        positions=ids(LENGTH),
        is_main=rng.random((ROWS, LENGTH)) < 0.5,
    )
    # Only one process has the rows of the batch that are not finite.
    if poisoned and jax.process_index() == jax.process_count() - 1:
        batch.loss_weights[-1] = np.nan
    share = ROWS // jax.process_count()
    own = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    return Batch(*(field[own] for field in batch))


def digest(state: TrainState) -> str:
    """Digest of this process's parameters and optimizer state."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        for shard in leaf.addressable_shards:
            found.update(np.asarray(shard.data).tobytes())
    return found.hexdigest()


def make_job(arguments: argparse.Namespace, config: Any, workdir: Path) -> Job:
    """The job that `wiring.build_job` would build from a flagworld config."""
    poisoned = {int(step) for step in arguments.nan_steps.split(",") if step}
    mesh = sharding.make_mesh()
    optimizer = build_optimizer(OptimizerConfig(1e-2, 5, config.train.num_steps))
    model_config = tiny(vocab_size=VOCAB.size)
    model: Any = Transformer(model_config)
    state = init_state(
        lambda key: init_params(model_config, key, boxed=True),
        optimizer,
        mesh,
        jax.random.key(config.seed),
    )
    step_fn = make_train_step(
        make_generator_loss(
            lambda params, *inputs: model.apply({"params": params}, *inputs),
            lambda params: head_weights(params, model_config),
            VOCAB,
        ),
        optimizer,
        mesh,
        state,
        skip_nonfinite=bool(poisoned) and arguments.without != "skip",
    )

    class Checked(TrainStep):
        """Records whether a poisoned step left the state unchanged."""

        def __call__(self, state: TrainState, batch: Any) -> Any:
            step = int(state.step)
            if step not in poisoned:
                return super().__call__(state, batch)
            before = digest(state)
            state, metrics = super().__call__(state, batch)
            note(f"skips.{jax.process_index()}", {"same": digest(state) == before})
            return state, metrics

    def note(name: str, line: dict[str, Any]) -> None:
        with open(workdir / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def make(start_step: int) -> Iterator[Any]:
        if jax.process_index() == 0:
            note("starts", {"step": start_step, "time": time.time()})
        first = 0 if arguments.without == "position" else start_step
        for number in range(config.train.num_steps - start_step):
            time.sleep(arguments.step_seconds)
            stuck = arguments.stuck_step == start_step + number
            if stuck and jax.process_index() == jax.process_count() - 1:
                time.sleep(600)
            yield make_batch(first + number, first + number in poisoned)

    checked = Checked(step_fn.compiled, mesh)
    return Job(state, checked, make, config.train.num_steps, lambda state: None)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--save_every", type=int, default=5)
    parser.add_argument("--step_seconds", type=float, default=0.03)
    parser.add_argument("--watchdog_seconds", type=float, default=0.0)
    parser.add_argument("--nan_steps", default="", help="as in 3,7,8")
    parser.add_argument("--stuck_step", type=int, default=-1)
    parser.add_argument("--without", default="", choices=["", "position", "skip"])
    arguments = parser.parse_args(argv)
    # A config of any generator: the job is made here.
    config = load_config_file(find_config("flagworld_tiny.py"))
    config.train = {
        "num_steps": arguments.num_steps,
        "log_every": 1,
        "checkpoint_every": arguments.save_every,
        "max_skipped_steps": 3 if arguments.nan_steps else 0,
        "watchdog_seconds": arguments.watchdog_seconds,
    }
    wiring.build_job = lambda config, workdir: make_job(arguments, config, workdir)
    run.train(config, arguments.workdir, progress=False)


if __name__ == "__main__":
    main(sys.argv[1:])
