"""The device mesh, and the one table that says how every parameter is sharded.

The mesh has four axes: `dcn` and `data` (batch split, parameters replicated), `fsdp`
(batch and parameters split) and `tensor` (parameters split, batch replicated).
`dcn` is across a slow network, between TPU slices: only gradients cross it.
Modules name the *logical* axes of their parameters (`nn.with_logical_partitioning`);
`LOGICAL_RULES` maps names to mesh axes. The table is total: an unknown name, a matrix
without names, a mesh axis used twice or a size that does not divide is an error that
names the parameter; nothing is replicated by accident.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int64

MESH_AXES = ("dcn", "data", "fsdp", "tensor")

# Choices in order: the first mesh axis that no earlier dimension of the parameter uses.
# An empty tuple means "replicated along this dimension". What is small in every preset
# (convolutions, patches, codebooks, positions, norms) is replicated.
LOGICAL_RULES: dict[str, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "embed": ("fsdp", "tensor"),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "panel": (),
    "layers": (),
    "length": (),
    "position": (),
    "patch": (),
    "norm": (),
    "codes": (),
    "conv_in": (),
    "conv_out": (),
}

BATCH_AXES = ("dcn", "data", "fsdp")


class ShardingError(ValueError):
    """A parameter or a batch that the mesh and the table cannot place."""


def mesh_sizes(
    num_devices: int,
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    dcn: int = 1,
    platform: str = "",
) -> dict[str, int]:
    """The size of every mesh axis, with the -1 filled in.

    If `data` and `fsdp` are both -1, the weights are split as far as it pays off: over
    all devices of a slice, but over half of them on a TPU slice of 16 or more. Over all
    devices of a TPU slice, XLA turns reduce-scatters into full all-reduces (and on a
    three-dimensional slice all-gathers, too), which send two to four times the bytes
    of the same operations over any smaller group.

    Args:
      num_devices: of all slices.
      data: number of data-parallel copies of the model; -1: the rest.
      fsdp: number of devices over which parameters, optimizer state and rows are split;
        -1: the rest.
      tensor: number of devices over which a layer's heads and width are split; -1: the
        rest.
      dcn: copies connected by a data-centre network: slices of a TPU pod.
      platform: "tpu", "gpu" or "cpu".

    Raises:
      ShardingError: the sizes do not multiply to the number of devices.
    """
    sizes = {"dcn": dcn, "data": data, "fsdp": fsdp, "tensor": tensor}
    wanted = " x ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if (
        any(size < 1 and size != -1 for size in sizes.values())
        or "dcn" in free
        or (len(free) > 1 and free != ["data", "fsdp"])
    ):
        raise ShardingError(
            f"mesh {wanted}: sizes must be >= 1; one of data, fsdp and tensor may be "
            "-1 (the rest), or both data and fsdp (chosen automatically)"
        )
    rest = num_devices // math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 2:
        spare = platform == "tpu" and tensor == 1 and rest >= 16 and rest % 2 == 0
        sizes["data"] = 2 if spare else 1
        rest //= sizes["data"]
    if free:
        sizes[free[-1]] = rest
    if math.prod(sizes.values()) != num_devices:
        raise ShardingError(
            f"mesh {wanted} does not fit {num_devices} devices: the sizes must "
            "multiply to the number of devices"
        )
    return sizes


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    dcn: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Builds the mesh `(dcn, data, fsdp, tensor)`; for the sizes see `mesh_sizes`.

    Args:
      data: see `mesh_sizes`.
      fsdp: see `mesh_sizes`.
      tensor: see `mesh_sizes`.
      dcn: see `mesh_sizes`; with several TPU slices, their number.
      devices: the devices to use; all of them by default.

    Raises:
      ShardingError: the sizes do not match the devices or their slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    platform = devices[0].platform
    sizes = mesh_sizes(
        len(devices), data=data, fsdp=fsdp, tensor=tensor, dcn=dcn, platform=platform
    )
    slices: dict[int, list[Any]] = {}
    if platform == "tpu":
        for device in devices:
            slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    shape = tuple(sizes.values())
    if len(slices) > 1:
        if dcn != len(slices) or len({len(own) for own in slices.values()}) > 1:
            raise ShardingError(
                f"mesh dcn={dcn}, but the devices are {len(slices)} slices of "
                f"{sorted(len(own) for own in slices.values())}: use slices of one "
                f"size and --config.mesh.dcn={len(slices)}"
            )
        placed = np.stack(
            [_on_the_torus(shape[1:], slices[index]) for index in sorted(slices)]
        )
    elif platform == "tpu":
        placed = _on_the_torus(shape, devices)
    else:
        placed = np.asarray(devices).reshape(shape)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _on_the_torus(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices of one slice, with neighbours along the axes that communicate most.

    A mesh axis that does not match the torus' axes, e.g. 2 on 4x4x4, takes part of one.
    """
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def current_platform() -> str:
    """ "cpu", "gpu" or "tpu": the platform of the program that is being traced.

    It is the current mesh's (`jax.set_mesh`), so that a program can be compiled for
    absent devices; without a mesh, JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 is fast on the platform of the program that is being traced.

    CPUs need native support (AMX, AVX-512 BF16, Arm's BF16), as Linux reports it.
    """
    named = {"amx_bf16", "avx512_bf16", "bf16"}
    return current_platform() != "cpu" or not named.isdisjoint(_cpu_features())


