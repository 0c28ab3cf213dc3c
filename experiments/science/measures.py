"""Measurements of models: images, captions, likelihoods, distances of image sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from racm3_jax.evaluation.captions import score_captions
from racm3_jax.evaluation.clip_score import CLIPFeatures
from racm3_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from racm3_jax.evaluation.intervals import compute_share
from racm3_jax.evaluation.perplexity import compute_likelihoods
from racm3_jax.generation.tasks import Generator
from racm3_jax.types import GenerationOutput, Modality
from science.experiment import Figures
from science.worlds import Bench

NUM_RETRIEVED = 2
# As in the suite of configs/eval/flagworld.py.
TEMPERATURE, TOP_P, GUIDANCE = 0.5, 0.9, 2.0
FEATURES = "image tower of the shipped flagworld CLIP, 128 features"
DISTANCE_NOTE = (
    f"FID is computed on our own features ({FEATURES}), against the images of the "
    "same test documents: it compares rows of this table only, not other papers. KID "
    "is omitted: its estimator needs independent sets, and these are paired."
)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings of images.

    Attributes:
      guidance: weight; 1 is off.
      guide_documents: guidance against generation without documents and text, or
        (False) without the text only.
      temperature: of the tokens.
    """

    guidance: float = GUIDANCE
    guide_documents: bool = True
    temperature: float = TEMPERATURE


UNGUIDED = Sampling(guidance=1.0)
TEXT_GUIDED = Sampling(guide_documents=False)


def first_seed(seed: int) -> int:
    """Sampling seed: item i uses `first_seed + i`."""
    return 100_000 * seed


def generate_images(
    generator: Generator,
    bench: Bench,
    seed: int,
    num_retrieved: int = NUM_RETRIEVED,
    sampling: Sampling = UNGUIDED,
) -> list[GenerationOutput]:
    """Generates every test once. Without documents there is no guidance by them."""
    guided = num_retrieved or not sampling.guide_documents
    return generator.text_to_image_batch(
        [test.text for test in bench.tests],
        num_retrieved=num_retrieved,
        seed=first_seed(seed),
        temperature=sampling.temperature,
        top_p=TOP_P,
        guidance=sampling.guidance if guided else 1.0,
        guide_documents=sampling.guide_documents,
    )


def judge_outputs(
    outputs: Sequence[GenerationOutput], bench: Bench, prefix: str = ""
) -> Figures:
    """Whether flag and scene are the requested ones."""
    return judge_images([output.images[0] for output in outputs], bench, prefix)


def judge_images(
    images: Sequence[np.ndarray], bench: Bench, prefix: str = ""
) -> Figures:
    """The same for any images, one per test."""
    return {
        f"{prefix}flag": compute_share(bench.judge.flag_verdicts(images)),
        f"{prefix}scene": compute_share(bench.judge.scene_verdicts(images)),
    }


def measure_images(
    generator: Generator,
    bench: Bench,
    seed: int,
    num_retrieved: int = NUM_RETRIEVED,
    sampling: Sampling = UNGUIDED,
    prefix: str = "",
) -> Figures:
    """Generates and evaluates images."""
    outputs = generate_images(generator, bench, seed, num_retrieved, sampling)
    return judge_outputs(outputs, bench, prefix)


def write_captions(
    generator: Generator,
    bench: Bench,
    seed: int,
    num_retrieved: int = NUM_RETRIEVED,
    **settings: Any,
) -> list[GenerationOutput]:
    """Captions every test image, greedily."""
    plain: dict[str, Any] = {"temperature": 0.0, "guidance": 1.0, "num_candidates": 0}
    return generator.caption_batch(
        [test.images[0] for test in bench.tests],
        num_retrieved=num_retrieved,
        seed=first_seed(seed),
        **(plain | settings),
    )


def judge_captions(captions: Sequence[str], bench: Bench, prefix: str = "") -> Figures:
    """Whether the right nation is named, and CIDEr-D with one reference."""
    scores = score_captions(
        [caption or "-" for caption in captions], [[t.text] for t in bench.tests]
    )
    return {
        f"{prefix}name": compute_share(bench.judge.caption_verdicts(captions)),
        f"{prefix}cider": scores.means()["cider"],
    }


def measure_captions(
    generator: Generator,
    bench: Bench,
    seed: int,
    num_retrieved: int = NUM_RETRIEVED,
    prefix: str = "",
) -> Figures:
    """Captions and evaluates."""
    outputs = write_captions(generator, bench, seed, num_retrieved)
    return judge_captions([output.texts[0] for output in outputs], bench, prefix)


def measure_recall(outputs: Sequence[GenerationOutput], bench: Bench) -> Figures:
    """Whether a document of the right nation is retrieved."""
    return {"recall": compute_share(bench.judge.retrieval_verdicts(outputs))}


def measure_likelihood(
    generator: Generator,
    bench: Bench,
    num_retrieved: int = NUM_RETRIEVED,
    prefix: str = "",
    query: Modality = "text",
) -> Figures:
    """Perplexity of the captions and bits of the images of the tests.

    The query is the test's own caption, so its text perplexity with documents is that
    of a text with known neighbours.
    """
    means = compute_likelihoods(
        generator, bench.tests, num_retrieved=num_retrieved, query=query
    ).means()
    return {
        f"{prefix}text_perplexity": means["text_perplexity"],
        f"{prefix}image_bits": means["bits_per_image"],
    }


def measure_reading(
    generator: Generator,
    bench: Bench,
    seed: int,
    num_retrieved: int = NUM_RETRIEVED,
) -> Figures:
    """The measurements of most experiments: guided images, captions, likelihoods."""
    return {
        **measure_images(generator, bench, seed, num_retrieved, Sampling()),
        **measure_captions(generator, bench, seed, num_retrieved),
        **measure_likelihood(generator, bench, num_retrieved),
    }


def measure_distances(
    images: Sequence[np.ndarray],
    bench: Bench,
    generator: Generator,
    prefix: str = "",
) -> Figures:
    """FID on our own features, of a generator with the shipped embedder."""
    assert generator.embedder is not None  # load_generator always opens one
    features = CLIPFeatures(generator.embedder)

    def read(pictures: Sequence[np.ndarray]) -> FeatureStatistics:
        unit = features(pictures)
        return FeatureStatistics.of(unit * np.sqrt(unit.shape[1]))  # mean square 1

    real = read([test.images[0] for test in bench.tests])
    return {f"{prefix}fid": frechet_distance(real, read(images))}
