"""What a finished COCO run comes to: figures with intervals, a table, a picture sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from racm3_jax.evaluation.captions import score_captions, score_with_java, strip_prefix
from racm3_jax.evaluation.features import kernel_distance, precision_and_recall
from racm3_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from racm3_jax.evaluation.intervals import Estimate, bootstrap
from racm3_jax.evaluation.pictures import Panel, Row
from racm3_jax.evaluation.protocol import REAL, CocoProtocol
from racm3_jax.evaluation.runner import save_sheet, write_results, write_table


def evaluate_coco(
    protocol: CocoProtocol, log: Callable[[str], None] = print
) -> dict[str, Any] | None:
    """Runs a protocol to its end; the same call resumes.

    Writes `results.json`, `table.md` and `samples.png` into the work directory.

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
    results["num_near_duplicates_purged"] = protocol.num_purged
    settings = protocol.record | {
        "pixels": protocol.pixels_fingerprint,
        "run": protocol.parts.fingerprint,
    }
    write_results(workdir, results, settings)
    write_table(workdir, format_table(protocol, results))
    _write_sheet(protocol, workdir / "samples.png")
    return results


def _caption_figures(protocol: CocoProtocol) -> dict[str, Any]:
    settings = protocol.settings
    references = [item.captions for item in protocol.items]
    results: dict[str, Any] = {}
    for variant in settings.variants:
        # The prompt's words are no caption, also where a copied caption has them.
        texts = [
            strip_prefix(text, settings.prefix)
            for text in protocol.parts.load(variant)["text"].tolist()
        ]
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
    real = protocol.reference.load(REAL)
    references = {
        name: reference_statistics(protocol, name, real) for name in protocol.extractors
    }
    results: dict[str, Any] = {}
    if "clip_score" in real:
        found = _mean(protocol, "clip_score", real["clip_score"])
        results["real/clip_score"] = found["clip_score"]
    for variant in settings.variants:
        drawn = protocol.parts.load(variant)
        figures: dict[str, Any] = {}
        for name in protocol.extractors:
            key = f"features_{name}"
            figures |= _distances(
                protocol, name, references[name], real[key], drawn[key]
            )
        if "clip_score" in drawn:
            figures |= _mean(protocol, "clip_score", drawn["clip_score"])
        results |= {f"{variant}/{name}": value for name, value in figures.items()}
    return results


def reference_statistics(
    protocol: CocoProtocol, name: str, real: Mapping[str, np.ndarray]
) -> FeatureStatistics:
    """Of the real images: the saved ones where they are of these pixels and network.

    They are next to the chunks that they sum up, in the folder that runs may share.

    Raises:
      ValueError: a damaged file, or one of other pixels or another network.
    """
    path = protocol.reference.workdir / f"statistics_{name}.npz"
    about = dict(protocol.extractors[name].settings)
    about["pixels"] = protocol.pixels_fingerprint
    if path.exists():
        return FeatureStatistics.load(path, about)
    statistics = FeatureStatistics.of(real[f"features_{name}"])
    statistics.save(path, about)
    return statistics


def _distances(
    protocol: CocoProtocol,
    name: str,
    reference: FeatureStatistics,
    real: Float32[np.ndarray, "real d"],
    drawn: Float32[np.ndarray, "drawn d"],
) -> dict[str, Any]:
    """The Fréchet distance with its interval, KID, precision and recall.

    The real images are the fixed reference, so that only the drawn ones are resampled. A
    resample repeats images, which raises a Fréchet distance: the interval shows the
    spread of the figure and may be above it.
    """
    settings = protocol.settings

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
    """Caption | the real image | what each variant drew, or how it captions it."""
    settings = protocol.settings
    is_drawn = settings.task == "text_to_image"
    made = {v: protocol.parts.load(v) for v in settings.variants}
    rows = []
    for i in range(min(settings.num_sheet_rows, len(protocol.items))):
        item = protocol.items[i]
        groups = [[Panel(item.read(settings.image_size))]]
        for variant, columns in made.items():
            if is_drawn:
                groups.append([Panel(protocol.read_drawn(variant, i))])
            else:
                image = protocol.read_retrieved(columns["retrieved"][i])
                groups.append([Panel(image, str(columns["text"][i]))])
        rows.append(Row(item.caption, groups))
    if rows:
        save_sheet(path, ("caption", "real", *settings.variants), rows)
