"""The parts of a corpus -> one memory: repeats left out, leakage counted, indexed."""

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
from racm3_jax.memory.parts import Maker


class Firsts(NamedTuple):
    """Which rows of all parts repeat no earlier one, by what they could repeat.

    Attributes:
      contents: False where an earlier row has the same text and pixels.
      images: where an earlier one has a near-equal image.
    """

    contents: Bool[np.ndarray, " n"]
    images: Bool[np.ndarray, " n"]


FindFirsts = Callable[[Sequence[pathlib.Path]], Firsts]


def part_path(work: pathlib.Path, number: int) -> pathlib.Path:
    """Where the part of a shard is made."""
    return work / f"part-{number:05d}"


def bad_records_file(path: pathlib.Path) -> pathlib.Path:
    """Where the bad records of the build of `path` are listed."""
    return path.with_name(f"{path.name}.bad_records.jsonl")


def find_firsts(folders: Sequence[pathlib.Path]) -> Firsts:
    """Compares all rows of the parts in this process."""
    contents, images = (
        np.asarray(parts_lib.open_rows(folders, name))
        for name in ("content_hashes", "image_hashes")
    )
    embeddings = parts_lib.open_rows(folders, "embeddings_image")
    return Firsts(
        filters.find_first(contents),
        filters.find_near_first(images, embeddings.__getitem__),
    )


def merge_parts(
    work: pathlib.Path,
    path: pathlib.Path,
    source: str,
    plan: str,
    num_parts: int,
    maker: Maker,
    config: CorpusConfig,
    overwrite: bool,
    find: FindFirsts = find_firsts,
) -> None:
    """All parts in order -> the memory.

    Args:
      work: where the parts are.
      path: of the memory.
      source: that the parts were made of; "" for documents from Python.
      plan: digest of what is built, kept in the manifest.
      num_parts: one a shard.
      maker: that made them.
      config: of the build.
      overwrite: replace a memory that is at `path`.
      find: which rows repeat none.

    Raises:
      ValueError: too many records were bad, or no document is left.
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
            "plan": plan,
            # For the parts that are added later, and for compaction.
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
        vocab=maker.tokenizer.vocab,
        tokenizer_fingerprint=maker.tokenizer.fingerprint(),
        encoder_fingerprint=encoder_name(maker.embedder),
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
    firsts: Firsts, deduplicate: Deduplicate
) -> tuple[Bool[np.ndarray, " n"], dict[str, int]]:
    """Which rows enter the memory, and how many repeat others.

    Of equal documents the first stays. All are counted.
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
    """How many documents of the memory would be given what retrieval must withhold.

    Every document finds itself; "same source", "exact copy" and "near copy" count those
    that have another one of that kind in the memory. The retriever leaves all of these
    out; evaluation documents are not in the memory, and are counted as filtered.
    """
    rows = np.flatnonzero(kept)
    columns = {
        name: np.asarray(parts_lib.open_rows(folders, f"{name}_hashes"))[rows]
        for name in ("source", "content", "image")
    }
    embeddings = parts_lib.open_rows(folders, "embeddings_image")
    images = columns["image"]
    near = filters.find_alike(images, lambda places: embeddings[rows[places]])
    return {
        "itself": len(rows),
        "same source": int(_find_shared(columns["source"]).sum()),
        "exact copy": int(_find_shared(columns["content"]).sum()),
        "near copy": int(near.sum()),
    }


def _find_shared(hashes: np.ndarray) -> Bool[np.ndarray, " n"]:
    """True where another row has the same hash; 0 is none."""
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    return (counts[inverse] > 1) & (hashes != 0)


def _choose_index(
    config: CorpusConfig, folders: Sequence[pathlib.Path], num_rows: int
) -> tuple[IndexKind, int | None]:
    """A kind, and rows a shard, whose build stays within `max_ram_gb`.

    What the process holds already, the models above all, is part of it.
    """
    kind = registry.choose_kind(config.index, num_rows)
    if not config.max_ram_gb:
        return kind, None
    d_embed = parts_lib.open_rows(folders, "embeddings_document").shape[1]
    free = config.max_ram_gb * 1e9 - _resident_bytes()
    return registry.fit_ram(kind, num_rows, d_embed, free)


def _resident_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    status = pathlib.Path("/proc/self/statm")
    if not status.is_file():
        return 0
    return int(status.read_text().split()[1]) * resource.getpagesize()
