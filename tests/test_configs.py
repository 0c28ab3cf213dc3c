"""Every file of configs/ is built: small ones completely, the 2.7B by shape."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from racm3_jax import sharding, wiring
from racm3_jax.commands import configs
from racm3_jax.evaluation.inception import VARIANTS
from racm3_jax.evaluation.resizing import RESIZINGS
from racm3_jax.evaluation.settings import CocoSettings, LikelihoodSettings
from racm3_jax.flagworld import FlagworldConfig
from racm3_jax.flagworld.settings import FlagworldSettings, TaskSettings
from racm3_jax.model.config import ModelConfig, chameleon_7b
from racm3_jax.model.transformer import init_params
from racm3_jax.retrieval.clip import CLIPConfig
from racm3_jax.retrieval.clip import init_params as init_clip
from racm3_jax.retrieval.clip_loss import CLIPLossConfig
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.pairing import Pairing, PairingConfig
from racm3_jax.sequences.pipeline import PipelineConfig
from racm3_jax.sweeps import Hyper, as_flags, name_point
from racm3_jax.tokenizers.vqgan import VQGANConfig
from racm3_jax.tokenizers.vqgan_loss import VQGANLossConfig, init_vqgan
from racm3_jax.training.loss import GeneratorLossConfig
from racm3_jax.training.optimizer import OptimizerConfig, build_optimizer
from racm3_jax.training.step import abstract_state
from racm3_jax.vocab import Vocab
from racm3_jax.wiring.jobs import check_positions
from racm3_jax.worlds import find_suite

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
GENERATORS = [
    ("flagworld_tiny", ""),
    ("flagworld", ""),
    ("flagworld", "twin"),
    ("flagworld_quickstart", ""),
    ("flagworld_quickstart", "short"),
    ("flagworld_reading", ""),
    ("flagworld_reading", "alike"),
    ("flagworld_reading", "names"),
    ("flagworld_reading", "first"),
    ("flagworld_reading", "larger"),
    ("flagworld_reading", "full"),
    ("flagworld_reading", "second"),
    ("flagworld_reading", "third"),
    ("flagworld_reading", "fourth"),
    ("flagworld_reading", "fifth"),
    ("flagworld_reading", "twin"),
    ("own_generator", ""),
    ("own_generator", "64"),
    ("racm3_2b7", ""),
    ("racm3_2b7", "fidelity"),
    ("cm3_2b7", ""),
    ("chameleon_finetune", ""),
    ("chameleon_finetune", "image_output"),
]
# Of each evaluation config: its suite's settings, and the arguments that it takes.
SUITES = {
    "eval/coco": (CocoSettings, ("", "text_to_image", "captioning")),
    "eval/flagworld": (FlagworldSettings, ("", "some/folder")),
    "eval/flagworld_tasks": (TaskSettings, ("", "some/folder")),
    "eval/likelihood": (LikelihoodSettings, ("", "some/folder")),
}
SWEEPS = {"sweeps/flagworld_alpha": ("", "tiny")}


def load(name, arg=""):
    return configs.load_config_file(f"{CONFIGS / name}.py:{arg}")


ENCODERS = {"flagworld_vqgan", "flagworld_clip", "own_tokenizer", "own_clip"}


def test_every_config_is_covered():
    names = {str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.py")}
    covered = {name for name, _ in GENERATORS} | set(SUITES) | set(SWEEPS)
    assert names == covered | ENCODERS


def count(tree):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "arg"), GENERATORS)
def test_generator_configs(name, arg):
    config = load(name, arg)
    config.lock()
    if "vocab" in config:
        vocab = wiring.construct(Vocab, config.vocab, "vocab")
        assert vocab.size <= 65_536 + 16
    else:
        if "world" in config:
            wiring.construct(FlagworldConfig, config.world, "world")
        vocab = Vocab(1024, 512, 64, config.tokenizer.num_sentinels)
    model = wiring.build_model_config(config, vocab)
    wiring.construct(CausalMaskingConfig, config.masking, "masking")
    wiring.construct(StrategyConfig, config.strategy, "strategy")
    wiring.construct(GeneratorLossConfig, config.loss, "loss")
    pipeline = wiring.construct(
        PipelineConfig,
        config.pipeline,
        "pipeline",
        num_query_variants=config.memory.num_query_variants,
    )
    assert pipeline.retrieval != (arg == "twin" or name.startswith("cm3"))
    assert pipeline.row_length <= model.max_length
    if "pairing" in config:
        wiring.construct(PairingConfig, config.pairing, "pairing")
    check_positions(model, pipeline, None, None)
    mesh = sharding.make_mesh(fsdp=4, tensor=2, data=1)
    optimizer = build_optimizer(
        wiring.construct(
            OptimizerConfig,
            config.optimizer,
            "optimizer",
            num_steps=config.train.num_steps,
        )
    )
    trained = wiring.build_trained_columns(config, model, vocab)
    assert (trained is not None) == (arg == "image_output")
    if trained is not None:
        optimizer = trained.restrict(optimizer)
    state = abstract_state(
        lambda key: init_params(model, key, boxed=True), optimizer, mesh
    )
    if name == "chameleon_finetune":
        rows = vocab.size
        assert model == chameleon_7b(vocab_size=rows, num_kv_heads=32, remat="full")
        assert 7.0e9 < count(state.params) < 7.1e9
        # Moments of all weights, or of one column of the head an image code.
        moments = 2 * (4096 * 8192 if trained else count(state.params))
        assert moments <= count(state.opt_state) <= moments + 2
    elif name.endswith("2b7"):
        assert 2.6e9 < count(state.params) < 2.9e9
        # Every matrix is sharded: nothing large is copied to all devices.
        for leaf in jax.tree.leaves(state):
            if np.prod(leaf.shape) > 1e7 and "position" not in str(leaf):
                assert not leaf.sharding.is_fully_replicated


def test_vqgan_config():
    config = load("flagworld_vqgan")
    model = wiring.construct(VQGANConfig, config.vqgan, "vqgan")
    loss = wiring.construct(VQGANLossConfig, config.vqgan_loss, "vqgan_loss")
    assert (model.image_length, model.num_codes) == (64, 512)
    params = jax.eval_shape(lambda key: init_vqgan(model, loss, key), jax.random.key(0))
    assert count(params) < 3e6


def test_learned_positions_limit_the_length():
    model = ModelConfig(vocab_size=10, max_length=64, position="learned")
    sizes = {"rows": 1, "row_length": 40, "examples_per_batch": 1}
    fits = PipelineConfig(**sizes, max_position_offset=20, max_position_gap=2)
    check_positions(model, fits, None, None)
    pairing = Pairing(
        PairingConfig(1.0, (0, 4), rename=False), np.array([0, 0, 1]), None
    )
    with pytest.raises(ValueError, match="have positions up to 67: raise it"):
        check_positions(model, fits, None, pairing)
    rotary = dataclasses.replace(model, position="rope")
    check_positions(rotary, fits, None, pairing)


def test_clip_config():
    config = load("flagworld_clip")
    model = wiring.construct(CLIPConfig, config.clip, "clip", vocab_size=1026)
    wiring.construct(CLIPLossConfig, config.clip_loss, "clip_loss")
    params = jax.eval_shape(lambda key: init_clip(model, key), jax.random.key(0))
    assert count(params) < 3e6


@pytest.mark.parametrize(
    ("name", "arg"), [(name, arg) for name, (_, args) in SUITES.items() for arg in args]
)
def test_evaluation_configs(name, arg):
    config = load(name, arg)
    config.lock()
    assert name == f"eval/{config.suite}"
    assert type(wiring.read_evaluation(config)) is find_suite(config.suite).config
    settings = wiring.construct(SUITES[name][0], config.settings, "settings")
    wiring.construct(StrategyConfig, config.strategy, "strategy")
    if name == "eval/coco":
        assert settings.task == (arg or "text_to_image")
        assert (config.num_items, settings.image_size) in ((30_000, 256), (5_000, 256))
        assert config.inception.variant in VARIANTS
        assert config.inception.resizing in RESIZINGS
    else:
        wiring.build_world(config)
        assert config.models == (arg or "shipped:flagworld")
        folder = wiring.resolve("shipped:flagworld")
        assert (folder / config.model).is_dir() and (folder / config.twin).is_dir()


@pytest.mark.parametrize(
    ("name", "arg"), [(name, arg) for name, args in SWEEPS.items() for arg in args]
)
def test_sweep_configs(name, arg):
    """Every point is a config that the trainer accepts."""
    module, _ = configs.load_config_module(f"{CONFIGS / name}.py:{arg}")
    points = module.get_hyper(Hyper())
    assert len({name_point(point) for point in points}) == len(points) == 4
    for point in points:
        flags = [f"--config={CONFIGS / name}.py:{arg}", *as_flags(point)]
        config = configs.read_config(flags)
        for key, value in point.items():
            section, setting = key.split(".")[1:]
            assert config[section][setting] == value
        model = wiring.build_model_config(config, Vocab(1024, 512, 64, 16))
        pipeline = wiring.construct(
            PipelineConfig,
            config.pipeline,
            "pipeline",
            num_query_variants=config.memory.num_query_variants,
        )
        assert pipeline.row_length <= model.max_length
        wiring.construct(
            OptimizerConfig,
            config.optimizer,
            "optimizer",
            num_steps=config.train.num_steps,
        )


def test_the_shipped_suite_is_large_enough():
    config = load("eval/flagworld")
    world = wiring.build_world(config)
    held_out = world.num_heldout * world.documents_per_heldout
    assert world.num_heldout >= 300
    assert held_out + world.num_nations * world.documents_per_nation >= 20_000


def test_rows_that_the_mesh_does_not_divide_are_refused_before_anything_is_loaded():
    config = load("racm3_2b7")  # whose tokenizer would be the next thing to miss
    config.pipeline.update(rows=12, groups=4)
    with pytest.raises(sharding.ShardingError, match="12 rows does not divide over 8"):
        wiring.build_job(config, pathlib.Path("unused"))


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean config.pipeline.row_length\?"):
        wiring.construct(
            PipelineConfig,
            {"rows": 1, "row_lenght": 5, "examples_per_batch": 1},
            "pipeline",
        )


@pytest.mark.parametrize(
    "name", [n for n in configs.list_configs() if not n.startswith("eval/")]
)
def test_an_unknown_argument_is_refused_by_the_name_that_was_given(name):
    with pytest.raises(ValueError, match=f"^{name}: unknown argument 'nope': "):
        configs.load_config_file(f"{name}:nope")


def test_dropout_is_refused_because_the_trainer_would_ignore_it():
    config = load("flagworld_tiny")
    with config.unlocked():
        config.model.dropout = 0.1
    with pytest.raises(ValueError, match=r"config.model.dropout is 0.1"):
        wiring.build_model_config(config, Vocab(1024, 512, 64, 16))
