"""The work directory of a training: ownership, and checks on resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from racm3_jax import storage
from racm3_jax.buckets import is_url
from racm3_jax.documents.readers import refuse_inside
from racm3_jax.documents.sources import parse_sources
from racm3_jax.sharding import sharing
from racm3_jax.training.mirror import PUSH_SECONDS, Mirror
from racm3_jax.training.processes import wait_for_all
from racm3_jax.wiring.job import Job
from racm3_jax.wiring.sections import choose_class_key, read_training

LOCK_NAME = "training.lock"
# Files of a work directory that was claimed but not used.
_CLAIM = {"config.json", LOCK_NAME}
# Outputs of trainings: without a config.json, they belong to somebody else.
_OUTPUTS = (
    "best",
    "checkpoints",
    "clip",
    "loss.png",
    "metrics.jsonl",
    "model",
    "samples",
    "source",
    "tensorboard",
    "text",
    "tokenizer",
    "vqgan",
)
# Settings that a resumed run may change: they do not affect what is learned.
_MAY_CHANGE = (
    "config.clip.compute_dtype",
    "config.embedder_dtype",
    "config.memory.cache",
    "config.memory.verify_share",
    "config.mesh",
    "config.model.remat",
    "config.train.checkpoint_every",
    "config.train.keep_checkpoints",
    "config.train.log_every",
    "config.train.num_microbatches",
    "config.train.sheet_rows",
    "config.train.watchdog_seconds",
)
# Older runs without a world may leave out the key of their classes; newer ones name it.
_OLD_CLASS_KEY = "nation"


@contextlib.contextmanager
def local_workdir(workdir: str | Path) -> Iterator[tuple[Path, Mirror | None]]:
    """The local folder of a work directory, and its mirror if it is a URL.

    With a URL, every process has its own folder, see `training.mirror`.

    Raises:
      ValueError: the bucket's client is not installed; or raised inside the block.
    """
    if not is_url(workdir):
        yield Path(workdir), None
        return
    leads = jax.process_index() == 0
    with Mirror(str(workdir), leads=leads) as mirror, sharing(mirror):
        if leads:
            seconds = f"{PUSH_SECONDS:g} s"
            print(
                f"racm3: the work directory is {mirror.url}; it is written in "
                f"{mirror.folder} and uploaded every {seconds}, checkpoints when "
                "they are complete",
                file=sys.stderr,
            )
        try:
            yield mirror.folder, mirror
        except ValueError as error:
            # Messages should not name the local folder, which users do not know.
            words = str(error).replace(str(mirror.folder), mirror.url)
            raise ValueError(words) from error
        if leads:
            mirror.push()
        wait_for_all("work directory is copied")


@contextlib.contextmanager
def given_back_if_refused(workdir: Path) -> Iterator[None]:
    """Creates a work directory; releases it after an error if it has only its config.

    So that a corrected command with another config is not refused.
    """
    is_made = not workdir.exists()
    is_new = not (workdir / "config.json").exists()
    had_lock = (workdir / LOCK_NAME).exists()
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except storage.BusyError:
        raise  # it belongs to another training
    except Exception:
        with contextlib.suppress(OSError):
            if not had_lock:
                (workdir / LOCK_NAME).unlink(missing_ok=True)
            names = set(os.listdir(workdir))
            if is_new and names <= _CLAIM:
                for name in names:
                    (workdir / name).unlink()
            if is_made:
                workdir.rmdir()  # if it is empty
        raise


def claim_workdir(config: Any, workdir: Path) -> str:
    """Writes the config to a new work directory, or checks that it is the same.

    Settings of computation and logging may differ (`_MAY_CHANGE`). A setting that is
    missing in the config of an older run has its default.

    Returns:
      The config's fingerprint.

    Raises:
      ValueError: names the settings that differ, or the directory is inside the source.
      FileExistsError: the directory holds results, but no config.
    """
    if source := config.get("source"):
        for place, _ in parse_sources(source):
            refuse_inside(place, workdir, "give another --workdir")
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


def check_inputs(extra: Mapping[str, Any], job: Job, workdir: Path) -> None:
    """Refuses to resume with other data than the checkpoint was trained on.

    The rows of another memory are other documents. Removed documents are only a
    warning: the order of the rest changes.

    Args:
      extra: of the checkpoint; older ones lack these fingerprints.
      job: of the resumed run.
      workdir: for the message.

    Raises:
      ValueError: names what changed.
    """
    before = extra.get("inputs", {})
    for name, now in job.inputs.items():
        if before.get(name, now) != now:
            raise ValueError(
                f"{workdir} was trained with the {name} {before[name]}, but the config "
                f"now has {now}: use the same {name} again, or train in another "
                "--workdir"
            )
    num = extra.get("num_main_documents", job.num_main_documents)
    if num != job.num_main_documents:
        logging.warning(
            "%d main documents were removed from the memory since the last checkpoint: "
            "the others are in another order than in an uninterrupted run",
            num - job.num_main_documents,
        )


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """A config with all defaults, in JSON form."""
    settings = dataclasses.asdict(read_training(config))
    for name in ("episodes", "pairing"):
        section = settings.get(name)
        if section is not None:
            class_key = choose_class_key(config, section["class_key"])
            section["class_key"] = class_key or _OLD_CLASS_KEY
    return json.loads(json.dumps(settings))


def _differences(old: Any, new: Any, where: str) -> set[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return {
            name
            for key in old.keys() | new.keys()
            for name in _differences(old.get(key), new.get(key), f"{where}.{key}")
        }
    return set() if old == new else {where}
