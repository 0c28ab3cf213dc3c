"""Builds a memory from a source: in parts, resumable, by several processes.

    memory.building/plan.json        the build spec: source, settings, models
    memory.building/part-00000/      one part per shard of the source (`parts`)
    memory.building/part-00001.lock  held by the process that makes it
    memory/                          the parts merged: unique, indexed

If it is killed at any time, the same call resumes and gives the same memory. Other
processes with the same call (on hosts that share the file system) take free shards; one
of them does the last step. Documents from Python are built in the same way, split into
parts as they come.
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
from racm3_jax.documents.ahead import map_ahead
from racm3_jax.documents.readers import ReadReport, Record, Shard, find_shards
from racm3_jax.memory import filters, writer
from racm3_jax.memory import format as format_lib
from racm3_jax.memory import parts as parts_lib
from racm3_jax.memory.chunks import DocumentTokenizer, Embedder
from racm3_jax.memory.config import CorpusConfig, encoder_name, make_chunk_builder
from racm3_jax.memory.merge import merge_parts, part_path
from racm3_jax.memory.parts import ChunkBuilder
from racm3_jax.progress import StageClock
from racm3_jax.types import Document

SPEC_FILE = "plan.json"
# Next to the spec of a build that was refused because of its input.
_REFUSED_FILE = "refused"
# Documents from Python per part, and bytes of their images.
PART_DOCUMENTS = 1024
_PART_BYTES = 1 << 28
_POLL_SECONDS = 0.2
# Settings that affect the parts; the others affect the merge only.
_OF_PARTS = (
    *("num_query_variants", "query_drop", "seed"),
    *("opt_out", "held_out", "max_nsfw", "max_watermark"),
)
# Documents done by this process, sizes of finished shards and of all (0 if unknown).
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
    clock: StageClock | None = None,
) -> None:
    """Builds a memory, or resumes an interrupted build.

    Args:
      source: see `readers.read_documents`, or an iterable of documents (streamed).
      tokenizer: a `MixedTokenizer`.
      embedder: a `DocumentEmbedder`, or the name of the encoder of the
        embeddings of an "embeddings:" source.
      path: the directory to create.
      config: see `CorpusConfig`.
      overwrite: replace an existing memory at `path`.
      progress: called with documents done here, sizes of finished shards and of all.
      clock: counts the stages of what this process does.

    Raises:
      FileExistsError: `path` exists and may not be replaced.
      FileNotFoundError: the source does not exist.
      ValueError: another build is unfinished at `path`, or too many records are bad.
    """
    config = config or CorpusConfig()
    refuse_url(path, "a memory that is built")
    path = pathlib.Path(path)
    shards = find_shards(source) if isinstance(source, str) else None
    clock = clock or StageClock()
    chunk_builder = dataclasses.replace(
        make_chunk_builder(config, tokenizer, embedder), clock=clock
    )
    spec = make_build_spec(source, shards, config, tokenizer, embedder)
    if not begin(path, spec, overwrite):
        return
    work = work_directory(path)
    with _marking_refused(work):
        if shards is not None:
            _make_shard_parts(work, shards, chunk_builder, config, progress)
            num_parts = len(shards)
        else:
            assert not isinstance(source, str)
            num_parts = _make_document_parts(work, source, chunk_builder, progress)
        with storage.locked(work / "merge.lock") as held:
            # Another process may have finished meanwhile.
            if held and (work / SPEC_FILE).is_file():
                name = source if isinstance(source, str) else ""
                digest = storage.content_digest(spec)
                with clock.measure("index"):
                    merge_parts(
                        work,
                        path,
                        name,
                        digest,
                        num_parts,
                        chunk_builder,
                        config,
                        overwrite,
                    )
                    storage.delete_directory(work)


def work_directory(path: pathlib.Path) -> pathlib.Path:
    """The folder where `path` is being built."""
    return path.with_name(f"{path.name}.building")


def begin(path: pathlib.Path, spec: dict[str, Any], overwrite: bool) -> bool:
    """Claims the work directory, after cleaning up crashed builds.

    Returns:
      False if a build of this spec crashed after its last step: nothing is left to do.

    Raises:
      FileExistsError: `path` exists and may not be replaced.
      ValueError: another build is unfinished there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = work_directory(path)
    storage.clean(path)
    storage.clean(work)
    if not overwrite and _end_finished(path, spec) and spec["shards"]:
        return False
    writer.check_target(path, overwrite)
    claim_build_spec(work, spec)
    return True


