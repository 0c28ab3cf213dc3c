"""The COCO protocols: from files to `results.json`, in chunks, next to its baselines.

    text_to_image   30,000 captions are drawn; drawn and real images are compared
    captioning      the Karpathy test images are captioned; captions are compared

Every figure is reported next to the same figure of

    no_retrieval    the same model with nothing before the prompt
    copy            the top retrieved document's own image or caption
    random          documents that have nothing to do with the prompt

Images of the memory that are nearly test images are never retrieved, and counted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jaxtyping import Float32, Int64, UInt8

from racm3_jax import own_files
from racm3_jax.documents.images import read_image
from racm3_jax.evaluation.clip_score import CLIPScorer
from racm3_jax.evaluation.coco import (
    CocoItem,
    fingerprint_files,
    fingerprint_items,
)
from racm3_jax.evaluation.parts import Parts
from racm3_jax.evaluation.replicas import Replicas
from racm3_jax.evaluation.retrieval import (
    PurgedMemory,
    RandomRetriever,
    find_near_duplicates,
)
from racm3_jax.generation.tasks import Generator
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.types import GenerationOutput

Task = Literal["text_to_image", "captioning"]
VARIANTS = ("retrieval", "no_retrieval", "copy", "random")
REAL = "real"


class FeatureExtractor(Protocol):
    """`InceptionFeatures` or `CLIPFeatures`."""

    def __call__(
        self, images: Sequence[UInt8[np.ndarray, "height width 3"]]
    ) -> Float32[np.ndarray, "images d"]:
        """One row an image."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the features depend on."""
        ...


@dataclasses.dataclass(frozen=True)
class ProtocolSettings:
    """How a COCO protocol samples and computes.

    Attributes:
      task: "text_to_image" or "captioning".
      image_size: side that real images are cut and resampled to (256 in the paper).
      variants: which of "retrieval", "no_retrieval", "copy", "random" are run.
      num_retrieved: documents before each prompt.
      num_samples: drawn for each prompt; the best by the retrieval CLIP (images) or by
        likelihood (captions) is kept. The paper draws 10 and 32.
      temperature, top_p: of the sampling.
      prefix: begins every caption ("Photo of" in the paper).
      max_similarity: CLIP similarity from which on an image of the memory counts as a test
        image and is not retrieved.
      seed: item i has the seed `seed + i`.
      chunk_size: items that are lost at most when the run is killed.
      num_resamples: of the bootstrap of captions and CLIPScores.
      num_distance_resamples: of the bootstrap of Fréchet distances, which are slow.
      num_sheet_rows: of the picture sheet.
    """

    task: Task
    image_size: int = 256
    variants: tuple[str, ...] = VARIANTS
    num_retrieved: int = 2
    num_samples: int = 10
    temperature: float = 1.0
    top_p: float = 0.9
    prefix: str = ""
    max_similarity: float = 0.95
    seed: int = 0
    chunk_size: int = 64
    num_resamples: int = 1000
    num_distance_resamples: int = 20
    num_sheet_rows: int = 8

    def __post_init__(self) -> None:
        if self.task not in ("text_to_image", "captioning"):
            raise ValueError(
                f"task is {self.task!r}; allowed: 'text_to_image', 'captioning'"
            )
        unknown = sorted(set(self.variants) - set(VARIANTS))
        if unknown or not self.variants:
            raise ValueError(
                f"variants {unknown or 'are missing'}; allowed: {', '.join(VARIANTS)}"
            )
        if self.chunk_size < 1 or self.num_retrieved < 1:
            raise ValueError("chunk_size and num_retrieved must be >= 1")


