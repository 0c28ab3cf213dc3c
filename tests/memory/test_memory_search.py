"""Memories: exact scores, and permanent removal."""

from __future__ import annotations

import errno
import os
import shutil
import threading

import numpy as np
import pytest

from racm3_jax import storage
from racm3_jax.memory.memory import Memory


def test_search_scores_are_exact_and_ordered(build, documents):
    results = []
    for index in ("exact", "scann"):
        memory = build(documents, index, index=index)
        queries = memory.queries(np.arange(40), "text", 1)
        found = memory.search(queries, 8)
        expected = np.einsum("qd,qkd->qk", queries, memory.embeddings[found.ids])
        np.testing.assert_array_equal(found.scores, expected)
        assert (np.diff(found.scores, axis=1) <= 0).all()
        alone = memory.search(queries[7:8], 8)
        np.testing.assert_array_equal(alone.scores[0], found.scores[7])
        results.append(found)
    for exact, scann in zip(*results, strict=True):
        np.testing.assert_array_equal(exact, scann)


@pytest.mark.parametrize("index", ["exact", "scann"])
def test_removed_documents_are_never_returned(build, documents, index):
    memory = build(documents, index=index)
    queries = memory.queries(np.arange(40), "text")
    before = memory.search(queries, 10)
    assert memory.remove([0, 5, 6]) == 3
    assert memory.remove([6, 7]) == 1
    assert memory.num_allowed == 36
    assert not np.isin([0, 5, 6, 7], memory.allowed_ids()).any()
    after = memory.search(queries, 6)
    assert after.valid.all()
    for old, new in zip(before.ids, after.ids, strict=True):
        kept = old[~np.isin(old, [0, 5, 6, 7])]
        np.testing.assert_array_equal(new, kept[:6])
    with Memory.load(memory.path) as reloaded:
        np.testing.assert_array_equal(reloaded.search(queries, 6).ids, after.ids)


def test_search_when_nearly_all_is_removed(build, documents):
    memory = build(documents)
    memory.remove(np.arange(37))
    found = memory.search(memory.queries(np.arange(3), "text"), 5)
    assert found.valid.sum(axis=1).tolist() == [3, 3, 3]
    assert {*found.ids[found.valid].tolist()} == {37, 38, 39}
    assert (found.ids[~found.valid] == -1).all()


def test_removal_reaches_other_readers(build, documents):
    memory = build(documents)
    query = memory.queries([4], "text")
    with Memory.load(memory.path) as other:
        assert other.search(query, 1).ids[0, 0] == 4
        memory.remove([4])
        assert other.search(query, 1).ids[0, 0] != 4


def test_simultaneous_removals_are_all_kept(build, documents):
    memory = build(documents)
    threads = [
        threading.Thread(target=memory.remove, args=([row],)) for row in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.num_allowed == 20


def test_removal_is_atomic(build, documents, monkeypatch):
    memory = build(documents)
    memory.remove([1])
    with pytest.raises(IndexError, match="row 40 does not exist"):
        memory.remove([2, 40])

    def fail(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        memory.remove([3])
    monkeypatch.undo()
    with Memory.load(memory.path) as reloaded:
        assert reloaded.num_allowed == 39
    assert not [n for n in os.listdir(memory.path) if n.endswith(".partial")]


def test_a_deny_list_of_another_memory_is_refused(build, documents):
    first, second = build(documents, "a"), build(documents[:9], "b")
    shutil.copy(second.path / "deny.json", first.path / "deny.json")
    with pytest.raises(storage.IntegrityError, match="belongs to another memory"):
        Memory.load(first.path)


def test_find(build, documents):
    memory = build(documents)
    found = memory.find(["doc-7", "no such", "doc-0", "doc-39"])
    assert found.tolist() == [7, -1, 0, 39]
    assert found.dtype == np.int64
