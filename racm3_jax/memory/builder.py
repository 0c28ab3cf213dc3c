"""Builds a memory: in parts, resumable, from a source by several processes.

    memory.building/plan.json        what is built, of what, with which models
    memory.building/part-00000/      one part a shard of the source (`parts`)
    memory.building/part-00001.lock  held by the process that makes it
    memory/                          the parts merged: unique, indexed

Killed at any time and run again, the same call ends in the same memory. More processes
that run the same call (on hosts with one file system) take the shards that are free; the
last step is done by one of them. Documents that Python hands over go the same way, cut
into parts as they come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from racm3_jax import storage
from racm3_jax.buckets import refuse_url
from racm3_jax.documents.readers import ReadReport, Record, Shard, find_shards
from racm3_jax.memory import filters, writer
from racm3_jax.memory import format as format_lib
from racm3_jax.memory import parts as parts_lib
from racm3_jax.memory.chunks import DocumentTokenizer, Embedder
from racm3_jax.memory.config import CorpusConfig, encoder_name, make_maker
from racm3_jax.memory.merge import merge_parts, part_path
from racm3_jax.memory.parts import Maker
from racm3_jax.types import Document

PLAN_FILE = "plan.json"
# Beside the plan of a build that was refused for what it was given.
_REFUSED_FILE = "refused"
# Documents from Python that make one part, and bytes of their images.
PART_DOCUMENTS = 1024
_PART_BYTES = 1 << 28
_POLL_SECONDS = 0.2
# Settings that decide what is in a part; the others belong to the merge.
_OF_PARTS = (
    *("num_query_variants", "query_drop", "seed"),
    *("opt_out", "held_out", "max_nsfw", "max_watermark"),
)
# Documents done here, and sizes of shards done and of all (0 where it is unknown).
Progress = Callable[[int, int, int], None]


def build_memory(
    source: str | Iterable[Document],
    *,
    tokenizer: DocumentTokenizer,
    embedder: Embedder | str,
    path: str | os.PathLike[str],
    config: CorpusConfig | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Builds a memory, or resumes where a killed build stopped.

    Args:
      source: as `readers.read_documents` takes it, or documents; they stream through.
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
    refuse_url(path, "a memory that is built")
    path = pathlib.Path(path)
    shards = find_shards(source) if isinstance(source, str) else None
    maker = make_maker(config, tokenizer, embedder)
    plan = make_plan(source, shards, config, tokenizer, embedder)
    if not begin(path, plan, overwrite):
        return
    work = work_directory(path)
    with _refusals_marked(work):
        if shards is not None:
            _make_shard_parts(work, shards, maker, config, progress)
            num_parts = len(shards)
        else:
            assert not isinstance(source, str)
            num_parts = _make_document_parts(work, source, maker, progress)
        with storage.locked(work / "merge.lock") as held:
            # Another process may have finished while this one waited.
            if held and (work / PLAN_FILE).is_file():
                name = source if isinstance(source, str) else ""
                digest = storage.content_digest(plan)
                merge_parts(
                    work, path, name, digest, num_parts, maker, config, overwrite
                )
                storage.delete_directory(work)


def work_directory(path: pathlib.Path) -> pathlib.Path:
    """Where `path` is being built."""
    return path.with_name(f"{path.name}.building")


def begin(path: pathlib.Path, plan: dict[str, Any], overwrite: bool) -> bool:
    """Claims the work directory, once what dead builds left is cleaned.

    Returns:
      False if a build of this plan died after its last step: there is nothing to do.

    Raises:
      FileExistsError: something at `path` that may not be replaced.
      ValueError: another build is half done there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = work_directory(path)
    storage.clean(path)
    storage.clean(work)
    if not overwrite and _end_finished(path, plan) and plan["shards"]:
        return False
    writer.check_target(path, overwrite)
    claim_plan(work, plan)
    return True


def _end_finished(path: pathlib.Path, plan: dict[str, Any]) -> bool:
    """Deletes the work of a build that died between its last two steps.

    Returns:
      Whether the memory at `path` is what it was building.
    """
    work = work_directory(path)
    if not (format_lib.is_memory(path) and (work / PLAN_FILE).is_file()):
        return False
    if format_lib.read_manifest(path).get("plan") != storage.content_digest(plan):
        return False
    with storage.locked(work / "merge.lock", wait=False) as is_free:
        numbers = range(len(plan["shards"]))
        if not is_free or not all(part_path(work, n).is_dir() for n in numbers):
            return False  # a rebuild of the same is under way
        storage.delete_directory(work)
    return True


