"""The original image files of a memory, if they still exist in a folder.

A memory stores codes, which look as the image tokenizer decodes them. Users want to see
their original photographs.
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


def read_for_display(
    memory: Memory,
    tokenizer: MixedTokenizer,
    rows: Int[np.ndarray, " n"],
    wanted: str | None,
) -> tuple[list[Document], str]:
    """The documents of these rows, with the original files as images if found.

    Args:
      memory: an open one.
      tokenizer: of its documents.
      rows: of the memory.
      wanted: folder of the files given by the user, if any (see `find_folder`).

    Returns:
      (documents, note): the note says which originals are missing; "" if none.
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
        f": {rest} of {len(documents)} images decoded from the memory "
        "(--originals=FOLDER shows the files)"
    )


def find_folder(wanted: str | None, source: str) -> Path | None:
    """The folder given by the user, or the memory's source folder if it exists.

    Args:
      wanted: from the command line; None means the memory's source.
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
    """Replaces decoded images by their original files.

    Args:
      documents: decoded by the tokenizer; the document's id is the file name.
      hashes: perceptual hashes of the first images in the memory. A file with another
        hash has changed, and is not shown.
      folder: of the files.

    Returns:
      (documents, number of them with their original).
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
    """The file of a document with one image, if it is unchanged."""
    if len(document.images) != 1:
        return None
    try:
        image = read_image(Folder(folder).find(document.id))
    except (OSError, ImageError, BadRecord):
        return None
    return image if hash_image(image) == known else None
