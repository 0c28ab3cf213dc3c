"""Several examples into one row; the shift by one happens here and nowhere else.

    examples   a b c d      e f g      h i j k l              row_length 6, 2 rows

    inputs     e f h i j k        a b c . . .
    targets    f g i j k l        b c d . . .
    segments   1 1 2 2 2 2        1 1 1 0 0 0
    positions  0 1 0 1 2 3        0 1 2 0 0 0

An example of n tokens takes n - 1 positions. No example may see another: attention masks
by `segment_ids`, and positions start anew. Pure NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from racm3_jax.types import Batch, Example


def pack(
    examples: Sequence[Example], num_rows: int, row_length: int, pad: int
) -> tuple[Batch, int]:
    """Pack examples into rows, best fit, longest first.

    When not all of them fit, the last ones are left out until the rest fits. Which
    examples are dropped thus does not depend on their length: dropping the shortest,
    as best fit by itself would, starves the examples without retrieved documents.

    Args:
      examples: sequences of at least 2 tokens. Inside a row they keep this order.
      num_rows: rows of the batch.
      row_length: positions of a row.
      pad: the id that fills inputs and targets where a row is empty.

    Returns:
      The batch, and how many examples were dropped (those longer than a row included).

    Raises:
      ValueError: an example has fewer than 2 tokens, or a size is below 1.
    """
    if num_rows < 1 or row_length < 1:
        raise ValueError(
            f"num_rows and row_length must be >= 1; got {num_rows} and {row_length}"
        )
    lengths = np.array([len(e.tokens) - 1 for e in examples], np.int64)
    if (lengths < 1).any():
        raise ValueError(
            f"example {int(lengths.argmin())} has {int(lengths.min()) + 1} tokens; "
            "there is nothing to predict below 2"
        )
    candidates = np.flatnonzero(lengths <= row_length)
    total = np.cumsum(lengths[candidates])
    candidates = candidates[total <= num_rows * row_length]
    while (rows := _best_fit(lengths[candidates], num_rows, row_length)) is None:
        candidates = candidates[:-1]
    batch = _empty_batch(num_rows, row_length, pad)
    for row, members in enumerate(rows):
        start = 0
        for number, member in enumerate(members, start=1):
            example = examples[candidates[member]]
            end = start + len(example.tokens) - 1
            batch.inputs[row, start:end] = example.tokens[:-1]
            batch.targets[row, start:end] = example.tokens[1:]
            batch.loss_weights[row, start:end] = example.weights[1:]
            batch.is_main[row, start:end] = example.is_main[1:]
            batch.segment_ids[row, start:end] = number
            batch.positions[row, start:end] = np.arange(end - start)
            start = end
    return batch, len(examples) - len(candidates)


def _best_fit(
    lengths: np.ndarray, num_rows: int, row_length: int
) -> list[list[int]] | None:
    """Members of each row, ascending; None when they do not all fit."""
    room = np.full(num_rows, row_length, np.int64)
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for member in np.argsort(-lengths, kind="stable"):
        left = room - lengths[member]
        if left.max() < 0:
            return None
        row = int(np.where(left >= 0, left, row_length + 1).argmin())
        room[row] = left[row]
        rows[row].append(int(member))
    return [sorted(members) for members in rows]


def _empty_batch(num_rows: int, row_length: int, pad: int) -> Batch:
    shape = (num_rows, row_length)
    return Batch(
        inputs=np.full(shape, pad, np.int32),
        targets=np.full(shape, pad, np.int32),
        loss_weights=np.zeros(shape, np.float32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        is_main=np.zeros(shape, bool),
    )