class CocoProtocol:
    """One run: its models, its list of images, its work directory.

    Attributes:
      settings: as given.
      record: all settings and fingerprints; goes into `results.json`.
      parts: the chunks of the variants.
      reference: those of the real images.
      num_purged: images of the memory that are nearly test images.
    """

    def __init__(
        self,
        generator: Generator,
        items: Sequence[CocoItem],
        settings: ProtocolSettings,
        workdir: Path,
        *,
        extractors: Mapping[str, FeatureExtractor] | None = None,
        scorer: CLIPScorer | None = None,
        reference: Path | None = None,
        process_index: int = 0,
        process_count: int = 1,
        devices: Sequence[Any] = (None,),
    ) -> None:
        """Embeds the test images (in chunks too) and removes near-duplicates of them.

        Args:
          generator: with a memory.
          items: the fixed list.
          settings: how.
          workdir: shared by all processes; what is finished there is kept.
          extractors: networks of the Fréchet distances, by the name they have in results.
          scorer: of CLIPScore.
          reference: folder of what is computed of the real images, which runs may share;
            None puts it into the work directory.
          process_index: of this process.
          process_count: processes that share the work.
          devices: of this process, which share its work.

        Raises:
          ValueError: the generator has no memory.
        """
        if generator.retriever is None or generator.embedder is None:
            raise ValueError("the COCO protocols need a generator with a memory")
        self.settings, self.items = settings, list(items)
        self.extractors, self.scorer = dict(extractors or {}), scorer
        self._process: dict[str, Any] = {
            "process_index": process_index,
            "process_count": process_count,
            "devices": tuple(devices),
        }
        self._replicas = Replicas(generator, devices)
        self._tokenizer, retriever = generator.tokenizer, generator.retriever
        self.record: dict[str, Any] = {
            "protocol": dataclasses.asdict(settings)
            | {"variants": list(settings.variants)},
            "data": {"num_items": len(items), "fingerprint": fingerprint_items(items)},
            "model": fingerprint_params(generator),
            "tokenizer": generator.tokenizer.fingerprint(),
            "memory": describe_memory(retriever),
            "retrieval_clip": generator.embedder.fingerprint(),
            "features": {n: dict(e.settings) for n, e in self.extractors.items()},
            "clip_score": None
            if scorer is None
            else scorer.settings(generator.embedder),
        }
        self.parts = Parts(workdir, len(items), settings.chunk_size, self.record)
        self.reference = self._open_reference(reference or workdir / "reference")
        self.reference.make(REAL, self._read_real, **self._process)
        self.reference.wait([REAL])
        real = self.reference.load(REAL)
        digest = hashlib.sha256("".join(real["sha256"].tolist()).encode())
        self.pixels_fingerprint = digest.hexdigest()[:16]
        rows = find_near_duplicates(
            retriever.memory, real["embedding"], settings.max_similarity
        )
        self.num_purged = len(rows)
        memory: Any = PurgedMemory(retriever.memory, rows)
        self._retriever = Retriever(memory, retriever.strategy)
        self._random: Any = RandomRetriever(memory, settings.seed)

    def _open_reference(self, folder: Path) -> Parts:
        """What is computed of the real images, in a folder named by all it depends on.

        Runs of other models, memories and samplings find it there and do not compute it
        again.
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
        num_items, chunk_size = len(self.items), self.settings.chunk_size
        parts = Parts(folder, num_items, chunk_size, depends_on)
        return dataclasses.replace(parts, workdir=folder / parts.fingerprint)

    def run(self, log: Callable[[str], None] = print) -> None:
        """Computes this process's chunks of every variant; what is there is kept."""
        compute = {
            "text_to_image": self._draw_chunk,
            "captioning": self._caption_chunk,
        }[self.settings.task]
        for variant in self.settings.variants:
            started = time.monotonic()

            one = functools.partial(compute, variant)
            made = self.parts.make(variant, one, **self._process)
            log(f"{variant}: {made} chunks, {time.monotonic() - started:.0f} s")

    def wait(self, log: Callable[[str], None] = print) -> None:
        """Returns when all processes have finished all chunks."""
        self.parts.wait(self.settings.variants, log)

    @property
    def is_first(self) -> bool:
        """Is this the process that writes the results?"""
        return self._process["process_index"] == 0

    def image_path(self, variant: str, position: int) -> Path:
        """Where the picture that was drawn for an item is kept."""
        name = f"{self.items[position].image_id}.png"
        return self.parts.workdir / "images" / variant / name

    def read_drawn(self, variant: str, position: int) -> np.ndarray:
        return read_image(self.image_path(variant, position))

    def read_retrieved(self, rows: Int64[np.ndarray, " k"]) -> np.ndarray:
        """The image of the best of these rows of the memory; grey where there is none."""
        if rows[0] >= 0:
            (document,) = self._retriever.memory.documents(rows[:1])
            images = self._tokenizer.decode(document).images
            if images:
                return images[-1]
        return np.full((8, 8, 3), 236, np.uint8)

    def _read_real(self, items: range, device: Any) -> dict[str, np.ndarray]:
        chosen = [self.items[i] for i in items]
        images = [item.read(self.settings.image_size) for item in chosen]
        return {
            "sha256": np.array(
                [hashlib.sha256(x.tobytes()).hexdigest() for x in images]
            ),
            "embedding": self._embedder(device).embed_images(np.stack(images)),
            **self._judge(images, [item.caption for item in chosen]),
        }

    def _judge(
        self, images: Sequence[np.ndarray], captions: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Features and CLIPScores; captions alone are compared for the other task."""
        if self.settings.task != "text_to_image":
            return {}
        found = {f"features_{n}": e(images) for n, e in self.extractors.items()}
        if self.scorer is not None:
            found["clip_score"] = self.scorer.score(images, captions)
        return found

    def _draw_chunk(
        self, variant: str, items: range, device: Any
    ) -> dict[str, np.ndarray]:
        captions = [self.items[i].caption for i in items]
        paths = [self.image_path(variant, i) for i in items]
        own_files.check(*paths, change="give another --workdir")
        if variant == "copy":
            images, rows = self._top_retrieved_images(captions, device)
        else:
            outputs = self._variant(variant, device).text_to_image_batch(
                captions,
                seed=self._seeds(items),
                num_retrieved=self._num_retrieved(variant),
                rank_by="clip",  # as the paper, whatever CLIP it is
                **self._sampling(),
            )
            images = [output.images[0] for output in outputs]
            rows = self._rows(outputs)
        for path, image in zip(paths, images, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            own_files.write_png(path, image)
        return {"retrieved": rows, **self._judge(images, captions)}

    def _caption_chunk(
        self, variant: str, items: range, device: Any
    ) -> dict[str, np.ndarray]:
        images = [self.items[i].read(self.settings.image_size) for i in items]
        if variant == "copy":
            queries = self._embedder(device).embed_images(np.stack(images))
            found = self._retrieve_one(queries)
            documents = [self._tokenizer.decode(d) for _, d in found]
            texts = [document.text for document in documents]
            rows = self._pad_rows([[row] for row, _ in found])
        else:
            outputs = self._variant(variant, device).caption_batch(
                images,
                seed=self._seeds(items),
                num_retrieved=self._num_retrieved(variant),
                prefix=self.settings.prefix,
                num_candidates=0,
                guidance=1.0,
                **self._sampling(),
            )
            texts = [output.texts[0] for output in outputs]
            rows = self._rows(outputs)
        return {"retrieved": rows, "text": np.array(texts, np.str_)}

    def _variant(self, variant: str, device: Any) -> Generator:
        retriever = self._random if variant == "random" else self._retriever
        return self._replicas.on(device).with_retriever(retriever)

    def _embedder(self, device: Any) -> DocumentEmbedder:
        embedder = self._replicas.on(device).embedder
        assert embedder is not None  # checked at the start
        return embedder

    def _num_retrieved(self, variant: str) -> int:
        return 0 if variant == "no_retrieval" else self.settings.num_retrieved

    def _sampling(self) -> dict[str, Any]:
        names = ("num_samples", "temperature", "top_p")
        return {name: getattr(self.settings, name) for name in names}

    def _seeds(self, items: range) -> list[int]:
        return [self.settings.seed + i for i in items]

    def _rows(self, outputs: Sequence[GenerationOutput]) -> Int64[np.ndarray, "n k"]:
        return self._pad_rows([output.retrieved.ids.tolist() for output in outputs])

    def _pad_rows(self, found: Sequence[Sequence[int]]) -> Int64[np.ndarray, "n k"]:
        """Rows of the memory; -1 where fewer documents were found."""
        rows = np.full((len(found), self.settings.num_retrieved), -1, np.int64)
        for row, ids in zip(rows, found, strict=True):
            row[: len(ids)] = ids
        return rows

    def _retrieve_one(self, queries: np.ndarray) -> list[tuple[int, Any]]:
        """The best document of each query.

        Raises:
          ValueError: if the strategy drops every document for a query.
        """
        nums = np.ones(len(queries), np.int64)
        found = self._retriever.retrieve(queries, nums, [None] * len(queries))
        if any(not result.documents for result in found):
            raise ValueError(
                "nothing was retrieved for some item, so there is nothing to copy: raise "
                "strategy.max_candidates, or leave 'copy' out of the variants"
            )
        return [(int(result.ids[0]), result.documents[0]) for result in found]

    def _top_retrieved_images(
        self, captions: Sequence[str], device: Any
    ) -> tuple[list[np.ndarray], Int64[np.ndarray, "n k"]]:
        found = self._retrieve_one(self._embedder(device).embed_texts(list(captions)))
        images = [self._tokenizer.decode(d).images[-1] for _, d in found]
        return images, self._pad_rows([[row] for row, _ in found])


def describe_memory(retriever: Retriever) -> dict[str, Any]:
    """What results depend on: the content, what was removed from it, the strategy."""
    allowed = np.ascontiguousarray(retriever.memory.allowed_ids())
    return {
        "fingerprint": retriever.memory.fingerprint(),
        "num_documents": len(retriever.memory),
        "allowed": hashlib.sha256(allowed.tobytes()).hexdigest()[:16],
        "strategy": dataclasses.asdict(retriever.strategy),
    }


def fingerprint_params(generator: Generator) -> str:
    """Equal for models with equal parameters and shapes."""
    digest = hashlib.sha256(str(generator.model.config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(generator.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]
