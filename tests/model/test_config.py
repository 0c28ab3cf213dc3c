"""Presets by shape, and the refusals of `ModelConfig`."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import pytest

from racm3_jax.model import transformer
from racm3_jax.model.config import PRESETS, ModelConfig, racm3_2b7, tiny
from racm3_jax.model.transformer import abstract_params, count_params
from racm3_jax.sharding import make_mesh, shardings_for

BILLIONS = {"racm3_2b7": 2.7, "racm3_2b7_fidelity": 2.7, "chameleon_7b": 7.0}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_builds_by_shape(name):
    params = abstract_params(PRESETS[name]())
    if name in BILLIONS:
        assert count_params(params) / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


def test_shapes_are_traced_once_and_the_callers_trees_are_their_own(monkeypatch):
    config = tiny(num_layers=1, vocab_size=77)
    first = abstract_params(config)
    expected = jax.tree.structure(first)
    first["layers_0"].clear()
    monkeypatch.setattr(transformer, "init_params", None)
    assert jax.tree.structure(abstract_params(config)) == expected
    with pytest.raises(TypeError, match="not callable"):
        abstract_params(tiny(num_layers=1, vocab_size=78))


def test_both_2b7_presets_have_as_many_parameters():
    sizes = {
        count_params(abstract_params(PRESETS[name]()))
        for name in ("racm3_2b7", "racm3_2b7_fidelity")
    }
    assert len(sizes) == 1


@pytest.mark.parametrize("mesh_shape", [(2, 4, 1), (2, 2, 2), (1, 8, 1)])
@pytest.mark.parametrize("name", ["racm3_2b7", "racm3_2b7_fidelity", "chameleon_7b"])
def test_whole_sharding(name, mesh_shape):
    boxed = abstract_params(PRESETS[name]())
    mesh = make_mesh(*mesh_shape)
    shardings = shardings_for(boxed, mesh)
    params = nn.unbox(boxed)
    assert jax.tree.structure(shardings) == jax.tree.structure(params)
    per_device = sum(
        leaf_size(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(
            jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True
        )
    )
    split = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert per_device < 1.01 * count_params(params) / split


def leaf_size(shape):
    size = 1
    for length in shape:
        size *= length
    return size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batchnorm"}, "model.norm is 'batchnorm'; allowed: layernorm"),
        ({"num_layers": 0}, "model.num_layers must be >= 1; got 0"),
        ({"num_kv_heads": 3}, "model.num_kv_heads is 3; use a divisor of num_heads=2"),
        ({"dropout": 1.0}, "model.dropout is 1.0; use 0 <= dropout < 1"),
        ({"position": "rope", "head_dim": 5}, "head_dim is 5; rope needs it even"),
    ],
)
def test_wrong_values_are_refused_in_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)


def test_presets_take_changes():
    config = racm3_2b7(num_layers=2)
    assert (config.num_layers, config.d_model) == (2, 2560)
    assert isinstance(dataclasses.replace(config, vocab_size=10), ModelConfig)
