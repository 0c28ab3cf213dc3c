"""Builds a memory from a source on disk: in parts, resumable, by several processes.

    memory.building/plan.json        what is built, of what, with which models
    memory.building/part-00000/      one part a shard of the source (`parts`)
    memory.building/part-00001.lock  held by the process that makes it
    memory/                          the parts merged: unique, indexed

Killed at any time and run again, the same call ends in the same memory. More processes
that run the same call (on hosts with one file system) take the shards that are free; the
last step is done by one of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from racm3_jax import storage
from racm3_jax.documents.readers import ReadReport, Shard, find_shards
from racm3_jax.memory import parts as parts_lib
from racm3_jax.memory import writer
from racm3_jax.memory.chunks import DocumentTokenizer, Embedder
from racm3_jax.memory.config import CorpusConfig, encoder_name, make_maker
from racm3_jax.memory.merge import merge_parts, part_path
from racm3_jax.memory.parts import Maker

PLAN_FILE = "plan.json"
_POLL_SECONDS = 0.2


def build_corpus(
    source: str,
    *,
    tokenizer: DocumentTokenizer,
    embedder: Embedder | str,
    path: str | os.PathLike[str],
    config: CorpusConfig | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> None:
    """Builds a memory of a source, or goes on where a killed build stopped.

    Args:
      source: as `readers.read_documents` takes it.
      tokenizer: a `MixedTokenizer`.
      embedder: a `DocumentEmbedder`, or the name of the encoder that made the
        embeddings of an "embeddings:" source.
      path: the directory to make.
      config: see `CorpusConfig`.
      overwrite: replace a memory that is at `path`.
      progress: called with documents done here, and sizes of shards done and of all.

    Raises:
      FileExistsError: if something is at `path` and may not be replaced.
      FileNotFoundError: nothing at the source.
      ValueError: another build is half done at `path`, or too many records are bad.
    """
    config = config or CorpusConfig()
    path = pathlib.Path(path)
    writer.check_target(path, overwrite)
    shards = find_shards(source)
    maker = make_maker(config, tokenizer, embedder)
    work = work_directory(path)
    claim_plan(work, make_plan(source, shards, config, tokenizer, embedder))
    _make_parts(work, shards, maker, config, progress)
    with locked(work / "merge.lock", wait=True) as held:
        # Another process may have finished while this one waited.
        if held and (work / PLAN_FILE).is_file():
            merge_parts(work, path, source, len(shards), maker, config, overwrite)
            shutil.rmtree(work)


def work_directory(path: pathlib.Path) -> pathlib.Path:
    """Where `path` is being built."""
    return path.with_name(f"{path.name}.building")


def make_plan(
    source: str,
    shards: Sequence[Shard],
    config: CorpusConfig,
    tokenizer: DocumentTokenizer,
    embedder: Embedder | str,
) -> dict[str, Any]:
    """What a build is of: equal for builds that may share their parts."""
    settings = dataclasses.asdict(config)
    settings["held_out"] = list(config.held_out)
    if config.opt_out:
        content = pathlib.Path(config.opt_out).read_bytes()
        settings["opt_out"] = hashlib.sha256(content).hexdigest()
    return {
        "source": source,
        "shards": [[shard.name, shard.size] for shard in shards],
        "settings": settings,
        "tokenizer": tokenizer.fingerprint(),
        "encoder": encoder_name(embedder),
    }


def claim_plan(work: pathlib.Path, plan: dict[str, Any]) -> None:
    """Starts a build, or checks that the half-done one is the same.

    Raises:
      ValueError: names what differs.
    """
    work.mkdir(parents=True, exist_ok=True)
    with locked(work / "plan.lock", wait=True):
        file = work / PLAN_FILE
        if not file.is_file():
            storage.write_file(file, storage.encode_sealed(plan))
            return
        old = storage.decode_sealed(file.read_bytes(), str(file), f"remove {work}")
        changed = [key for key in plan if plan[key] != old.get(key)]
        if changed:
            raise ValueError(
                f"{work} holds a half-done build that differs in {', '.join(changed)}: "
                "give what it was started with, or remove that folder to begin anew"
            )


def _make_parts(
    work: pathlib.Path,
    shards: Sequence[Shard],
    maker: Maker,
    config: CorpusConfig,
    progress: Callable[[int, int, int], None] | None,
) -> None:
    """Makes the parts that no other process has made or is making."""
    total = sum(shard.size for shard in shards)
    num_documents = 0
    report, counted = ReadReport(config.max_bad), set()

    def count(new: int) -> None:
        nonlocal num_documents
        num_documents += new
        if progress is not None:
            progress(num_documents, sum(shards[n].size for n in counted), total)

    while (work / PLAN_FILE).is_file():
        for number in range(len(shards)):
            if number not in counted and part_path(work, number).is_dir():
                part = parts_lib.read_report(part_path(work, number))
                report.merge(part["read"])
                counted.add(number)
        report.check()
        count(0)
        free = [n for n in range(len(shards)) if n not in counted]
        if not free:
            return
        if not any(_try_part(work, n, shards[n], maker, count) for n in free):
            time.sleep(_POLL_SECONDS)


def _try_part(
    work: pathlib.Path,
    number: int,
    shard: Shard,
    maker: Maker,
    count: Callable[[int], None],
) -> bool:
    """Whether this process has made the part just now."""
    try:
        with locked(work / f"part-{number:05d}.lock", wait=False) as held:
            if not held or part_path(work, number).is_dir():
                return False
            parts_lib.write_corpus_part(
                part_path(work, number), shard, number, maker, count
            )
            return True
    except FileNotFoundError:
        if work.is_dir():
            raise
        return False  # another process has finished the build


@contextlib.contextmanager
def locked(file: pathlib.Path, *, wait: bool) -> Iterator[bool]:
    """An exclusive lock, which ends with the process even when that is killed."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        if file.parent.is_dir():
            raise
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)
