"""Quality of an image tokenizer on held-out images: PSNR, things, vendors, codes.

    python experiments/emojiworld/reconstruct.py --data=out/emojiworld \\
        --tokenizer=out/emoji_tokenizer/vqgan --out=out/reconstructed.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]

import numpy as np

from emojiworld.drawings import Drawings, read_drawings
from emojiworld.scorers import Verdicts
from racm3_jax import own_files
from racm3_jax.documents.images import resize_image
from racm3_jax.evaluation.pictures import Panel, Row, draw_sheet
from racm3_jax.tokenizers.image import (
    ImageTokenizer,
    compute_codebook_usage,
    compute_psnr,
)

_SHEET_ROWS = 16


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line; prints the figures and writes the sheet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of fetch.py")
    parser.add_argument("--tokenizer", type=Path, required=True, help="its folder")
    parser.add_argument("--out", type=Path, required=True, help="a PNG: both, in pairs")
    options = parser.parse_args(arguments)
    try:
        own_files.check(options.out, change="give another --out")
        drawings = read_drawings(options.data)
        tokenizer = ImageTokenizer.load(options.tokenizer)
    except (ValueError, OSError) as error:
        print(f"reconstruct.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    figures, decoded = measure_tokenizer(tokenizer, drawings)
    print(", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
    own_files.write_png(options.out, draw_pairs(drawings, decoded))


def measure_tokenizer(
    tokenizer: ImageTokenizer, drawings: Drawings
) -> tuple[dict[str, float], np.ndarray]:
    """Figures of the held-out images, and their reconstructions."""
    held_out = drawings.split == "held_out"
    size = tokenizer.image_size
    images = np.stack([resize_image(x, size) for x in drawings.images[held_out]])
    codes = tokenizer.encode(images)
    decoded = tokenizer.decode(codes)
    found = Verdicts.learn(drawings, tokenizer).judge(
        list(decoded),
        drawings.icon_set[held_out].tolist(),
        drawings.thing[held_out].tolist(),
    )
    figures = {
        "psnr": float(compute_psnr(images, decoded).mean()),
        "codes_used": compute_codebook_usage(codes, tokenizer.num_codes)[0],
        **{name: float(np.nanmean(values)) for name, values in found.items()},
    }
    return figures, decoded


def draw_pairs(drawings: Drawings, decoded: np.ndarray) -> np.ndarray:
    """Images of all icon sets, each next to its reconstruction."""
    held_out = np.flatnonzero(drawings.split == "held_out")
    step = max(1, len(held_out) // (4 * _SHEET_ROWS))
    chosen = list(range(0, len(held_out), step))[: 4 * _SHEET_ROWS]
    rows = []
    for start in range(0, len(chosen), 4):
        own = chosen[start : start + 4]
        pairs = [(drawings.images[held_out[i]], decoded[i]) for i in own]
        names = ", ".join(drawings.thing[held_out[i]] for i in own)
        panels = tuple(Panel(image) for pair in pairs for image in pair)
        rows.append(Row(names, (panels,)))
    return draw_sheet(("things", "drawing, and through the tokenizer"), rows)


if __name__ == "__main__":
    main()
