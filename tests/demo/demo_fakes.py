"""Stand-ins for the models, around a real memory and a real retriever."""

from __future__ import annotations

import hashlib
import types

import numpy as np

from racm3_jax.documents.images import resize_image
from racm3_jax.generation.classification import Classification
from racm3_jax.generation.sample import Progress
from racm3_jax.types import (
    Document,
    GenerationOutput,
    Retrieved,
    Segment,
    TokenizedDocument,
    TokenizedSegment,
)
from racm3_jax.vocab import Vocab

SIZE = 8
D_EMBED = 64


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def grey(level):
    return np.full((SIZE, SIZE, 3), level, np.uint8)


class FakeTokenizer:
    """Tokens are characters; an image is four grey levels."""

    vocab = Vocab(
        num_text_ids=128, num_image_codes=256, image_length=4, num_sentinels=2
    )
    image = types.SimpleNamespace(image_size=SIZE)

    def fingerprint(self):
        return "tokenizer"

    def fit_images(self, images):
        return images

    def tokenize(self, documents):
        for document in documents:
            segments = [self._tokenize(segment) for segment in document.segments]
            yield TokenizedDocument(
                document.id, tuple(segments), document.source, dict(document.metadata)
            )

    def _tokenize(self, segment):
        if segment.text is not None:
            codes = np.frombuffer(segment.text.encode("ascii"), np.uint8)
            return TokenizedSegment("text", codes.astype(np.int32))
        codes = resize_image(segment.image, SIZE)[:2, :2, 0].reshape(4).astype(np.int32)
        return TokenizedSegment("image", self.vocab.image_tokens(codes))

    def decode(self, document):
        segments = [
            Segment(text=bytes(s.tokens.tolist()).decode())
            if s.modality == "text"
            else Segment(image=grey(self.vocab.image_codes(s.tokens)[0]))
            for s in document.segments
        ]
        return Document(
            document.id, tuple(segments), document.source, document.metadata
        )


class FakeEmbedder:
    """One direction per word; an image has the word of its grey level."""

    d_embed = D_EMBED
    alignment = None
    config = types.SimpleNamespace(image_size=SIZE)

    def fingerprint(self):
        return "encoder"

    def embed_texts(self, texts, drop=0.0, rng=None):
        return unit([np.sum([self._word(w) for w in t.split()], axis=0) for t in texts])

    def fit_images(self, images):
        return images

    def align(self, rows):
        return rows

    def embed_images(self, images, drop=0.0, rng=None):
        return self.embed_texts([f"nation{image[0, 0, 0] // 10}" for image in images])

    def embed_documents(self, documents):
        text = self.embed_texts([d.text for d in documents])
        image = self.embed_images([d.images[0] for d in documents])
        return text, image, unit(text + image)

    @staticmethod
    def _word(word):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
        return unit(np.random.default_rng(seed).normal(size=D_EMBED))


def make_documents():
    """Four nations in three scenes each."""
    return [
        Document(
            f"doc-{nation}{scene}",
            (
                Segment(text=f"flag nation{nation} scene{scene}"),
                Segment(image=grey(10 * nation + scene)),
            ),
            f"https://example.org/{nation}/{scene}",
            {"licence": "CC0-1.0"},
        )
        for nation in range(4)
        for scene in range(3)
    ]


class FakeGenerator:
    """Generates the mean grey of its documents, and records its calls."""

    def __init__(self, retriever=None):
        self.retriever = retriever
        self.tokenizer = FakeTokenizer()
        self.embedder = FakeEmbedder()
        self.calls = []

    def tokenized(self, documents):
        return tuple(self.tokenizer.tokenize(documents))

    def preview(self, progress):
        return np.full((*progress.tokens.shape[:2], SIZE, SIZE, 3), 127, np.uint8)

    def text_to_image(self, prompt, documents, on_progress, **settings):
        self.calls.append(("text_to_image", prompt, settings))
        self._report(on_progress, settings["num_samples"])
        return self._output("text_to_image", prompt, documents, **settings)

    def caption(self, image, num_retrieved, **settings):
        self.calls.append(("caption", num_retrieved, settings))
        found = self._retrieve(image, num_retrieved)
        return self._output("caption", "", found.documents, found=found, **settings)

    @staticmethod
    def _report(on_progress, num_samples):
        for num_tokens in (2, 4):
            tokens = np.zeros((1, num_samples, num_tokens), np.int32)
            on_progress(Progress(tokens, num_tokens, 4, 0.1, 9.0))

    def infill(self, image, region, prompt, num_retrieved, on_progress, **settings):
        self.calls.append(("infill", region, prompt, settings))
        self._report(on_progress, settings["num_samples"])
        found = self._retrieve(image, num_retrieved)
        return self._output("infill", prompt, found.documents, found=found, **settings)

    def edit(self, image, region, documents, prompt, on_progress, **settings):
        self.calls.append(("edit", region, prompt, settings))
        self._report(on_progress, settings["num_samples"])
        return self._output("edit", prompt, documents, **settings)

    def classify(self, image, support):
        labels = tuple(dict.fromkeys(label for _, label in support))
        probabilities = np.linspace(0.25, 0.75, len(labels), dtype=np.float32)
        return Classification(labels[-1], labels, probabilities, 1)

    def attribute(self, output):
        return np.arange(len(output.retrieved.documents), dtype=np.float32) * 12 - 3

    def _retrieve(self, image, num):
        if not num:
            return Retrieved(np.zeros(0, np.int64), np.zeros(0, np.float32), ())
        query = self.embedder.embed_images([image])
        return self.retriever.retrieve(query, np.array([num]), [None])[0]

    def _output(self, task, prompt, documents, *, seed, num_samples, found=None, **_):
        shown = [self.tokenizer.decode(d) for d in documents]
        level = int(np.mean([d.images[0][0, 0, 0] for d in shown] or [200]))
        near = {"near_copy": True, "nearest": {"id": "doc-00", "equal_codes": 0.95}}
        made = [
            Document(
                f"{task}-{seed}-{i}",
                (Segment(text=prompt or "a flag"), Segment(image=grey(level))),
                metadata={"sample": i, **(near if i else {})},
            )
            for i in range(num_samples)
        ]
        if found is None:
            rows = np.full(len(documents), -1)
            scores = np.full(len(documents), np.nan, np.float32)
            found = Retrieved(rows, scores, tuple(documents))
        scores = -np.arange(num_samples, dtype=np.float32)
        return GenerationOutput(made, scores, found, prompt, seed)
