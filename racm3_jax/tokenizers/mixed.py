"""Documents to tokens and back: combines the text and the image tokenizer.

    text   "a red flag"      --bpe-->    17 301 44          tokens of the text range
    image  uint8[h, w, 3]    --vqgan-->  codes + constant   tokens of the image range

Sentinels and control tokens are ranges of `Vocab`. No tokenizer can produce one: a
caption with `<eod>` is encoded as its characters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32, UInt8

from racm3_jax import checkpoints, storage
from racm3_jax.documents.images import resize_image
from racm3_jax.tokenizers.bpe import TextTokenizer
from racm3_jax.tokenizers.image import ImageTokenizer
from racm3_jax.types import Document, Segment, TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab

FORMAT = 2
MIXED_NAME = "mixed.json"
KIND = "tokenizer"
_UNSEALED_FORMAT = 1
_UNSEALED_NAMES = {
    MIXED_NAME,
    "text/tokenizer.json",
    "image/config.json",
    "image/model.safetensors",
}


class MixedTokenizer:
    """Tokenizes documents with any mixture of text and images.

    Attributes:
      text: the text tokenizer.
      image: the image tokenizer.
      vocab: the token ranges.
    """

    def __init__(
        self, text: TextTokenizer, image: ImageTokenizer, num_sentinels: int = 512
    ) -> None:
        self.text = text
        self.image = image
        self.vocab = Vocab(
            num_text_ids=text.vocab_size,
            num_image_codes=image.num_codes,
            image_length=image.image_length,
            num_sentinels=num_sentinels,
        )
        self._fingerprint: str | None = None

    def tokenize(
        self, documents: Iterable[Document], batch: int = 256
    ) -> Iterator[TokenizedDocument]:
        """Yields the tokenized documents, in order.

        Args:
          documents: read once, `batch` at a time.
          batch: number of documents that are encoded together.
        """
        if batch < 1:
            raise ValueError(f"batch must be >= 1; got {batch}")
        chunk: list[Document] = []
        for document in documents:
            chunk.append(document)
            if len(chunk) == batch:
                yield from self._tokenize_chunk(chunk)
                chunk = []
        if chunk:
            yield from self._tokenize_chunk(chunk)

    def fit_images(
        self, images: Sequence[UInt8[np.ndarray, "height width 3"]]
    ) -> list[UInt8[np.ndarray, "size size 3"]]:
        """Images of any size, cropped and resized as `tokenize` does first."""
        return [resize_image(image, self.image.image_size) for image in images]

    def encode_text(self, text: str) -> Int32[np.ndarray, " length"]:
        """Tokens of a text, all in the text range."""
        return self.text.encode(text)

    def encode_image(
        self, image: UInt8[np.ndarray, "height width 3"]
    ) -> Int32[np.ndarray, " length"]:
        """Tokens of an image of any size (cropped to a square and resized)."""
        return self._encode_images([image])[0]

    def decode_text(self, document: TokenizedDocument) -> str:
        """All text of a document, joined by one space; its images are not decoded."""
        return " ".join(
            self.text.decode(segment.tokens)
            for segment in document.segments
            if segment.modality == "text"
        )

    def decode(self, document: TokenizedDocument) -> Document:
        """Decodes tokens to text and pixels; the pixels are the VQGAN's, so not exact.

        Raises:
          ValueError: an incomplete segment, or tokens of another range.
        """
        images = [s.tokens for s in document.segments if s.modality == "image"]
        for tokens in images:
            self._check_image(tokens)
        pixels = iter(())
        if images:
            codes = self.vocab.image_codes(np.stack(images))
            pixels = iter(self.image.decode(codes))
        segments = tuple(
            Segment(text=self.text.decode(s.tokens))
            if s.modality == "text"
            else Segment(image=next(pixels))
            for s in document.segments
        )
        return Document(document.id, segments, document.source, document.metadata)

    def split_tokens(
        self, tokens: Int[np.ndarray, " length"] | Sequence[int], id: str = ""
    ) -> TokenizedDocument:
        """Splits one document's tokens into segments.

            <eod> t4 t9 <break> i1 i7 i7 i2 <eod>  ->  text [t4 t9], image [i1 i7 i7 i2]

        `<break>` separates segments, and so does a change between text and image
        tokens; `<eod>`, `<pad>`, sentinels and `<eoss>` are dropped.

        Args:
          tokens: of one document, without masks.
          id: name of the result.

        Raises:
          ValueError: tokens outside the vocabulary, an incomplete image, or more
            than one document.
        """
        array = np.asarray(tokens, np.int32)
        self._check_range(array, range(self.vocab.size), "the vocabulary")
        is_image = self.vocab.is_image(array)
        kept = np.flatnonzero(is_image | self.vocab.is_text(array))
        if not kept.size:
            return TokenizedDocument(id, ())
        ends = array == self.vocab.eod
        if ends[kept[0] : kept[-1]].any():
            raise ValueError(
                "the tokens have an <eod> between segments, so more than one document; "
                "split them at <eod> first"
            )
        number = np.cumsum(array == self.vocab.break_)[kept]
        changes = (np.diff(number) != 0) | (np.diff(is_image[kept].astype(int)) != 0)
        segments = []
        for places in np.split(kept, np.flatnonzero(changes) + 1):
            if is_image[places[0]]:
                self._check_image(array[places])
                segments.append(TokenizedSegment("image", array[places]))
            else:
                segments.append(TokenizedSegment("text", array[places]))
        return TokenizedDocument(id, tuple(segments))

    def fingerprint(self) -> str:
        """Equal for tokenizers with equal tokens for equal documents."""
        if self._fingerprint is None:
            parts = (f.fingerprint() for f in (self.text, self.image, self.vocab))
            content = "/".join(parts)
            self._fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        return self._fingerprint

    def save(
        self, directory: str | os.PathLike[str], *, dtype: str | None = None
    ) -> None:
        """Writes `text/tokenizer.json`, `image/` and `mixed.json` with a manifest.

        Atomic; replaces another tokenizer's folder.

        Args:
          directory: created if missing.
          dtype: of the image tokenizer's weights, as in `checkpoints.save_weights`; a
            loss of precision changes the fingerprint, which `load` then refuses.

        Raises:
          FileExistsError: `directory` holds something else.
        """
        record = {
            "format": FORMAT,
            "num_sentinels": self.vocab.num_sentinels,
            "fingerprint": self.fingerprint(),
        }
        with checkpoints.sealed_folder(
            directory, KIND, overwrite=True, is_old=_is_unsealed_folder
        ) as folder:
            self.text.save(folder / "text" / "tokenizer.json")
            self.image.save(folder / "image", dtype=dtype)
            (folder / MIXED_NAME).write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> MixedTokenizer:
        """Loads what `save` wrote, after verifying all files.

        Raises:
          FileNotFoundError: there is no tokenizer.
          ValueError: damaged, of another format, or parts of different tokenizers.
        """
        directory = Path(directory)
        sealed = checkpoints.verify_folder(directory)
        num_sentinels, expected = _read_record(directory, sealed is not None)
        tokenizer = cls(
            TextTokenizer.load(directory / "text" / "tokenizer.json"),
            ImageTokenizer.load(directory / "image"),
            num_sentinels,
        )
        if tokenizer.fingerprint() != expected:
            raise ValueError(
                f"{directory} holds parts of different tokenizers: fingerprint "
                f"{tokenizer.fingerprint()}, {MIXED_NAME} says {expected}"
            )
        return tokenizer

    def _tokenize_chunk(self, chunk: list[Document]) -> Iterator[TokenizedDocument]:
        segments = [s for document in chunk for s in document.segments]
        texts = [s.text for s in segments if s.text is not None]
        images = [s.image for s in segments if s.image is not None]
        text_ids = iter(self.text.encode_batch(texts))
        image_ids = iter(self._encode_images(images))
        for document in chunk:
            parts = tuple(
                TokenizedSegment(
                    s.modality, next(text_ids if s.modality == "text" else image_ids)
                )
                for s in document.segments
            )
            yield TokenizedDocument(
                document.id, parts, document.source, document.metadata
            )

    def _encode_images(
        self, images: Sequence[UInt8[np.ndarray, "height width 3"]]
    ) -> Sequence[Int32[np.ndarray, " length"]]:
        if not images:
            return []
        pixels = np.stack(self.fit_images(images))
        return list(self.vocab.image_tokens(self.image.encode(pixels)).astype(np.int32))

    def _check_image(self, tokens: Int[np.ndarray, " length"]) -> None:
        if len(tokens) != self.vocab.image_length:
            raise ValueError(
                f"an image has {self.vocab.image_length} tokens; got {len(tokens)}"
            )
        self._check_range(tokens, self.vocab.image_range, "the image range")

    def _check_range(self, tokens: np.ndarray, ids: range, name: str) -> None:
        if tokens.size and not (ids.start <= tokens.min() <= tokens.max() < ids.stop):
            raise ValueError(
                f"tokens of {name} are in {ids.start}..{ids.stop - 1}; got "
                f"{tokens.min()}..{tokens.max()}"
            )


def _read_record(directory: Path, sealed: bool) -> tuple[int, str]:
    """(number of sentinels, fingerprint) from `mixed.json`."""
    path = directory / MIXED_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no {MIXED_NAME}; give a directory written by "
            "MixedTokenizer.save"
        )
    record = checkpoints.read_object(path, "save it again")
    found = record.get("format")
    num_sentinels, fingerprint = record.get("num_sentinels"), record.get("fingerprint")
    if type(num_sentinels) is not int or not isinstance(fingerprint, str):
        raise ValueError(
            f"{path} is damaged: its num_sentinels is {num_sentinels!r:.80} and its "
            f"fingerprint {fingerprint!r:.80}; save it again"
        )
    if found not in (_UNSEALED_FORMAT, FORMAT):
        raise ValueError(
            f"{path} has format {found!r:.80}; this version reads formats up to {FORMAT}"
        )
    if found == FORMAT and not sealed:
        raise ValueError(
            f"{directory} has no {checkpoints.MANIFEST_NAME}: not all files were "
            "copied; copy the directory again"
        )
    return num_sentinels, fingerprint


def _is_unsealed_folder(path: Path) -> bool:
    try:
        _read_record(path, sealed=False)
    except (ValueError, FileNotFoundError):
        return False
    return set(storage.list_files(path)) <= _UNSEALED_NAMES
