"""COCO's images captioned: captions are compared with those of people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from racm3_jax.evaluation.captions import score_captions, score_with_java, strip_prefix
from racm3_jax.evaluation.coco_suite import CocoSuite
from racm3_jax.evaluation.intervals import bootstrap
from racm3_jax.evaluation.parts import Arrays
from racm3_jax.evaluation.pictures import BLANK, Panel, memory_panels


class CocoCaptioning(CocoSuite):
    """CIDEr-D and the other scores of captions."""

    def compute(self, variant: str, items: range, device: Any) -> Arrays:
        """Captions the images, or copies the texts of what they retrieve."""
        images = [self.items[i].read(self.settings.image_size) for i in items]
        if variant == "copy":
            queries = self.embedder(device).embed_images(np.stack(images))
            found = self.find_first(queries)
            texts = [self.tokenizer.decode(f.documents[0]).text for f in found]
        else:
            outputs = self.model(variant, device).caption_batch(
                images,
                prefix=self.settings.prefix,
                **self.sampling(variant, items),
            )
            texts = [output.texts[0] for output in outputs]
            found = [output.retrieved for output in outputs]
        return self.rows(found) | {"text": np.array(texts, np.str_)}

    def judge(
        self, images: Sequence[np.ndarray], captions: Sequence[str]
    ) -> Mapping[str, np.ndarray]:
        """Nothing: images are not compared."""
        return {}

    def score(self, made: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Scores of captions. The prompt's words are none, also where a copied one has them."""
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
        """The caption, under the first document that was retrieved."""
        memory = self.retrievers["retrieval"].memory
        found = memory_panels(memory, self.tokenizer, made["retrieved"][i, :1])
        return Panel(found[0].image if found else BLANK, str(made["text"][i]))
