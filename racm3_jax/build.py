"""The composition root: turns a ConfigDict into objects. Nothing else reads configs.

config -> construct(Section) -> world, tokenizer, embedder, memory, model, mesh -> Job
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from racm3_jax import checkpoints, sharding
from racm3_jax.documents import batches as image_data
from racm3_jax.documents.flagworld import FlagworldConfig, read_flagworld
from racm3_jax.evaluation.flagworld import FlagworldJudge, SuiteSettings
from racm3_jax.generation.tasks import Generator
from racm3_jax.model.config import ModelConfig
from racm3_jax.model.transformer import Transformer, head_weights, init_params
from racm3_jax.retrieval import clip as clip_model
from racm3_jax.retrieval import clip_loss as clip_objective
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.retrieval.memory import Memory
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.pipeline import PipelineConfig, make_batches
from racm3_jax.tokenizers import vqgan as vqgan_model
from racm3_jax.tokenizers import vqgan_loss as vqgan_objective
from racm3_jax.tokenizers.bpe import TextTokenizer
from racm3_jax.tokenizers.image import ImageTokenizer
from racm3_jax.tokenizers.mixed import MixedTokenizer
from racm3_jax.training.loss import GeneratorLossConfig, make_generator_loss
from racm3_jax.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    build_schedule,
)
from racm3_jax.training.step import LossFn, TrainState, init_state, make_train_step
from racm3_jax.types import Document
from racm3_jax.vocab import Vocab

PACKAGE = Path(__file__).parent
T = TypeVar("T")


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
    """

    state: TrainState
    step_fn: Callable[..., Any]
    make_batches: Callable[[int], Iterator[Any]]
    num_steps: int
    export: Callable[[TrainState], None]
    with_stats: bool = False


def resolve(path: str | Path) -> Path:
    """`"shipped:flagworld/clip"` -> the folder inside the package; else the path."""
    text = str(path)
    if text.startswith("shipped:"):
        return PACKAGE / "shipped" / text.removeprefix("shipped:")
    return Path(text).expanduser()


def construct(cls: type[T], section: Mapping[str, Any], where: str, **more: Any) -> T:
    """Calls a dataclass's constructor with a config section.

    Raises:
      ValueError: for a key that the dataclass does not have; names the nearest one.
    """
    allowed = {f.name for f in dataclasses.fields(cls)} - set(more)  # type: ignore[arg-type]
    for key in section:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1, 0.0)
            raise ValueError(
                f"config.{where}.{key} is not a setting; did you mean "
                f"config.{where}.{near[0]}?"
            )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in section.items()}
    return cls(**values, **more)


def build_world(config: Any) -> FlagworldConfig:
    return construct(FlagworldConfig, config.world, "world")


def build_mesh(config: Any) -> Mesh:
    return sharding.make_mesh(**config.mesh)


def build_tokenizer(config: Any) -> MixedTokenizer:
    section = config.tokenizer
    for name in ("text", "image"):
        if not section[name]:
            raise ValueError(
                f"config.tokenizer.{name} is empty: give the folder of a trained one, "
                f"--config.tokenizer.{name}=FOLDER"
            )
    return MixedTokenizer(
        TextTokenizer.load(resolve(section.text) / "tokenizer.json"),
        ImageTokenizer.load(resolve(section.image)),
        section.num_sentinels,
    )


def build_embedder(config: Any) -> DocumentEmbedder:
    return DocumentEmbedder.load(resolve(config.embedder))


def build_memory(
    config: Any,
    path: Path,
    documents: Iterable[Document],
    tokenizer: MixedTokenizer,
    embedder: DocumentEmbedder,
    *,
    num_documents: int | None = None,
) -> Memory:
    """Opens the memory at `path`, or builds it there from `documents`.

    Args:
      config: its section `memory`.
      path: of the memory's directory.
      documents: read only if there is no memory yet.
      tokenizer: of the documents.
      embedder: of the documents and their queries.
      num_documents: how many there are, for the progress bar.
    """
    if not (path / "manifest.json").exists():
        section = config.memory
        with tqdm(
            total=num_documents, desc="build memory", unit="document", smoothing=0.1
        ) as bar:

            def show(done: int) -> None:
                bar.update(done - bar.n)

            Memory.build(
                documents,
                tokenizer=tokenizer,
                embedder=embedder,
                path=path,
                index=section.index,
                num_query_variants=section.num_query_variants,
                query_drop=section.query_drop,
                progress=show,
            ).close()
    return Memory.load(path, embedder=embedder, tokenizer=tokenizer)


def build_model_config(config: Any, vocab: Vocab) -> ModelConfig:
    model_config = construct(ModelConfig, config.model, "model", vocab_size=vocab.size)
    if model_config.dropout:
        raise ValueError(
            f"config.model.dropout is {model_config.dropout}, but the trainer draws no "
            "dropout masks: leave it 0"
        )
    return model_config


def build_retriever(config: Any, memory: Memory) -> Retriever:
    return Retriever(memory, construct(StrategyConfig, config.strategy, "strategy"))


