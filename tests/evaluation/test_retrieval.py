import numpy as np
import pytest
from evaluation_fakes import Embedder, make_memory, picture

from racm3_jax.evaluation.intervals import bootstrap
from racm3_jax.evaluation.retrieval import (
    RandomRetriever,
    ReducedMemory,
    chance_recall,
    document_recall,
    find_near_duplicates,
    pair_recall,
)
from racm3_jax.memory.memory import Memory
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    opened = make_memory(tmp_path_factory.mktemp("memory") / "memory")
    yield opened
    opened.close()


def test_pair_recall_counts_ranks_and_ties_against():
    candidates = np.eye(4, dtype=np.float32)
    queries = np.eye(4, dtype=np.float32)
    queries[3] = [0.9, 0.8, 0.7, 0.6]  # its own candidate is the 4th best
    found = pair_recall(queries, candidates, (1, 3, 4))
    assert [found[k].value for k in (1, 3, 4)] == [0.75, 0.75, 1.0]
    same = pair_recall(np.ones_like(queries), candidates, (1, 4))
    assert (same[1].value, same[4].value) == (0.0, 1.0)


def test_document_recall_needs_one_right_row():
    found = [[3, 1], [2, 5], []]
    assert document_recall(found, [[1], [7], [2]], 2).successes == 1
    assert document_recall(found, [[1], [7], [2]], 1).successes == 0


def test_chance_is_the_average_of_even_draws():
    # 1 right row of 4: two draws find it half the time; 2 of 4: 1 - 2/4 * 1/3
    assert chance_recall(4, [[0]], 2) == pytest.approx(0.5)
    assert chance_recall(4, [[0, 3]], 2) == pytest.approx(5 / 6)
    assert chance_recall(4, [[0], [0, 3]], 9) == 1.0


def test_near_duplicates_are_the_equal_images(memory):
    images = Embedder().embed_images([picture(i) for i in (2, 0, 77)])
    assert find_near_duplicates(memory, images).tolist() == [0, 2]


def test_removed_rows_never_come_back(memory):
    queries = np.asarray(memory.embeddings[:5])
    rows = np.array([0, 2, 4, 5, 6, 7, 8])
    reduced = ReducedMemory(memory, rows)
    found = reduced.search(queries, 6)
    assert not np.isin(found.ids, rows).any() and found.valid.all()
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert reduced.num_allowed == len(memory) - 7 == len(reduced) - 7
    full = memory.search(queries, len(memory))
    for mine, all_ids in zip(found.ids, full.ids, strict=True):
        assert mine.tolist() == [i for i in all_ids if i not in rows][:6]
    everything = reduced.search(queries, len(memory))
    assert everything.ids.shape == (5, len(memory))
    assert everything.valid.sum(1).tolist() == [len(memory) - 7] * 5
    assert (everything.ids[~everything.valid] == -1).all()


def test_the_retriever_never_sees_removed_rows(memory):
    queries = np.asarray(memory.embeddings[:5])
    rows = np.array([0, 2, 4, 5, 6, 7, 8])
    retriever = Retriever(
        ReducedMemory(memory, rows), StrategyConfig(max_similarity=2.0)
    )
    for result in retriever.retrieve(queries, np.full(5, 6), [None] * 5):
        assert len(result.ids) == 6 and not np.isin(result.ids, rows).any()
    # Whatever way there is to search a memory, this one has it too.
    ways = {name for name in vars(Memory) if name.startswith("search")}
    assert len(ways) > 1 and ways <= set(vars(ReducedMemory))


def test_random_documents_depend_only_on_the_query(memory):
    queries = np.asarray(memory.embeddings[:6])
    reduced = ReducedMemory(memory, np.arange(30))
    retriever = RandomRetriever(reduced, seed=3)
    together = retriever.retrieve(queries, np.full(6, 2), [None] * 6)
    alone = retriever.retrieve(queries[4:5], np.array([2]), [None])
    assert together[4].ids.tolist() == alone[0].ids.tolist()
    rows = np.array([r.ids for r in together])
    assert (rows >= 30).all() and len(np.unique(rows)) > 2
    assert [d.id for d in together[0].documents] == [f"m{i}" for i in rows[0]]
    other = RandomRetriever(reduced, seed=4).retrieve(
        queries, np.full(6, 2), [None] * 6
    )
    assert any(
        a.ids.tolist() != b.ids.tolist() for a, b in zip(together, other, strict=True)
    )


def test_bootstrap_intervals():
    values = np.arange(100.0)

    def mean(rows):
        return {"mean": values[rows].mean()}

    found = bootstrap(mean, 100, num_resamples=400)["mean"]
    assert found.value == 49.5 and found.interval is not None
    low, high = found.interval
    # 1.96 standard errors of 2.9
    assert low == pytest.approx(43.8, abs=1) and high == pytest.approx(55.2, abs=1)
    assert bootstrap(mean, 100, num_resamples=400)["mean"] == found
    assert bootstrap(mean, 100, num_resamples=0)["mean"].interval is None
    with pytest.raises(ValueError, match="no items"):
        bootstrap(mean, 0)
