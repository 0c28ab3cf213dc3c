"""The diagram of `sequences.packing`, and invariants of packing."""

from __future__ import annotations

import numpy as np
import pytest

from racm3_jax.sequences.packing import pack, shorten
from racm3_jax.types import Example

PAD = 99


def example(tokens, main_from=0):
    tokens = np.array(tokens, np.int32)
    is_main = np.arange(len(tokens)) >= main_from
    weights = np.where(is_main, 1.0, 0.1).astype(np.float32)
    return Example(tokens, weights, is_main)


def of_length(length):
    """An example of `length` positions."""
    return example(np.arange(length + 1))


def test_diagram():
    a, b, c, d, e, f, g, h, i, j, k, l = range(12)
    o = PAD
    examples = [example([a, b, c, d]), example([e, f, g]), example([h, i, j, k, l])]
    batch, waiting = pack(examples, num_rows=2, row_length=6, pad=PAD)
    assert waiting == []
    assert batch.inputs.tolist() == [[e, f, h, i, j, k], [a, b, c, o, o, o]]
    assert batch.targets.tolist() == [[f, g, i, j, k, l], [b, c, d, o, o, o]]
    assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 0, 0]]
    assert batch.loss_weights.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch.is_main.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    dtypes = [field.dtype for field in batch]
    assert dtypes == [np.int32, np.int32, np.float32, np.int32, np.int32, bool]


def trimmable(diagram, main_from, cuts):
    """An example of named letters, lower case 0..25 and upper case 26..51; "." is 98."""
    letters = diagram.split()
    tokens = [98 if x == "." else ord(x) - (97 if x.islower() else 39) for x in letters]
    return example(tokens, main_from)._replace(cuts=np.array(cuts).reshape(-1, 2))


def test_diagram_of_trimming():
    def read(diagram):
        return trimmable(diagram, 0, []).tokens.tolist()

    examples = [
        trimmable(". r S T . m n .", 5, [[2, 4]]),
        trimmable(". u V . p .", 4, [[2, 3]]),
    ]
    batch, waiting = pack(examples, 1, 11, PAD, max_trim=1)
    assert waiting == []
    assert batch.inputs.tolist() == [read(". r S . m n . u V . p")]
    assert batch.targets.tolist() == [read("r S . m n . u V . p .")]
    a = np.float32(0.1)
    assert batch.loss_weights.tolist() == [[a, a, 0, 1, 1, 1, a, a, a, 1, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]]
    assert pack(examples, 1, 10, PAD, max_trim=9).waiting == [1]  # T is all there is
    assert pack(examples, 1, 11, PAD).waiting == [1]


def test_the_examples_with_most_documents_lose_first():
    one = trimmable(". a B B B . m .", 6, [[2, 5]])
    two = trimmable(". c D D D . e F F F . m .", 11, [[7, 10], [2, 5]])
    batch, waiting = pack([one, two], 1, 16, PAD, max_trim=3)
    assert waiting == []
    assert (
        shorten(two, 3).tokens.tolist()
        == two.tokens[[0, 1, 2, 3, 5, 6, 7, 10, 11, 12]].tolist()
    )
    at = batch.segment_ids[0] == 2
    assert batch.targets[0, at].tolist() == shorten(two, 3).tokens[1:].tolist()


def random_examples(rng, num):
    found = []
    for _ in range(num):
        images = [
            (2 + 6 * k, 2 + 6 * k + int(rng.integers(1, 6)))
            for k in range(rng.integers(3))
        ]
        main = 7 * len(images) + 1
        tokens = rng.integers(90, size=main + rng.integers(1, 7))
        found.append(
            example(tokens, main)._replace(cuts=np.array(images[::-1]).reshape(-1, 2))
        )
    return found


def test_trimming_removes_only_ends_of_images():
    rng = np.random.default_rng(1)
    num_lost = 0
    for _ in range(100):
        examples = random_examples(rng, rng.integers(1, 30))
        batch, waiting = pack(examples, 6, 20, PAD, max_trim=3)
        kept = [e for i, e in enumerate(examples) if i not in waiting]
        assert batch.is_main.sum() == sum(e.is_main[1:].sum() for e in kept)
        lost = sum(len(e.tokens) - 1 for e in kept) - (batch.segment_ids > 0).sum()
        assert 0 <= lost <= 6 * 3
        num_lost += lost
        for e in kept:
            spare = int((e.cuts[:, 1] - e.cuts[:, 0] - 1).sum())
            uncut = np.ones(len(e.tokens), bool)
            for start, end in e.cuts:
                uncut[start + 1 : end] = False
            assert shorten(e, spare).tokens.tolist() == e.tokens[uncut].tolist()
    assert num_lost > 100


def test_later_examples_may_use_the_remaining_room():
    examples = [of_length(n) for n in (8, 8, 5, 2)]
    assert pack(examples, 2, 10, PAD).waiting == [2, 3]
    batch, waiting = pack(examples, 2, 10, PAD, overtake=True)
    assert waiting == [2]
    assert (batch.segment_ids > 0).sum() == 18


def test_a_row_takes_no_more_examples_than_its_bound():
    examples = [of_length(3) for _ in range(7)]  # three positions each
    batch, waiting = pack(examples, 2, 20, PAD, max_examples=3)
    assert waiting == [6]
    assert batch.segment_ids.max(axis=1).tolist() == [3, 3]
    batch, waiting = pack(examples, 2, 20, PAD, max_examples=3, overtake=True)
    assert waiting == [6]
    batch, waiting = pack(examples, 2, 20, PAD)
    assert not waiting and batch.segment_ids.max() == 6


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
        batch, waiting = pack(examples, num_rows=6, row_length=20, pad=PAD)
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
        kept = kept[: len(examples) - len(waiting)]
        assert sorted(found) == sorted(kept)
        empty = batch.segment_ids == 0
        assert (batch.inputs[empty] == PAD).all()
        assert (batch.targets[empty] == PAD).all()
        assert (batch.loss_weights[empty] == 0).all()
        assert not batch.is_main[empty].any()


def test_best_fit_fills_rows_better_than_first_fit():
    lengths = [3, 7, 5, 5, 6, 4]
    batch, waiting = pack([of_length(n) for n in lengths], 3, 10, PAD)
    assert waiting == []
    assert (batch.segment_ids > 0).all()


def test_the_last_examples_are_dropped_not_the_shortest():
    examples = [of_length(n) for n in (2, 9, 9, 9)]
    batch, waiting = pack(examples, num_rows=2, row_length=11, pad=PAD)
    assert waiting == [3]
    assert sorted((batch.segment_ids > 0).sum(axis=1)) == [9, 11]


def test_no_examples_make_an_empty_batch():
    batch, waiting = pack([], 2, 3, PAD)
    assert waiting == []
    assert (batch.segment_ids == 0).all()


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="row_length"):
        pack([], 1, 0, PAD)
    with pytest.raises(ValueError, match="takes 2..5"):
        pack([example([1])], 1, 4, PAD)
    with pytest.raises(ValueError, match="example 1 has 6 tokens: a row of 4"):
        pack([of_length(4), of_length(5)], 1, 4, PAD)
