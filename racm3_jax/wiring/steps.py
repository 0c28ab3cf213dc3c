"""The generator's training step: for training, or by shape for compilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from racm3_jax import sharding
from racm3_jax.model.config import ModelConfig
from racm3_jax.model.transformer import Transformer, head_weights, init_params
from racm3_jax.training.loss import GeneratorLossConfig, make_generator_loss
from racm3_jax.training.optimizer import (
    OptimizerConfig,
    TrainedColumns,
    build_optimizer,
    build_schedule,
)
from racm3_jax.training.step import (
    LossFn,
    TrainState,
    TrainStep,
    abstract_state,
    make_train_step,
)
from racm3_jax.types import Batch
from racm3_jax.vocab import Vocab
from racm3_jax.wiring.parts import build_model_config, build_tokenizer
from racm3_jax.wiring.sections import TrainConfig, construct

# The choices of config.train_only; the first is the default.
TRAIN_ONLY = ("all", "image_output_rows")


@dataclasses.dataclass(frozen=True)
class AbstractTraining:
    """A training by shape only, as needed for compilation.

    Attributes:
      step: of the training, not compiled yet.
      state: shapes, dtypes and shardings.
      batch: the same.
      mesh: the devices, attached or not.
    """

    step: TrainStep
    state: TrainState
    batch: Batch
    mesh: Mesh


def build_vocab(config: Any) -> Vocab:
    """Of `config.vocab`, or of the tokenizers where a config has none."""
    if "vocab" in config:
        return construct(Vocab, config.vocab, "vocab")
    return build_tokenizer(config).vocab


def build_generator_loss(
    config: Any, model_config: ModelConfig, vocab: Vocab
) -> LossFn:
    """The loss of `training.loss` over this model."""
    model: Any = Transformer(model_config)
    return make_generator_loss(
        lambda params, *inputs: model.apply({"params": params}, *inputs),
        lambda params: head_weights(params, model_config),
        vocab,
        construct(GeneratorLossConfig, config.loss, "loss"),
    )


def build_trained_columns(
    config: Any, model_config: ModelConfig, vocab: Vocab
) -> TrainedColumns | None:
    """The trained columns of `config.train_only`; None means everything.

    "image_output_rows" are the head's columns of the image codes: it restores image
    output in a model that can read images, and changes nothing else.

    Raises:
      ValueError: an unknown choice, or tied embeddings.
    """
    choice = config.get("train_only", TRAIN_ONLY[0])
    if choice not in TRAIN_ONLY:
        raise ValueError(
            f"config.train_only is {choice!r}; allowed: {', '.join(TRAIN_ONLY)}"
        )
    if choice == TRAIN_ONLY[0]:
        return None
    if model_config.tie_embeddings:
        raise ValueError(
            f"config.train_only is {choice!r}, but the output rows are the embedding's "
            "too: it needs config.model.tie_embeddings=False"
        )
    return TrainedColumns("head", vocab.image_range.start, vocab.image_range.stop)


def build_train_step(
    config: Any,
    mesh: Mesh,
    loss_fn: LossFn,
    init_fn: Callable[[jax.Array], Any],
    make_state: Callable[[optax.GradientTransformation], TrainState],
    trained: TrainedColumns | None = None,
    assigned: tuple[str, ...] = (),
) -> tuple[TrainState, TrainStep]:
    """Builds the state and the step, from the sections common to all trainings.

    Args:
      config: its sections `optimizer` and `train`.
      mesh: where the step runs.
      loss_fn: of the model.
      init_fn: key -> boxed parameters; only their names and axes are used.
      make_state: `make_state(optimizer)` -> the first state, real or abstract.
      trained: the trained part, if not all.
      assigned: see `make_train_step`.
    """
    train = construct(TrainConfig, config.train, "train")
    settings = construct(
        OptimizerConfig, config.optimizer, "optimizer", num_steps=train.num_steps
    )
    boxed = jax.eval_shape(init_fn, jax.random.key(config.seed))
    optimizer = build_optimizer(settings, boxed)
    if trained is not None:
        optimizer = trained.restrict(optimizer)
        loss_fn = trained.restrict_loss(loss_fn)
    state = make_state(optimizer)
    step = make_train_step(
        loss_fn,
        optimizer,
        mesh,
        state,
        seed=config.seed,
        schedule=build_schedule(settings),
        num_microbatches=train.num_microbatches,
        skip_nonfinite=train.max_skipped_steps > 0,
        assigned=assigned,
    )
    return state, step


def build_abstract_training(
    config: Any, devices: Sequence[Any] | None = None
) -> AbstractTraining:
    """The generator's training by shape: without data, weights or memory.

    Args:
      config: of a generator.
      devices: of the mesh, attached or not; JAX's own by default.

    Raises:
      ValueError: a config of another kind, or a mesh that does not fit the devices.
    """
    if config.kind != "generator":
        raise ValueError(
            f"config.kind is {config.kind!r}: only a generator's training compiles "
            "by shape"
        )
    vocab = build_vocab(config)
    model_config = build_model_config(config, vocab)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)

    def init_fn(key: jax.Array) -> Any:
        return init_params(model_config, key, boxed=True)

    state, step = build_train_step(
        config,
        mesh,
        build_generator_loss(config, model_config, vocab),
        init_fn,
        lambda optimizer: abstract_state(init_fn, optimizer, mesh),
        build_trained_columns(config, model_config, vocab),
    )
    shape = (config.pipeline.rows, config.pipeline.row_length)
    return AbstractTraining(step, state, abstract_batch(shape, mesh), mesh)


def abstract_batch(shape: tuple[int, int], mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a batch of packed rows.

    Raises:
      ShardingError: rows that the mesh does not divide.
    """
    num_shards = sharding.count_row_shards(mesh)
    if shape[0] % num_shards:
        raise sharding.ShardingError(
            f"config.pipeline.rows is {shape[0]}, which does not divide over "
            f"{num_shards} parts (dcn x data x fsdp): give a multiple of {num_shards}"
        )
    rows = sharding.batch_sharding(mesh)

    def column(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    return Batch(
        inputs=column(jnp.int32),
        targets=column(jnp.int32),
        loss_weights=column(jnp.float32),
        segment_ids=column(jnp.int32),
        positions=column(jnp.int32),
        is_main=column(jnp.bool_),
    )
