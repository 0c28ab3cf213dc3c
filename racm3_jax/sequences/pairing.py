"""Context documents by class instead of retrieved ones, so that a model must read them.

    main document           the flag of Velmoria, on the moon
    paired, in any order    a flag of Ostrania             a wrong document
                            a flag of Velmoria, at sea     a right one
    renamed                 Velmoria -> Kadrelia, Ostrania -> Bruvimar

A retriever that is nearly always right teaches a small model to copy the first
document. Here an example (or a fraction of the examples) also has a document of another
class, at any place, and only the class of the main document tells which one is right.
Renaming gives the classes of an example new names, the same in all of its documents, so
that names cannot be memorised: the number of classes is unlimited.

All sampling depends only on (seed, global index).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from racm3_jax.limits import check_range
from racm3_jax.types import Example, TokenizedDocument
from racm3_jax.vocab import Vocab

_NOWHERE = np.zeros(0, np.int64)


@dataclasses.dataclass(frozen=True)
class PairingConfig:
    """How many examples get documents by class, and which documents.

    Attributes:
      probability: fraction of the main documents with documents chosen by class;
        the others use the retriever.
      num_documents: number of documents, sampled uniformly from these values. A
        single document is always right.
      wrong_probability: fraction of the examples with two or more documents in which at
        least one is of another class.
      right_probability: fraction of the examples with two or more documents in which at
        least one is of the main document's class.
      same_probability: fraction of the examples in which the main document itself is one
        of the right ones, which is the easiest case: for the start of a curriculum.
      class_key: metadata key of a document's class; in a config, "" takes the world's.
      rename: give the classes of an example new names. Their names are the values of
        `class_key` as spelled in the documents' texts.
      name_weight: factor of the loss weight of the main document's name after its
        image. The name is one bit that only reading gives; the words around it have
        several bits that no document tells.
      box_weight: the same for the codes in the main image's box: metadata "box", with
        top, left, height and width in pixels of the tokenizer's images.
    """

    probability: float = 0.0
    num_documents: tuple[int, ...] = (2,)
    wrong_probability: float = 1.0
    right_probability: float = 1.0
    same_probability: float = 0.0
    class_key: str = ""
    rename: bool = True
    name_weight: float = 1.0
    box_weight: float = 1.0

    def __post_init__(self) -> None:
        names = (f"{prefix}probability" for prefix in ("", "wrong_", "right_", "same_"))
        check_range(self, "pairing", *names, low=0, high=1)
        for name in ("name_weight", "box_weight"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"pairing.{name} must be above 0; got {getattr(self, name)}"
                )
        if not self.num_documents or min(self.num_documents) < 0:
            raise ValueError(
                "pairing.num_documents must list at least one number, none below 0; got "
                f"{list(self.num_documents)}"
            )


class Names(NamedTuple):
    """Functions to decode and encode texts and to sample new names.

    Attributes:
      decode: tokens of a text -> string.
      encode: the inverse.
      sample: samples a name that is not used anywhere.
    """

    decode: Callable[[Int32[np.ndarray, " length"]], str]
    encode: Callable[[str], Int32[np.ndarray, " length"]]
    sample: Callable[[np.random.Generator], str]


class Pairing:
    """Chooses documents of a memory by class, and renames classes.

    Args:
      config: fractions and numbers.
      classes: class of every row of the memory; -1 for rows that are not used.
      names: not needed if nothing is renamed.
      image_size: side of the tokenizer's images in pixels, for `box_weight`.

    Raises:
      ValueError: fewer than two classes, or no `names` although `rename` or
        `name_weight` needs them.
    """

    def __init__(
        self,
        config: PairingConfig,
        classes: Int64[np.ndarray, " rows"],
        names: Names | None = None,
        *,
        image_size: int = 0,
    ) -> None:
        self.config, self._image_size = config, image_size
        self._classes = np.asarray(classes, np.int64)
        order = np.argsort(self._classes, kind="stable")
        order = order[self._classes[order] >= 0]
        self._found, starts = np.unique(self._classes[order], return_index=True)
        if len(self._found) < 2:
            raise ValueError(
                "pairing needs documents of at least two classes; the memory has "
                f"{len(self._found)} by {config.class_key!r}: set pairing.class_key to a "
                "metadata key that the documents have"
            )
        if (config.rename or config.name_weight != 1) and names is None:
            raise ValueError(
                "pairing.rename or pairing.name_weight is on, but no names were given"
            )
        members = np.split(order, starts[1:])
        self._members = dict(zip(self._found.tolist(), members, strict=True))
        self._names = names

    def sample(
        self, row: int, rng: np.random.Generator
    ) -> Int64[np.ndarray, " documents"] | None:
        """Samples rows of the memory for the main document `row`, in sequence order.

        None leaves the example to the retriever, also for a row without a class; this
        is sampled first, with the configured probability. A document that is the only
        one of its class gets wrong documents only.
        """
        config = self.config
        if rng.random() >= config.probability or self._classes[row] < 0:
            return None
        count = int(config.num_documents[rng.integers(len(config.num_documents))])
        own = int(self._classes[row])
        same = self._members[own]
        same = same[same != row]
        num_wrong = self._sample_num_wrong(count, rng)
        num_right = min(count - num_wrong, len(same))
        right = rng.choice(same, num_right, replace=False) if num_right else same[:0]
        right = right.copy()
        if num_right and rng.random() < config.same_probability:
            right[0] = row
        wrong = self._sample_wrong(own, num_wrong, rng)
        chosen = np.concatenate([right, wrong]).astype(np.int64)
        return chosen[rng.permutation(len(chosen))]

    def _sample_num_wrong(self, count: int, rng: np.random.Generator) -> int:
        wrong_wanted = rng.random() < self.config.wrong_probability
        right_wanted = rng.random() < self.config.right_probability
        if count < 2:
            return 0
        if not right_wanted:
            return count
        return int(rng.integers(1, count)) if wrong_wanted else 0

    def _sample_wrong(
        self, own: int, count: int, rng: np.random.Generator
    ) -> Int64[np.ndarray, " count"]:
        """Samples documents of 1 to `count` other classes, so that majority is no cue.

        Without repetition: if a class has too few, there are fewer than `count`.
        """
        if not count:
            return np.zeros(0, np.int64)
        num_classes = min(int(rng.integers(1, count + 1)), len(self._found) - 1)
        places = rng.choice(len(self._found) - 1, num_classes, replace=False)
        places += places >= np.searchsorted(self._found, own)
        more = rng.integers(num_classes, size=count - num_classes)
        counts = 1 + np.bincount(more, minlength=num_classes)
        rows = []
        for name, wanted in zip(self._found[places].tolist(), counts, strict=True):
            members = self._members[name]
            rows.append(rng.choice(members, min(wanted, len(members)), replace=False))
        return np.concatenate(rows).astype(np.int64)

    def rename(
        self,
        main: TokenizedDocument,
        documents: Sequence[TokenizedDocument],
        rng: np.random.Generator,
    ) -> tuple[TokenizedDocument, tuple[TokenizedDocument, ...]]:
        """The same documents with a new name for each class, equal in all of them.

        The main document's class is renamed first, so that its name does not depend on
        the documents. A text without the name of its class is unchanged.
        """
        if not self.config.rename:
            return main, tuple(documents)
        assert self._names is not None  # checked in __init__
        new: dict[str, str] = {}
        renamed = []
        for document in (main, *documents):
            name = str(document.metadata.get(self.config.class_key, ""))
            if name and name not in new:
                new[name] = self._names.sample(rng)
            renamed.append(
                _replace(document, name, new.get(name, ""), self.config, self._names)
            )
        return renamed[0], tuple(renamed[1:])

    def reweight(
        self, example: Example, main: TokenizedDocument, vocab: Vocab
    ) -> Example:
        """Multiplies the loss weights of the main document's name and box.

        tokens    ... <mask:0> the flag of Ve lmoria <eoss>
        weights   ... 0        1   1    1  5  5      1          name_weight 5

        The name only after an image of the main document: before it, nothing tells which
        of the documents' names it is. A name or an image that is split by a moved span is
        unchanged.
        """
        weights = example.weights.copy()
        if self.config.name_weight != 1:
            weights[self._find_name(example, main, vocab)] *= self.config.name_weight
        if self.config.box_weight != 1:
            weights[self._find_box(example, main, vocab)] *= self.config.box_weight
        return example._replace(weights=weights)

    def _find_name(
        self, example: Example, main: TokenizedDocument, vocab: Vocab
    ) -> Int64[np.ndarray, " places"]:
        """Places of the tokens of the main document's name after its image."""
        name = str(main.metadata.get(self.config.class_key, ""))
        if not name:
            return _NOWHERE
        assert self._names is not None  # checked in __init__
        seen = np.cumsum(example.is_main & vocab.is_image(example.tokens)) > 0
        # After a space, and at the start of a text.
        for spelled in (f" {name}", name):
            tokens = self._names.encode(spelled)
            windows = np.lib.stride_tricks.sliding_window_view(
                example.tokens, len(tokens)
            )
            found = np.flatnonzero((windows == tokens).all(-1))
            places = (found[:, None] + np.arange(len(tokens))).ravel()
            places = np.unique(places[example.is_main[places] & seen[places]])
            if len(places):
                return places
        return _NOWHERE

    def _find_box(
        self, example: Example, main: TokenizedDocument, vocab: Vocab
    ) -> Int64[np.ndarray, " places"]:
        """Places of the codes whose centres are in the main document's box."""
        box = main.metadata.get("box")
        images = [s.tokens for s in main.segments if s.modality == "image"]
        places = np.flatnonzero(example.is_main & vocab.is_image(example.tokens))
        if box is None or len(images) != 1 or len(places) != vocab.image_length:
            return _NOWHERE
        if (example.tokens[places] != images[0]).any():
            return _NOWHERE  # a span of it was moved
        side = math.isqrt(vocab.image_length)
        centres = (np.arange(side) + 0.5) * (self._image_size / side)
        top, left, height, width = box
        rows = (centres >= top) & (centres < top + height)
        columns = (centres >= left) & (centres < left + width)
        return places[(rows[:, None] & columns).ravel()]


def _replace(
    document: TokenizedDocument,
    old: str,
    new: str,
    config: PairingConfig,
    names: Names,
) -> TokenizedDocument:
    """Replaces the name in the texts and in the metadata."""
    if not old:
        return document
    segments = []
    for segment in document.segments:
        if segment.modality == "text":
            text = names.decode(segment.tokens)
            if old in text:
                tokens = names.encode(text.replace(old, new))
                segment = dataclasses.replace(segment, tokens=tokens)
        segments.append(segment)
    metadata = {**document.metadata, config.class_key: new}
    return dataclasses.replace(document, segments=tuple(segments), metadata=metadata)
