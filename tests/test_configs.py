"""Every file of configs/ is built: small ones for real, the 2.7B by shape."""

import pathlib

import jax
import numpy as np
import pytest

from racm3_jax import build, sharding
from racm3_jax.commands import configs
from racm3_jax.documents.flagworld import FlagworldConfig
from racm3_jax.evaluation.flagworld import SuiteSettings
from racm3_jax.model.transformer import init_params
from racm3_jax.retrieval.clip import CLIPConfig
from racm3_jax.retrieval.clip import init_params as init_clip
from racm3_jax.retrieval.clip_loss import CLIPLossConfig
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.pipeline import PipelineConfig
from racm3_jax.tokenizers.vqgan import VQGANConfig
from racm3_jax.tokenizers.vqgan_loss import VQGANLossConfig, init_vqgan
from racm3_jax.training.loss import GeneratorLossConfig
from racm3_jax.training.optimizer import OptimizerConfig, build_optimizer
from racm3_jax.training.step import abstract_state
from racm3_jax.vocab import Vocab

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
GENERATORS = [
    ("flagworld_tiny", ""),
    ("flagworld", ""),
    ("flagworld", "twin"),
    ("flagworld_quickstart", ""),
    ("flagworld_quickstart", "short"),
    ("racm3_2b7", ""),
    ("racm3_2b7", "fidelity"),
    ("cm3_2b7", ""),
]


def load(name, arg=""):
    return configs.load_config_file(f"{CONFIGS / name}.py:{arg}")


def test_every_config_is_covered():
    names = {str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.py")}
    covered = {name for name, _ in GENERATORS} | set(SUITES) | set(SWEEPS)
    assert names == covered | {"flagworld_vqgan", "flagworld_clip"}


def count(tree):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "arg"), GENERATORS)
def test_generator_configs(name, arg):
    config = load(name, arg)
    config.lock()
    if "vocab" in config:
        vocab = build.construct(Vocab, config.vocab, "vocab")
        assert vocab.size <= 65_536 + 16
    else:
        build.construct(FlagworldConfig, config.world, "world")
        vocab = Vocab(1024, 512, 64, config.tokenizer.num_sentinels)
    model = build.build_model_config(config, vocab)
    build.construct(CausalMaskingConfig, config.masking, "masking")
    build.construct(StrategyConfig, config.strategy, "strategy")
    build.construct(GeneratorLossConfig, config.loss, "loss")
    pipeline = build.construct(
        PipelineConfig,
        config.pipeline,
        "pipeline",
        num_query_variants=config.memory.num_query_variants,
    )
    assert pipeline.retrieval != (arg == "twin" or name.startswith("cm3"))
    assert pipeline.row_length <= model.max_length
    mesh = sharding.make_mesh(fsdp=4, tensor=2, data=1)
    optimizer = build_optimizer(
        build.construct(
            OptimizerConfig,
            config.optimizer,
            "optimizer",
            num_steps=config.train.num_steps,
        )
    )
    state = abstract_state(
        lambda key: init_params(model, key, boxed=True), optimizer, mesh
    )
    if name.endswith("2b7"):
        assert 2.6e9 < count(state.params) < 2.9e9
        # Every matrix lies in pieces: nothing large is copied to all devices.
        for leaf in jax.tree.leaves(state):
            if np.prod(leaf.shape) > 1e7 and "position" not in str(leaf):
                assert not leaf.sharding.is_fully_replicated


def test_vqgan_config():
    config = load("flagworld_vqgan")
    model = build.construct(VQGANConfig, config.vqgan, "vqgan")
    loss = build.construct(VQGANLossConfig, config.vqgan_loss, "vqgan_loss")
    assert (model.image_length, model.num_codes) == (64, 512)
    params = jax.eval_shape(lambda key: init_vqgan(model, loss, key), jax.random.key(0))
    assert count(params) < 3e6


def test_clip_config():
    config = load("flagworld_clip")
    model = build.construct(CLIPConfig, config.clip, "clip", vocab_size=1026)
    build.construct(CLIPLossConfig, config.clip_loss, "clip_loss")
    params = jax.eval_shape(lambda key: init_clip(model, key), jax.random.key(0))
    assert count(params) < 3e6


def test_evaluation_config():
    config = load("eval/flagworld")
    build.construct(SuiteSettings, config.settings, "settings")
    world = build.build_world(config)
    held_out = world.num_heldout * world.documents_per_heldout
    assert world.num_heldout >= 300
    assert held_out + world.num_nations * world.documents_per_nation >= 20_000


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean config.pipeline.row_length\?"):
        build.construct(
            PipelineConfig,
            {"rows": 1, "row_lenght": 5, "examples_per_batch": 1},
            "pipeline",
        )


def test_dropout_is_refused_because_the_trainer_would_ignore_it():
    config = load("flagworld_tiny")
    with config.unlocked():
        config.model.dropout = 0.1
    with pytest.raises(ValueError, match=r"config.model.dropout is 0.1"):
        build.build_model_config(config, Vocab(1024, 512, 64, 16))
