"""7. Size: what retrieval gains at each, and against compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from science import variants
from science.cells import Cell, write_json
from science.experiment import Experiment, Figures, Panel, Place
from science.measures import measure_reading
from science.worlds import EASY, open_bench

# Width, layers.
SIZES = {"small": (64, 2), "middle": (variants.D_MODEL, variants.NUM_LAYERS)}
SIZES["large"] = (192, 4)
KINDS = {"retrieval": "with documents", "plain": "without"}
CURVES = ("image_loss", "text_loss")


def measure(condition: str, seed: int, place: Place) -> Figures:
    """A model of one size draws, captions and is scored; and what its training took."""
    size, _, kind = condition.partition("_")
    retrieval = kind == "retrieval"
    config = make_config(size, retrieval, seed, place)
    folder = variants.train(config, place)
    bench = open_bench(seed, place, **EASY)
    plain = variants.open_variant(folder)
    k = 2 if retrieval else 0
    generator = bench.over_memory(plain)
    cost = variants.read_cost(folder)
    curves: dict[str, Any] = {n: variants.read_curve(folder, n) for n in CURVES}
    path = curve_path(condition, seed, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, curves | {"num_steps": config.train.num_steps})
    return {
        **measure_reading(generator, bench, seed, k),
        "teraflops": variants.count_flops(config, plain) / 1e12,
        "train_minutes": cost["wall_seconds"] / 60,
    }


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


def curve_path(condition: str, seed: int, place: Place) -> Path:
    """Where the losses of one training are kept, for the plot."""
    return place.work / place.scale.name / "curves" / f"sizes-{condition}-{seed}.json"


def draw_curves(
    experiment: Experiment, cells: dict[tuple[str, int], Cell], place: Place
) -> Path | None:
    """Losses against the compute that was spent, one line a training.

    None where trainings are not on this machine.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not all(curve_path(*key, place).exists() for key in cells):
        return None
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(11, 4))
    colours = dict(zip(SIZES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for (condition, seed), cell in cells.items():
        size, _, kind = condition.partition("_")
        curves = json.loads(curve_path(condition, seed, place).read_text())
        total = float(cell["figures"]["teraflops"])
        for axis, name in zip(axes, CURVES, strict=True):
            steps, values = curves[name]
            axis.plot(
                [total * step / curves["num_steps"] for step in steps],
                values,
                color=colours[size],
                linestyle="-" if kind == "retrieval" else ":",
                linewidth=1,
                label=f"{size}, {KINDS[kind]}" if seed == experiment.seeds[0] else None,
            )
    for axis, name in zip(axes, CURVES, strict=True):
        axis.set(xscale="log", yscale="log", xlabel="teraFLOP of training", ylabel=name)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    path = place.work / place.scale.name / "sizes_curves.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


EXPERIMENT = Experiment(
    number=7,
    name="sizes",
    title="Does retrieval gain at every size, and at equal compute?",
    claim=(
        "RA-CM3 does better than plain models with less compute (under 30% of DALL-E's, "
        "abstract). An ablation over sizes is mentioned; its figures are not in what we "
        "could read."
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
        Panel("right", {"flag": "flag drawn", "name": "name written"}),
        Panel("bits an image", {"image_bits": "bits"}, percent=False),
        Panel("text perplexity", {"text_perplexity": "perplexity"}, percent=False),
    ),
    hours=2.4,
    proof=("small_retrieval", "small_plain"),
    settings=variants.SETTINGS | {"sizes": {k: list(v) for k, v in SIZES.items()}},
    notes=(
        "At one size both kinds take the same number of positions: the plain model takes "
        "twice the steps, and sees twice the main documents. Compute is PaLM's count. "
        "Minutes are of this machine, which may have been busy."
    ),
    draw=draw_curves,
)
