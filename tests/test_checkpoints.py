from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from racm3_jax import sharding
from racm3_jax.checkpoints import (
    CheckpointError,
    Checkpoints,
    build_config,
    compute_fingerprint,
    load_weights,
    read_config,
    save_weights,
    verify_manifest,
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "experiments"))

from crash_points import crashed


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "layer_0": {
            "kernel": rng.normal(size=(3, 4)).astype(np.float32),
            "bias": jnp.arange(4.0),
        },
        "scale": np.float32(2.5),
        "count": np.arange(3, dtype=np.int32),
        "half": np.ones(2, ml_dtypes.bfloat16),
    }


def save(directory, params, **changes):
    settings = {"kind": "toy", "config": {"d": 4}, "extra": {"note": "é"}} | changes
    return save_weights(directory, params, **settings)


def test_weights_round_trip(tmp_path, params):
    fingerprint = save(tmp_path / "w", params)
    loaded, config, extra = load_weights(tmp_path / "w", "toy")
    assert (config, extra) == ({"d": 4}, {"note": "é"})
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        np.testing.assert_array_equal(got, want)
    assert read_config(tmp_path / "w")["fingerprint"] == fingerprint
    assert sorted(os.listdir(tmp_path / "w")) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_size_storage_gives_float32_back(tmp_path, params, dtype):
    save(tmp_path, params, dtype=dtype)
    loaded, _, _ = load_weights(tmp_path)
    kernel = loaded["layer_0"]["kernel"]
    assert kernel.dtype == np.float32
    assert loaded["count"].dtype == np.int32
    np.testing.assert_allclose(kernel, params["layer_0"]["kernel"], rtol=0.01)


def test_fingerprint_depends_on_values_names_and_shapes(tmp_path, params):
    first = save(tmp_path / "a", params)
    assert save(tmp_path / "b", dict(reversed(params.items()))) == first
    assert save(tmp_path / "c", {**params, "scale": np.float32(2)}) != first
    assert save(tmp_path / "d", {**params, "half": params["half"][:, None]}) != first


def test_saving_again_replaces_only_its_own_kind(tmp_path, params):
    folder = tmp_path / "w"
    save(folder, params)
    save(folder, {"w": np.zeros(2)})
    assert list(load_weights(folder)[0]) == ["w"]
    with pytest.raises(FileExistsError, match="left alone"):
        save(folder, params, kind="clip")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="left alone"):
        save(folder, params)
    assert (folder / "notes.txt").read_text() == "mine"


def test_wrong_weights_are_refused_in_one_sentence(tmp_path, params):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_weights(tmp_path)
    save(tmp_path, params)
    with pytest.raises(CheckpointError, match="of a 'toy', not of a 'clip'"):
        load_weights(tmp_path, "clip")


FILES = ("config.json", "model.safetensors", "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_every_changed_byte_is_detected(tmp_path, params, name):
    save(tmp_path, params)
    path = tmp_path / name
    content = path.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        )
        with pytest.raises(CheckpointError):
            load_weights(tmp_path)
    for changed in (content[:-1], content + b"\0", b""):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_weights(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name}|no manifest"):
        load_weights(tmp_path)


def test_a_foreign_file_is_detected(tmp_path, params):
    save(tmp_path, params)
    (tmp_path / "extra.pkl").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"extra\.pkl is not in the manifest"):
        load_weights(tmp_path)


def make_unsealed(directory):
    """A folder of format 1: two files and no checksums."""
    (directory / "manifest.json").unlink()
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))


