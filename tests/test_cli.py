"""Wrong input ends in one clear sentence and exit status 2."""

import argparse
import errno
import os
import pathlib
import runpy
import types

import pytest

from racm3_jax import cli, own_files, quickstart, run
from racm3_jax.commands import configs
from racm3_jax.commands.parser import find_parsers
from racm3_jax.metrics import MetricsWriter

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
    assert "--workdir" in sentence(capsys, "evaluate")


def test_config_argument_that_does_not_exist(capsys, tmp_path):
    flag = f"--config={CONFIGS}/flagworld.py:tvin"
    error = sentence(capsys, "train", flag, f"--workdir={tmp_path}")
    assert ":twin" in error


def test_configs_have_names(capsys, monkeypatch):
    """With = or a space, with an argument, with settings of either form."""
    given = []

    def train(config, *_, **__):
        given.append(config)
        return types.SimpleNamespace(step=0), False

    monkeypatch.setattr(run, "run_training", train)
    for words in (
        ["--config=flagworld:twin", "--config.train.num_steps=7"],
        ["--config", "flagworld:twin", "--config.train.num_steps", "7"],
    ):
        assert cli.main(["train", *words, "--workdir=w"]) == 75
        config = given.pop()
        assert config.train.num_steps == 7
        assert config == configs.read_config(
            [f"--config={CONFIGS}/flagworld.py:twin", "--config.train.num_steps=7"]
        )
    capsys.readouterr()
    error = sentence(capsys, "train", "--config=flagworld_tinny", "--workdir=x")
    assert error.endswith("did you mean flagworld_tiny?")
    assert {"flagworld", "eval/coco"} <= set(configs.list_configs())


def test_similar_names_are_suggested(capsys):
    error = sentence(capsys, "generate", "--workdir=x", "--prompt=y", "--sampels=4")
    assert "'--sampels=4'; did you mean --num_samples?" in error
    for words, near in [
        (["trian"], "train"),
        (["memory", "serach"], "search"),
        (["evaluate", "--suite=likelyhood", "--workdir=x"], "likelihood"),
        (["memory", "stats", "--memory=x", "--num_querys=3"], "--num_queries"),
    ]:
        assert f"did you mean {near}?" in sentence(capsys, *words)
    error = sentence(capsys, "xyzzy")
    assert "there is no 'xyzzy'; known: quickstart, fit, train" in error


def test_the_help_names_every_option_and_its_default():
    shown = {}
    for parser in find_parsers(cli._parser()):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            assert action.help and "None" not in action.help, (parser.prog, action)
        shown[parser.prog] = " ".join(parser.format_help().split())
    measured = "(default: what was measured best with the weights, else 0.9)"
    assert f"of the kept tokens {measured}" in shown["racm3 generate"]
    assert "maximum number of masks for the region (default: 1)" in shown["racm3 edit"]
    assert (
        "PNG file of the results (default: search.png)" in shown["racm3 memory search"]
    )
    assert "(default: False)" not in "".join(shown.values())


