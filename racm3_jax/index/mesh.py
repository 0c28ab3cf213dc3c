"""Exact search over all devices: rows sharded, top-k on each, merged by (-score, id).

    device 0: rows 0 .. R-1    queries @ rows.T -> its k best
    device 1: rows R .. 2R-1   queries @ rows.T -> its k best
    all:      gather [devices * k] -> the k best

For the neighbours of a whole corpus (`racm3 memory neighbours`): the rows of every device
stay where they are, only scores and ids travel.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int

from racm3_jax.index import contract
from racm3_jax.index.contract import check_embeddings, check_queries, fill_slots
from racm3_jax.types import Neighbours

MAX_QUERIES_PER_CALL = 256
_AXIS = "rows"


def _search_device(
    rows: Float[Array, "device_rows d_embed"],
    queries: Float[Array, "queries d_embed"],
    *,
    k: int,
    num_rows: int,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """The k best rows of this device, then those of all; ties go to the lower row."""
    first = jax.lax.axis_index(_AXIS) * rows.shape[0]
    scores = jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)
    ids = first + jnp.arange(rows.shape[0])
    scores = jnp.where(ids < num_rows, scores, -jnp.inf)
    best, position = jax.lax.top_k(scores, min(k, rows.shape[0]))
    # Devices come in the order of their rows, so that equal scores stay in id order.
    best = jax.lax.all_gather(best, _AXIS, axis=1, tiled=True)
    found = jax.lax.all_gather(ids[position], _AXIS, axis=1, tiled=True)
    best, position = jax.lax.top_k(best, min(k, best.shape[1]))
    return best, jnp.take_along_axis(found, position, axis=1)


class MeshExactIndex:
    """All inner products on all devices, then top-k.

    Args:
      embeddings: finite rows; each device keeps an equal part of them.
      devices: that take part; None is all of this run's.
    """

    def __init__(
        self,
        embeddings: Float[np.ndarray, "rows d_embed"],
        devices: Sequence[Any] | None = None,
    ):
        embeddings = check_embeddings(embeddings)
        self._num_rows, self._d_embed = embeddings.shape
        mesh = Mesh(np.asarray(devices or jax.devices()), (_AXIS,))
        padding = -self._num_rows % mesh.size
        padded = np.pad(embeddings, ((0, padding), (0, 0)))
        self._rows = jax.make_array_from_callback(
            padded.shape, NamedSharding(mesh, P(_AXIS)), padded.__getitem__
        )
        self._mesh = mesh
        self._programs: dict[int, jax.stages.Wrapped] = {}

    def __len__(self) -> int:
        return self._num_rows

    def search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        """See `Index.search`."""
        queries = check_queries(queries, self._d_embed, k)
        width = min(1 << max(0, k - 1).bit_length(), self._num_rows)
        parts = [contract.empty_neighbours(0, k)]
        for start in range(0, len(queries), MAX_QUERIES_PER_CALL):
            block = queries[start : start + MAX_QUERIES_PER_CALL]
            padding = (1 << (len(block) - 1).bit_length()) - len(block)
            scores, ids = self._program(width)(
                self._rows, np.pad(block, ((0, padding), (0, 0)))
            )
            kept = slice(0, len(block))
            parts.append(fill_slots(np.asarray(ids)[kept], np.asarray(scores)[kept], k))
        return Neighbours(*(np.concatenate(c) for c in zip(*parts, strict=True)))

    def save(self, path: pathlib.Path) -> None:
        """Writes only a description, as `ExactIndex` does: it opens as one."""
        contract.write_description(path, "exact", self._num_rows, self._d_embed, {}, [])

    def _program(self, width: int) -> jax.stages.Wrapped:
        if width not in self._programs:
            search = functools.partial(_search_device, k=width, num_rows=self._num_rows)
            self._programs[width] = jax.jit(
                jax.shard_map(
                    search,
                    mesh=self._mesh,
                    in_specs=(P(_AXIS), P()),
                    out_specs=(P(), P()),
                    check_vma=False,
                )
            )
        return self._programs[width]