def test_a_folder_without_checksums_opens_with_its_own_checks(tmp_path, params):
    save(tmp_path, params)
    make_unsealed(tmp_path)
    loaded, config, _ = load_weights(tmp_path, "toy")
    assert config == {"d": 4} and set(loaded) == set(params)
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        load_weights(tmp_path)
    weights.write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_weights(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, r"has no manifest\.json"),
        ({"format_version": 7}, "has format 7"),
        ({"config": [1]}, r"config=\[1\]"),
        ({"kind": {}}, "kind={}"),
        ({"storage_dtype": "int4"}, "'int4'"),
        ({"storage_dtype": [1]}, r"storage_dtype=\[1\]"),
        ({"fingerprint": 3}, "fingerprint=3"),
    ],
)
def test_a_config_of_wrong_types_is_refused_in_one_sentence(
    tmp_path, params, change, message
):
    save(tmp_path, params)
    make_unsealed(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "\xff", "1" * 9999])
def test_json_that_is_not_an_object_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json is n"):
        load_weights(tmp_path)


def test_names_that_are_not_a_tree_are_refused_in_one_sentence(tmp_path):
    for names in (("a", "a/b"), ("a/b", "a"), ("a/" * 60 + "b",)):
        folder = tmp_path / str(len(names[0]))
        save(folder, {"w": np.zeros(1, np.float32)})
        make_unsealed(folder)
        tensors = {name: np.zeros(1, np.float32) for name in names}
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        path = folder / "config.json"
        record = json.loads(path.read_text())
        record["fingerprint"] = compute_fingerprint(tensors)
        path.write_text(json.dumps(record))
        with pytest.raises(CheckpointError, match="not a name of a parameter"):
            load_weights(folder)


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int
    rate: float = 0.5
    name: str = "a"


def test_a_config_is_built_or_named():
    where = pathlib.Path("w")
    assert build_config(Sizes, {"width": 2, "rate": 1}, where) == Sizes(2, 1)
    for fields, message in (
        ({"width": "2"}, "width='2'.* wants int"),
        ({"width": True}, "width=True"),
        ({"width": 2, "height": 3}, "says height"),
        ({}, "is not a valid Sizes"),
    ):
        with pytest.raises(CheckpointError, match=message):
            build_config(Sizes, fields, where)


def test_a_save_is_old_or_new_after_any_crash(tmp_path, params):
    folder = tmp_path / "w"
    old, new = params, {"w": np.zeros(2, np.float32)}
    for first in (None, old):
        number = 0
        while True:
            number += 1
            shutil.rmtree(folder, ignore_errors=True)
            if first is not None:
                save(folder, first)
            if not crashed(lambda: save(folder, new), number):
                break
            try:
                found = set(load_weights(folder)[0])
            except CheckpointError:
                assert first is None and not folder.exists()
            else:
                assert found in (set(new), set(first or new)), number
            save(folder, new)
            assert os.listdir(tmp_path) == ["w"]
            assert set(load_weights(folder)[0]) == {"w"}
        assert number > 10


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"a/b": np.ones(1)}, "without '/'"), ({"a": [object()]}, "unbox the parameters")],
)
def test_trees_that_cannot_be_stored(tmp_path, bad, message):
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, bad)


def make_state(value, mesh_shape=(1, 1, 1)):
    devices = jax.devices()[: int(np.prod(mesh_shape))]
    mesh = sharding.make_mesh(*mesh_shape, devices=devices)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    state = {
        "w": np.arange(16, dtype=np.float32).reshape(8, 2) * value,
        "b": np.full(8, value, np.int32),
    }
    return jax.tree.map(lambda x: jax.device_put(x, place), state)


@pytest.fixture
def run_directory(tmp_path):
    """Checkpoints 2, 4 and 6, whose states are 2, 4 and 6 times the same."""
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(step, make_state(step), {"position": step})
    return tmp_path


