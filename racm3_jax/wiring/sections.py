"""What a config file may say: one frozen dataclass a file, one a section.

    file     kind or suite     ->  its class in TRAININGS or SUITES
    section  config.pipeline   ->  PipelineConfig, ...

A key that no class has is an error that names the nearest one, a missing or mistyped
value as well, wherever it was written: nothing of a config goes unread.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from racm3_jax import checksums
from racm3_jax.buckets import refuse_url
from racm3_jax.documents.augmentation import NO_AUGMENTATION, AugmentationConfig
from racm3_jax.documents.flagworld import FlagworldConfig
from racm3_jax.evaluation.settings import (
    CocoSettings,
    FlagworldSettings,
    LikelihoodSettings,
    TaskSettings,
)
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

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`config.train`: how long, and what is kept on the way.

    Attributes:
      num_steps: the last step's number.
      log_every: steps between two lines of the log.
      checkpoint_every: steps between two checkpoints.
      keep_checkpoints: how many stay on disk.
      num_microbatches: parts of a batch whose gradients are added up.
      max_skipped_steps: how many steps in a row may be skipped as not finite; with 0 the
        first one ends the training.
      watchdog_seconds: ends a process whose step takes longer; 0 never does.
      eval_every: steps between two evaluations on held-out documents; 0 makes none.
      eval_documents: how many held-out documents are judged.
      patience: evaluations in a row without a lower held-out loss after which a training
        ends; its best weights are the ones that are kept. 0 trains to the last step and
        keeps the last weights.
      sheet_rows: held-out documents of the sheet `samples/step-….png` that every
        evaluation draws; 0 draws none.
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
        for name in ("num_steps", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"train.{name} must be >= 1; got {getattr(self, name)}"
                )
        for name in ("eval_every", "patience", "sheet_rows"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"train.{name} must be >= 0; got {getattr(self, name)}"
                )
        if self.patience and not self.eval_every:
            raise ValueError(
                f"train.patience={self.patience} counts evaluations: give "
                "train.eval_every, too"
            )
        if self.eval_documents < 2:
            raise ValueError(
                f"train.eval_documents must be >= 2; got {self.eval_documents}"
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
    """`config.tokenizer`: folders of trained ones, and how many sentinels are added."""

    text: str
    image: str
    num_sentinels: int
    # Side of smaller images of the same codes; 0 is the image tokenizer's own.
    image_size: int = 0


@dataclasses.dataclass(frozen=True)
class TextTokenizerConfig:
    """`config.text_tokenizer`: the one that CLIP's training makes, or keeps."""

    vocab_size: int
    # The folder of a trained one, or "" to train one on the captions.
    path: str = ""


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """`config.memory`: of the memory that a work directory gets.

    Attributes:
      index: back end of searches; "table" looks them up (see `parts.prepare_search`).
      num_query_variants: queries with dropout of each document.
      query_drop: share of a query's words or patches that are dropped.
      include_heldout: held-out groups are in it as well (flagworld's held-out nations).
      cache: where a memory at a URL is copied to; "" is `~/.cache/racm3/memories`.
      verify_share: share of its bytes that is compared with their checksums when it is
        opened, in files chosen at random; what this machine has read before is not read
        again.
    """

    index: str = "auto"
    num_query_variants: int = 4
    query_drop: float = 0.2
    include_heldout: bool = False
    cache: str = ""
    verify_share: float = 1.0

    def __post_init__(self) -> None:
        checksums.sample(self.verify_share, print)  # refuses what is no share


