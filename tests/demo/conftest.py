"""A session over a real memory of twelve documents."""

from __future__ import annotations

import pytest
from demo_fakes import FakeEmbedder, FakeGenerator, FakeTokenizer, make_documents

from racm3_jax.demo.session import Session
from racm3_jax.memory.memory import Memory
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig


@pytest.fixture
def session(tmp_path):
    with Memory.build(
        make_documents(),
        tokenizer=FakeTokenizer(),
        embedder=FakeEmbedder(),
        path=tmp_path / "memory",
        index="exact",
        num_query_variants=1,
    ) as memory:
        retriever = Retriever(memory, StrategyConfig(max_similarity=2.0))
        yield Session(FakeGenerator(retriever))  # pyright: ignore[reportArgumentType]
