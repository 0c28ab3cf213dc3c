"""The external memory: one portable directory of documents, embeddings and an index.

    memory/
      manifest.json                    counts, fingerprints, sha256 of every file below
      documents.array_record           tokenised documents with their metadata
      embeddings_document-00000.npy    f32[n, d]     normalised mean of the parts
      embeddings_text-00000.npy        f32[n, d]     zero where there is no text
      embeddings_image-00000.npy       f32[n, d]     zero where there is no image
      queries_text-00000.npy           f16[n, v, d]  parts under query dropout
      queries_image-00000.npy          f16[n, v, d]
      id_hashes-… source_hashes-… split_hashes-… modalities-…   one number a document
      index/                           see `index`
      deny.json                        rows that are never returned

Here a document's id is its row. `builder` makes the directory; `remove` changes
deny.json, `edit` adds documents (a folder added-00001/ with the same layout) and
compacts. It contains no pickles, and no other files are allowed (`format`).
"""

from __future__ import annotations

import functools
import os
import pathlib
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64, UInt64

from racm3_jax import checksums, storage
from racm3_jax.buckets import is_url
from racm3_jax.documents import store
from racm3_jax.index import contract, folder
from racm3_jax.index.contract import Index
from racm3_jax.index.rows import Records, Rows
from racm3_jax.index.table import TableIndex
from racm3_jax.memory import format as format_lib
from racm3_jax.memory import staging
from racm3_jax.memory.files import MemoryFiles
from racm3_jax.memory.format import MODALITY_BITS, Fingerprinted, hash_name
from racm3_jax.types import Document, Modality, Neighbours, TokenizedDocument
from racm3_jax.vocab import Vocab

# Files that a training rarely needs if a table answers its queries.
UNUSED_WITH_TABLE = frozenset(
    {"index", "embeddings_document", "embeddings_text", "embeddings_image"}
)
_WIDENING = 4
_USUAL_QUERIES = 128


class _Denied(NamedTuple):
    stamp: tuple[int, int, int]
    mask: Bool[np.ndarray, " rows"]
    num: int


