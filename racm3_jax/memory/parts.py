"""Writes the records of one shard as a part of a memory, and reads parts as chunks.

A part depends only on (records, settings, models). It is written atomically, so an
interrupted build only makes the missing parts.

    part-00007/   documents.array_record, embeddings_*.npy, …, report.json
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from racm3_jax import storage
from racm3_jax.documents import store
from racm3_jax.documents.ahead import run_ahead
from racm3_jax.documents.readers import ReadReport, Record, Shard, read_shard_ahead
from racm3_jax.index.rows import Records, Rows
from racm3_jax.memory import chunks as chunks_lib
from racm3_jax.memory import filters, writer
from racm3_jax.memory import format as format_lib
from racm3_jax.memory.chunks import DocumentTokenizer, Embedder, MemoryChunk
from racm3_jax.progress import StageClock
from racm3_jax.types import Document

REPORT_FILE = "report.json"
# Limit of the pixels of a chunk's images, at the sizes of the models.
MAX_CHUNK_BYTES = 1 << 28
_COLUMNS = (
    *("embeddings_text", "embeddings_image", "embeddings_document"),
    *("queries_text", "queries_image"),
)
_HASHES = ("content_hashes", "image_hashes")


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedRecord:
    """A record at the sizes of the models, so that its full images are freed.

    Attributes:
      record: its images are as the tokenizer wants them.
      to_embed: its document, with images as the embedder wants them.
      content_hash: of text and pixels, and of embeddings of missing images or texts.
      image_hash: perceptual hash of the first image; 0 without an image.
      reason: why it is left out of the memory, if so.
    """

    record: Record
    to_embed: Document
    content_hash: int = 0
    image_hash: int = 0
    reason: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the images."""
        documents = (self.record.document, self.to_embed)
        return sum(image.nbytes for d in documents for image in d.images)


