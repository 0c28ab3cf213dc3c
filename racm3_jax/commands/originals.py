"""The images that a memory was made from, where their files are still in a folder.

A memory keeps what the model reads: codes, which look as the image tokenizer decodes them.
People who look at a memory of their own photographs want to see the photographs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt64

from racm3_jax.commands.configs import UsageError
from racm3_jax.documents.images import ImageError, read_image
from racm3_jax.documents.readers import parse_source
from racm3_jax.documents.readers.files import Folder
from racm3_jax.documents.readers.records import BadRecord
from racm3_jax.memory.filters import hash_image
from racm3_jax.memory.format import read_manifest
from racm3_jax.memory.memory import Memory
from racm3_jax.tokenizers.mixed import MixedTokenizer
from racm3_jax.types import Document, Segment


def read_for_picture(
    memory: Memory,
    tokenizer: MixedTokenizer,
    rows: Int[np.ndarray, " n"],
    wanted: str | None,
) -> tuple[list[Document], str]:
    """The documents of these rows, with their files as images where they are found.

    Args:
      memory: an open one.
      tokenizer: of its documents.
      rows: which.
      wanted: folder of the files that the user names, if any (see `find_folder`).

    Returns:
      (documents, note): the note says what could not be shown so; "" where all could.
    """
    source = read_manifest(memory.path).get("source") or ""
    folder = find_folder(wanted, source)
    decoded = [tokenizer.decode(d) for d in memory.documents(rows)]
    hashes = memory.image_hashes
    documents, found = show_originals(
        decoded, None if hashes is None else hashes[rows], folder
    )
    rest = len(documents) - found
    if not rest:
        return documents, ""
    return documents, (
        f": {rest} of {len(documents)} images as the memory keeps them "
        "(--originals=FOLDER shows the files)"
    )


def find_folder(wanted: str | None, source: str) -> Path | None:
    """The folder that the user names, or that a memory was built from, if it is there.

    Args:
      wanted: of the command line; None leaves the choice to the memory.
      source: of the memory's manifest; "" if unknown.

    Raises:
      UsageError: the named folder does not exist.
    """
    if wanted is not None:
        folder = Path(wanted)
        if not folder.is_dir():
            raise UsageError(f"--originals={wanted}: there is no such folder")
        return folder
    kind, path, _ = parse_source(source) if source else ("", "", {})
    return Path(path) if kind == "folder" and Path(path).is_dir() else None


def show_originals(
    documents: Sequence[Document],
    hashes: UInt64[np.ndarray, " documents"] | None,
    folder: Path | None,
) -> tuple[list[Document], int]:
    """Replaces decoded images by the files that they were made from.

    Args:
      documents: as the tokenizer gives them back; a file is named by the document's id.
      hashes: perceptual ones that the memory has kept of the first images. A file whose
        own is another one has changed, and is not shown.
      folder: where the files are.

    Returns:
      (documents, how many of them show their file).
    """
    if folder is None or hashes is None:
        return list(documents), 0
    shown = []
    for document, known in zip(documents, hashes.tolist(), strict=True):
        image = _read(folder, document, known)
        if image is not None:
            text = (Segment(text=document.text),) if document.text else ()
            segments = (*text, Segment(image=image))
            document = Document(
                document.id, segments, document.source, document.metadata
            )
        shown.append(document)
    changed = zip(shown, documents, strict=True)
    return shown, sum(new is not old for new, old in changed)


def _read(folder: Path, document: Document, known: int) -> np.ndarray | None:
    """The file of a document of one image, if it is still what it was."""
    if len(document.images) != 1:
        return None
    try:
        image = read_image(Folder(folder).find(document.id))
    except (OSError, ImageError, BadRecord):
        return None
    return image if hash_image(image) == known else None
