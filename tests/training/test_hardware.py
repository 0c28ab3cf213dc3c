"""The arithmetic of plans: counted by hand, and against known trainings."""

from __future__ import annotations

import dataclasses
import pathlib
import types

import jax
import pytest
from ml_collections import ConfigDict

from racm3_jax import cli, run
from racm3_jax.model.config import ModelConfig, racm3_2b7
from racm3_jax.model.transformer import abstract_params, count_params
from racm3_jax.training.hardware import (
    DEVICES,
    activation_bytes,
    explain_out_of_memory,
    find_device,
    flops_per_token,
    plan_training,
    suggest_changes,
)

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
SMALL = ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=2, head_dim=16)


def test_flops_are_six_a_parameter_plus_attention():
    params = count_params(abstract_params(SMALL))
    positions = SMALL.max_length * SMALL.d_model
    expected = 6 * (params - positions) + 6 * 2 * 32 * 100
    assert flops_per_token(SMALL, params, 100) == expected
    untied = dataclasses.replace(SMALL, tie_embeddings=False)
    more = count_params(abstract_params(untied))
    assert flops_per_token(untied, more, 100) == expected  # looked up, not multiplied


def plan(config, num_params, rows, **more):
    return plan_training(
        config,
        num_params,
        DEVICES["h200"],
        8,
        rows=rows,
        row_length=4096,
        num_steps=1000,
        shards=8,
        **more,
    )


@pytest.fixture(scope="module")
def paper():
    config = racm3_2b7()
    return config, count_params(abstract_params(config))


def test_the_papers_model_on_eight_cards(paper):
    """About 16k tokens/s a card, as same-shape trainings report; 2.7B fits."""
    config, num_params = paper
    assert 2.6e9 < num_params < 2.9e9
    found = plan(config, num_params, rows=16)
    assert found.weights * 8 == 4 * num_params
    assert found.optimizer == 2 * found.weights
    assert 15_000 < found.tokens_per_second / 8 < 25_000
    assert found.total < found.memory and found.largest_rows >= 2
    assert found.hours == pytest.approx(
        1000 * 16 * 4096 / found.tokens_per_second / 3600
    )


def test_what_does_not_fit_is_mended_by_what_is_suggested(paper):
    config, num_params = paper
    found = plan(config, num_params, rows=256)
    assert found.total > found.memory
    changes = suggest_changes(config, found, 256)
    assert 'remat="dots"' in changes[0] and "num_microbatches" in changes[-1]
    parts = -(-256 // 8 // found.largest_rows)
    mended = plan(config, num_params, rows=256, num_microbatches=parts)
    assert mended.total < mended.memory


def test_recomputation_keeps_less():
    kept = [
        activation_bytes(dataclasses.replace(racm3_2b7(), remat=remat), 4096)
        for remat in ("none", "dots", "full")
    ]
    assert kept[0] > kept[1] > kept[2] > 0


def test_devices_are_found_by_jax_names():
    assert find_device("NVIDIA H200") is DEVICES["h200"]
    assert find_device("TPU v5 lite") is DEVICES["v5e"]
    assert find_device("TPU v5") is DEVICES["v5p"]
    assert find_device(jax.devices()[0].device_kind) is None  # a CPU


def test_the_command(capsys):
    config = f"--config={CONFIGS}/racm3_2b7.py"
    assert cli.main(["estimate", config, "--device=h200:8"]) == 0
    text = capsys.readouterr().out
    assert "8 h200; weights split over 8, 1 copies" in text and "tokens/s" in text
    assert cli.main(["estimate", config, "--device=h900:8"]) == 2
    assert "known are a100" in capsys.readouterr().err
    assert cli.main(["estimate", config, "--device=h200:x"]) == 2
    assert "give a number" in capsys.readouterr().err


def make_config():
    sections = {
        "kind": "generator",
        "model": {"remat": "none", "compute_dtype": "bfloat16"},
        "train": {"num_microbatches": 2, "checkpoint_every": 1, "num_steps": 1},
        "mesh": {"data": -1, "fsdp": 1},
        "pipeline": {"rows": 16},
        "optimizer": {},
    }
    return ConfigDict(sections)


def test_a_full_memory_ends_with_what_would_mend_it(monkeypatch, tmp_path):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while ...")

    def fail(config, workdir):
        raise error

    monkeypatch.setattr(run.wiring, "build_job", fail)
    read = types.SimpleNamespace(train=None)  # of a config that is not whole
    monkeypatch.setattr(run.wiring, "read_training", lambda config: read)
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        run.train(make_config(), tmp_path, progress=False)
    advice = raised.value.__notes__[-1].splitlines()[1:]
    assert [line.split("=")[0].strip() for line in advice] == [
        "--config.model.remat",
        "--config.model.remat",
        "--config.train.num_microbatches",
        "--config.mesh.fsdp",
        "--config.pipeline.rows below 16",
    ]
    assert explain_out_of_memory(ValueError("another"), make_config()) == ""
