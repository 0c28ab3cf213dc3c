"""Merges parts into one memory: deduplicates, counts leakage, builds the index."""

from __future__ import annotations

import json
import pathlib
import resource
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from racm3_jax import storage
from racm3_jax.documents.readers import ReadReport
from racm3_jax.index import registry
from racm3_jax.index.contract import IndexKind
from racm3_jax.memory import filters, writer
from racm3_jax.memory import parts as parts_lib
from racm3_jax.memory.config import CorpusConfig, Deduplicate, encoder_name
from racm3_jax.memory.parts import ChunkBuilder


class FirstOccurrences(NamedTuple):
    """Which rows of all parts are first occurrences, by content and by image.

    Attributes:
      contents: False if an earlier row has the same text and pixels.
      images: False if an earlier row has a near-duplicate image.
    """

    contents: Bool[np.ndarray, " n"]
    images: Bool[np.ndarray, " n"]


FindFirsts = Callable[[Sequence[pathlib.Path]], FirstOccurrences]


def part_path(work: pathlib.Path, number: int) -> pathlib.Path:
    """Path of the part of a shard."""
    return work / f"part-{number:05d}"


def bad_records_file(path: pathlib.Path) -> pathlib.Path:
    """File with the list of bad records of the build of `path`."""
    return path.with_name(f"{path.name}.bad_records.jsonl")


def find_first_occurrences(folders: Sequence[pathlib.Path]) -> FirstOccurrences:
    """Compares all rows of the parts in this process."""
    contents, images = (
        np.asarray(parts_lib.open_rows(folders, name))
        for name in ("content_hashes", "image_hashes")
    )
    embeddings = parts_lib.open_rows(folders, "embeddings_image")
    return FirstOccurrences(
        filters.find_first(contents),
        filters.find_first_near_duplicates(images, embeddings.__getitem__),
    )


def merge_parts(
    work: pathlib.Path,
    path: pathlib.Path,
    source: str,
    spec_digest: str,
    num_parts: int,
    chunk_builder: ChunkBuilder,
    config: CorpusConfig,
    overwrite: bool,
    find: FindFirsts = find_first_occurrences,
) -> None:
    """Merges all parts, in order, into the memory.

    Args:
      work: folder of the parts.
      path: of the memory.
      source: source of the parts; "" for documents from Python.
      spec_digest: digest of the build spec, kept in the manifest.
      num_parts: one per shard.
      chunk_builder: that made them.
      config: of the build.
      overwrite: replace an existing memory at `path`.
      find: finds the first occurrences.

    Raises:
      ValueError: too many bad records, or no document is left.
    """
    parts = [part_path(work, number) for number in range(num_parts)]
    reports = [parts_lib.read_report(part) for part in parts]
    report, filtered = _sum_reports(reports, config.max_bad)
    report.check(final=True)
    _list_bad_records(path, report)
    folders = [p for p, r in zip(parts, reports, strict=True) if r["num_documents"]]
    if not folders:
        raise ValueError(
            f"no documents are left of {source or 'what was given'} (read "
            f"{report.num_documents}, left out: {filtered or 'none'})"
            + (
                f"; bad: {report.count_bad()}: {report.show_bad()}"
                if report.num_bad
                else ""
            )
        )
    kept, duplicates = choose_kept(find(folders), config.deduplicate)
    index, rows_per_shard = _choose_index(config, folders, int(kept.sum()))
    ids = parts_lib.UniqueIds()

    def describe() -> dict[str, Any]:
        return {
            "source": source,
            "plan": spec_digest,
            # For parts that are added later, and for compaction.
            "recall_target": config.recall_target,
            "rows_per_shard": rows_per_shard,
            "deduplicate": config.deduplicate,
            "report": {
                "read": report.num_documents,
                "bad": dict(sorted(report.reasons.items())),
                "left_out": dict(sorted(report.left_out.items())),
                "filtered": dict(sorted(filtered.items())),
                "duplicates": duplicates,
                "renamed": ids.num_renamed,
                "leakage": count_leakage(folders, kept),
            },
        }

    writer.write_memory(
        map(ids.rename, parts_lib.read_chunks(folders, kept)),
        path=path,
        vocab=chunk_builder.tokenizer.vocab,
        tokenizer_fingerprint=chunk_builder.tokenizer.fingerprint(),
        encoder_fingerprint=encoder_name(chunk_builder.embedder),
        index=index,
        query_drop=config.query_drop,
        overwrite=overwrite,
        rows_per_shard=rows_per_shard,
        recall_target=config.recall_target,
        about=describe,
    )


