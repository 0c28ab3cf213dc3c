"""Train, evaluate, load: the three verbs, over objects that `build` made."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from racm3_jax import own_files, storage, wiring
from racm3_jax.checkpoints import Checkpoints
from racm3_jax.compilation import saved
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
from racm3_jax.training.host import prepare_host
from racm3_jax.training.loop import Profile, fit
from racm3_jax.training.mirror import Mirror, is_url, refuse_url
from racm3_jax.training.processes import SignsOfLife, join_processes, leader_first
from racm3_jax.training.step import TrainState, TrainStep

LOCK_NAME = "training.lock"
# What a work directory holds that was claimed and not used.
_CLAIM = {"config.json", LOCK_NAME}
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
    compiled: str | Path | None = None,
) -> TrainState:
    """Trains what `config.kind` names, in `workdir`; the same call resumes.

    Writes `config.json`, `metrics.jsonl` (and TensorBoard event files), `loss.png`,
    `checkpoints/` and, at the end, the exported model. A step's batch depends on the
    seed and the step's number alone, so that a resumed run equals an unbroken one, bit
    for bit.

    Args:
      config: from a file of `configs/`.
      workdir: created if missing; may be a URL, see `training.mirror`.
      progress: show a progress bar.
      profile_steps: first and last step of a trace, written to `workdir/profile`.
      compiled: what `racm3 estimate --save` wrote; the step is read, not compiled.

    Returns:
      The last state; its step is below `config.train.num_steps` when SIGTERM or Ctrl-C
      ended the training early, after a save.

    Raises:
      ValueError: if the config has unknown settings, `workdir` holds a run of another
        config, memory, tokenizer or embedder, or another training is under way there,
        or `compiled` is the step of another training, machine or version.
    """
    settings = wiring.read_training(config).train
    prepare_host()
    num_processes = join_processes()
    if compiled is not None:
        _check_compiled(config, Path(compiled))
    with _local_workdir(workdir, num_processes) as folder:
        return _train_in(config, settings, folder, progress, profile_steps, compiled)


@contextlib.contextmanager
def _local_workdir(workdir: str | Path, num_processes: int) -> Iterator[Path]:
    """The folder of a work directory; of one in a bucket, a folder that is copied there.

    Raises:
      ValueError: several processes and a bucket, or whatever is raised inside.
    """
    if not is_url(workdir):
        yield Path(workdir)
        return
    if num_processes > 1:
        raise ValueError(
            f"--workdir={workdir} is a URL, which one process can write; these "
            f"{num_processes} need a folder that all of them see: mount the bucket "
            "(gcsfuse, s3fs) and give its path"
        )
    with Mirror(str(workdir)) as mirror:
        try:
            yield mirror.folder
        except ValueError as error:
            # Sentences name the folder, which nobody knows.
            words = str(error).replace(str(mirror.folder), mirror.url)
            raise ValueError(words) from error


def _train_in(
    config: Any,
    settings: wiring.TrainConfig,
    workdir: Path,
    progress: bool,
    profile_steps: tuple[int, int] | None,
    compiled: str | Path | None,
) -> TrainState:
    own_files.check(workdir / "loss.png", change="give another --workdir")
    with contextlib.ExitStack() as held:
        with given_back_if_refused(workdir):
            with leader_first():
                if jax.process_index() == 0:
                    what = f"a training in {workdir}"
                    held.enter_context(storage.claimed(workdir / LOCK_NAME, what))
                fingerprint = claim_workdir(config, workdir)
            with _advice_when_memory_is_full(config):
                job = wiring.build_job(config, workdir)
            if compiled is not None:
                job = _with_compiled_step(job, config, Path(compiled))
        return _train(
            config, settings, job, workdir, fingerprint, progress, profile_steps
        )


def _train(
    config: Any,
    settings: wiring.TrainConfig,
    job: wiring.Job,
    workdir: Path,
    fingerprint: str,
    progress: bool,
    profile_steps: tuple[int, int] | None,
) -> TrainState:
    """`train`, in a work directory that is this training's own."""
    profile = Profile(*profile_steps, workdir / "profile") if profile_steps else None
    saver = Checkpoints(
        workdir / "checkpoints",
        keep=settings.keep_checkpoints,
        save_interval=settings.checkpoint_every,
    )
    state = job.state
    found = saver.latest_good()
    if found is not None:
        state, extra = saver.restore(found, state)
        check_inputs(extra, job, workdir)
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
                    checkpoint_extra={
                        "config": fingerprint,
                        "inputs": dict(job.inputs),
                        "num_main_documents": job.num_main_documents,
                    },
                    log_every=settings.log_every,
                    progress=progress,
                    description=f"train {config.kind}",
                    with_stats=job.with_stats,
                    max_skipped_steps=settings.max_skipped_steps,
                    peak_flops=_peak_flops(),
                    flops_per_token=job.flops_per_token,
                    profile=profile,
                    watchdog_seconds=settings.watchdog_seconds,
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


def _check_compiled(config: Any, path: Path) -> None:
    """What can be refused before the data are loaded."""
    if config.kind != "generator":
        raise ValueError(
            f"--compiled={path} is for generators; config.kind is {config.kind!r}"
        )
    saved.check_step(path, wiring.build_mesh(config))


def _with_compiled_step(job: wiring.Job, config: Any, path: Path) -> wiring.Job:
    assert isinstance(job.step_fn, TrainStep)
    shape = (config.pipeline.rows, config.pipeline.row_length)
    batch = wiring.abstract_batch(shape, job.step_fn.mesh)
    step = saved.load_step(path, job.step_fn, job.state, batch, config.to_dict())
    return dataclasses.replace(job, step_fn=step)


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
    except storage.BusyError:
        raise  # all of it is another training's
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

    How it is computed and logged may differ (`_MAY_CHANGE`). A setting that the config of
    an older run does not have yet is its default.

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
        with contextlib.suppress(
            ValueError, TypeError, AttributeError
        ):  # older runs may have had other settings
            old, new = _complete(old), _complete(new)
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


def check_inputs(extra: Mapping[str, Any], job: wiring.Job, workdir: Path) -> None:
    """Refuses to resume over other data than the checkpoint was trained with.

    The rows of another memory are other documents, whatever their numbers. Documents that
    were removed since are no reason to refuse: the order of the rest changes, which is
    said.

    Args:
      extra: of the checkpoint; older ones do not say what they were trained with.
      job: of the resumed run.
      workdir: for the sentence.

    Raises:
      ValueError: names what changed.
    """
    before = extra.get("inputs", {})
    for name, now in job.inputs.items():
        if before.get(name, now) != now:
            raise ValueError(
                f"{workdir} was trained with the {name} {before[name]}, but the config "
                f"now names {now}: give it that {name} again, or train in another "
                "--workdir"
            )
    num = extra.get("num_main_documents", job.num_main_documents)
    if num != job.num_main_documents:
        logging.warning(
            "%d main documents were removed from the memory since the last checkpoint: "
            "the others follow in another order than in an unbroken run",
            num - job.num_main_documents,
        )


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """A config with all defaults, as JSON reads it."""
    return json.loads(json.dumps(dataclasses.asdict(wiring.read_training(config))))


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
    wiring.read_evaluation(config)
    refuse_url(workdir, "the work directory of an evaluation")
    prepare_host()
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
