"""A tiny random model with a memory, and a COCO-like folder of synthetic images."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import types
import zlib
from typing import ClassVar

import jax
import numpy as np
from PIL import Image

from racm3_jax.documents.images import resize_image
from racm3_jax.generation.tasks import Generator
from racm3_jax.memory.memory import Memory
from racm3_jax.model.config import tiny
from racm3_jax.model.transformer import init_params
from racm3_jax.retrieval.embedder import DocumentEmbeddings
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.types import (
    Document,
    GenerationOutput,
    Retrieved,
    Segment,
    TokenizedDocument,
    TokenizedSegment,
)
from racm3_jax.vocab import Vocab

VOCAB = Vocab(num_text_ids=128, num_image_codes=16, image_length=4, num_sentinels=2)
SIZE = 8
THINGS = ("dog", "red cat", "bus", "man's hat", "blue wave")


class AsciiTokenizer:
    """Text tokens are characters; an image is four grey levels, one per quadrant."""

    vocab = VOCAB

    def __init__(self):
        self.text = types.SimpleNamespace(
            decode=lambda ids: bytes(x for x in ids if 31 < x < 127).decode()
        )
        self.image = types.SimpleNamespace(
            image_size=SIZE,
            encode=self.encode,
            decode=self.decode_images,
            params={},
        )

    def fingerprint(self):
        return "ascii"

    def encode_text(self, text):
        return np.array(list(text.encode("ascii")), np.int32)

    def encode(self, images):
        corners = images[:, SIZE // 4 :: SIZE // 2, SIZE // 4 :: SIZE // 2, 0]
        return (corners // 16).reshape(len(images), 4).astype(np.int32)

    def decode_images(self, codes):
        grey = (np.asarray(codes) * 16).astype(np.uint8).reshape(-1, 2, 2, 1)
        return np.repeat(np.repeat(grey.repeat(3, 3), SIZE // 2, 1), SIZE // 2, 2)

    def fit_images(self, images):
        return images

    def tokenize(self, documents, batch=64):
        for document in documents:
            segments = []
            for s in document.segments:
                if s.text is not None:
                    tokens = self.encode_text(s.text)
                else:
                    pixels = resize_image(s.image, SIZE)
                    tokens = VOCAB.image_tokens(self.encode(pixels[None])[0])
                segments.append(TokenizedSegment(s.modality, tokens))
            yield TokenizedDocument(document.id, tuple(segments), document.source)

    def decode(self, document):
        segments = []
        for s in document.segments:
            if s.modality == "text":
                segments.append(Segment(text=self.text.decode(s.tokens)))
            else:
                codes = VOCAB.image_codes(s.tokens)[None]
                segments.append(Segment(image=self.decode_images(codes)[0]))
        return Document(document.id, tuple(segments))


class Embedder:
    """Texts by their letters, images by their colours at 4 × 4 places; no model."""

    d_embed = 48
    alignment = None
    params: ClassVar[dict] = {}
    config = types.SimpleNamespace(image_size=SIZE)

    def fingerprint(self):
        return "embedder"

    def embed_texts(self, texts, drop=0.0, rng=None):
        del drop, rng
        rows = [[zlib.crc32(f"{t}{i}".encode()) for i in range(48)] for t in texts]
        return unit(np.array(rows, np.float64).reshape(-1, 48))

    def fit_images(self, images):
        return images

    def align(self, rows):
        return rows

    def embed_images(self, images, drop=0.0, rng=None):
        del drop, rng
        rows = [resize_image(x, 4).reshape(48) for x in images]
        return unit(np.array(rows, np.float64).reshape(-1, 48))

    def embed_documents(self, documents):
        text = self.embed_texts([d.text for d in documents])
        seen = np.array([bool(d.images) for d in documents])
        image = np.zeros_like(text)
        images = [d.images[0] for d in documents if d.images]
        image[seen] = self.embed_images(images)
        whole = text + image
        whole /= np.linalg.norm(whole, axis=1, keepdims=True)
        return DocumentEmbeddings(text, image, whole, np.ones(len(seen), bool), seen)


def unit(rows):
    rows = rows - rows.mean(1, keepdims=True) + 1e-6
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def picture(i, height=20, width=26):
    """Coloured blocks, different for every i."""
    blocks = np.random.default_rng(i).integers(0, 256, (4, 4, 3))
    image = Image.fromarray(blocks.astype(np.uint8))
    return np.asarray(image.resize((width, height), Image.Resampling.NEAREST))


def caption(i):
    return f"A {THINGS[i % 5]} near the {THINGS[(i // 5) % 5]}, no. {i}."


class ColourFeatures:
    """Six numbers of an image, in place of a network."""

    @property
    def settings(self):
        return {"network": "colours"}

    def __call__(self, images):
        means = [[*x.mean((0, 1)), *x.std((0, 1))] for x in images]
        return np.array(means, np.float32) / 64


def make_coco(directory, count=200):
    """The files of COCO 2014 and of the Karpathy splits, with synthetic images."""
    (directory / "annotations").mkdir(parents=True)
    (directory / "val2014").mkdir()
    images, annotations, karpathy = [], [], []
    for i in range(count):
        name = f"COCO_val2014_{i:012d}.png"
        Image.fromarray(picture(i, 20 + (i % 3 if i > 2 else 0), 26)).save(
            directory / "val2014" / name
        )
        images.append({"id": i, "file_name": name})
        texts = [caption(i), f"There's a {THINGS[i % 5]}!"]
        for j, text in enumerate(texts):
            annotations.append({"id": 10 * i + j, "image_id": i, "caption": text})
        karpathy.append(
            {
                "cocoid": i,
                "filepath": "val2014",
                "filename": name,
                "split": "test" if i % 4 else "train",
                "sentences": [{"raw": text} for text in texts],
            }
        )
    record = {"images": images, "annotations": annotations}
    path = directory / "annotations" / "captions_val2014.json"
    path.write_text(json.dumps(record))
    (directory / "dataset_coco.json").write_text(json.dumps({"images": karpathy}))
    return directory


def make_memory(path, num_near=3, count=40):
    """Documents with images; the first ones have those of the test images."""
    documents = [
        Document(
            f"m{i}",
            (
                Segment(text=f"memory {i}"),
                Segment(image=picture(i) if i < num_near else picture(1000 + i)),
            ),
        )
        for i in range(count)
    ]
    return Memory.build(
        documents,
        tokenizer=AsciiTokenizer(),
        embedder=Embedder(),
        path=path,
        index="exact",
        num_query_variants=0,
    )


@functools.cache
def _params(config):
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return jax.tree.map(lambda x: x * 3, params)


def make_generator(memory=None, max_length=192):
    config = tiny(vocab_size=VOCAB.size, max_length=max_length, num_layers=1)
    retriever = None
    if memory is not None:
        retriever = Retriever(memory, StrategyConfig(max_similarity=2.0))
    return Generator(
        config, _params(config), AsciiTokenizer(), retriever, Embedder(), max_rows=64
    )


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class StubGenerator:
    """Its images depend on the seed and the retrieved documents; compiles nothing.

    It is killed after `budget` items.
    """

    def __init__(self, memory, budget=10**9):
        self.retriever = Retriever(memory, StrategyConfig(max_similarity=2.0))
        self.embedder, self.tokenizer = Embedder(), AsciiTokenizer()
        self.model = types.SimpleNamespace(config="stub")
        self.params = {"w": np.ones(3)}
        self.budget = budget

    def with_retriever(self, retriever):
        other = copy.copy(self)
        other.retriever = retriever
        other.owner = self
        return other

    def _retrieve(self, queries, num):
        if self.owner.budget < len(queries):
            raise KeyboardInterrupt
        self.owner.budget -= len(queries)
        if not num:
            none = Retrieved(np.zeros(0, np.int64), np.zeros(0, np.float32), ())
            return [none] * len(queries)
        nums = np.full(len(queries), num)
        return self.retriever.retrieve(queries, nums, [None] * len(queries))

    def text_to_image_batch(self, prompts, *, seed, num_retrieved, **sampling):
        found = self._retrieve(self.embedder.embed_texts(prompts), num_retrieved)
        return [
            self._output(prompt, picture([s, *r.ids], SIZE, SIZE), r, s)
            for prompt, r, s in zip(prompts, found, seed, strict=True)
        ]

    def caption_batch(self, images, *, seed, num_retrieved, prefix, **sampling):
        queries = self.embedder.embed_images(np.stack(images))
        found = self._retrieve(queries, num_retrieved)
        return [
            self._output(f"{prefix}{caption(s + int(r.ids.sum()))}", image, r, s)
            for image, r, s in zip(images, found, seed, strict=True)
        ]

    def _output(self, text, image, retrieved, seed):
        segments = (Segment(text=text), Segment(image=image))
        documents = [Document("x", segments)]
        return GenerationOutput(documents, np.zeros(1), retrieved, text, seed)
