"""The suites of evaluation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from racm3_jax.documents.flagworld import (
    FlagworldConfig,
    make_nations,
    read_flagworld,
)
from racm3_jax.documents.readers import read_documents
from racm3_jax.evaluation.clip_score import CLIPFeatures, CLIPScorer
from racm3_jax.evaluation.coco import choose_items, read_coco, read_karpathy
from racm3_jax.evaluation.coco_suite import CocoSuite
from racm3_jax.evaluation.coco_tasks import CocoCaptioning, CocoDrawing
from racm3_jax.evaluation.document_sets import choose_documents, choose_pool
from racm3_jax.evaluation.fingerprints import describe_generator, fingerprint_params
from racm3_jax.evaluation.flagworld import FlagworldSuite
from racm3_jax.evaluation.flagworld_judge import FlagworldJudge
from racm3_jax.evaluation.flagworld_tasks import TasksSuite
from racm3_jax.evaluation.inception import InceptionFeatures, convert_weights
from racm3_jax.evaluation.likelihood_suite import LikelihoodSuite
from racm3_jax.evaluation.reading import make_reading_questions
from racm3_jax.evaluation.settings import (
    CocoSettings,
    FlagworldSettings,
    LikelihoodSettings,
    TaskSettings,
)
from racm3_jax.evaluation.suite import Suite
from racm3_jax.evaluation.task_probes import TaskProbes
from racm3_jax.generation.tasks import Generator
from racm3_jax.memory.memory import Memory
from racm3_jax.porting.files import open_tensors
from racm3_jax.porting.tensors import read_finite
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.types import Document
from racm3_jax.wiring.corpora import build_world
from racm3_jax.wiring.generators import load_generator
from racm3_jax.wiring.parts import (
    build_memory,
    open_memory,
    resolve,
)
from racm3_jax.wiring.sections import construct


def build_suite(config: Any, workdir: Path) -> Suite:
    """Opens models, memories and data of the suite that `config.suite` names.

    Raises:
      ValueError: a setting that does not exist, or files that are not there.
    """
    return BUILDERS[config.suite](config, workdir)


def build_flagworld_suite(config: Any, workdir: Path) -> FlagworldSuite:
    """Builds both memories: as they are, and with exchanged flags."""
    world = build_world(config)
    swapped_world = dataclasses.replace(world, swap_flags=True)
    plain, twin = _open_models(config)
    pictures, scenes = [], []
    for document in itertools.islice(
        read_flagworld(world, "train"), config.num_scene_examples
    ):
        pictures.append(document.images[0])
        scenes.append(document.metadata["scene"])
    image_tokenizer = plain.tokenizer.image
    coded = image_tokenizer.decode(image_tokenizer.encode(np.stack(pictures)))

    def judge(its_world: FlagworldConfig) -> FlagworldJudge:
        return FlagworldJudge(its_world, _tests(its_world), coded, scenes)

    memory = _open_memory(config, workdir / "memory", world, plain)
    swapped = _open_memory(config, workdir / "memory_swapped", swapped_world, plain)
    settings = construct(FlagworldSettings, config.settings, "settings")
    questions = []
    # One nation a question: a small world has fewer.
    num_reading = min(settings.num_reading, world.num_heldout)
    if num_reading:
        questions = make_reading_questions(world, num_reading, seed=settings.seed)
    generator = _over(memory, plain, config)
    return FlagworldSuite(
        generator,
        twin,
        _over(swapped, plain, config),
        judge(world),
        judge(swapped_world),
        settings,
        workdir,
        _describe(config, generator, twin),
        questions=questions,
        num_sheet_rows=config.num_sheet_rows,
        **_place(),
    )


def build_tasks_suite(config: Any, workdir: Path) -> TasksSuite:
    """Builds the memory."""
    world = build_world(config)
    settings = construct(TaskSettings, config.settings, "settings")
    plain, twin = _open_models(config)
    memory = _open_memory(config, workdir / "memory", world, plain)
    probes = TaskProbes(
        make_nations(world, "heldout"),
        _tests(world),
        list(read_flagworld(world, "heldout_memory")),
        settings,
    )
    generator = _over(memory, plain, config)
    return TasksSuite(
        generator,
        twin,
        probes,
        settings,
        workdir,
        _describe(config, generator, twin),
        num_sheet_rows=config.num_sheet_rows,
        **_place(),
    )


def build_coco_suite(config: Any, workdir: Path) -> CocoSuite:
    """Opens COCO's files and the judges."""
    for name in ("coco", "models"):
        if not config[name]:
            raise ValueError(f"config.{name} is empty: give --config.{name}=FOLDER")
    settings = construct(CocoSettings, config.settings, "settings")
    read = read_coco if settings.task == "text_to_image" else read_karpathy
    items = choose_items(read(config.coco, config.split), config.num_items)
    directory = resolve(config.models)
    memory = Memory.load(config.memory or directory / "memory")
    strategy = construct(StrategyConfig, config.strategy, "strategy")
    generator = load_generator(directory, memory, strategy)
    judge = generator.embedder
    if config.judge_clip:
        judge = DocumentEmbedder.load(resolve(config.judge_clip))
    assert judge is not None  # load_generator always opens one
    extractors: dict[str, Any] = {"clip": CLIPFeatures(judge)}
    if config.inception.weights:
        source = open_tensors(config.inception.weights)
        arrays = {name: read_finite(source, name) for name in source.tensors}
        extractors["inception"] = InceptionFeatures(
            convert_weights(arrays),
            variant=config.inception.variant,
            resizing=config.inception.resizing,
        )
    suite = CocoDrawing if settings.task == "text_to_image" else CocoCaptioning
    return suite(
        generator,
        items,
        settings,
        workdir,
        extractors=extractors,
        scorer=CLIPScorer(judge),
        reference=Path(config.reference).expanduser() if config.reference else None,
        **_place(generator),
    )


