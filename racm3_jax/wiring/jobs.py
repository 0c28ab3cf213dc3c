"""The training jobs: generator, CLIP, VQGAN."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64

from racm3_jax import checkpoints
from racm3_jax.documents.sources import TIMES_KEY, Corpus, repeat_rows
from racm3_jax.memory.format import hash_name
from racm3_jax.memory.memory import Memory
from racm3_jax.model.config import ModelConfig
from racm3_jax.model.transformer import (
    abstract_params,
    count_params,
    fit_image_positions,
    init_params,
    stack_layers,
    unstack_layers,
)
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.sequences.causal_masking import CausalMaskingConfig, SegmentOrder
from racm3_jax.sequences.episodes import Episodes
from racm3_jax.sequences.pairing import Pairing
from racm3_jax.sequences.pipeline import PipelineConfig, make_batches
from racm3_jax.sharding import local_rows
from racm3_jax.tokenizers.mixed import MixedTokenizer
from racm3_jax.training.hardware import flops_per_token
from racm3_jax.training.processes import fetch_all
from racm3_jax.training.step import TrainState
from racm3_jax.wiring import heldout
from racm3_jax.wiring.corpora import build_corpus, read_heldout, read_memory_documents
from racm3_jax.wiring.encoder_jobs import build_clip_job, build_vqgan_job
from racm3_jax.wiring.generators import (
    ask_as_trained,
    carry_origin,
    read_defaults,
    save_generator,
)
from racm3_jax.wiring.job import Job, make_job
from racm3_jax.wiring.parts import (
    build_embedder,
    build_episodes,
    build_memory,
    build_mesh,
    build_model_config,
    build_pairing,
    build_retriever,
    build_tokenizer,
    open_memory,
    prepare_search,
    resolve,
)
from racm3_jax.wiring.rows import find_main_rows, read_column
from racm3_jax.wiring.sections import (
    TrainConfig,
    construct,
    count_examples,
    read_training,
)
from racm3_jax.wiring.steps import build_generator_loss, build_trained_columns
from racm3_jax.wiring.variants import build_variants


def build_job(config: Any, workdir: Path) -> Job:
    """The training job of `config.kind`.

    Raises:
      ValueError: a config with an unknown kind or key, or a wrong value.
    """
    read_training(config)
    builders = {
        "generator": build_generator_job,
        "clip": build_clip_job,
        "vqgan": build_vqgan_job,
    }
    return builders[config.kind](config, workdir)


def build_generator_job(config: Any, workdir: Path) -> Job:
    """Trains RA-CM3 (or the baseline without retrieval), for `run.load`."""
    pipeline = construct(
        PipelineConfig,
        config.pipeline,
        "pipeline",
        seed=config.seed,
        num_query_variants=config.memory.num_query_variants,
        max_examples=count_examples(config),
    )
    # Before anything is loaded: checks that the mesh divides the rows.
    mesh = build_mesh(config)
    rows = local_rows(mesh, pipeline.rows)
    tokenizer, embedder = build_tokenizer(config), build_embedder(config)
    memory = _prepare_memory(config, workdir, tokenizer, embedder)
    corpus = _find_corpus(config)
    if pipeline.retrieval:
        memory.check_variant(pipeline.num_query_variants)
    main_ids = find_main_rows(memory, workdir)
    if corpus is not None and corpus.times != (1.0,):
        main_ids = _repeat_main_rows(main_ids, memory, corpus, config.seed, workdir)
    model_config = build_model_config(config, tokenizer.vocab)
    masking = construct(CausalMaskingConfig, config.masking, "masking")
    retriever = build_retriever(config, memory) if pipeline.retrieval else None
    episodes = build_episodes(config, memory, tokenizer, workdir)
    pairing = build_pairing(config, memory, tokenizer, workdir)
    variants = build_variants(config, memory, tokenizer, workdir)
    check_positions(model_config, pipeline, episodes, pairing)

    def make(start_step: int) -> Iterator[Any]:
        return make_batches(
            memory,
            retriever,
            main_ids,
            tokenizer.vocab,
            masking,
            pipeline,
            start_step=start_step,
            num_steps=config.train.num_steps - start_step,
            rows=rows,
            episodes=episodes,
            pairing=pairing,
            variants=variants,
        )

    def export(state: TrainState) -> None:
        parts = model_config, state, tokenizer, embedder, pipeline.segment_order
        _export_generator(config, workdir, *parts)

    train, evaluate = construct(TrainConfig, config.train, "train"), None
    if train.eval_every:
        held_out = read_heldout(corpus or build_corpus(config), train.eval_documents)
        parts = model_config, tokenizer, embedder, retriever, held_out
        evaluate = heldout.judge_generator(config, *parts, workdir)
    job = make_job(
        config,
        mesh,
        lambda key: init_params(model_config, key, boxed=True),
        build_generator_loss(config, model_config, tokenizer.vocab),
        make,
        export,
        params=_read_first_params(config, model_config),
        with_stats=True,
        flops_per_token=flops_per_token(
            model_config,
            count_params(abstract_params(model_config)),
            pipeline.row_length,
        ),
        trained=build_trained_columns(config, model_config, tokenizer.vocab),
        evaluate=evaluate,
    )
    return dataclasses.replace(
        job,
        inputs={
            "memory": memory.fingerprint(),
            "tokenizer": tokenizer.fingerprint(),
            "embedder": embedder.fingerprint(),
        },
        num_main_documents=len(main_ids),
    )


def _prepare_memory(
    config: Any, workdir: Path, tokenizer: MixedTokenizer, embedder: DocumentEmbedder
) -> Memory:
    """The memory that the config names, or one that is built; ready for its search."""
    if config.get("memory_path"):
        memory = open_memory(config, config.memory_path, tokenizer, embedder)
    else:
        documents = read_memory_documents(config)
        memory = build_memory(
            config, workdir / "memory", documents, tokenizer, embedder
        )
    prepare_search(config, memory)
    return memory


def _export_generator(
    config: Any,
    workdir: Path,
    model_config: ModelConfig,
    state: TrainState,
    tokenizer: MixedTokenizer,
    embedder: DocumentEmbedder,
    segment_order: SegmentOrder,
) -> None:
    """Writes what `run.load` opens, from one process."""
    params = fetch_all(state.params)
    if jax.process_index() != 0:
        return
    defaults: dict[str, Any] = {}
    if config.init_from:
        start = resolve(config.init_from)
        defaults = read_defaults(checkpoints.read_config(start)["extra"], start)
        if carry_origin(start, workdir):
            # `racm3 export` writes such weights layer by layer.
            params = unstack_layers(params)
            model_config = dataclasses.replace(model_config, scan_layers=False)
    strategy = construct(StrategyConfig, config.strategy, "strategy")
    defaults = ask_as_trained(defaults, segment_order)
    save_generator(
        workdir, model_config, params, tokenizer, embedder, strategy, defaults
    )


def check_positions(
    model_config: ModelConfig,
    pipeline: PipelineConfig,
    episodes: Episodes | None,
    pairing: Pairing | None,
) -> None:
    """Checks that positions do not exceed the learned ones (rotary have no limit).

    Raises:
      ValueError: a batch may have positions without parameters in the model.
    """
    num_documents = pipeline.max_documents
    if pairing is not None:
        num_documents = max(num_documents, *pairing.config.num_documents)
    if episodes is not None:
        num_documents = max(num_documents, episodes.config.num_ways)
    last = pipeline.last_position(num_documents)
    if model_config.position == "learned" and last >= model_config.max_length:
        raise ValueError(
            f"config.model.max_length is {model_config.max_length}, but batches have "
            f"positions up to {last}: raise it, or lower pipeline.row_length, "
            "pipeline.max_position_offset or pipeline.max_position_gap"
        )


def _read_first_params(config: Any, model_config: ModelConfig) -> Any:
    """The weights of `config.init_from`, stacked or unrolled as the model needs."""
    if not config.init_from:
        return None
    start = resolve(config.init_from)
    params, _, extra = checkpoints.load_weights(start, "generator")
    read_defaults(extra, start)  # they are kept with the trained weights
    params = fit_image_positions(params, model_config)
    if not model_config.scan_layers:
        return unstack_layers(params)
    return params if "layers" in params else stack_layers(params)


def _find_corpus(config: Any) -> Corpus | None:
    """The corpus; None if a config has only a memory, as for a large model."""
    if config.get("world") is None and not config.get("source", ""):
        return None
    return build_corpus(config)


def _repeat_main_rows(
    rows: Int64[np.ndarray, " rows"],
    memory: Memory,
    corpus: Corpus,
    seed: int,
    workdir: Path,
) -> Int64[np.ndarray, " seen"]:
    """Repeats the rows by the weights of their sources."""
    column = read_column(memory, TIMES_KEY, workdir)[rows]
    times = np.ones(len(rows))
    for value in corpus.times:
        times[column == hash_name(str(value))] = value
    return rows[repeat_rows(times, seed)]
