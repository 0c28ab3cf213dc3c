"""The logic of the demo, without the page: search, choose, generate, classify, remove.

    prompt -> documents on the desk (pin, drop, add) -> generation, stage by stage

One `Session` serves all visitors; the state of a visitor is in the `Desk`, an argument
and result of each call. Invalid input is a ValueError with one sentence.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from racm3_jax.demo.desk import Desk, Given, Stage
from racm3_jax.demo.stages import run_in_stages
from racm3_jax.demo.uploads import KeptPixels
from racm3_jax.documents.images import ImageError, read_image, resize_image
from racm3_jax.generation.classification import Classification
from racm3_jax.generation.sample import Progress
from racm3_jax.generation.tasks import Generator
from racm3_jax.types import Document, GenerationOutput, Retrieved, Segment

MAX_UPLOAD_BYTES = 8 << 20
MAX_PIXELS = 16_000_000
MAX_TEXT_LENGTH = 500
MAX_SAMPLES = 4
MAX_DOCUMENTS = 4
MAX_RESULTS = 12
MAX_EXAMPLES = 16
# Uploads are kept as squares no larger than this.
_KEPT_SIDE = 512

Image = UInt8[np.ndarray, "height width 3"]
_NO_ROWS = np.zeros(0, np.int64)


class Session:
    """The generator of the page; thread-safe, one decode at a time.

    Attributes:
      generator: with or without a memory.
      memory: the memory, or None.
      image_size: side of the model's images, pixels.
      side: of their grid of codes.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        retriever = generator.retriever
        self.memory = None if retriever is None else retriever.memory
        self.image_size = generator.tokenizer.image.image_size
        self.side = round(generator.tokenizer.vocab.image_length**0.5)
        self._decoding = threading.Lock()
        self._reading = threading.Lock()
        self._kept = KeptPixels()

    def example_prompts(self, num: int = 4) -> list[str]:
        """Texts of documents spread over the memory, as example prompts."""
        memory = self.memory
        if memory is None or not memory.num_allowed:
            return []
        allowed = memory.allowed_ids()
        rows = allowed[np.linspace(0, len(allowed) - 1, num).astype(int)]
        shown = [
            self.generator.tokenizer.decode(d).text for d in memory.documents(rows)
        ]
        return list(dict.fromkeys(text for text in shown if text))

    def read_upload(self, content: bytes) -> Image:
        """Reads an uploaded image; decodes one at a time, and limits their total size.

        Raises:
          ValueError: too many bytes or pixels, or not an image.
        """
        with self._reading:
            return self._kept.keep(read_upload(content))

    def search(self, desk: Desk, prompt: str, num_documents: int) -> Desk:
        """Keeps own and pinned documents, and adds retrieved ones."""
        prompt = check_text(prompt, "the prompt", "the flag of Ginelia on the moon")
        num_documents = int(num_documents)
        if not 0 <= num_documents <= MAX_DOCUMENTS:
            raise ValueError(
                f"choose 0 to {MAX_DOCUMENTS} documents; got {num_documents}"
            )
        given = [document for document in desk.given if document.is_own]
        if self.memory is not None:
            query = self._embed(prompt)
            given += self._rescore([g for g in desk.given if g.pinned], query)
            skipped = {*desk.dropped, *(document.id for document in given)}
            given += self._retrieve(query, num_documents - len(given), skipped)
        return dataclasses.replace(
            desk, prompt=prompt, num_documents=num_documents, given=tuple(given)
        )

    def pin(self, desk: Desk, id: str) -> Desk:
        """Pins or unpins a document."""
        given = tuple(
            dataclasses.replace(g, pinned=not g.pinned) if g.id == id else g
            for g in desk.given
        )
        return dataclasses.replace(desk, given=given)

    def drop(self, desk: Desk, id: str) -> Desk:
        """Drops a document; the next retrieved one replaces it."""
        (dropped,) = [g for g in desk.given if g.id == id] or [None]
        if dropped is None:
            return desk
        desk = dataclasses.replace(
            desk,
            given=tuple(g for g in desk.given if g is not dropped),
            dropped=desk.dropped if dropped.is_own else (*desk.dropped, id),
        )
        return self._search_again(desk)

    def restore(self, desk: Desk) -> Desk:
        """Restores dropped documents."""
        return self._search_again(dataclasses.replace(desk, dropped=()))

    def add_own(self, desk: Desk, image: Image | None, caption: str) -> Desk:
        """Adds the visitor's own document first, without adding it to the memory."""
        if image is None:
            raise ValueError("upload an image for your document first")
        caption = check_text(caption, "the caption", "the flag of Ginelia")
        taken = {g.id for g in desk.given}
        name = next(n for i in range(1, 100) if (n := f"own-{i}") not in taken)
        document = Document(name, (Segment(text=caption), Segment(image=image)))
        (tokens,) = self.generator.tokenized([document])
        own = Given(tokens, self.generator.tokenizer.decode(tokens))
        desk = dataclasses.replace(desk, given=(own, *desk.given))
        return self._search_again(desk)

    def _search_again(self, desk: Desk) -> Desk:
        if not desk.prompt:
            return desk
        return self.search(desk, desk.prompt, desk.num_documents)

    def draw(
        self, desk: Desk, prompt: str, num_documents: int, **settings: Any
    ) -> Iterator[Stage]:
        """Generates images of a prompt with the desk's documents, after a new search.

        `settings` are those of `Generator.text_to_image`. The first stage shows the
        documents, the last has the output.
        """
        settings = check_settings(settings)
        desk = self.search(desk, prompt, num_documents)
        settings["documents"] = [g.tokens for g in desk.given]
        arguments = (self.generator.text_to_image, desk.prompt)
        yield from self.follow(desk, *arguments, **settings)

    def answer(self, task: Callable, *arguments: Any, **settings: Any) -> Any:
        """The result of a task of the generator; one decode at a time."""
        with self._decoding:
            return task(*arguments, **settings)

    def follow(
        self, desk: Desk, task: Callable, *arguments: Any, **settings: Any
    ) -> Iterator[Stage]:
        """The stages of an image task, one decode at a time."""
        yield Stage(desk, [])

        def work(on_progress):
            return self.answer(task, *arguments, on_progress=on_progress, **settings)

        for part in run_in_stages(work):
            if isinstance(part, Progress):
                images = list(self.generator.preview(part)[0])
                yield Stage(desk, images, part.num_sampled / part.max_new_tokens)
                continue
            if not desk.given:
                desk = dataclasses.replace(desk, given=self.show(part.retrieved))
            yield Stage(desk, part.images, 1.0, part)

    def attribute(self, output: GenerationOutput) -> tuple[float, ...]:
        """Bits of each document for the best sample; see `Generator.attribute`."""
        if not output.retrieved.documents:
            return ()
        return tuple(self.answer(self.generator.attribute, output).tolist())

    def caption(
        self, image: Image | None, num_documents: int, **settings: Any
    ) -> tuple[GenerationOutput, tuple[Given, ...]]:
        """Captions an image; also returns the retrieved documents."""
        image = check_picture(image)
        settings = check_settings(settings)
        if self.memory is None:
            num_documents = 0
        settings["num_retrieved"] = int(num_documents)
        output = self.answer(self.generator.caption, image, **settings)
        return output, self.show(output.retrieved)

    def infill(
        self,
        image: Image | None,
        cells: Bool[np.ndarray, " codes"],
        prompt: str,
        num_documents: int,
        follow: Sequence[Given] | None = None,
        **settings: Any,
    ) -> Iterator[Stage]:
        """Regenerates cells of an image, stage by stage.

        Args:
          image: the image.
          cells: True where it is regenerated, in code order.
          prompt: the image's caption, or nothing.
          num_documents: number of retrieved documents.
          follow: documents that guide the edit, instead of retrieved ones.
          **settings: of `Generator.infill`.
        """
        image = resize_image(check_picture(image), self.image_size)
        if not cells.any():
            raise ValueError("first paint over the region to regenerate")
        settings = check_settings(settings)
        prompt = prompt.strip()
        if prompt:
            check_text(prompt, "the caption", "")
        elif not settings.get("guide_documents"):
            settings["guidance"] = 1.0  # no text, so no guidance
        if follow is not None and not follow:
            raise ValueError(
                "no documents on the Draw tab for editing: find some there, or "
                "add your own"
            )
        grid = cells.reshape(self.side, self.side)
        pixels = self.image_size // self.side
        region = grid.repeat(pixels, axis=0).repeat(pixels, axis=1)
        if follow is not None:
            desk, documents = Desk(given=tuple(follow)), [g.tokens for g in follow]
            arguments = (self.generator.edit, image, region, documents, prompt)
            return self.follow(desk, *arguments, **settings)
        settings["num_retrieved"] = 0 if self.memory is None else int(num_documents)
        arguments = (self.generator.infill, image, region, prompt)
        return self.follow(Desk(), *arguments, **settings)

    def classify(
        self, image: Image | None, support: Sequence[tuple[Image, str]]
    ) -> Classification:
        """Few-shot classification with the labels of the examples."""
        image = check_picture(image)
        return self.answer(self.generator.classify, image, list(support))

    def find(self, query: str | Image, num_results: int) -> tuple[Given, ...]:
        """The documents of the memory nearest to a text or an image."""
        memory = self._needed_memory()
        if isinstance(query, str):
            query = check_text(query, "the query", "a flag on the beach")
        num_results = min(int(num_results), MAX_RESULTS, memory.num_allowed)
        if num_results < 1:
            return ()
        found = memory.search(self._embed(query), num_results)
        valid = found.valid[0]
        rows, scores = found.ids[0][valid], found.scores[0][valid]
        return self.show(Retrieved(rows, scores, tuple(memory.documents(rows))))

    def remove(self, id: str) -> str:
        """Removes a document from the memory permanently; returns a message."""
        memory = self._needed_memory()
        (row,) = memory.find([id])
        if row < 0:
            raise ValueError(f"the memory holds no document {id!r}")
        if not memory.remove([int(row)]):
            return f"{id} was removed before."
        return (
            f"Removed {id}: searches no longer return it. "
            f"{memory.num_allowed:,} documents are left."
        )

    def show(self, found: Retrieved) -> tuple[Given, ...]:
        """Retrieved documents with their text and pixels."""
        return tuple(
            Given(tokens, self.generator.tokenizer.decode(tokens), int(row), float(s))
            for row, s, tokens in zip(*found[:3], strict=True)
        )

    def _needed_memory(self) -> Any:
        if self.memory is None:
            raise ValueError("this work directory has no memory to search")
        return self.memory

    def _embed(self, query: str | Image) -> Float32[np.ndarray, "1 d_embed"]:
        embedder = self.generator.embedder
        assert embedder is not None  # required with a retriever
        if isinstance(query, str):
            return embedder.embed_texts([query])
        return embedder.embed_images([query])

    def _rescore(
        self, pinned: Sequence[Given], query: Float32[np.ndarray, "1 d_embed"]
    ) -> list[Given]:
        """Pinned documents with scores for the new query, without removed ones."""
        memory = self._needed_memory()
        allowed = memory.allowed_ids() if pinned else _NO_ROWS
        return [
            dataclasses.replace(
                g, score=float(memory.embeddings[[g.row]][0] @ query[0])
            )
            for g in pinned
            if np.isin(g.row, allowed)
        ]

    def _retrieve(
        self, query: Float32[np.ndarray, "1 d_embed"], wanted: int, skipped: set[str]
    ) -> list[Given]:
        if wanted < 1:
            return []
        retriever, memory = self.generator.retriever, self._needed_memory()
        assert retriever is not None
        num = min(wanted + len(skipped), memory.num_allowed)
        (found,) = retriever.retrieve(query, np.asarray([num]), [None])
        kept = [i for i, d in enumerate(found.documents) if d.id not in skipped]
        kept = kept[:wanted]
        documents = tuple(found.documents[i] for i in kept)
        return list(
            self.show(Retrieved(found.ids[kept], found.scores[kept], documents))
        )


