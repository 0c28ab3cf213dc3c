"""The retriever: index search, strategy and reading, in batches."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
from memory_fakes import FakeEmbedder, FakeTokenizer, make_document

from racm3_jax.retrieval.retriever import OwnExcluded, Retriever, as_main
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.types import GenerationOutput, Retrieved


def _mains(documents):
    return list(FakeTokenizer().tokenize(documents))


@pytest.fixture(params=["exact", "scann"])
def memory(request, build, documents):
    return build(documents, index=request.param)


def test_returns_other_documents_of_the_nation(memory, documents):
    ids = np.arange(40)
    nums = np.full(40, 2)
    results = Retriever(memory).retrieve(
        memory.queries(ids, "text", 1), nums, _mains(documents)
    )
    for row, result in zip(ids, results, strict=True):
        assert len(result.ids) == 2
        assert row not in result.ids
        assert [d.metadata["nation"] for d in result.documents] == [row // 4] * 2
        assert [d.id for d in result.documents] == [f"doc-{i}" for i in result.ids]
        assert (np.diff(result.scores) <= 0).all()


def test_a_batch_equals_one_at_a_time(memory, documents):
    retriever = Retriever(memory)
    queries = memory.queries(np.arange(12), "image", 2)
    nums = np.arange(12) % 4
    mains = _mains(documents[:12])
    batch = retriever.retrieve(queries, nums, mains)
    for i, expected in enumerate(batch):
        (alone,) = retriever.retrieve(queries[i : i + 1], nums[i : i + 1], [mains[i]])
        np.testing.assert_array_equal(alone.ids, expected.ids)
        np.testing.assert_array_equal(alone.scores, expected.scores)
        assert len(expected.ids) == nums[i]


def test_no_queries_and_no_documents(memory, documents):
    retriever = Retriever(memory)
    queries = memory.queries([0, 1], "text")
    results = retriever.retrieve(queries, np.zeros(2, int), _mains(documents[:2]))
    assert results == [Retrieved(r.ids, r.scores, ()) for r in results]
    assert all(len(r.ids) == 0 for r in results)
    assert retriever.retrieve(queries[:0], np.zeros(0, int), []) == []


def test_a_user_s_query_has_no_main_document(memory):
    query = FakeEmbedder().embed_texts(["nation3 on scene1"])
    config = StrategyConfig(max_similarity=2)
    (result,) = Retriever(memory, config).retrieve(query, [1], [None])
    assert result.documents[0].id == "doc-13"
    assert result.scores[0] == pytest.approx(
        float(query[0] @ memory.embeddings[13]), abs=1e-6
    )


def test_k_larger_than_the_memory(memory):
    query = memory.queries([0], "text")
    with pytest.raises(
        ValueError, match=r"cannot retrieve 41 documents: .* has 40, .*in 0\.\.40"
    ):
        Retriever(memory).retrieve(query, [41], [None])
    with pytest.raises(ValueError, match="cannot retrieve -1 documents"):
        Retriever(memory).retrieve(query, [-1], [None])
    with pytest.raises(ValueError, match="got 1, 2 and 1 of them"):
        Retriever(memory).retrieve(query, [1, 1], [None])


def test_removed_documents_are_not_retrieved(memory, documents):
    retriever = Retriever(memory)
    query, main = memory.queries([0], "text"), _mains(documents[:1])
    (before,) = retriever.retrieve(query, [2], main)
    memory.remove(before.ids)
    (after,) = retriever.retrieve(query, [2], main)
    assert not set(before.ids) & set(after.ids)
    assert len(after.ids) == 2


def test_same_source_and_one_modality_are_dropped(build, documents):
    changed = [
        *documents,
        make_document(40, id="a", source="album"),
        make_document(41, id="b", source="album"),
        make_document(42, id="c", segments=make_document(42).segments[:1]),
        make_document(43, id="d", source="other album"),
    ]
    memory = build(changed)
    query, main = memory.queries([40], "text"), _mains([changed[40]])

    def found(**settings):
        retriever = Retriever(memory, StrategyConfig(**settings))
        (result,) = retriever.retrieve(query, [3], main)
        return [d.id for d in result.documents if d.metadata["nation"] == 10]

    assert found() == ["d"]
    assert set(found(drop_same_source=False)) == {"b", "d"}
    assert set(found(drop_same_source=False, require_multimodal=False)) == {
        *("b", "c", "d")
    }


def test_documents_equal_in_all_keys_are_dropped(build, documents):
    def icon(i, name, **facts):
        document = make_document(i, id=name)
        return dataclasses.replace(document, metadata={"nation": 10, **facts})

    changed = [
        *documents,
        icon(40, "own", thing="owl", house="noto"),
        icon(41, "twin set", thing="owl", house="noto"),
        icon(42, "other house", thing="owl", house="fluent"),
        icon(43, "no house", thing="owl"),
    ]
    memory = build(changed)

    def found(row, keys):
        retriever = Retriever(memory, StrategyConfig(exclude_keys=keys))
        query = memory.queries([row], "text")
        for _ in range(2):  # names that were read before give the same
            (result,) = retriever.retrieve(query, [4], _mains([changed[row]]))
        return {d.id for d in result.documents if d.metadata["nation"] == 10}

    assert found(40, "") == {"twin set", "other house", "no house"}
    assert found(40, "thing, house") == {"other house", "no house"}
    assert found(40, "thing") == set()
    assert found(43, "thing,house") == {"own", "twin set", "other house"}
    with pytest.raises(ValueError, match="names 'hose', which .*have: .*house, "):
        Retriever(memory, StrategyConfig(exclude_keys="thing,hose"))


def test_training_never_shows_held_out_documents(build, documents):
    def of(i, name, **facts):
        document = make_document(i, id=name)
        return dataclasses.replace(document, metadata={"nation": 10, **facts})

    changed = [
        *documents,
        of(40, "trained", split="train"),
        of(41, "no split"),
        of(42, "held out", split="heldout"),
        of(43, "also held out", split="heldout"),
    ]
    memory = build(changed)
    retriever = Retriever(memory, StrategyConfig(max_similarity=1.0))

    def found(row, retriever=retriever):
        query = memory.queries([row], "text")
        (result,) = retriever.retrieve(query, [12], _mains([changed[row]]))
        return {d.id for d in result.documents if d.metadata["nation"] == 10}

    assert found(40) == {"no split"}
    everything = {d.id for d in changed[40:]}
    assert found(42) == everything - {"held out"}
    assert found(41) == everything - {"no split"}

    # An evaluation names the documents of its queries.
    excluding = OwnExcluded(retriever, [as_main(changed[42])])
    (result,) = excluding.retrieve(memory.queries([42], "text"), [12], [None])
    assert "held out" not in [d.id for d in result.documents]
    with pytest.raises(ValueError, match="1 queries were announced; got 2"):
        excluding.retrieve(memory.queries([42, 43], "text"), [12, 12], [None, None])


def test_searches_further_when_copies_fill_the_list(build, documents):
    copies = [make_document(4, id=f"copy-{i}") for i in range(50)]
    memory = build([*documents, *copies], deduplicate="none")
    query, main = memory.queries([4], "text"), _mains([documents[4]])

    def found(max_candidates):
        config = StrategyConfig(num_candidates=8, max_candidates=max_candidates)
        return Retriever(memory, config).retrieve(query, [2], main)[0]

    assert len(found(8).ids) == 0
    assert [d.metadata["nation"] for d in found(512).documents] == [1, 1]


def test_threads_retrieve_the_same(memory, documents):
    retriever = Retriever(memory)
    queries, mains = memory.queries(np.arange(40), "text"), _mains(documents)
    expected = [r.ids.tolist() for r in retriever.retrieve(queries, [2] * 40, mains)]
    found = []

    def work():
        for _ in range(5):
            results = retriever.retrieve(queries, [2] * 40, mains)
            found.append([r.ids.tolist() for r in results])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 20


def test_random_ranking_is_uniform_and_reproducible(memory, documents):
    config = StrategyConfig(ranking="random", max_similarity=2, num_candidates=4)
    retriever = Retriever(memory, config)
    ids = np.arange(40)
    queries, mains = memory.queries(ids, "text"), _mains(documents)
    first = retriever.retrieve(queries, np.full(40, 2), mains)
    again = retriever.retrieve(queries[::-1], np.full(40, 2), mains[::-1])[::-1]
    for row, result, other in zip(ids, first, again, strict=True):
        np.testing.assert_array_equal(result.ids, other.ids)
        assert len(set(result.ids.tolist())) == 2
        assert row not in result.ids
        np.testing.assert_allclose(
            result.scores, memory.embeddings[result.ids] @ queries[row], atol=1e-6
        )
    # Of the 4 documents of its own nation, a query would find 80 by relevance.
    own = sum((r.ids // 4 == row // 4).sum() for row, r in zip(ids, first, strict=True))
    assert own < 20
    assert len({int(i) for r in first for i in r.ids}) > 25


def test_random_ranking_never_samples_removed_documents(memory, documents):
    retriever = Retriever(memory, StrategyConfig(ranking="random", max_similarity=2))
    memory.remove(np.arange(3, 40))
    results = retriever.retrieve(
        memory.queries(np.arange(3), "text"), np.full(3, 3), _mains(documents[:3])
    )
    assert [sorted(r.ids.tolist()) for r in results] == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.parametrize("given", ["text", "image", "both"])
def test_the_model_is_given_the_chosen_parts(memory, documents, given):
    query, main = memory.queries([0], "text"), _mains(documents[:1])
    (whole,) = Retriever(memory).retrieve(query, [2], main)
    (result,) = Retriever(memory, StrategyConfig(given=given)).retrieve(
        query, [2], main
    )
    np.testing.assert_array_equal(result.ids, whole.ids)
    wanted = {"text", "image"} if given == "both" else {given}
    for document, full in zip(result.documents, whole.documents, strict=True):
        assert document.modalities == wanted
        assert document.id == full.id


def test_an_invalid_strategy():
    with pytest.raises(
        ValueError, match="ranking is 'best'; allowed: relevance, random"
    ):
        StrategyConfig(ranking="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs strategy.require_multimodal=True"):
        StrategyConfig(given="text", require_multimodal=False)


def test_a_query_far_below_the_usual_score_is_noted(build, documents):
    memory = build(documents)
    retriever = Retriever(memory, StrategyConfig())
    usual = retriever.usual_score("text")
    assert 0.3 < usual <= 1 and usual == memory.usual_score("text")
    embedder = FakeEmbedder()

    def note(text):
        (found,) = retriever.retrieve(embedder.embed_texts([text]), [2], [None])
        found = found._replace(usual_score=usual)
        return GenerationOutput([], np.zeros(0, np.float32), found, text, 0).note

    assert note(documents[3].text) == ""
    assert "to hold nothing" in note("nation77 on scene99")
    random = Retriever(memory, StrategyConfig(ranking="random"))
    assert np.isnan(random.usual_score("text"))
    assert np.isnan(build(documents[:5], "small").usual_score("text"))
