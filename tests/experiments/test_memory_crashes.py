"""A memory's commands may be killed at any change of the file system."""

from __future__ import annotations

import pytest
from corpus_files import line, write_corpus
from memory_crashes import OPERATIONS, try_operations
from memory_fakes import FakeEmbedder, FakeTokenizer

from racm3_jax.memory.config import CorpusConfig


def try_every(tmp_path, every, operations=OPERATIONS):
    first = [[line(n, id=f"d{n}") for n in numbers] for numbers in ((0, 1), (2, 3))]
    sources = (
        write_corpus(tmp_path / "in", first),
        write_corpus(tmp_path / "more", [[line(4, id="d4")]]),
    )
    found = try_operations(
        tmp_path / "out",
        (FakeTokenizer(), FakeEmbedder()),
        sources,
        CorpusConfig("exact", num_query_variants=1),
        operations,
        every,
    )
    for name, outcome in found.items():
        assert (outcome.wrong, outcome.failed, outcome.leftovers) == ([], [], []), name
    return found


def test_a_sample_of_the_points(tmp_path):
    found = try_every(tmp_path, 40)
    assert all(outcome.died == outcome.points >= 9 for outcome in found.values())


@pytest.mark.slow
def test_every_point(tmp_path):
    found = try_every(tmp_path, 1)
    assert sum(outcome.died for outcome in found.values()) > 400
