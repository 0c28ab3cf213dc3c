"""The pipeline over a fake memory and retriever: purity, resume, no retrieval, threads."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

from racm3_jax.sequences import layout
from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.pipeline import PipelineConfig, make_batches
from racm3_jax.types import Retrieved, TokenizedDocument, TokenizedSegment

NUM_DOCUMENTS = 23
MASKING = CausalMaskingConfig(rotation_probability=0.5)
PLAIN = CausalMaskingConfig(num_masks="none", rotation_probability=0.0)
CONFIG = PipelineConfig(
    rows=6, row_length=40, examples_per_batch=8, num_query_variants=3, seed=5
)
PATIENCE_SECONDS = 30  # only ever waited for when a test fails


class FakeMemory:
    """Document i is `ti <break> image`; its query is [i, is_image, variant]."""

    def __init__(self, vocab, num_documents=NUM_DOCUMENTS, text_length=6):
        self._documents = []
        for i in range(num_documents):
            text = np.full(text_length, i % vocab.num_text_ids, np.int32)
            image = vocab.image_tokens(np.array([i % 10, i // 10], np.int32))
            segments = (
                TokenizedSegment("text", text),
                TokenizedSegment("image", image),
            )
            self._documents.append(TokenizedDocument(str(i), segments))

    def documents(self, ids):
        return [self._documents[i] for i in ids]

    def queries(self, ids, modality, variant):
        image = np.full(len(ids), modality == "image")
        columns = [ids, image, np.full(len(ids), variant)]
        return np.stack(columns, axis=1).astype(np.float16)


class FakeRetriever:
    """Returns documents i+1 and i+2 for the query of document i; records its calls."""

    def __init__(self, memory):
        self.memory = memory
        self.queries = []
        self.threads = set()

    def retrieve(self, queries, nums, mains):
        assert queries.dtype == np.float32
        assert (np.asarray(nums) > 0).all()
        assert len(queries) == len(nums) == len(mains)
        self.queries.append(queries)
        self.threads.add(threading.get_ident())
        results = []
        for query, num, main in zip(queries, nums, mains, strict=True):
            assert str(int(query[0])) == main.id  # queries belong to their documents
            ids = (int(query[0]) + 1 + np.arange(num)) % NUM_DOCUMENTS
            scores = np.ones(num, np.float32)
            results.append(Retrieved(ids, scores, tuple(self.memory.documents(ids))))
        return results


@pytest.fixture(scope="module")
def memory(vocab):
    return FakeMemory(vocab)


@pytest.fixture
def collect(vocab, memory):
    """`collect(config, num_steps, start_step)` -> list of (Batch, stats)."""

    def run(config=CONFIG, num_steps=5, start_step=0, masking=MASKING, retriever=None):
        batches = make_batches(
            memory,
            retriever or FakeRetriever(memory),
            np.arange(NUM_DOCUMENTS),
            vocab,
            masking,
            config,
            start_step=start_step,
            num_steps=num_steps,
        )
        with batches:
            return list(batches)

    return run


def with_(config, **changes):
    return PipelineConfig(**{**vars(config), **changes})


def assert_same(left, right):
    assert len(left) == len(right)
    for (batch, stats), (other, other_stats) in zip(left, right, strict=True):
        for name, a, b in zip(batch._fields, batch, other, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
        assert stats == other_stats


def rows_of_examples(batch):
    """The sequences of a batch, as lists of tokens."""
    found = []
    for row in range(len(batch.inputs)):
        for number in range(1, batch.segment_ids[row].max() + 1):
            at = batch.segment_ids[row] == number
            tokens = [batch.inputs[row, at][0], *batch.targets[row, at]]
            found.append([int(t) for t in tokens])
    return found


def main_parts(batch):
    """Each example's tokens of the main document and its moved spans."""
    found = []
    for row in range(len(batch.inputs)):
        for number in range(1, batch.segment_ids[row].max() + 1):
            at = (batch.segment_ids[row] == number) & batch.is_main[row]
            found.append(batch.targets[row, at].tolist())
    return found


def test_resume_is_exact_from_every_step(collect):
    whole = collect(num_steps=7)
    for start in (1, 2, 6):
        assert_same(collect(start_step=start, num_steps=7 - start), whole[start:])
    assert collect(start_step=7, num_steps=0) == []


def test_threads_and_prefetch_change_nothing(collect):
    whole = collect()
    for threads, prefetch in ((1, 1), (4, 8), (3, 0)):
        assert_same(collect(with_(CONFIG, threads=threads, prefetch=prefetch)), whole)


