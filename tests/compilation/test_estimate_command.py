"""`racm3 estimate --compile` for this machine's own CPU devices."""

from __future__ import annotations

import json
import pathlib

import jax
import pytest

from racm3_jax import cli, wiring
from racm3_jax.commands.configs import read_config
from racm3_jax.compilation import saved
from racm3_jax.generation import draft_choice

ROOT = pathlib.Path(__file__).parent.parent.parent
TINY = [
    f"--config={ROOT}/configs/flagworld.py",
    "--config.model.d_model=16",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.head_dim=8",
    "--config.model.d_ff=32",
    "--config.pipeline.row_length=544",
    "--config.pipeline.rows=4",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=2",
]


def estimate(capsys, *arguments):
    """The exit status, and what was printed."""
    status = cli.main(["estimate", *TINY, *arguments])
    return status, capsys.readouterr()


def test_a_training_step_is_compiled_and_kept(capsys, tmp_path):
    path = tmp_path / "step"
    status, said = estimate(
        capsys, "--device=cpu:4", "--compile", "--json", f"--save={path}"
    )
    assert status == 0, said.err
    found = json.loads(said.out)["compiled"]
    assert (found["what"], found["unit"], found["size"]) == ("train", "rows", 4)
    (part,) = found["parts"]
    assert part["argument_bytes"] > 0 and part["temporary_bytes"] > 0
    assert part["wire_bytes"] == pytest.approx(
        sum(c["bytes_on_wire"] for c in part["collectives"].values())
    )
    assert part["wire_bytes"] > 0
    assert "compile training step" in said.err and f"wrote {path}" in said.err
    # A training with the same config and machine opens it.
    config = read_config(TINY)
    training = wiring.build_abstract_training(config, jax.devices()[:4])
    saved.load_step(
        path, training.step, training.state, training.batch, config.to_dict()
    )


@pytest.mark.parametrize(
    ("what", "size", "unit", "parts"),
    [
        ("decode", 2, "prompts", ["read the prompts", "sample images"]),
        ("embed", 4, "images", ["embed images", "embed texts"]),
        ("search", 1000, "documents", ["search"]),
    ],
)
def test_other_programs_for_accelerators(monkeypatch, capsys, what, size, unit, parts):
    monkeypatch.setattr(draft_choice, "current_platform", lambda: "gpu")
    status, said = estimate(
        capsys, "--device=cpu:4", "--compile", f"--what={what}", f"--size={size}"
    )
    assert status == 0, said.err
    assert f"{unit} " in said.out and f"{size:,}" in said.out
    for name in parts:
        assert f"{name}, one device" in said.out
    assert ("all-gather" in said.out) == (what == "search")
    # The default settings of text-to-image.
    assert ("table, 8 tokens a pass" in said.out) == (what == "decode")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device=v5p:64", "--topology=4x4x4"], "--topology needs --compile"),
        (["--device=v5p:64", "--save=x"], "--save needs --compile"),
        (["--device=b200:8", "--compile"], "--compile supports v5e"),
        (["--device=cpu:4"], "'cpu' is not in the table"),
        (["--device=cpu:4", "--compile", "--what=embed", "--save=x"], "--save is for"),
        (["--device=cpu:4", "--compile", "--size=0"], "--size=0"),
        (
            ["--device=cpu:4", "--compile", "--size=3"],
            "3, which does not divide over 4",
        ),
        (["--device=cpu:4", "--compile", "--max_compiles=0"], "--max_compiles=0"),
        (["--device=cpu:3", "--compile"], "does not fit 3 devices"),
        (["--device=v5e:4", "--compile", "--slices=0"], "--slices=0"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(capsys, arguments, words):
    status, said = estimate(capsys, *arguments)
    assert status == 2
    assert words in said.err and said.err.count("\n") <= 2


def test_only_the_formula_as_json(capsys):
    status, said = estimate(capsys, "--device=h100:4", "--json")
    assert status == 0
    plan = json.loads(said.out)["formula"]
    assert plan["total"] < plan["capacity"] and plan["fits"]


def test_embedding_needs_the_sizes_of_a_clip(capsys):
    status, said = estimate(
        capsys, "--device=cpu:4", "--compile", "--what=embed", "--config.embedder="
    )
    assert status == 2 and "config.embedder is empty" in said.err


def test_a_training_refuses_the_step_of_another_machine(capsys, tmp_path):
    path = tmp_path / "step"
    path.write_text("no such file")
    command = ["train", *TINY, f"--workdir={tmp_path}/run", f"--compiled={path}"]
    command[command.index("--config.mesh.fsdp=2")] = "--config.mesh.fsdp=-1"
    assert cli.main(command) == 2
    assert "is not a compiled step" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
