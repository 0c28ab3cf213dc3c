"""1. The gain of retrieval, vs. copying the neighbour and random documents."""

from __future__ import annotations

import dataclasses

import racm3_jax
from racm3_jax import wiring
from racm3_jax.commands.configs import find_config, load_config_file
from racm3_jax.generation.tasks import Generator
from science.experiment import Experiment, Figures, Panel, Place
from science.measures import (
    DISTANCE_NOTE,
    NUM_RETRIEVED,
    UNGUIDED,
    Sampling,
    generate_images,
    judge_captions,
    judge_images,
    judge_outputs,
    measure_captions,
    measure_distances,
)
from science.worlds import (
    SHIPPED,
    STRATEGY,
    Bench,
    open_bench,
    open_shipped,
    shipped_weights,
)

TESTS_PER_NATION = 2
# All stages of RA-CM3 have read 106 million positions, the baseline 17 million in 8,000
# steps: this many more are equal.
TWIN_STEPS = 40_000
RANDOM = dataclasses.replace(STRATEGY, ranking="random", max_similarity=2.0)


def measure(condition: str, seed: int, place: Place) -> Figures:
    """Images, their distance to real images, and captions."""
    bench = open_bench(seed, place, tests_per_nation=TESTS_PER_NATION)
    if condition == "copy":
        return _copy(bench)
    generator, num_retrieved = _open(condition, bench, place)
    sampling = UNGUIDED if condition == "unguided" else Sampling()
    outputs = generate_images(generator, bench, seed, num_retrieved, sampling)
    images = [output.images[0] for output in outputs]
    return {
        **judge_outputs(outputs, bench),
        **measure_distances(images, bench, generator),
        **measure_captions(generator, bench, seed, num_retrieved),
    }


def _open(condition: str, bench: Bench, place: Place) -> tuple[Generator, int]:
    """The model of a condition, over its memory, and K."""
    if condition == "twin":
        return open_shipped("twin"), 0
    if condition == "twin_equal_compute":
        return train_baseline(place), 0
    strategy = RANDOM if condition == "random" else STRATEGY
    generator = bench.over_memory(open_shipped("model"), strategy)
    return generator, 0 if condition == "no_documents" else NUM_RETRIEVED


def train_baseline(place: Place) -> Generator:
    """The baseline, trained until it has read as many positions as RA-CM3."""
    config = load_config_file(find_config("flagworld_reading.py") + ":twin")
    config.init_from = f"{SHIPPED}/twin"
    config.seed = 2
    config.memory.index = "exact"
    config.train.num_steps = min(TWIN_STEPS, place.scale.max_steps)
    config.optimizer.learning_rate = 5e-4  # half of that of its first training
    config.optimizer.warmup_steps = min(100, config.train.num_steps // 2)
    if config.train.num_steps < TWIN_STEPS:
        config.train.log_every = config.train.num_steps
        config.world.num_nations = place.scale.num_trained
        config.pipeline.rows = config.pipeline.examples_per_batch = 4
    folder = place.work / place.scale.name / "twin_equal_compute"
    if not (folder / "model").is_dir():
        racm3_jax.train(config, folder, progress=False)
    return wiring.load_generator(folder, None)


def _copy(bench: Bench) -> Figures:
    """The image of the document nearest to the caption, and vice versa."""
    generator = bench.over_memory(open_shipped("model"))
    texts = [test.text for test in bench.tests]
    found = generator.retrieve_for(texts, 1, None)
    images = [generator.tokenizer.decode(r.documents[0]).images[-1] for r in found]
    seen = generator.retrieve_for([test.images[0] for test in bench.tests], 1, None)
    captions = [generator.tokenizer.decode(r.documents[0]).text for r in seen]
    return {
        **judge_images(images, bench),
        **measure_distances(images, bench, generator),
        **judge_captions(captions, bench),
    }


EXPERIMENT = Experiment(
    number=1,
    name="gains",
    title="What does retrieval gain, for images and for captions?",
    claim=(
        "RA-CM3 is better than the same model without retrieval at images and captions, "
        "by 12 FID and 17 CIDEr on MS-COCO (abstract); returning the retrieved "
        "image gives 17.97 FID, between the plain model (29.5) and RA-CM3 (15.7)."
    ),
    conditions={
        "retrieval": "RA-CM3, 2 documents, guided by them",
        "unguided": "RA-CM3, 2 documents, no guidance",
        "random": "RA-CM3, 2 random documents, guided by them",
        "no_documents": "RA-CM3, no documents",
        "twin": "baseline without retrieval, equal data",
        "twin_equal_compute": "the same baseline, trained to equal compute",
        "copy": "return the nearest document",
    },
    measure=measure,
    columns={
        "flag": "flag right",
        "scene": "scene right",
        "fid": "FID ↓ (own features)",
        "name": "caption names the nation",
        "cider": "CIDEr-D",
    },
    panels=(
        Panel(
            "right",
            {
                "flag": "flag generated",
                "scene": "scene generated",
                "name": "name written",
            },
        ),
        Panel("FID, own features", {"fid": "FID"}, percent=False),
        Panel("CIDEr-D", {"cider": "CIDEr-D"}, percent=False),
    ),
    hours=1.6,
    reference="twin",
    proof=("retrieval", "random", "twin_equal_compute", "copy"),
    settings={
        "tests_per_nation": TESTS_PER_NATION,
        "num_retrieved": NUM_RETRIEVED,
        "twin_steps": TWIN_STEPS,
    }
    | shipped_weights(),
    notes=(
        "Model and baseline have seen the same main documents with the same masks in "
        "the same order; RA-CM3 also reads documents, and so takes twice the "
        f"compute, which the last baseline gets, too. {DISTANCE_NOTE} Each test uses "
        "a scene in which the memory never shows its nation, so that copying cannot "
        "get both right."
    ),
)
