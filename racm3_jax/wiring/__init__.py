"""The composition root: builds objects from a ConfigDict.

Only the builders of suites (`worlds.SuiteEntry`) read one, too.

config -> construct(Section) -> world, tokenizer, embedder, memory, model, mesh -> Job
"""

from racm3_jax.wiring.corpora import (
    build_corpus,
    build_world,
    read_heldout,
    read_memory_documents,
)
from racm3_jax.wiring.generators import check_model, load_generator, save_generator
from racm3_jax.wiring.heldout import generate_heldout
from racm3_jax.wiring.job import Job
from racm3_jax.wiring.jobs import build_job
from racm3_jax.wiring.parts import (
    build_embedder,
    build_episodes,
    build_memory,
    build_mesh,
    build_model_config,
    build_model_shape,
    build_retriever,
    build_tokenizer,
    count_shards,
    resolve,
)
from racm3_jax.wiring.sections import (
    TRAININGS,
    TrainConfig,
    choose_world,
    construct,
    read_evaluation,
    read_training,
)
from racm3_jax.wiring.steps import (
    AbstractTraining,
    abstract_batch,
    build_abstract_training,
    build_generator_loss,
    build_trained_columns,
    build_vocab,
)
from racm3_jax.wiring.suites import build_suite

__all__ = [
    "TRAININGS",
    "AbstractTraining",
    "Job",
    "TrainConfig",
    "abstract_batch",
    "build_abstract_training",
    "build_corpus",
    "build_embedder",
    "build_episodes",
    "build_generator_loss",
    "build_job",
    "build_memory",
    "build_mesh",
    "build_model_config",
    "build_model_shape",
    "build_retriever",
    "build_suite",
    "build_tokenizer",
    "build_trained_columns",
    "build_vocab",
    "build_world",
    "check_model",
    "choose_world",
    "construct",
    "count_shards",
    "generate_heldout",
    "load_generator",
    "read_evaluation",
    "read_heldout",
    "read_memory_documents",
    "read_training",
    "resolve",
    "save_generator",
]