class Memory:
    """An opened memory. Reading and searching are thread-safe.

    Made by `Memory.build` and `Memory.load`.

    Attributes:
      path: its directory.
      manifest: content of manifest.json.
      vocab: vocabulary of its documents.
      embeddings: f32[n, d], unit rows, memory-mapped: these are searched.
      text_embeddings: embeddings of the texts; zero rows without text.
      image_embeddings: embeddings of the images; zero rows without image.
      id_hashes: `hash_name` of every document's id.
      source_hashes: of its source, 0 if it has none.
      split_hashes: of the `split` in its metadata, 0 if it has none; None if unknown.
      content_hashes: equal for equal text and pixels; None if unknown.
      image_hashes: perceptual, of the first image, 0 without; None if unknown.
      is_multimodal: True if a document has both text and an image.
      index: proposes neighbours, which `search` scores again.
    """

    def __init__(
        self,
        path: pathlib.Path,
        manifest: dict[str, Any],
        later: Collection[str] = (),
    ):
        self.path = path
        self.manifest = manifest
        self._fingerprint = format_lib.fingerprint(manifest)
        self._files = MemoryFiles(path, manifest, later)
        self._table: TableIndex | None = None
        self.vocab = _read_vocab(path, manifest)
        column = self._files.column
        self.id_hashes: UInt64[np.ndarray, " n"] = np.asarray(column("id_hashes"))
        self.source_hashes: UInt64[np.ndarray, " n"] = np.asarray(
            column("source_hashes")
        )
        # Older memories lack these.
        self.split_hashes = self._hashes("split_hashes")
        self.content_hashes = self._hashes("content_hashes")
        self.image_hashes = self._hashes("image_hashes")
        self._modalities = np.asarray(column("modalities"))
        self.is_multimodal: Bool[np.ndarray, " n"] = self._modalities == sum(
            MODALITY_BITS.values()
        )
        self._records = Records(
            [f / format_lib.DOCUMENTS_FILE for f in self._files.folders]
        )
        self._lock = threading.Lock()
        self._denied: _Denied | None = None
        self._usual_scores: dict[Modality, float] = {}
        self._check_denied()

    @classmethod
    def build(
        cls,
        documents: Iterable[Document] | str,
        *,
        tokenizer: Any,
        embedder: Any,
        path: str | os.PathLike[str],
        overwrite: bool = False,
        progress: Callable[[int], None] | None = None,
        **settings: Any,
    ) -> Memory:
        """Tokenises, embeds and indexes documents into a directory, and opens it.

        The same as `racm3 memory build`: equal documents are kept once, skipped ones
          are
        counted in `manifest["report"]`, and an interrupted build resumes when it is
        called again.

        Args:
          documents: any iterable, or a source ("folder:photos").
          tokenizer: a `MixedTokenizer`.
          embedder: a `DocumentEmbedder`.
          path: the directory to create.
          overwrite: replace an existing memory at `path`.
          progress: called with the number of documents so far.
          **settings: of `CorpusConfig`: index, num_query_variants, query_drop, seed,
            deduplicate, …

        Raises:
          FileExistsError: `path` exists and may not be replaced.
          ValueError: no documents, or embeddings that are not unit rows.
        """
        from racm3_jax.memory import builder
        from racm3_jax.memory.config import CorpusConfig

        builder.build_memory(
            documents,
            tokenizer=tokenizer,
            embedder=embedder,
            path=path,
            config=CorpusConfig(**settings),
            overwrite=overwrite,
            progress=None if progress is None else lambda done, *_: progress(done),
        )
        return cls.load(path, embedder=embedder, tokenizer=tokenizer)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        embedder: Fingerprinted | str | None = None,
        tokenizer: Fingerprinted | str | None = None,
        cache: str | os.PathLike[str] | None = None,
        *,
        describe: storage.Describe = checksums.recall,
        later: Collection[str] = (),
    ) -> Memory:
        """Opens a memory after verifying the sha256 of all its files.

        Unchanged files that were read on this machine before are not read again: see
        `checksums` for the guarantees.

        Args:
          path: its directory, or a URL in a bucket, which is copied here first.
          embedder: the embedder of the queries, or its fingerprint; checked against the
            memory's. None skips the check.
          tokenizer: the tokenizer of the documents, or its fingerprint.
          cache: where memories at URLs are copied to, see `staging`.
          describe: how files are read for it; `storage.describe_files` reads all.
          later: kinds of files ("index", "embeddings_text", …; see `format.kind_of`)
            that are verified and opened on first use; only their sizes are checked now.

        Raises:
          FileNotFoundError: there is no memory at `path`.
          ValueError: its format version, encoder or tokenizer is another one.
          IntegrityError: a file is missing or damaged; names it.
        """
        path = staging.stage(path, cache) if is_url(path) else pathlib.Path(path)
        manifest = format_lib.read_manifest(path)
        format_lib.check_fingerprints(path, manifest, embedder, tokenizer)
        format_lib.check_files(path)
        storage.verify_files(
            path,
            manifest["files"],
            format_lib.rebuild_remedy(path),
            lambda directory, names: describe(
                directory, [n for n in names if format_lib.kind_of(n) not in later]
            ),
        )
        return cls(path, manifest, later)

    def check(
        self,
        embedder: Fingerprinted | str | None = None,
        tokenizer: Fingerprinted | str | None = None,
    ) -> None:
        """Refuses other models than the memory was built with.

        Raises:
          ValueError: names both fingerprints.
        """
        format_lib.check_fingerprints(self.path, self.manifest, embedder, tokenizer)

    def close(self) -> None:
        """Closes the record file; the memory cannot be read afterwards."""
        self._records.close()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.manifest["num_documents"]

    def __repr__(self) -> str:
        return (
            f"Memory({str(self.path)!r}: {len(self)} documents, "
            f"{self.num_allowed} allowed, {self.manifest['index']} index)"
        )

    @property
    def d_embed(self) -> int:
        return self.manifest["d_embed"]

    @property
    def embeddings(self) -> Rows:
        return self._files.column("embeddings_document")

    @property
    def text_embeddings(self) -> Rows:
        return self._files.column("embeddings_text")

    @property
    def image_embeddings(self) -> Rows:
        return self._files.column("embeddings_image")

    @property
    def index(self) -> Index:
        return self._files.open_index() if self._table is None else self._table

    @property
    def num_query_variants(self) -> int:
        """Number of queries with dropout per document; variant 0 is without dropout."""
        return self.manifest["num_query_variants"]

    @property
    def num_allowed(self) -> int:
        """Documents that are not denied."""
        return len(self) - self._check_denied().num

    def fingerprint(self) -> str:
        """Equal for equal content, whatever the deny list."""
        return self._fingerprint

    def documents(self, ids: Int[np.ndarray, " n"]) -> list[TokenizedDocument]:
        """The documents of these rows, in order, denied or not.

        Raises:
          IndexError: a row does not exist.
        """
        rows = self._check_ids(ids)
        return [store.decode_tokenized(r) for r in self._records.read(rows)]

    def metadata(self, ids: Int[np.ndarray, " n"]) -> list[Mapping[str, Any]]:
        """The metadata of the documents of these rows."""
        return [document.metadata for document in self.documents(ids)]

    def find(self, document_ids: Sequence[str]) -> Int64[np.ndarray, " n"]:
        """The rows of documents with these ids; -1 if there is none."""
        hashes = np.asarray([hash_name(name) for name in document_ids], np.uint64)
        places = np.searchsorted(self.id_hashes, hashes, sorter=self._id_order)
        rows = self._id_order[np.minimum(places, len(self) - 1)]
        return np.where(self.id_hashes[rows] == hashes, rows, -1).astype(np.int64)

    @functools.cached_property
    def _id_order(self) -> Int64[np.ndarray, " n"]:
        return np.argsort(self.id_hashes)

    def use_table(
        self,
        path: str | os.PathLike[str],
        *,
        fallback: bool = True,
        describe: storage.Describe = checksums.recall,
    ) -> None:
        """Answers known queries from precomputed neighbours.

        Args:
          path: of a table from `racm3 memory neighbours`.
          fallback: use the index for other queries, or for more neighbours than the
            table has; it is opened then. False makes such queries an error.
          describe: see `load`.

        Raises:
          FileNotFoundError: there is no table.
          ValueError: it was computed from another memory.
        """
        path = pathlib.Path(path)
        folder.verify(path, folder.read_description(path), describe)
        live = _OwnIndex(self) if fallback else None
        table = TableIndex.load(path, verify=False, fallback=live)
        if table.settings.get("memory") != self.fingerprint():
            raise ValueError(
                f"the table at {path} was computed from another memory, or before this "
                "one changed: compute it again (racm3 memory neighbours)"
            )
        self._table = table

    def check_variant(self, variant: int) -> None:
        """Checks that there are queries of a variant; 0 is without query dropout.

        Raises:
          ValueError: there are none.
        """
        if not 0 <= variant <= self.num_query_variants:
            raise ValueError(
                f"query variant {variant} does not exist: the memory at {self.path} "
                f"holds 0..{self.num_query_variants}; build it for a training "
                "(racm3 memory build --for=training), or set "
                f"config.memory.num_query_variants={self.num_query_variants}"
            )

    def queries(
        self, ids: Int[np.ndarray, " n"], modality: Modality, variant: int = 0
    ) -> Float32[np.ndarray, "n d_embed"]:
        """Text or image embeddings of documents as unit query rows.

        Args:
          ids: rows.
          modality: which one; a document without it is queried by the other one.
          variant: 0 is without query dropout, 1..num_query_variants are with it.

        Raises:
          IndexError: a row does not exist.
          ValueError: the modality or the variant does not exist.
        """
        if modality not in MODALITY_BITS:
            raise ValueError(f'modality must be "text" or "image"; got {modality!r}')
        self.check_variant(variant)
        rows = self._check_ids(ids)
        queries = np.asarray(self.part(rows, modality, variant), np.float32)
        # A precomputed embedding may represent an image that is not available, so the
        # rows themselves tell by what a document can be queried.
        absent = ~queries.any(axis=1)
        other: Modality = "image" if modality == "text" else "text"
        queries[absent] = self.part(rows[absent], other, variant)
        return queries / np.linalg.norm(queries, axis=1, keepdims=True)

    def search(
        self, queries: Float[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        """The `k` allowed documents nearest to each query, best first.

        The index proposes candidates; scores are the exact inner products with the
        stored embeddings, ordered by (-score, id). Denied rows are never returned: if
        they take slots, the index is searched for more.

        Raises:
          ValueError: queries that are not finite, another width, or k < 1.
        """
        queries = contract.check_queries(queries, self.d_embed, k)
        result = contract.empty_neighbours(len(queries), k)

        def take(asking: Int64[np.ndarray, " asking"], found: Neighbours) -> np.ndarray:
            num = min(k, found.ids.shape[1])
            for column, part in zip(result, found, strict=True):
                column[asking, :num] = part[:, :num]
            return found.valid.sum(axis=1) >= k

        denied = self._check_denied().num
        self.search_until(queries, take, k + min(k, denied), len(self))
        return result

    def usual_score(self, modality: Modality) -> float:
        """The score that nearly every document's nearest neighbour reaches.

        The 1st percentile of the best scores of queries with the documents' own text or
        image embeddings (a fixed sample): a prompt that scores far below asks for
        something that is not in the memory. NaN if the memory is too small. Computed
        once.
        """
        if modality not in self._usual_scores:
            self._usual_scores[modality] = self._compute_usual_score(modality)
        return self._usual_scores[modality]

    def _compute_usual_score(self, modality: Modality) -> float:
        rows = self.allowed_ids()
        rows = rows[self.part(rows, modality).any(axis=1)]
        if len(rows) < _USUAL_QUERIES // 4:
            return float("nan")
        rng = np.random.default_rng(0)
        count = min(_USUAL_QUERIES, len(rows))
        rows = np.sort(rng.choice(rows, count, replace=False))
        found = self.search(self.queries(rows, modality), 4)
        is_other = found.valid & (found.ids != rows[:, None])
        best = np.where(is_other, found.scores, -np.inf).max(axis=1)
        return float(np.percentile(best[np.isfinite(best)], 1))

    def search_until(
        self,
        queries: Float32[np.ndarray, "queries d_embed"],
        take: Callable[[Int64[np.ndarray, " asking"], Neighbours], np.ndarray],
        width: int,
        max_width: int,
    ) -> None:
        """Searches more and more neighbours until every query has enough.

        ```
        width        queries 0 1 2 ask for 8 candidates    take -> [True False False]
        4 * width    queries 1 2 ask for 32                take -> [True False]
        …            query 2 asks for max_width            the end
        ```

        A caller that drops candidates (the deny list here, the retriever's strategy)
        inspects the results and says whether they are enough.

        Args:
          queries: finite rows.
          take: gets the numbers of the unfinished queries, and their allowed neighbours
            with exact scores, best first; slots of denied rows are not valid. Returns
            bool[asking]: True for queries that are finished.
          width: number of candidates at first.
          max_width: maximum number of candidates.
        """
        max_width = min(max_width, len(self))
        width = min(width, max_width)
        has_scores = self._table is not None and self._table.has_exact_scores
        embeddings = None if has_scores else self.embeddings
        asking = np.arange(len(queries))
        while len(asking):
            found = self.index.search(queries[asking], width)
            kept = contract.score_rows(
                queries[asking], found, embeddings, self._check_denied().mask
            )
            done = np.asarray(take(asking, kept), bool)
            # An index that left slots unfilled has no more results.
            done |= ~found.valid.all(axis=1)
            if width >= max_width:
                return
            asking = asking[~done]
            width = min(max_width, _WIDENING * width)

    def remove(self, ids: Int[np.ndarray, " n"] | Sequence[int]) -> int:
        """Denies rows permanently, from the next search on.

        The list is replaced atomically on disk, so it survives a crash and reaches
        other processes that have this memory open.

        Returns:
          The number of newly denied rows.

        Raises:
          IndexError: a row does not exist; nothing is removed then.
          ValueError: this is a copy of a memory in a bucket.
        """
        rows = self._check_ids(np.asarray(ids, np.int64))
        staging.refuse_staged(self.path)
        with format_lib.locked(self.path):
            # Of the memory on disk: others may have added documents.
            manifest = format_lib.read_manifest(self.path)
            if format_lib.lineage(manifest) != format_lib.lineage(self.manifest):
                raise ValueError(
                    f"the memory at {self.path} was compacted or replaced since it was "
                    "opened, which renumbers its rows: open it again"
                )
            format_lib.delete_untracked(self.path, manifest)
            num_removed = format_lib.deny(self.path, manifest, rows)
        self._check_denied()
        return num_removed

    def allowed_ids(self) -> Int64[np.ndarray, " allowed"]:
        """The rows that are not denied, ascending."""
        return np.flatnonzero(~self._check_denied().mask).astype(np.int64)

    def share_index(self) -> None:
        """Collective: see `MemoryFiles.share_index`."""
        self._files.share_index()

    def _hashes(self, name: str) -> UInt64[np.ndarray, " n"] | None:
        has_all = self._files.has_column(name)
        return np.asarray(self._files.column(name)) if has_all else None

    def part(
        self, rows: Int64[np.ndarray, " n"], modality: Modality, variant: int = 0
    ) -> Float[np.ndarray, "n d_embed"]:
        """The text or image embeddings of these rows; zero if a document has none."""
        if variant:
            return self._files.column(f"queries_{modality}")[rows][:, variant - 1]
        return self._files.column(f"embeddings_{modality}")[rows]

    def _check_ids(self, ids: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        rows = np.asarray(ids, np.int64).reshape(-1)
        wrong = rows[(rows < 0) | (rows >= len(self))]
        if len(wrong):
            raise IndexError(
                f"row {wrong[0]} does not exist: the memory at {self.path} has rows "
                f"0..{len(self) - 1}"
            )
        return rows

    def _check_denied(self) -> _Denied:
        """The deny list; read again after another process replaced the file."""
        file = format_lib.deny_path(self.path, self.manifest)
        try:
            status = os.stat(file)
        except FileNotFoundError:
            format_lib.read_denied(self.path, self.manifest)
            raise
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        denied = self._denied
        if denied is None or denied.stamp != stamp:
            with self._lock:
                rows = format_lib.read_denied(self.path, self.manifest)
                mask = np.zeros(len(self), bool)
                mask[rows] = True
                denied = self._denied = _Denied(stamp, mask, len(rows))
        return denied


class _OwnIndex:
    """A table's fallback: the memory's index, with exact scores."""

    def __init__(self, memory: Memory):
        self._memory = memory
        self._none_denied = np.zeros(len(memory), bool)

    def __len__(self) -> int:
        return len(self._memory)

    def search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        """See `Index.search`."""
        found = self._memory._files.open_index().search(queries, k)
        return contract.score_rows(
            queries, found, self._memory.embeddings, self._none_denied
        )


def _read_vocab(path: pathlib.Path, manifest: Mapping[str, Any]) -> Vocab:
    try:
        return Vocab(**manifest["vocab"])
    except (TypeError, ValueError) as error:
        raise storage.IntegrityError(
            f"the vocabulary in {path / format_lib.MANIFEST_FILE} is wrong ({error}); "
            f"{format_lib.rebuild_remedy(path)}"
        ) from error
