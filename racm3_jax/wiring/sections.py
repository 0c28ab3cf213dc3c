"""The schema of config files: one frozen dataclass per file, one per section.

    file     kind or suite     ->  its class in TRAININGS, or of its SuiteEntry
    section  config.pipeline   ->  PipelineConfig, ...
             config.world      ->  the settings of the world `config.world_name`

An unknown key is an error that names the nearest one; missing values and wrong types
are errors, too: no setting is ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from racm3_jax import checksums
from racm3_jax.buckets import refuse_url
from racm3_jax.documents.augmentation import NO_AUGMENTATION, AugmentationConfig
from racm3_jax.evaluation.settings import CocoSettings, LikelihoodSettings
from racm3_jax.limits import check_range
from racm3_jax.model.config import ModelConfig
from racm3_jax.retrieval.clip import CLIPConfig
from racm3_jax.retrieval.clip_loss import CLIPLossConfig
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.episodes import EpisodeConfig
from racm3_jax.sequences.pairing import PairingConfig
from racm3_jax.sequences.pipeline_config import PipelineConfig
from racm3_jax.tokenizers.vqgan import VQGANConfig
from racm3_jax.tokenizers.vqgan_loss import VQGANLossConfig
from racm3_jax.training.loss import GeneratorLossConfig
from racm3_jax.training.optimizer import OptimizerConfig
from racm3_jax.vocab import Vocab
from racm3_jax.worlds import DEFAULT_WORLD, World, find_suite, find_world, list_suites

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`config.train`: length, logging, checkpoints and evaluation.

    Attributes:
      num_steps: total number of steps.
      log_every: steps between two lines of the log.
      checkpoint_every: steps between two checkpoints.
      keep_checkpoints: number of checkpoints to keep.
      num_microbatches: parts of a batch, for gradient accumulation.
      max_skipped_steps: how many steps in a row may be skipped as not finite; with 0 the
        first one ends the training.
      watchdog_seconds: timeout of a step, which ends the process; 0: none.
      eval_every: steps between two evaluations on held-out documents; 0: none.
      eval_documents: number of held-out documents for evaluation.
      patience: early stopping after this many evaluations without a lower held-out
        loss; the best weights are exported. 0 trains to the last step and exports the
        last weights.
      sheet_rows: held-out documents on the sheet `samples/step-….png` of every
        evaluation; 0: no sheet.
    """

    num_steps: int
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    num_microbatches: int = 1
    max_skipped_steps: int = 0
    watchdog_seconds: float = 0.0
    eval_every: int = 0
    eval_documents: int = 64
    patience: int = 0
    sheet_rows: int = 4

    def __post_init__(self) -> None:
        counts = ("num_steps", "checkpoint_every", "keep_checkpoints")
        check_range(self, "train", *counts, low=1)
        check_range(self, "train", "eval_every", "patience", "sheet_rows", low=0)
        check_range(self, "train", "eval_documents", low=2)
        if self.patience and not self.eval_every:
            raise ValueError(
                f"train.patience={self.patience} counts evaluations: give "
                "train.eval_every, too"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """`config.mesh`: the devices, see `sharding.mesh_sizes`."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    dcn: int = 1


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """`config.tokenizer`: folders of trained tokenizers, number of sentinels."""

    text: str
    image: str
    num_sentinels: int
    # Side of the images, if other than the image tokenizer's; 0: its own.
    image_size: int = 0


@dataclasses.dataclass(frozen=True)
class TextTokenizerConfig:
    """`config.text_tokenizer`: trained or loaded by CLIP's training."""

    vocab_size: int
    # Folder of a trained one, or "" to train one on the captions.
    path: str = ""


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """`config.memory`: the memory of a work directory.

    Attributes:
      index: back end of searches; "table" looks them up (see `parts.prepare_search`).
      num_query_variants: queries with dropout of each document.
      query_drop: fraction of a query's tokens or patches that is dropped.
      include_heldout: also include documents of held-out groups.
      cache: where a memory at a URL is copied to; "" is `~/.cache/racm3/memories`.
      verify_share: fraction of its bytes that is verified on opening, in randomly
        chosen files; unchanged files that this machine has verified before are skipped.
    """

    index: str = "auto"
    num_query_variants: int = 4
    query_drop: float = 0.2
    include_heldout: bool = False
    cache: str = ""
    verify_share: float = 1.0

    def __post_init__(self) -> None:
        checksums.sample(self.verify_share, print)  # checks the range


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """`config.inception`: weights of FID's network, and its resizing method."""

    weights: str
    variant: str
    resizing: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Training:
    """Settings of all trainings.

    Attributes:
      world: settings of a world to train on; without it, `source`.
      world_name: which world, see `racm3_jax.worlds`.
      source: documents to train on, see `documents.sources`.
      group_key: the metadata key of groups, see there.
      holdout: the held-out groups, see there.
      augmentation: of the training images.
    """

    kind: str
    seed: int
    optimizer: OptimizerConfig
    mesh: MeshConfig
    train: TrainConfig
    world: Any = None
    world_name: str = DEFAULT_WORLD
    source: str = ""
    group_key: str = ""
    holdout: str = ""
    augmentation: AugmentationConfig = NO_AUGMENTATION

    def __post_init__(self) -> None:
        if self.world is not None and (self.source or self.group_key or self.holdout):
            raise ValueError(
                f"config.world is a {self.world_name} with groups and held-out ones of "
                "its own: remove config.source, group_key and holdout, or remove world"
            )
        if self.world is None and self.world_name != DEFAULT_WORLD:
            raise ValueError(
                f"config.world_name is {self.world_name!r}, but there is no config.world "
                "with its settings"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQGANTraining(_Training):
    """A file with `kind = "vqgan"`."""

    vqgan: VQGANConfig
    vqgan_loss: VQGANLossConfig
    batch_size: int
    codebook_images: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTraining(_Training):
    """A file with `kind = "clip"`. `clip.vocab_size` is the text tokenizer's.

    Attributes:
      rename_key: metadata key of names that a batch replaces in its texts by invented
        ones, the same in both texts of a pair, so that no image can be learned by name
        and names are compared by their letters; "" keeps the names.
      aligned_scale: the aligned part of the exported embeddings is multiplied by this
        (`clip.scale_aligned`). It describes, and documents are found better by a whole
        in which it weighs less.
    """

    clip: CLIPConfig
    clip_loss: CLIPLossConfig
    text_tokenizer: TextTokenizerConfig
    batch_size: int
    rename_key: str = ""
    aligned_scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorTraining(_Training):
    """A file with `kind = "generator"`. `model.vocab_size` is the tokenizer's.

    Attributes:
      embedder: folder of the memory's CLIP.
      embedder_dtype: its compute dtype, see `CLIPConfig.compute_dtype`.
      init_from: folder of initial weights; "" means random initialisation.
      memory_path: an existing memory, or its URL; "" builds one from the corpus in
        the work directory.
      vocab: of a model without its tokenizer (`racm3 estimate`).
      train_only: see `steps.TRAIN_ONLY`.
      num_train_documents: of the quickstart's memory.
      num_prompts: of the quickstart.
    """

    tokenizer: TokenizerConfig
    embedder: str
    memory: MemoryConfig
    strategy: StrategyConfig
    masking: CausalMaskingConfig
    pipeline: PipelineConfig
    model: ModelConfig
    loss: GeneratorLossConfig
    embedder_dtype: str = "auto"
    init_from: str = ""
    memory_path: str = ""
    train_only: str = "all"
    vocab: Vocab | None = None
    episodes: EpisodeConfig | None = None
    pairing: PairingConfig | None = None
    num_train_documents: int = 0
    num_prompts: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOfModels:
    """What every suite says that can build the memory of a world.

    Attributes:
      suite: its name.
      models: a folder of models.
      model: the one with a memory, in this folder.
      twin: the one without; "" leaves it out.
      world: the world's settings; a suite of one world has its class here.
      memory: of `world`.
      strategy: of retrieval.
    """

    suite: str
    models: str
    model: str
    twin: str
    world: Any
    memory: MemoryConfig
    strategy: StrategyConfig


@dataclasses.dataclass(frozen=True)
class CocoEvaluation:
    """A file with `suite = "coco"`."""

    suite: str
    coco: str
    num_items: int
    split: str
    models: str
    memory: str
    strategy: StrategyConfig
    settings: CocoSettings
    inception: InceptionConfig
    judge_clip: str
    reference: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodEvaluation(EvaluationOfModels):
    """A file with `suite = "likelihood"`."""

    world_name: str = DEFAULT_WORLD
    source: str
    num_items: int
    memory_path: str
    class_key: str
    kshot_source: str
    settings: LikelihoodSettings


TRAININGS: Mapping[str, type] = {
    "generator": GeneratorTraining,
    "clip": CLIPTraining,
    "vqgan": VQGANTraining,
}
# `memory` is a string in an evaluation on COCO; sources check URLs themselves.
_MAY_BE_URLS = ("memory_path", "memory", "source", "kshot_source")
# Placeholder until the tokenizer is loaded.
_UNKNOWN_VOCAB_SIZE = 1 << 16


def read_training(config: Any) -> Any:
    """Reads and checks all sections of a training config.

    Raises:
      ValueError: an unknown kind, section, key, value or type, or a missing one.
    """
    return _read(config, TRAININGS[_choose(config, "kind", TRAININGS)])


def read_evaluation(config: Any) -> Any:
    """Reads and checks all sections of an evaluation config.

    Raises:
      ValueError: an unknown suite, section, key, value or type, or a missing one.
    """
    return _read(config, find_suite(_choose(config, "suite", list_suites())).config)


def _choose(config: Any, key: str, names: Collection[str]) -> str:
    if key not in config:
        raise ValueError(
            f"the config has no setting {key!r}; give one of {', '.join(sorted(names))}"
        )
    if config[key] not in names:
        raise ValueError(
            f"config.{key} is {config.get(key)!r}; allowed: {', '.join(sorted(names))}"
        )
    return config[key]


def choose_world(config: Any) -> World:
    """The world that `config.world_name` names.

    Raises:
      ValueError: there is none of this name.
    """
    return find_world(config.get("world_name", DEFAULT_WORLD))


def choose_class_key(config: Any, class_key: str) -> str:
    """`class_key` of a section; if it is "", that of the world, if there is one.

    Raises:
      ValueError: there is no world of the config's name.
    """
    if class_key or config.get("world") is None or config.get("source"):
        return class_key
    world = choose_world(config)
    return world.class_key or world.group_key


def _read(config: Any, cls: type) -> Any:
    _check_keys(cls, config, "config", ())
    _refuse_urls(config, "config")
    hints = typing.get_type_hints(cls)
    values = {}
    for name in config:
        section = _section_class(hints[name])
        if name == "world" and section is None and config["world"] is not None:
            section = choose_world(config).settings
        if section is None:
            _check_type(config[name], hints[name], f"config.{name}")
            values[name] = config[name]
            continue
        if not isinstance(config[name], Mapping) and not hasattr(config[name], "keys"):
            raise ValueError(
                f"config.{name} is {config[name]!r}: it is a section of settings, "
                f"as config.{name}.{dataclasses.fields(section)[0].name}"
            )
        values[name] = construct(section, config[name], name, **_computed(name, config))
    return cls(**values)


def _refuse_urls(section: Any, where: str) -> None:
    """Refuses a URL in a setting that is neither a source nor a memory."""
    for name in section:
        value, place = section[name], f"{where}.{name}"
        if hasattr(value, "keys"):
            _refuse_urls(value, place)
        elif isinstance(value, str) and name not in _MAY_BE_URLS:
            refuse_url(value, place)


def _computed(section: str, config: Any) -> dict[str, Any]:
    """Settings of a section that follow from other sections."""
    if section == "clip":
        return {"vocab_size": _UNKNOWN_VOCAB_SIZE}
    if section == "model":
        images = {"image_length": 1, "first_code": 0, "num_codes": 1}
        return {"vocab_size": _UNKNOWN_VOCAB_SIZE} | images
    if section == "optimizer":
        train = construct(TrainConfig, config["train"], "train")
        return {"num_steps": train.num_steps}
    if section == "pipeline":
        memory = construct(MemoryConfig, config["memory"], "memory")
        return {
            "seed": config["seed"],
            "num_query_variants": memory.num_query_variants,
            "max_examples": count_examples(config),
        }
    return {}


def count_examples(config: Any) -> int:
    """Maximum examples per row: the model's bound minus one, for the padding."""
    settings = construct(
        ModelConfig, config["model"], "model", **_computed("model", {})
    )
    return settings.max_segments - 1


def _section_class(hint: Any) -> type | None:
    """The dataclass of a field, also if it may be None."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((o for o in options if dataclasses.is_dataclass(o)), None)  # type: ignore[return-value]


def construct(cls: type[T], section: Mapping[str, Any], where: str, **more: Any) -> T:
    """Calls a dataclass's constructor with a config section.

    Args:
      cls: of the section.
      section: its settings.
      where: its name, for errors.
      more: additional settings from elsewhere.

    Raises:
      ValueError: for a key that the dataclass does not have (names the nearest one), a
        missing one, or a value of another type.
    """
    _check_keys(cls, section, f"config.{where}", tuple(more))
    hints = typing.get_type_hints(cls)
    for key in section:
        _check_type(section[key], hints[key], f"config.{where}.{key}")
    values = {
        key: tuple(section[key]) if isinstance(section[key], list) else section[key]
        for key in section
    }
    return cls(**values, **more)


def _check_keys(
    cls: Any, section: Mapping[str, Any], where: str, given: tuple[str, ...]
) -> None:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in given}
    for key in section:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1, 0.0)
            raise ValueError(
                f"{where}.{key} is not a setting; did you mean {where}.{near[0]}?"
            )
    for name, field in fields.items():
        needed = dataclasses.MISSING is field.default is field.default_factory
        if needed and name not in section:
            raise ValueError(f"{where}.{name} is missing: it has no default")


def _check_type(value: Any, hint: Any, where: str) -> None:
    """Checks the type of a value; an int may also be a float."""
    allowed = {bool: bool, int: int, float: int | float, str: str}.get(hint)
    if allowed is None:
        return
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(
            f"{where} is {value!r}, of type {type(value).__name__}; it must be of type "
            f"{hint.__name__}"
        )