def test_the_package_is_the_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["racm3", "memory", "plan", "--num_documents=1e6"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("racm3_jax", run_name="__main__")
    assert ended.value.code == 0
    assert "1,000,000 documents" in capsys.readouterr().out


def test_completion(capsys):
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh"):
        assert cli.main(["completion", shell]) == 0
        script = capsys.readouterr().out
        for word in ("quickstart", "--num_samples", "flagworld_tiny", "_racm3_configs"):
            assert word in script


def test_missing_workdir(capsys, tmp_path):
    error = sentence(
        capsys, "generate", f"--workdir={tmp_path}/none", "--prompt=a flag"
    )
    assert "no trained model" in error and "racm3 quickstart" in error


def test_the_folder_of_a_fit_names_the_one_of_its_generator(capsys, tmp_path):
    words = ["generate", f"--workdir={tmp_path}", "--prompt=a flag"]
    own_files.write_json(tmp_path / "plan.json", {"plan": {}})
    assert "fit` has not finished there; run its" in sentence(capsys, *words)
    (tmp_path / "generator" / "model").mkdir(parents=True)
    assert f"give {tmp_path}/generator" in sentence(capsys, *words)


def test_a_file_that_is_not_an_image(capsys, tmp_path):
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


def test_a_stopped_training_reports_it_and_has_its_own_status(
    monkeypatch, capsys, tmp_path
):
    """A scheduler can distinguish it from success (0) and from wrong input (2)."""
    given = {}

    def train(config, workdir, profile_steps, compiled):
        given.update(workdir=workdir, profile_steps=profile_steps)
        assert compiled is None
        return types.SimpleNamespace(step=3), config.train.num_steps == 3

    monkeypatch.setattr(run, "run_training", train)
    config = f"--config={CONFIGS}/flagworld_tiny.py"
    arguments = ["train", config, f"--workdir={tmp_path}", "--profile_steps=2:3"]
    assert cli.main(arguments) == 75
    assert "stopped and saved after step 3 of 4" in capsys.readouterr().err
    assert given == {"workdir": str(tmp_path), "profile_steps": (2, 3)}
    assert cli.main([*arguments, "--config.train.num_steps=3"]) == 0
    assert cli.main([*arguments, "--profile_steps=2"]) == 2
    assert "give first:last" in capsys.readouterr().err


def test_a_closed_pipe_ends_it_quietly(monkeypatch, capsys):
    """`racm3 ... | head`: no traceback, and the status that shells know."""
    for words in (["memory", "plan", "--num_documents=1e6"], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as stdout, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", stdout)
            assert cli.main(words) == 141
    assert capsys.readouterr().err == ""


def test_help_names_the_installed_configs(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert set(configs.list_configs()) >= {"own_clip", "flagworld_tiny"}
    assert all(n in said for n in configs.list_configs() if "/" not in n)
    assert "configs/" not in said


def test_output_that_cannot_be_written(monkeypatch, capsys):
    with open("/dev/full", "w") as stdout, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        assert cli.main(["memory", "plan", "--num_documents=1e6"]) == 2
    assert "the disk is full" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch):
    """`racm3 doctor` raises the given error."""

    def fail_with(error):
        def examine(*_, **__):
            raise error

        monkeypatch.setattr("racm3_jax.doctor.examine", examine)

    return fail_with


def test_ctrl_c_has_its_own_status(failing, capsys):
    failing(KeyboardInterrupt())
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "racm3: stopped by Ctrl-C\n"


def test_system_errors_name_path_and_remedy(failing, capsys):
    for number, words in [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EROFS, "read-only: give another path"),
        (errno.EACCES, "permission denied: change its permissions"),
        (errno.EPIPE + 900, "check the path"),
    ]:
        failing(OSError(number, os.strerror(number), "some/place"))
        error = sentence(capsys, "doctor")
        assert error.startswith("racm3: some/place: ") and words in error
    failing(OSError(errno.EACCES, "x", "a", None, "b"))
    assert "a -> b" in sentence(capsys, "doctor")
    failing(OSError(errno.ENAMETOOLONG, "x", "y" * 4000))
    assert len(sentence(capsys, "doctor")) < 300
    failing(FileExistsError("two\nlines"))
    assert sentence(capsys, "doctor") == "racm3: two lines"
    failing(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"))
    assert "save it as UTF-8" in sentence(capsys, "doctor")


def test_internal_errors_keep_their_traceback(failing):
    failing(TypeError("a bug"))
    with pytest.raises(TypeError):
        cli.main(["doctor"])
    failing(KeyError("a bug"))
    with pytest.raises(KeyError):
        cli.main(["doctor"])


def test_traceback_shows_where_an_error_came_from(failing):
    failing(ValueError("x"))
    for words in (["--traceback", "doctor"], ["doctor", "--traceback"]):
        with pytest.raises(ValueError):
            cli.main(words)


def test_config_files_that_fail(capsys, tmp_path):
    config = tmp_path / "c.py"
    for text, words in [
        ("x = [\n", "c.py fails (line 1) with SyntaxError"),
        ("import sys\nsys.exit(3)\n", "c.py fails (line 2) with SystemExit: 3"),
        ("x = 1\n", "has no function get_config; an example is /"),
        ("def get_config(arg):\n    return {}[arg]\n", "(line 2) with KeyError"),
        ("def get_config(arg):\n    raise ValueError('no')\n", "c.py: no"),
        ("def get_config(arg):\n    return 7\n", "returns a int"),
        (
            "from ml_collections import *\ndef get_config(_):\n    return ConfigDict()\n",
            "the config has no setting 'kind'",
        ),
    ]:
        config.write_text(text)
        assert words in sentence(
            capsys, "train", f"--config={config}", f"--workdir={tmp_path}/x"
        )
        assert not (tmp_path / "x").exists()
    words = ["train", f"--config={tmp_path}", f"--workdir={tmp_path}/x"]
    assert "is a folder: give --config=FILE.py" in sentence(capsys, *words)
    for words in (["--config", "x.py"], ["--config=x.py"]):
        error = sentence(capsys, "train", *words, "--workdir=x")
        assert "there is no config x.py; names: " in error and "flagworld_tiny" in error
    assert "expected one argument" in sentence(capsys, "train", "--config")


def test_the_home_folder_is_found_after_an_equals_sign(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (
        ["memory", "verify", "--memory=~/m"],
        ["generate", "--workdir=~/m", "--prompt=a", "--out=~/x.png"],
        ["caption", "--workdir=x", "--image=~/m"],
        ["classify", "--workdir=x", "--image=~/m", "--support=~/s"],
        ["train", "--config=~/m", "--workdir=~/w"],
    ):
        assert str(tmp_path / "m") in sentence(capsys, *words)


def test_a_refused_training_leaves_its_work_directory_free(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    config = f"--config={CONFIGS}/eval/flagworld.py"
    for name in ("new", "mine"):
        assert "no setting 'kind'" in sentence(
            capsys, "train", config, f"--workdir={tmp_path / name}"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert not list((tmp_path / "mine").iterdir())


def test_foreign_results_are_not_replaced(capsys, tmp_path):
    config = f"--config={CONFIGS}/flagworld_tiny.py"
    for name, words in [
        ("loss.png", ["train", config]),
        ("config.json", ["train", config]),
        ("model/mine.txt", ["train", config]),
        ("checkpoints/mine.txt", ["train", config]),
        ("metrics.jsonl", ["train", config]),
        ("samples.png", ["quickstart", "--short"]),
        ("report.html", ["quickstart", "--short"]),
        ("table.md", ["evaluate", "--suite=flagworld"]),
        ("results.json", ["evaluate"]),
        ("samples/infill.png", ["evaluate", "--suite=flagworld_tasks"]),
        ("sweep.json", ["sweep", f"--config={CONFIGS}/sweeps/flagworld_alpha.py:tiny"]),
    ]:
        file = tmp_path / name.replace("/", "-") / name
        file.parent.mkdir(parents=True)
        file.write_text("mine")
        folder = tmp_path / name.replace("/", "-")
        error = sentence(capsys, *words, f"--workdir={folder}")
        named = folder / name.split("/")[0]
        assert str(named) in error and "give another --workdir" in error
        assert [p for p in folder.rglob("*") if p.is_file()] == [file]
        assert file.read_text() == "mine"


def test_a_foreign_log_is_not_appended_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for text in ("mine", '{"mine": 1}\n', '{"mine": 1}\nno end'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not the log of a training"):
            MetricsWriter(tmp_path, tensorboard=False)
        assert path.read_text() == text


def test_the_quickstart_reports_the_config_that_was_used(monkeypatch):
    names = []
    monkeypatch.setattr(
        quickstart, "main", lambda config, workdir, name: names.append(name)
    )
    file = f"{CONFIGS}/flagworld_quickstart.py"
    for words in (
        [],
        ["--short"],
        [f"--config={file}", "--config.num_prompts=2"],
        ["--config", "flagworld_quickstart:short", "--config.num_prompts", "2"],
    ):
        assert cli.main(["quickstart", *words]) == 0
    assert names == [
        "flagworld_quickstart",
        "flagworld_quickstart:short",
        f"{file} --config.num_prompts=2",
        "flagworld_quickstart:short --config.num_prompts=2",
    ]


def test_options_that_a_given_config_replaces_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(run, "evaluate", lambda config, workdir: None)
    error = sentence(capsys, "quickstart", "--config=flagworld_quickstart", "--short")
    assert "remove one of the two" in error
    words = ["evaluate", "--workdir=x", "--config=eval/coco"]
    error = sentence(capsys, *words, "--suite=flagworld")
    assert "--suite=flagworld, but the config is of the suite coco" in error
    assert cli.main(words) == 0
    assert cli.main([*words, "--suite=coco"]) == 0


def test_sizes_of_a_fit_are_positive(capsys):
    words = ["fit", "--source=folder:x", "--workdir=x"]
    for name in ("d_model", "num_layers", "num_codes", "batch_size", "clip_steps"):
        error = sentence(capsys, *words, f"--{name}=0")
        assert f"--{name}: '0' is not an integer from 1" in error


def test_an_empty_or_missing_folder_says_what_a_source_is(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file")
    for name, message in [
        ("empty", "put images there with their captions next to them"),
        ("file", "is a file: give a folder of images"),
        ("none", f"there is no {tmp_path / 'none'}: give a folder of images"),
    ]:
        source = f"--source=folder:{tmp_path / name}"
        assert message in sentence(capsys, "fit", source, f"--workdir={tmp_path / 'w'}")
    error = sentence(capsys, "fit", "--source=", "--workdir=x")
    assert "--source: is empty: give a value; see" in error
