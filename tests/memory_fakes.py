"""Stand-ins for the models, so that memories can be built without any."""

from __future__ import annotations

import hashlib
import types

import numpy as np
import pytest

from racm3_jax.documents.images import resize_image
from racm3_jax.memory.memory import Memory
from racm3_jax.types import Document, Segment, TokenizedDocument, TokenizedSegment
from racm3_jax.vocab import Vocab

D_EMBED = 128
SCENES = 4


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


class FakeTokenizer:
    """Tokens are the text's bytes modulo 64; four codes are from an image's corner."""

    vocab = Vocab(num_text_ids=64, num_image_codes=256, image_length=4, num_sentinels=8)

    def fingerprint(self) -> str:
        return "tokenizer-1"

    def fit_images(self, images):
        return images

    def tokenize(self, documents):
        for document in documents:
            segments = []
            for segment in document.segments:
                if segment.text is not None:
                    tokens = np.frombuffer(segment.text.encode(), np.uint8) % 64
                else:
                    tokens = self.vocab.image_tokens(segment.image[:2, :2, 0].ravel())
                segments.append(
                    TokenizedSegment(segment.modality, tokens.astype(np.int32))
                )
            yield TokenizedDocument(
                document.id, tuple(segments), document.source, dict(document.metadata)
            )


class FakeEmbedder:
    """One direction per nation, moved slightly by the scene and by dropout."""

    d_embed = D_EMBED
    config = types.SimpleNamespace(image_size=4)

    def __init__(self, name: str = "encoder-1", scene_weight: float = 0.6):
        self.name = name
        self.scene_weight = scene_weight

    def fingerprint(self) -> str:
        return self.name

    def _direction(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
        return _unit(np.random.default_rng(seed).normal(size=D_EMBED))

    def _embed(self, names, kind, drop, rng) -> np.ndarray:
        rows = [
            self._direction(nation)
            + self.scene_weight * self._direction(scene)
            + 0.1 * self._direction(kind)
            for nation, scene in names
        ]
        noise = rng.normal(size=(len(rows), D_EMBED)) if rng is not None else 0.0
        return _unit(np.asarray(rows) + drop * 0.1 * noise)

    def embed_texts(self, texts, drop=0.0, rng=None):
        names = [(text.split()[0], text.split()[-1]) for text in texts]
        return self._embed(names, "text", drop, rng)

    def fit_images(self, images):
        return images

    def align(self, rows):
        return rows

    def embed_images(self, images, drop=0.0, rng=None):
        names = [(f"nation{i[0, 0, 0]}", f"scene{i[0, 0, 1]}") for i in images]
        return self._embed(names, "image", drop, rng)

    def embed_documents(self, documents):
        text = np.zeros((len(documents), D_EMBED), np.float32)
        image = np.zeros_like(text)
        for i, document in enumerate(documents):
            if document.text:
                text[i] = self.embed_texts([document.text])[0]
            if document.images:
                size = self.config.image_size
                found = self.embed_images(
                    np.stack([resize_image(i, size) for i in document.images])
                )
                image[i] = _unit(found.mean(axis=0))
        return text, image, _unit(text + image)


def make_document(number: int, **changes) -> Document:
    """Document `number` shows nation number // 4 in scene number % 4."""
    nation, scene = divmod(number, SCENES)
    image = np.full((4, 4, 3), 7, np.uint8)
    image[..., 0] = nation
    image[..., 1] = scene
    fields = {
        "id": f"doc-{number}",
        "segments": (
            Segment(text=f"nation{nation} on scene{scene}"),
            Segment(image=image),
        ),
        "metadata": {"nation": nation, "licence": "CC0-1.0"},
    }
    return Document(**{**fields, **changes})


@pytest.fixture
def documents() -> list[Document]:
    """40 documents of 10 nations."""
    return [make_document(i) for i in range(40)]


@pytest.fixture
def build(tmp_path):
    """Builds (and closes in the end) memories of documents in `tmp_path`."""
    opened = []

    def build_one(documents, name="memory", embedder=None, **settings) -> Memory:
        settings = {"index": "exact", "num_query_variants": 2, **settings}
        memory = Memory.build(
            documents,
            tokenizer=FakeTokenizer(),
            embedder=embedder or FakeEmbedder(),
            path=tmp_path / name,
            **settings,
        )
        opened.append(memory)
        return memory

    yield build_one
    for memory in opened:
        memory.close()
