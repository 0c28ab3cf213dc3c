"""The suite of likelihoods: language modelling, k-shot accuracy and the retriever.

Nothing is sampled; every figure is read off forward passes over a set of documents.

    language modelling   perplexity of each modality and bits per image of documents
    k-shot               which of two invented words names an image, from demonstrations
    retriever            recall@k: text to image, image to text, to the right document

Every figure is reported next to those of

    no_retrieval   the same model with nothing before the document (0 shots)
    random         documents that have nothing to do with it (demonstrations of others)
    copy           what was retrieved, taken for the answer, without any model; see
                   `copying` for what that is as a likelihood
    twin           a model that was trained without retrieval, where there is one
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.evaluation.clip_score import embed_any_size
from racm3_jax.evaluation.copying import count_copied
from racm3_jax.evaluation.document_sets import (
    ShotPool,
    describe_documents,
    describe_pool,
)
from racm3_jax.evaluation.kshot import (
    Episode,
    classify_episodes,
    copy_nearest,
    mislead,
    sample_episodes,
)
from racm3_jax.evaluation.parts import Parts
from racm3_jax.evaluation.perplexity import compute_likelihoods
from racm3_jax.evaluation.protocol import describe_memory, fingerprint_params
from racm3_jax.evaluation.replicas import Replicas
from racm3_jax.evaluation.retrieval import (
    PurgedMemory,
    RandomRetriever,
    find_near_duplicates,
)
from racm3_jax.generation.tasks import Generator
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.types import Document, Modality

VARIANTS = ("retrieval", "no_retrieval", "random", "copy", "twin")
EMBEDDED, RECALL = "embedded", "recall"
Device = Any


@dataclasses.dataclass(frozen=True)
class LikelihoodSettings:
    """How the suite scores.

    Attributes:
      variants: which of "retrieval", "no_retrieval", "random", "copy", "twin" are run.
      num_retrieved: documents before each one.
      query: the part of a document that looks for its neighbours, as in training.
      max_similarity: CLIP similarity of images from which on a document of the memory
        counts as one of the test set and is not retrieved.
      recall_ks: the k of recall@k.
      shots: numbers of demonstrations a label; empty leaves k-shot out.
      num_ways: labels to choose from.
      num_episodes: questions of k-shot.
      seed: of random retrieval and of the questions.
      chunk_size: items that are lost at most when the run is killed.
      num_rows: sequences in one forward pass.
      num_resamples: of the bootstrap.
      num_sheet_rows: of the picture sheet.
    """

    variants: tuple[str, ...] = VARIANTS
    num_retrieved: int = 2
    query: Modality = "text"
    max_similarity: float = 0.95
    recall_ks: tuple[int, ...] = (1, 5, 10)
    shots: tuple[int, ...] = (0, 1, 2)
    num_ways: int = 2
    num_episodes: int = 400
    seed: int = 0
    chunk_size: int = 64
    num_rows: int = 8
    num_resamples: int = 1000
    num_sheet_rows: int = 8

    def __post_init__(self) -> None:
        unknown = sorted(set(self.variants) - set(VARIANTS))
        if unknown or not self.variants:
            raise ValueError(
                f"variants {unknown or 'are missing'}; allowed: {', '.join(VARIANTS)}"
            )
        if self.query not in ("text", "image"):
            raise ValueError(f"query is {self.query!r}; allowed: 'text', 'image'")
        for name in ("num_retrieved", "chunk_size", "num_rows", "num_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")


class LikelihoodProtocol:
    """One run: its models, its documents, its work directory.

    Attributes:
      settings: as given.
      record: all settings and fingerprints; goes into `results.json`.
      parts: the chunks over documents.
      shot_parts: the chunks over questions; None where k-shot is left out.
      num_purged: documents of the memory that are nearly test documents.
    """

    def __init__(
        self,
        generator: Generator,
        documents: Sequence[Document],
        settings: LikelihoodSettings,
        workdir: Path,
        *,
        twin: Generator | None = None,
        pool: ShotPool | None = None,
        class_key: str = "",
        process_index: int = 0,
        process_count: int = 1,
        devices: Sequence[Device] = (None,),
    ) -> None:
        """Embeds the documents (in chunks too) and removes near-duplicates of them.

        Args:
          generator: with a memory.
          documents: the test set.
          settings: how.
          workdir: shared by all processes; what is finished there is kept.
          twin: a model trained without retrieval, with the same tokenizer; None leaves
            that variant out.
          pool: what k-shot shows and asks; None leaves k-shot out.
          class_key: metadata that documents which tell the same thing share ("nation" in
            flagworld): those are the right ones to retrieve. "" asks for the document
            itself, so that the test set must be part of the memory.
          process_index: of this process.
          process_count: processes that share the work.
          devices: of this process, which share its work.

        Raises:
          ValueError: the generator has no memory, or there are no documents.
        """
        if generator.retriever is None or generator.embedder is None:
            raise ValueError("the suite of likelihoods needs a generator with a memory")
        if not documents:
            raise ValueError("there are no documents to score")
        if twin is None:
            kept = tuple(v for v in settings.variants if v != "twin")
            settings = dataclasses.replace(settings, variants=kept)
        self.settings, self.documents = settings, list(documents)
        self.memory, self.tokenizer = generator.retriever.memory, generator.tokenizer
        self._process: dict[str, Any] = {
            "process_index": process_index,
            "process_count": process_count,
            "devices": tuple(devices),
        }
        self._replicas = Replicas(generator, devices)
        self._twins = None if twin is None else Replicas(twin, devices)
        self._pool = pool if settings.shots else None
        self.record: dict[str, Any] = {
            "protocol": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(settings).items()
            },
            "data": describe_documents(documents),
            "kshot_data": None if self._pool is None else describe_pool(self._pool),
            "class_key": class_key,
            "label_score": "calibrated mean",
            "model": fingerprint_params(generator),
            "twin": None if twin is None else fingerprint_params(twin),
            "tokenizer": self.tokenizer.fingerprint(),
            "memory": describe_memory(generator.retriever),
            "retrieval_clip": generator.embedder.fingerprint(),
        }
        self.parts = Parts(workdir, len(documents), settings.chunk_size, self.record)
        self.parts.make(EMBEDDED, self._embed, **self._process)
        self.parts.wait([EMBEDDED])
        self._embedded = embedded = self.parts.load(EMBEDDED)
        rows = find_near_duplicates(
            self.memory, embedded["image"], settings.max_similarity
        )
        self.num_purged = len(rows)
        purged: Any = PurgedMemory(self.memory, rows)
        self._retrievers: dict[str, Any] = {
            "retrieval": Retriever(purged, generator.retriever.strategy),
            "random": RandomRetriever(purged, settings.seed),
        }
        self.right = self._find_right(class_key)
        self.shot_parts = None
        if self._pool is not None:
            self._prepare_shots(self._pool, workdir)

    def run(self, log: Callable[[str], None] = print) -> None:
        """Computes this process's chunks; what is there is kept."""

        def make(name: str, parts: Parts, compute: Callable) -> None:
            started = time.monotonic()
            made = parts.make(name, compute, **self._process)
            log(f"{name}: {made} chunks, {time.monotonic() - started:.0f} s")

        for variant in self.settings.variants:
            compute = self._copy if variant == "copy" else self._score
            make(variant, self.parts, functools.partial(compute, variant))
        make(RECALL, self.parts, self._search)
        for name, episodes in self._questions():
            assert self.shot_parts is not None  # there are questions
            make(name, self.shot_parts, functools.partial(self._classify, episodes))

    def wait(self, log: Callable[[str], None] = print) -> None:
        """Returns when all processes have finished all chunks."""
        self.parts.wait([*self.settings.variants, RECALL], log)
        if self.shot_parts is not None:
            self.shot_parts.wait([name for name, _ in self._questions()], log)

    @property
    def is_first(self) -> bool:
        """Is this the process that writes the results?"""
        return self._process["process_index"] == 0

    def _embed(self, items: range, device: Device) -> dict[str, np.ndarray]:
        embedder = self._replicas.on(device).embedder
        assert embedder is not None  # checked at the start
        found = embedder.embed_documents([self.documents[i] for i in items])
        return found._asdict()

    def _score(
        self, variant: str, items: range, device: Device
    ) -> dict[str, np.ndarray]:
        alone = variant in ("no_retrieval", "twin")
        models = self._twins if variant == "twin" else self._replicas
        assert models is not None  # without a twin that variant is not run
        generator = models.on(device)
        if not alone:
            generator = generator.with_retriever(self._retrievers[variant])
        found = compute_likelihoods(
            generator,
            [self.documents[i] for i in items],
            num_retrieved=0 if alone else self.settings.num_retrieved,
            query=self.settings.query,
            num_rows=self.settings.num_rows,
        )
        return found.sums._asdict() | {"retrieved": found.retrieved}

    def _copy(
        self, variant: str, items: range, device: Device
    ) -> dict[str, np.ndarray]:
        """Counts of ids, and of those that the top retrieved document has right."""
        del variant
        documents = [self.documents[i] for i in items]
        tokenizer = self._replicas.on(device).tokenizer
        mains = list(tokenizer.tokenize(documents))
        queries = self._embedded[self.settings.query][items.start : items.stop]
        found = self._retrievers["retrieval"].retrieve(
            queries, np.ones(len(mains), np.int64), mains
        )
        counts = count_copied(mains, [result.documents for result in found])
        rows = [result.ids.tolist() or [-1] for result in found]
        return counts._asdict() | {"retrieved": np.array(rows, np.int64)}

    def _search(self, items: range, device: Device) -> dict[str, np.ndarray]:
        """What the index itself finds, before any strategy and any purge."""
        del device
        k = min(max(self.settings.recall_ks), self.memory.num_allowed)
        some = slice(items.start, items.stop)
        return {
            name: self.memory.search(self._embedded[name][some], k).ids
            for name in ("text", "image")
        }

    def _find_right(self, class_key: str) -> list[list[int]]:
        """The rows of the memory that each document should find; none for some."""
        if not class_key:
            own = self.memory.find([document.id for document in self.documents])
            return [[int(row)] if row >= 0 else [] for row in own]
        allowed = self.memory.allowed_ids()
        rows: dict[Any, list[int]] = {}
        for row, metadata in zip(allowed, self.memory.metadata(allowed), strict=True):
            if class_key in metadata:
                rows.setdefault(metadata[class_key], []).append(int(row))
        return [rows.get(d.metadata.get(class_key), []) for d in self.documents]

    def _prepare_shots(self, pool: ShotPool, workdir: Path) -> None:
        settings = self.settings
        self.episodes: dict[int, list[Episode]] = {
            shots: sample_episodes(
                pool.classes,
                num_episodes=settings.num_episodes,
                num_shots=shots,
                num_ways=settings.num_ways,
                seed=settings.seed,
            )
            for shots in settings.shots
        }
        chunk_size = settings.chunk_size
        self.shot_parts = Parts(workdir, settings.num_episodes, chunk_size, self.record)

    def _questions(self) -> list[tuple[str, list[Episode]]]:
        if self._pool is None:
            return []
        questions = []
        for shots, episodes in self.episodes.items():
            questions.append((f"kshot-{shots}", episodes))
            if shots:
                others = mislead(episodes, self._pool.classes, self.settings.seed)
                questions.append((f"kshot-{shots}-random", others))
        return questions

    def _classify(
        self, episodes: Sequence[Episode], items: range, device: Device
    ) -> dict[str, np.ndarray]:
        """The chosen label of every question, and the one of the nearest image."""
        assert self._pool is not None  # there are questions
        asked = [episodes[i] for i in items]
        generator = self._replicas.on(device)
        used = {row for e in asked for rows in (*e.shown, (e.asked,)) for row in rows}
        images: Any = {row: self._pool.documents[row].images[0] for row in used}
        probabilities = classify_episodes(
            generator,
            images,
            asked,
            seed=self.settings.seed,
            num_rows=self.settings.num_rows,
            first=items.start,
        )
        nearest = np.full(len(asked), -1)
        if asked[0].shown[0]:
            assert generator.embedder is not None  # checked at the start
            order = sorted(used)
            found = embed_any_size(generator.embedder, [images[r] for r in order])
            nearest = copy_nearest(dict(zip(order, found, strict=True)), asked)
        return {
            "chosen": probabilities.argmax(-1),
            "probabilities": probabilities,
            "nearest": np.array(nearest),
        }
