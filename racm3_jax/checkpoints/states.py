"""The state of a run, saved asynchronously by Orbax and verified before use."""

from __future__ import annotations

import concurrent.futures
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from absl import logging

from racm3_jax.buckets import Bucket
from racm3_jax.checkpoints.bucket import BucketSteps
from racm3_jax.checkpoints.manifest import (
    CheckpointError,
    verify_manifest,
    write_manifest,
)

QUARANTINE_NAME = "quarantine"


class Checkpoints:
    """The checkpoints of one run, newest last, verified before use.

    ```
    directory/
      1000/  state/ extra/ manifest.json     a step; unfinished without the manifest
      2000/  …
      quarantine/  1500.0/                    corrupted steps, for inspection
    ```

    Saving is asynchronous: the state is copied to the host, then a thread writes it,
    waits for Orbax to commit, and writes the sha256 manifest last.

    Args:
      directory: created if missing.
      keep: number of steps to keep.
      save_interval: `should_save` is true at its multiples.
      bucket: remote folder of the checkpoints (`checkpoints.bucket`); `directory` is
        then local to this process. None: `directory` is shared by all processes.
      before_finished: called by process 0 before a checkpoint in the bucket is marked
        as finished: to upload what a resumed run needs.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        save_interval: int = 1000,
        bucket: Bucket | None = None,
        before_finished: Callable[[], None] | None = None,
    ) -> None:
        # Imported here, as Orbax takes seconds and loading weights does not need it.
        import orbax.checkpoint as ocp

        if keep < 1 or save_interval < 1:
            raise ValueError(
                "checkpoints.keep and checkpoints.save_interval must be >= 1; got "
                f"{keep} and {save_interval}"
            )
        self._ocp = ocp
        self.directory = Path(directory).absolute()
        self.save_interval = save_interval
        self._keep = keep
        self._before_finished = before_finished
        self._remote = None
        count = jax.process_count()
        # Without a shared disk, each process is primary.
        apart = bucket is not None and count > 1
        options = ocp.options.MultiprocessingOptions(primary_host=None if apart else 0)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                # OCDBT would merge the files of all processes on a shared disk.
                "state": ocp.StandardCheckpointHandler(
                    multiprocessing_options=options, use_ocdbt=not apart
                ),
                "extra": ocp.JsonCheckpointHandler(multiprocessing_options=options),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=False, multiprocessing_options=options
            ),
        )
        if bucket is not None:
            self._remote = BucketSteps(
                bucket,
                self.directory,
                index=jax.process_index(),
                count=count,
                attempt=f"{_agree(secrets.randbits(31)):08x}",
            )
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "manifest")
        self._unfinished: concurrent.futures.Future[None] | None = None
        self._verified: set[int] = set()

    def should_save(self, step: int) -> bool:
        return step % self.save_interval == 0

    def steps(self) -> list[int]:
        """Steps on disk, verified or not, oldest first."""
        return sorted(
            int(path.name)
            for path in self.directory.iterdir()
            if path.is_dir() and path.name.isdecimal()
        )

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Starts an asynchronous save; the state may be donated when this returns.

        An existing step is not saved again.

        Args:
          step: number of updates so far.
          state: any pytree of arrays.
          extra: JSON-serialisable: data position, config, fingerprints.

        Raises:
          Exception: the error of the previous save (e.g. a full disk).
        """
        self.wait()
        if step in self.steps():
            return
        ocp = self._ocp
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                extra=ocp.args.JsonSave(dict(extra or {})),
            ),
            force=True,
        )
        self._unfinished = self._thread.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        self._manager.wait_until_finished()
        if self._remote is not None:
            self._remote.publish(step, self._keep, self._before_finished)
        elif jax.process_index() == 0:
            write_manifest(self.directory / str(step))

    def wait(self) -> None:
        """Waits for the last save; raises its error."""
        if self._unfinished is not None:
            unfinished, self._unfinished = self._unfinished, None
            unfinished.result()

    def latest_good(self, *, quarantine: bool = True) -> int | None:
        """The newest step whose files all match its manifest, or None.

        Args:
          quarantine: move corrupted newer steps away. False for readers of a
            run that may still be writing.
        """
        self.wait()
        if self._remote is not None:
            good = self._fetch_good(self._remote, quarantine)
        else:
            good = self._find_good(quarantine)
        self._manager.reload()
        if good < 0:
            return None
        self._verified.add(good)
        return good

    def _find_good(self, quarantine: bool) -> int:
        good = -1
        if jax.process_index() == 0:
            for step in reversed(self.steps()):
                problem = verify_manifest(self.directory / str(step))
                if problem is None:
                    good = step
                    break
                logging.error("checkpoint %d is not usable: %s", step, problem)
                if quarantine:
                    self._quarantine(step)
        return _agree(good)

    def _fetch_good(self, remote: BucketSteps, quarantine: bool) -> int:
        """Every process downloads the whole step; all must get it intact."""
        left = remote.steps() if jax.process_index() == 0 else []
        while (step := _agree(left.pop() if left else -1)) >= 0:
            problem = remote.fetch(step)
            if _all_agree(problem is None):
                break
            logging.error("checkpoint %d is not usable: %s", step, problem)
            shutil.rmtree(self.directory / str(step))
            if quarantine and jax.process_index() == 0:
                remote.set_aside(step)
        return step

    def _quarantine(self, step: int) -> None:
        directory = self.directory / QUARANTINE_NAME
        directory.mkdir(exist_ok=True)
        number = sum(path.name.startswith(f"{step}.") for path in directory.iterdir())
        os.replace(self.directory / str(step), directory / f"{step}.{number}")

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Restores one step with the shardings of `like`.

        Args:
          step: usually from `latest_good`.
          like: a state of the same shapes, real or abstract (from
            `training.step.abstract_state`), with the wanted shardings; the mesh may
            differ from the one that saved.

        Returns:
          (state, extra)

        Raises:
          CheckpointError: no such step, damaged files, or a state of another shape.
        """
        self.wait()
        if step not in self.steps():
            raise CheckpointError(
                f"{self.directory} has no checkpoint of step {step}; it has "
                f"{self.steps() or 'none'}"
            )
        if step not in self._verified:
            problem = verify_manifest(self.directory / str(step))
            if problem is not None:
                raise CheckpointError(
                    f"checkpoint {step} of {self.directory} is not usable: {problem}; "
                    "restore the step that latest_good() names"
                )
        ocp = self._ocp
        abstract_state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding
            ),
            like,
        )
        # Compared here: Orbax's own error for a mismatch is a page long.
        stored = _shapes(self._manager.item_metadata(step)["state"].tree)
        wanted = _shapes(like)
        differing = [
            f"{name} is {stored.get(name, 'absent')}, not {wanted.get(name, 'absent')}"
            for name in sorted(stored.keys() | wanted.keys())
            if stored.get(name) != wanted.get(name)
        ]
        if differing:
            raise CheckpointError(
                f"checkpoint {step} of {self.directory} does not fit this model or "
                f"optimizer: {'; '.join(differing[:3])} ({len(differing)} differences); "
                "use the config that it was trained with"
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state),
                extra=ocp.args.JsonRestore(),
            ),
        )
        return restored["state"], dict(restored["extra"])

    def close(self) -> None:
        """Finishes the last save and stops Orbax's threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _agree(value: int) -> int:
    """The value of process 0; a collective call."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _all_agree(value: bool) -> bool:
    """Whether it is true in every process; a collective call."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.int32(value)).all())


def _shapes(state: Any) -> dict[str, str]:
    """`{"params/up": "float32[16, 32]", ...}`"""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}{list(leaf.shape)}"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