def read_upload(content: bytes) -> Image:
    """Reads an uploaded image as a square; checks its size before decoding.

    Raises:
      ValueError: too many bytes or pixels, or not an image.
    """
    check_size("the file", len(content))
    try:
        image = read_image(content, MAX_PIXELS)
    except ImageError as error:
        sentence = str(error).replace(f"{len(content)} bytes", "the file", 1)
        raise ValueError(sentence) from error
    return resize_image(image, min(*image.shape[:2], _KEPT_SIDE))


def check_size(name: str, num_bytes: int) -> None:
    """Refuses files that are too large."""
    if num_bytes > MAX_UPLOAD_BYTES:
        raise ValueError(
            f"{name} has {num_bytes / 2**20:.1f} MB; {MAX_UPLOAD_BYTES >> 20} MB are "
            "allowed"
        )


def check_text(text: str, name: str, example: str) -> str:
    """The stripped text, if it is neither empty nor too long."""
    text = (text or "").strip()
    if not text:
        raise ValueError(f"{name} is empty: write something, e.g. {example!r}")
    if len(text) > MAX_TEXT_LENGTH:
        raise ValueError(
            f"{name} has {len(text)} characters; {MAX_TEXT_LENGTH} are allowed"
        )
    return text


def check_picture(image: Image | None) -> Image:
    """The image, if there is one."""
    if image is None:
        raise ValueError(
            "choose an image first: upload one, or use the last generated one"
        )
    return image


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Converts floats and None from the page to integers."""
    settings = dict(settings)
    seed, num_samples = settings.get("seed", 0), settings.get("num_samples", 1)
    if seed is None:
        raise ValueError("the seed must be an integer >= 0")
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ValueError(f"generate 1 to {MAX_SAMPLES} samples; got {num_samples}")
    return settings | {"seed": int(seed), "num_samples": int(num_samples)}