def test_restores_to_another_mesh_bit_for_bit(run_directory, tmp_path):
    with Checkpoints(run_directory) as checkpoints:
        like = make_state(0, (1, 8, 1))
        state, extra = checkpoints.restore(checkpoints.latest_good(), like)
    assert extra == {"position": 6}
    assert state["w"].sharding == like["w"].sharding
    for got, want in zip(
        jax.tree.leaves(state), jax.tree.leaves(make_state(6)), strict=True
    ):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_keeps_the_newest_and_saves_a_step_once(tmp_path):
    with Checkpoints(tmp_path, keep=2, save_interval=2) as checkpoints:
        assert [step for step in range(1, 7) if checkpoints.should_save(step)] == [
            2,
            4,
            6,
        ]
        assert checkpoints.latest_good() is None
        for step in (2, 4, 6, 6):
            checkpoints.save(step, make_state(step))
        checkpoints.wait()
        assert checkpoints.steps() == [4, 6]
        assert checkpoints.latest_good() == 6


def test_the_state_may_be_donated_right_after_saving(tmp_path):
    scramble = jax.jit(
        lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0
    )
    state = make_state(3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        state = scramble(state)
        restored, _ = checkpoints.restore(1, state)
    np.testing.assert_array_equal(restored["w"], make_state(3)["w"])


def damage_flip(step_directory):
    data = max(step_directory.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def damage_truncate(step_directory):
    data = max(step_directory.rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])


def damage_remove(step_directory):
    (step_directory / "state" / "manifest.ocdbt").unlink()


def damage_add(step_directory):
    (step_directory / "state" / "stray").write_text("x")


def damage_unfinished(step_directory):
    (step_directory / "manifest.json").unlink()


def damage_manifest(step_directory):
    (step_directory / "manifest.json").write_text('{"files": 3}')


@pytest.mark.parametrize(
    "damage",
    [
        damage_flip,
        damage_truncate,
        damage_remove,
        damage_add,
        damage_unfinished,
        damage_manifest,
    ],
)
def test_damage_is_quarantined_and_the_step_before_is_taken(run_directory, damage):
    damage(run_directory / "6")
    assert verify_manifest(run_directory / "6")
    with Checkpoints(run_directory) as checkpoints:
        with pytest.raises(CheckpointError, match="checkpoint 6 .* is not usable"):
            checkpoints.restore(6, make_state(0))
        assert checkpoints.latest_good(quarantine=False) == 4
        assert checkpoints.steps() == [2, 4, 6]
        assert checkpoints.latest_good() == 4
        assert checkpoints.steps() == [2, 4]
        assert (run_directory / "quarantine" / "6.0").is_dir()
        state, _ = checkpoints.restore(4, make_state(0))
        np.testing.assert_array_equal(state["b"], np.full(8, 4))
        checkpoints.save(6, make_state(6))
        assert checkpoints.latest_good() == 6


def test_wrong_restores_are_refused_in_one_sentence(run_directory):
    with Checkpoints(run_directory) as checkpoints:
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; it has"):
            checkpoints.restore(5, make_state(0))
        like = make_state(0)
        other = {**like, "w": jnp.ones((4, 2))}
        with pytest.raises(
            CheckpointError, match=r"w is float32\[8, 2\], not float32\[4, 2\]"
        ):
            checkpoints.restore(6, other)
        with pytest.raises(CheckpointError, match=r"b is int32\[8\], not absent"):
            checkpoints.restore(6, {"w": like["w"]})


def test_manifest_lists_every_file(run_directory):
    record = json.loads((run_directory / "4" / "manifest.json").read_text())
    assert record["format_version"] == 2
    assert any(name.startswith("state/") for name in record["files"])
    assert verify_manifest(run_directory / "4") is None


def test_a_step_that_an_earlier_version_saved_is_good(run_directory):
    path = run_directory / "6" / "manifest.json"
    record = json.loads(path.read_text()) | {"format_version": 1}
    record.pop("sha256")
    path.write_text(json.dumps(record))
    assert verify_manifest(run_directory / "6") is None
    (run_directory / "6" / "stray").write_text("x")
    assert verify_manifest(run_directory / "6") == "stray is not in the manifest"


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be >= 1; got 0"):
        Checkpoints(tmp_path, keep=0)
