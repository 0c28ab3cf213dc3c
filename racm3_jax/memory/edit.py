"""Changes a memory in use: add, find what to remove, compact, verify.

    memory/                        memory/                        memory/
      manifest.json     add ->       manifest.json    compact ->    manifest.json
      documents…                     documents…                     compacted-00002/…
      deny.json                      added-00001/…                  deny-00002.json
                                     deny.json

The manifest lists every file, and is replaced atomically after all of them are on disk:
a search sees the memory before or after a change, never in between. Added documents get
the next rows; compaction drops denied documents from every file and renumbers the rows,
so a memory that was opened before must be reopened. Two hashes of each deleted document
are kept (`removed.npy`), so that it does not come back with its source.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt64

from racm3_jax import checksums, storage
from racm3_jax.buckets import refuse_url
from racm3_jax.documents.readers import ReadReport, find_shards, read_shard_ahead
from racm3_jax.index import streaming
from racm3_jax.memory import filters, staging, writer
from racm3_jax.memory import format as format_lib
from racm3_jax.memory import parts as parts_lib
from racm3_jax.memory.chunks import CHUNK_SIZE, MemoryChunk
from racm3_jax.memory.memory import Memory
from racm3_jax.memory.parts import ChunkBuilder


def add_documents(
    path: str | os.PathLike[str],
    source: str,
    chunk_builder: ChunkBuilder,
    max_bad: float = 0.1,
    restore: bool = False,
) -> dict[str, Any]:
    """Adds the documents of a source; visible when the memory is next opened.

    Documents whose text and pixels are already in the memory, or were removed from it
    by compaction, are skipped and counted; an id that is already taken is no reason to
    skip (see `parts.UniqueIds`).

    Args:
      path: of the memory.
      source: see `readers.read_documents`.
      chunk_builder: the memory's models, with any filters.
      max_bad: fraction of bad records above which nothing is added.
      restore: also add documents that were removed and deleted.

    Returns:
      "added", "bad", "left_out", "filtered" and "renamed" counts.

    Raises:
      ValueError: other models, too many bad records, or a concurrent change.
    """
    path = pathlib.Path(path)
    manifest = _clean_up(path)
    embedder = chunk_builder.embedder
    format_lib.check_fingerprints(path, manifest, embedder, chunk_builder.tokenizer)
    if chunk_builder.num_query_variants != manifest["num_query_variants"]:
        raise ValueError(
            f"the memory has {manifest['num_query_variants']} query variants; got "
            f"{chunk_builder.num_query_variants}"
        )
    with Memory.load(path) as memory:
        known = memory.content_hashes
        contents: set[int] | None = set() if known is None else set(known.tolist())
        if manifest.get("deduplicate") == "none":
            contents = None
        ids = parts_lib.UniqueIds(memory.id_hashes.tolist())
        removed = format_lib.read_removed(path, manifest)
        removed = removed[:0] if restore else removed
    report, filtered = ReadReport(max_bad), {}
    number = _next_number(manifest)
    prefix = f"added-{number:05d}/"
    chunks = _chunks(source, chunk_builder, number, report, filtered)
    chunks = map(ids.rename, _skip_known(chunks, contents, removed, filtered))
    first = next(chunks, None)
    added = 0
    if first is not None:
        chunks = itertools.chain([first], chunks)

        def write(directory: pathlib.Path) -> writer.Part:
            part = _write_part(directory, chunks, manifest)
            report.check(final=True)
            return part

        with _new_part(path, prefix, manifest, write) as (part, newest):
            format_lib.write_manifest(
                path, _add_to_manifest(path, newest, prefix, part)
            )
        added = part.num_documents
    report.check(final=True)
    return {
        "added": added,
        "bad": report.reasons,
        "left_out": report.left_out,
        "filtered": filtered,
        "renamed": ids.num_renamed,
    }


def _clean_up(path: pathlib.Path) -> dict[str, Any]:
    """The manifest, after cleaning up after crashed writers."""
    refuse_url(path, "a memory that is changed")
    staging.refuse_staged(path)
    format_lib.read_manifest(path)  # a readable error if there is no memory
    with format_lib.locked(path):
        manifest = format_lib.read_manifest(path)
        format_lib.delete_untracked(path, manifest)
    return manifest


@contextlib.contextmanager
def _new_part(
    path: pathlib.Path,
    prefix: str,
    manifest: dict[str, Any],
    write: Callable[[pathlib.Path], writer.Part],
) -> Iterator[tuple[writer.Part, dict[str, Any]]]:
    """Writes a new folder of a memory; the block then adds it to the manifest.

    The memory is locked from before the folder appears until the block ends; after an
    error in the block, the folder is removed.

    Args:
      path: of the memory.
      prefix: name prefix of the folder.
      manifest: on which the change is based.
      write: fills the folder.

    Yields:
      What was written, and the current manifest: rows may have been removed meanwhile.

    Raises:
      ValueError: another process changed the memory meanwhile.
    """
    with contextlib.ExitStack() as held:
        with storage.new_directory(path / prefix) as directory:
            part = write(directory)
            held.enter_context(format_lib.locked(path))
            newest = format_lib.read_manifest(path)
            if {**newest, "deny_version": 0} != {**manifest, "deny_version": 0}:
                raise ValueError(
                    f"the memory at {path} was changed by another process meanwhile: "
                    "run the same command again"
                )
        try:
            yield part, newest
        except BaseException:
            if prefix not in format_lib.prefixes(format_lib.read_manifest(path)):
                storage.delete_directory(path / prefix)
            raise


def _write_part(
    directory: pathlib.Path, chunks: Iterable[MemoryChunk], manifest: dict[str, Any]
) -> writer.Part:
    """Writes a part with the memory's index, recall target and shard size."""
    part = writer.write_part(
        directory,
        chunks,
        index=manifest["index"],
        rows_per_shard=manifest.get("rows_per_shard"),
        recall_target=manifest.get("recall_target"),
    )
    assert part is not None
    return part


