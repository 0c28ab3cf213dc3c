"""The inputs and samples of each condition, item by item.

An item is a held-out image with its caption: the caption is the prompt, and the image is
captioned. No condition shows a document of the item's source, that is, an image of the
thing by the same vendor, in any of its icon sets.
"""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from emojiworld.drawings import Drawings
from emojiworld.scorers import reconstruct
from emojiworld.world import BY_NAME, SETS
from racm3_jax.evaluation.perplexity import compute_likelihoods
from racm3_jax.evaluation.replicas import Replicas
from racm3_jax.evaluation.retrieval import stack_rows
from racm3_jax.generation.tasks import Generator
from racm3_jax.memory.memory import Memory
from racm3_jax.retrieval.retriever import OwnExcluded, Retriever, as_main
from racm3_jax.types import (
    Document,
    Retrieved,
    Segment,
)

NUM_RETRIEVED = 2
GUIDANCE = 2.0
DRAWN = {
    "retrieval": "RA-CM3, 2 documents",
    "guided": "the same, guided by the documents",
    "best_of_4": "the same, best of 4 samples by CLIP",
    "oracle": "RA-CM3, 2 documents that show the thing",
    "random": "RA-CM3, 2 random documents",
    "no_documents": "RA-CM3, no documents",
    "baseline": "baseline without retrieval",
    "swapped": "each thing's documents show another thing",
    "removed": "all documents of the things removed",
    "copy": "return the nearest document",
    "reconstruction": "the drawing itself through the tokenizer",
}
CAPTIONED = ("retrieval", "random", "no_documents", "baseline", "copy")
SCORED = ("retrieval", "random", "no_documents", "baseline")
NEEDS_BASELINE = "baseline"
# Sampled with every seed; the others with the first.
MAIN = ("retrieval", "guided", "baseline")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are sampled: see `SamplingConfig`."""

    temperature: float = 0.7
    top_p: float = 0.9


def swap_things(drawings: Drawings) -> tuple[list[Document], dict[str, str]]:
    """A memory in which each held-out thing has the images of the next one.

    Returns:
      (documents, which thing is shown under each name). Texts, ids and sources are kept;
      a document whose vendor does not have the other thing is left out.
    """
    held_out = drawings.split == "held_out"
    things = list(dict.fromkeys(drawings.thing[held_out].tolist()))
    shown = dict(zip(things, [*things[1:], *things[:1]], strict=True))
    places = {
        (drawings.thing[i], drawings.icon_set[i]): i for i in range(len(drawings.thing))
    }
    documents = []
    for i, document in enumerate(drawings.documents):
        if not held_out[i]:
            documents.append(document)
            continue
        other = places.get((shown[drawings.thing[i]], drawings.icon_set[i]))
        if other is not None:
            image = drawings.images[other]
            segments = (Segment(text=document.text), Segment(image=image))
            documents.append(dataclasses.replace(document, segments=segments))
    return documents, shown


class ConditionRunner:
    """Runs the models on the items of an evaluation.

    Args:
      generator: over the memory of all images.
      baseline: the model without retrieval, or None.
      images: all of them.
      items: positions of the tested held-out images.
      sampling: settings.
      work: folder of changed memories.
      devices: see `Parts.make`.
    """

    def __init__(
        self,
        generator: Generator,
        baseline: Generator | None,
        drawings: Drawings,
        items: Int[np.ndarray, " items"],
        sampling: Sampling,
        work: Path,
        devices: Sequence[Any] = (None,),
    ) -> None:
        assert generator.retriever is not None and generator.embedder is not None
        self._models = Replicas(generator, devices)
        self._baselines = None if baseline is None else Replicas(baseline, devices)
        self._drawings, self._sampling, self._work = drawings, sampling, work
        self.targets = [drawings.documents[i] for i in items]
        self._real = drawings.images[items]
        self._generator, self._retriever = generator, generator.retriever
        self.memory: Memory = generator.retriever.memory
        self._changed: dict[str, Retriever] = {}
        self._lock = threading.Lock()
        self._rows = dict(
            zip(
                zip(drawings.thing.tolist(), drawings.icon_set.tolist(), strict=True),
                self.memory.find([d.id for d in drawings.documents]).tolist(),
                strict=True,
            )
        )

    def _retriever_of(self, condition: str) -> Retriever:
        """The retriever of the condition's memory; changed memories are built once."""
        if condition not in ("random", "swapped", "removed"):
            return self._retriever
        with self._lock:
            if condition not in self._changed:
                self._changed[condition] = self._change(condition)
            return self._changed[condition]

    def _change(self, condition: str) -> Retriever:
        strategy = self._retriever.strategy
        if condition == "random":
            strategy = dataclasses.replace(
                strategy, ranking="random", max_similarity=2.0
            )
            memory = self.memory
        elif condition == "swapped":
            documents, _ = swap_things(self._drawings)
            memory = open_memory(documents, self._generator, self._work / "swapped")
        else:
            memory = self._remove_things(self._work / "removed")
        return Retriever(memory, strategy)

    def _remove_things(self, folder: Path) -> Memory:
        """A copy of the memory without the held-out things."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.memory.path, folder)
        memory = Memory.load(folder)
        held_out = np.flatnonzero(self._drawings.split == "held_out")
        removed = memory.find([self._drawings.documents[i].id for i in held_out])
        memory.remove(removed[removed >= 0])
        return memory

    def generate_images(
        self, condition: str, seed: int, items: range, device: Any
    ) -> dict[str, np.ndarray]:
        """Generated images of some items, and the retrieved rows of the memory."""
        targets = [self.targets[i] for i in items]
        model = self._open(condition, targets, device)
        rows = np.full((len(targets), NUM_RETRIEVED), -1, np.int64)
        if condition == "reconstruction":
            images = reconstruct(model.tokenizer.image, self._real[items])
            return {"images": images, "retrieved": rows}
        prompts = [target.text for target in targets]
        if condition == "copy":
            found = model.retrieve_for(prompts, 1, None)
            images = [model.tokenizer.decode(r.documents[0]).images[-1] for r in found]
            rows[:, 0] = _first_rows(found)
            return {"images": np.stack(images), "retrieved": rows}
        settings: dict[str, Any] = {
            **dataclasses.asdict(self._sampling),
            "seed": [100_000 * seed + i for i in items],
        }
        if condition == "best_of_4":
            settings |= {"num_samples": 4, "rank_by": "clip"}
        if condition == "guided":
            settings |= {"guidance": GUIDANCE, "guide_documents": True}
        if condition == "oracle":
            rows = self._oracle_rows(targets)
            documents = [list(self.memory.documents(own)) for own in rows]
            outputs = model.continue_batch(prompts, documents, **settings)
        else:
            outputs = model.text_to_image_batch(
                prompts, num_retrieved=_num_retrieved(condition), **settings
            )
            rows = stack_rows(
                [o.retrieved.ids.tolist() for o in outputs], NUM_RETRIEVED
            )
        return {"images": np.stack([o.images[0] for o in outputs]), "retrieved": rows}

    def caption(
        self, condition: str, items: range, device: Any
    ) -> dict[str, np.ndarray]:
        """Greedy captions of some items."""
        model = self._open(condition, [self.targets[i] for i in items], device)
        images = list(self._real[items])
        if condition == "copy":
            found = model.retrieve_for(images, 1, None)
            texts = [model.tokenizer.decode(r.documents[0]).text for r in found]
        else:
            outputs = model.caption_batch(
                images,
                num_retrieved=_num_retrieved(condition),
                temperature=0.0,
                guidance=1.0,
                num_candidates=0,
            )
            texts = [output.texts[0] for output in outputs]
        return {"text": np.array(texts, np.str_)}

    def search(self, items: range, device: Any) -> dict[str, np.ndarray]:
        """The first retrieved rows for captions and images, and their embeddings."""
        targets, images = [self.targets[i] for i in items], list(self._real[items])
        model = self._open("retrieval", targets, device)
        texts = [target.text for target in targets]
        assert model.embedder is not None
        return {
            "by_text": _first_rows(model.retrieve_for(texts, 1, None)),
            "by_image": _first_rows(model.retrieve_for(images, 1, None)),
            "text": model.embedder.align(model.embedder.embed_texts(texts)),
            "image": model.embedder.align(model.embedder.embed_images(images)),
        }

    def score(self, condition: str, items: range, device: Any) -> dict[str, np.ndarray]:
        """Bits of the images of some items, after their captions."""
        targets = [self.targets[i] for i in items]
        # Here the documents have their own sources.
        model = self._model(condition, device)
        if _num_retrieved(condition):
            model = model.with_retriever(self._retriever_of(condition))
        found = compute_likelihoods(
            model, targets, num_retrieved=_num_retrieved(condition)
        )
        return {"bits": found.sums.image_nats / np.log(2)}

    def _model(self, condition: str, device: Any) -> Generator:
        models = self._baselines if condition == NEEDS_BASELINE else self._models
        if models is None:
            raise ValueError("give --baseline=FOLDER to ask the baseline")
        return models.on(device)

    def _open(
        self, condition: str, targets: Sequence[Document], device: Any
    ) -> Generator:
        """The model of a condition, with a memory that excludes the items' sources."""
        model = self._model(condition, device)
        retriever = self._retriever_of(condition)
        mains = [as_main(target) for target in targets]
        excluding: Any = OwnExcluded(retriever, mains)
        return model.with_retriever(excluding)

    def _oracle_rows(self, targets: Sequence[Document]) -> Int[np.ndarray, "n k"]:
        """Two images of each item's thing, from the icon sets after its own, in turn."""
        rows = []
        for target in targets:
            name = str(target.metadata["icon_set"])
            start = next(i for i, s in enumerate(SETS) if s.name == name)
            others = [*SETS[start:], *SETS[:start]]
            others = [s for s in others if s.house != BY_NAME[name].house]
            thing = str(target.metadata["thing"])
            found = [self._rows.get((thing, s.name), -1) for s in others]
            rows.append([row for row in found if row >= 0][:NUM_RETRIEVED])
        return np.array(rows, np.int64)


def open_memory(documents: Sequence[Document], generator: Any, folder: Path) -> Memory:
    """The memory of these documents, built once, with the tokenizer of `generator`."""
    parts: Mapping[str, Any] = {
        "tokenizer": generator.tokenizer,
        "embedder": generator.embedder,
    }
    if not (folder / "manifest.json").exists():
        Memory.build(documents, path=folder, index="exact", **parts).close()
    return Memory.load(folder, **parts)


def _num_retrieved(condition: str) -> int:
    return 0 if condition in ("no_documents", "baseline") else NUM_RETRIEVED


def _first_rows(found: Sequence[Retrieved]) -> Int[np.ndarray, " n"]:
    """The best row of each query; -1 where there is none."""
    return np.array([r.ids[0] if len(r.ids) else -1 for r in found], np.int64)
