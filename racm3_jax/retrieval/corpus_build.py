"""Builds a memory from a source on disk: in parts, resumable, by several processes.

    memory.building/plan.json        what is built, of what, with which models
    memory.building/part-00000/      one part a shard of the source (`corpus_parts`)
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
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool

from racm3_jax.documents.readers import ReadReport, Shard, find_shards, read_documents
from racm3_jax.retrieval import (
    backends,
    corpus_parts,
    filters,
    integrity,
    memory_writer,
)
from racm3_jax.retrieval.corpus_parts import Maker
from racm3_jax.retrieval.index import IndexKind
from racm3_jax.retrieval.memory_chunks import DocumentTokenizer, Embedder

PLAN_FILE = "plan.json"
Deduplicate = Literal["none", "exact", "near"]
# A ScaNN build holds the rows, its own copy, and its tables.
INDEX_RAM_FACTOR = 3.0
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """What a corpus is built with.

    Attributes:
      index: kind of the index; "auto" follows the size and `max_ram_gb`.
      num_query_variants: queries with dropout for every document.
      query_drop: share of a query that is left out.
      seed: of the dropout.
      max_bad: share of bad records above which the build stops.
      recall_target: recall@10 that a ScaNN tree is tuned to, for text and for image
        queries.
      max_ram_gb: bounds the index build, by sharding it; 0 is no bound.
      deduplicate: drop documents of equal text and pixels ("exact"), also those of a
        near-equal image ("near"), or none of them.
      opt_out: file of ids and URL patterns that must not be used.
      held_out: sources of evaluation documents.
      max_nsfw: highest NSFW score; None does not look.
      max_watermark: highest watermark score.
    """

    index: IndexKind | Literal["auto"] = "auto"
    num_query_variants: int = 4
    query_drop: float = 0.2
    seed: int = 0
    max_bad: float = 0.1
    recall_target: float = 0.95
    max_ram_gb: float = 0.0
    deduplicate: Deduplicate = "exact"
    opt_out: str = ""
    held_out: tuple[str, ...] = ()
    max_nsfw: float | None = None
    max_watermark: float | None = None

    def __post_init__(self) -> None:
        backends.choose_kind(self.index, 1)
        ReadReport(self.max_bad)
        if self.deduplicate not in get_args(Deduplicate):
            raise ValueError(
                f'deduplicate must be "none", "exact" or "near"; got '
                f"{self.deduplicate!r}"
            )
        if not 0 < self.recall_target <= 1:
            raise ValueError(
                f"recall_target must be in (0, 1]; got {self.recall_target}"
            )
        if not 0 <= self.query_drop < 1:
            raise ValueError(f"query_drop must be in [0, 1); got {self.query_drop}")
        if self.num_query_variants < 0 or self.max_ram_gb < 0:
            raise ValueError("num_query_variants and max_ram_gb must be >= 0")


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
    memory_writer.check_target(path, overwrite)
    shards = find_shards(source)
    maker = make_maker(config, tokenizer, embedder)
    work = work_directory(path)
    _claim_plan(work, _plan(source, shards, config, tokenizer, embedder))
    _make_parts(work, shards, maker, config, progress)
    with _locked(work / "merge.lock", wait=True) as held:
        # Another process may have finished while this one waited.
        if held and (work / PLAN_FILE).is_file():
            _merge(work, path, source, len(shards), maker, config, overwrite)
            shutil.rmtree(work)


def work_directory(path: pathlib.Path) -> pathlib.Path:
    """Where `path` is being built."""
    return path.with_name(f"{path.name}.building")


def bad_records_file(path: pathlib.Path) -> pathlib.Path:
    """Where the bad records of the build of `path` are listed."""
    return path.with_name(f"{path.name}.bad_records.jsonl")


def make_maker(
    config: CorpusConfig, tokenizer: DocumentTokenizer, embedder: Embedder | str
) -> Maker:
    """The models and the filters of a build."""
    held_out = None
    if config.held_out:
        held_out = filters.HeldOut()
        for source in config.held_out:
            for document in read_documents(source, max_bad=config.max_bad):
                held_out.add(document)
    return Maker(
        tokenizer,
        embedder,
        config.num_query_variants,
        config.query_drop,
        config.seed,
        filters.OptOut.read(config.opt_out) if config.opt_out else None,
        held_out,
        filters.ScoreLimits(config.max_nsfw, config.max_watermark),
    )


def encoder_name(embedder: Embedder | str) -> str:
    """The fingerprint of the encoder."""
    return embedder if isinstance(embedder, str) else embedder.fingerprint()


def _plan(
    source: str,
    shards: Sequence[Shard],
    config: CorpusConfig,
    tokenizer: DocumentTokenizer,
    embedder: Embedder | str,
) -> dict[str, Any]:
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


def _claim_plan(work: pathlib.Path, plan: dict[str, Any]) -> None:
    """Starts a build, or checks that the half-done one is the same.

    Raises:
      ValueError: names what differs.
    """
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work / "plan.lock", wait=True):
        file = work / PLAN_FILE
        if not file.is_file():
            integrity.write_file(file, integrity.encode_sealed(plan))
            return
        old = integrity.decode_sealed(file.read_bytes(), str(file), f"remove {work}")
        changed = [key for key in plan if plan[key] != old.get(key)]
        if changed:
            raise ValueError(
                f"{work} holds a half-done build that differs in {', '.join(changed)}: "
                "give what it was started with, or remove that folder to begin anew"
            )


def _part(work: pathlib.Path, number: int) -> pathlib.Path:
    return work / f"part-{number:05d}"


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
            if number not in counted and (_part(work, number)).is_dir():
                part = corpus_parts.read_report(_part(work, number))
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
        with _locked(work / f"part-{number:05d}.lock", wait=False) as held:
            if not held or _part(work, number).is_dir():
                return False
            corpus_parts.write_corpus_part(
                _part(work, number), shard, number, maker, count
            )
            return True
    except FileNotFoundError:
        if work.is_dir():
            raise
        return False  # another process has finished the build


@contextlib.contextmanager
def _locked(file: pathlib.Path, *, wait: bool) -> Iterator[bool]:
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


def _merge(
    work: pathlib.Path,
    path: pathlib.Path,
    source: str,
    num_parts: int,
    maker: Maker,
    config: CorpusConfig,
    overwrite: bool,
) -> None:
    """All parts in order -> the memory."""
    for stale in path.parent.glob(f".{path.name}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    reports = [corpus_parts.read_report(_part(work, n)) for n in range(num_parts)]
    report, filtered = ReadReport(config.max_bad), {}
    for part in reports:
        report.merge(part["read"])
        for reason, count in part["filtered"].items():
            filtered[reason] = filtered.get(reason, 0) + count
    report.check(final=True)
    _list_bad_records(path, report)
    folders = [_part(work, n) for n, r in enumerate(reports) if r["num_documents"]]
    if not folders:
        raise ValueError(
            f"no documents are left of {source} (read {report.num_documents}, left "
            f"out: {filtered or 'none'})"
        )
    kept, duplicates = find_kept(folders, config.deduplicate)
    index, rows_per_shard = _choose_index(config, folders, int(kept.sum()))
    memory_writer.write_memory(
        corpus_parts.read_chunks(folders, kept),
        path=path,
        vocab=maker.tokenizer.vocab,
        tokenizer_fingerprint=maker.tokenizer.fingerprint(),
        encoder_fingerprint=encoder_name(maker.embedder),
        index=index,
        query_drop=config.query_drop,
        overwrite=overwrite,
        rows_per_shard=rows_per_shard,
        recall_target=config.recall_target,
        about={
            "source": source,
            "report": {
                "read": report.num_documents,
                "bad": dict(sorted(report.reasons.items())),
                "filtered": dict(sorted(filtered.items())),
                "duplicates": duplicates,
            },
        },
    )


def _list_bad_records(path: pathlib.Path, report: ReadReport) -> None:
    lines = "".join(json.dumps(entry) + "\n" for entry in report.listed)
    file = bad_records_file(path)
    if lines:
        integrity.write_file(file, lines.encode())
    else:
        file.unlink(missing_ok=True)


def find_kept(
    folders: Sequence[pathlib.Path], deduplicate: Deduplicate
) -> tuple[Bool[np.ndarray, " n"], dict[str, int]]:
    """Which documents of the parts enter the memory, and how many repeat others.

    Of equal documents the first stays. All are counted; equal ids are always dropped.
    """
    ids, contents, images = (
        np.asarray(corpus_parts.open_rows(folders, name))
        for name in ("id_hashes", "content_hashes", "image_hashes")
    )
    embeddings = corpus_parts.open_rows(folders, "embeddings_image")
    unique = filters.find_first(ids)
    exact = filters.find_first(contents)
    near = filters.find_near_first(images, embeddings.__getitem__)
    counts = {
        "equal id": int((~unique).sum()),
        "exact": int((unique & ~exact).sum()),
        "near": int((unique & exact & ~near).sum()),
    }
    dropped = {"none": (), "exact": (exact,), "near": (exact, near)}[deduplicate]
    return np.logical_and.reduce([unique, *dropped]), counts


def _choose_index(
    config: CorpusConfig, folders: Sequence[pathlib.Path], num_rows: int
) -> tuple[IndexKind, int | None]:
    """A kind, and rows a shard, whose build stays within `max_ram_gb`."""
    kind = backends.choose_kind(config.index, num_rows)
    if not config.max_ram_gb:
        return kind, None
    d_embed = corpus_parts.open_rows(folders, "embeddings_document").shape[1]
    row_bytes = 4 * d_embed * INDEX_RAM_FACTOR
    fitting = int(config.max_ram_gb * 1e9 / row_bytes)
    if kind == "exact" or (fitting >= num_rows and kind == "scann"):
        return kind, None
    return "scann_sharded", max(backends.MIN_SCANN_ROWS, min(fitting, num_rows))