def _chunks(
    source: str,
    chunk_builder: ChunkBuilder,
    number: int,
    report: ReadReport,
    filtered: dict[str, int],
) -> Iterator[MemoryChunk]:
    for place, shard in enumerate(find_shards(source)):
        records = read_shard_ahead(shard, report, chunk_builder.prepare)
        yield from chunk_builder.chunks(records, number * 100_000 + place, filtered)


def _skip_known(
    chunks: Iterable[MemoryChunk],
    contents: set[int] | None,
    removed: UInt64[np.ndarray, "removed 2"],
    filtered: dict[str, int],
) -> Iterator[MemoryChunk]:
    """Drops documents that are already in the memory, were repeated, or were removed.

    Args:
      chunks: what is to be added.
      contents: content hashes in the memory; None keeps equal documents.
      removed: hashes of id and content of deleted documents. A content of 0 is unknown:
        such a document is identified by its id.
      filtered: counts what is skipped, by reason.
    """
    gone_contents = set(removed[:, 1].tolist()) - {0}
    gone_ids = set(removed[removed[:, 1] == 0, 0].tolist())
    for chunk in chunks:
        kept = np.ones(len(chunk.documents), bool)
        assert chunk.content_hashes is not None
        for i, document in enumerate(chunk.documents):
            content = int(chunk.content_hashes[i])
            reason = None
            if contents is not None:
                reason = "exact duplicate" if content in contents else None
                contents.add(content)
            is_gone = content in gone_contents
            if is_gone or format_lib.hash_name(document.id) in gone_ids:
                reason = reason or "removed before"
            if reason is not None:
                kept[i] = False
                filtered[reason] = filtered.get(reason, 0) + 1
        if kept.any():
            yield parts_lib.select_rows(chunk, kept)


