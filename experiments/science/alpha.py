"""3. The loss weight of retrieved documents, and generation without retrieval."""

from __future__ import annotations

from science import variants
from science.experiment import Experiment, Figures, Panel, Place
from science.measures import (
    DISTANCE_NOTE,
    generate_images,
    judge_outputs,
    measure_captions,
    measure_distances,
    measure_likelihood,
    measure_reading,
)
from science.worlds import EASY, open_bench

ALPHAS = (0.0, 0.03, 0.1, 0.3, 1.0)
# Generation without documents, the main question, does not need a model that copies.
NUM_STEPS = 3000


def measure(condition: str, seed: int, place: Place) -> Figures:
    """A model trained with this α: images and captions with and without documents."""
    bench = open_bench(seed, place, **EASY)
    alpha = float(condition)
    plain = variants.train_model(
        seed, place, num_steps=NUM_STEPS, changes={"pipeline.alpha": alpha}
    )
    generator = bench.over_memory(plain)
    alone = generate_images(generator, bench, seed, 0)
    images = [output.images[0] for output in alone]
    return {
        **measure_reading(generator, bench, seed),
        "alone_scene": judge_outputs(alone, bench)["scene"],
        **measure_distances(images, bench, generator, "alone_"),
        "alone_cider": measure_captions(generator, bench, seed, 0)["cider"],
        **measure_likelihood(generator, bench, 0, "alone_"),
    }


EXPERIMENT = Experiment(
    number=3,
    name="alpha",
    title="How much should the loss of retrieved documents weigh?",
    claim=(
        "The loss of retrieved documents is weighted by α = 0.1 (section 3.2). The "
        "successor (arXiv 2309.02591) drops the weight, because it hurts generation "
        "without retrieval."
    ),
    conditions={str(alpha): f"α = {alpha:g}" for alpha in ALPHAS},
    measure=measure,
    columns={
        "flag": "flag right",
        "name": "caption names the nation",
        "text_perplexity": "text perplexity ↓",
        "image_bits": "bits an image ↓",
        "alone_scene": "K=0: scene right",
        "alone_fid": "K=0: FID ↓ (own features)",
        "alone_cider": "K=0: CIDEr-D",
        "alone_text_perplexity": "K=0: text perplexity ↓",
        "alone_image_bits": "K=0: bits an image ↓",
    },
    panels=(
        Panel("with 2 documents", {"flag": "flag generated", "name": "name written"}),
        Panel(
            "bits an image",
            {"image_bits": "2 documents", "alone_image_bits": "without"},
            percent=False,
        ),
        Panel(
            "text perplexity",
            {"text_perplexity": "2 documents", "alone_text_perplexity": "without"},
            percent=False,
        ),
    ),
    hours=1.6,
    reference="0.1",
    proof=("0.3",),
    settings=variants.SETTINGS | {"num_steps": NUM_STEPS},
    notes=(
        f"Trained for {NUM_STEPS} steps, half of those of the experiments below: whether "
        "a model copies by then depends on its seed. K=0 is the same model without "
        f"documents. {DISTANCE_NOTE}"
    ),
)
