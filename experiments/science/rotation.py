"""8. The probability of rotation: captioning by infilling, and guidance."""

from __future__ import annotations

from science import variants
from science.experiment import Experiment, Figures, Panel, Place
from science.measures import (
    TEXT_GUIDED,
    UNGUIDED,
    Sampling,
    measure_captions,
    measure_images,
    measure_likelihood,
)
from science.worlds import EASY, open_bench

PROBABILITIES = (0.0, 0.1, 0.25, 0.5)


def measure(condition: str, seed: int, place: Place) -> Figures:
    """Captions by infilling, and images with both kinds of guidance and with none."""
    bench = open_bench(seed, place, **EASY)
    plain = variants.train_model(
        seed, place, changes={"masking.rotation_probability": float(condition)}
    )
    generator = bench.over_memory(plain)
    return {
        **measure_captions(generator, bench, seed),
        **measure_images(generator, bench, seed, sampling=UNGUIDED),
        **measure_images(
            generator, bench, seed, sampling=TEXT_GUIDED, prefix="text_guided_"
        ),
        **measure_images(generator, bench, seed, sampling=Sampling(), prefix="guided_"),
        **measure_likelihood(generator, bench),
    }


EXPERIMENT = Experiment(
    number=8,
    name="rotation",
    title="How often must a whole caption be moved?",
    claim=(
        "The paper captions by infilling, with the prompt `Photo of <mask>`, after "
        "training on spans alone; whole-segment rotation is an option of its "
        "successors (arXiv 2309.02591), whose guidance replaces the text by `<mask>`."
    ),
    conditions={str(p): f"rotation {p:g}" for p in PROBABILITIES},
    measure=measure,
    columns={
        "name": "caption names the nation",
        "cider": "CIDEr-D",
        "flag": "flag right, no guidance",
        "text_guided_flag": "flag right, guided by text",
        "guided_flag": "flag right, guided by documents",
        "guided_scene": "scene right, guided by documents",
        "text_perplexity": "text perplexity ↓",
        "image_bits": "bits an image ↓",
    },
    panels=(
        Panel("captions by infilling", {"name": "nation named"}),
        Panel("CIDEr-D", {"cider": "CIDEr-D"}, percent=False),
        Panel(
            "flag generated",
            {
                "flag": "no guidance",
                "text_guided_flag": "guided by text",
                "guided_flag": "guided by documents",
            },
        ),
    ),
    hours=1.4,
    reference="0.0",
    x_values=PROBABILITIES,
    x_title="probability of rotation",
    proof=("0.5",),
    settings=variants.SETTINGS,
    notes=(
        "Guidance has weight 2. Spans of images and captions are moved, too (Poisson "
        "with mean 0.2), as in configs/flagworld.py. Likelihoods are of documents "
        "without masks."
    ),
)
