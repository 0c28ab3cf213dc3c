"""What a finished COCO run comes to: figures with intervals, a table, a picture sheet."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from racm3_jax.evaluation.captions import score_captions, score_with_java
from racm3_jax.evaluation.features import kernel_distance, precision_and_recall
from racm3_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from racm3_jax.evaluation.intervals import Estimate, bootstrap
from racm3_jax.evaluation.pictures import Panel, Row
from racm3_jax.evaluation.protocol import REAL, CocoProtocol
from racm3_jax.evaluation.runner import save_sheet, write_results


def evaluate_coco(
    protocol: CocoProtocol, log: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """Runs a protocol to its end; the same call resumes.

    Writes `results.json`, `table.md`, the statistics of the real images, and
    `samples.png` (of text_to_image) into the work directory.

    Returns:
      The figures by "variant/name", or None in a process other than the first, which has
      done its share.
    """
    protocol.run(log)
    if protocol.is_first:
        protocol.wait(log)
        return write_protocol_results(protocol)
    return None


def write_protocol_results(protocol: CocoProtocol) -> dict[str, Any]:
    """Figures of the finished chunks. Raises FileNotFoundError where one is missing."""
    workdir = protocol.parts.workdir
    if protocol.settings.task == "captioning":
        results = _caption_figures(protocol)
    else:
        results = _image_figures(protocol)
        _write_sheet(protocol, workdir / "samples.png")
    results["num_near_duplicates_purged"] = protocol.num_purged
    settings = protocol.record | {
        "pixels": protocol.pixels_fingerprint,
        "run": protocol.parts.fingerprint,
    }
    write_results(workdir, results, settings)
    aside = workdir / "table.md.tmp"
    aside.write_text(format_table(protocol, results) + "\n")
    os.replace(aside, workdir / "table.md")
    return results


def _caption_figures(protocol: CocoProtocol) -> dict[str, Any]:
    settings = protocol.settings
    references = [item.captions for item in protocol.items]
    results: dict[str, Any] = {}
    for variant in settings.variants:
        texts = protocol.parts.load(variant)["text"].tolist()
        scores = score_captions(texts, references)
        figures = bootstrap(
            scores.means,
            len(texts),
            num_resamples=settings.num_resamples,
            seed=settings.seed,
        )
        for name, values in score_with_java(texts, references).items():
            figures |= _mean(protocol, name, values)
        results |= {f"{variant}/{name}": value for name, value in figures.items()}
    return results


def _image_figures(protocol: CocoProtocol) -> dict[str, Any]:
    settings = protocol.settings
    real = protocol.parts.load(REAL)
    results: dict[str, Any] = {}
    if "clip_score" in real:
        found = _mean(protocol, "clip_score", real["clip_score"])
        results["real/clip_score"] = found["clip_score"]
    for name, extractor in protocol.extractors.items():
        statistics = FeatureStatistics.of(real[f"features_{name}"])
        about = dict(extractor.settings) | {"pixels": protocol.pixels_fingerprint}
        statistics.save(protocol.parts.workdir / f"real_{name}.npz", about)
    for variant in settings.variants:
        drawn = protocol.parts.load(variant)
        figures: dict[str, Any] = {}
        for name in protocol.extractors:
            key = f"features_{name}"
            figures |= _distances(protocol, name, real[key], drawn[key])
        if "clip_score" in drawn:
            figures |= _mean(protocol, "clip_score", drawn["clip_score"])
        results |= {f"{variant}/{name}": value for name, value in figures.items()}
    return results


def _distances(
    protocol: CocoProtocol,
    name: str,
    real: Float32[np.ndarray, "real d"],
    drawn: Float32[np.ndarray, "drawn d"],
) -> dict[str, Any]:
    """The Fréchet distance with its interval, KID, precision and recall.

    The real images are the fixed reference, so that only the drawn ones are resampled. A
    resample repeats images, which raises a Fréchet distance: the interval shows the
    spread of the figure and may lie above it.
    """
    settings = protocol.settings
    reference = FeatureStatistics.of(real)

    def distance(rows: Int[np.ndarray, " rows"]) -> dict[str, float]:
        found = FeatureStatistics.of(drawn[rows])
        return {f"{name}_frechet": frechet_distance(reference, found)}

    figures: dict[str, Any] = dict(
        bootstrap(
            distance,
            len(drawn),
            num_resamples=settings.num_distance_resamples,
            seed=settings.seed,
        )
    )
    kernel = kernel_distance(real, drawn, seed=settings.seed)
    figures[f"{name}_kernel"] = kernel.value
    figures[f"{name}_kernel_deviation"] = kernel.standard_deviation
    if min(len(real), len(drawn)) > 3:
        coverage = precision_and_recall(real, drawn)
        figures[f"{name}_precision"] = coverage.precision
        figures[f"{name}_recall"] = coverage.recall
    return figures


def _mean(protocol: CocoProtocol, name: str, values: np.ndarray) -> dict[str, Estimate]:
    return bootstrap(
        lambda rows: {name: float(values[rows].mean(dtype=np.float64))},
        len(values),
        num_resamples=protocol.settings.num_resamples,
        seed=protocol.settings.seed,
    )


def format_table(protocol: CocoProtocol, results: dict[str, Any]) -> str:
    """One row a figure, one column a variant."""
    variants = protocol.settings.variants
    names = list(
        dict.fromkeys(
            name.partition("/")[2] for name in results if name.startswith(variants)
        )
    )
    lines = [
        f"| {protocol.settings.task}, {len(protocol.items)} images | "
        + " | ".join(variants)
        + " |",
        "|---" * (len(variants) + 1) + "|",
    ]
    for name in names:
        cells = (results.get(f"{variant}/{name}", "-") for variant in variants)
        shown = (f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    lines.append(f"\nnear-duplicates purged from the memory: {protocol.num_purged}")
    return "\n".join(lines)


def _write_sheet(protocol: CocoProtocol, path: Path) -> None:
    """Prompt | the real image | what each variant drew."""
    settings = protocol.settings
    rows = [
        Row(
            protocol.items[i].caption,
            (
                [Panel(protocol.items[i].read(settings.image_size))],
                *([Panel(protocol.read_drawn(v, i))] for v in settings.variants),
            ),
        )
        for i in range(min(settings.num_sheet_rows, len(protocol.items)))
    ]
    if not rows:
        return
    save_sheet(path, ("prompt", "real", *settings.variants), rows)
