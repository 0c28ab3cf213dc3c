"""Packs examples into rows; the shift by one is only here.

    examples   a b c d      e f g      h i j k l              row_length 6, 2 rows

    inputs     e f h i j k        a b c . . .
    targets    f g i j k l        b c d . . .
    segments   1 1 2 2 2 2        1 1 1 0 0 0
    positions  0 1 0 1 2 3        0 1 2 0 0 0

An example of n tokens takes n - 1 positions. Examples cannot attend to each other:
attention masks by `segment_ids`, and positions restart at 0. Pure NumPy.

If documents are a large part of a row (1024 tokens per image in 4096), whole examples
leave a quarter of it empty. `max_trim` then allows truncating the retrieved images of a
row's examples (upper case here), starting with the least relevant documents, until they
fit. Captions and the main document are never truncated:

    examples   . r S T . m n .      . u V . p .        row_length 11, 1 row, max_trim 1

    inputs     . r S . m n . u V . p                   T is dropped
    targets    r S . m n . u V . p .
    weights    a a 0 1 1 1 a a a 1 1                   the target after a cut: 0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from racm3_jax.types import Batch, Example


class Packed(NamedTuple):
    """A batch, and the examples that did not fit.

    Attributes:
      batch: the rows.
      waiting: indices of the examples that did not fit, ascending.
    """

    batch: Batch
    waiting: list[int]


def pack(
    examples: Sequence[Example],
    num_rows: int,
    row_length: int,
    pad: int,
    max_trim: int = 0,
    *,
    max_examples: int = 0,
    overtake: bool = False,
) -> Packed:
    """Packs examples into rows: best fit, longest first.

    If not all of them fit, the last ones are left out until the rest fits. So which
    examples wait does not depend on their length: leaving out the longest, or those
    that best fit cannot place, would starve some kinds of examples.

    Args:
      examples: sequences of at least 2 tokens. They keep this order inside a row.
      num_rows: rows of the batch.
      row_length: positions of a row.
      pad: padding token of inputs and targets.
      max_trim: how many image tokens of retrieved documents a row's examples may lose
        in total, so that one more fits.
      max_examples: per row; 0: as many as fit. Some attention kernels need a bound.
      overtake: fill the remaining space with later examples that happen to fit. For
        callers that put the waiting ones first next time, so that none waits long.

    Raises:
      ValueError: an example has fewer than 2 tokens or is longer than a row, or a size
        is below 1.
    """
    if num_rows < 1 or row_length < 1:
        raise ValueError(
            f"num_rows and row_length must be >= 1; got {num_rows} and {row_length}"
        )
    lengths = np.array([len(e.tokens) - 1 for e in examples], np.int64)
    wrong = np.flatnonzero((lengths < 1) | (lengths > row_length))
    if len(wrong):
        raise ValueError(
            f"example {wrong[0]} has {lengths[wrong[0]] + 1} tokens: a row of "
            f"{row_length} positions takes 2..{row_length + 1}"
        )
    spare = np.array([_count_spare(e) for e in examples], np.int64)
    total = np.cumsum(lengths)
    num = int(np.searchsorted(total, num_rows * (row_length + max_trim), side="right"))
    num = min(num, num_rows * max_examples) if max_examples else num
    while True:
        rows = _Rows(num_rows, row_length, max_trim, max_examples)
        order = np.argsort(-lengths[:num], kind="stable")
        if all(rows.place(int(i), int(lengths[i]), int(spare[i])) for i in order):
            break
        num -= 1
    waiting = [
        i
        for i in range(num, len(examples))
        if not (overtake and rows.place(i, int(lengths[i]), int(spare[i])))
    ]
    batch = _empty_batch(num_rows, row_length, pad)
    for row, members in enumerate(rows.members):
        chosen = sorted(members)
        cuts = _split_excess(lengths[chosen].sum() - row_length, spare[chosen])
        _write(
            batch,
            row,
            [shorten(examples[i], c) for i, c in zip(chosen, cuts, strict=True)],
        )
    return Packed(batch, waiting)


def shorten(example: Example, num_tokens: int) -> Example:
    """Truncates retrieved images by `num_tokens` in total.

    Args:
      example: its images are shortened in the order of `cuts`; each keeps its first
        token.
      num_tokens: at most what the images can lose.
    """
    if num_tokens <= 0:
        return example
    keep = np.ones(len(example.tokens), bool)
    weights = example.weights.copy()
    for start, end in example.cuts.tolist():
        cut = min(num_tokens, end - start - 1)
        keep[end - cut : end] = False
        # This target would teach the model to stop in the middle of an image.
        weights[end] = 0 if cut else weights[end]
        num_tokens -= cut
    return Example(example.tokens[keep], weights[keep], example.is_main[keep])


def _count_spare(example: Example) -> int:
    lengths = example.cuts[:, 1] - example.cuts[:, 0]
    return int((lengths - 1).sum())


class _Rows:
    """The assignment of examples to rows so far."""

    def __init__(
        self, num_rows: int, row_length: int, max_trim: int, max_examples: int
    ) -> None:
        self.members: list[list[int]] = [[] for _ in range(num_rows)]
        self._room = np.full(num_rows, row_length, np.int64)
        self._spare = np.zeros(num_rows, np.int64)
        self._max_trim = max_trim
        # A row of n positions holds at most n examples.
        self._places = np.full(num_rows, max_examples or row_length, np.int64)

    def place(self, member: int, length: int, spare: int) -> bool:
        """Adds an example to the row where it fits best; False if it fits nowhere."""
        left = self._room - length
        fits = left + np.minimum(self._spare + spare, self._max_trim) >= 0
        fits &= self._places > 0
        if not fits.any():
            return False
        # The row that becomes fullest; among truncated rows, the one that loses least.
        row = int(np.where(fits, np.abs(left), np.iinfo(np.int64).max).argmin())
        self._places[row] -= 1
        self._room[row] = left[row]
        self._spare[row] += spare
        self.members[row].append(member)
        return True


def _split_excess(excess: int, spare: Int[np.ndarray, " members"]) -> list[int]:
    """Number of tokens that each example of a row loses, first the one with the most.

    It has the most documents, so its least relevant one matters least.
    """
    cuts = [0] * len(spare)
    for i in np.argsort(-spare, kind="stable"):
        cuts[i] = min(max(0, int(excess)), int(spare[i]))
        excess -= cuts[i]
    return cuts


def _write(batch: Batch, row: int, examples: Sequence[Example]) -> None:
    start = 0
    for number, example in enumerate(examples, start=1):
        end = start + len(example.tokens) - 1
        batch.inputs[row, start:end] = example.tokens[:-1]
        batch.targets[row, start:end] = example.tokens[1:]
        batch.loss_weights[row, start:end] = example.weights[1:]
        batch.is_main[row, start:end] = example.is_main[1:]
        batch.segment_ids[row, start:end] = number
        batch.positions[row, start:end] = np.arange(end - start)
        start = end


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
