"""6. Retrieval from the first step on, vs. a plain model that learns it later."""

from __future__ import annotations

from science import variants
from science.experiment import Experiment, Figures, Panel, Place
from science.measures import measure_reading
from science.worlds import EASY, open_bench

# A plain model takes half the positions per step of one with documents.
FINETUNE_STEPS = variants.NUM_STEPS // 2


def measure(condition: str, seed: int, place: Place) -> Figures:
    """Images, captions and likelihoods of the trained model."""
    bench = open_bench(seed, place, **EASY)
    if condition == "scratch":
        plain = variants.train_model(seed, place)
    else:
        start = variants.train(
            variants.make_config(seed, place, retrieval=False), place
        )
        steps = (
            variants.NUM_STEPS if condition == "finetuned_longer" else FINETUNE_STEPS
        )
        plain = variants.train_model(
            seed, place, num_steps=steps, init_from=str(start / "model")
        )
    generator = bench.over_memory(plain)
    return measure_reading(generator, bench, seed)


EXPERIMENT = Experiment(
    number=6,
    name="scratch",
    title="From scratch, or by fine-tuning a plain model?",
    claim="Training from scratch is better than fine-tuning a plain CM3 (section 4).",
    conditions={
        "scratch": f"with documents from scratch, {variants.NUM_STEPS} steps",
        "finetuned": (
            f"plain for {variants.NUM_STEPS} steps, then {FINETUNE_STEPS} with "
            "documents: equal compute"
        ),
        "finetuned_longer": (
            f"plain for {variants.NUM_STEPS} steps, then {variants.NUM_STEPS} with "
            "documents: 1.5 times the compute"
        ),
    },
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
    hours=1.1,
    reference="scratch",
    proof=("finetuned",),
    settings=variants.SETTINGS | {"finetune_steps": FINETUNE_STEPS},
    notes=(
        "Compute counts positions of training; each part has its own schedule. The "
        "models from scratch are the ones that experiment 5 trains on whole "
        "documents: trained again for this run, they count in the hours of both; in "
        "one place they are trained once."
    ),
)