def build_job(config: Any, workdir: Path) -> Job:
    """The training that `config.kind` names.

    Raises:
      ValueError: for an unknown kind.
    """
    builders = {
        "generator": build_generator_job,
        "clip": build_clip_job,
        "vqgan": build_vqgan_job,
    }
    if config.kind not in builders:
        raise ValueError(f"config.kind is {config.kind!r}; allowed: {sorted(builders)}")
    return builders[config.kind](config, workdir)


def build_vqgan_job(config: Any, workdir: Path) -> Job:
    """Trains the image tokenizer; exports `workdir/vqgan`."""
    model_config = construct(vqgan_model.VQGANConfig, config.vqgan, "vqgan")
    loss_config = construct(
        vqgan_objective.VQGANLossConfig, config.vqgan_loss, "vqgan_loss"
    )
    images = np.stack(
        [d.images[0] for d in read_flagworld(build_world(config), "train")]
    )

    def make(start_step: int) -> Iterator[Any]:
        return image_data.image_batches(
            images, config.batch_size, seed=config.seed, start_step=start_step
        )

    def export(state: TrainState) -> None:
        params = checkpoints.round_to_half(jax.device_get(state.params["vqgan"]))
        ImageTokenizer(model_config, params).save(workdir / "vqgan", dtype="float16")

    return _job(
        config,
        lambda key: vqgan_objective.init_vqgan(model_config, loss_config, key),
        vqgan_objective.vqgan_loss(model_config, loss_config),
        make,
        export,
    )


def build_clip_job(config: Any, workdir: Path) -> Job:
    """Trains the text tokenizer and CLIP; exports `workdir/text` and `workdir/clip`."""
    documents = list(read_flagworld(build_world(config), "train"))
    texts = [d.text for d in documents]
    text_tokenizer = TextTokenizer.train(texts, config.text_tokenizer.vocab_size)
    text_tokenizer.save(workdir / "text" / "tokenizer.json")
    tokenizer = clip_model.CLIPTokenizer(text_tokenizer, config.clip.context_length)
    model_config = construct(
        clip_model.CLIPConfig, config.clip, "clip", vocab_size=tokenizer.vocab_size
    )
    loss_config = construct(
        clip_objective.CLIPLossConfig, config.clip_loss, "clip_loss"
    )
    images = np.stack([d.images[0] for d in documents])
    tokens = tokenizer.encode_batch(texts)
    groups = np.array([d.metadata["nation_id"] for d in documents])

    def make(start_step: int) -> Iterator[Any]:
        return clip_objective.make_pair_batches(
            images,
            tokens,
            groups,
            num_pairs=config.batch_size,
            seed=config.seed,
            start_step=start_step,
        )

    def export(state: TrainState) -> None:
        params = checkpoints.round_to_half(jax.device_get(state.params))
        embedder = DocumentEmbedder(model_config, params, text_tokenizer)
        embedder.save(workdir / "clip", dtype="float16")

    return _job(
        config,
        lambda key: clip_model.init_params(model_config, key),
        clip_objective.clip_loss(model_config, loss_config),
        make,
        export,
    )


def build_generator_job(config: Any, workdir: Path) -> Job:
    """Trains RA-CM3 (or its twin); exports a directory that `run.load` opens."""
    tokenizer, embedder = build_tokenizer(config), build_embedder(config)
    if config.get("memory_path"):
        memory = Memory.load(resolve(config.memory_path), embedder, tokenizer)
    else:
        documents = read_memory_documents(config)
        memory = build_memory(
            config, workdir / "memory", documents, tokenizer, embedder
        )
    rows = memory.allowed_ids()
    is_main = [m.get("split", "train") == "train" for m in memory.metadata(rows)]
    main_ids = rows[np.array(is_main)]
    model_config = build_model_config(config, tokenizer.vocab)
    masking = construct(CausalMaskingConfig, config.masking, "masking")
    pipeline = construct(
        PipelineConfig,
        config.pipeline,
        "pipeline",
        seed=config.seed,
        num_query_variants=config.memory.num_query_variants,
    )
    retriever = build_retriever(config, memory) if pipeline.retrieval else None
    model: Any = Transformer(model_config)

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
        )

    def export(state: TrainState) -> None:
        save_generator(
            workdir, model_config, jax.device_get(state.params), tokenizer, embedder
        )

    params = None
    if config.init_from:
        params, _, _ = checkpoints.load_weights(resolve(config.init_from), "generator")
    return _job(
        config,
        lambda key: init_params(model_config, key, boxed=True),
        make_generator_loss(
            lambda params, *inputs: model.apply({"params": params}, *inputs),
            lambda params: head_weights(params, model_config),
            tokenizer.vocab,
            construct(GeneratorLossConfig, config.loss, "loss"),
        ),
        make,
        export,
        params=params,
        with_stats=True,
    )


def read_memory_documents(config: Any) -> Iterator[Document]:
    """What the memory holds: the training documents, and held-out nations if wanted."""
    world = build_world(config)
    if config.memory.include_heldout:
        yield from read_flagworld(world, "heldout_memory")
    yield from read_flagworld(world, "train")


