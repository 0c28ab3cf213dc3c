"""support: the labelled examples of `racm3 classify`, as a file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from racm3_jax import own_files
from racm3_jax.commands import arguments as options
from racm3_jax.commands.configs import UsageError

KEY = "examples"


def register(commands: Any) -> None:
    """Adds `support` to the parser's subcommands."""
    text = "Write the labelled examples that classify reads."
    sub = commands.add_parser("support", help=text, description=text)
    sub.set_defaults(command=_write)
    sub.add_argument(
        "--example",
        nargs=2,
        action="append",
        default=[],
        metavar=("IMAGE", "LABEL"),
        help="an image file and its label; may be given more than once",
    )
    sub.add_argument(
        "--folder",
        type=options.path,
        help="a folder with one folder of images for each label, named after it",
    )
    sub.add_argument(
        "--out", type=options.path, default="support.json", help="file to write"
    )


def _write(arguments: argparse.Namespace) -> None:
    from racm3_jax.documents.images import read_image

    pairs = [(options.path(image), label) for image, label in arguments.example]
    if arguments.folder is not None:
        pairs += _find_examples(Path(arguments.folder))
    if not pairs:
        raise UsageError("give --example IMAGE LABEL, once for each, or --folder")
    out = Path(arguments.out)
    if out.suffix.lower() != ".json":
        raise UsageError(f"--out={out} does not end in .json, the format of this file")
    images = [image for image, _ in pairs]
    own_files.check(out, inputs=images, change="give another --out", key=KEY)
    for image, label in pairs:
        read_image(image)  # refuses files that are not images
        if not label.strip():
            raise UsageError(
                f"the label of {image} is empty: give --example IMAGE LABEL"
            )
    folder = out.absolute().parent
    entries = [
        {"image": os.path.relpath(image, folder), "label": label}
        for image, label in pairs
    ]
    own_files.write_json(out, {KEY: entries})
    labels = list(dict.fromkeys(label for _, label in pairs))
    print(f"wrote {out}: {len(entries)} examples of {', '.join(labels)}")


def _find_examples(folder: Path) -> list[tuple[str, str]]:
    """(image, label) of `folder/label/image`, in the order of their names."""
    from racm3_jax.documents.readers.files import IMAGE_SUFFIXES, Folder

    names, _ = Folder(folder).walk()
    found = [
        (str(folder / name), Path(name).parts[0])
        for name in names
        if len(Path(name).parts) > 1 and Path(name).suffix.lower() in IMAGE_SUFFIXES
    ]
    if not found:
        raise UsageError(
            f"--folder={folder} has no images in subfolders: put each "
            "label's images into a folder with the label's name"
        )
    return found