def _end_finished(path: pathlib.Path, spec: dict[str, Any]) -> bool:
    """Deletes the work of a build that crashed between its last two steps.

    Returns:
      Whether the memory at `path` is the one it was building.
    """
    work = work_directory(path)
    if not (format_lib.is_memory(path) and (work / SPEC_FILE).is_file()):
        return False
    if format_lib.read_manifest(path).get("plan") != storage.content_digest(spec):
        return False
    with storage.locked(work / "merge.lock", wait=False) as is_free:
        numbers = range(len(spec["shards"]))
        if not is_free or not all(part_path(work, n).is_dir() for n in numbers):
            return False  # a rebuild of the same memory is running
        storage.delete_directory(work)
    return True


def make_build_spec(
    source: str | Iterable[Document],
    shards: Sequence[Shard] | None,
    config: CorpusConfig,
    tokenizer: DocumentTokenizer,
    embedder: Embedder | str,
) -> dict[str, Any]:
    """The spec of a build: equal for builds that may share their parts."""
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


def claim_build_spec(work: pathlib.Path, spec: dict[str, Any]) -> None:
    """Starts a build, or checks that the unfinished one has the same spec.

    Parts of another spec are discarded if its build was refused, or had no parts yet.

    Raises:
      ValueError: names what differs.
    """
    work.mkdir(parents=True, exist_ok=True)
    with storage.locked(work / "plan.lock"):
        file = work / SPEC_FILE
        if file.is_file():
            remedy = f"remove {work}"
            old = storage.decode_sealed(file.read_bytes(), str(file), remedy)
            changed = [key for key in spec if spec[key] != old.get(key)]
            if not changed:
                (work / _REFUSED_FILE).unlink(missing_ok=True)
                return
            parts = [part for part in work.glob("part-*") if part.is_dir()]
            if parts and not (work / _REFUSED_FILE).is_file():
                raise ValueError(
                    f"{work} holds an unfinished build that differs in "
                    f"{', '.join(changed)}: use the settings it was started with, or "
                    "remove that folder to start again"
                )
            for part in parts:
                storage.delete_directory(part)
        storage.write_file(file, storage.encode_sealed(spec))
        (work / _REFUSED_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def _marking_refused(work: pathlib.Path) -> Iterator[None]:
    """Marks a build refused for its input, so that a corrected one can start."""
    try:
        yield
    except (ValueError, FileNotFoundError):
        if (work / SPEC_FILE).is_file():
            storage.write_file(work / _REFUSED_FILE, b"")
        raise


@contextlib.contextmanager
def _removed_if_empty(work: pathlib.Path) -> Iterator[None]:
    """Removes a failed build without parts (nothing to resume); for one process."""
    try:
        yield
    except BaseException:
        if not any(place.is_dir() for place in work.glob("part-*")):
            storage.delete_directory(work)
        raise


def _make_document_parts(
    work: pathlib.Path,
    documents: Iterable[Document],
    chunk_builder: ChunkBuilder,
    progress: Progress | None,
) -> int:
    """Makes one part per block of documents; existing parts are kept.

    Documents have no shard names that identify them across runs, so every block is read
    and compared with its part by content before skipping the models.

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
    with claim, _removed_if_empty(work):
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
            records = map_ahead(chunk_builder.prepare, map(Record, block))
            parts_lib.write_records_part(
                place, records, digest, number - 1, chunk_builder, report, count
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
    chunk_builder: ChunkBuilder,
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

    while (work / SPEC_FILE).is_file():
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
        if not any(_try_part(work, n, shards[n], chunk_builder, count) for n in free):
            time.sleep(_POLL_SECONDS)


def _try_part(
    work: pathlib.Path,
    number: int,
    shard: Shard,
    chunk_builder: ChunkBuilder,
    count: Callable[[int], None],
) -> bool:
    """Whether this process made the part in this call."""
    try:
        with storage.locked(work / f"part-{number:05d}.lock", wait=False) as held:
            if not held or part_path(work, number).is_dir():
                return False
            parts_lib.write_shard_part(
                part_path(work, number), shard, number, chunk_builder, count
            )
            return True
    except FileNotFoundError:
        if work.is_dir():
            raise
        return False  # another process finished the build