@functools.cache
def _cpu_features() -> frozenset[str]:
    """Features of this machine's first CPU; empty if unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def current_device_kind() -> str:
    """JAX's device kind of the current mesh, or of its default devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def partition_spec(
    path: str,
    names: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
) -> PartitionSpec:
    """The sharding of one parameter, by the table.

    ```
    names  ("embed", "mlp")   on (data=2, fsdp=2, tensor=2)  -> P("fsdp", "tensor")
    names  ("embed", "embed")                                -> P("fsdp", "tensor")
    names  ("mlp", "vocab")                                  -> error, "tensor" twice
    ```

    Args:
      path: the parameter's name, for errors.
      names: one logical name per dimension; None means replicated.
      shape: its shape.
      mesh: from `make_mesh`.

    Raises:
      ShardingError: unknown name, mesh axis used twice, or size not divisible.
    """
    if len(names) != len(shape):
        raise ShardingError(
            f"parameter {path} has shape {list(shape)} but {len(names)} axis names "
            f"{list(names)}: name every dimension"
        )
    taken: dict[str, str] = {}
    spec: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        if name is None:
            spec.append(None)
            continue
        if name not in LOGICAL_RULES:
            raise ShardingError(
                f"parameter {path}: logical axis {name!r} has no rule; known: "
                f"{sorted(LOGICAL_RULES)}"
            )
        choices = LOGICAL_RULES[name]
        axis = next((choice for choice in choices if choice not in taken), None)
        if choices and axis is None:
            raise ShardingError(
                f"parameter {path}: axis {name!r} wants mesh axis {choices[0]!r}, "
                f"which {taken[choices[0]]!r} already uses; names are {list(names)}"
            )
        if axis is not None:
            taken[axis] = name
            if size % mesh.shape[axis]:
                raise ShardingError(
                    f"parameter {path}: axis {name!r} of size {size} does not divide "
                    f"by mesh axis {axis!r} of {mesh.shape[axis]}; pad that size or "
                    "choose another mesh"
                )
        spec.append(axis)
    return PartitionSpec(*spec)


