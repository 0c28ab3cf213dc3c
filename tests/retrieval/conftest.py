"""Memories built by stand-ins for the models."""

from __future__ import annotations

import pytest
from retrieval_fakes import FakeEmbedder, FakeTokenizer, make_document

from racm3_jax.retrieval.memory import Memory
from racm3_jax.types import Document


@pytest.fixture
def documents() -> list[Document]:
    """40 documents of 10 nations."""
    return [make_document(i) for i in range(40)]


@pytest.fixture
def build(tmp_path):
    """Builds (and closes in the end) memories of documents in `tmp_path`."""
    opened = []

    def build_one(documents, name="memory", embedder=None, **settings) -> Memory:
        settings = {"index": "exact", "num_query_variants": 2, **settings}
        memory = Memory.build(
            documents,
            tokenizer=FakeTokenizer(),
            embedder=embedder or FakeEmbedder(),
            path=tmp_path / name,
            **settings,
        )
        opened.append(memory)
        return memory

    yield build_one
    for memory in opened:
        memory.close()
