"""7. Size: the gain of retrieval at each size, and against compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.evaluation.intervals import Share
from science import variants
from science.cells import Cell, read_curves
from science.experiment import Curve, Experiment, Panel, Place
from science.measures import measure_reading
from science.worlds import EASY, open_bench

# Width, layers.
SIZES = {"small": (64, 2), "middle": (variants.D_MODEL, variants.NUM_LAYERS)}
SIZES["large"] = (192, 4)
KINDS = {"retrieval": "with documents", "plain": "without"}
CURVES = ("image_loss", "text_loss")
CURVE_POINTS = 60


def measure(
    condition: str, seed: int, place: Place
) -> dict[str, Share | float | Curve]:
    """Images, captions and likelihoods of a model of one size; cost of its training."""
    size, _, kind = condition.partition("_")
    retrieval = kind == "retrieval"
    config = make_config(size, retrieval, seed, place)
    folder = variants.train(config, place)
    bench = open_bench(seed, place, **EASY)
    plain = variants.open_variant(folder)
    teraflops = variants.count_flops(config, plain) / 1e12
    a_step = teraflops / config.train.num_steps
    return {
        **measure_reading(bench.over_memory(plain), bench, seed, 2 if retrieval else 0),
        "teraflops": teraflops,
        "train_minutes": variants.read_cost(folder)["wall_seconds"] / 60,
        **{n: smooth(*variants.read_curve(folder, n), a_step) for n in CURVES},
    }


def smooth(steps: Sequence[int], values: Sequence[float], a_step: float) -> Curve:
    """Smoothed values over the training compute; a few points."""
    parts = min(len(steps), CURVE_POINTS)
    means = [
        [float(f"{np.mean(part):.4g}") for part in np.array_split(whole, parts)]
        for whole in (np.array(steps) * a_step, np.array(values))
    ]
    return Curve(*means)


def make_config(size: str, retrieval: bool, seed: int, place: Place) -> Any:
    """Plain models take twice the steps of half the positions: equal compute."""
    d_model, num_layers = SIZES[size]
    return variants.make_config(
        seed,
        place,
        retrieval=retrieval,
        num_steps=variants.NUM_STEPS * (1 if retrieval else 2),
        d_model=d_model,
        num_layers=num_layers,
    )


def plot_curves(
    experiment: Experiment, cells: dict[tuple[str, int], Cell], path: Path
) -> None:
    """Losses over training compute, one line per training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(11, 4))
    colours = dict(zip(SIZES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for condition in experiment.conditions:
        size, _, kind = condition.partition("_")
        found = [read_curves(cells[k]) for k in sorted(cells) if k[0] == condition]
        for axis, name in zip(axes, CURVES, strict=True):
            for i, curves in enumerate(found):
                axis.plot(
                    *curves[name],
                    color=colours[size],
                    linestyle="-" if kind == "retrieval" else ":",
                    linewidth=1,
                    label=None if i else f"{size}, {KINDS[kind]}",
                )
    for axis, name in zip(axes, CURVES, strict=True):
        axis.set(xscale="log", yscale="log", xlabel="teraFLOP of training", ylabel=name)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


EXPERIMENT = Experiment(
    number=7,
    name="sizes",
    title="Does retrieval gain at every size, and at equal compute?",
    claim=(
        "RA-CM3 does better than plain models with less compute (under 30% of "
        "DALL-E's, abstract). An ablation over sizes is mentioned; its figures are "
        "not in what we could read."
    ),
    conditions={
        f"{size}_{kind}": f"{size} ({width} wide, {layers} layers), {words}"
        for size, (width, layers) in SIZES.items()
        for kind, words in KINDS.items()
    },
    measure=measure,
    columns={
        "teraflops": "teraFLOP",
        "train_minutes": "minutes",
        "flag": "flag right",
        "name": "caption names the nation",
        "text_perplexity": "text perplexity ↓",
        "image_bits": "bits an image ↓",
    },
    panels=(
        Panel("right", {"flag": "flag generated", "name": "name written"}),
        Panel("bits an image", {"image_bits": "bits"}, percent=False),
        Panel("text perplexity", {"text_perplexity": "perplexity"}, percent=False),
    ),
    hours=2.4,
    also_compared={
        "small_plain": ("small_retrieval", "middle_plain", "large_plain"),
        "middle_plain": ("middle_retrieval",),
        "large_plain": ("large_retrieval", "small_retrieval"),
        "small_retrieval": ("middle_retrieval",),
        "middle_retrieval": ("large_retrieval",),
    },
    proof=("small_retrieval", "small_plain"),
    settings=variants.SETTINGS | {"sizes": {k: list(v) for k, v in SIZES.items()}},
    notes=(
        "At each size both kinds use the same number of positions: the model without "
        "documents takes twice the steps, and sees twice the main documents. Compute "
        "is PaLM's count. Minutes are of this machine, which may have been busy."
    ),
    plot_curves=plot_curves,
)
