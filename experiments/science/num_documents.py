"""2. The number of documents at test."""

from __future__ import annotations

from science.experiment import Experiment, Figures, Panel, Place
from science.measures import (
    DISTANCE_NOTE,
    UNGUIDED,
    Sampling,
    generate_images,
    judge_outputs,
    measure_captions,
    measure_distances,
    measure_images,
    measure_likelihood,
)
from science.worlds import open_bench, open_shipped, shipped_weights

COUNTS = (0, 1, 2, 4)


def measure(condition: str, seed: int, place: Place) -> Figures:
    """Images with and without guidance, captions and likelihoods with K documents."""
    k = int(condition)
    bench = open_bench(seed, place)
    generator = bench.over_memory(open_shipped("model"))
    outputs = generate_images(generator, bench, seed, k, Sampling())
    images = [output.images[0] for output in outputs]
    return {
        **judge_outputs(outputs, bench),
        **measure_distances(images, bench, generator),
        **measure_images(generator, bench, seed, k, UNGUIDED, "unguided_"),
        **measure_captions(generator, bench, seed, k),
        **measure_likelihood(generator, bench, k),
    }


EXPERIMENT = Experiment(
    number=2,
    name="num_documents",
    title="How many retrieved documents does a prompt need?",
    claim=(
        "Two documents at test are used throughout, after training with K ~ "
        f"U{0, 1, 2}; the successor (arXiv 2309.02591) prints FID 10.82, 5.78 and 4.88 "
        "with 0, 1 and 2 documents."
    ),
    conditions={str(k): f"K = {k}" for k in COUNTS},
    measure=measure,
    columns={
        "flag": "flag right, guided",
        "unguided_flag": "flag right, no guidance",
        "scene": "scene right",
        "fid": "FID ↓ (own features)",
        "name": "caption names the nation",
        "cider": "CIDEr-D",
        "text_perplexity": "text perplexity ↓",
        "image_bits": "bits an image ↓",
    },
    panels=(
        Panel(
            "right",
            {
                "flag": "flag, guided",
                "unguided_flag": "flag, no guidance",
                "name": "name in the caption",
            },
        ),
        Panel("bits an image", {"image_bits": "bits"}, percent=False),
        Panel("FID, own features", {"fid": "FID"}, percent=False),
    ),
    hours=0.1,
    reference="2",
    x_values=tuple(float(k) for k in COUNTS),
    x_title="documents at test",
    proof=("0", "4"),
    settings={"counts": list(COUNTS)} | shipped_weights(),
    notes=(
        "Training has at most 2 documents: 4 documents lead to positions that no "
        f"training example had. {DISTANCE_NOTE}"
    ),
)
