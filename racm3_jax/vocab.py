"""One vocabulary for text, image codes, sentinels and control tokens.

    id:   0 ........ | ........... | ........... | pad eod break eoss
          text       | image codes | sentinels   | control

Special tokens are defined only here: other modules use a `Vocab` and never write a
number. Text tokens come from the byte-level BPE, image tokens are codebook indices plus
a constant, sentinels are `<mask:i>` of the CM3 objective (arXiv 2201.07520, section 2).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np

from racm3_jax.limits import check_range

CONTROL_NAMES = ("pad", "eod", "break", "eoss")


@dataclasses.dataclass(frozen=True)
class Vocab:
    """Token ranges. All predicates map NumPy or JAX integer arrays to bool arrays.

    Attributes:
      num_text_ids: size of the text tokenizer's vocabulary.
      num_image_codes: size of the image tokenizer's codebook.
      image_length: codes per image; an image segment has exactly this many tokens.
      num_sentinels: number of `<mask:i>` tokens (512 in the paper's code).
    """

    num_text_ids: int
    num_image_codes: int
    image_length: int
    num_sentinels: int = 512

    def __post_init__(self) -> None:
        sizes = ("num_text_ids", "num_image_codes", "image_length", "num_sentinels")
        check_range(self, "vocab", *sizes, low=1)

    @property
    def text_range(self) -> range:
        return range(self.num_text_ids)

    @property
    def image_range(self) -> range:
        start = self.num_text_ids
        return range(start, start + self.num_image_codes)

    @property
    def sentinel_range(self) -> range:
        start = self.image_range.stop
        return range(start, start + self.num_sentinels)

    @property
    def control_range(self) -> range:
        start = self.sentinel_range.stop
        return range(start, start + len(CONTROL_NAMES))

    @property
    def size(self) -> int:
        return self.control_range.stop

    @property
    def pad(self) -> int:
        return self.control_range[0]

    @property
    def eod(self) -> int:
        """Opens and closes every document."""
        return self.control_range[1]

    @property
    def break_(self) -> int:
        """Separates the segments of a document."""
        return self.control_range[2]

    @property
    def eoss(self) -> int:
        """Ends a moved span ("end of span")."""
        return self.control_range[3]

    def sentinel(self, i: int) -> int:
        """The token `<mask:i>`."""
        if not 0 <= i < self.num_sentinels:
            raise ValueError(
                f"<mask:{i}> does not exist: there are {self.num_sentinels} sentinels"
            )
        return self.sentinel_range[i]

    def image_tokens(self, codes):
        """Codebook indices -> tokens."""
        return codes + self.image_range.start

    def image_codes(self, tokens):
        """Tokens of an image -> codebook indices."""
        return tokens - self.image_range.start

    def is_text(self, tokens):
        return tokens < self.text_range.stop

    def is_image(self, tokens):
        return (tokens >= self.image_range.start) & (tokens < self.image_range.stop)

    def is_sentinel(self, tokens):
        return (tokens >= self.sentinel_range.start) & (
            tokens < self.sentinel_range.stop
        )

    def is_control(self, tokens):
        return tokens >= self.control_range.start

    def name(self, token: int) -> str:
        """A readable name of one token, for tests and logs."""
        if not 0 <= token < self.size:
            raise ValueError(f"token {token} is outside the vocabulary of {self.size}")
        if token in self.text_range:
            return f"t{token}"
        if token in self.image_range:
            return f"i{token - self.image_range.start}"
        if token in self.sentinel_range:
            return f"<mask:{token - self.sentinel_range.start}>"
        return f"<{CONTROL_NAMES[token - self.control_range.start]}>"

    def to_text(self, tokens) -> str:
        """`"<eod> t3 t5 <break> i7 <eod>"`: a readable form of a row."""
        return " ".join(self.name(int(t)) for t in np.asarray(tokens))

    def fingerprint(self) -> str:
        """Equal for equal token ranges; stored with everything that contains tokens."""
        fields = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]