def _sum_reports(
    reports: Sequence[Mapping[str, Any]], max_bad: float
) -> tuple[ReadReport, dict[str, int]]:
    """What was read in all parts, and how many documents each filter left out."""
    report, filtered = ReadReport(max_bad), {}
    for part in reports:
        report.merge(part["read"])
        for reason, count in part["filtered"].items():
            filtered[reason] = filtered.get(reason, 0) + count
    return report, filtered


def _list_bad_records(path: pathlib.Path, report: ReadReport) -> None:
    lines = "".join(json.dumps(entry) + "\n" for entry in report.listed)
    file = bad_records_file(path)
    if lines:
        storage.write_file(file, lines.encode())
    else:
        file.unlink(missing_ok=True)


def choose_kept(
    firsts: FirstOccurrences, deduplicate: Deduplicate
) -> tuple[Bool[np.ndarray, " n"], dict[str, int]]:
    """Which rows enter the memory, and how many are duplicates.

    The first of equal documents is kept. Duplicates are counted.
    """
    contents, images = firsts
    counts = {
        "exact": int((~contents).sum()),
        "near": int((contents & ~images).sum()),
    }
    dropped = {"none": (), "exact": (contents,), "near": (contents, images)}
    everything = np.ones(len(contents), bool)
    return np.logical_and.reduce([everything, *dropped[deduplicate]]), counts


def count_leakage(
    folders: Sequence[pathlib.Path], kept: Bool[np.ndarray, " n"]
) -> dict[str, int]:
    """Number of documents with others in the memory that retrieval must exclude.

    Every document finds itself; "same source", "exact copy" and "near copy" count the
    documents with another one of that kind in the memory. The retriever excludes all of
    these; evaluation documents are not in the memory, and are counted as filtered.
    """
    rows = np.flatnonzero(kept)
    columns = {
        name: np.asarray(parts_lib.open_rows(folders, f"{name}_hashes"))[rows]
        for name in ("source", "content", "image")
    }
    embeddings = parts_lib.open_rows(folders, "embeddings_image")
    images = columns["image"]
    near = filters.find_near_duplicates(images, lambda places: embeddings[rows[places]])
    return {
        "itself": len(rows),
        "same source": int(_find_shared(columns["source"]).sum()),
        "exact copy": int(_find_shared(columns["content"]).sum()),
        "near copy": int(near.sum()),
    }


def _find_shared(hashes: np.ndarray) -> Bool[np.ndarray, " n"]:
    """True if another row has the same hash; 0 never matches."""
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    return (counts[inverse] > 1) & (hashes != 0)


def _choose_index(
    config: CorpusConfig, folders: Sequence[pathlib.Path], num_rows: int
) -> tuple[IndexKind, int | None]:
    """The kind of index, and rows per shard, whose build stays within `max_ram_gb`.

    It includes what the process already uses, mainly the models.
    """
    kind = registry.choose_kind(config.index, num_rows)
    if not config.max_ram_gb:
        return kind, None
    d_embed = parts_lib.open_rows(folders, "embeddings_document").shape[1]
    free = config.max_ram_gb * 1e9 - _resident_bytes()
    return registry.fit_ram(kind, num_rows, d_embed, free)


def _resident_bytes() -> int:
    """Resident memory of this process; 0 if the system does not report it."""
    status = pathlib.Path("/proc/self/statm")
    if not status.is_file():
        return 0
    return int(status.read_text().split()[1]) * resource.getpagesize()
