"""The arithmetic of plans: computed by hand, and against known trainings."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
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
    estimate_training,
    explain_out_of_memory,
    find_device,
    flops_per_token,
    format_bytes,
    suggest_changes,
)

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "training"
SMALL = ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=2, head_dim=16)


def test_flops_are_six_per_parameter_plus_attention():
    params = count_params(abstract_params(SMALL))
    positions = SMALL.max_length * SMALL.d_model
    expected = 6 * (params - positions) + 6 * 2 * 32 * 100
    assert flops_per_token(SMALL, params, 100) == expected
    untied = dataclasses.replace(SMALL, tie_embeddings=False)
    more = count_params(abstract_params(untied))
    assert flops_per_token(untied, more, 100) == expected  # looked up, not multiplied


def plan(config, num_params, rows, **more):
    return estimate_training(
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


def test_suggested_fixes_make_a_plan_fit(paper):
    config, num_params = paper
    found = plan(config, num_params, rows=256)
    assert found.total > found.memory
    changes = suggest_changes(config, found, 256)
    assert 'remat="dots"' in changes[0] and "num_microbatches" in changes[-1]
    parts = -(-256 // 8 // found.largest_rows)
    fixed = plan(config, num_params, rows=256, num_microbatches=parts)
    assert fixed.total < fixed.memory


def test_recomputation_keeps_less():
    kept = [
        activation_bytes(dataclasses.replace(racm3_2b7(), remat=remat), 4096)[0]
        for remat in ("none", "dots", "full")
    ]
    assert kept[0] > kept[1] > kept[2] > 0


def test_devices_are_found_by_jax_names():
    assert find_device("NVIDIA H200") is DEVICES["h200"]
    assert find_device("TPU v5 lite") is DEVICES["v5e"]
    assert find_device("TPU v5") is DEVICES["v5p"]
    assert find_device("TPU v6 lite") is DEVICES["v6e"]
    assert find_device("TPU7x") is DEVICES["tpu7x"]
    assert find_device("NVIDIA A100-SXM4-40GB") is DEVICES["a100-40gb"]
    assert find_device("NVIDIA A100-SXM4-80GB") is DEVICES["a100"]
    assert find_device("NVIDIA A10G") is DEVICES["a10g"]
    assert find_device("NVIDIA A10") is DEVICES["a10"]
    assert find_device("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert find_device("NVIDIA H100 PCIe") is DEVICES["h100-pcie"]
    assert find_device("NVIDIA GB200") is DEVICES["gb200"]
    assert find_device("NVIDIA B300 SXM6 AC") is DEVICES["b300"]
    assert find_device("NVIDIA L4") is DEVICES["l4"]
    assert find_device("NVIDIA L40S") is None
    assert find_device("Tesla T4") is DEVICES["t4"]
    assert find_device(jax.devices()[0].device_kind) is None  # a CPU


def test_the_command(capsys):
    config = f"--config={CONFIGS}/racm3_2b7.py"
    assert cli.main(["estimate", config, "--device=h200:8"]) == 0
    text = capsys.readouterr().out
    assert "8 h200; weights split over 8, 1 copies" in text and "tokens/s" in text
    assert cli.main(["estimate", config, "--device=h900:8"]) == 2
    assert "known: t4, l4" in capsys.readouterr().err
    assert cli.main(["estimate", config, "--device=h200:x"]) == 2
    assert "give a number" in capsys.readouterr().err


COMPILED_PLANS = json.loads((GOLDEN / "compiled_plans.json").read_text())


def read_cases():
    spec = importlib.util.spec_from_file_location(
        "compile_plans", GOLDEN / "compile_plans.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = read_cases()


@pytest.mark.parametrize("name", COMPILED_PLANS)
def test_the_formula_is_within_a_tenth_of_the_compilers(capsys, name):
    """Bytes of one device, for TPUs and GPUs, with and without recomputation."""
    stored = COMPILED_PLANS[name]
    arguments = [a for a in CASES.arguments_of(name) if a != "--slices=2"]
    if "--slices=2" in CASES.arguments_of(name):
        arguments = [a.replace("v5e:64", "v5e:128") for a in arguments]
        arguments += ["--config.mesh.dcn=2"]
    assert cli.main(["estimate", *arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["formula"]
    weights = plan["weights"] + plan["optimizer"]
    assert weights == pytest.approx(stored["argument_bytes"], rel=0.03)
    assert plan["total"] == pytest.approx(stored["peak_bytes"], rel=0.1)


def test_compiled_traffic_is_that_of_a_step_and_not_of_its_chunks():
    """The README's figures for the paper's model on 64 chips."""
    for name in ("v5p_64", "v5e_64", "v6e_64"):
        stored = COMPILED_PLANS[name]
        assert stored["wire_bytes"] < 45e9
        assert stored["collectives"]["reduce-scatter"]["count"] > 0
        gathers = stored["collectives"]["all-gather"]
        assert gathers["asynchronous_count"] > 0.8 * gathers["count"]


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


def test_out_of_memory_errors_suggest_fixes(monkeypatch, tmp_path):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while ...")

    def fail(config, workdir):
        raise error

    monkeypatch.setattr(run.wiring, "build_job", fail)
    read = types.SimpleNamespace(train=None)  # of an incomplete config
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
    assert "--config.mesh.fsdp=-1 --config.mesh.data=-1" in raised.value.__notes__[-1]
    assert explain_out_of_memory(ValueError("another"), make_config()) == ""
    config = make_config()
    config.mesh.update(data=-1, fsdp=-1)  # nothing is left to be split by itself
    assert "config.mesh" not in explain_out_of_memory(error, config)


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0.0 KB"), (4060, "4.1 KB"), (33e6, "33.0 MB"), (11e10, "110.00 GB")],
)
def test_bytes_have_the_unit_that_shows_them(number, words):
    assert format_bytes(number) == words
