"""Which guesses save time: the table of a memory, windows, and measured acceptance.

With a window of W tokens and an acceptance of a, a pass gives 1 + a + ... + a^(W-1) of them.
How much more it costs than a pass of one token per row depends on the device and on the
number of rows.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int32

from racm3_jax.generation.drafts import (
    MAX_CODES,
    Drafter,
    DraftMode,
    Table,
    count_table,
    measure_table,
)
from racm3_jax.memory.memory import Memory
from racm3_jax.sharding import current_platform
from racm3_jax.vocab import Vocab

if TYPE_CHECKING:
    from racm3_jax.generation.sample import Samples

WINDOWS = (1, 2, 4, 8, 16)
# Passes of the shipped model on 2 AVX2 cores, in milliseconds by number of rows: with
# kernels stored in panels, two rows cost as much as one, and further rows cost more.
_CPU_PASSES = {1: 2.1, 2: 2.1, 4: 3.5, 8: 5.2, 16: 8.1, 32: 13.4, 64: 27.8}
# Accelerators read the weights in the time in which they multiply some hundreds of rows.
_ACCELERATOR_ROW = 1 / 256
# The smallest predicted gain of a window: guesses fail in runs, so that the real gain is
# smaller. With 2 rows a window of 4 should gain 1.16 on a CPU, and 0.82 was measured.
_MIN_GAIN = 1.4
# Measured on the shipped model: of a table over its memory, and without a memory.
_TABLE_ACCEPTANCE = 0.78
_JACOBI_ACCEPTANCE = 0.65
_MIN_TESTED = 512  # guesses, after which their measured acceptance is used
_HELD_OUT_EVERY = 8  # every 8th image measures the table and is not counted


class _Counted(NamedTuple):
    num_allowed: int
    table: Table
    acceptance: float


def gain(acceptance: float, window: int, num_rows: int) -> float:
    """The speed of decoding, relative to the speed without guesses, on this machine."""
    num_tokens = sum(acceptance**i for i in range(window))
    return num_tokens * _cost(num_rows) / _cost(num_rows * window)


def _cost(num_rows: int) -> float:
    """The cost of a pass, relative to others on the same device."""
    if current_platform() != "cpu":
        return 1 + _ACCELERATOR_ROW * (num_rows - 1)
    most = max(_CPU_PASSES)
    found = np.interp(num_rows, list(_CPU_PASSES), list(_CPU_PASSES.values()))
    return float(found) * max(1.0, num_rows / most)


def choose_window(acceptance: float, num_rows: int) -> int:
    """The window with the largest gain; 1 where guesses do not save time.

    Args:
      acceptance: the fraction of guesses that are right.
      num_rows: of a pass without guesses: samples, twice as many with guidance.
    """
    best = max(WINDOWS, key=lambda window: gain(acceptance, window, num_rows))
    return best if gain(acceptance, best, num_rows) >= _MIN_GAIN else 1


def usual_drafter(
    vocab: Vocab, num_rows: int, has_memory: bool = True
) -> Drafter | None:
    """The likely choice of "auto", for programs that are compiled and not run.

    Args:
      vocab: of the model.
      num_rows: of a pass without guesses.
      has_memory: of documents with images.
    """
    source = "table" if has_memory else "jacobi"
    acceptance = _TABLE_ACCEPTANCE if has_memory else _JACOBI_ACCEPTANCE
    window = choose_window(acceptance, num_rows)
    return None if window == 1 else _make_drafter(source, window, vocab)


def _make_drafter(source: str, window: int, vocab: Vocab) -> Drafter:
    codes = vocab.image_range
    return Drafter(source, window, (codes.start, codes.stop), vocab.image_length)


def read_codes(
    memory: Memory, vocab: Vocab, most: int = MAX_CODES
) -> Int32[np.ndarray, "images codes"]:
    """Codes of images of the allowed documents, in even steps over all of them."""
    rows = memory.allowed_ids()
    count = min(len(rows), max(1, most // vocab.image_length))
    rows = (
        rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)] if count else rows
    )
    images = [
        segment.tokens
        for document in memory.documents(rows)
        for segment in document.segments
        if segment.modality == "image"
    ]
    shape = (-1, vocab.image_length)
    return vocab.image_codes(np.asarray(images, np.int32)).reshape(shape)


class DraftChoice:
    """The tables of memories, counted once each, and the measured acceptance of guesses."""

    def __init__(self) -> None:
        self._tables: weakref.WeakKeyDictionary[Memory, _Counted] = (
            weakref.WeakKeyDictionary()
        )
        self._seen: dict[tuple[str, int], list[int]] = {}

    def choose(
        self, mode: DraftMode, memory: Any, vocab: Vocab, num_rows: int
    ) -> tuple[Drafter | None, Table | None]:
        """How tokens are guessed, and the table for it.

        The choice depends on the memory and the number of rows, not on the prompt, so
        that prompts share compiled programs. A source whose guesses turn out to save no
        time is not used again.

        Args:
          mode: a source, or "auto" for the best one, or "off".
          memory: whose images are counted. Without a memory, or with hand-picked
            documents in its place, there is no table.
          vocab: of the model.
          num_rows: of a pass without guesses.

        Raises:
          ValueError: "table" without a memory of images.
        """
        if mode == "off":
            return None, None
        counted = None
        if mode in ("auto", "table") and hasattr(memory, "allowed_ids"):
            counted = self._count(memory, vocab)
        if mode == "table" and counted is None:
            raise ValueError(
                "draft='table' counts the images of a memory, and this generator has none: "
                "load it with one, or use draft='jacobi' or 'off'"
            )
        found = {"table": counted.acceptance} if counted is not None else {}
        if mode != "table":
            found["jacobi"] = _JACOBI_ACCEPTANCE
        if mode != "auto":
            found = {mode: found[mode]}
        for source, acceptance in found.items():
            window = choose_window(acceptance, num_rows)
            if mode != "auto":
                window = max(window, WINDOWS[1])
            elif window == 1 or self._is_worthless(source, window, num_rows):
                continue
            drafter = _make_drafter(source, window, vocab)
            table = counted.table if counted and source == "table" else None
            return drafter, table
        return None, None

    def note(self, samples: Samples) -> None:
        """Counts how many guesses were right."""
        if samples.drafter is None:
            return
        seen = self._seen.setdefault(samples.drafter[:2], [0, 0])
        seen[0] += int(samples.accepted.sum())
        seen[1] += int(samples.tested.sum())

    def _is_worthless(self, source: str, window: int, num_rows: int) -> bool:
        accepted, tested = self._seen.get((source, window), (0, 0))
        if tested < _MIN_TESTED:
            return False
        return gain(accepted / tested, window, num_rows) <= 1

    def _count(self, memory: Memory, vocab: Vocab) -> _Counted | None:
        num_allowed = memory.num_allowed
        counted = self._tables.get(memory)
        if counted is None or counted.num_allowed != num_allowed:
            codes = read_codes(memory, vocab)
            held_out = np.arange(len(codes)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
            if not held_out.any():
                return None
            table = count_table(codes[~held_out])
            acceptance = measure_table(table, codes[held_out])
            on_device = Table(*(jax.device_put(x) for x in table))
            counted = _Counted(num_allowed, on_device, acceptance)
            self._tables[memory] = counted
        return counted
