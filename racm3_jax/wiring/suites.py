"""The suites of evaluation of this package that need no world of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from racm3_jax.documents.readers import read_documents
from racm3_jax.evaluation.clip_score import CLIPFeatures, CLIPScorer
from racm3_jax.evaluation.coco import choose_items, read_coco, read_karpathy
from racm3_jax.evaluation.coco_suite import CocoSuite
from racm3_jax.evaluation.coco_tasks import CocoCaptioning, CocoTextToImage
from racm3_jax.evaluation.document_sets import choose_documents, choose_pool
from racm3_jax.evaluation.inception import InceptionFeatures, convert_weights
from racm3_jax.evaluation.likelihood_suite import LikelihoodSuite
from racm3_jax.evaluation.settings import CocoSettings, LikelihoodSettings
from racm3_jax.evaluation.suite import Suite
from racm3_jax.memory.memory import Memory
from racm3_jax.porting.files import open_tensors
from racm3_jax.porting.tensors import read_finite
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.wiring.corpora import build_world
from racm3_jax.wiring.generators import load_generator
from racm3_jax.wiring.parts import open_memory, resolve
from racm3_jax.wiring.sections import (
    CocoEvaluation,
    LikelihoodEvaluation,
    choose_class_key,
    choose_world,
    construct,
)
from racm3_jax.wiring.suite_parts import (
    describe_process,
    open_models,
    open_world_memory,
    with_memory,
)
from racm3_jax.worlds import SuiteEntry, find_suite


def build_suite(config: Any, workdir: Path) -> Suite:
    """Opens models, memories and data of the suite that `config.suite` names.

    Raises:
      ValueError: a setting that does not exist, or files that are not there.
    """
    return find_suite(config.suite).build(config, workdir)


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
    suite = CocoTextToImage if settings.task == "text_to_image" else CocoCaptioning
    return suite(
        generator,
        items,
        settings,
        workdir,
        extractors=extractors,
        scorer=CLIPScorer(judge),
        reference=Path(config.reference).expanduser() if config.reference else None,
        **describe_process(generator),
    )


def build_likelihood_suite(config: Any, workdir: Path) -> LikelihoodSuite:
    """Opens the documents and the memory, which is built if none is named."""
    settings = construct(LikelihoodSettings, config.settings, "settings")
    plain, twin = open_models(config)
    world, world_settings = choose_world(config), build_world(config)
    if config.source:
        documents = list(read_documents(config.source))
    else:
        documents = list(world.read(world_settings, "heldout_test"))
    class_key = choose_class_key(config, config.class_key)
    shown = list(read_documents(config.kshot_source)) if config.kshot_source else []
    if config.memory_path:
        memory = open_memory(
            config, config.memory_path, plain.tokenizer, plain.embedder
        )
    else:
        path = workdir / "memory"
        memory = open_world_memory(config, path, world, world_settings, plain)
        shown = shown or list(world.read(world_settings, "heldout_memory"))
    return LikelihoodSuite(
        with_memory(plain, memory, config),
        choose_documents(documents, config.num_items),
        settings,
        workdir,
        twin=twin,
        pool=choose_pool(shown or documents, class_key),
        class_key=class_key,
        **describe_process(plain),
    )


COCO = SuiteEntry(CocoEvaluation, build_coco_suite)
LIKELIHOOD = SuiteEntry(LikelihoodEvaluation, build_likelihood_suite)