def _next_number(manifest: dict[str, Any]) -> int:
    names = [p for p in format_lib.prefixes(manifest) if p]
    return 1 + max((int(name.rstrip("/")[-5:]) for name in names), default=0)


def _add_to_manifest(
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


def compact(path: str | os.PathLike[str]) -> int:
    """Rewrites a memory without its denied documents, and deletes the old files.

    Documents that are removed while it runs stay removed; the next compaction deletes
    them. If it is interrupted at any time, the memory is the old or the new one, and
    the next change deletes the files of the other.

    Returns:
      Number of deleted documents.

    Raises:
      ValueError: nothing would be left, or another process added documents meanwhile.
    """
    path = pathlib.Path(path)
    manifest = _clean_up(path)
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
    folders = [path / p for p in format_lib.prefixes(manifest)]
    if kept.all() and len(folders) == 1:
        return 0
    number = _next_number(manifest)
    prefix = f"compacted-{number:05d}/"

    def write(directory: pathlib.Path) -> writer.Part:
        part = _write_part(directory, parts_lib.read_chunks(folders, kept), manifest)
        np.save(directory / format_lib.REMOVED_NAME, np.unique(removed, axis=0))
        return part

    with _new_part(path, prefix, manifest, write) as (part, newest):
        removed_meanwhile = np.setdiff1d(format_lib.read_denied(path, newest), denied)
        new = _compacted(path, newest, prefix, part)
        new["deny_file"] = f"deny-{number:05d}.json"
        new_rows = np.cumsum(kept) - 1
        format_lib.write_denied(path, new, new_rows[removed_meanwhile])
        format_lib.write_manifest(path, new)
    _clean_up(path)
    return int((~kept).sum())


def _hashes(memory: Memory, rows: Int64[np.ndarray, " n"]) -> UInt64[np.ndarray, "n 2"]:
    """Of id and content; 0 where contents unknown."""
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
    # Fixed now: the name of the deny list becomes part of the manifest.
    new["lineage"] = format_lib.fingerprint(new)
    return new


def verify(
    path: str | os.PathLike[str],
    share: float = 1.0,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Verifies a memory: every byte, no leftovers, and no removed document is found.

    Each removed document is searched with its own embedding, and must not be returned.

    Args:
      path: of the memory.
      share: fraction of its bytes to read; below 1, in randomly chosen files.
      say: called with a message about what was chosen.

    Returns:
      Counts: "documents", "removed" (searched and not found), "on_disk" (removed,
      and not yet compacted), "files".

    Raises:
      FileNotFoundError: there is no memory.
      IntegrityError: names what is wrong.
    """
    path = pathlib.Path(path)
    describe = checksums.sample(share, say, storage.describe_files)
    with Memory.load(path, describe=describe) as memory:
        left = format_lib.find_untracked(path, memory.manifest)
        left += [p.name for p in path.iterdir() if storage.is_leftover(p.name)]
        if left:
            raise storage.IntegrityError(
                f"{path} holds {left[0]}, which its manifest does not list "
                f"({len(left)} such files): a change was interrupted; run racm3 memory "
                f"remove --compact --memory={path} to clean up"
            )
        if len(np.unique(memory.id_hashes)) != len(memory):
            raise storage.IntegrityError(f"{path} holds two documents with the same id")
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


def find_similar_images(
    memory: Memory, query: Float32[np.ndarray, " d_embed"], min_similarity: float = 0.95
) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Allowed rows whose image embedding has at least this similarity to the query.

    Scans all rows: a removal must not depend on the index's recall.

    Returns:
      Rows and similarities, most similar first.
    """
    rows, scores = streaming.find_similar(
        memory.image_embeddings, query[None], min_similarity
    )
    allowed = np.isin(rows, memory.allowed_ids())
    rows, scores = rows[allowed], scores[allowed]
    order = np.argsort(-scores, kind="stable")
    return rows[order], scores[order]