def build_likelihood_suite(config: Any, workdir: Path) -> LikelihoodSuite:
    """Opens the documents and the memory, which is built if none is named."""
    settings = construct(LikelihoodSettings, config.settings, "settings")
    plain, twin = _open_models(config)
    world = build_world(config)
    if config.source:
        documents = list(read_documents(config.source))
    else:
        documents = list(read_flagworld(world, "heldout_test"))
    shown = list(read_documents(config.kshot_source)) if config.kshot_source else []
    if config.memory_path:
        memory = open_memory(
            config, config.memory_path, plain.tokenizer, plain.embedder
        )
    else:
        memory = _open_memory(config, workdir / "memory", world, plain)
        shown = shown or list(read_flagworld(world, "heldout_memory"))
    return LikelihoodSuite(
        _over(memory, plain, config),
        choose_documents(documents, config.num_items),
        settings,
        workdir,
        twin=twin,
        pool=choose_pool(shown or documents, config.class_key),
        class_key=config.class_key,
        **_place(plain),
    )


BUILDERS: Mapping[str, Callable[[Any, Path], Suite]] = {
    "flagworld": build_flagworld_suite,
    "flagworld_tasks": build_tasks_suite,
    "coco": build_coco_suite,
    "likelihood": build_likelihood_suite,
}


def _place(generator: Generator | None = None) -> dict[str, Any]:
    """This process among all of them, and the devices that hold a copy of the model.

    Without a model all of a process's devices work on the same items.
    """
    place: dict[str, Any] = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if generator is not None:
        place["devices"] = generator.devices_with_a_copy() or (None,)
    return place


def _describe(
    config: Any, generator: Generator, twin: Generator | None
) -> dict[str, Any]:
    """What the figures of a suite of flagworld depend on."""
    inputs = describe_generator(generator)
    inputs["twin"] = None if twin is None else fingerprint_params(twin)
    number = inputs["memory"]["num_documents"]
    return config.to_dict() | {"memory_documents": number, "inputs": inputs}


def _open_models(config: Any) -> tuple[Generator, Generator | None]:
    """The model and its twin (None if the config names none), without a memory."""
    directory = resolve(config.models)
    twin = load_generator(directory, None, model=config.twin) if config.twin else None
    return load_generator(directory, None, model=config.model), twin


def _open_memory(
    config: Any, path: Path, world: FlagworldConfig, generator: Generator
) -> Memory:
    documents = itertools.chain(
        read_flagworld(world, "heldout_memory"), read_flagworld(world, "train")
    )
    assert generator.embedder is not None  # load_generator always opens one
    return build_memory(
        config,
        path,
        documents,
        generator.tokenizer,
        generator.embedder,
        num_documents=world.num_heldout * world.documents_per_heldout
        + world.num_nations * world.documents_per_nation,
    )


def _over(memory: Memory, generator: Generator, config: Any) -> Generator:
    """The model with a memory, searched as the config says."""
    strategy = construct(StrategyConfig, config.strategy, "strategy")
    return generator.with_retriever(Retriever(memory, strategy))


def _tests(world: FlagworldConfig) -> list[Document]:
    """One test document of every held-out nation."""
    tests = {d.metadata["nation"]: d for d in read_flagworld(world, "heldout_test")}
    return list(tests.values())
