"""On which devices a model decodes, and how it is sharded over them.

    fits one device      data=4              a copy on each, prompts are split
    fits two             data=2, tensor=2    a copy on each pair: weights by the sharding
                                             table, caches by heads

The mesh is taken from the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from racm3_jax import sharding
from racm3_jax.model.cache import Cache
from racm3_jax.model.config import ModelConfig
from racm3_jax.model.quantization import SCALE
from racm3_jax.model.transformer import abstract_params, count_params
from racm3_jax.sharding import BATCH_AXES

MAX_ROWS = 64
# A guided prompt is two rows.
_MIN_ROWS = 2
# What the TPU's compiler needs besides weights and caches: a fraction of the caches, and
# two copies of the embedding table (a test compares the formula with the compiler).
_WORK = 0.4


def decoding_bytes(
    config: ModelConfig, num_params: int, tensor: int = 1
) -> tuple[float, float]:
    """Memory for decoding on one device: bytes of the weights, and of a row.

    Args:
      config: of the model.
      num_params: of the model.
      tensor: over how many devices the model is split.

    Returns:
      (weights and arrays derived from them, a row of `max_length` tokens and its work).
    """
    size = 4 if config.compute_dtype == "float32" else 2
    token = 2 * config.num_layers * config.kv_heads * config.head_dim * size
    row = (1 + _WORK) * token * config.max_length
    table = config.vocab_size * config.d_model
    return size * (num_params + 2 * table) / tensor, row / tensor


def choose_mesh(
    config: ModelConfig, devices: Sequence[Any], capacity: float | None
) -> Mesh:
    """As many copies of a model as fit, each over as few devices as possible.

    Args:
      config: of the model.
      devices: that decode.
      capacity: free bytes on each; None where unknown: then everything fits.
    """
    num_params = count_params(abstract_params(config))
    splits = [n for n in range(1, len(devices) + 1) if _divides(config, n, devices)]
    tensor = splits[-1]
    for split in splits:
        weights, row = decoding_bytes(config, num_params, split)
        if capacity is None or weights + _MIN_ROWS * row <= capacity:
            tensor = split
            break
    return sharding.make_mesh(tensor=tensor, devices=devices)


def _divides(config: ModelConfig, tensor: int, devices: Sequence[Any]) -> bool:
    sizes = (
        len(devices),
        config.num_heads,
        config.kv_heads,
        config.d_ff,
        config.vocab_size,
    )
    return all(size % tensor == 0 for size in sizes)


def choose_local_mesh(config: ModelConfig) -> Mesh | None:
    """`choose_mesh` for this process's devices and free memory; None is one device."""
    local = sharding.local_mesh()
    if local is None:
        return None
    devices = list(local.devices.flat)
    return choose_mesh(config, devices, free_bytes(devices))


def free_bytes(devices: Sequence[Any]) -> float | None:
    """Free memory of the fullest of these devices; None where they do not report it."""
    found = [device.memory_stats() for device in devices]
    if not all(stats and "bytes_limit" in stats for stats in found):
        return None
    return min(stats["bytes_limit"] - stats.get("bytes_in_use", 0) for stats in found)


def choose_max_rows(config: ModelConfig, params: Any) -> int:
    """Rows that one copy of a model decodes at once: a power of two, 64 at most.

    Args:
      config: of the model.
      params: on the devices whose free memory counts.
    """
    leaf = jax.tree.leaves(params)[0]
    mesh = mesh_of(params)
    free = free_bytes(list(leaf.devices()))
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    _, row = decoding_bytes(config, count_params(params), tensor)
    if free is None or MAX_ROWS * row <= free:
        return MAX_ROWS
    fitting = max(_MIN_ROWS, int(free // row))
    return 1 << (fitting.bit_length() - 1)


def place_params(config: ModelConfig, params: Any, mesh: Mesh | None) -> Any:
    """Parameters placed by the sharding table; without a mesh, on JAX's default device.

    Args:
      config: of the model.
      params: as `prepare_decoding` gives them, in 8 bits or not; on the host or not.
      mesh: from `choose_mesh` or `sharding.make_mesh`.
    """
    if mesh is None:
        return jax.device_put(params)
    table = dict(
        jax.tree_util.tree_leaves_with_path(
            sharding.shardings_for(abstract_params(config), mesh)
        )
    )
    whole = sharding.replicated(mesh)

    def put(path: Any, leaf: Any) -> Any:
        # The scales of 8-bit kernels are vectors that are not in the table.
        scale = path[-1].key == SCALE
        return jax.device_put(leaf, whole if scale else table[path])

    return jax.tree_util.tree_map_with_path(put, params)


def mesh_of(params: Any) -> Mesh | None:
    """The mesh of the parameters; None if they are on one device."""
    place = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(place, NamedSharding) or not isinstance(place.mesh, Mesh):
        return None
    known = set(BATCH_AXES) <= set(place.mesh.axis_names)
    return place.mesh if known and place.mesh.size > 1 else None


def where_params_lie(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(model, params, ...)` runs with the mesh of `params` as the current one."""

    @functools.wraps(function)
    def call(model: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        with sharding.current_mesh(mesh_of(params)):
            return function(model, params, *args, **kwargs)

    return call


def count_copies() -> int:
    """Copies of the model on the current mesh; the number of rows should be a multiple."""
    mesh = jax.sharding.get_mesh()
    return 1 if mesh.empty else sharding.count_row_shards(mesh)


def split_rows(tree: Any) -> Any:
    """Arrays on the current mesh: split by rows where these divide evenly, else copied."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    copies = sharding.count_row_shards(mesh)

    def put(x: Any) -> Any:
        return jax.device_put(x, rows if x.ndim and len(x) % copies == 0 else whole)

    return jax.tree.map(put, tree)


def constrain_cache(cache: Cache) -> Cache:
    """Keys and values split by rows and heads; inside a program, on any mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names):
        return cache
    return jax.lax.with_sharding_constraint(cache, cache_specs(cache, mesh))


def cache_specs(cache: Cache, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of each array of a cache: `[rows, heads, ...]` or `[rows, ...]`."""
    copies, tensor = sharding.count_row_shards(mesh), mesh.shape["tensor"]

    def place(x: Any) -> PartitionSpec:
        rows = BATCH_AXES if len(x) % copies == 0 else None
        if x.ndim < 4:
            return PartitionSpec(rows)
        return PartitionSpec(rows, "tensor" if x.shape[1] % tensor == 0 else None)

    return jax.tree.map(place, cache)