def shardings_for(abstract_boxed_params: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for every parameter of a tree.

    Args:
      abstract_boxed_params: arrays or `jax.ShapeDtypeStruct`s from `module.init` (by
        `jax.eval_shape`), boxed with their logical axis names. Vectors and scalars may
        have no names and are replicated.
      mesh: from `make_mesh`.

    Returns:
      The unboxed tree's structure with `NamedSharding` leaves.

    Raises:
      ShardingError: the table does not cover a parameter.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, nn.Partitioned):
            spec = partition_spec(name, leaf.names, leaf.value.shape, mesh)
        elif len(leaf.shape) <= 1:
            spec = PartitionSpec()
        else:
            raise ShardingError(
                f"parameter {name} of shape {list(leaf.shape)} has no logical axis "
                "names: create it through nn.with_logical_partitioning"
            )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(
        place, abstract_boxed_params, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over `dcn`, `data` and `fsdp`; other dimensions are not split."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def constrain_rows(x: Any) -> Any:
    """Keeps activations split by rows, as the batch is; for use inside a model or loss.

    Without it the compiler may follow the parameters instead and split the width over
    `fsdp`, which gathers every row on every device. Outside a training step (no current
    mesh) it does nothing.

    Args:
      x: an array whose first dimension is the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


class SharedFolder(Protocol):
    """A folder of which each process has a copy; `mirror.Mirror` is one."""

    def push(self) -> None: ...

    def pull(self) -> None: ...


# Of this process's training: at most one.
_shared: list[SharedFolder] = []


@contextlib.contextmanager
def sharing(folder: SharedFolder) -> Iterator[None]:
    """In this context, `leader_first` also copies what process 0 wrote to `folder`."""
    _shared.append(folder)
    try:
        yield
    finally:
        _shared.remove(folder)


@contextlib.contextmanager
def leader_first() -> Iterator[None]:
    """Process 0 runs the block first; then all others do and find its results."""
    if jax.process_count() == 1:
        yield
        return
    from jax.experimental import multihost_utils

    if jax.process_index() != 0:
        multihost_utils.sync_global_devices("leader first")
        for folder in _shared:
            folder.pull()
    try:
        yield
    finally:
        if jax.process_index() == 0:
            try:
                for folder in _shared:
                    folder.push()
            finally:
                multihost_utils.sync_global_devices("leader first")


def local_rows(
    mesh: Mesh, num_rows: int, process_index: int | None = None
) -> Int64[np.ndarray, " rows"]:
    """The rows of a batch that this process holds, and therefore makes, ascending.

    Rows belong to shards. If `tensor` spans processes, several hold the same rows,
    and each of them makes all of these:

        2 processes of 2 devices, 8 rows      process 0           process 1
        data=4                                0 1 2 3             4 5 6 7
        data=2, tensor=2, within a process    0 1 2 3             4 5 6 7
        data=2, tensor=2, across              0 1 2 3 4 5 6 7     0 1 2 3 4 5 6 7

    Args:
      mesh: from `make_mesh`.
      num_rows: of the whole batch.
      process_index: the process; this one by default.

    Raises:
      ShardingError: the mesh does not divide the number of rows.
    """
    if process_index is None:
        process_index = jax.process_index()
    num_shards = count_row_shards(mesh)
    if num_rows % num_shards:
        raise ShardingError(
            f"a batch of {num_rows} rows does not divide over {num_shards} "
            f"devices ({' x '.join(BATCH_AXES)}): change the number of rows or the mesh"
        )
    places = batch_sharding(mesh).devices_indices_map((num_rows,))
    held = {
        rows.indices(num_rows)[:2]
        for device, (rows,) in places.items()
        if device.process_index == process_index
    }
    return np.concatenate(
        [np.arange(*bounds, dtype=np.int64) for bounds in sorted(held)]
    )


def count_row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of shards of a batch's rows."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a pytree of host arrays on the mesh: rows split, scalars replicated.

    With several processes each passes its own rows, those of `local_rows`.
    Arrays that are on the mesh already pass through.

    Raises:
      ShardingError: the mesh does not divide the number of rows.
    """
    rows_sharding, scalar_sharding = batch_sharding(mesh), replicated(mesh)
    num_shards = count_row_shards(mesh)
    held = local_rows(mesh, num_shards)  # shards in place of rows

    def put(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == set(
            mesh.devices.flat
        ):
            return leaf
        leaf = np.asarray(leaf)
        if leaf.ndim == 0:
            return jax.device_put(leaf, scalar_sharding)
        size, rest = divmod(len(leaf), len(held))
        if rest:
            raise ShardingError(
                f"a batch of {len(leaf)} rows does not divide over {len(held)} "
                f"devices ({' x '.join(BATCH_AXES)}) of this process: change the number "
                "of rows or the mesh"
            )
        if len(held) == num_shards and jax.process_count() == 1:
            return jax.device_put(leaf, rows_sharding)

        def read(index: Any) -> np.ndarray:
            shard = index[0].indices(size * num_shards)[0] // size
            place = int(np.searchsorted(held, shard)) * size
            return leaf[place : place + size]

        shape = (size * num_shards, *leaf.shape[1:])
        return jax.make_array_from_callback(shape, rows_sharding, read)

    return jax.tree.map(put, batch)


def local_mesh() -> Mesh | None:
    """A mesh of this process's devices, each with a copy of the model and its own rows.

    None for one device. CPU devices share the same cores, so several of them are not
    faster: they count as one.
    """
    devices = jax.local_devices()
    if len(devices) == 1 or devices[0].platform == "cpu":
        return None
    return make_mesh(devices=devices)


def put_copies(tree: Any, mesh: Mesh | None) -> Any:
    """A full copy on every device of a mesh; without one on JAX's default device."""
    return jax.device_put(tree, None if mesh is None else replicated(mesh))


def current_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """`with current_mesh(mesh):` is `jax.set_mesh`; without a mesh nothing changes."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def on_each_device(compute: Callable[..., Any], shared: Any, *rows: Any) -> Any:
    """`compute(shared, *rows)`, by each device of the current mesh on its own rows.

    For programs with independent rows: devices do not communicate. Without a mesh, or
    on one device, it is a plain call.

    Args:
      compute: `compute(shared, *rows)` -> an array with as many rows.
      shared: replicated on every device.
      rows: arrays that are split as a batch is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names) or mesh.size == 1:
        return compute(shared, *rows)
    split = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        compute,
        in_specs=(PartitionSpec(), *[split] * len(rows)),
        out_specs=split,
        check_vma=False,
    )(shared, *rows)


