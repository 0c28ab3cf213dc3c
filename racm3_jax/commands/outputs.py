"""Output of the generating commands: images, their records, text lines."""

from __future__ import annotations

import argparse
import glob
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from racm3_jax import __version__, own_files

Arguments = argparse.Namespace
_SETTINGS = (  # and those of sampling
    "num_samples",
    "num_retrieved",
    "num_neighbours",
    "rank_by",
    "max_spans",
    "region_prompt",
    "int8",
    "scale",
)


def check_outputs(arguments: Arguments, writes_out: bool = True) -> None:
    """Refuses, before generating, what `--out` and `--preview` must not replace.

    Args:
      arguments: of a generating command.
      writes_out: whether this call writes an image.

    Raises:
      OSError, ValueError: names the path and says what to do.
    """
    inputs = [path for path, _ in arguments.document or ()]
    for name in ("image", "mask", "parts"):
        if given := getattr(arguments, name, None):
            inputs.append(given)
    if writes_out:
        out = Path(arguments.out)
        change = "give another --out"
        own_files.check_png_paths(arguments.out, inputs=inputs, change=change)
        if getattr(arguments, "parts", None):
            previews = out.parent.glob(f"{glob.escape(out.stem)}_*_*.png")
            own_files.check(*previews, inputs=inputs, change=change)
        else:
            record = out.with_suffix(".json")
            own_files.check(record, inputs=inputs, change=change, key="prompt")
            samples = sample_paths(out, getattr(arguments, "num_samples", 1))
            own_files.check(*samples, inputs=inputs, change=change)
    if preview := getattr(arguments, "preview", None):
        if writes_out and os.path.abspath(preview) == os.path.abspath(arguments.out):
            raise ValueError("--preview and --out are the same file: give two")
        change = "give another --preview"
        own_files.check_png_paths(preview, inputs=inputs, change=change)


def sample_paths(out: Path, num_samples: int) -> list[Path]:
    """`x.png` -> `x-0.png`, `x-1.png`, …; empty for a single sample."""
    if num_samples == 1:
        return []
    return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(num_samples)]


def save_images(arguments: Arguments, output: Any) -> None:
    """Writes the samples as one PNG, best first, and one each, all with records."""
    from racm3_jax.evaluation.pictures import enlarge, tile

    path = Path(arguments.out)
    samples = sample_paths(path, len(output.images))
    more = {"out": arguments.out, "samples": [str(sample) for sample in samples]}
    record = _record(arguments, output, more)
    check_outputs(arguments)  # again: generation takes time
    images = [enlarge(image, arguments.scale) for image in output.images]
    own_files.write_png(path, tile(images), record)
    for i, sample in enumerate(samples):
        own_files.write_png(sample, images[i], record | {"sample": i})
    own_files.write_json(path.with_suffix(".json"), record)
    _print(arguments, record)


def explain_sheet(path: str) -> str:
    """An error text if an image is a sheet of several samples; else ""."""
    from PIL import Image

    with Image.open(path) as image:
        chunks = getattr(image, "text", {})  # of a PNG
    try:
        record = json.loads(chunks.get(own_files.PNG_KEY, "{}"))
    except (ValueError, RecursionError):
        return ""
    samples = record.get("samples") if isinstance(record, dict) else None
    if not samples or "sample" in record:
        return ""
    return (
        f"{path} is a sheet of {len(samples)} samples: give one of them, the best is "
        f"{samples[0]}"
    )


def save_parts(out: str, output: Any) -> list[list[dict[str, str]]]:
    """Free documents: writes their images as PNG files next to `out`."""
    stem = Path(out).with_suffix("")
    written = []
    for i, document in enumerate(output.documents):
        parts = []
        for j, segment in enumerate(
            document.segments[document.metadata["given_segments"] :]
        ):
            if segment.text is not None:
                parts.append({"text": segment.text})
                continue
            path = stem.with_name(f"{stem.name}_{i}_{j}.png")
            own_files.write_png(path, segment.image, {"sample": i, "segment": j})
            parts.append({"image": str(path)})
        written.append(parts)
    return written


def report(arguments: Arguments, output: Any, more: dict[str, Any]) -> None:
    """Prints the result and the documents used."""
    _print(arguments, _record(arguments, output, more))


def _record(arguments: Arguments, output: Any, more: dict[str, Any]) -> dict[str, Any]:
    """The record: result, documents, settings and versions."""
    import jax

    from racm3_jax.generation.settings import SamplingSettings

    retrieved = [
        {
            "id": document.id,
            "score": _number(score),
            "source": document.source,
            "licence": document.metadata.get("licence", ""),
        }
        for document, score in zip(
            output.retrieved.documents, output.retrieved.scores, strict=True
        )
    ]
    if (bits := getattr(arguments, "bits", None)) is not None:
        for entry, value in zip(retrieved, bits, strict=True):
            entry["bits"] = round(float(value), 2)
    copies = [
        {"sample": i} | document.metadata["nearest"]
        for i, document in enumerate(output.documents)
        if document.metadata.get("near_copy")
    ]
    names = {*_SETTINGS, *SamplingSettings.__annotations__}
    # What was left open is in the output's, if the task has it at all.
    settings = {
        k: v for k, v in vars(arguments).items() if k in names and v is not None
    }
    settings |= output.settings
    return {
        "prompt": output.prompt,
        "seed": output.seed,
        "scores": [_number(score) for score in output.scores],
        "retrieved": retrieved,
        "near_copies": copies,
        "note": "; ".join(
            filter(None, (output.note, *getattr(arguments, "notes", ())))
        ),
        "settings": settings,
        "drafts": output.drafts and output.drafts._asdict(),
        "versions": {
            "racm3_jax": __version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        **more,
    }


def _print(arguments: Arguments, record: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps(record))
        return
    for caption in record.get("captions", []):
        print(caption)
    for parts in record.get("written", []):
        print(_line(parts))
    if "out" in record:
        print(f"wrote {record['out']}")
        if record.get("samples"):
            print(f"  each sample in {record['samples'][0]}, …")
    for entry in record["retrieved"]:
        score = "chosen" if entry["score"] is None else f"score {entry['score']:.3f}"
        if "bits" in entry:
            score += f", {round(entry['bits']):+d} bits"
        print(f"  retrieved {entry['id']} ({score})")
    if record["note"]:
        print(f"  note: {record['note']}")
    for copy in record["near_copies"]:
        print(
            f"  warning: sample {copy['sample']} is nearly a copy of {copy['id']} "
            f"({copy['equal_codes']:.0%} of the codes are equal)"
        )


def _line(parts: Sequence[dict[str, str]]) -> str:
    return " | ".join(part.get("text") or f"[{part['image']}]" for part in parts)


def _number(value: float) -> float | None:
    """None for NaN, the score of a hand-picked document, which JSON does not have."""
    return round(float(value), 4) if math.isfinite(value) else None


def show_progress(generator: Any, preview: str | None) -> Callable[[Any], None] | None:
    """Shows the speed on a terminal, and writes the partial image to a file."""
    if preview is None and not sys.stderr.isatty():
        return None

    def show(progress: Any) -> None:
        if sys.stderr.isatty():
            end = "\n" if progress.num_sampled == progress.max_new_tokens else ""
            print(
                f"\r{progress.num_sampled}/{progress.max_new_tokens} tokens, "
                f"{progress.tokens_per_second:.0f} tokens/s",
                end=end,
                file=sys.stderr,
                flush=True,
            )
        if preview is not None:
            from racm3_jax.evaluation.pictures import tile

            images = list(generator.preview(progress)[0])
            own_files.write_png(preview, tile(images))

    return show
