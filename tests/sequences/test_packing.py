"""The picture of `sequences.packing`, and what packing may never do."""

from __future__ import annotations

import numpy as np
import pytest

from racm3_jax.sequences.packing import pack
from racm3_jax.types import Example

PAD = 99


def example(tokens, main_from=0):
    tokens = np.array(tokens, np.int32)
    is_main = np.arange(len(tokens)) >= main_from
    weights = np.where(is_main, 1.0, 0.1).astype(np.float32)
    return Example(tokens, weights, is_main)


def of_length(length):
    """An example that takes `length` positions."""
    return example(np.arange(length + 1))


def test_picture():
    a, b, c, d, e, f, g, h, i, j, k, l = range(12)
    o = PAD
    examples = [example([a, b, c, d]), example([e, f, g]), example([h, i, j, k, l])]
    batch, num_dropped = pack(examples, num_rows=2, row_length=6, pad=PAD)
    assert num_dropped == 0
    assert batch.inputs.tolist() == [[e, f, h, i, j, k], [a, b, c, o, o, o]]
    assert batch.targets.tolist() == [[f, g, i, j, k, l], [b, c, d, o, o, o]]
    assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 0, 0]]
    assert batch.loss_weights.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch.is_main.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    dtypes = [field.dtype for field in batch]
    assert dtypes == [np.int32, np.int32, np.float32, np.int32, np.int32, bool]


def test_picture_of_trimming():
    m, n, o, p, q, r, s, t, u, v, w = range(11)
    examples = [example([r, s, t, m, n, o], 3), example([u, v, p, q, w], 2)]
    batch, num_dropped = pack(examples, 1, 7, PAD, max_trim=2)
    assert num_dropped == 0
    assert batch.inputs.tolist() == [[t, m, n, u, v, p, q]]
    assert batch.targets.tolist() == [[m, n, o, v, p, q, w]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.is_main.tolist() == [[True] * 3 + [False] + [True] * 3]
    assert pack(examples, 1, 7, PAD, max_trim=1)[1] == 1
    assert pack(examples, 1, 7, PAD)[1] == 1


def test_trimming_never_touches_a_main_document_and_keeps_to_its_limit():
    rng = np.random.default_rng(1)
    for _ in range(100):
        examples = [
            example(rng.integers(90, size=rng.integers(4, 22)), rng.integers(4))
            for _ in range(rng.integers(1, 20))
        ]
        batch, num_dropped = pack(examples, 6, 20, PAD, max_trim=3)
        kept = [e for e in examples if len(e.tokens) <= 21]
        kept = kept[: len(examples) - num_dropped]
        assert batch.is_main.sum() == sum(e.is_main[1:].sum() for e in kept)
        lost = sum(len(e.tokens) - 1 for e in kept) - (batch.segment_ids > 0).sum()
        assert 0 <= lost <= 6 * 3


def test_weights_and_main_are_those_of_the_targets():
    batch, _ = pack([example([0, 1, 2, 3, 4], main_from=3)], 1, 5, PAD)
    np.testing.assert_array_equal(
        batch.loss_weights[0], np.array([0.1, 0.1, 1, 1, 0], np.float32)
    )
    np.testing.assert_array_equal(batch.is_main[0], [False, False, True, True, False])


def test_every_example_is_found_again():
    rng = np.random.default_rng(0)
    for _ in range(100):
        examples = [
            example(rng.integers(90, size=rng.integers(2, 22)), rng.integers(5))
            for _ in range(rng.integers(1, 20))
        ]
        batch, num_dropped = pack(examples, num_rows=6, row_length=20, pad=PAD)
        found = []
        for row in range(6):
            for number in range(1, batch.segment_ids[row].max() + 1):
                at = np.flatnonzero(batch.segment_ids[row] == number)
                np.testing.assert_array_equal(at, np.arange(at[0], at[-1] + 1))
                np.testing.assert_array_equal(
                    batch.positions[row, at], np.arange(len(at))
                )
                first = batch.inputs[row, at[:1]]
                found.append(
                    (
                        np.concatenate([first, batch.targets[row, at]]).tolist(),
                        batch.loss_weights[row, at].tolist(),
                        batch.is_main[row, at].tolist(),
                    )
                )
        kept = [
            (e.tokens.tolist(), e.weights[1:].tolist(), e.is_main[1:].tolist())
            for e in examples
            if len(e.tokens) <= 21
        ]
        kept = kept[: len(examples) - num_dropped]
        assert sorted(found) == sorted(kept)
        empty = batch.segment_ids == 0
        assert (batch.inputs[empty] == PAD).all()
        assert (batch.targets[empty] == PAD).all()
        assert (batch.loss_weights[empty] == 0).all()
        assert not batch.is_main[empty].any()


def test_best_fit_fills_rows_that_first_come_would_not():
    lengths = [3, 7, 5, 5, 6, 4]
    batch, num_dropped = pack([of_length(n) for n in lengths], 3, 10, PAD)
    assert num_dropped == 0
    assert (batch.segment_ids > 0).all()


def test_the_last_examples_are_dropped_not_the_shortest():
    examples = [of_length(n) for n in (2, 9, 9, 9)]
    batch, num_dropped = pack(examples, num_rows=2, row_length=11, pad=PAD)
    assert num_dropped == 1
    assert sorted((batch.segment_ids > 0).sum(axis=1)) == [9, 11]


def test_examples_longer_than_a_row_are_dropped_and_counted():
    batch, num_dropped = pack([of_length(6), of_length(5)], 1, 5, PAD)
    assert num_dropped == 1
    np.testing.assert_array_equal(batch.targets[0], [1, 2, 3, 4, 5])


def test_no_examples_make_an_empty_batch():
    batch, num_dropped = pack([], 2, 3, PAD)
    assert num_dropped == 0
    assert (batch.segment_ids == 0).all()


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="row_length"):
        pack([], 1, 0, PAD)
    with pytest.raises(ValueError, match="nothing to predict"):
        pack([example([1])], 1, 4, PAD)
