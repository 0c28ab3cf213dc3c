"""Several examples into one row; the shift by one happens here and nowhere else.

    examples   a b c d      e f g      h i j k l              row_length 6, 2 rows

    inputs     e f h i j k        a b c . . .
    targets    f g i j k l        b c d . . .
    segments   1 1 2 2 2 2        1 1 1 0 0 0
    positions  0 1 0 1 2 3        0 1 2 0 0 0

An example of n tokens takes n - 1 positions. No example may see another: attention masks
by `segment_ids`, and positions start again. Pure NumPy.

Where documents are a large part of a row (1024 tokens an image in 4096), whole examples leave
a quarter of it empty. Then `max_trim` lets a row's examples lose the first tokens of their
retrieved documents (here r s t and u v), never any of the main one, until they fit:

    examples   r s t m n o      u v p q w        row_length 7, 1 row, max_trim 2

    inputs     t m n u v p q                     r and s are lost
    targets    m n o v p q w
    segments   1 1 1 2 2 2 2
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from racm3_jax.types import Batch, Example


def pack(
    examples: Sequence[Example],
    num_rows: int,
    row_length: int,
    pad: int,
    max_trim: int = 0,
) -> tuple[Batch, int]:
    """Pack examples into rows, best fit, longest first.

    When not all of them fit, the last ones are left out until the rest fits. Which
    examples are dropped thus does not depend on their length: dropping the shortest,
    as best fit by itself would, starves the examples without retrieved documents.

    Args:
      examples: sequences of at least 2 tokens. Inside a row they keep this order.
      num_rows: rows of the batch.
      row_length: positions of a row.
      pad: the token that fills inputs and targets where a row is empty.
      max_trim: how many tokens of retrieved documents a row's examples may lose, together,
        so that one more fits.

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
    # What precedes the main document, but for one token, of which its first is the target.
    spare = np.array([int(np.argmax(e.is_main)) - 1 for e in examples], np.int64)
    spare = np.clip(spare, 0, max_trim)
    candidates = np.flatnonzero(lengths <= row_length)
    total = np.cumsum(lengths[candidates])
    candidates = candidates[total <= num_rows * (row_length + max_trim)]

    def fit() -> list[list[int]] | None:
        chosen = lengths[candidates], spare[candidates]
        return _best_fit(*chosen, num_rows, row_length, max_trim)

    while (rows := fit()) is None:
        candidates = candidates[:-1]
    batch = _empty_batch(num_rows, row_length, pad)
    for row, members in enumerate(rows):
        start = 0
        chosen = candidates[members]
        cuts = _cut(lengths[chosen], spare[chosen], row_length)
        for number, (member, cut) in enumerate(zip(chosen, cuts, strict=True), start=1):
            example = Example(*(field[cut:] for field in examples[member]))
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
    lengths: np.ndarray,
    spare: np.ndarray,
    num_rows: int,
    row_length: int,
    max_trim: int,
) -> list[list[int]] | None:
    """Members of each row, ascending; None when they do not all fit."""
    room = np.full(num_rows, row_length, np.int64)
    row_spare = np.zeros(num_rows, np.int64)
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for member in np.argsort(-lengths, kind="stable"):
        left = room - lengths[member]
        allowed = np.minimum(row_spare + spare[member], max_trim)
        fits = left + allowed >= 0
        if not fits.any():
            return None
        # The row that comes out fullest; of two that are cut, the one that loses less.
        row = int(np.where(fits, np.abs(left), row_length + max_trim + 1).argmin())
        room[row] = left[row]
        row_spare[row] += spare[member]
        rows[row].append(int(member))
    return [sorted(members) for members in rows]


def _cut(lengths: np.ndarray, spare: np.ndarray, row_length: int) -> list[int]:
    """How many first tokens each example of a row loses, the largest share first."""
    excess = max(0, int(lengths.sum()) - row_length)
    cuts = [0] * len(lengths)
    for i in np.argsort(-spare, kind="stable"):
        cuts[i] = min(excess, int(spare[i]))
        excess -= cuts[i]
    return cuts


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
