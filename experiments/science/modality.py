"""5. The modality of retrieved documents: image, text, or both."""

from __future__ import annotations

import dataclasses

from science import variants
from science.experiment import Experiment, Figures, Panel, Place
from science.measures import measure_reading
from science.worlds import EASY, STRATEGY, open_bench, open_shipped, shipped_weights

GIVEN = ("both", "image", "text")


def measure(condition: str, seed: int, place: Place) -> Figures:
    """The shipped model, or one trained on such documents."""
    how, _, given = condition.partition("_")
    strategy = dataclasses.replace(STRATEGY, given=given)
    if how == "test":
        bench = open_bench(seed, place)
        plain = open_shipped("model")
    else:
        bench = open_bench(seed, place, **EASY)
        # The key is set only where it changes something, so that "both" is shared.
        changes = {} if given == "both" else {"strategy.given": given}
        plain = variants.train_model(seed, place, changes=changes)
    generator = bench.over_memory(plain, strategy)
    return measure_reading(generator, bench, seed)


def _titles() -> dict[str, str]:
    words = {"both": "image and text", "image": "image alone", "text": "text alone"}
    titles = {f"test_{g}": f"shipped model, given {words[g]}" for g in GIVEN}
    return titles | {f"trained_{g}": f"trained and given {words[g]}" for g in GIVEN}


EXPERIMENT = Experiment(
    number=5,
    name="modality",
    title="Must retrieved documents have both an image and a text?",
    claim=(
        "Whole image-and-text documents beat retrieved images alone and texts alone "
        "(section 3.1, modality)."
    ),
    conditions=_titles(),
    measure=measure,
    columns={
        "flag": "flag right",
        "scene": "scene right",
        "name": "caption names the nation",
        "cider": "CIDEr-D",
        "text_perplexity": "text perplexity ↓",
        "image_bits": "bits an image ↓",
    },
    panels=(
        Panel("right", {"flag": "flag generated", "name": "name written"}),
        Panel("bits an image", {"image_bits": "bits"}, percent=False),
    ),
    hours=1.5,
    proof=("test_text", "trained_image"),
    settings=variants.SETTINGS | shipped_weights(),
    notes=(
        "The retriever finds the same documents in all rows; the context has parts of "
        "them. The shipped model was trained on whole documents only; the models of "
        "the last three rows are small, and were trained on the same parts."
    ),
)
