"""The trainings: generator, CLIP, VQGAN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Int64

from racm3_jax import checkpoints
from racm3_jax.documents import batches as image_data
from racm3_jax.documents.flagworld import read_flagworld
from racm3_jax.model.config import ModelConfig
from racm3_jax.model.transformer import (
    abstract_params,
    count_params,
    init_params,
    stack_layers,
    unstack_layers,
)
from racm3_jax.retrieval import clip as clip_model
from racm3_jax.retrieval import clip_loss as clip_objective
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.episodes import Episodes
from racm3_jax.sequences.pairing import Pairing
from racm3_jax.sequences.pipeline import PipelineConfig, make_batches
from racm3_jax.sharding import leader_first, local_rows
from racm3_jax.tokenizers import vqgan as vqgan_model
from racm3_jax.tokenizers import vqgan_loss as vqgan_objective
from racm3_jax.tokenizers.bpe import TextTokenizer
from racm3_jax.tokenizers.image import ImageTokenizer
from racm3_jax.training.hardware import flops_per_token
from racm3_jax.training.optimizer import TrainedColumns
from racm3_jax.training.processes import fetch_all
from racm3_jax.training.step import LossFn, TrainState, TrainStep, init_state
from racm3_jax.wiring.generators import carry_origin, save_generator
from racm3_jax.wiring.parts import (
    build_embedder,
    build_episodes,
    build_memory,
    build_mesh,
    build_model_config,
    build_pairing,
    build_retriever,
    build_tokenizer,
    build_world,
    open_memory,
    prepare_search,
    read_memory_documents,
    resolve,
)
from racm3_jax.wiring.rows import find_main_rows
from racm3_jax.wiring.sections import (
    TrainConfig,
    construct,
    count_examples,
    read_training,
)
from racm3_jax.wiring.steps import (
    build_generator_loss,
    build_train_step,
    build_trained_columns,
)


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that `run.train` needs; what it trains is only in here.

    Attributes:
      state: fresh, sharded over the mesh.
      step_fn: (state, batch) -> (state, metrics), compiled.
      make_batches: start step -> iterator of batches.
      num_steps: where training ends.
      export: writes the finished model into the work directory.
      with_stats: whether a batch comes as `(batch, statistics)`.
      flops_per_token: of a step, PaLM's count; 0 where nobody asks for it.
      inputs: fingerprints of what a resumed run must find unchanged, by name.
      num_main_documents: that are trained on; 0 where they are not a memory's.
    """

    state: TrainState
    step_fn: TrainStep
    make_batches: Callable[[int], Iterator[Any]]
    num_steps: int
    export: Callable[[TrainState], None]
    with_stats: bool = False
    flops_per_token: float = 0.0
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    num_main_documents: int = 0


