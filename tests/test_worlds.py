"""Worlds and suites of this package and of others are found by name."""

import contextlib
import dataclasses
import pathlib
import re
import subprocess
import sys

import pytest

from racm3_jax import cli, wiring, worlds
from racm3_jax.commands import configs
from racm3_jax.documents.readers import read_documents
from racm3_jax.wiring.sections import choose_class_key
from racm3_jax.wiring.workdirs import claim_workdir

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
# A package of somebody else: counts, the odd ones held out.
MODULE = """
import dataclasses
import pathlib
from typing import Any

from racm3_jax.types import Document, Segment
from racm3_jax.worlds import SuiteEntry, World


@dataclasses.dataclass(frozen=True)
class Settings:
    seed: int = 0
    count: int = 4
    loud: bool = False


@dataclasses.dataclass(frozen=True)
class Evaluation:
    suite: str
    world: Settings


def read(settings, split):
    for i in range(settings.count):
        if (split == "train") == (i % 2 == 0):
            text = f"{split} {i}"
            yield Document(
                id=f"{split}-{i}",
                segments=(Segment(text=text.upper() if settings.loud else text),),
                metadata={"parity": i % 2},
            )


WORLD = World(Settings, read, "parity", {"count": 4, "loud": False})
SUITE = SuiteEntry(Evaluation, lambda config, workdir: (config.world.count, workdir))
WRONG = read
"""
ENTRIES = """
[racm3_jax.worlds]
counted = counted_world:WORLD
again = counted_world:WORLD
wrong = counted_world:WRONG
flagworld = counted_world:WORLD
[racm3_jax.suites]
counted = counted_world:SUITE
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs the other package."""
    site = tmp_path / "site"
    (site / "counted-1.dist-info").mkdir(parents=True)
    (site / "counted_world.py").write_text(MODULE)
    (site / "counted-1.dist-info" / "METADATA").write_text("Name: counted\nVersion: 1")
    (site / "counted-1.dist-info" / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(site)
    yield
    sys.modules.pop("counted_world", None)


def load_tiny(**world):
    """A training config over the installed world."""
    config = configs.load_config_file(f"{CONFIGS}/flagworld_tiny.py:")
    config.world, config.world_name = world, "counted"
    return config


def texts(documents):
    return [document.text for document in documents]


def test_every_name_of_this_package_is_found():
    for name in worlds.WORLDS:
        world = worlds.find_world(name)
        assert dataclasses.is_dataclass(world.settings)
        assert set(world.source) <= {f.name for f in dataclasses.fields(world.settings)}
    for name in worlds.SUITES:
        keys = {f.name for f in dataclasses.fields(worlds.find_suite(name).config)}
        assert keys >= {"suite", "settings"}
    assert worlds.DEFAULT_WORLD in worlds.WORLDS


def test_an_installed_world_is_a_source(installed):
    assert {"flagworld", "counted"} <= set(worlds.list_worlds())
    assert "counted_world" not in sys.modules
    assert texts(read_documents("counted:train")) == ["train 0", "train 2"]
    assert texts(read_documents("counted:heldout_test;count=6;loud=yes")) == [
        "HELDOUT_TEST 1",
        "HELDOUT_TEST 3",
        "HELDOUT_TEST 5",
    ]
    assert len(list(read_documents("counted:train;max_documents=1"))) == 1
    with pytest.raises(ValueError, match="no option 'cuont'; did you mean 'count'"):
        read_documents("counted:train;cuont=3")
    with pytest.raises(ValueError, match="counted has the splits train, heldout_memor"):
        read_documents("counted:test")
    with pytest.raises(ValueError, match=r"did you mean 'counted'\?.*jsonl.*flagworld"):
        read_documents("cuonted:train")


def test_an_installed_world_is_trained_on(installed):
    corpus = wiring.build_corpus(load_tiny(count=3))
    assert texts(corpus.train()) == ["train 0", "train 2"]
    assert texts(corpus.heldout()) == ["heldout_test 1"]
    assert texts(corpus.shown()) == ["heldout_memory 1"]
    assert [corpus.group(d) for d in corpus.heldout()] == ["1"]
    read = wiring.read_training(load_tiny(count=3))
    assert dataclasses.asdict(read)["world"] == {"seed": 0, "count": 3, "loud": False}
    with pytest.raises(ValueError, match=r"did you mean config.world.count\?"):
        wiring.read_training(load_tiny(cuont=3))
    with pytest.raises(ValueError, match="config.world.count is '3'"):
        wiring.read_training(load_tiny(count="3"))


def test_a_world_name_without_a_world_is_refused():
    config = configs.load_config_file(f"{CONFIGS}/own_tokenizer.py:")
    config.world_name = "counted"
    with pytest.raises(ValueError, match="'counted', but there is no config.world"):
        wiring.read_training(config)
    config.world = {"seed": 0}
    with pytest.raises(ValueError, match="unknown name 'counted'; allowed: flagworld"):
        wiring.read_training(config)


def test_a_run_does_not_resume_on_a_world_of_another_name(installed, tmp_path):
    config = load_tiny(seed=0)
    claim_workdir(config, tmp_path)
    claim_workdir(config, tmp_path)
    config.world_name = "again"
    with pytest.raises(ValueError, match=r"differs in config.world_name\)"):
        claim_workdir(config, tmp_path)


def test_an_older_run_of_flagworld_names_no_world(tmp_path):
    config = configs.load_config_file(f"{CONFIGS}/flagworld_tiny.py:")
    assert "world_name" not in config
    claim_workdir(config, tmp_path)
    config.world_name = "flagworld"
    claim_workdir(config, tmp_path)


def test_an_installed_suite_is_built(installed, tmp_path):
    config = configs.load_config_file(f"{CONFIGS}/eval/flagworld.py:")
    with config.unlocked():
        for key in list(config):
            del config[key]
        config.suite, config.world = "counted", {"count": 7}
    assert wiring.read_evaluation(config).world.count == 7
    assert wiring.build_suite(config, tmp_path) == (7, tmp_path)
    config.suite = "cuonted"
    with pytest.raises(
        ValueError, match="allowed: coco, counted, flagworld, flagworld"
    ):
        wiring.read_evaluation(config)


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--help"],
        ["completion", "bash"],
        ["completion", "zsh"],
        ["evaluate", "--suite=x", "--workdir=x"],
    ],
)
def test_help_completion_and_errors_name_an_installed_suite(installed, words, capsys):
    with contextlib.suppress(SystemExit):
        cli.main(words)
    shown = capsys.readouterr()
    found = set(re.findall(r"\w+", shown.out + shown.err))
    assert {"flagworld_tasks", "likelihood", "counted"} <= found
    assert "counted_world" not in sys.modules


