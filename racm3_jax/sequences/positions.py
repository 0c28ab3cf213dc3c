"""Positions with random offsets, and gaps between documents.

    inputs      <eod> a1 a2 <eod> b1 <eod> m1 m2 <eod>      one example
    as packed   0     1  2  3     4  5     6  7  8
    offset 4    4     5  6  7     8  9     10 11 12
    gaps 2, 1   0     1  2  5     6  8     9  10 11

Learned positions beyond those of training are not trained, and a model trained with two
documents has never seen the distance to a third. Offsets train every learned position;
they have no effect on rotary ones, which depend only on differences. Gaps after
retrieved documents simulate the distances of more and longer documents, for both kinds.
"""

from __future__ import annotations

import numpy as np

from racm3_jax.types import Batch


def shift_positions(
    batch: Batch,
    eod: int,
    *,
    max_offset: int,
    max_gap: int,
    rng: np.random.Generator,
) -> Batch:
    """A batch with shifted positions; everything else is the same.

    Args:
      batch: from `packing.pack`.
      eod: the token before every document.
      max_offset: each example starts at 0 to this.
      max_gap: before each `<eod>` that ends a retrieved document, 0 to this many
        positions are skipped; none after the main document, where moved spans follow.
      rng: the only source of randomness.
    """
    if not max_offset and not max_gap:
        return batch
    positions = batch.positions.copy()
    for row, segments in enumerate(batch.segment_ids):
        for number in range(1, int(segments.max()) + 1):
            places = np.flatnonzero(segments == number)
            offset = int(rng.integers(max_offset + 1))
            # The first <eod> starts the example; the first main target comes after the
            # last one that counts.
            begins = batch.inputs[row, places] == eod
            begins[0] = False
            main = batch.is_main[row, places]
            before = np.cumsum(main) <= 1
            ends = np.flatnonzero(begins & before)
            gaps = np.zeros(len(places), np.int64)
            gaps[ends] = rng.integers(max_gap + 1, size=len(ends))
            positions[row, places] += offset + np.cumsum(gaps)
    return batch._replace(positions=positions)
