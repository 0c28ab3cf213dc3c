"""4. Retrieval strategies in training, with planted copies in the memory."""

from __future__ import annotations

import dataclasses
from typing import Any

from science import variants
from science.experiment import Experiment, Figures, Panel, Place
from science.measures import (
    Sampling,
    measure_captions,
    measure_images,
    measure_reading,
)
from science.worlds import EASY, STRATEGY, open_bench

DUPLICATE_SHARE = 0.5
# Only the main document itself is dropped.
_KEEP_ALL = {"max_similarity": 2.0, "drop_same_source": False}
_DIVERSE = {"max_similarity": STRATEGY.max_similarity, "drop_same_source": True}
# Condition -> (strategy, queries with dropout in the memory).
STRATEGIES: dict[str, tuple[dict[str, Any], int]] = {
    "random": (_KEEP_ALL | {"ranking": "random"}, 0),
    "relevance": (_KEEP_ALL, 0),
    "diversity": (_DIVERSE, 0),
    "query_dropout": (_DIVERSE, 2),
}


def measure(condition: str, seed: int, place: Place) -> Figures:
    """A model trained with a strategy and a memory with copies.

    It is tested twice: with the strategy of its training, and with the full one.
    """
    planted = EASY | {"duplicate_share": DUPLICATE_SHARE}
    bench = open_bench(seed, place, **planted)
    chosen, num_query_variants = STRATEGIES[condition]
    plain = variants.train_model(
        seed,
        place,
        changes={f"strategy.{name}": value for name, value in chosen.items()},
        world_changes={"duplicate_share": DUPLICATE_SHARE},
        num_query_variants=num_query_variants,
    )
    own = bench.over_memory(plain, dataclasses.replace(STRATEGY, **chosen))
    best = bench.over_memory(plain, STRATEGY)
    return {
        **measure_images(own, bench, seed, sampling=Sampling(), prefix="own_"),
        **measure_captions(own, bench, seed, prefix="own_"),
        **measure_reading(best, bench, seed),
    }


EXPERIMENT = Experiment(
    number=4,
    name="strategy",
    title="Which documents should a model be trained to read?",
    claim=(
        "Relevance, whole documents and diversity (skip a candidate that is more than "
        "0.9 alike to the query or to a taken one) make retrieval work; dropping 20% "
        "of the query in training is worth 3 points of perplexity and more (section "
        "3.1)."
    ),
    conditions={
        "random": "random documents",
        "relevance": "most relevant",
        "diversity": "+ diversity",
        "query_dropout": "+ query dropout",
    },
    measure=measure,
    columns={
        "own_flag": "flag right, own strategy at test",
        "own_scene": "scene right, own strategy",
        "own_name": "caption names the nation, own strategy",
        "flag": "flag right, whole strategy at test",
        "scene": "scene right, whole strategy",
        "name": "caption names the nation, whole strategy",
        "text_perplexity": "text perplexity ↓",
        "image_bits": "bits an image ↓",
    },
    panels=(
        Panel(
            "own strategy at test",
            {"own_flag": "flag", "own_scene": "scene", "own_name": "name written"},
        ),
        Panel(
            "whole strategy at test",
            {"flag": "flag", "scene": "scene", "name": "name written"},
        ),
        Panel("text perplexity", {"text_perplexity": "perplexity"}, percent=False),
    ),
    hours=1.8,
    reference="query_dropout",
    also_compared={"diversity": ("random", "relevance", "query_dropout")},
    proof=("random", "query_dropout"),
    settings=variants.SETTINGS | {"duplicate_share": DUPLICATE_SHARE},
    notes=(
        f"{DUPLICATE_SHARE:.0%} of the documents have an exact copy in the memory, in "
        "training and at test, with the same source. "
        '"Most relevant" drops only the document itself; diversity drops documents with a '
        "similarity above 0.95, and those of the same source. Likelihoods are measured "
        "with the whole strategy at test."
    ),
)
