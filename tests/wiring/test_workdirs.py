"""Which configs a work directory accepts as the same run."""

from __future__ import annotations

import types

import pytest
from ml_collections import ConfigDict

from racm3_jax import storage
from racm3_jax.commands import configs
from racm3_jax.wiring.workdirs import (
    LOCK_NAME,
    check_inputs,
    claim_workdir,
    given_back_if_refused,
)


def make_config(**train):
    return ConfigDict({"seed": 0, "train": {"num_steps": 4, "log_every": 1} | train})


def test_a_resumed_run_may_change_how_it_is_computed_and_logged(tmp_path):
    first = claim_workdir(make_config(), tmp_path)
    assert claim_workdir(make_config(), tmp_path) == first
    claim_workdir(make_config(log_every=5, watchdog_seconds=9.0), tmp_path)
    with pytest.raises(ValueError, match=r"differs in config\.train\.num_steps"):
        claim_workdir(make_config(num_steps=5), tmp_path)


def test_settings_missing_in_an_older_run_are_their_defaults(tmp_path):
    config = configs.load_config_file(configs.find_config("flagworld_tiny.py"))
    older = config.copy_and_resolve_references()
    config.pipeline.window_steps = 8
    config.train.keep_checkpoints = 2
    claim_workdir(older, tmp_path)
    claim_workdir(config, tmp_path)
    config.pipeline.window_steps = 4
    with pytest.raises(ValueError, match=r"differs in config.pipeline.window_steps\)"):
        claim_workdir(config, tmp_path)


@pytest.mark.parametrize("name", ["episodes", "pairing"])
@pytest.mark.parametrize("file", ["flagworld_tiny.py", "own_generator.py"])
def test_an_older_run_without_a_key_of_classes_has_that_of_flagworld(
    tmp_path, file, name
):
    config = configs.load_config_file(configs.find_config(file))
    if file == "own_generator.py":
        config.source = "folder:photos"
    config[name] = {"probability": 0.5}
    claim_workdir(config, tmp_path)
    claim_workdir(config, tmp_path)
    config[name].class_key = "nation"
    claim_workdir(config, tmp_path)
    config[name].class_key = "scene"
    with pytest.raises(ValueError, match=rf"differs in config.{name}.class_key\)"):
        claim_workdir(config, tmp_path)


def test_removed_documents_are_reported_and_older_checkpoints_accepted(
    tmp_path, caplog
):
    job = types.SimpleNamespace(inputs={"memory": "m"}, num_main_documents=7)
    check_inputs({}, job, tmp_path)
    check_inputs({"inputs": {"memory": "m"}, "num_main_documents": 7}, job, tmp_path)
    assert caplog.text == ""
    check_inputs({"inputs": {"memory": "m"}, "num_main_documents": 9}, job, tmp_path)
    assert "2 main documents were removed" in caplog.text


def test_a_refused_training_leaves_no_lock_but_that_of_another(tmp_path):
    def refuse(error):
        with pytest.raises(type(error)), given_back_if_refused(tmp_path):
            (tmp_path / LOCK_NAME).touch()
            raise error

    refuse(ValueError("no"))
    assert not (tmp_path / LOCK_NAME).exists()
    refuse(storage.BusyError("another training's"))
    assert (tmp_path / LOCK_NAME).exists()
    refuse(ValueError("no"))
    assert not (tmp_path / LOCK_NAME).exists()  # claimed, and nothing else is there
    (tmp_path / LOCK_NAME).touch()
    (tmp_path / "mine").touch()
    refuse(ValueError("no"))
    assert (tmp_path / LOCK_NAME).exists()
