"""Filters of a memory build: opt-out, evaluation documents, scores, duplicates.

Limitations. NSFW and watermark scores are read from the metadata if the source has them
(LAION's columns); otherwise the embedder compares the image with a few sentences, which
does not work well with a small or domain-specific CLIP: check `racm3 memory stats`
before trusting it. "Exact" means equal text and pixels; "near" means an equal
perceptual hash *and* image embeddings more similar than `NEAR_SIMILARITY`: crops and
mirrored copies are not found.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt64
from PIL import Image

from racm3_jax.documents.readers.fields import ID_FIELDS
from racm3_jax.memory.format import hash_name
from racm3_jax.types import Document

NEAR_SIMILARITY = 0.95
# The hash of a flatter image is noise.
_MIN_CONTRAST = 8
_NSFW_FIELDS = ("punsafe", "nsfw_score", "NSFW", "nsfw")
_WATERMARK_FIELDS = ("pwatermark", "watermark_score", "watermark")
# Metadata keys of a record's URL, and of its original id if the document's was
# extended.
_GIVEN_NAMES = ("url", "URL", *ID_FIELDS)
_PROMPTS = {
    "nsfw": ("a photo with nudity or violence", "an ordinary photo"),
    "watermark": ("a photo with a watermark text over it", "a clean photo"),
}
# CLIP's own temperature.
_LOGIT_SCALE = 100.0
# Values of LAION's NSFW column.
_WORDS = {"UNLIKELY": 0.0, "UNSURE": 0.5, "NSFW": 1.0}


def hash_content(document: Document) -> int:
    """Equal for documents with equal text and pixels."""
    digest = hashlib.blake2b(digest_size=8)
    for segment in document.segments:
        if segment.image is None:
            digest.update(b"t" + (segment.text or "").encode())
        else:
            digest.update(f"i{segment.image.shape}".encode())
            digest.update(segment.image.tobytes())
    return int.from_bytes(digest.digest(), "little") or 1


def hash_rows(content: int, rows: Sequence[Float[np.ndarray, " d_embed"]]) -> int:
    """Equal for equal content with equal embeddings."""
    digest = hashlib.blake2b(content.to_bytes(8, "little"), digest_size=8)
    for row in rows:
        digest.update(np.asarray(row, "<f4").tobytes())
    return int.from_bytes(digest.digest(), "little") or 1


def hash_pixels(image: UInt8[np.ndarray, "height width 3"]) -> int:
    """Equal for equal images."""
    digest = hashlib.blake2b(f"{image.shape}".encode(), digest_size=8)
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest(), "little")


def hash_image(image: UInt8[np.ndarray, "height width 3"]) -> int:
    """A perceptual hash (dHash): whether each of 8 x 8 cells is darker than the next.

    Robust to most rescaling, rarely to recompression of flat areas. 0 for flat images,
    which have no hash.
    """
    grey = Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(grey).astype(int)
    if np.ptp(cells) < _MIN_CONTRAST:
        return 0
    bits = np.packbits((cells[:, :-1] < cells[:, 1:]).ravel())
    return int.from_bytes(bits.tobytes(), "little") or 1


class OptOut:
    """Documents whose owners have opted out, by id or by URL.

    A line of the file is an id or a pattern with `*` and `?` (`https://example.org/*`).
    It is matched against a document's id, its original id in the source, and its source
    and URL; `#` starts a comment.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        entries = [e for line in lines if (e := line.split(" #")[0].strip())]
        entries = [e for e in entries if not e.startswith("#")]
        self._exact = {e for e in entries if not set(e) & set("*?[")}
        self._patterns = [e for e in entries if e not in self._exact]

    @classmethod
    def read(cls, path: str | pathlib.Path) -> OptOut:
        """Reads a file.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is not a text file.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no opt-out file {path}")
        try:
            return cls(path.read_text(encoding="utf-8-sig").splitlines())
        except UnicodeDecodeError as error:
            raise ValueError(f"the opt-out file {path} is not UTF-8 text") from error

    def matches(self, id: str, source: str, metadata: Mapping[str, Any]) -> bool:
        """Whether a document is opted out."""
        given = (str(metadata.get(name, "")) for name in _GIVEN_NAMES)
        names = {id, source, *given}
        return bool(names & self._exact) or any(
            fnmatch.fnmatchcase(name, pattern)
            for name in names - {""}
            for pattern in self._patterns
        )


@dataclasses.dataclass
class HeldOut:
    """Evaluation documents, which must not be in a memory.

    Identified by source (a URL), content, pixels of any image, or a near-duplicate
    image with the same text. Not by id: two folders may both have a `0001.jpg`.
    """

    sources: set[int] = dataclasses.field(default_factory=set)
    contents: set[int] = dataclasses.field(default_factory=set)
    pixels: set[int] = dataclasses.field(default_factory=set)
    pairs: set[tuple[str, int]] = dataclasses.field(default_factory=set)

    def add(self, document: Document) -> None:
        """Adds an evaluation document."""
        self.sources |= {hash_name(document.source)} - {0}
        self.contents.add(hash_content(document))
        self.pixels |= {hash_pixels(image) for image in document.images}
        self.pairs |= self._pairs(document)

    def matches(self, document: Document) -> bool:
        """Whether this is an evaluation document."""
        return (
            hash_name(document.source) in self.sources
            or hash_content(document) in self.contents
            or any(hash_pixels(image) in self.pixels for image in document.images)
            or bool(self._pairs(document) & self.pairs)
        )

    def _pairs(self, document: Document) -> set[tuple[str, int]]:
        text = " ".join(document.text.lower().split())
        hashes = {hash_image(image) for image in document.images} - {0}
        return {(text, number) for number in hashes}


@dataclasses.dataclass(frozen=True)
class ScoreLimits:
    """Maximum scores; None turns a filter off.

    Attributes:
      nsfw: probability that the image is unsafe.
      watermark: probability that the image has a watermark.
    """

    nsfw: float | None = None
    watermark: float | None = None

    def rejected(
        self,
        documents: Sequence[Document],
        image_embeddings: Float[np.ndarray, "n d_embed"],
        embed_texts: Callable[[list[str]], np.ndarray] | None,
    ) -> list[str | None]:
        """For each document, the name of the score that is too high, or None.

        Args:
          documents: with metadata.
          image_embeddings: unit rows, zero without an image.
          embed_texts: of the same encoder; None keeps documents without scores.
        """
        found: list[str | None] = [None] * len(documents)
        for name, limit, fields in (
            ("nsfw", self.nsfw, _NSFW_FIELDS),
            ("watermark", self.watermark, _WATERMARK_FIELDS),
        ):
            if limit is None:
                continue
            scores = [_read_score(d.metadata, fields) for d in documents]
            if any(s is None for s in scores) and embed_texts is not None:
                logits = image_embeddings @ embed_texts(list(_PROMPTS[name])).T
                shares = 1 / (1 + np.exp(-_LOGIT_SCALE * (logits[:, 0] - logits[:, 1])))
                has_image = np.abs(image_embeddings).sum(axis=1) > 0
                scores = [
                    float(share) if score is None and there else score
                    for score, share, there in zip(
                        scores, shares, has_image, strict=True
                    )
                ]
            for i, score in enumerate(scores):
                if score is not None and score > limit and found[i] is None:
                    found[i] = name
        return found


def _read_score(metadata: Mapping[str, Any], fields: Sequence[str]) -> float | None:
    for field in fields:
        value = metadata.get(field)
        if isinstance(value, str):
            value = _WORDS.get(value.upper())
        if isinstance(value, bool | int | float):
            return float(value)
    return None


def find_first(hashes: UInt64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """True at the first of equal hashes; 0 never matches.

    7 3 7 0 0 3  ->  T T F T T F
    """
    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    return first | (hashes == 0)


def find_first_near_duplicates(
    image_hashes: UInt64[np.ndarray, " n"],
    gather: Callable[[np.ndarray], Float[np.ndarray, "k d_embed"]],
) -> Bool[np.ndarray, " n"]:
    """False if an earlier document has a near-duplicate image.

    Args:
      image_hashes: perceptual; 0 never matches.
      gather: returns the image embeddings of some rows.
    """
    kept = np.ones(len(image_hashes), bool)
    for group in _groups(image_hashes):
        rows = gather(group)
        for place in range(1, len(group)):
            earlier = kept[group[:place]]
            similar = rows[:place][earlier] @ rows[place] >= NEAR_SIMILARITY
            kept[group[place]] = not similar.any()
    return kept


def find_near_duplicates(
    image_hashes: UInt64[np.ndarray, " n"],
    gather: Callable[[np.ndarray], Float[np.ndarray, "k d_embed"]],
) -> Bool[np.ndarray, " n"]:
    """True if another document, earlier or later, has a near-duplicate image.

    Args:
      image_hashes: perceptual; 0 never matches.
      gather: returns the image embeddings of some rows.
    """
    alike = np.zeros(len(image_hashes), bool)
    for group in _groups(image_hashes):
        rows = gather(group)
        for place, number in enumerate(group):
            similar = rows @ rows[place] >= NEAR_SIMILARITY
            similar[place] = False
            alike[number] = similar.any()
    return alike


def _groups(hashes: UInt64[np.ndarray, " n"]) -> Iterator[Int[np.ndarray, " group"]]:
    """Groups of two or more rows with equal hashes, ascending; 0 never matches.

    7 3 7 0 0 3  ->  [1 5] [0 2]
    """
    order = np.argsort(hashes, kind="stable")
    edges = np.flatnonzero(np.diff(hashes[order])) + 1
    for group in np.split(order, edges):
        if len(group) > 1 and hashes[group[0]]:
            yield group
