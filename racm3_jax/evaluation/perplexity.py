"""Language modelling: perplexity of each modality, bits per image, with retrieval or not.

A document is scored in the order it was written (nothing is masked), after the retrieved
documents, as the last of the sequence:

    <eod> retrieved <eod> text <break> image <eod>

Text perplexity counts text ids, image perplexity image ids; `<break>` and `<eod>` count
for neither. The query is a part of the document itself, as in training (RA-CM3, 3.2), so
figures with retrieval are those of a model that was shown neighbours of the answer; the
document itself and others of its source are never retrieved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int64

from racm3_jax.evaluation.retrieval import stack_rows
from racm3_jax.generation.likelihood import Scored, score_tokens
from racm3_jax.generation.tasks import Generator
from racm3_jax.sequences.layout import document_tokens, retrieved_prefix
from racm3_jax.types import Document, Modality, Retrieved, TokenizedDocument


class ModalitySums(NamedTuple):
    """Of each document: nats and numbers of its text ids and image ids, and its images."""

    text_nats: Float64[np.ndarray, " documents"]
    text_tokens: Int[np.ndarray, " documents"]
    image_nats: Float64[np.ndarray, " documents"]
    image_tokens: Int[np.ndarray, " documents"]
    images: Int[np.ndarray, " documents"]


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihoods:
    """Figures of a set of documents.

    Attributes:
      sums: of every document, for bootstrap and for adding shards.
      retrieved: rows of the memory that stood before each; -1 where fewer were found.
    """

    sums: ModalitySums
    retrieved: Int64[np.ndarray, "documents k"]

    @property
    def num_retrieved(self) -> float:
        """The mean number of documents that stood before one."""
        return float((self.retrieved >= 0).sum() / len(self.retrieved))

    def means(self, rows: Int[np.ndarray, " rows"] | None = None) -> dict[str, float]:
        """Figures by name, of all documents or of `rows`.

        A modality that no document has is left out.
        """
        if rows is None:
            rows = np.arange(len(self.sums.images))
        totals = ModalitySums(*(column[rows].sum() for column in self.sums))
        figures = {}
        if totals.text_tokens:
            nats = float(totals.text_nats / totals.text_tokens)
            figures["text_perplexity"] = math.exp(nats)
        if totals.image_tokens:
            nats = float(totals.image_nats / totals.image_tokens)
            figures["image_perplexity"] = math.exp(nats)
            bits = float(totals.image_nats) / math.log(2)
            figures["bits_per_image"] = bits / float(totals.images)
        return figures


class Prepared(NamedTuple):
    """Documents as a model scores them, with what was retrieved for each."""

    sequences: list[Scored]
    retrieved: Int64[np.ndarray, "documents k"]


def compute_likelihoods(
    generator: Generator,
    documents: Sequence[Document],
    *,
    num_retrieved: int = 2,
    query: Modality = "text",
    num_rows: int = 8,
) -> Likelihoods:
    """Scores documents, with `num_retrieved` documents before each (0: without).

    Args:
      generator: with a memory, unless `num_retrieved` is 0.
      documents: the test set.
      num_retrieved: at most this many; fewer where the strategy drops the others.
      query: the part of a document that looks for its neighbours.
      num_rows: see `score_tokens`.

    Raises:
      ValueError: no memory to retrieve from, a document without the query's part, or one
        that does not fit the model.
    """
    prepared = prepare_documents(
        generator, documents, num_retrieved=num_retrieved, query=query
    )
    return score_documents(generator, prepared, num_rows=num_rows)


def prepare_documents(
    generator: Generator,
    documents: Sequence[Document],
    *,
    num_retrieved: int = 2,
    query: Modality = "text",
) -> Prepared:
    """The first half of `compute_likelihoods`, which no weights of the model change."""
    tokenized = list(generator.tokenizer.tokenize(documents))
    vocab = generator.tokenizer.vocab
    given = _retrieve(generator, documents, tokenized, num_retrieved, query)
    sequences = [
        Scored(retrieved_prefix(found.documents, vocab), document_tokens(main, vocab))
        for found, main in zip(given, tokenized, strict=True)
    ]
    retrieved = [found.ids.tolist() for found in given]
    return Prepared(sequences, stack_rows(retrieved, num_retrieved))


def score_documents(
    generator: Generator, prepared: Prepared, *, num_rows: int = 8
) -> Likelihoods:
    """The second half of `compute_likelihoods`."""
    vocab = generator.tokenizer.vocab
    rows: list[tuple[Any, ...]] = []
    scores = score_tokens(generator, prepared.sequences, num_rows=num_rows)
    for sequence, nats in zip(prepared.sequences, scores, strict=True):
        text, image = vocab.is_text(sequence.targets), vocab.is_image(sequence.targets)
        rows.append(
            (
                nats[text].sum(),
                text.sum(),
                nats[image].sum(),
                image.sum(),
                image.sum() // vocab.image_length,
            )
        )
    columns = (np.array(column) for column in zip(*rows, strict=True))
    return Likelihoods(ModalitySums(*columns), prepared.retrieved)


def _retrieve(
    generator: Generator,
    documents: Sequence[Document],
    tokenized: Sequence[TokenizedDocument],
    num_retrieved: int,
    query: Modality,
) -> list[Retrieved]:
    if not num_retrieved:
        return [generator.pick([])] * len(documents)
    if generator.retriever is None or generator.embedder is None:
        raise ValueError(
            f"num_retrieved is {num_retrieved} but this generator has no memory: load it "
            "with one, or num_retrieved=0"
        )
    parts = generator.embedder.embed_documents(documents)
    queries, there = (
        (parts.text, parts.has_text)
        if query == "text"
        else (parts.image, parts.has_image)
    )
    if not there.all():
        missing = documents[int(np.flatnonzero(~there)[0])].id
        raise ValueError(
            f"document {missing!r} has no {query} to query with: choose the other query"
        )
    nums = np.full(len(documents), num_retrieved)
    return generator.retriever.retrieve(queries, nums, tokenized)
