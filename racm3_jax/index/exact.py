"""Exact search in JAX: the oracle, and the default for small memories.

    device 0: rows 0 .. R-1    in blocks: queries @ rows.T -> its k best
    device 1: rows R .. 2R-1   in blocks: queries @ rows.T -> its k best
    all:      gather [devices * k] -> the k best

Rows stay on their devices; only scores and ids are exchanged. Scores of one
block of rows are in memory at a time.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int

from racm3_jax.index.contract import Backend, check_embeddings
from racm3_jax.index.folder import Description
from racm3_jax.index.rows import Rows

MAX_QUERIES_PER_CALL = 256
BLOCK_ROWS = 1 << 16
_AXIS = "rows"


def _search_device(
    blocks: Float[Array, "blocks block_rows d_embed"],
    queries: Float[Array, "queries d_embed"],
    *,
    k: int,
    num_rows: int,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """Top k of every block, of this device, then of all; ties go to the lower row."""
    num_blocks, block_rows, _ = blocks.shape
    first = jax.lax.axis_index(_AXIS) * num_blocks

    def search_block(block: tuple[Array, Array]) -> tuple[Array, Array]:
        number, rows = block
        scores = jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)
        ids = (first + number) * block_rows + jnp.arange(block_rows)
        scores = jnp.where(ids < num_rows, scores, -jnp.inf)
        best, position = jax.lax.top_k(scores, min(k, block_rows))
        return best, ids[position]

    found = jax.lax.map(search_block, (jnp.arange(num_blocks), blocks))
    scores, ids = (jnp.moveaxis(x, 0, 1).reshape(len(queries), -1) for x in found)
    scores, ids = _keep_best(scores, ids, k)
    # Devices come in the order of their rows, so that equal scores stay in id order.
    scores, ids = (
        jax.lax.all_gather(x, _AXIS, axis=1, tiled=True) for x in (scores, ids)
    )
    return _keep_best(scores, ids, k)


def _keep_best(
    scores: Float[Array, "queries found"], ids: Int[Array, "queries found"], k: int
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    best, position = jax.lax.top_k(scores, min(k, scores.shape[1]))
    return best, jnp.take_along_axis(ids, position, axis=1)


@functools.partial(jax.jit, static_argnames=("mesh", "k", "num_rows"))
def search_all(
    blocks: Float[Array, "blocks block_rows d_embed"],
    queries: Float[Array, "queries d_embed"],
    mesh: Mesh,
    k: int,
    num_rows: int,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """Scores and ids, best first, over the devices of a mesh; see `split_rows`."""
    search = jax.shard_map(
        functools.partial(_search_device, k=k, num_rows=num_rows),
        mesh=mesh,
        in_specs=(P(_AXIS), P()),
        out_specs=(P(), P()),
        check_vma=False,
    )
    return search(blocks, queries)


def split_rows(
    num_rows: int, num_devices: int, block_rows: int = BLOCK_ROWS
) -> tuple[int, int]:
    """(blocks of all devices together, rows of a block); the last ones are padded."""
    rows_per_device = -(-num_rows // num_devices)
    block_rows = min(block_rows, rows_per_device)
    return num_devices * -(-rows_per_device // block_rows), block_rows


class ExactIndex(Backend):
    """All inner products, then top-k, in JAX: the oracle.

    Args:
      embeddings: finite rows; each device keeps an equal part of them.
      devices: devices to use; None is JAX's default device.
      block_rows: rows scored at a time on a device.
    """

    kind = "exact"

    def __init__(
        self,
        embeddings: Float[np.ndarray, "rows d_embed"] | Rows,
        devices: Sequence[Any] | None = None,
        block_rows: int = BLOCK_ROWS,
    ):
        if 0 in embeddings.shape or len(embeddings.shape) != 2:
            check_embeddings(embeddings)
        super().__init__(*embeddings.shape, settings={})
        devices = devices or list(jnp.zeros(()).devices())
        self._mesh = Mesh(np.asarray(devices), (_AXIS,))
        num_blocks, block_rows = split_rows(self._num_rows, len(devices), block_rows)

        def make_blocks(index: Any) -> np.ndarray:
            """The rows of one device; zero past the last row."""
            start, stop, _ = index[0].indices(num_blocks)
            blocks = np.zeros((stop - start, block_rows, self._d_embed), np.float32)
            rows = np.asarray(embeddings[start * block_rows : stop * block_rows])
            if not np.isfinite(rows.sum(axis=1, dtype=np.float64)).all():
                # Checks the whole array again so that the error has the caller's row
                # number.
                check_embeddings(embeddings)
            blocks.reshape(-1, self._d_embed)[: len(rows)] = rows
            return blocks

        self._blocks = jax.make_array_from_callback(
            (num_blocks, block_rows, self._d_embed),
            NamedSharding(self._mesh, P(_AXIS)),
            make_blocks,
        )

    @classmethod
    def _build(
        cls, embeddings: Float32[np.ndarray, "rows d_embed"], config: None
    ) -> Self:
        return cls(embeddings)

    def _write(self, path: pathlib.Path) -> None:
        """Only the description: the rows are the memory's own embeddings."""

    @classmethod
    def _open(
        cls,
        path: pathlib.Path,
        description: Description,
        embeddings: Float[np.ndarray, "rows d_embed"] | Rows | None,
    ) -> Self:
        if embeddings is None:
            raise ValueError(
                f"the index at {path} is exact and has no copy of the rows: "
                "pass the embeddings that it was built from"
            )
        return cls(embeddings)

    def _search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
        # Powers of two, so that all batch sizes share a few compiled programs.
        width = min(_next_power_of_two(k), self._num_rows)
        ids, scores = [], []
        for start in range(0, len(queries), MAX_QUERIES_PER_CALL):
            block = queries[start : start + MAX_QUERIES_PER_CALL]
            padding = _next_power_of_two(len(block)) - len(block)
            padded = np.pad(block, ((0, padding), (0, 0)))
            found = search_all(self._blocks, padded, self._mesh, width, self._num_rows)
            scores.append(np.asarray(found[0])[: len(block), :k])
            ids.append(np.asarray(found[1])[: len(block), :k])
        return np.concatenate(ids), np.concatenate(scores)


def _next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
