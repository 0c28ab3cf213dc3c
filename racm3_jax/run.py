"""Train, evaluate, load: the three entry points, over objects built by `wiring`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.sharding import Mesh

from racm3_jax import checkpoints, own_files, storage, wiring
from racm3_jax.buckets import refuse_url
from racm3_jax.checkpoints import Checkpoints
from racm3_jax.compilation import saved
from racm3_jax.evaluation.suite import check_workdir
from racm3_jax.generation.tasks import Generator
from racm3_jax.memory.memory import Memory
from racm3_jax.metrics import MetricsWriter, plot_curves
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.sharding import leader_first
from racm3_jax.training.hardware import explain_out_of_memory, find_device
from racm3_jax.training.heldout import HeldOut
from racm3_jax.training.host import prepare_host
from racm3_jax.training.loop import FitSettings, Profile, fit
from racm3_jax.training.mirror import Mirror
from racm3_jax.training.processes import ProcessHeartbeats, fetch_all, join_processes
from racm3_jax.training.step import TrainState
from racm3_jax.wiring.workdirs import (
    LOCK_NAME,
    check_inputs,
    claim_workdir,
    given_back_if_refused,
    local_workdir,
)

# Weights of the lowest held-out loss, for trainings with a patience.
BEST_NAME = "best"


class Training(NamedTuple):
    """Result of `run_training`.

    Attributes:
      state: the last state.
      has_ended: False if SIGTERM or Ctrl-C stopped it, after a save.
    """

    state: TrainState
    has_ended: bool


def train(config: Any, workdir: str | Path, **options: Any) -> TrainState:
    """Calls `run_training` and returns only the last state."""
    return run_training(config, workdir, **options).state


def run_training(
    config: Any,
    workdir: str | Path,
    *,
    progress: bool = True,
    profile_steps: tuple[int, int] | None = None,
    compiled: str | Path | None = None,
) -> Training:
    """Trains the model of `config.kind` in `workdir`; the same call resumes.

    Writes `config.json`, `metrics.jsonl` (and TensorBoard event files), `loss.png`,
    `checkpoints/` and, at the end, the exported model; with `train.eval_every` also
    `samples/`, and with `train.patience` training stops once the held-out loss no
    longer falls. A step's batch depends only on the seed and the step number, so that a
    resumed run is bitwise equal to an uninterrupted one.

    Args:
      config: from a file of `configs/`.
      workdir: created if missing; may be a URL, see `training.mirror`.
      progress: show a progress bar.
      profile_steps: first and last step of a trace, written to `workdir/profile`.
      compiled: a file of `racm3 estimate --save`: the step is loaded, not compiled.

    Raises:
      ValueError: the config has unknown settings, `workdir` holds a run of another
        config, memory, tokenizer or embedder, another training is running there, or
        `compiled` is the step of another training, machine or version.
    """
    settings = wiring.read_training(config).train
    prepare_host()
    join_processes()
    if compiled is not None:
        _check_compiled(config, Path(compiled))
    with local_workdir(workdir) as (folder, mirror):
        return _train_in(
            config, settings, folder, mirror, progress, profile_steps, compiled
        )


def _train_in(
    config: Any,
    settings: wiring.TrainConfig,
    workdir: Path,
    mirror: Mirror | None,
    progress: bool,
    profile_steps: tuple[int, int] | None,
    compiled: str | Path | None,
) -> Training:
    own_files.check(workdir / "loss.png", change="give another --workdir")
    with contextlib.ExitStack() as held:
        with given_back_if_refused(workdir):
            with leader_first():
                if jax.process_index() == 0:
                    what = f"a training in {workdir}"
                    held.enter_context(storage.claimed(workdir / LOCK_NAME, what))
                fingerprint = claim_workdir(config, workdir)
            with _explaining_out_of_memory(config):
                job = wiring.build_job(config, workdir)
            if compiled is not None:
                job = _with_compiled_step(job, config, Path(compiled))
        return _train(
            config,
            settings,
            job,
            workdir,
            mirror,
            fingerprint,
            progress,
            profile_steps,
        )


def _train(
    config: Any,
    settings: wiring.TrainConfig,
    job: wiring.Job,
    workdir: Path,
    mirror: Mirror | None,
    fingerprint: str,
    progress: bool,
    profile_steps: tuple[int, int] | None,
) -> Training:
    """`run_training` in a local work directory, which this training owns."""
    profile = Profile(*profile_steps, workdir / "profile") if profile_steps else None
    saver = Checkpoints(
        workdir / "checkpoints",
        keep=settings.keep_checkpoints,
        save_interval=settings.checkpoint_every,
        bucket=None if mirror is None else mirror.bucket / "checkpoints",
        before_finished=None if mirror is None else mirror.push,
    )
    state, history = job.state, []
    found = saver.latest_good()
    if found is not None:
        state, extra = saver.restore(found, state)
        check_inputs(extra, job, workdir)
        history = [e for e in extra.get("evaluations", ()) if e[0] <= found]
        if progress and jax.process_index() == 0:
            place = workdir if mirror is None else mirror.url
            print(
                f"racm3: resuming {place} after step {found} of {job.num_steps}",
                file=sys.stderr,
            )
    judged = _make_heldout(job, settings, workdir, history)
    start_step = int(state.step)
    if start_step < job.num_steps and not judged.is_over:
        batches = job.make_batches(start_step)
        try:
            with (
                _make_writer(workdir) as writer,
                _explaining_out_of_memory(config),
            ):
                state = fit(
                    state,
                    job.step_fn,
                    batches,
                    FitSettings(
                        num_steps=job.num_steps,
                        writer=writer,
                        checkpoints=saver,
                        checkpoint_extra={
                            "config": fingerprint,
                            "inputs": dict(job.inputs),
                            "num_main_documents": job.num_main_documents,
                            "evaluations": judged.history,
                        },
                        eval_fn=judged,
                        eval_every=settings.eval_every,
                        should_end=lambda: judged.is_over,
                        log_every=settings.log_every,
                        progress=progress,
                        description=f"train {config.kind}",
                        with_stats=job.with_stats,
                        max_skipped_steps=settings.max_skipped_steps,
                        peak_flops=_peak_flops(job.step_fn.mesh),
                        flops_per_token=job.flops_per_token,
                        profile=profile,
                        watchdog_seconds=settings.watchdog_seconds,
                        heartbeats=_make_heartbeats(workdir)
                        if mirror is None
                        else None,
                    ),
                )
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()
        if jax.process_index() == 0:
            _plot(workdir, bool(settings.eval_every))
    saver.close()
    has_ended = int(state.step) == job.num_steps or judged.is_over
    if has_ended:
        job.export(_best(state, workdir) if settings.patience else state)
    return Training(state, has_ended)


def _make_heldout(
    job: wiring.Job,
    settings: wiring.TrainConfig,
    workdir: Path,
    history: list[list[float]],
) -> HeldOut:
    def keep(state: TrainState) -> None:
        params = fetch_all(state.params)
        if jax.process_index() == 0:
            checkpoints.save_weights(
                workdir / BEST_NAME,
                params,
                kind=BEST_NAME,
                config={},
                extra={"step": int(state.step)},
            )

    evaluate = job.evaluate or (lambda state: {})
    return HeldOut(evaluate, settings.patience, keep, history)


def _best(state: TrainState, workdir: Path) -> TrainState:
    """The state with the weights of the lowest held-out loss."""
    best, _, extra = checkpoints.load_weights(workdir / BEST_NAME, BEST_NAME)
    logging.info("the held-out loss was lowest at step %s", extra["step"])
    places = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    return state.replace(params=jax.device_put(best, places))


def _plot(workdir: Path, is_judged: bool) -> None:
    names = ("loss", "eval/loss") if is_judged else ("loss",)
    plot_curves([workdir / "metrics.jsonl"], workdir / "loss.png", names=names)


def _check_compiled(config: Any, path: Path) -> None:
    """Checks what can be checked before loading data."""
    if config.kind != "generator":
        raise ValueError(
            f"--compiled={path} is for generators; config.kind is {config.kind!r}"
        )
    saved.check_step(path, wiring.build_mesh(config))


def _with_compiled_step(job: wiring.Job, config: Any, path: Path) -> wiring.Job:
    shape = (config.pipeline.rows, config.pipeline.row_length)
    batch = wiring.abstract_batch(shape, job.step_fn.mesh)
    step = saved.load_step(path, job.step_fn, job.state, batch, config.to_dict())
    return dataclasses.replace(job, step_fn=step)


@contextlib.contextmanager
def _explaining_out_of_memory(config: Any) -> Iterator[None]:
    """Adds suggested settings to the traceback of an out-of-memory error."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if advice := explain_out_of_memory(error, config):
            error.add_note(advice)
        raise


