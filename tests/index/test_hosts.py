"""Shards of several processes (here threads): searched by all at any time, merged exactly."""

from __future__ import annotations

import concurrent.futures
import threading
import types
from multiprocessing.connection import Client

import numpy as np
import pytest
from index_vectors import QUERIES, ROWS

from racm3_jax.index import contract, hosts, registry
from racm3_jax.index.hosts import HostsIndex
from racm3_jax.index.sharded import ShardedIndex

STARTS = [0, 90, 150, 260]


class Plain:
    """All products in NumPy, without compilation."""

    def __init__(self, rows):
        self._rows = rows

    def __len__(self):
        return len(self._rows)

    def search(self, queries, k):
        queries = contract.check_queries(queries, self._rows.shape[1], k)
        scores = np.einsum("qd,nd->qn", queries, self._rows)
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(scores, ids, axis=1)
        return contract.fill_slots(ids, scores, k, len(self))


def make_shards(numbers) -> ShardedIndex | None:
    ends = [*STARTS[1:], len(ROWS)]
    shards = [(STARTS[n], Plain(ROWS[STARTS[n] : ends[n]])) for n in numbers]
    return ShardedIndex(shards) if shards else None


@pytest.fixture
def addresses():
    """Addresses at which the processes listened."""
    return []


@pytest.fixture
def connected(monkeypatch, addresses):
    """Three processes of a job: two with two shards each, one with none."""
    number, barrier, held = threading.local(), threading.Barrier(3), [b""] * 3

    def gather(values):
        held[number.own] = values
        barrier.wait()
        found = np.stack(held)
        barrier.wait()
        return found

    monkeypatch.setattr(hosts, "_gather", gather)
    job = types.SimpleNamespace(
        process_index=lambda: number.own, process_count=lambda: 3
    )
    monkeypatch.setattr(hosts, "jax", job)
    monkeypatch.setattr(hosts, "_find_own_host", lambda: "127.0.0.1")

    def connect(own):
        number.own = own
        return HostsIndex.connect(make_shards([[0, 3], [], [1, 2]][own]), len(ROWS))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        indexes = list(pool.map(connect, range(3)))
    for row in held:
        host, _, port = row.tobytes().decode().strip().rpartition(":")
        addresses.append((host, int(port)))
    yield indexes
    for index in indexes:
        index.close()


def test_every_process_finds_what_one_index_finds(connected):
    """Processes do not wait for each other: each searches as often as it needs."""
    whole = make_shards(range(4))
    assert [len(index) for index in connected] == [300] * 3
    asked = [
        (n, slice(i % 5, 8 + i), 1 + i) for n in range(3) for i in range(3 + 2 * n)
    ]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(
            pool.map(lambda a: connected[a[0]].search(QUERIES[a[1]], a[2]), asked)
        )
    for (_, rows, k), part in zip(asked, found, strict=True):
        for expected, values in zip(whole.search(QUERIES[rows], k), part, strict=True):
            np.testing.assert_array_equal(expected, values)
    wide = connected[1].search(QUERIES[:2], 301)
    assert wide.valid.sum(axis=1).tolist() == [300, 300]


def test_an_error_of_another_process_is_raised_and_the_next_search_works(connected):
    with pytest.raises(ValueError, match=r"queries are float\[queries, 16\]"):
        connected[1].search(QUERIES[:, :3], 2)
    found = connected[1].search(QUERIES, 2)
    assert found.ids.tolist() == Plain(ROWS).search(QUERIES, 2).ids.tolist()


def test_a_process_that_has_ended_is_named(connected):
    connected[2].close()
    with pytest.raises(OSError, match="process 2, which has some index shards"):
        for _ in range(3):
            connected[0].search(QUERIES, 2)


def test_no_process_listens_once_all_are_connected(connected, addresses):
    """Until then the key of the job is required (`multiprocessing.connection`)."""
    assert len(addresses) == 3 and len({port for _, port in addresses}) == 3
    for address in addresses:
        with pytest.raises(ConnectionRefusedError):
            Client(address, "AF_INET", authkey=b"")


def test_shards_are_distributed_over_the_parts(tmp_path):
    kinds = [k for k in registry.list_kinds() if k.endswith(registry.SUFFIX)]
    kind = next((k for k in kinds if registry.is_installed(k)), None)
    if kind is None:
        pytest.skip("no back end that can be sharded is installed")
    places = [tmp_path / name for name in "abc"]
    registry.build_index(kind, ROWS[:100], places[0], 40)
    registry.build_index("exact", ROWS[100:200], places[1])
    registry.build_index(kind, ROWS[200:], places[2], 60)
    shared = [registry.assign_shards(places, n, 2) for n in (0, 1)]
    assert shared == [[[0, 2], [], [0]], [[1], None, [1]]]
    assert registry.assign_shards(places, 6, 7) == [[], [], []]
    counts = [100, 100, 100]
    found = [registry.open_parts(places, counts, ROWS, own) for own in shared]
    assert [len(index) for index in found] == [40 + 20 + 60, 40 + 100 + 40]
    assert registry.open_parts(places, counts, ROWS, [[], [], []]) is None
