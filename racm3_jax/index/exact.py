"""The exact back end: the oracle, and the default for small memories."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from racm3_jax.index.contract import (
    check_embeddings,
    check_queries,
    empty_neighbours,
    fill_slots,
    write_description,
)
from racm3_jax.types import Neighbours

MAX_QUERIES_PER_CALL = 256


@functools.partial(jax.jit, static_argnames=("k", "num_rows"))
def _search_blocks(
    blocks: Float[Array, "blocks block_rows d_embed"],
    queries: Float[Array, "queries d_embed"],
    k: int,
    num_rows: int,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """Top k of every block, then the top k of those; ties go to the lower row."""
    num_blocks, block_rows, _ = blocks.shape

    def search_block(block: tuple[Array, Array]) -> tuple[Array, Array]:
        number, rows = block
        scores = jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)
        ids = number * block_rows + jnp.arange(block_rows)
        scores = jnp.where(ids < num_rows, scores, -jnp.inf)
        best, position = jax.lax.top_k(scores, min(k, block_rows))
        return best, ids[position]

    scores, ids = jax.lax.map(search_block, (jnp.arange(num_blocks), blocks))
    scores, ids = (
        jnp.moveaxis(x, 0, 1).reshape(queries.shape[0], -1) for x in (scores, ids)
    )
    best, position = jax.lax.top_k(scores, min(k, scores.shape[1]))
    return best, jnp.take_along_axis(ids, position, axis=1)


class ExactIndex:
    """All inner products, then top-k, in JAX: the oracle.

    Args:
      embeddings: finite rows; kept on JAX's default device.
      block_rows: rows scored at a time, which bounds the scores held at once.
    """

    def __init__(
        self,
        embeddings: Float[np.ndarray, "rows d_embed"],
        block_rows: int = 1 << 16,
    ):
        embeddings = check_embeddings(embeddings)
        self._num_rows, self._d_embed = embeddings.shape
        block_rows = min(block_rows, self._num_rows)
        padding = -self._num_rows % block_rows
        padded = np.pad(embeddings, ((0, padding), (0, 0)))
        self._blocks = jnp.asarray(padded.reshape(-1, block_rows, self._d_embed))

    def __len__(self) -> int:
        return self._num_rows

    def search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        """See `Index.search`."""
        queries = check_queries(queries, self._d_embed, k)
        # Powers of two, so that batches of any size share a few compiled programs.
        width = min(_next_power_of_two(k), self._num_rows)
        parts = [empty_neighbours(0, k)]
        for start in range(0, len(queries), MAX_QUERIES_PER_CALL):
            block = queries[start : start + MAX_QUERIES_PER_CALL]
            padding = _next_power_of_two(len(block)) - len(block)
            scores, ids = _search_blocks(
                self._blocks,
                jnp.asarray(np.pad(block, ((0, padding), (0, 0)))),
                width,
                self._num_rows,
            )
            found = slice(0, len(block))
            parts.append(
                fill_slots(np.asarray(ids)[found], np.asarray(scores)[found], k)
            )
        return Neighbours(
            *(np.concatenate(column) for column in zip(*parts, strict=True))
        )

    def save(self, path: pathlib.Path) -> None:
        """Writes only a description: the rows are the memory's own embeddings."""
        write_description(path, "exact", self._num_rows, self._d_embed, {}, [])


def _next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