def _make_writer(workdir: Path) -> contextlib.AbstractContextManager[Any]:
    """A writer in process 0; None in the others."""
    if jax.process_index() == 0:
        return MetricsWriter(workdir)
    return contextlib.nullcontext()


def _make_heartbeats(workdir: Path) -> ProcessHeartbeats | None:
    count = jax.process_count()
    if count == 1:
        return None
    return ProcessHeartbeats(workdir / "processes", jax.process_index(), count)


def _peak_flops(mesh: Mesh) -> float:
    """Total of a mesh's devices; 0 for kinds that are not in the table, e.g. CPUs."""
    device = find_device(mesh.devices.flat[0].device_kind)
    return device.flops * mesh.size if device else 0.0


def load(
    path: str | Path,
    memory: Memory | str | Path | None = None,
    strategy: StrategyConfig | None = None,
    *,
    mesh: Mesh | None = None,
) -> Generator:
    """Opens a trained model for generation.

    Args:
      path: a work directory of `train`, or "shipped:flagworld".
      memory: what to retrieve from; None opens `path/memory` if it exists, else the
        generator works without retrieval.
      strategy: which of the found documents are used; None means the strategy of the
        model's training.
      mesh: devices for decoding, from `sharding.make_mesh`; see `Engine`.

    Raises:
      ValueError: there is no model at `path`, or the memory was built with another
        encoder or tokenizer.
    """
    directory = wiring.resolve(path)
    wiring.check_model(directory)
    if memory is None and (directory / "memory" / "manifest.json").exists():
        memory = directory / "memory"
    if memory is not None and not isinstance(memory, Memory):
        memory = Memory.load(memory)
    return wiring.load_generator(directory, memory, strategy, mesh=mesh)


def evaluate(config: Any, workdir: str | Path) -> dict[str, Any] | None:
    """Runs the evaluation suite `config.suite`.

    Prints the table and writes it (`table.md`), all metrics (`results.json`) and images
    (`samples.png`, or a folder `samples`) into `workdir`, which also keeps the memories
    that it builds for the next call.

    Returns:
      The metrics by name, with their intervals; None in processes other than the first.

    Raises:
      ValueError: an unknown suite, or models and memories that do not match.
    """
    wiring.read_evaluation(config)
    refuse_url(workdir, "the work directory of an evaluation")
    prepare_host()
    join_processes()
    workdir = Path(workdir)
    check_workdir(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    return wiring.build_suite(config, workdir).run()
