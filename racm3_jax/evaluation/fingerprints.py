"""Short fingerprints of documents, models and memories."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from racm3_jax.evaluation.document_sets import ShotPool
from racm3_jax.generation.tasks import Generator
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.types import Document


def describe_documents(documents: Sequence[Document]) -> dict[str, Any]:
    """A fingerprint of texts and pixels, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps([document.id, document.source]).encode())
        for segment in document.segments:
            if segment.image is None:
                digest.update(json.dumps(segment.text).encode())
            else:
                digest.update(str(segment.image.shape).encode())
                digest.update(segment.image.tobytes())
    return {"num_items": len(documents), "fingerprint": digest.hexdigest()[:16]}


def describe_pool(pool: ShotPool) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(list(pool.classes)).encode())
    return describe_documents(pool.documents) | {"classes": digest.hexdigest()[:16]}


def describe_generator(generator: Generator) -> dict[str, Any]:
    """Fingerprints of a model with a memory."""
    assert generator.retriever is not None and generator.embedder is not None
    return {
        "model": fingerprint_params(generator),
        "tokenizer": generator.tokenizer.fingerprint(),
        "memory": describe_memory(generator.retriever),
        "retrieval_clip": generator.embedder.fingerprint(),
    }


def describe_memory(retriever: Retriever) -> dict[str, Any]:
    """Content, removals and strategy, on which results depend."""
    allowed = np.ascontiguousarray(retriever.memory.allowed_ids())
    return {
        "fingerprint": retriever.memory.fingerprint(),
        "num_documents": len(retriever.memory),
        "allowed": hashlib.sha256(allowed.tobytes()).hexdigest()[:16],
        "strategy": dataclasses.asdict(retriever.strategy),
    }


def fingerprint_params(generator: Generator) -> str:
    """A fingerprint of parameters and shapes."""
    digest = hashlib.sha256(str(generator.model.config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(generator.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]
