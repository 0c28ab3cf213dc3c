"""Train, evaluate, load: the three verbs, over objects that `build` made."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging

from racm3_jax import own_files, storage, wiring
from racm3_jax.checkpoints import Checkpoints
from racm3_jax.evaluation import (
    flagworld,
    flagworld_tasks,
    likelihood_results,
    protocol_results,
)
from racm3_jax.evaluation.flagworld import evaluate_flagworld
from racm3_jax.evaluation.flagworld_tasks import (
    evaluate_flagworld_tasks,
)
from racm3_jax.evaluation.likelihood_results import evaluate_likelihood
from racm3_jax.evaluation.protocol_results import evaluate_coco
from racm3_jax.evaluation.runner import (
    check_workdir,
    write_results,
    write_sheet,
    write_table,
)
from racm3_jax.evaluation.task_sheets import write_task_sheets
from racm3_jax.generation.tasks import Generator
from racm3_jax.memory.memory import Memory
from racm3_jax.metrics import MetricsWriter, plot_curves
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.training.hardware import explain_out_of_memory, find_device
from racm3_jax.training.loop import Profile, fit
from racm3_jax.training.processes import SignsOfLife, join_processes, leader_first
from racm3_jax.training.step import TrainState

# What a work directory holds that was claimed and not used.
_CLAIM = {"config.json", "training.lock"}
# What trainings write: in a directory without a config.json, it is somebody else's.
_OUTPUTS = (
    "checkpoints",
    "clip",
    "loss.png",
    "metrics.jsonl",
    "model",
    "source",
    "tensorboard",
    "text",
    "tokenizer",
    "vqgan",
)
# Settings that a resumed run may change: what is learned from which data stays.
_MAY_CHANGE = (
    "config.mesh",
    "config.model.remat",
    "config.train.checkpoint_every",
    "config.train.keep_checkpoints",
    "config.train.log_every",
    "config.train.num_microbatches",
    "config.train.watchdog_seconds",
)


def train(
    config: Any,
    workdir: str | Path,
    *,
    progress: bool = True,
    profile_steps: tuple[int, int] | None = None,
) -> TrainState:
    """Trains what `config.kind` names, in `workdir`; the same call resumes.

    Writes `config.json`, `metrics.jsonl` (and TensorBoard event files), `loss.png`,
    `checkpoints/` and, at the end, the exported model. A step's batch depends on the
    seed and the step's number alone, so that a resumed run equals an unbroken one, bit
    for bit.

    Args:
      config: from a file of `configs/`.
      workdir: created if missing.
      progress: show a progress bar.
      profile_steps: first and last step of a trace, written to `workdir/profile`.

    Returns:
      The last state; its step is below `config.train.num_steps` when SIGTERM or Ctrl-C
      ended the training early, after a save.

    Raises:
      ValueError: if `workdir` holds a run of another config.
    """
    join_processes()
    workdir = Path(workdir)
    own_files.check(workdir / "loss.png", change="give another --workdir")
    with given_back_if_refused(workdir):
        with leader_first():
            fingerprint = claim_workdir(config, workdir)
        with _advice_when_memory_is_full(config):
            job = wiring.build_job(config, workdir)
    profile = Profile(*profile_steps, workdir / "profile") if profile_steps else None
    saver = Checkpoints(
        workdir / "checkpoints",
        keep=config.train.get("keep_checkpoints", 2),
        save_interval=config.train.checkpoint_every,
    )
    state = job.state
    found = saver.latest_good()
    if found is not None:
        state, _ = saver.restore(found, state)
        logging.info("resuming %s at step %d", workdir, found)
    start_step = int(state.step)
    if start_step < job.num_steps:
        batches = job.make_batches(start_step)
        try:
            with (
                _make_writer(workdir) as writer,
                _advice_when_memory_is_full(config),
            ):
                state = fit(
                    state,
                    job.step_fn,
                    batches,
                    num_steps=job.num_steps,
                    writer=writer,
                    checkpoints=saver,
                    checkpoint_extra={"config": fingerprint},
                    log_every=config.train.log_every,
                    progress=progress,
                    description=f"train {config.kind}",
                    with_stats=job.with_stats,
                    max_skipped_steps=config.train.get("max_skipped_steps", 0),
                    peak_flops=_peak_flops(),
                    flops_per_token=job.flops_per_token,
                    profile=profile,
                    watchdog_seconds=config.train.get("watchdog_seconds", 0.0),
                    signs=_make_signs(workdir),
                )
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()
        if jax.process_index() == 0:
            plot_curves([workdir / "metrics.jsonl"], workdir / "loss.png")
    saver.close()
    if int(state.step) == job.num_steps:
        job.export(state)
    return state


@contextlib.contextmanager
def _advice_when_memory_is_full(config: Any) -> Iterator[None]:
    """The traceback of such an error ends with the settings that would mend it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if advice := explain_out_of_memory(error, config):
            error.add_note(advice)
        raise


def _make_writer(workdir: Path) -> contextlib.AbstractContextManager[Any]:
    """Process 0 writes; the others get None."""
    if jax.process_index() == 0:
        return MetricsWriter(workdir)
    return contextlib.nullcontext()


def _make_signs(workdir: Path) -> SignsOfLife | None:
    count = jax.process_count()
    if count == 1:
        return None
    return SignsOfLife(workdir / "processes", jax.process_index(), count)


def _peak_flops() -> float:
    """Of all devices together; 0 for a kind that is not in the table, as CPUs."""
    device = find_device(jax.devices()[0].device_kind)
    return device.flops * jax.device_count() if device else 0.0


