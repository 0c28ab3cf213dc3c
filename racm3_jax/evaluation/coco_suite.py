"""The suite of MS-COCO: images for 30,000 captions, or captions of the Karpathy test images.

    text_to_image   compares generated and real images
    captioning      compares captions and references

Every figure is reported next to the same figure of

    no_retrieval    the same model without documents
    copy            the image or caption of the top retrieved document
    random          random documents, unrelated to the prompt

Near-duplicates of test images in the memory are never retrieved; the suite counts them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.evaluation.clip_score import CLIPScorer
from racm3_jax.evaluation.coco import CocoItem, fingerprint_files, fingerprint_items
from racm3_jax.evaluation.features import FeatureExtractor
from racm3_jax.evaluation.fingerprints import describe_generator
from racm3_jax.evaluation.intervals import Estimate, bootstrap
from racm3_jax.evaluation.parts import Arrays, Parts
from racm3_jax.evaluation.pictures import Panel, Row, save_sheet
from racm3_jax.evaluation.replicas import Replicas
from racm3_jax.evaluation.retrieval import stack_rows, without_near_duplicates
from racm3_jax.evaluation.settings import CocoSettings
from racm3_jax.evaluation.suite import Stage, Suite, format_variants
from racm3_jax.generation.tasks import Generator
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.types import Retrieved

REAL = "real"


class CocoSuite(Suite):
    """The models and the list of images.

    Attributes:
      settings: as given.
      reference: chunks of the real images.
      num_removed: near-duplicates of test images in the memory.
    """

    def __init__(
        self,
        generator: Generator,
        items: Sequence[CocoItem],
        settings: CocoSettings,
        workdir: Path,
        *,
        extractors: Mapping[str, FeatureExtractor] | None = None,
        scorer: CLIPScorer | None = None,
        reference: Path | None = None,
        **process: Any,
    ) -> None:
        """Embeds the test images (in chunks too) and removes near-duplicates of them.

        Args:
          generator: with a memory.
          items: the fixed list.
          settings: of the suite.
          workdir: see `Suite`.
          extractors: networks of the Fréchet distances, by their names in results.
          scorer: of CLIPScore.
          reference: folder for the features of the real images, which runs may share;
            None is the work directory.
          **process: see `Suite`.

        Raises:
          ValueError: the generator has no memory.
        """
        if generator.retriever is None or generator.embedder is None:
            raise ValueError("the COCO suite needs a generator with a memory")
        self.settings, self.items = settings, list(items)
        self.extractors, self.scorer = dict(extractors or {}), scorer
        scored = None if scorer is None else scorer.settings(generator.embedder)
        record = {
            "protocol": dataclasses.asdict(settings),
            "data": {"num_items": len(items), "fingerprint": fingerprint_items(items)},
            "features": {n: dict(e.settings) for n, e in self.extractors.items()},
            "clip_score": scored,
        } | describe_generator(generator)
        super().__init__(workdir, record, len(items), settings.chunk_size, **process)
        self._models = Replicas(generator, self.process["devices"])
        self.tokenizer = generator.tokenizer
        self.reference = self._open_reference(reference or workdir / "reference")
        real = self.finish(Stage(REAL, self.reference, self._read_real))
        digest = hashlib.sha256("".join(real["sha256"].tolist()).encode())
        self.facts["pixels"] = digest.hexdigest()[:16]
        self.retrievers, self.num_removed = without_near_duplicates(
            generator.retriever,
            real["embedding"],
            settings.max_similarity,
            settings.seed,
        )

    def _open_reference(self, folder: Path) -> Parts:
        """Opens the features of the real images, in a folder named by their settings.

        Runs with other models, memories and sampling settings reuse them.
        """
        scorer = self.record["clip_score"] or {}
        depends_on = {
            "task": self.settings.task,
            "image_size": self.settings.image_size,
            "chunk_size": self.settings.chunk_size,
            "data": self.record["data"] | {"files": fingerprint_files(self.items)},
            "features": self.record["features"],
            "clip_score": {n: scorer.get(n) for n in ("clip", "prompt")},
            "retrieval_clip": self.record["retrieval_clip"],
        }
        parts = dataclasses.replace(self.parts, workdir=folder, settings=depends_on)
        return dataclasses.replace(parts, workdir=folder / parts.fingerprint)

    def judge(
        self, images: Sequence[np.ndarray], captions: Sequence[str]
    ) -> Mapping[str, np.ndarray]:
        """The features for comparing real images, one row per image."""
        raise NotImplementedError

    def compute(self, variant: str, items: range, device: Any) -> Arrays:
        """The outputs of a variant for some items."""
        raise NotImplementedError

    def score(self, made: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Figures of a variant's outputs."""
        raise NotImplementedError

    def show(self, variant: str, i: int, made: Mapping[str, np.ndarray]) -> Panel:
        """A variant's output for an item, for the sheet."""
        raise NotImplementedError

    def stages(self) -> list[Stage]:
        """One stage per variant."""
        return [
            Stage(variant, self.parts, functools.partial(self.compute, variant))
            for variant in self.settings.variants
        ]

    def figures(self) -> dict[str, Any]:
        """The figures of every variant, by "variant/name"."""
        results: dict[str, Any] = {"num_near_duplicates_removed": self.num_removed}
        for variant in self.settings.variants:
            found = self.score(self.parts.load(variant))
            results |= {f"{variant}/{name}": value for name, value in found.items()}
        return results

    def format_table(self, results: Mapping[str, Any]) -> str:
        """One row per figure, one column per variant."""
        title = f"{self.settings.task}, {len(self.items)} images"
        lines = format_variants(title, self.settings.variants, results)
        lines.append(f"\nnear-duplicates removed from the memory: {self.num_removed}")
        return "\n".join(lines)

    def write_images(self) -> None:
        """Caption | the real image | the output of each variant."""
        made = {v: self.parts.load(v) for v in self.settings.variants}
        rows = []
        for i, item in enumerate(self.items[: self.settings.num_sheet_rows]):
            groups = [[Panel(item.read(self.settings.image_size))]]
            groups += [[self.show(v, i, columns)] for v, columns in made.items()]
            rows.append(Row(item.caption, groups))
        if rows:
            path = self.parts.workdir / "samples.png"
            save_sheet(path, ("caption", "real", *self.settings.variants), rows)

    def mean(self, name: str, values: np.ndarray) -> dict[str, Estimate]:
        """The mean with its interval, by name."""
        return bootstrap(
            lambda rows: {name: float(values[rows].mean(dtype=np.float64))},
            len(values),
            num_resamples=self.settings.num_resamples,
            seed=self.settings.seed,
        )

    def _read_real(self, items: range, device: Any) -> Arrays:
        chosen = [self.items[i] for i in items]
        images = [item.read(self.settings.image_size) for item in chosen]
        hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        return {
            "sha256": np.array(hashes),
            "embedding": self.embedder(device).embed_images(np.stack(images)),
            **self.judge(images, [item.caption for item in chosen]),
        }

    def model(self, variant: str, device: Any) -> Generator:
        """The copy on a device, with the documents of a variant."""
        name = "random" if variant == "random" else "retrieval"
        return self._models.on(device).with_retriever(self.retrievers[name])

    def embedder(self, device: Any) -> DocumentEmbedder:
        """The CLIP that retrieves, on a device."""
        embedder = self._models.on(device).embedder
        assert embedder is not None  # checked at the start
        return embedder

    def sampling(self, variant: str, items: range) -> dict[str, Any]:
        """The sampling arguments of a variant for some items."""
        settings = self.settings
        alone = variant == "no_retrieval"
        return {
            "seed": [settings.seed + i for i in items],
            "num_retrieved": 0 if alone else settings.num_retrieved,
            "num_samples": settings.num_samples,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        }

    def rows(self, found: Sequence[Retrieved]) -> dict[str, np.ndarray]:
        """The rows of the memory before each item."""
        width = self.settings.num_retrieved
        return {"retrieved": stack_rows([f.ids.tolist() for f in found], width)}

    def find_first(self, queries: np.ndarray) -> list[Retrieved]:
        """The best document of each query.

        Raises:
          ValueError: if the strategy drops every document for a query.
        """
        nums = np.ones(len(queries), np.int64)
        found = self.retrievers["retrieval"].retrieve(
            queries, nums, [None] * len(queries)
        )
        if any(not result.documents for result in found):
            raise ValueError(
                "nothing was retrieved for some item, so there is nothing to copy: raise "
                "strategy.max_candidates, or leave 'copy' out of the variants"
            )
        return found
