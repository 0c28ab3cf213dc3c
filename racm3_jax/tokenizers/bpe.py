"""The text tokenizer: byte-level BPE on the `tokenizers` library.

The vocabulary has no control strings. `tokenizers` would emit control tokens for plain
text, and the flag that prevents it is lost on save and load; here there are none to
emit, whatever a caption contains.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from racm3_jax import checkpoints, storage
from racm3_jax.tokenizers.clean_text import clean_text

NUM_BYTES = 256
_MAX_FILE_BYTES = 50_000_000
_SPACES = re.compile(r"(?<=\S)\s")


class TextTokenizer:
    """Byte-level BPE: lossless for every string.

    A BPE with end-of-word marks is CLIP's: it was trained on cleaned texts in lower
    case, so it encodes texts in that form and decoding gives the cleaned words.

    Attributes:
      vocab_size: number of ids; all of them are text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wraps a `tokenizers.Tokenizer`; use `train` or `load`.

        Raises:
          ValueError: it has added tokens, or lacks one of the 256 bytes.
        """
        added = sorted(t.content for t in tokenizer.get_added_tokens_decoder().values())
        if added:
            raise ValueError(
                f"a text tokenizer must have no added (special) tokens; got {added[:5]}: "
                "control tokens belong to Vocab, remove them from tokenizer.json"
            )
        missing = set(ByteLevel.alphabet()) - set(tokenizer.get_vocab())
        if missing:
            raise ValueError(
                f"the text tokenizer lacks {len(missing)} of the {NUM_BYTES} bytes; a "
                "byte-level BPE with the full alphabet is needed"
            )
        vocab = tokenizer.get_vocab()
        ids = vocab.values()
        if sorted(ids) != list(range(len(ids))):
            raise ValueError(
                f"the ids of the text tokenizer's {len(ids)} tokens are not exactly "
                f"0..{len(ids) - 1} (the highest is {max(ids)}): other ids would "
                "be taken for images"
            )
        self._tokenizer = tokenizer
        self._cleans = bool(getattr(tokenizer.model, "end_of_word_suffix", None))
        self._longest = max(map(len, vocab))
        self.vocab_size: int = tokenizer.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        """Trains the merges.

        Args:
          texts: the corpus; read once.
          vocab_size: maximum size, including 256 bytes; a small corpus gives fewer.

        Returns:
          A tokenizer that depends only on the texts and the size.
        """
        if vocab_size < NUM_BYTES:
            raise ValueError(
                f"vocab_size must be >= {NUM_BYTES}, one id per byte; got {vocab_size}"
            )
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.decoder = ByteLevelDecoder()
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TextTokenizer:
        """Reads a `tokenizer.json`.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is not a byte-level BPE without control tokens, or differs from
            the manifest beside it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; give a tokenizer.json written by "
                "TextTokenizer.save"
            )
        checkpoints.verify_file(path)
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes; a tokenizer.json of at most "
                f"{_MAX_FILE_BYTES:,} is read"
            )
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        # The library raises plain Exception for a file that it cannot read.
        except Exception as error:
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        return cls(tokenizer)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`; creates the directory if needed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_file(path, self._tokenizer.to_str(pretty=True).encode())

    def encode(self, text: str) -> Int32[np.ndarray, " length"]:
        """Encodes a string; unpaired surrogates become `?`."""
        return self.encode_batch([text])[0]

    def encode_batch(
        self, texts: Sequence[str], max_length: int | None = None
    ) -> list[Int32[np.ndarray, " length"]]:
        """Encodes each string, on all cores.

        Args:
          texts: any strings.
          max_length: return only this many ids per text; long texts then cost as much
            as short ones.
        """
        if max_length is None:
            return self._encode(
                [clean_text(t) for t in texts] if self._cleans else texts
            )
        window = 2 * max_length * self._longest
        heads = [self._cut(text, window) for text in texts]
        rows = self._encode(heads)
        for i, text in enumerate(texts):
            wider = window
            while len(rows[i]) < max_length and len(text) > wider:
                wider *= 8  # white space and escapes have few ids
                rows[i] = self._encode([self._cut(text, wider)])[0]
        return [row[:max_length] for row in rows]

    def _cut(self, text: str, length: int) -> str:
        """A prefix of a text as it is encoded, cut between words if possible.

        Cutting a word changes only its last ids, and no id covers more than
        `_longest` characters: half of `length` is margin.
        """
        end = len(text)
        if end > length:
            spaces = [m.start() for m in _SPACES.finditer(text, length // 2, length)]
            end = spaces[-1] if spaces else length
        if not self._cleans:
            return text[:end]
        line_end = text.find("\n", end)
        return clean_text(text[:end], text[end : line_end if line_end >= 0 else None])

    def _encode(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " length"]]:
        valid = [t.encode("utf-8", "replace").decode("utf-8") for t in texts]
        encodings = self._tokenizer.encode_batch_fast(valid, add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in encodings]

    def decode(self, ids: Int[np.ndarray, " length"] | Sequence[int]) -> str:
        """Decodes ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: an id is outside this vocabulary.
        """
        array = np.asarray(ids, np.int64)
        if array.size and not (0 <= array.min() and array.max() < self.vocab_size):
            raise ValueError(
                f"text ids lie in 0..{self.vocab_size - 1}; got {array.min()}.."
                f"{array.max()}"
            )
        text = self._tokenizer.decode(array.tolist(), skip_special_tokens=False)
        if self._cleans:
            suffix = self._tokenizer.model.end_of_word_suffix
            return text.replace(suffix, " ").strip()
        return text

    def fingerprint(self) -> str:
        """Equal for tokenizers with equal ids, independent of the file's layout."""
        fields = json.loads(self._tokenizer.to_str())
        content = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]