@contextlib.contextmanager
def given_back_if_refused(workdir: Path) -> Iterator[None]:
    """Makes a work directory; one that holds its config alone is free after an error.

    The corrected command has another config, which must not be refused then.
    """
    is_made = not workdir.exists()
    is_new = not (workdir / "config.json").exists()
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except Exception:
        with contextlib.suppress(OSError):
            names = set(os.listdir(workdir))
            if is_new and names <= _CLAIM:
                for name in names:
                    (workdir / name).unlink()
            if is_made:
                workdir.rmdir()  # if it is empty
        raise


def claim_workdir(config: Any, workdir: Path) -> str:
    """Writes the config into a new work directory, or checks that it is the same.

    How it is computed and logged may differ (`_MAY_CHANGE`).

    Returns:
      The config's fingerprint.

    Raises:
      ValueError: names the settings that differ.
      FileExistsError: the directory holds results, but no config.
    """
    text = config.to_json(sort_keys=True)
    path = workdir / "config.json"
    if path.exists():
        old, new = _read_config(path), json.loads(text)
        changed = sorted(
            name
            for name in _differences(old, new, "config")
            if not name.startswith(_MAY_CHANGE)
        )
        if changed:
            raise ValueError(
                f"{workdir} holds a run of another config (it differs in "
                f"{', '.join(changed[:5])}): use another --workdir, or remove this one"
            )
    else:
        for name in _OUTPUTS:
            if (workdir / name).exists():
                raise FileExistsError(
                    f"{workdir / name} is not of a training: there is no config.json "
                    "beside it, so nothing is written there; give another --workdir"
                )
        storage.write_file(path, text.encode())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_config(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not the config of a training ({error}): give another --workdir"
        ) from None


def _differences(old: Any, new: Any, where: str) -> set[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return {
            name
            for key in old.keys() | new.keys()
            for name in _differences(old.get(key), new.get(key), f"{where}.{key}")
        }
    return set() if old == new else {where}


def load(
    path: str | Path,
    memory: Memory | str | Path | None = None,
    strategy: StrategyConfig | None = None,
) -> Generator:
    """Opens a trained model for generation.

    Args:
      path: a work directory of `train`, or "shipped:flagworld/racm3".
      memory: what to retrieve from; None opens `path/memory` if there is one, else the
        generator works without retrieval.
      strategy: which of the found documents are used; None takes the one of the
        model's training.

    Raises:
      ValueError: if there is no model at `path`, or the memory was built with another
        encoder or tokenizer.
    """
    directory = wiring.resolve(path)
    if not (directory / "model").is_dir():
        raise ValueError(
            f"no trained model in {directory}: give the --workdir of a finished "
            "`racm3 train` or `racm3 quickstart`, or shipped:flagworld/racm3"
        )
    if memory is None and (directory / "memory" / "manifest.json").exists():
        memory = directory / "memory"
    if memory is not None and not isinstance(memory, Memory):
        memory = Memory.load(memory)
    return wiring.load_generator(directory, memory, strategy)


def evaluate(config: Any, workdir: str | Path) -> dict[str, Any] | None:
    """Runs the suite that `config.suite` names.

    Prints the table and writes it (`table.md`), all figures (`results.json`) and
    pictures (`samples.png`, or a folder `samples`) into `workdir`, where the memories
    that it builds stay for the next call.

    Returns:
      The figures by name, with their intervals; None in a process other than the first.

    Raises:
      ValueError: for an unknown suite, or models and memories that do not fit.
    """
    if config.suite not in SUITES:
        raise ValueError(
            f"config.suite is {config.suite!r}; allowed: {', '.join(SUITES)}"
        )
    join_processes()
    workdir = Path(workdir)
    check_workdir(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    return SUITES[config.suite](config, workdir)


def _evaluate_flagworld(config: Any, workdir: Path) -> dict[str, Any]:
    suite = wiring.build_flagworld_suite(config, workdir)
    results, outputs = evaluate_flagworld(
        suite.generator,
        suite.twin,
        suite.swapped,
        suite.judge,
        suite.swapped_judge,
        suite.settings,
        questions=suite.questions,
    )
    settings = config.to_dict() | {"memory_documents": len(suite.memory)}
    write_results(workdir, results, settings)
    rows = config.num_sheet_rows
    if "twin_draw" in outputs and rows:
        write_sheet(
            workdir / "samples.png",
            suite.generator,
            outputs["draw"][:rows],
            outputs["twin_draw"][:rows],
        )
    table = flagworld.format_table(results)
    write_table(workdir, table)
    print(table)
    return results


def _evaluate_tasks(config: Any, workdir: Path) -> dict[str, Any]:
    suite = wiring.build_tasks_suite(config, workdir)
    results, outputs = evaluate_flagworld_tasks(
        suite.generator, suite.twin, suite.probes, suite.settings
    )
    settings = config.to_dict() | {"memory_documents": len(suite.memory)}
    write_results(workdir, results, settings)
    write_task_sheets(
        workdir / "samples",
        suite.generator,
        suite.probes,
        outputs,
        config.num_sheet_rows,
    )
    table = flagworld_tasks.format_table(results)
    write_table(workdir, table)
    print(table)
    return results


def _evaluate_coco(config: Any, workdir: Path) -> dict[str, Any] | None:
    protocol = wiring.build_coco_protocol(config, workdir)
    results = evaluate_coco(protocol)
    if results is not None:
        print(protocol_results.format_table(protocol, results))
    return results


def _evaluate_likelihood(config: Any, workdir: Path) -> dict[str, Any] | None:
    protocol = wiring.build_likelihood_protocol(config, workdir)
    results = evaluate_likelihood(protocol)
    if results is not None:
        print(likelihood_results.format_table(protocol, results))
    return results


SUITES = {
    "flagworld": _evaluate_flagworld,
    "flagworld_tasks": _evaluate_tasks,
    "coco": _evaluate_coco,
    "likelihood": _evaluate_likelihood,
}