@dataclasses.dataclass(frozen=True)
class InceptionConfig:
    """`config.inception`: weights of FID's network, and how images come to its size."""

    weights: str
    variant: str
    resizing: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Training:
    """What every training has.

    Attributes:
      world: a flagworld to train on; without one, `source` is.
      source: documents to train on, see `documents.sources`.
      group_key: the metadata key that says "the same thing", see there.
      holdout: the groups that no training sees, see there.
      augmentation: changes of the images that are trained on.
    """

    kind: str
    seed: int
    optimizer: OptimizerConfig
    mesh: MeshConfig
    train: TrainConfig
    world: FlagworldConfig | None = None
    source: str = ""
    group_key: str = ""
    holdout: str = ""
    augmentation: AugmentationConfig = NO_AUGMENTATION

    def __post_init__(self) -> None:
        if self.world is not None and (self.source or self.group_key or self.holdout):
            raise ValueError(
                "config.world is a flagworld with groups and held-out nations of its own: "
                "leave config.source, group_key and holdout empty, or leave world out"
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
    """A file with `kind = "clip"`. `clip.vocab_size` is the text tokenizer's."""

    clip: CLIPConfig
    clip_loss: CLIPLossConfig
    text_tokenizer: TextTokenizerConfig
    batch_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorTraining(_Training):
    """A file with `kind = "generator"`. `model.vocab_size` is the tokenizer's.

    Attributes:
      embedder: folder of the CLIP that made the memory.
      embedder_dtype: what it computes in, see `CLIPConfig.compute_dtype`.
      init_from: folder of weights to begin with; "" begins at random.
      memory_path: a memory that exists, or the URL of one; "" builds one of the corpus in
        the work directory.
      vocab: of a model whose tokenizer is not at hand (`racm3 estimate`).
      train_only: see `steps.TRAIN_ONLY`.
      num_train_documents: of the quickstart's memory.
      num_prompts: that the quickstart draws.
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


@dataclasses.dataclass(frozen=True)
class _EvaluationOfModels:
    """What every suite says that can build flagworld's memory."""

    suite: str
    models: str
    model: str
    twin: str
    world: FlagworldConfig
    memory: MemoryConfig
    strategy: StrategyConfig


@dataclasses.dataclass(frozen=True)
class FlagworldEvaluation(_EvaluationOfModels):
    """A file with `suite = "flagworld"`."""

    settings: FlagworldSettings
    num_scene_examples: int
    num_sheet_rows: int


@dataclasses.dataclass(frozen=True)
class TasksEvaluation(_EvaluationOfModels):
    """A file with `suite = "flagworld_tasks"`."""

    settings: TaskSettings
    num_sheet_rows: int


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


@dataclasses.dataclass(frozen=True)
class LikelihoodEvaluation(_EvaluationOfModels):
    """A file with `suite = "likelihood"`."""

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
SUITES: Mapping[str, type] = {
    "flagworld": FlagworldEvaluation,
    "flagworld_tasks": TasksEvaluation,
    "coco": CocoEvaluation,
    "likelihood": LikelihoodEvaluation,
}
# `memory` is a text in an evaluation on COCO; sources look at theirs by themselves.
_MAY_BE_URLS = ("memory_path", "memory", "source", "kshot_source")
# What only a tokenizer can tell; put in place when it is loaded.
_UNKNOWN_VOCAB_SIZE = 1 << 16


def read_training(config: Any) -> Any:
    """The training that a config describes, every section of it.

    Raises:
      ValueError: an unknown kind, section, key, value or type, or a missing one.
    """
    return _read(config, "kind", TRAININGS)


def read_evaluation(config: Any) -> Any:
    """The evaluation that a config describes, every section of it.

    Raises:
      ValueError: an unknown suite, section, key, value or type, or a missing one.
    """
    return _read(config, "suite", SUITES)


def _read(config: Any, key: str, classes: Mapping[str, type]) -> Any:
    if key not in config:
        raise ValueError(
            f"the config has no setting {key!r}; give one of {', '.join(sorted(classes))}"
        )
    if config[key] not in classes:
        raise ValueError(
            f"config.{key} is {config.get(key)!r}; allowed: {', '.join(sorted(classes))}"
        )
    cls = classes[config[key]]
    _check_keys(cls, config, "config", ())
    _refuse_urls(config, "config")
    hints = typing.get_type_hints(cls)
    values = {}
    for name in config:
        section = _section_class(hints[name])
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
    """Refuses a URL in a setting that is no source and no memory."""
    for name in section:
        value, place = section[name], f"{where}.{name}"
        if hasattr(value, "keys"):
            _refuse_urls(value, place)
        elif isinstance(value, str) and name not in _MAY_BE_URLS:
            refuse_url(value, place)


def _computed(section: str, config: Any) -> dict[str, Any]:
    """The settings of a section that other sections decide."""
    if section in ("model", "clip"):
        return {"vocab_size": _UNKNOWN_VOCAB_SIZE}
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
    """Examples that a row may hold: the model's bound less one, for the padding."""
    settings = construct(
        ModelConfig, config["model"], "model", **_computed("model", {})
    )
    return settings.max_segments - 1


def _section_class(hint: Any) -> type | None:
    """The dataclass that a field holds, also where it may be None."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((o for o in options if dataclasses.is_dataclass(o)), None)  # type: ignore[return-value]


def construct(cls: type[T], section: Mapping[str, Any], where: str, **more: Any) -> T:
    """Calls a dataclass's constructor with a config section.

    Args:
      cls: of the section.
      section: its settings.
      where: its name, for errors.
      more: settings that are not the section's own.

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
    """Refuses numbers, flags and words in each other's place; a whole float is one."""
    allowed = {bool: bool, int: int, float: int | float, str: str}.get(hint)
    if allowed is None:
        return
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(
            f"{where} is {value!r}, of type {type(value).__name__}; it must be of type "
            f"{hint.__name__}"
        )