def test_seed_and_step_change_the_batches(collect):
    first, second = collect(num_steps=2)
    assert not np.array_equal(first[0].inputs, second[0].inputs)
    (other,) = collect(with_(CONFIG, seed=6), num_steps=1)
    assert not np.array_equal(first[0].inputs, other[0].inputs)


def test_plain_rows_are_plain_documents(collect, memory, vocab):
    config = with_(CONFIG, retrieval=False)
    plain = {
        tuple(layout.join([], layout.document_tokens(d, vocab), vocab).tolist())
        for d in memory.documents(range(NUM_DOCUMENTS))
    }
    for batch, stats in collect(config, masking=PLAIN):
        examples = rows_of_examples(batch)
        assert len(examples) == stats["examples"] == config.examples_per_batch
        assert {tuple(e) for e in examples} <= plain


def test_each_epoch_sees_every_document_once_in_a_new_order(vocab, memory):
    config = with_(CONFIG, retrieval=False, rows=1, examples_per_batch=1)
    main_ids = np.array([3, 7, 11, 19, 20])
    with make_batches(
        memory, None, main_ids, vocab, PLAIN, config, num_steps=40
    ) as batches:
        seen = [int(vocab.image_codes(b.inputs[0, 8:10]) @ [1, 10]) for b, _ in batches]
    epochs = [seen[i : i + 5] for i in range(0, 40, 5)]
    assert all(sorted(epoch) == main_ids.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_without_retrieval_documents_and_masks_are_the_same(collect):
    wide = with_(CONFIG, rows=8, row_length=60)  # nothing is trimmed or dropped
    single = with_(CONFIG, rows=1, row_length=60, examples_per_batch=1)
    for config, num_steps in ((wide, 6), (single, 30)):
        seen = []
        for retrieval in (True, False):
            steps = collect(with_(config, retrieval=retrieval), num_steps=num_steps)
            assert (sum(stats["retrieved"] for _, stats in steps) > 0) == retrieval
            assert all(stats["dropped"] == 0 for _, stats in steps)
            seen.append([sorted(main_parts(batch)) for batch, _ in steps])
        assert seen[0] == seen[1]


def test_number_of_documents_and_queries_are_uniform(collect, memory):
    retriever = FakeRetriever(memory)
    config = with_(CONFIG, rows=60, examples_per_batch=100)
    steps = collect(config, num_steps=12, retriever=retriever)
    given = sum(stats["retrieved"] for _, stats in steps)
    assert abs(given / 1200 - 1) < 0.1
    queries = np.concatenate(retriever.queries)
    assert abs(len(queries) / 1200 - 2 / 3) < 0.06
    assert abs(queries[:, 1].mean() - 0.5) < 0.07
    variants, counts = np.unique(queries[:, 2], return_counts=True)
    assert variants.tolist() == [1, 2, 3]
    assert (np.abs(counts / len(queries) - 1 / 3) < 0.07).all()


@pytest.mark.parametrize(("modality", "column"), [("text", 0), ("image", 1)])
def test_query_modality_is_configurable(collect, memory, modality, column):
    retriever = FakeRetriever(memory)
    config = with_(CONFIG, query_modality=modality, num_query_variants=0)
    collect(config, retriever=retriever)
    queries = np.concatenate(retriever.queries)
    assert (queries[:, 1] == column).all()
    assert (queries[:, 2] == 0).all()


def test_one_search_per_step(collect, memory):
    retriever = FakeRetriever(memory)
    collect(num_steps=4, retriever=retriever)
    assert len(retriever.queries) == 4


def test_examples_that_do_not_fit_wait_for_the_next_step(collect, memory):
    """Rows of 3 documents; 2 * 3 + 1 in two steps: the seventh is dropped."""
    config = with_(
        CONFIG, retrieval=False, rows=1, examples_per_batch=4, window_steps=2
    )
    steps = collect(with_(config, row_length=30), num_steps=4, masking=PLAIN)
    whole = collect(with_(config, rows=2, row_length=30), num_steps=4, masking=PLAIN)
    assert [s["examples"] for _, s in whole] == [4.0] * 4
    for first in (0, 2):
        window, wanted = steps[first : first + 2], whole[first : first + 2]
        assert [stats["examples"] for _, stats in window] == [3.0, 3.0]
        assert [stats["waiting"] for _, stats in window] == [1.0, 0.0]
        # Two waiting would be one too many: the last one is never read.
        assert [stats["dropped"] for _, stats in window] == [0.0, 2.0]
        shown = [e for batch, _ in window for e in rows_of_examples(batch)]
        expected = [sorted(rows_of_examples(batch)) for batch, _ in wanted]
        assert sorted(shown[:3]) != expected[0] and shown[:3] != shown[3:]
        assert all(e in expected[0] for e in shown[:3])
        late = [e for e in expected[0] if e not in shown[:3]]
        assert len(late) == 1 and late[0] in shown[3:]


def test_nothing_is_retrieved_for_examples_without_room(collect):
    config = with_(CONFIG, rows=2, examples_per_batch=8, window_steps=6)
    steps = collect(config, num_steps=12)
    made = dropped = 0
    for batch, stats in steps:
        assert stats["fill"] == (batch.segment_ids > 0).mean()
        assert stats["examples"] + stats["waiting"] <= 9
        made += stats["examples"]
        dropped += stats["dropped"]
    assert made + dropped == 12 * 8
    assert dropped > 24


@pytest.mark.parametrize("window_steps", [1, 3, 8])
def test_resume_is_exact_within_a_window(collect, window_steps):
    """From the step number only, and with more examples than fit."""
    config = with_(CONFIG, rows=4, examples_per_batch=9, window_steps=window_steps)
    whole = collect(config, num_steps=11)
    assert sum(stats["waiting"] for _, stats in whole) > 0 or window_steps == 1
    for start in range(11):
        assert_same(
            collect(config, start_step=start, num_steps=11 - start), whole[start:]
        )
    assert_same(collect(config, start_step=2, num_steps=2), whole[2:4])


def test_the_plan_distributes_all_examples_over_the_groups():
    config = with_(CONFIG, rows=6, examples_per_batch=5, groups=3, window_steps=2)
    spans = [
        config.index_range(window, group) for window in (0, 1) for group in range(3)
    ]
    assert spans == [(0, 3), (3, 6), (6, 10), (10, 13), (13, 16), (16, 20)]


def test_retriever_runs_ahead_in_background_threads(vocab, memory):
    """While the consumer uses its first batch, the next ones are made."""
    retriever = FakeRetriever(memory)
    ahead = threading.Semaphore(0)
    retrieve = retriever.retrieve

    def count(*args):
        result = retrieve(*args)
        ahead.release()
        return result

    retriever.retrieve = count
    config = with_(CONFIG, prefetch=3, threads=2, window_steps=1)
    ids = np.arange(NUM_DOCUMENTS)
    with make_batches(
        memory, retriever, ids, vocab, MASKING, config, num_steps=50
    ) as batches:
        next(batches)
        for _ in range(1 + config.prefetch):  # only the first was requested
            assert ahead.acquire(timeout=PATIENCE_SECONDS)
    assert threading.get_ident() not in retriever.threads
    assert len(retriever.queries) == 1 + config.prefetch


def test_close_waits_for_a_slow_retriever(vocab, memory):
    retriever = FakeRetriever(memory)
    started, go_on = threading.Event(), threading.Event()
    running = []
    retrieve = retriever.retrieve

    def slow(*args):
        if retriever.queries:  # the first search is fast, the later ones are not
            running.append(True)
            started.set()
            assert go_on.wait(PATIENCE_SECONDS)
            result = retrieve(*args)
            running.pop()
            return result
        return retrieve(*args)

    retriever.retrieve = slow
    config = with_(CONFIG, prefetch=2, threads=1, window_steps=1)
    ids = np.arange(NUM_DOCUMENTS)
    batches = make_batches(memory, retriever, ids, vocab, MASKING, config, num_steps=50)
    next(batches)
    assert started.wait(PATIENCE_SECONDS)
    closer = threading.Thread(target=batches.close)
    closer.start()
    assert closer.is_alive()  # a search is under way
    go_on.set()
    closer.join(PATIENCE_SECONDS)
    assert not closer.is_alive()
    assert not running
    assert list(batches) == []
    batches.close()


def test_errors_of_the_retriever_reach_the_consumer(vocab, memory):
    class Broken:
        def retrieve(self, queries, nums, mains):
            raise RuntimeError("the index is gone")

    with (
        make_batches(
            memory, Broken(), np.arange(9), vocab, MASKING, CONFIG, num_steps=3
        ) as batches,
        pytest.raises(RuntimeError, match="the index is gone"),
    ):
        next(batches)


def test_documents_longer_than_a_row_are_skipped_then_refused(vocab):
    memory = FakeMemory(vocab, text_length=30)
    config = with_(
        CONFIG, row_length=25, retrieval=False, max_skipped_share=1.0, window_steps=1
    )
    masking = CausalMaskingConfig(num_masks="none", rotation_probability=0.5)
    args = (memory, None, np.arange(NUM_DOCUMENTS), vocab, masking)
    with make_batches(*args, config, num_steps=4) as batches:
        stats = [stats for _, stats in batches]
    assert sum(s["skipped"] for s in stats) > 0
    for s in stats:
        assert s["examples"] + s["dropped"] + s["skipped"] == 8
    strict = with_(config, max_skipped_share=0.1)
    with (
        make_batches(*args, strict, num_steps=4) as batches,
        pytest.raises(ValueError, match="step 0: more than 10% of the 8 main"),
    ):
        list(batches)


def test_wrong_arguments_are_refused(vocab, memory):
    args = (np.arange(3), vocab, MASKING, CONFIG)
    with pytest.raises(ValueError, match="no retriever was given"):
        make_batches(memory, None, *args, num_steps=1)
    with pytest.raises(ValueError, match="start_step"):
        make_batches(memory, FakeRetriever(memory), *args, start_step=-1, num_steps=1)
    with pytest.raises(ValueError, match="main_ids"):
        make_batches(memory, None, np.zeros(0, np.int64), *args[1:], num_steps=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows"),
        ({"threads": 0}, "threads"),
        ({"query_modality": "sound"}, "both"),
        ({"seed": -1}, "seed"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        with_(CONFIG, **change)


def make_rows(vocab, memory, config, rows=None):
    with make_batches(
        memory,
        FakeRetriever(memory),
        np.arange(NUM_DOCUMENTS),
        vocab,
        MASKING,
        config,
        num_steps=3,
        rows=rows,
    ) as made:
        return [batch for batch, _ in made]


@pytest.mark.parametrize("groups", [1, 8, 96])
@pytest.mark.parametrize("num_hosts", [2, 12, 32])
def test_any_number_of_hosts_makes_the_batches_of_one(vocab, memory, num_hosts, groups):
    """Also where their number divides neither the groups nor the examples per step."""
    config = with_(CONFIG, rows=96, groups=groups, examples_per_batch=110)
    whole = make_rows(vocab, memory, config)
    for rows in np.split(np.arange(96), num_hosts)[:: num_hosts // 2]:
        part = make_rows(vocab, memory, config, rows)
        for got, want in zip(part, whole, strict=True):
            for field, expected in zip(got, want, strict=True):
                np.testing.assert_array_equal(field, expected[rows])


def test_a_host_may_have_any_rows(vocab, memory):
    config = with_(CONFIG, rows=12, groups=4, examples_per_batch=15)
    rows = np.array([11, 0, 4, 5])
    part = make_rows(vocab, memory, config, rows)
    for got, want in zip(part, make_rows(vocab, memory, config), strict=True):
        np.testing.assert_array_equal(got.inputs, want.inputs[rows])
    with pytest.raises(ValueError, match=r"rows must be some of 0..11 .*got \[12\]"):
        make_rows(vocab, memory, config, [12])


def test_groups_divide_the_rows_and_have_examples():
    with pytest.raises(ValueError, match="groups must divide pipeline.rows=6; got 4"):
        dataclasses.replace(CONFIG, groups=4)
    with pytest.raises(ValueError, match="every group needs an example"):
        dataclasses.replace(CONFIG, groups=3, examples_per_batch=2)


def test_distractors_and_orders_are_functions_of_the_step(collect):
    config = with_(CONFIG, document_order="shuffled", distractor_probability=0.5)
    whole = collect(config, num_steps=6)
    assert_same(collect(config, start_step=2, num_steps=4), whole[2:])
    plain = collect(num_steps=6)
    assert main_parts(whole[0][0]) != [] and any(
        (a.inputs != b.inputs).any()
        for (a, _), (b, _) in zip(whole, plain, strict=True)
    )


def test_the_number_of_documents_is_sampled_between_its_bounds(collect):
    shown = collect(with_(CONFIG, min_documents=2, rows=12), num_steps=3)
    assert all(stats["mean_retrieved"] == 2.0 for _, stats in shown)
    shown = collect(with_(CONFIG, min_documents=1, rows=12), num_steps=6)
    assert all(1.0 <= stats["mean_retrieved"] <= 2.0 for _, stats in shown)
    assert len({stats["mean_retrieved"] for _, stats in shown}) > 1