def test_commands_read_no_entry_points_to_start(monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.entry_points", None)
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "evaluate" in capsys.readouterr().out


def test_an_installed_suite_is_run_with_its_config(
    installed, monkeypatch, capsys, tmp_path
):
    words = ["evaluate", "--suite=counted", "--workdir=out"]
    assert cli.main(words) == 2
    assert "is of another package: give its config" in capsys.readouterr().err
    file = tmp_path / "counted.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg):\n"
        "    return ConfigDict(dict(suite='counted', world=dict(count=7)))\n"
    )
    ran = []
    monkeypatch.setattr("racm3_jax.run.evaluate", lambda *call: ran.append(call))
    assert cli.main([*words, f"--config={file}", "--config.world.count=8"]) == 0
    ((config, workdir),) = ran
    assert workdir == "out"
    assert wiring.build_suite(config, tmp_path) == (8, tmp_path)


def test_the_key_of_classes_is_the_worlds_unless_named(installed):
    assert choose_class_key(load_tiny(), "") == "parity"
    assert choose_class_key(load_tiny(), "loud") == "loud"
    config = configs.load_config_file(f"{CONFIGS}/eval/likelihood.py:")
    assert choose_class_key(config, config.class_key) == "nation"
    config.source = "folder:photos"
    assert choose_class_key(config, config.class_key) == ""


def test_an_entry_point_of_another_type_is_refused(installed):
    with pytest.raises(ValueError, match="of type function; it must be a .*World"):
        worlds.find_world("wrong")


def test_a_package_does_not_replace_a_world_of_this_one(installed):
    found = worlds.find_world("flagworld")
    assert found.settings.__module__.startswith("racm3_jax.")
    assert worlds.list_worlds().count("flagworld") == 1


def test_the_world_is_imported_when_named_and_needs_no_jax():
    code = """if 1:
        import sys
        import racm3_jax, racm3_jax.documents.sources
        assert "racm3_jax.flagworld" not in sys.modules
        next(racm3_jax.read_documents("flagworld:train"))
        assert "racm3_jax.flagworld" in sys.modules and "jax" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
