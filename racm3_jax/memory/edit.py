"""Changes to a memory that is in use: add, find what to remove, compact, verify.

    memory/                        memory/                        memory/
      manifest.json     add ->       manifest.json    compact ->    manifest.json
      documents…                     documents…                     compacted-00002/…
      deny.json                      added-00001/…                  deny-00002.json
                                     deny.json

The manifest names every file, and is replaced in one step after all of them are on disk:
a search sees the memory before or after a change, never between. Added documents get the
next rows; compaction leaves denied ones out of every file, and numbers rows anew, so a
memory that was opened before it must be opened again. Of what has left the disk two hashes
stay (`removed.npy`), so that it does not come back with its source.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int64, UInt64

from racm3_jax import storage
from racm3_jax.documents.readers import ReadReport, find_shards
from racm3_jax.index.contract import IndexKind
from racm3_jax.memory import filters, writer
from racm3_jax.memory import format as format_lib
from racm3_jax.memory import parts as parts_lib
from racm3_jax.memory.chunks import CHUNK_SIZE, MemoryChunk
from racm3_jax.memory.memory import Memory
from racm3_jax.memory.parts import Maker

TABLE_DIRECTORY = "table"
_OWN_FOLDER = re.compile(r"(added|compacted)-\d{5}")
_ROWS_PER_BLOCK = 1 << 14


def add_documents(
    path: str | os.PathLike[str],
    source: str,
    maker: Maker,
    max_bad: float = 0.1,
    readmit: bool = False,
) -> dict[str, Any]:
    """Adds the documents of a source; whoever opens the memory next finds them.

    Documents whose id, or whose text and pixels, the memory holds already, or has held
    and lost by removal and compaction, are left out and counted.

    Args:
      path: of the memory.
      source: as `readers.read_documents` takes it.
      maker: the memory's own models, with any filters.
      max_bad: share of bad records above which nothing is added.
      readmit: takes back what was removed and has left the disk.

    Returns:
      "added", "bad" and "filtered" counts.

    Raises:
      ValueError: other models, too many bad records, or a change by another process.
    """
    path = pathlib.Path(path)
    manifest = format_lib.read_manifest(path)
    embedder = maker.embedder
    format_lib.check_fingerprints(path, manifest, embedder, maker.tokenizer)
    if maker.num_query_variants != manifest["num_query_variants"]:
        raise ValueError(
            f"the memory has {manifest['num_query_variants']} query variants; got "
            f"{maker.num_query_variants}"
        )
    with Memory.load(path) as memory:
        ids = set(memory.id_hashes.tolist())
        known = memory.content_hashes
        contents: set[int] = set() if known is None else set(known.tolist())
        removed = format_lib.read_removed(path, manifest)
        gone = set() if readmit else set(removed[removed > 0].tolist())
    report, filtered = ReadReport(max_bad), {}
    number = _next_number(manifest)
    prefix = f"added-{number:05d}"
    aside = path.with_name(f".{path.name}.{prefix}.{os.getpid()}")
    chunks = _new_ones(
        _chunks(source, maker, number, report, filtered), ids, contents, gone, filtered
    )
    counts = {"bad": report.reasons, "filtered": filtered}
    try:
        with storage.new_directory(aside) as directory:
            part = _write_part(directory, chunks, manifest, "auto")
        report.check(final=True)
        if part is None:
            return {"added": 0, **counts}
        with format_lib.locked(path):
            if format_lib.read_manifest(path) != manifest:
                raise ValueError(
                    f"the memory at {path} was changed by another process meanwhile: "
                    "add the documents again"
                )
            shutil.rmtree(path / prefix, ignore_errors=True)
            os.rename(aside, path / prefix)
            _write_manifest(path, _grown(path, manifest, f"{prefix}/", part))
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {"added": part.num_documents, **counts}


def _write_part(
    directory: pathlib.Path,
    chunks: Iterable[MemoryChunk],
    manifest: dict[str, Any],
    index: IndexKind | Literal["auto"],
) -> writer.Part | None:
    """With the recall target and the shard size that the memory was built with."""
    return writer.write_part(
        directory,
        chunks,
        index=index,
        rows_per_shard=manifest.get("rows_per_shard"),
        recall_target=manifest.get("recall_target"),
    )


def _chunks(
    source: str,
    maker: Maker,
    number: int,
    report: ReadReport,
    filtered: dict[str, int],
) -> Iterator[MemoryChunk]:
    for place, shard in enumerate(find_shards(source)):
        yield from maker.chunks(shard, number * 100_000 + place, report, filtered)


def _new_ones(
    chunks: Iterable[MemoryChunk],
    ids: set[int],
    contents: set[int],
    gone: set[int],
    filtered: dict[str, int],
) -> Iterator[MemoryChunk]:
    """Without the documents that are there already, came before, or were removed."""
    for chunk in chunks:
        kept = np.ones(len(chunk.documents), bool)
        assert chunk.content_hashes is not None
        for i, document in enumerate(chunk.documents):
            name = format_lib.hash_name(document.id)
            content = int(chunk.content_hashes[i])
            reason = "repeated id" if name in ids else None
            if reason is None and content in contents:
                reason = "exact duplicate"
            if reason is None and (name in gone or content in gone):
                reason = "removed before"
            ids.add(name)
            contents.add(content)
            if reason is not None:
                kept[i] = False
                filtered[reason] = filtered.get(reason, 0) + 1
        if kept.any():
            yield parts_lib.select_rows(chunk, kept)


def _next_number(manifest: dict[str, Any]) -> int:
    names = [p for p in format_lib.prefixes(manifest) if p]
    return 1 + max((int(name.rstrip("/")[-5:]) for name in names), default=0)


def _grown(
    path: pathlib.Path,
    manifest: dict[str, Any],
    prefix: str,
    part: writer.Part,
) -> dict[str, Any]:
    """The manifest with one more part."""
    before = {"prefix": "", "num_documents": manifest["num_documents"]}
    parts = manifest.get("parts", [before])
    names = [f"{prefix}{name}" for name in storage.list_files(path / prefix)]
    counts = manifest["num_with_modality"]
    return {
        **manifest,
        "num_documents": manifest["num_documents"] + part.num_documents,
        "num_with_modality": {
            name: count + part.num_with_modality[name] for name, count in counts.items()
        },
        "parts": [*parts, {"prefix": prefix, "num_documents": part.num_documents}],
        "files": {**manifest["files"], **storage.describe_files(path, names)},
        "lineage": format_lib.lineage(manifest),
    }


def _write_manifest(path: pathlib.Path, manifest: dict[str, Any]) -> None:
    storage.write_file(path / format_lib.MANIFEST_FILE, storage.encode_sealed(manifest))


def compact(path: str | os.PathLike[str]) -> int:
    """Writes a memory anew without its denied documents, and deletes the old files.

    Documents that are removed while it runs stay removed; they leave the disk at the
    next compaction.

    Returns:
      How many documents left the disk.

    Raises:
      ValueError: nothing would be left, or another process added documents meanwhile.
    """
    path = pathlib.Path(path)
    manifest = format_lib.read_manifest(path)
    with Memory.load(path) as memory:
        kept = np.ones(len(memory), bool)
        denied = format_lib.read_denied(path, manifest)
        kept[denied] = False
        removed = np.concatenate(
            [format_lib.read_removed(path, manifest), _hashes(memory, denied)]
        )
    if not kept.any():
        raise ValueError(
            f"every document of {path} is removed, so nothing would be left: delete the "
            "memory instead"
        )
    number = _next_number(manifest)
    prefix = f"compacted-{number:05d}/"
    aside = path.with_name(f".{path.name}.compacted.{os.getpid()}")
    folders = [path / p for p in format_lib.prefixes(manifest)]
    try:
        with storage.new_directory(aside) as directory:
            chunks = parts_lib.read_chunks(folders, kept)
            part = _write_part(directory, chunks, manifest, manifest["index"])
            assert part is not None
            np.save(directory / format_lib.REMOVED_NAME, np.unique(removed, axis=0))
        with format_lib.locked(path):
            if format_lib.read_manifest(path) != manifest:
                raise ValueError(
                    f"documents were added to {path} meanwhile: compact it again"
                )
            late = np.setdiff1d(format_lib.read_denied(path, manifest), denied)
            shutil.rmtree(path / prefix, ignore_errors=True)
            os.rename(aside, path / prefix)
            new = _compacted(path, manifest, prefix, part)
            new["deny_file"] = f"deny-{number:05d}.json"
            new_rows = np.cumsum(kept) - 1
            format_lib.write_denied(path, new, new_rows[late])
            _write_manifest(path, new)
            _delete_old(path, manifest, new)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return int((~kept).sum())


def _hashes(memory: Memory, rows: Int64[np.ndarray, " n"]) -> UInt64[np.ndarray, "n 2"]:
    """Of id and content; 0 where contents are unknown."""
    contents = memory.content_hashes
    own = np.zeros(len(rows), np.uint64) if contents is None else contents[rows]
    return np.stack([memory.id_hashes[rows], own], axis=1).astype(np.uint64)


def _compacted(
    path: pathlib.Path,
    manifest: dict[str, Any],
    prefix: str,
    part: writer.Part,
) -> dict[str, Any]:
    names = [f"{prefix}{name}" for name in storage.list_files(path / prefix)]
    new = {
        **manifest,
        **part._asdict(),
        "parts": [{"prefix": prefix, "num_documents": part.num_documents}],
        "files": storage.describe_files(path, names),
        "removed_file": f"{prefix}{format_lib.REMOVED_NAME}",
    }
    new.pop("lineage", None)
    # Fixed now, since the name of the deny list becomes part of the manifest.
    new["lineage"] = format_lib.fingerprint(new)
    return new


def _delete_old(path: pathlib.Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Deletes what only the old manifest names, and what no manifest does."""
    for name in {*old["files"], old.get("deny_file", format_lib.DENY_FILE)}:
        if name not in new["files"] and name != new["deny_file"]:
            (path / name).unlink(missing_ok=True)
    for name in strangers(path, new):
        top = path / name.split("/")[0]
        if _OWN_FOLDER.fullmatch(top.name) or top.name == TABLE_DIRECTORY:
            shutil.rmtree(top, ignore_errors=True)
    for folder in sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def strangers(path: pathlib.Path, manifest: dict[str, Any]) -> list[str]:
    """Files in a memory's directory that its manifest does not name."""
    known = {
        *manifest["files"],
        format_lib.MANIFEST_FILE,
        manifest.get("deny_file", format_lib.DENY_FILE),
    }
    return [
        name
        for name in storage.list_files(path)
        if name not in known and not name.startswith(f"{TABLE_DIRECTORY}/")
    ]


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Proves a memory: every byte, no leftovers, and that what was removed is gone.

    Every removed document is searched for with its own embedding, and must not come
    back.

    Returns:
      Counts: "documents", "removed" (searched for and not found), "on_disk" (removed,
      and waiting for compaction), "files".

    Raises:
      FileNotFoundError: no memory there.
      IntegrityError: names what is wrong.
    """
    path = pathlib.Path(path)
    with Memory.load(path) as memory:
        left = strangers(path, memory.manifest)
        if left:
            raise storage.IntegrityError(
                f"{path} holds {left[0]}, which its manifest does not name "
                f"({len(left)} such files): remove it, or run racm3 memory remove "
                "--compact"
            )
        if len(np.unique(memory.id_hashes)) != len(memory):
            raise storage.IntegrityError(f"{path} holds two documents of one id")
        denied = format_lib.read_denied(path, memory.manifest)
        for start in range(0, len(denied), CHUNK_SIZE):
            rows = denied[start : start + CHUNK_SIZE]
            found = memory.search(memory.embeddings[rows], 10)
            if np.isin(found.ids[found.valid], denied).any():
                raise storage.IntegrityError(f"{path} returns a removed document")
        return {
            "documents": len(memory) - len(denied),
            "removed": len(denied),
            "on_disk": len(denied),
            "files": len(memory.manifest["files"]),
        }


def find_urls(memory: Memory, pattern: str) -> Int64[np.ndarray, " n"]:
    """Rows whose id, source or URL matches a pattern with `*` and `?`."""
    wanted = filters.OptOut([pattern])
    found = []
    for start in range(0, len(memory), CHUNK_SIZE):
        rows = np.arange(start, min(len(memory), start + CHUNK_SIZE))
        for row, document in zip(rows, memory.documents(rows), strict=True):
            if wanted.matches(document.id, document.source, document.metadata):
                found.append(row)
    return np.asarray(found, np.int64)


def find_like(
    memory: Memory, query: Float32[np.ndarray, " d_embed"], min_similarity: float = 0.95
) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Allowed rows whose image part is at least so similar to an image's embedding.

    All rows are looked at: a removal must not depend on the index's recall.

    Returns:
      Rows and similarities, most similar first.
    """
    scores = np.concatenate(
        [
            memory.image_embeddings[start : start + _ROWS_PER_BLOCK] @ query
            for start in range(0, len(memory), _ROWS_PER_BLOCK)
        ]
    )
    allowed = np.zeros(len(memory), bool)
    allowed[memory.allowed_ids()] = True
    rows = np.flatnonzero(allowed & (scores >= min_similarity))
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    return rows.astype(np.int64), scores[rows]
