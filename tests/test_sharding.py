from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from racm3_jax import sharding
from racm3_jax.sharding import ShardingError, make_mesh, partition_spec, shardings_for


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 2, 2)


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 8, 1, 1)),
        ({"tensor": 4}, (1, 2, 1, 4)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (1, 2, 2, 2)),
        ({"dcn": 2}, (2, 4, 1, 1)),
        ({"dcn": 2, "data": 1, "fsdp": -1}, (2, 1, 4, 1)),
        ({"data": -1, "fsdp": -1, "tensor": 2}, (1, 1, 4, 2)),
    ],
)
def test_sizes_of_the_mesh(sizes, shape):
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == sharding.MESH_AXES
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("num_devices", "platform", "sizes", "data", "fsdp"),
    [
        (64, "tpu", {}, 2, 32),
        (64, "tpu", {"tensor": 4}, 1, 16),
        (128, "tpu", {"dcn": 2}, 2, 32),
        (8, "tpu", {}, 1, 8),
        (64, "gpu", {}, 1, 64),
        (64, "tpu", {"data": 1}, 1, 64),
    ],
)
def test_a_tpu_slice_does_not_reduce_over_all_of_its_devices(
    num_devices, platform, sizes, data, fsdp
):
    sizes = {"data": -1, "fsdp": -1} | sizes
    found = sharding.mesh_sizes(num_devices, platform=platform, **sizes)
    assert (found["data"], found["fsdp"]) == (data, fsdp)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, "does not fit 8 devices"),
        ({"data": 3}, "does not fit 8 devices"),
        ({"dcn": 16}, "does not fit 8 devices"),
        ({"dcn": -1}, "one of data, fsdp and tensor may be -1"),
        ({"data": -1, "tensor": -1}, "or both data and fsdp"),
        ({"data": 0}, "sizes must be >= 1"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(ShardingError, match=message):
        make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class FakeTpu:
    """The attributes of a chip of a torus that `make_mesh` reads."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    device_kind: str
    platform: str = "tpu"
    process_index: int = 0
    core_on_chip: int = 0


def make_slices(count, shape, kind):
    chips = itertools.product(range(count), *map(range, shape))
    return [
        FakeTpu(i, tuple(coords), index, kind)
        for i, (index, *coords) in enumerate(chips)
    ]


@pytest.mark.parametrize(
    ("shape", "kind", "sizes", "expected"),
    [
        ((4, 4, 4), "TPU v5", {"tensor": 2, "data": 1, "fsdp": -1}, (1, 1, 32, 2)),
        ((4, 4, 4), "TPU v5", {"data": 2, "fsdp": 32}, (1, 2, 32, 1)),
        ((8, 8, 1), "TPU v6 lite", {"tensor": 4, "data": 1, "fsdp": -1}, (1, 1, 16, 4)),
        ((2, 2, 4), "TPU v5", {"tensor": 4, "data": 1, "fsdp": -1}, (1, 1, 4, 4)),
    ],
)
def test_meshes_that_split_an_axis_of_the_torus(shape, kind, sizes, expected):
    devices = make_slices(1, shape, kind)
    mesh = make_mesh(**sizes, devices=devices)
    assert mesh.devices.shape == expected
    assert set(mesh.devices.flat) == set(devices)


def test_slices_are_along_dcn():
    devices = make_slices(2, (8, 8, 1), "TPU v5 lite")
    mesh = make_mesh(data=-1, fsdp=-1, dcn=2, devices=devices)
    assert mesh.devices.shape == (2, 2, 32, 1)
    for index, own in enumerate(mesh.devices):
        assert {device.slice_index for device in own.flat} == {index}
    with pytest.raises(ShardingError, match=r"2 slices of \[64, 64\].*mesh.dcn=2"):
        make_mesh(data=1, fsdp=-1, devices=devices)
    with pytest.raises(ShardingError, match=r"2 slices of \[62, 64\]"):
        make_mesh(data=-1, dcn=2, devices=devices[:-2])


@pytest.mark.parametrize(
    ("names", "spec"),
    [
        (("embed", "mlp"), ("fsdp", "tensor")),
        (("mlp", "embed"), ("tensor", "fsdp")),
        (("embed", "embed"), ("fsdp", "tensor")),
        (("vocab", "embed"), ("tensor", "fsdp")),
        (("layers", "embed", "heads", "head_dim"), (None, "fsdp", "tensor", None)),
        (("embed", None), ("fsdp", None)),
        (("norm",), (None,)),
    ],
)
def test_the_table(mesh, names, spec):
    assert partition_spec("w", names, (8,) * len(names), mesh) == PartitionSpec(*spec)


def test_every_rule_names_axes_of_the_mesh():
    for choices in sharding.LOGICAL_RULES.values():
        assert set(choices) <= {"fsdp", "tensor"}


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        (("embed", "nose"), (8, 8), "parameter a/w: logical axis 'nose' has no rule"),
        (("mlp", "vocab"), (8, 8), "'vocab' wants mesh axis 'tensor', which 'mlp'"),
        (("embed",), (8, 8), r"shape \[8, 8\] but 1 axis names"),
        (("embed", "mlp"), (7, 8), "'embed' of size 7 does not divide"),
    ],
)
def test_parameters_that_the_table_does_not_cover_are_an_error(
    mesh, names, shape, message
):
    with pytest.raises(ShardingError, match=message):
        partition_spec("a/w", names, shape, mesh)


def test_a_whole_module(mesh):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_logical_partitioning(
                nn.initializers.normal(), ("embed", "mlp")
            )
            return nn.Dense(4, kernel_init=init, name="up")(x)

    boxed = jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((1, 2)))
    placed = shardings_for(boxed, mesh)["params"]["up"]
    assert placed["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert placed["bias"].spec == PartitionSpec()


def test_a_matrix_without_names_is_an_error(mesh):
    with pytest.raises(ShardingError, match=r"parameter a/kernel of shape \[2, 2\]"):
        shardings_for({"a": {"kernel": jnp.ones((2, 2))}}, mesh)


def test_batches_are_split_by_rows(mesh):
    batch = {"x": np.arange(8.0).reshape(4, 2), "step": np.int32(3)}
    placed = sharding.shard_batch(batch, mesh)
    assert placed["x"].sharding.spec == PartitionSpec(("dcn", "data", "fsdp"))
    assert placed["x"].addressable_shards[0].data.shape == (1, 2)
    assert placed["step"].sharding.is_fully_replicated
    np.testing.assert_array_equal(placed["x"], batch["x"])
    again = sharding.shard_batch(placed, mesh)
    assert again["x"] is placed["x"]


class FakeDevice:
    def __init__(self, process_index):
        self.process_index = process_index


def fake_mesh(sizes, order, num_processes):
    """Devices of several processes, as many on each, in some order."""
    num = len(order) // num_processes
    devices = [FakeDevice(i // num) for i in order]
    return np.array(devices).reshape(sizes)


def rows_of(mesh, num_rows, monkeypatch, devices):
    """`local_rows` of each process, as if the mesh's devices were these."""
    shards = sharding.count_row_shards(mesh)
    grid = devices.reshape(shards, -1)
    size = num_rows // shards

    def places(self, shape):
        return {
            device: (slice(i * size, (i + 1) * size),)
            for i, row in enumerate(grid)
            for device in row
        }

    monkeypatch.setattr(jax.sharding.NamedSharding, "devices_indices_map", places)
    processes = sorted({d.process_index for d in devices.flat})
    return [sharding.local_rows(mesh, num_rows, p).tolist() for p in processes]


@pytest.mark.parametrize(
    ("sizes", "order", "expected"),
    [
        ((4, 1, 1), [0, 1, 2, 3], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ((2, 1, 2), [0, 1, 2, 3], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ((2, 1, 2), [0, 2, 1, 3], [[*range(8)], [*range(8)]]),
        ((1, 4, 1), [0, 2, 1, 3], [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ((1, 1, 4), [0, 1, 2, 3], [[*range(8)], [*range(8)]]),
    ],
)
def test_rows_belong_to_shards(monkeypatch, sizes, order, expected):
    """The diagram of `local_rows`, and a torus whose hosts' shards are not neighbours."""
    mesh = make_mesh(*sizes, devices=jax.devices()[:4])
    devices = fake_mesh(sizes, order, 2)
    assert rows_of(mesh, 8, monkeypatch, devices) == expected


def test_rows_that_the_mesh_does_not_divide_are_refused(mesh):
    assert sharding.local_rows(mesh, 8).tolist() == list(range(8))
    with pytest.raises(ShardingError, match="a batch of 6 rows does not divide over 4"):
        sharding.local_rows(mesh, 6)


@pytest.mark.parametrize(
    ("rows", "num_devices", "sizes"),
    [
        (0, 1, []),
        (1, 1, [1]),
        (9, 1, [16]),
        (20, 1, [16, 2, 2]),
        (32, 1, [16, 16]),
        (1, 2, [2]),
        (9, 2, [4, 4, 2]),
    ],
)
def test_few_rows_cost_little(rows, num_devices, sizes):
    """Few shapes are compiled, with little wasted computation."""
    seen = []

    def double(x):
        seen.append(len(x))
        return 2 * x

    mesh = None
    if num_devices > 1:
        mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
    parts = sharding.map_batches(double, [np.arange(rows)], 16, mesh)
    assert seen == sizes
    got = np.concatenate([np.zeros(0), *parts])
    np.testing.assert_array_equal(got, 2 * np.arange(rows))