def make_plan(
    source: str | Iterable[Document],
    shards: Sequence[Shard] | None,
    config: CorpusConfig,
    tokenizer: DocumentTokenizer,
    embedder: Embedder | str,
) -> dict[str, Any]:
    """What a build is of: equal for builds that may share their parts."""
    settings: dict[str, Any] = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name in _OF_PARTS
    }
    settings["held_out"] = list(config.held_out)
    if config.opt_out:
        content = pathlib.Path(config.opt_out).read_bytes()
        settings["opt_out"] = hashlib.sha256(content).hexdigest()
    return {
        "source": source if isinstance(source, str) else "",
        "shards": [[shard.name, shard.size] for shard in shards or ()],
        "settings": settings,
        "tokenizer": tokenizer.fingerprint(),
        "encoder": encoder_name(embedder),
    }


def claim_plan(work: pathlib.Path, plan: dict[str, Any]) -> None:
    """Starts a build, or checks that the half-done one is the same.

    Parts of another plan are discarded where its build was refused, or had none yet.

    Raises:
      ValueError: names what differs.
    """
    work.mkdir(parents=True, exist_ok=True)
    with storage.locked(work / "plan.lock"):
        file = work / PLAN_FILE
        if file.is_file():
            remedy = f"remove {work}"
            old = storage.decode_sealed(file.read_bytes(), str(file), remedy)
            changed = [key for key in plan if plan[key] != old.get(key)]
            if not changed:
                (work / _REFUSED_FILE).unlink(missing_ok=True)
                return
            parts = [part for part in work.glob("part-*") if part.is_dir()]
            if parts and not (work / _REFUSED_FILE).is_file():
                raise ValueError(
                    f"{work} holds a half-done build that differs in "
                    f"{', '.join(changed)}: give what it was started with, or remove "
                    "that folder to begin again"
                )
            for part in parts:
                storage.delete_directory(part)
        storage.write_file(file, storage.encode_sealed(plan))
        (work / _REFUSED_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def _refusals_marked(work: pathlib.Path) -> Iterator[None]:
    """A build that is refused for what it was given does not block a corrected one."""
    try:
        yield
    except (ValueError, FileNotFoundError):
        if (work / PLAN_FILE).is_file():
            storage.write_file(work / _REFUSED_FILE, b"")
        raise


@contextlib.contextmanager
def _nothing_left_of_nothing(work: pathlib.Path) -> Iterator[None]:
    """Without any part there is nothing to resume; for builds of one process."""
    try:
        yield
    except BaseException:
        if not any(place.is_dir() for place in work.glob("part-*")):
            storage.delete_directory(work)
        raise


def _make_document_parts(
    work: pathlib.Path,
    documents: Iterable[Document],
    maker: Maker,
    progress: Progress | None,
) -> int:
    """Makes a part of every block of documents; one that is there already stays.

    Documents have no names to tell one run from another, so every block is read and
    compared with the part by its content before the models are spared.

    Returns:
      The number of parts.
    """
    num_documents = number = 0

    def count(new: int) -> None:
        nonlocal num_documents
        num_documents += new
        if progress is not None:
            progress(num_documents, num_documents, 0)

    claim = storage.claimed(work / "documents.lock", f"the build in {work}")
    with claim, _nothing_left_of_nothing(work):
        for number, block in enumerate(_blocks(iter(documents)), 1):
            place = part_path(work, number - 1)
            digest = _digest(block)
            if place.is_dir():
                if parts_lib.read_report(place)["shard"] == digest:
                    count(len(block))
                    continue
                storage.delete_directory(place)
            report = ReadReport(max_bad=1.0)
            report.num_documents = len(block)
            records = map(Record, block)
            parts_lib.write_records_part(
                place, records, digest, number - 1, maker, report, count
            )
        if not number:
            raise ValueError(f"there are no documents to build {work.stem} of")
    return number


def _blocks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while block := list(itertools.islice(documents, 1)):
        num_bytes = 0
        for document in itertools.islice(documents, PART_DOCUMENTS - 1):
            block.append(document)
            num_bytes += sum(image.nbytes for image in document.images)
            if num_bytes >= _PART_BYTES:
                break
        yield block


def _digest(block: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in block:
        fields = (document.id, document.source, filters.hash_content(document))
        digest.update(repr(fields).encode())
    return digest.hexdigest()


def _make_shard_parts(
    work: pathlib.Path,
    shards: Sequence[Shard],
    maker: Maker,
    config: CorpusConfig,
    progress: Progress | None,
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
        with storage.locked(work / f"part-{number:05d}.lock", wait=False) as held:
            if not held or part_path(work, number).is_dir():
                return False
            parts_lib.write_shard_part(
                part_path(work, number), shard, number, maker, count
            )
            return True
    except FileNotFoundError:
        if work.is_dir():
            raise
        return False  # another process has finished the build
