"""The tasks of flagworld, each run with one model on all tests.

The returned arrays are kept: one row per test, with the outcomes of the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from racm3_jax.evaluation.kshot import INVENTED
from racm3_jax.evaluation.parts import Arrays
from racm3_jax.evaluation.suite import keep_outputs
from racm3_jax.flagworld.settings import TaskSettings
from racm3_jax.flagworld.task_probes import TaskProbes
from racm3_jax.generation.classification import ClassifyBy
from racm3_jax.generation.settings import RegionPrompt
from racm3_jax.generation.tasks import Generator
from racm3_jax.types import GenerationOutput


def infill(
    generator: Generator,
    probes: TaskProbes,
    settings: TaskSettings,
    num_retrieved: int,
    region_prompt: RegionPrompt,
    **options: Any,
) -> Arrays:
    """Is the flag right after its hidden half is filled in?"""
    outputs = generator.infill_batch(
        [test.images[0] for test in probes.tests],
        probes.fly_halves(),
        [test.text for test in probes.tests],
        num_retrieved=num_retrieved,
        max_spans=settings.max_spans,
        region_prompt=region_prompt,
        **_sampling(settings),
        **options,
    )
    names = [probes.nation(i) for i in range(len(probes.tests))]
    return _judge(generator, probes, outputs, names)


def edit(
    generator: Generator,
    probes: TaskProbes,
    settings: TaskSettings,
    region_prompt: RegionPrompt,
    sized: bool = False,
    **options: Any,
) -> Arrays:
    """Does the region show the chosen flag, and how many codes of the rest are kept?"""
    items = range(len(probes.tests))
    choose = probes.donor_of_size if sized else probes.donor
    outputs = generator.edit_batch(
        [test.images[0] for test in probes.tests],
        probes.flag_boxes(),
        [[choose(i)] for i in items],
        probes.captions_of_donors(),
        max_spans=settings.max_spans,
        region_prompt=region_prompt,
        **_sampling(settings),
        **options,
    )
    names = [probes.donor(i).metadata["nation"] for i in items]
    facts = [output.documents[0].metadata for output in outputs]
    kept = [[fact["codes_outside_kept"], fact["codes_outside"]] for fact in facts]
    found = _judge(generator, probes, outputs, names)
    return {**found, "codes_kept": np.array(kept)}


def demonstrate(
    generator: Generator,
    probes: TaskProbes,
    settings: TaskSettings,
    *,
    named: bool,
    count: int = 1,
    **options: Any,
) -> Arrays:
    """Does the image follow `count` demonstrations: their flag, and its layout?"""
    items = range(len(probes.tests))
    prompts = [test.text for test in probes.tests]
    outputs = generator.continue_batch(
        probes.captions_of_donors() if named else prompts,
        [probes.examples(int(probes.partners[i]), count) for i in items],
        **_sampling(settings),
        **options,
    )
    names = [probes.donor(i).metadata["nation"] for i in items]
    return _judge(generator, probes, outputs, names)


def classify(
    generator: Generator,
    probes: TaskProbes,
    settings: TaskSettings,
    shots: int,
    by: ClassifyBy,
    words: Sequence[str] = INVENTED,
) -> Arrays:
    """Two-way classification: is it right, and how probable is the right label?

    The two labels are sampled for every question from `words`, and so is their order,
    so that a model that always gives the same one is right half of the time.
    """
    rng = np.random.default_rng([settings.seed, 1])
    right, probabilities = [], []
    for i, test in enumerate(probes.tests):
        own, other = (str(word) for word in rng.choice(words, 2, replace=False))
        support = [
            (document.images[0], label)
            for item, label in ((i, own), (probes.partners[i], other))
            for document in probes.examples(item, shots)
        ]
        found = generator.classify(
            test.images[0],
            support,
            (own, other) if rng.random() < 0.5 else (other, own),
            shots_per_pass=settings.shots_per_pass,
            by=by,
        )
        right.append(found.label == own)
        of_own = float(found.probabilities[found.labels.index(own)])
        probabilities.append([of_own, 1 - of_own])
    return {"right": np.array(right), "probabilities": np.array(probabilities)}


def draw(
    generator: Generator, probes: TaskProbes, settings: TaskSettings, **options: Any
) -> Arrays:
    """Does the best sample have the right flag, and how many of all samples do?

    Samples of one prompt count as fewer independent ones.
    """
    outputs = generator.text_to_image_batch(
        [test.text for test in probes.tests],
        num_retrieved=settings.num_retrieved,
        **_sampling(settings),
        **options,
    )
    names = [probes.nation(i) for i in range(len(probes.tests))]
    count = len(outputs[0].images)
    every = [image for output in outputs for image in output.images]
    found = np.array(probes.name_flags(every)).reshape(len(names), count)
    right = found == np.array(names)[:, None]
    totals = np.full(len(right), count)
    return {"flag": right[:, 0], "any_sample": np.stack([right.sum(1), totals], 1)}


def draw_in_8_bits(generator: Generator, *asked: Any) -> Arrays:
    """`draw` with 8-bit weights."""
    return draw(generator.quantized(), *asked)


def _sampling(settings: TaskSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("seed", "temperature", "top_p")}


def _judge(
    generator: Generator,
    probes: TaskProbes,
    outputs: Sequence[GenerationOutput],
    names: Sequence[str],
) -> Arrays:
    images = [output.images[0] for output in outputs]
    return {**probes.judge_flags(images, names), **keep_outputs(outputs, generator)}
