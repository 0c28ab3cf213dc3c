"""Guesses of the next codes of an image, so that one pass of the model verifies several.

    known    7 7 3 3          the next code is guessed from its neighbours:
             7 7 .  .           up-left  up        7 3
                                   left  ?         7 ?

Whether a guess is right changes how many passes an image takes, never its codes: the loop
samples every place as it would without guesses, and keeps those equal to the sample.

Sources of guesses:
  table    (left, up, up-left) -> code, counted over the memory's images
  jacobi   what the previous pass sampled for the place, after a wrong guess (Jacobi
           decoding, arXiv 2410.01699); at new places, what followed the same
           neighbours in this image
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, UInt32

DraftMode = Literal["auto", "off", "table", "jacobi"]
DRAFT_MODES: tuple[DraftMode, ...] = get_args(DraftMode)
MAX_CODES = 1 << 18  # that a table is counted over: 0.3 s
_SLOTS = 1 << 17
_ABSENT = -1  # no neighbour there, or an unknown one
# Which neighbours a guess depends on, (left, up, up-left): the most specific first. The
# last depends on the place in the image only.
_CONTEXTS = ((1, 1, 1), (1, 1, 0), (0, 1, 0), (0, 0, 0))


class Table(NamedTuple):
    """The most likely code in each context, as a hash table of a fixed size.

    Attributes:
      hashes: of the context that each slot holds.
      codes: the code that followed it most often; -1 where the slot is empty.
    """

    hashes: UInt32[np.ndarray, " slots"] | UInt32[Array, " slots"]
    codes: Int32[np.ndarray, " slots"] | Int32[Array, " slots"]


class Drafter(NamedTuple):
    """How guesses are made: the static part of the compiled loop.

    Attributes:
      source: "table" or "jacobi".
      window: tokens that one pass reads: one that is certain, and `window - 1` guesses.
      codes: half-open range of the image tokens of the vocabulary.
      image_length: codes per image.
    """

    source: str
    window: int
    codes: tuple[int, int]
    image_length: int


class Drafts(NamedTuple):
    """What `sample` needs to guess.

    Attributes:
      drafter: how.
      table: of the source "table", else None.
      cells: which code of the image each new token is, -1 for other tokens; None where
        images are written from their first code on.
      known: the codes of each row's image that are known in advance, -1 for the others;
        None where there are none.
    """

    drafter: Drafter
    table: Table | None = None
    cells: Int32[np.ndarray, "batch new"] | None = None
    known: Int32[np.ndarray, "batch codes"] | None = None

    def take(self, rows: Int[np.ndarray, " taken"]) -> Drafts:
        """The drafts of some rows of the batch."""
        cells, known = (x if x is None else x[rows] for x in (self.cells, self.known))
        return self._replace(cells=cells, known=known)


class Canvas(NamedTuple):
    """The images that are being written.

    Attributes:
      codes: of each row's image, -1 where unknown.
      next_cell: of each row: where an image's next code goes.
      guesses: of the source "jacobi": the token sampled last for each place, -1 for none.
      tested: how many guesses were compared with the sampled token.
      accepted: how many of them were equal.
      passes: of the model, until the row was done; reading the prompt is one.
    """

    codes: Int32[Array, "samples codes"]
    next_cell: Int32[Array, " samples"]
    guesses: Int32[Array, "samples room"] | None
    tested: Int32[Array, " samples"]
    accepted: Int32[Array, " samples"]
    passes: Int32[Array, " samples"]


def grid_side(image_length: int) -> int:
    """Codes per row of a square image; all codes where the image is not square."""
    side = math.isqrt(image_length)
    return side if side * side == image_length else image_length


def empty_table() -> Table:
    """A table without entries."""
    return Table(np.zeros(_SLOTS, np.uint32), np.full(_SLOTS, -1, np.int32))


def count_table(images: Int[np.ndarray, "images codes"]) -> Table:
    """Counts which code follows each context in the images of a memory."""
    codes = images.astype(np.int32)
    neighbours = _find_neighbours(codes, np.arange(codes.shape[1]))
    hashes = np.stack([h.reshape(-1) for h in _hash_contexts(*neighbours)])
    pairs = (hashes.astype(np.uint64) << np.uint64(32)) | codes.reshape(-1).astype(
        np.uint64
    )
    pairs, counts = np.unique(pairs, return_counts=True)
    # The most frequent come last, so that a context and a slot keep them.
    pairs = pairs[np.argsort(counts, kind="stable")]
    hashes = (pairs >> np.uint64(32)).astype(np.uint32)
    slots = hashes & np.uint32(_SLOTS - 1)
    table = empty_table()
    table.hashes[slots] = hashes
    table.codes[slots] = (pairs & np.uint64(0xFFFFFFFF)).astype(np.int32)
    return table


def measure_table(table: Table, images: Int[np.ndarray, "images codes"]) -> float:
    """The fraction of the codes of images that a table guesses from those before."""
    neighbours = _find_neighbours(images.astype(np.int32), np.arange(images.shape[1]))
    return float((look_up(table, *neighbours) == images).mean())


def look_up(table: Table, left: Any, up: Any, corner: Any, cell: Any) -> Any:
    """The most likely code after these neighbours, by the most specific known context."""
    found = None
    for hashes in _hash_contexts(left, up, corner, cell)[::-1]:
        slots = hashes & np.uint32(_SLOTS - 1)
        codes = table.codes[slots]
        hit = (table.hashes[slots] == hashes) & (codes >= 0)
        xp: Any = jnp if isinstance(codes, jax.Array) else np
        found = xp.where(hit, codes, 0 if found is None else found)
    return found


def _hash_contexts(left: Any, up: Any, corner: Any, cell: Any) -> list[Any]:
    """32-bit hashes of a place's contexts, those of `_CONTEXTS`; NumPy or JAX arrays."""
    hashes = []
    for order, used in enumerate(_CONTEXTS):
        parts = [
            value for value, use in zip((left, up, corner), used, strict=True) if use
        ]
        value = (parts[0] if parts else cell).astype(np.uint32) + np.uint32(order << 20)
        for part in parts[1:]:
            value = value * np.uint32(0x9E3779B1) ^ part.astype(np.uint32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # of MurmurHash3
            value = (value ^ (value >> np.uint32(shift))) * np.uint32(factor)
        hashes.append(value ^ (value >> np.uint32(16)))
    return hashes


def _find_neighbours(codes: Any, cell: Any) -> tuple[Any, Any, Any, Any]:
    """Codes left of each cell, above it, and above that; and the cell itself."""
    side = grid_side(codes.shape[-1])
    xp: Any = jnp if isinstance(codes, jax.Array) else np
    x, y = cell % side, cell // side

    def read(back, there):
        at = xp.broadcast_to(
            xp.maximum(cell - back, 0), codes.shape[:1] + cell.shape[-1:]
        )
        return xp.where(there, xp.take_along_axis(codes, at, axis=1), _ABSENT)

    return (
        read(1, x > 0),
        read(side, y > 0),
        read(side + 1, (x > 0) & (y > 0)),
        xp.broadcast_to(cell, codes.shape[:1] + cell.shape[-1:]),
    )


def start_canvas(
    drafter: Drafter,
    known: Int32[Array, "samples codes"] | None,
    num_rows: int,
    room: int,
) -> Canvas:
    """The canvas before anything is sampled."""
    if known is None:
        known = jnp.full((num_rows, drafter.image_length), _ABSENT, jnp.int32)
    guesses = None
    if drafter.source == "jacobi":
        guesses = jnp.full((num_rows, room), -1, jnp.int32)
    zeros = jnp.zeros(num_rows, jnp.int32)
    return Canvas(known, zeros, guesses, zeros, zeros, zeros)


def propose(
    drafter: Drafter,
    table: Table | None,
    cells: Int32[Array, "samples room"] | None,
    forced: Int32[Array, "samples room"] | None,
    canvas: Canvas,
    places: Int32[Array, " samples"],
) -> Int32[Array, "samples guesses"]:
    """Guesses the tokens from `places` on: `window - 1` per row, one by one.

    Args:
      drafter: how.
      table: of the source "table".
      cells: see `Drafts`; of all tokens.
      forced: tokens that are certain, -1 elsewhere; or None.
      canvas: the images so far.
      places: of each row's next token.
    """
    start, stop = drafter.codes

    def guess(codes, i):
        place = places + i
        if cells is None:
            cell = canvas.next_cell + i
        else:
            cell = take(cells, place, -1)
        inside = jnp.clip(cell, 0, codes.shape[1] - 1)[:, None]
        neighbours = _find_neighbours(codes, inside)
        if table is not None:
            code = look_up(table, *neighbours)[:, 0]
        else:
            code = _copy_similar(codes, neighbours)
        token = start + code
        if canvas.guesses is not None:
            sampled = take(canvas.guesses, place, -1)
            token = jnp.where(sampled >= 0, sampled, token)
        if forced is not None:
            certain = take(forced, place, -1)
            token = jnp.where(certain >= 0, certain, token)
        is_code = (cell >= 0) & (token >= start) & (token < stop)
        at = jnp.where(is_code, cell, codes.shape[1])
        codes = put(codes, at[:, None], (token - start)[:, None])
        return codes, token

    steps = jnp.arange(drafter.window - 1)
    return jax.lax.scan(guess, canvas.codes, steps)[1].T


def follow(
    drafter: Drafter,
    cells: Int32[Array, "samples room"] | None,
    canvas: Canvas,
    places: Int32[Array, "samples window"],
    tokens: Int32[Array, "samples window"],
    kept: Bool[Array, "samples window"],
    judged: tuple[Bool[Array, "samples guesses"], Bool[Array, "samples guesses"]],
) -> Canvas:
    """The images after a pass, and how many guesses were right.

    Args:
      drafter: how.
      cells: see `Drafts`; of all tokens.
      canvas: before the pass.
      places: of the sampled tokens.
      tokens: what was sampled there.
      kept: True where the token is kept: the first ones of each row.
      judged: True where a guess was compared with a kept token, and where it was equal.
    """
    start, stop = drafter.codes
    if cells is None:
        cell = canvas.next_cell[:, None] + jnp.arange(places.shape[1])
    else:
        cell = take(cells, places, -1)
    is_code = kept & (tokens >= start) & (tokens < stop)
    num_codes = canvas.codes.shape[1]
    at = jnp.where(is_code & (cell >= 0), cell, num_codes)
    codes = put(canvas.codes, at, tokens - start)
    # Another image begins after a token that is not a code.
    whole = (is_code == kept).all(axis=1)
    num_kept = kept.sum(axis=1, dtype=jnp.int32)
    next_cell = jnp.where(whole, canvas.next_cell + num_kept, 0)
    guesses = canvas.guesses
    if guesses is not None:
        later = jnp.where(kept, guesses.shape[1], places)
        guesses = put(guesses, later, tokens)
    tested, equal = (marks.sum(axis=1, dtype=jnp.int32) for marks in judged)
    return canvas._replace(
        codes=codes,
        next_cell=next_cell,
        guesses=guesses,
        tested=canvas.tested + tested,
        accepted=canvas.accepted + equal,
        passes=canvas.passes + kept[:, 0],
    )


def take(values: Array, places: Array, outside: int) -> Array:
    """`values[row, place]`, or `outside` where there is no such place."""
    wide = places.reshape(len(values), -1)
    found = jnp.take_along_axis(values, wide, axis=1, mode="fill", fill_value=outside)
    return found.reshape(places.shape)


def put(values: Array, places: Array, new: Array) -> Array:
    """With `values[row, place] = new`, ignoring places that do not exist.

    Row by row: with one scatter, devices that hold copies of a model would exchange all
    values.
    """

    def put_in_row(row, at, x):
        return row.at[at].set(x, mode="drop")

    return jax.vmap(put_in_row)(values, places, new)


def _copy_similar(codes: Array, neighbours: tuple[Any, ...]) -> Array:
    """The code of the cell with the most similar neighbours; of several, the last."""
    cells = jnp.arange(codes.shape[1])
    score = jnp.zeros(codes.shape, jnp.int32)
    for weight, there, here in zip(
        (2, 4, 1), _find_neighbours(codes, cells), neighbours, strict=False
    ):
        score += weight * ((there == here) & (here != _ABSENT))
    score = jnp.where(codes == _ABSENT, -1, score)
    score = score * codes.shape[1] + cells
    best = jnp.argmax(score, axis=1)[:, None]
    return jnp.maximum(jnp.take_along_axis(codes, best, axis=1)[:, 0], 0)
