"""Makes the augmented images of a generator's training, once per work directory."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from racm3_jax import storage
from racm3_jax.documents.augmentation import change_images, sample_change
from racm3_jax.documents.images import resize_image
from racm3_jax.memory.memory import Memory
from racm3_jax.progress import open_progress
from racm3_jax.sequences.variants import Variants
from racm3_jax.sharding import leader_first
from racm3_jax.tokenizers.mixed import MixedTokenizer
from racm3_jax.types import Document
from racm3_jax.wiring.corpora import build_augmentation, read_memory_documents

VARIANTS_DIRECTORY = "variants"
_DOCUMENTS_PER_PASS = 256


def build_variants(
    config: Any, memory: Memory, tokenizer: MixedTokenizer, workdir: Path
) -> Variants | None:
    """Augmented images of the corpus's documents in the memory; None if not configured.

    Augmentations are sampled from the seed, so that they are the same after a resume.

    Raises:
      ValueError: `augmentation.num_variants` without any augmentation, or without a
        corpus.
    """
    augmentation = build_augmentation(config)
    if not augmentation.num_variants:
        return None
    if not augmentation.changes_images:
        raise ValueError(
            f"augmentation.num_variants={augmentation.num_variants} has no effect: "
            "give augmentation.mirror, shift or hue, too"
        )
    facts = [memory.fingerprint(), tokenizer.fingerprint(), config.seed]
    facts.append(dataclasses.asdict(augmentation))
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = workdir / VARIANTS_DIRECTORY / f"{digest}.npy"
    with leader_first():
        if jax.process_index() == 0 and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            codes, places = _encode(config, memory, tokenizer)
            storage.write_file(path.with_suffix(".json"), json.dumps(places).encode())
            with storage.replacing(path) as partial, open(partial, "wb") as file:
                np.save(file, codes)
    places = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    codes = np.load(path, mmap_mode="r", allow_pickle=False)
    return Variants(codes, places)


def _encode(
    config: Any, memory: Memory, tokenizer: MixedTokenizer
) -> tuple[np.ndarray, dict[str, int]]:
    augmentation = build_augmentation(config)
    changes = [
        sample_change(augmentation, np.random.default_rng([config.seed, number]))
        for number in range(augmentation.num_variants)
    ]
    start, size = tokenizer.vocab.image_range.start, tokenizer.image.image_size
    places: dict[str, int] = {}
    parts: list[list[np.ndarray]] = [[] for _ in changes]
    num_images = 0
    with open_progress(
        total=len(memory), desc="augment images", unit="documents"
    ) as bar:
        for block in _blocks(read_memory_documents(config)):
            rows = memory.find([document.id for document in block])
            images = []
            for document, row in zip(block, rows, strict=True):
                if row >= 0 and document.images and document.id not in places:
                    places[document.id] = num_images + len(images)
                    images += [resize_image(image, size) for image in document.images]
            bar.update(int(np.count_nonzero(np.asarray(rows) >= 0)))
            if not images:
                continue
            num_images += len(images)
            for part, change in zip(parts, changes, strict=True):
                changed = change_images(np.stack(images), change)
                part.append(tokenizer.image.encode(changed).astype(np.int32) + start)
    if not places:
        raise ValueError(
            "augmentation.num_variants needs the images of the memory's documents: "
            "config.source has none of them"
        )
    return np.stack([np.concatenate(part) for part in parts]), places


def _blocks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while block := list(itertools.islice(documents, _DOCUMENTS_PER_PASS)):
        yield block
