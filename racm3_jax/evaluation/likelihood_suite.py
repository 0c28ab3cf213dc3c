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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.evaluation import retrieval
from racm3_jax.evaluation.copying import count_copied, read_likelihoods
from racm3_jax.evaluation.document_sets import ShotPool
from racm3_jax.evaluation.fingerprints import (
    describe_documents,
    describe_generator,
    describe_pool,
    fingerprint_params,
)
from racm3_jax.evaluation.intervals import bootstrap
from racm3_jax.evaluation.kshot import ShotQuestions
from racm3_jax.evaluation.parts import Arrays
from racm3_jax.evaluation.perplexity import Likelihoods, compute_likelihoods
from racm3_jax.evaluation.pictures import Panel, Row, memory_panels, save_sheet
from racm3_jax.evaluation.replicas import Replicas
from racm3_jax.evaluation.settings import LikelihoodSettings
from racm3_jax.evaluation.suite import (
    Stage,
    Suite,
    format_rows,
    format_variants,
)
from racm3_jax.generation.tasks import Generator
from racm3_jax.types import Document

RECALL = "recall"


class LikelihoodSuite(Suite):
    """Its models and documents.

    Attributes:
      settings: as given.
      num_removed: documents of the memory that are nearly test documents.
      right: rows of the memory that each document should find; none for some.
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
        **process: Any,
    ) -> None:
        """Embeds the documents (in chunks too) and removes near-duplicates of them.

        Args:
          generator: with a memory.
          documents: the test set.
          settings: how.
          workdir: see `Suite`.
          twin: a model trained without retrieval, with the same tokenizer; None leaves
            that variant out.
          pool: what k-shot shows and asks; None leaves k-shot out.
          class_key: metadata that documents which tell the same thing share: those are
            the right ones to retrieve. "" asks for the document itself, so that the
            test set must be part of the memory.
          **process: see `Suite`.

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
        pool = pool if settings.shots else None
        record = {
            "protocol": dataclasses.asdict(settings),
            "data": describe_documents(documents),
            "kshot_data": None if pool is None else describe_pool(pool),
            "class_key": class_key,
            "label_score": "calibrated mean, labels take turns",
            "twin": None if twin is None else fingerprint_params(twin),
        } | describe_generator(generator)
        super().__init__(
            workdir, record, len(documents), settings.chunk_size, **process
        )
        self.settings, self.documents = settings, list(documents)
        self.memory, self.tokenizer = generator.retriever.memory, generator.tokenizer
        devices = self.process["devices"]
        self._models = Replicas(generator, devices)
        self._embedder = generator.embedder
        self._twins = None if twin is None else Replicas(twin, devices)
        self._embedded = self.finish(Stage("embedded", self.parts, self._embed))
        self._retrievers, self.num_removed = retrieval.without_near_duplicates(
            generator.retriever,
            self._embedded["image"],
            settings.max_similarity,
            settings.seed,
        )
        self.right = retrieval.find_right(self.memory, documents, class_key)
        self._shots = None
        if pool is not None:
            parts = dataclasses.replace(self.parts, num_items=settings.num_episodes)
            self._shots = ShotQuestions(self._models, pool, settings, parts)

    def stages(self) -> list[Stage]:
        """The variants, then the retriever alone, then k-shot."""
        computes: dict[str, Any] = {
            variant: functools.partial(self._score, variant)
            for variant in self.settings.variants
        }
        if "copy" in computes:
            computes["copy"] = self._copy
        computes[RECALL] = self._search
        stages = [Stage(name, self.parts, call) for name, call in computes.items()]
        return stages + (self._shots.stages() if self._shots else [])

    def figures(self) -> dict[str, Any]:
        """Perplexities and bits, accuracies, recalls."""
        results: dict[str, Any] = {}
        for variant in self.settings.variants:
            found = self._load(variant)
            figures = bootstrap(
                found.means,
                len(self.documents),
                num_resamples=self.settings.num_resamples,
                seed=self.settings.seed,
            )
            results |= {f"{variant}/{name}": value for name, value in figures.items()}
            results[f"{variant}/num_retrieved"] = found.num_retrieved
        results |= self._shots.figures() if self._shots else {}
        results |= retrieval.compute_recalls(
            self._embedded,
            self.parts.load(RECALL),
            self.right,
            self.settings.recall_ks,
            self.memory.num_allowed,
            self._embedder.align,
        )
        results["num_near_duplicates_removed"] = self.num_removed
        return results

    def _load(self, variant: str) -> Likelihoods:
        return read_likelihoods(self.parts.load(variant), self.tokenizer.vocab)

    def format_table(self, results: Mapping[str, Any]) -> str:
        """Three tables: language modelling, k-shot, the retriever."""
        title = f"{len(self.documents)} documents"
        lines = [*format_variants(title, self.settings.variants, results), ""]
        if self._shots:
            lines += [*self._shots.format_table(results), ""]
        rows = {
            name.removeprefix("recall/"): [results[name], results[f"{name}/chance"]]
            for name in results
            if name.startswith("recall/") and "/chance" not in name
        }
        lines += [*format_rows(["the retriever", "recall", "chance"], rows), ""]
        lines.append(f"near-duplicates removed from the memory: {self.num_removed}")
        return "\n".join(lines)

    def write_images(self) -> None:
        """Text | image, with its bits by each variant | what was put before it."""
        found = {v: self._load(v) for v in self.settings.variants}
        shown = [v for v in ("retrieval", "random", "copy") if v in found]
        chosen = [i for i, d in enumerate(self.documents) if d.images]
        rows = []
        for i in chosen[: self.settings.num_sheet_rows]:
            means = {v: f.means(np.array([i])) for v, f in found.items()}
            words = "; ".join(
                f"{v} {m.get('bits_per_image', 0.0):.0f} bits" for v, m in means.items()
            )
            groups = [[Panel(self.documents[i].images[0], words)]]
            groups += [
                memory_panels(self.memory, self.tokenizer, found[v].retrieved[i])
                for v in shown
            ]
            rows.append(Row(self.documents[i].text, groups))
        if rows:
            path = self.parts.workdir / "samples.png"
            save_sheet(path, ("text", "image", *shown), rows)

    def _embed(self, items: range, device: Any) -> Arrays:
        embedder = self._models.on(device).embedder
        assert embedder is not None  # checked at the start
        chosen = [self.documents[i] for i in items]
        return embedder.embed_documents(chosen)._asdict()

    def _score(self, variant: str, items: range, device: Any) -> Arrays:
        alone = variant in ("no_retrieval", "twin")
        models = self._twins if variant == "twin" else self._models
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

    def _copy(self, items: range, device: Any) -> Arrays:
        """Counts of tokens, and of those that the top retrieved document has right."""
        documents = [self.documents[i] for i in items]
        mains = list(self._models.on(device).tokenizer.tokenize(documents))
        queries = self._embedded[self.settings.query][items.start : items.stop]
        found = self._retrievers["retrieval"].retrieve(
            queries, np.ones(len(mains), np.int64), mains
        )
        counts = count_copied(mains, [result.documents for result in found])
        rows = retrieval.stack_rows([result.ids.tolist() for result in found], 1)
        return counts._asdict() | {"retrieved": rows}

    def _search(self, items: range, device: Any) -> Arrays:
        """What the index itself finds, before any strategy and any removal."""
        del device
        k = min(max(self.settings.recall_ks), self.memory.num_allowed)
        some = slice(items.start, items.stop)
        return {
            name: self.memory.search(self._embedded[name][some], k).ids
            for name in ("text", "image")
        }