def save_generator(
    directory: Path,
    model_config: ModelConfig,
    params: Any,
    tokenizer: MixedTokenizer,
    embedder: DocumentEmbedder,
) -> None:
    """Writes `model/`, `tokenizer/` and `clip/`: all that generation needs but a memory."""
    checkpoints.save_weights(
        directory / "model",
        params,
        kind="generator",
        config=dataclasses.asdict(model_config),
        extra={"tokenizer": tokenizer.fingerprint(), "clip": embedder.fingerprint()},
    )
    tokenizer.save(directory / "tokenizer")
    embedder.save(directory / "clip")


def load_generator(
    directory: Path,
    memory: Memory | None,
    strategy: StrategyConfig | None = None,
    *,
    model: str = "model",
) -> Generator:
    """Opens what `save_generator` wrote.

    Args:
      directory: holds the folder of the model, `tokenizer/` and `clip/`.
      memory: what to retrieve from, or None.
      strategy: which of the found documents are used.
      model: the folder of the weights ("twin" for the shipped model without retrieval).

    Raises:
      ValueError: a missing directory, or a memory of another encoder or tokenizer.
    """
    params, fields, _ = checkpoints.load_weights(directory / model, "generator")
    tokenizer = MixedTokenizer.load(directory / "tokenizer")
    embedder = DocumentEmbedder.load(directory / "clip")
    retriever = None
    if memory is not None:
        memory.check(embedder=embedder, tokenizer=tokenizer)
        retriever = Retriever(memory, strategy or StrategyConfig())
    return Generator(ModelConfig(**fields), params, tokenizer, retriever, embedder)


def _job(
    config: Any,
    init_fn: Callable[[jax.Array], Any],
    loss_fn: LossFn,
    make: Callable[[int], Iterator[Any]],
    export: Callable[[TrainState], None],
    params: Any = None,
    with_stats: bool = False,
) -> Job:
    mesh = build_mesh(config)
    optimizer_config = construct(
        OptimizerConfig,
        config.optimizer,
        "optimizer",
        num_steps=config.train.num_steps,
    )
    optimizer = build_optimizer(optimizer_config)
    state = init_state(
        init_fn, optimizer, mesh, jax.random.key(config.seed), params=params
    )
    step_fn = make_train_step(
        loss_fn,
        optimizer,
        mesh,
        state,
        seed=config.seed,
        schedule=build_schedule(optimizer_config),
    )
    return Job(state, step_fn, make, config.train.num_steps, export, with_stats)


@dataclasses.dataclass(frozen=True)
class FlagworldSuite:
    """The objects of the flagworld suite, over memories built in a work directory."""

    generator: Generator
    twin: Generator | None
    swapped: Generator
    judge: FlagworldJudge
    swapped_judge: FlagworldJudge
    settings: SuiteSettings
    memory: Memory


def build_flagworld_suite(config: Any, workdir: Path) -> FlagworldSuite:
    """Builds both memories (as they are, and with exchanged flags) and opens the models.

    Raises:
      ValueError: for a suite of another name.
    """
    if config.suite != "flagworld":
        raise ValueError(f"config.suite is {config.suite!r}; allowed: flagworld")
    directory = resolve(config.models)
    plain = load_generator(directory, None, model=config.model)
    strategy = construct(StrategyConfig, config.strategy, "strategy")
    embedder = plain.embedder
    assert embedder is not None  # load_generator always opens one
    world = build_world(config)
    swapped_world = dataclasses.replace(world, swap_flags=True)
    pictures, scenes = [], []
    for document in itertools.islice(
        read_flagworld(world, "train"), config.num_scene_examples
    ):
        pictures.append(document.images[0])
        scenes.append(document.metadata["scene"])
    image_tokenizer = plain.tokenizer.image
    coded = image_tokenizer.decode(image_tokenizer.encode(np.stack(pictures)))

    def open_memory(name: str, its_world: FlagworldConfig) -> Memory:
        documents = itertools.chain(
            read_flagworld(its_world, "heldout_memory"),
            read_flagworld(its_world, "train"),
        )
        return build_memory(
            config,
            workdir / name,
            documents,
            plain.tokenizer,
            embedder,
            num_documents=its_world.num_heldout * its_world.documents_per_heldout
            + its_world.num_nations * its_world.documents_per_nation,
        )

    def judge(its_world: FlagworldConfig) -> FlagworldJudge:
        tests = {
            d.metadata["nation"]: d for d in read_flagworld(its_world, "heldout_test")
        }
        return FlagworldJudge(its_world, list(tests.values()), coded, scenes)

    memory = open_memory("memory", world)
    swapped_memory = open_memory("memory_swapped", swapped_world)
    return FlagworldSuite(
        plain.with_retriever(Retriever(memory, strategy)),
        load_generator(directory, None, model=config.twin) if config.twin else None,
        plain.with_retriever(Retriever(swapped_memory, strategy)),
        judge(world),
        judge(swapped_world),
        construct(SuiteSettings, config.settings, "settings"),
        memory,
    )
