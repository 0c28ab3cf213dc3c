"""Text to image and captioning on COCO: the parts that each task adds to `CocoSuite`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax import own_files
from racm3_jax.documents.images import read_image
from racm3_jax.evaluation.captions import score_captions, score_with_java, strip_prefix
from racm3_jax.evaluation.coco_suite import REAL, CocoSuite
from racm3_jax.evaluation.features import compute_distances, open_statistics
from racm3_jax.evaluation.intervals import bootstrap
from racm3_jax.evaluation.parts import Arrays
from racm3_jax.evaluation.pictures import BLANK, Panel, memory_panels


class CocoTextToImage(CocoSuite):
    """Fréchet distances and CLIPScores of generated images."""

    def compute(self, variant: str, items: range, device: Any) -> Arrays:
        """Generates images of the captions, or copies the images of retrieved documents."""
        captions = [self.items[i].caption for i in items]
        paths = [self.image_path(variant, i) for i in items]
        own_files.check(*paths, change="give another --workdir")
        if variant == "copy":
            found = self.find_first(self.embedder(device).embed_texts(captions))
            documents = [self.tokenizer.decode(f.documents[0]) for f in found]
            images = [document.images[-1] for document in documents]
        else:
            outputs = self.model(variant, device).text_to_image_batch(
                captions,
                rank_by="clip",  # as the paper, whatever CLIP it is
                **self.sampling(variant, items),
            )
            images = [output.images[0] for output in outputs]
            found = [output.retrieved for output in outputs]
        for path, image in zip(paths, images, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            own_files.write_png(path, image)
        return self.rows(found) | self.judge(images, captions)

    def judge(
        self, images: Sequence[np.ndarray], captions: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Features and CLIPScores."""
        found = {f"features_{n}": e(images) for n, e in self.extractors.items()}
        if self.scorer is not None:
            found["clip_score"] = self.scorer.score(images, captions)
        return found

    def figures(self) -> dict[str, Any]:
        """The figures, also of the real images."""
        real = self.reference.load(REAL)
        found = {}
        if "clip_score" in real:
            found["real/clip_score"] = self.mean("", real["clip_score"])[""]
        return super().figures() | found

    def score(self, made: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Distances and CLIPScores."""
        real = self.reference.load(REAL)
        figures: dict[str, Any] = {}
        for name, extractor in self.extractors.items():
            key = f"features_{name}"
            # Next to the chunks that they summarise, in the folder that runs may share.
            path = self.reference.workdir / f"statistics_{name}.npz"
            about = {**extractor.settings, "pixels": self.facts["pixels"]}
            figures |= compute_distances(
                name,
                open_statistics(path, about, real[key]),
                real[key],
                made[key],
                num_resamples=self.settings.num_distance_resamples,
                seed=self.settings.seed,
            )
        if "clip_score" in made:
            figures |= self.mean("clip_score", made["clip_score"])
        return figures

    def show(self, variant: str, i: int, made: Mapping[str, np.ndarray]) -> Panel:
        """The generated image."""
        return Panel(read_image(self.image_path(variant, i)))

    def image_path(self, variant: str, position: int) -> Path:
        """The path of the generated image of an item."""
        name = f"{self.items[position].image_id}.png"
        return self.parts.workdir / "images" / variant / name


class CocoCaptioning(CocoSuite):
    """CIDEr-D and the other scores of captions."""

    def compute(self, variant: str, items: range, device: Any) -> Arrays:
        """Captions the images, or copies the texts of retrieved documents."""
        images = [self.items[i].read(self.settings.image_size) for i in items]
        if variant == "copy":
            queries = self.embedder(device).embed_images(np.stack(images))
            found = self.find_first(queries)
            texts = [self.tokenizer.decode(f.documents[0]).text for f in found]
        else:
            outputs = self.model(variant, device).caption_batch(
                images,
                prefix=self.settings.prefix,
                num_candidates=0,
                guidance=1.0,
                **self.sampling(variant, items),
            )
            texts = [output.texts[0] for output in outputs]
            found = [output.retrieved for output in outputs]
        return self.rows(found) | {"text": np.array(texts, np.str_)}

    def judge(
        self, images: Sequence[np.ndarray], captions: Sequence[str]
    ) -> Mapping[str, np.ndarray]:
        """No features: images are not compared."""
        return {}

    def score(self, made: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Scores of captions, without the prompt's words, also in copied captions."""
        prefix = self.settings.prefix
        texts = [strip_prefix(text, prefix) for text in made["text"].tolist()]
        references = [item.captions for item in self.items]
        figures = bootstrap(
            score_captions(texts, references).means,
            len(texts),
            num_resamples=self.settings.num_resamples,
            seed=self.settings.seed,
        )
        for name, values in score_with_java(texts, references).items():
            figures |= self.mean(name, values)
        return figures

    def show(self, variant: str, i: int, made: Mapping[str, np.ndarray]) -> Panel:
        """The caption, under the first retrieved document."""
        memory = self.retrievers["retrieval"].memory
        found = memory_panels(memory, self.tokenizer, made["retrieved"][i, :1])
        return Panel(found[0].image if found else BLANK, str(made["text"][i]))
