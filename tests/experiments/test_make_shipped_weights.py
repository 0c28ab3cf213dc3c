"""The recipes of the shipped weights: their order, and commands that exist."""

from __future__ import annotations

import dataclasses

import jax
import make_shipped_weights
import numpy as np
import pytest

from racm3_jax import checkpoints, wiring
from racm3_jax.commands import configs
from racm3_jax.flagworld import WORLD
from racm3_jax.model.config import ModelConfig
from racm3_jax.retrieval.embedder import DocumentEmbedder


@pytest.mark.parametrize("model", make_shipped_weights.CONFIGS)
def test_every_command_is_one_that_racm3_takes(model):
    folder = str(make_shipped_weights.ROOT / "configs")
    verb, *flags = make_shipped_weights.make_command(model, folder, "out")
    assert verb == "train" and f"--workdir=out/{model}" in flags
    config = configs.read_config([f for f in flags if "--workdir" not in f])
    start = make_shipped_weights.STARTS.get(model)
    expected = f"out/{start}/model" if start else ""
    assert config.get("init_from", "") == expected


def test_models_are_trained_before_what_starts_from_them():
    stages = make_shipped_weights.list_stages()
    assert stages[:3] == ["vqgan", "clip", "parts"]
    assert stages[-3:] == ["racm3", "cm3", "generators"]
    for model, start in make_shipped_weights.STARTS.items():
        assert stages.index(start) < stages.index(model)


@pytest.mark.parametrize("stage", ["names", "first", "full", "second", "third"])
def test_the_kept_weights_of_the_curriculum_fit_its_config(stage):
    folder = make_shipped_weights.ROOT / f"experiments/weights/reading_{stage}"
    params, fields, _ = checkpoints.load_weights(folder, "generator")
    # With the defaults of settings that are newer than the weights.
    found = dataclasses.asdict(checkpoints.build_config(ModelConfig, fields, folder))
    file = make_shipped_weights.ROOT / "configs/flagworld_reading.py"
    config = configs.load_config_file(f"{file}:{stage}")
    config.init_from = str(folder)
    vocab = wiring.build_tokenizer(config).vocab
    wanted = dataclasses.asdict(wiring.build_model_config(config, vocab))
    assert {n: found[n] for n in wanted if n != "compute_dtype"} == {
        n: value for n, value in wanted.items() if n != "compute_dtype"
    }
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_the_shipped_clip_aligns_captions_with_images_and_finds_names():
    file = make_shipped_weights.ROOT / "configs/flagworld_clip.py"
    config = configs.load_config_file(str(file))
    embedder = DocumentEmbedder.load(make_shipped_weights.SHIPPED / "clip")
    assert all(getattr(embedder.config, k) == v for k, v in config.clip.items())
    undescribed = dataclasses.replace(wiring.build_world(config), description_share=0.0)
    world = WORLD.measured(wiring.build_world(config))
    one_each = {d.metadata["nation"]: d for d in WORLD.read(world, "heldout_test")}
    found = embedder.measure([*one_each.values()])
    assert found.num_pairs == 320
    assert found.text_to_image > 0.85 and found.image_to_text > 0.85
    # Names of nations that it has not seen, in captions that say nothing else.
    tests = {d.metadata["nation"]: d for d in WORLD.read(undescribed, "heldout_test")}
    memory = list(WORLD.read(undescribed, "heldout_memory"))[::2]
    documents = embedder.embed_documents(memory).document
    queries = embedder.embed_texts([d.text for d in tests.values()])
    nearest = (queries @ documents.T).argmax(axis=1)
    named = [memory[row].metadata["nation"] for row in nearest]
    assert np.mean([a == b for a, b in zip(named, tests, strict=True)]) > 0.98