def build_job(config: Any, workdir: Path) -> Job:
    """The training that `config.kind` names.

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


def build_vqgan_job(config: Any, workdir: Path) -> Job:
    """Trains the image tokenizer; exports `workdir/vqgan`."""
    model_config = construct(vqgan_model.VQGANConfig, config.vqgan, "vqgan")
    loss_config = construct(
        vqgan_objective.VQGANLossConfig, config.vqgan_loss, "vqgan_loss"
    )
    mesh = build_mesh(config)
    rows = local_rows(mesh, config.batch_size)
    images = np.stack(
        [d.images[0] for d in read_flagworld(build_world(config), "train")]
    )

    params = None
    if config.codebook_images:
        params = vqgan_objective.init_vqgan_from_images(
            model_config,
            loss_config,
            jax.random.key(config.seed),
            images[:: max(1, len(images) // config.codebook_images)],
        )

    def make(start_step: int) -> Iterator[Any]:
        batches = image_data.image_batches(
            images, config.batch_size, seed=config.seed, start_step=start_step
        )
        return _take_rows(batches, rows)

    def export(state: TrainState) -> None:
        params = checkpoints.round_to_half(fetch_all(state.params["vqgan"]))
        if jax.process_index() != 0:
            return
        ImageTokenizer(model_config, params).save(workdir / "vqgan", dtype="float16")

    return _job(
        config,
        mesh,
        lambda key: vqgan_objective.init_vqgan(model_config, loss_config, key),
        vqgan_objective.vqgan_loss(model_config, loss_config),
        make,
        export,
        params=params,
    )


def build_clip_job(config: Any, workdir: Path) -> Job:
    """Trains the text tokenizer, unless `config.text_tokenizer.path` names one, and CLIP.

    Exports `workdir/text` and `workdir/clip`.
    """
    mesh = build_mesh(config)
    rows = local_rows(mesh, config.batch_size)
    documents = list(read_flagworld(build_world(config), "train"))
    texts = [d.text for d in documents]
    text_tokenizer = _build_text_tokenizer(config, texts)
    with leader_first():
        if jax.process_index() == 0:
            text_tokenizer.save(workdir / "text" / "tokenizer.json")
            checkpoints.write_manifest(workdir / "text", {"kind": "text tokenizer"})
    tokenizer = clip_model.CLIPTokenizer(text_tokenizer, config.clip.context_length)
    model_config = construct(
        clip_model.CLIPConfig, config.clip, "clip", vocab_size=tokenizer.vocab_size
    )
    loss_config = construct(
        clip_objective.CLIPLossConfig, config.clip_loss, "clip_loss"
    )
    # One document of every held-out nation says how well texts and images are aligned;
    # where some captions describe their image, those of the measurement do.
    world = build_world(config)
    if world.description_share:
        world = dataclasses.replace(world, description_share=1.0)
    measured = [
        document
        for document in read_flagworld(world, "heldout_test")
        if document.id.endswith("-0")
    ]
    images = np.stack([d.images[0] for d in documents])
    tokens = tokenizer.encode_batch(texts)
    groups = np.array([d.metadata["nation_id"] for d in documents])

    def make(start_step: int) -> Iterator[Any]:
        batches = clip_objective.make_pair_batches(
            images,
            tokens,
            groups,
            num_pairs=config.batch_size,
            seed=config.seed,
            start_step=start_step,
        )
        return _take_rows(batches, rows)

    def export(state: TrainState) -> None:
        params = checkpoints.round_to_half(fetch_all(state.params))
        if jax.process_index() != 0:
            return
        embedder = DocumentEmbedder(model_config, params, text_tokenizer)
        if len(measured) > 1:
            found = embedder.measure(measured)
            logging.info("alignment of texts and images: %s", found)
        embedder.save(workdir / "clip", dtype="float16")

    return _job(
        config,
        mesh,
        lambda key: clip_model.init_params(model_config, key),
        clip_objective.clip_loss(model_config, loss_config),
        make,
        export,
    )


def _build_text_tokenizer(config: Any, texts: Sequence[str]) -> TextTokenizer:
    """A trained one keeps the vocabulary of generators that exist already."""
    if path := config.text_tokenizer.get("path", ""):
        return TextTokenizer.load(resolve(path) / "tokenizer.json")
    return TextTokenizer.train(texts, config.text_tokenizer.vocab_size)


def build_generator_job(config: Any, workdir: Path) -> Job:
    """Trains RA-CM3 (or its twin); exports a directory that `run.load` opens."""
    pipeline = construct(
        PipelineConfig,
        config.pipeline,
        "pipeline",
        seed=config.seed,
        num_query_variants=config.memory.num_query_variants,
        max_examples=count_examples(config),
    )
    # Before anything is loaded: refuses rows that the mesh does not divide.
    mesh = build_mesh(config)
    rows = local_rows(mesh, pipeline.rows)
    tokenizer, embedder = build_tokenizer(config), build_embedder(config)
    if config.get("memory_path"):
        memory = open_memory(config, config.memory_path, tokenizer, embedder)
    else:
        documents = read_memory_documents(config)
        memory = build_memory(
            config, workdir / "memory", documents, tokenizer, embedder
        )
    prepare_search(config, memory)
    main_ids = find_main_rows(memory, workdir)
    model_config = build_model_config(config, tokenizer.vocab)
    masking = construct(CausalMaskingConfig, config.masking, "masking")
    retriever = build_retriever(config, memory) if pipeline.retrieval else None
    episodes = build_episodes(config, memory, tokenizer, workdir)
    pairing = build_pairing(config, memory, tokenizer, workdir)
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
        )

    def export(state: TrainState) -> None:
        params = fetch_all(state.params)
        if jax.process_index() != 0:
            return
        saved_config = model_config
        if config.init_from and carry_origin(resolve(config.init_from), workdir):
            # `racm3 export` writes such weights layer by layer.
            params = unstack_layers(params)
            saved_config = dataclasses.replace(model_config, scan_layers=False)
        save_generator(
            workdir,
            saved_config,
            params,
            tokenizer,
            embedder,
            construct(StrategyConfig, config.strategy, "strategy"),
        )

    job = _job(
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


def check_positions(
    model_config: ModelConfig,
    pipeline: PipelineConfig,
    episodes: Episodes | None,
    pairing: Pairing | None,
) -> None:
    """Learned positions end somewhere; rotary ones do not.

    Raises:
      ValueError: a batch may hold positions that the model has no parameters for.
    """
    num_documents = pipeline.max_documents
    if pairing is not None:
        num_documents = max(num_documents, *pairing.config.num_documents)
    if episodes is not None:
        num_documents = max(num_documents, episodes.config.num_ways)
    last = pipeline.last_position(num_documents)
    if model_config.position == "learned" and last >= model_config.max_length:
        raise ValueError(
            f"config.model.max_length is {model_config.max_length}, but batches hold "
            f"positions up to {last}: raise it, or lower pipeline.row_length, "
            "pipeline.max_position_offset or pipeline.max_position_gap"
        )


def _read_first_params(config: Any, model_config: ModelConfig) -> Any:
    """The weights of `config.init_from`, scanned or unrolled as the model wants them."""
    if not config.init_from:
        return None
    params, _, _ = checkpoints.load_weights(resolve(config.init_from), "generator")
    if not model_config.scan_layers:
        return unstack_layers(params)
    return params if "layers" in params else stack_layers(params)


def _take_rows(
    batches: Iterator[Any], rows: Int64[np.ndarray, " rows"]
) -> Iterator[dict[str, np.ndarray]]:
    """What this process holds of batches that every process makes whole."""
    for batch in batches:
        yield {name: values[rows] for name, values in batch.items()}


def _job(
    config: Any,
    mesh: Mesh,
    init_fn: Callable[[jax.Array], Any],
    loss_fn: LossFn,
    make: Callable[[int], Iterator[Any]],
    export: Callable[[TrainState], None],
    params: Any = None,
    with_stats: bool = False,
    flops_per_token: float = 0.0,
    trained: TrainedColumns | None = None,
) -> Job:
    state, step_fn = build_train_step(
        config,
        mesh,
        loss_fn,
        init_fn,
        lambda optimizer: init_state(
            init_fn, optimizer, mesh, jax.random.key(config.seed), params=params
        ),
        trained,
    )
    return Job(
        state,
        step_fn,
        make,
        construct(TrainConfig, config.train, "train").num_steps,
        export,
        with_stats,
        flops_per_token,
    )
