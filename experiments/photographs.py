"""`racm3 fit` on photographs: crops of those that scikit-image and scikit-learn ship.

    python experiments/photographs.py --out=photographs

Writes `photos/` (captions in metadata.jsonl), runs `racm3 fit` on it, all of it in
`fit/`, and prints the time and how well the image tokenizer reconstructs crops of the
scenes that no training saw; `pairs.png` shows them. Whole scenes are held out, because
crops of one scene overlap. Run again, it resumes; the time is that of its own run.
Options after `--` go to `racm3 fit`. Tiny form: --num_photos=32 -- --tokenizer_steps=2
--clip_steps=2 --generator_steps=2 --image_size=64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_sides import add_busy_flag, check_load, write_json
from PIL import Image

from racm3_jax import own_files
from racm3_jax.documents.images import resize_image
from racm3_jax.documents.readers import read_documents
from racm3_jax.evaluation.pictures import Panel, Row, draw_sheet
from racm3_jax.tokenizers.image import (
    ImageTokenizer,
    compute_codebook_usage,
    compute_psnr,
)

SCENES = {
    "astronaut": "an astronaut in an orange suit",
    "brick": "a brick wall",
    "camera": "a man with a camera",
    "chelsea": "a ginger cat",
    "china": "a Chinese temple",
    "coffee": "a cup of coffee",
    "coins": "old coins",
    "flower": "a red dahlia",
    "grass": "grass",
    "gravel": "gravel",
    "hubble_deep_field": "galaxies in deep space",
    "ihc": "stained tissue under a microscope",
    "moon": "a crater of the moon",
    "motorcycle_left": "a motorcycle in a garage",
    "retina": "the retina of an eye",
    "rocket": "a rocket on its launch pad",
}
HELD_OUT = ("chelsea", "coffee", "china")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
_SHOWN = 12


def write_photos(folder: Path, number: int) -> None:
    """Square crops of the scenes in turn, each with a caption that says where it is."""
    pictures = {scene: Image.open(_find(scene)).convert("RGB") for scene in SCENES}
    rng = np.random.default_rng(0)
    lines = []
    folder.mkdir(parents=True)
    for i in range(number):
        scene = list(SCENES)[i % len(SCENES)]
        picture = pictures[scene]
        side = int(rng.uniform(0.45, 0.9) * min(picture.size))
        rest = np.subtract(picture.size, side)
        left, top = (int(rng.integers(size + 1)) for size in rest)
        across, down = (
            min(2, int(3 * (place + 0.5) / (size + 1)))
            for place, size in zip((left, top), rest, strict=True)
        )
        name = f"{scene}_{i:04d}.png"
        picture.crop((left, top, left + side, top + side)).save(folder / name)
        text = f"{SCENES[scene]}, {ROWS[down]} {COLUMNS[across]}"
        lines.append(json.dumps({"file_name": name, "text": text, "scene": scene}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def _find(scene: str) -> Path:
    import skimage
    import sklearn

    for folder in (
        Path(skimage.__file__).parent / "data",
        Path(sklearn.__file__).parent / "datasets" / "images",
    ):
        for file in sorted(folder.glob(f"{scene}.*")):
            return file
    raise FileNotFoundError(f"scikit-image and scikit-learn have no {scene}")


def measure_tokenizer(
    tokenizer: ImageTokenizer, photos: Path, only: bool
) -> tuple[dict[str, Any], list[Row]]:
    """Figures of the scenes that were held out (or not), and rows of a sheet."""
    found = [
        document
        for document in read_documents(f"folder:{photos}")
        if (document.metadata["scene"] in HELD_OUT) == only
    ]
    images = np.stack([resize_image(d.images[0], tokenizer.image_size) for d in found])
    codes = tokenizer.encode(images)
    decoded = tokenizer.decode(codes)
    ratios = compute_psnr(images, decoded)
    scenes = np.array([document.metadata["scene"] for document in found])
    figures = {
        "photos": len(found),
        "psnr": float(ratios.mean()),
        "codes_used": compute_codebook_usage(codes, tokenizer.num_codes)[0],
        "psnr_by_scene": {s: float(ratios[scenes == s].mean()) for s in set(scenes)},
    }
    rows = [
        Row(document.text, [[Panel(image)], [Panel(other)]])
        for document, image, other in zip(found, images, decoded, strict=True)
    ]
    return figures, rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num_photos", type=int, default=200)
    add_busy_flag(parser)
    parser.add_argument("fit", nargs="*", help="options of `racm3 fit`, after --")
    arguments = parser.parse_args()
    out = arguments.out
    load = check_load(parser, arguments.busy)
    if not (out / "photos").exists():
        write_photos(out / "photos", arguments.num_photos)
    started = time.monotonic()
    command = [sys.executable, "-m", "racm3_jax", "fit", f"--workdir={out / 'fit'}"]
    command += [f"--source=folder:{out / 'photos'}", "--group_key=scene"]
    command += [f"--holdout={','.join(HELD_OUT)}", *arguments.fit]
    if status := subprocess.run(command, check=False).returncode:
        raise SystemExit(status)  # it has said why
    minutes = (time.monotonic() - started) / 60
    tokenizer = ImageTokenizer.load(out / "fit" / "tokenizer" / "vqgan")
    figures, rows = measure_tokenizer(tokenizer, out / "photos", True)
    seen, _ = measure_tokenizer(tokenizer, out / "photos", False)
    results = {"minutes": minutes, "load_at_start": load, "held_out": figures}
    results["seen"] = seen
    sheet = draw_sheet(("", "photograph", "through the tokenizer"), rows[:_SHOWN])
    own_files.write_png(out / "pairs.png", sheet)
    write_json(out / "results.json", results)
    print(
        f"{minutes:.1f} minutes; held-out scenes {figures['psnr']:.1f} dB, "
        f"{figures['codes_used']:.0%} of the codes; seen ones {seen['psnr']:.1f} dB"
    )


if __name__ == "__main__":
    main()
