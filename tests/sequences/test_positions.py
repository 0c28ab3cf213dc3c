"""Diagrams of moved positions, and what they do not change."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_pipeline import CONFIG, MASKING, FakeMemory, FakeRetriever, assert_same

from racm3_jax.sequences.packing import pack
from racm3_jax.sequences.pipeline import make_batches
from racm3_jax.sequences.positions import shift_positions
from racm3_jax.types import Example


class Scripted:
    """The numbers of a diagram."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def integers(self, high, size=None):
        if size is None:
            value = self.numbers.pop(0)
            assert value < high
            return value
        return np.array([self.integers(high) for _ in range(size)], np.int64)


@pytest.fixture
def batch(parse, vocab):
    """Two examples in a row; the first with two documents, the other with none."""
    examples = []
    for diagram, start in (
        ("<eod> t1 t2 <eod> t3 <eod> t4 t5 <eod>", 6),
        ("<eod> t6", 1),
    ):
        tokens = parse(diagram)
        is_main = np.arange(len(tokens)) >= start
        examples.append(Example(tokens, np.ones(len(tokens), np.float32), is_main))
    return pack(examples, 1, 12, vocab.pad)[0]


def test_diagram_of_offset_and_gaps(batch, vocab):
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0]

    def shift(max_offset, max_gap, *numbers):
        return shift_positions(
            batch,
            vocab.eod,
            max_offset=max_offset,
            max_gap=max_gap,
            rng=Scripted(*numbers),
        ).positions[0]

    # Offsets of 4 and 1; the last three positions are padding.
    moved = shift(4, 0, 4, 0, 0, 1)
    assert moved.tolist() == [4, 5, 6, 7, 8, 9, 10, 11, 1, 0, 0, 0]
    moved = shift(0, 2, 0, 2, 1, 0)
    assert moved.tolist() == [0, 1, 2, 5, 6, 8, 9, 10, 0, 0, 0, 0]
    assert shift(0, 0) is batch.positions[0] or (shift(0, 0) == batch.positions).all()


@pytest.fixture
def collect(vocab):
    memory = FakeMemory(vocab)

    def run(start_step=0, num_steps=6, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        arguments = (
            memory,
            FakeRetriever(memory),
            np.arange(20),
            vocab,
            MASKING,
            config,
        )
        limits = {"start_step": start_step, "num_steps": num_steps}
        with make_batches(*arguments, **limits) as batches:
            return list(batches)

    return run


def test_only_positions_change_and_resuming_is_exact(collect):
    plain = collect()
    moved = collect(max_position_offset=50, max_position_gap=9)
    starts = set()
    for (before, _), (after, _) in zip(plain, moved, strict=True):
        for name in before._fields:
            if name != "positions":
                np.testing.assert_array_equal(
                    getattr(before, name), getattr(after, name)
                )
        used = after.segment_ids > 0
        steps = np.diff(after.positions, axis=1)[
            (np.diff(after.segment_ids, axis=1) == 0) & used[:, 1:]
        ]
        assert steps.min() == 1 and steps.max() <= 10
        assert (after.positions[~used] == 0).all()
        starts |= set(after.positions[before.positions + used == 1].tolist())
    assert len(starts) > 15 and max(starts) <= 50
    resumed = collect(4, 2, max_position_offset=50, max_position_gap=9)
    assert_same(moved[4:], resumed)
