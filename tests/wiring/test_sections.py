"""Configs are total: every key of every file is read, and typos are named."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from racm3_jax import run, wiring
from racm3_jax.commands import configs
from racm3_jax.sweeps import Hyper, as_flags

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
FILES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.py"))


def read(config):
    if "suite" in config:
        return wiring.read_evaluation(config)
    return wiring.read_training(config)


def load(name, *flags):
    return configs.read_config([f"--config={CONFIGS / name}", *flags])


@pytest.mark.parametrize("name", FILES)
def test_every_key_of_every_file_is_read(name):
    config = load(name)
    found = read(config)
    for key in config:
        value = getattr(found, key)
        assert (value == config[key]) != dataclasses.is_dataclass(value)
    module, _ = configs.load_config_module(str(CONFIGS / name))
    for point in module.get_hyper(Hyper()) if hasattr(module, "get_hyper") else ():
        read(load(name, *as_flags(point)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("flagworld.py", {"train.max_skiped_steps": 3}, "train.max_skipped_steps?"),
        ("flagworld.py", {"memory.indx": "scann"}, "config.memory.index?"),
        ("flagworld.py", {"meory_path": "m"}, "did you mean config.memory_path?"),
        ("flagworld.py", {"episods": {"probability": 1.0}}, "config.episodes?"),
        ("flagworld.py", {"mesh.fspd": 2}, "config.mesh.fsdp?"),
        ("flagworld.py", {"tokenizer.txt": "t"}, "config.tokenizer.text?"),
        ("flagworld.py", {"clip": {}}, "config.clip is not a setting"),
        ("flagworld.py", {"kind": "generater"}, "allowed: clip, generator, vqgan"),
        (
            "flagworld.py",
            {"train.num_steps": "9"},
            "of type str; it must be of type int",
        ),
        ("flagworld.py", {"pipeline.retrieval": 1}, "must be of type bool"),
        (
            "flagworld.py",
            {"pipeline": 3},
            "a section of settings, as config.pipeline.r",
        ),
        ("flagworld.py", {"pipeline.seed": 3}, "config.pipeline.seed is not a setting"),
        ("flagworld_clip.py", {"clip_los": {}}, "did you mean config.clip_loss?"),
        ("flagworld_clip.py", {"aligned_scale": "1"}, "it must be of type float"),
        ("flagworld_vqgan.py", {"codebook_image": 1}, "config.codebook_images?"),
        ("flagworld_tiny.py", {"train.checkpoint_every": 0}, "must be >= 1; got 0"),
        ("eval/flagworld.py", {"settings.num_promts": 1}, "is not a setting"),
        ("eval/coco.py", {"inception.wights": ""}, "config.inception.weights?"),
        ("eval/likelihood.py", {"sourc": ""}, "did you mean config.source?"),
        ("sweeps/flagworld_alpha.py", {"pipeline.alfa": 1.0}, "config.pipeline.alpha?"),
    ],
)
def test_a_wrong_setting_of_a_file_is_refused(name, change, message):
    config = load(name)
    with config.unlocked():
        for key, value in change.items():
            *sections, last = key.split(".")
            place = config
            for section in sections:
                place = place[section]
            with place.ignore_type():
                place[last] = value
    with pytest.raises(ValueError) as error:
        read(config)
    assert message in str(error.value)


def test_missing_keys_are_named():
    config = load("flagworld.py")
    with config.unlocked():
        del config.train.num_steps
    with pytest.raises(ValueError, match="config.train.num_steps is missing"):
        wiring.read_training(config)
    with config.unlocked():
        del config.train
    with pytest.raises(ValueError, match="config.train is missing"):
        wiring.read_training(config)


def test_a_typo_in_a_file_is_refused_before_the_work_directory_is_made(tmp_path):
    config = load("flagworld_tiny.py")
    with config.unlocked():
        config.optimizer.learning_rat = 1.0
    with pytest.raises(ValueError, match="config.optimizer.learning_rate"):
        run.train(config, tmp_path / "run")
    evaluation = load("eval/flagworld.py")
    with evaluation.unlocked():
        evaluation.modle = "model"
    with pytest.raises(ValueError, match=r"config\.model\?"):
        run.evaluate(evaluation, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_are_packed_for_the_bound_of_the_model():
    flag = "--config.model.max_segments=5"
    assert read(load("racm3_2b7.py")).pipeline.max_examples == 15
    assert read(load("racm3_2b7.py", flag)).pipeline.max_examples == 4
