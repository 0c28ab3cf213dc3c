"""Wrong input ends in one clear sentence and exit status 2."""

import pathlib
import types

from racm3_jax import cli, run
from racm3_jax.commands import configs

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def sentence(capsys, *arguments):
    assert cli.main(list(arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("racm3: ")
    assert "\n" not in error and "Traceback" not in error
    return error


def test_unknown_config_key_names_the_nearest(capsys, tmp_path):
    error = sentence(
        capsys,
        "train",
        f"--config={CONFIGS}/flagworld_tiny.py",
        "--config.optimizer.learning_rat=1",
        f"--workdir={tmp_path}/x",
    )
    assert "learning_rate" in error
    assert not (tmp_path / "x").exists()


def test_overrides_reach_nested_settings():
    config = configs.read_config(
        [
            f"--config={CONFIGS}/flagworld_tiny.py",
            "--config.optimizer.learning_rate=0.25",
            "--config.tokenizer.text=somewhere",
        ]
    )
    assert config.optimizer.learning_rate == 0.25
    assert config.tokenizer.text == "somewhere"
    assert config.is_locked


def test_missing_config(capsys, tmp_path):
    error = sentence(capsys, "train", "--config=none.py", f"--workdir={tmp_path}")
    assert "none.py" in error
    error = sentence(capsys, "train", f"--workdir={tmp_path}")
    assert "give --config" in error


def test_config_argument_that_does_not_exist(capsys, tmp_path):
    flag = f"--config={CONFIGS}/flagworld.py:tvin"
    error = sentence(capsys, "train", flag, f"--workdir={tmp_path}")
    assert ":twin" in error


def test_unknown_argument(capsys):
    error = sentence(capsys, "generate", "--workdir=x", "--prompt=y", "--sampels=4")
    assert "--sampels=4" in error


def test_missing_workdir(capsys, tmp_path):
    error = sentence(
        capsys, "generate", f"--workdir={tmp_path}/none", "--prompt=a flag"
    )
    assert "no trained model" in error and "racm3 quickstart" in error


def test_an_image_that_is_none(capsys, tmp_path):
    path = tmp_path / "x.png"
    path.write_text("not a picture")
    error = sentence(capsys, "caption", f"--workdir={tmp_path}", f"--image={path}")
    assert "is not an image" in error
    error = sentence(
        capsys, "caption", f"--workdir={tmp_path}", f"--image={tmp_path}/y.png"
    )
    assert "y.png" in error


def test_help_lists_the_commands(capsys):
    assert cli.main([]) == 2
    shown = capsys.readouterr().out
    for name in ("quickstart", "train", "generate", "caption", "evaluate"):
        assert name in shown


def test_a_training_that_was_stopped_says_so_and_has_its_own_status(
    monkeypatch, capsys, tmp_path
):
    """A scheduler can tell it from success (0) and from wrong input (2)."""
    given = {}

    def train(config, workdir, profile_steps):
        given.update(workdir=workdir, profile_steps=profile_steps)
        return types.SimpleNamespace(step=3)

    monkeypatch.setattr(run, "train", train)
    config = f"--config={CONFIGS}/flagworld_tiny.py"
    arguments = ["train", config, f"--workdir={tmp_path}", "--profile_steps=2:3"]
    assert cli.main(arguments) == 75
    assert "stopped and saved after step 3 of 4" in capsys.readouterr().err
    assert given == {"workdir": str(tmp_path), "profile_steps": (2, 3)}
    assert cli.main([*arguments, "--config.train.num_steps=3"]) == 0
    assert cli.main([*arguments, "--profile_steps=2"]) == 2
    assert "give first:last" in capsys.readouterr().err