def _next_batch(left: int, batch_size: int, num_shards: int) -> int:
    """Rows of the next batch of `map_batches`, over all shards."""
    size = batch_size
    while size > 1 and 2 * left <= size * num_shards:
        size = max(1, size // 8)
    return size * num_shards


def map_batches(
    compute: Callable[..., Any],
    columns: Sequence[np.ndarray],
    batch_size: int,
    mesh: Mesh | None = None,
) -> list[np.ndarray]:
    """`compute(*columns)` batch by batch, with few compiled programs for any length.

    The rest after the full batches goes in batches of an eighth, and so on down to one
    row, so that one image costs one image; a batch that is more than half full is
    padded with its last row. With batch_size=16:

        one device     1 row: 1          9 rows: 16         20 rows: 16, 2, 2
        two devices    1 row: 1 | 1      9 rows: 2 | 2, 2 | 2, 1 | 1

    Args:
      compute: function of a batch; returns as many rows.
      columns: arrays with the same number of rows.
      batch_size: maximum rows per device at a time.
      mesh: the rows are split over its devices.

    Returns:
      The results of each batch, without the padding.
    """
    num_shards = 1 if mesh is None else count_row_shards(mesh)
    total, start = len(columns[0]), 0
    parts: list[np.ndarray] = []
    running: list[tuple[Any, int]] = []
    with current_mesh(mesh):
        while start < total:
            size = _next_batch(total - start, batch_size, num_shards)
            index = np.arange(start, start + size).clip(max=total - 1)
            batch = [column[index] for column in columns]
            if mesh is not None:
                batch = jax.device_put(batch, batch_sharding(mesh))
            running.append((compute(*batch), min(size, total - start)))
            if len(running) > 1:  # one is fetched while the next is computed
                out, num_rows = running.pop(0)
                parts.append(np.asarray(out)[:num_rows])
            start += size
    return [*parts, *(np.asarray(out)[:num_rows] for out, num_rows in running)]