@dataclasses.dataclass(frozen=True)
class ChunkBuilder:
    """Turns records into chunks.

    Attributes:
      tokenizer: of the documents.
      embedder: of texts and images; a name if the source has embeddings.
      num_query_variants: queries with dropout per document.
      query_drop: fraction of a query that is dropped.
      seed: of the dropout.
      opt_out: documents that must not be used.
      held_out: evaluation documents.
      limits: of NSFW and watermark scores.
      chunk_size: documents at a time.
      clock: counts the stages of everything that is built with it.
    """

    tokenizer: DocumentTokenizer
    embedder: Embedder | str
    num_query_variants: int = 4
    query_drop: float = 0.2
    seed: int = 0
    opt_out: filters.OptOut | None = None
    held_out: filters.HeldOut | None = None
    limits: filters.ScoreLimits = dataclasses.field(default_factory=filters.ScoreLimits)
    chunk_size: int = chunks_lib.CHUNK_SIZE
    clock: StageClock = dataclasses.field(default_factory=StageClock, compare=False)

    def prepare(self, record: Record) -> PreparedRecord:
        """What needs the images at their full size; may be called in several threads."""
        document, to_embed = record.document, record.document
        if self.opt_out is not None and self.opt_out.matches(
            document.id, document.source, document.metadata
        ):
            return PreparedRecord(record, to_embed, reason="opted out")
        if self.held_out is not None and self.held_out.matches(document):
            return PreparedRecord(record, to_embed, reason="evaluation document")
        if not isinstance(self.embedder, str):
            to_embed = chunks_lib.fit_document(document, self.embedder)
        fitted = chunks_lib.fit_document(document, self.tokenizer)
        return PreparedRecord(
            dataclasses.replace(record, document=fitted),
            to_embed,
            _hash_record(record),
            _first_image_hash(document),
        )

    def chunks(
        self,
        records: Iterable[PreparedRecord],
        number: int,
        filtered: dict[str, int],
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[MemoryChunk]:
        """The chunks of a part.

        Args:
          records: of `prepare`, e.g. of a shard.
          number: of the part; seeds the dropout.
          filtered: counts skipped documents, by reason.
          progress: called with the number of documents of each chunk.
        """
        first = 0
        batches = run_ahead(_batches(_kept(records, filtered), self.chunk_size))
        for batch in self.clock.measure_each("reading", batches):
            rngs = [
                np.random.default_rng([self.seed, number, first, v])
                for v in range(self.num_query_variants)
            ]
            first += len(batch)
            chunk = self._chunk(batch, rngs)
            passed = self._passed(batch, chunk, filtered)
            if progress is not None:
                progress(len(batch))
            if passed.any():
                yield select_rows(chunk, passed)

    def _chunk(
        self, batch: list[PreparedRecord], rngs: Sequence[np.random.Generator]
    ) -> MemoryChunk:
        records = [prepared.record for prepared in batch]
        if isinstance(self.embedder, str):
            _check_widths(records)
            chunk = _ready_chunk(records, self.tokenizer, len(rngs))
        else:
            _check_unembedded(records, self.embedder.d_embed)
            chunk = chunks_lib.make_chunk(
                [record.document for record in records],
                [prepared.to_embed for prepared in batch],
                self.tokenizer,
                self.embedder,
                self.query_drop,
                rngs,
                self.clock,
            )
        return chunk._replace(
            content_hashes=np.asarray([p.content_hash for p in batch], np.uint64),
            image_hashes=np.asarray([p.image_hash for p in batch], np.uint64),
        )

    def _passed(
        self, batch: list[PreparedRecord], chunk: MemoryChunk, filtered: dict[str, int]
    ) -> Bool[np.ndarray, " n"]:
        embed, images = None, chunk.image
        if not isinstance(self.embedder, str):
            embed = functools.partial(_embed_aligned, self.embedder)
            images = self.embedder.align(images)
        documents = [prepared.record.document for prepared in batch]
        names = self.limits.rejected(documents, images, embed)
        for name in names:
            if name is not None:
                filtered[name] = filtered.get(name, 0) + 1
        return np.asarray([name is None for name in names], bool)


def _embed_aligned(embedder: Embedder, texts: list[str]) -> np.ndarray:
    return embedder.align(embedder.embed_texts(texts, 0.0, None))


def _given_rows(batch: Iterable[Record]) -> Iterator[tuple[Document, np.ndarray]]:
    for record in batch:
        for row in (record.text_embedding, record.image_embedding):
            if row is not None:
                yield record.document, row


def _check_unembedded(batch: Iterable[Record], d_embed: int) -> None:
    """Refuses to silently replace the source's embeddings.

    Raises:
      ValueError: says both widths.
    """
    for document, row in _given_rows(batch):
        raise ValueError(
            f"the source has embeddings of width {len(row)} (of {document.id!r}), but "
            f"the embedder's width is {d_embed}: give --embedder=name:ENCODER (the "
            "name of the encoder that computed them) to keep them"
        )


def _check_widths(batch: Iterable[Record]) -> None:
    width = None
    for document, row in _given_rows(batch):
        width = width or len(row)
        if len(row) != width:
            raise ValueError(
                f"the embedding of {document.id!r} has width {len(row)}, and those "
                f"before it {width}: all embeddings of a memory must be of one encoder"
            )


def _hash_record(record: Record) -> int:
    """Hash of text and pixels, and of embeddings of missing images or texts."""
    known = (record.text_embedding, record.image_embedding)
    given = [row for row in known if row is not None]
    content = filters.hash_content(record.document)
    return filters.hash_rows(content, given) if given else content


def _first_image_hash(document: Document) -> int:
    images = document.images
    return filters.hash_image(images[0]) if images else 0


def _kept(
    records: Iterable[PreparedRecord], filtered: dict[str, int]
) -> Iterator[PreparedRecord]:
    for record in records:
        if record.reason is None:
            yield record
        else:
            filtered[record.reason] = filtered.get(record.reason, 0) + 1


def _batches(
    records: Iterator[PreparedRecord], size: int
) -> Iterator[list[PreparedRecord]]:
    """Batches of at most `size` records and about `MAX_CHUNK_BYTES` of pixels."""
    batch: list[PreparedRecord] = []
    num_bytes = 0
    for record in records:
        batch.append(record)
        num_bytes += record.num_bytes
        if len(batch) == size or num_bytes >= MAX_CHUNK_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _ready_chunk(
    batch: list[Record], tokenizer: DocumentTokenizer, num_variants: int
) -> MemoryChunk:
    """A chunk of the source's own embeddings: their queries are without dropout."""
    rows = [
        r for record in batch for r in (record.text_embedding, record.image_embedding)
    ]
    given = [row for row in rows if row is not None]
    if not given:
        raise ValueError(
            "the source has no embeddings and no embedder was given: give one"
        )
    zero = np.zeros_like(given[0])
    parts = [zero if row is None else row for row in rows]
    text, image = np.stack(parts[::2]), np.stack(parts[1::2])
    document = text + image
    document /= np.linalg.norm(document, axis=1, keepdims=True)
    return MemoryChunk(
        chunks_lib.tokenize([r.document for r in batch], tokenizer),
        *(text, image, document),
        *(np.repeat(p[:, None], num_variants, axis=1) for p in (text, image)),
    )


def select_rows(chunk: MemoryChunk, kept: Bool[np.ndarray, " n"]) -> MemoryChunk:
    """The documents of a chunk where `kept` is True."""
    documents = [d for d, k in zip(chunk.documents, kept, strict=True) if k]
    arrays = [None if a is None else a[kept] for a in chunk[1:]]
    return MemoryChunk(documents, *arrays)  # type: ignore[arg-type]


def write_records_part(
    path: pathlib.Path,
    records: Iterable[PreparedRecord],
    name: str,
    number: int,
    chunk_builder: ChunkBuilder,
    report: ReadReport,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a part of records at `path` atomically.

    Args:
      path: of the part.
      records: its content, of `chunk_builder.prepare`.
      name: of the shard, or a digest of the documents.
      number: seeds the dropout.
      chunk_builder: the models and filters.
      report: of the reader; complete after the last record.
      progress: called with the number of documents of each chunk.
    """
    filtered: dict[str, int] = {}
    measured = chunk_builder.clock.measure("writing")
    with storage.new_directory(path) as directory, measured:
        chunks = chunk_builder.chunks(records, number, filtered, progress)
        part = writer.write_part(directory, chunks, index=None)
        content = {
            "shard": name,
            "num_documents": 0 if part is None else part.num_documents,
            "read": report.as_dict(),
            "filtered": dict(sorted(filtered.items())),
        }
        storage.write_file(directory / REPORT_FILE, storage.encode_sealed(content))


def write_shard_part(
    path: pathlib.Path,
    shard: Shard,
    number: int,
    chunk_builder: ChunkBuilder,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes the part of one shard of a source at `path` atomically."""
    report = ReadReport(max_bad=1.0)
    records = read_shard_ahead(shard, report, chunk_builder.prepare)
    write_records_part(
        path, records, shard.name, number, chunk_builder, report, progress
    )


class UniqueIds:
    """Makes document ids unique, and counts the renamed ones.

    Different sources may have equal ids (`IMG_0001.jpg` of every camera), so an equal
    id is no reason to drop a document. The first one keeps it; others get the beginning
    of their content hash appended, which is the same in every build:

        IMG_0001.jpg  IMG_0001.jpg  ->  IMG_0001.jpg  IMG_0001.jpg#1f3a9c2e

    Args:
      taken: hashes of the ids of other documents.
    """

    def __init__(self, taken: Iterable[int] = ()) -> None:
        self.num_renamed = 0
        self._taken = set(taken)

    def rename(self, chunk: MemoryChunk) -> MemoryChunk:
        """The chunk with unique ids."""
        documents = list(chunk.documents)
        for i, document in enumerate(documents):
            content = (
                0 if chunk.content_hashes is None else int(chunk.content_hashes[i])
            )
            name, number = document.id, 1
            while (taken := format_lib.hash_name(name)) in self._taken:
                name = f"{document.id}#{content:016x}"[: len(document.id) + 9]
                name = name if number == 1 else f"{name}-{number}"
                number += 1
            self._taken.add(taken)
            if name != document.id:
                self.num_renamed += 1
                documents[i] = dataclasses.replace(document, id=name)
        return chunk._replace(documents=documents)


def read_report(path: pathlib.Path) -> dict[str, Any]:
    """The counts of `write_shard_part`.

    Raises:
      IntegrityError: the report is damaged.
    """
    file = path / REPORT_FILE
    return storage.decode_sealed(file.read_bytes(), str(file), f"remove {path}")


def open_rows(folders: Sequence[pathlib.Path], name: str) -> Rows:
    """One column of several parts."""
    return Rows([f for folder in folders for f in sorted(folder.glob(f"{name}-*.npy"))])


def read_chunks(
    folders: Sequence[pathlib.Path], kept: Bool[np.ndarray, " n"]
) -> Iterator[MemoryChunk]:
    """The documents of parts where `kept` is True, in order, as chunks.

    Args:
      folders: each with at least one document.
      kept: over the rows of all of them.
    """
    has_hashes = all(any(f.glob("content_hashes-*.npy")) for f in folders)
    names = (*_COLUMNS, *_HASHES) if has_hashes else _COLUMNS
    first = 0
    for folder in folders:
        columns = [open_rows([folder], name) for name in names]
        own = kept[first : first + len(columns[0])]
        first += len(columns[0])
        yield from _read_folder(folder, columns, np.flatnonzero(own))


def _read_folder(
    folder: pathlib.Path, columns: Sequence[Rows], rows: Int[np.ndarray, " n"]
) -> Iterator[MemoryChunk]:
    records = Records([folder / format_lib.DOCUMENTS_FILE])
    try:
        for start in range(0, len(rows), chunks_lib.CHUNK_SIZE):
            block = rows[start : start + chunks_lib.CHUNK_SIZE]
            documents = [store.decode_tokenized(r) for r in records.read(block)]
            yield MemoryChunk(documents, *(c[block] for c in columns))
            for column in columns:
                column.release()
    finally:
        records.close()
