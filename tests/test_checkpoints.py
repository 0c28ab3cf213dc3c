from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from racm3_jax import sharding
from racm3_jax.checkpoints import (
    CheckpointError,
    Checkpoints,
    load_weights,
    read_config,
    save_weights,
    verify_manifest,
)


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
    assert sorted(os.listdir(tmp_path / "w")) == ["config.json", "model.safetensors"]


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


def test_saving_again_replaces_and_keeps_other_files(tmp_path, params):
    (tmp_path / "tokenizer.json").write_text("{}")
    save(tmp_path, params)
    save(tmp_path, {"w": np.zeros(2)})
    assert list(load_weights(tmp_path)[0]) == ["w"]
    assert (tmp_path / "tokenizer.json").exists()


def test_wrong_weights_answer_in_one_sentence(tmp_path, params):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_weights(tmp_path)
    save(tmp_path, params)
    with pytest.raises(CheckpointError, match="of a 'toy', not of a 'clip'"):
        load_weights(tmp_path, "clip")
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


def test_wrong_restores_answer_in_one_sentence(run_directory):
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
    assert record["format_version"] == 1
    assert any(name.startswith("state/") for name in record["files"])
    assert verify_manifest(run_directory / "4") is None


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be >= 1; got 0"):
        Checkpoints(tmp_path, keep=0)
