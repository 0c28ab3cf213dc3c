"""`Generator`: every task of the paper, one method each.

    prompts -> query embeddings -> retrieved documents -> prompts in ids -> sample -> out

`runner.run_task` does each of these once for all prompts of a batch (and the decode in
chunks of `max_rows`), the same way for all tasks; a task's own module says what differs.
The single forms are batches of one, so both give the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
from jaxtyping import Float32, UInt8

from racm3_jax.generation import (
    captioning,
    classification,
    drawing,
    infilling,
    interleaving,
    rerank,
)
from racm3_jax.generation.attribution import attribute_sample
from racm3_jax.generation.captioning import CaptionPrompt
from racm3_jax.generation.classification import Classification, ClassifyBy, Example
from racm3_jax.generation.engine import Engine
from racm3_jax.generation.infilling import RegionPrompt
from racm3_jax.generation.regions import Region
from racm3_jax.generation.requests import Asked, Documents, Given, Image, check_image
from racm3_jax.generation.runner import run_task
from racm3_jax.generation.sample import OnProgress, Progress
from racm3_jax.generation.settings import RankBy, SamplingSettings
from racm3_jax.types import GenerationOutput


class Generator(Engine):
    """Draws, captions, fills in, edits and classifies, with or without documents.

    Common arguments of the tasks:
      num_samples: samples of each prompt or image, returned best first.
      num_retrieved: documents of the memory before the prompt (2 in the paper); 0 asks
        the model alone.
      seed: reproduces the samples. In a batch, item i has the seed `seed + i` (or the
        i-th of a list), and alone with that seed gives the same samples.
      documents: hand-picked documents instead of retrieved ones, shared by the batch;
        an empty list is the same as `num_retrieved=0`.
      rank_by: "clip" (similarity of prompt and image; without an embedder, or without a
        prompt, the likelihood), "document" (similarity to the picture of the first
        document), "likelihood" (mean log-likelihood of the sampled tokens) or "auto" (by
        the CLIP if it was measured to align texts with images, else by likelihood).
      **settings: see `SamplingConfig`; top_p is 0.9 unless given.
      **options: the further arguments of the batched form.

    All raise ValueError, in one sentence, on what cannot be.
    """

    def text_to_image(
        self,
        prompt: str,
        num_samples: int = 1,
        num_retrieved: int = 2,
        seed: int = 0,
        documents: Documents | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Draws what the prompt says (RA-CM3, section 4: the caption is the query)."""
        options |= {"num_samples": num_samples, "num_retrieved": num_retrieved}
        return self.text_to_image_batch(
            [prompt], seed=[seed], documents=documents, **options
        )[0]

    def text_to_image_batch(
        self,
        prompts: Sequence[str],
        *,
        num_samples: int = 1,
        num_retrieved: int = 2,
        seed: int | Sequence[int] = 0,
        documents: Documents | None = None,
        rank_by: RankBy = "auto",
        on_progress: OnProgress | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> list[GenerationOutput]:
        """Draws every prompt; `preview` shows what `on_progress` is called with."""
        return run_task(
            self,
            len(prompts),
            lambda: drawing.make_task(self, prompts),
            Given(num_retrieved, documents),
            Asked(num_samples, seed, settings, rank_by, on_progress),
        )

    def preview(self, progress: Progress) -> UInt8[np.ndarray, "n s h w 3"]:
        """The pictures that are being drawn, `[prompt, sample]`; grey is still to come."""
        return drawing.preview_images(self, progress.tokens)

    def attribute(
        self, output: GenerationOutput, sample: int = 0
    ) -> Float32[np.ndarray, " documents"]:
        """Bits by which each document of an output makes a sample likelier.

        Leave-one-out (see `attribution`); for images and captions.
        """
        return attribute_sample(self, output, sample)

    def continue_(
        self,
        prompt: str,
        demonstrations: Documents,
        num_samples: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> GenerationOutput:
        """Controlled generation: draws as one or two demonstrations do (section 5)."""
        options |= {"num_samples": num_samples, "seed": [seed]}
        return self.continue_batch([prompt], [demonstrations], **options)[0]

    def continue_batch(
        self,
        prompts: Sequence[str],
        demonstrations: Sequence[Documents],
        *,
        num_samples: int = 1,
        seed: int | Sequence[int] = 0,
        num_neighbours: int = 0,
        rank_by: RankBy = "auto",
        on_progress: OnProgress | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> list[GenerationOutput]:
        """Draws every prompt after its own demonstrations.

        Behind them stand the `num_neighbours` documents of the memory that are most like
        them, as far as the retriever's strategy takes such.
        """
        return run_task(
            self,
            len(prompts),
            lambda: drawing.make_task(self, prompts, "continue"),
            Given(
                num_neighbours, None, demonstrations, "demonstration", "num_neighbours"
            ),
            Asked(num_samples, seed, settings, rank_by, on_progress),
        )

    def caption(
        self,
        image: Image,
        num_samples: int = 1,
        num_retrieved: int = 2,
        seed: int = 0,
        documents: Documents | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Describes an image (RA-CM3, section 4: the image is the query)."""
        options |= {"num_samples": num_samples, "num_retrieved": num_retrieved}
        return self.caption_batch([image], seed=[seed], documents=documents, **options)[
            0
        ]

    def caption_batch(
        self,
        images: Sequence[Image],
        *,
        num_samples: int = 1,
        num_retrieved: int = 2,
        seed: int | Sequence[int] = 0,
        documents: Documents | None = None,
        max_caption_length: int = 64,
        prefix: str = "",
        caption_prompt: CaptionPrompt = "masked",
        num_candidates: int | None = None,
        image_first: bool | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> list[GenerationOutput]:
        """Describes every image; scores are mean log-likelihoods in nats.

        `prefix` begins every caption (the paper's "Photo of") and is not generated.
        `max_caption_length` counts text ids; the model's max_length may leave fewer.
        `caption_prompt` is "masked", or "last" for a model of captions after images.
        `num_candidates` documents are retrieved, and the `num_retrieved` after which the
        image is likeliest are kept, the likeliest first; 0 keeps the retriever's.
        `image_first` shows the documents' images in front of their texts. What is not
        given (candidates, image_first, temperature, guidance, guide_documents) is as it
        was measured best with these weights, if it was (`Engine.defaults`).
        """
        given = Given(num_retrieved, documents)
        candidates, settings = captioning.fill_in_defaults(
            self, given, num_samples, num_candidates, settings
        )
        rerank.check_candidates(candidates, num_retrieved, documents)
        if candidates:
            given = Given(candidates, documents, count_name="num_candidates")
        if image_first is None:
            image_first = bool(
                self.defaults.get("caption", {}).get("image_first", False)
            )
        caption = max_caption_length, prefix, caption_prompt, candidates
        return run_task(
            self,
            len(images),
            lambda: captioning.make_task(
                self, images, *caption, num_retrieved, image_first
            ),
            given,
            Asked(num_samples, seed, settings),
        )

    def infill(
        self,
        image: Image,
        region: Region,
        prompt: str = "",
        num_samples: int = 1,
        num_retrieved: int = 2,
        seed: int = 0,
        documents: Documents | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Draws a region of an image anew; `prompt` is the image's caption, if any."""
        options |= {"num_samples": num_samples, "num_retrieved": num_retrieved}
        return self.infill_batch(
            [image], [region], [prompt], seed=[seed], documents=documents, **options
        )[0]

    def infill_batch(
        self,
        images: Sequence[Image],
        regions: Sequence[Region],
        prompts: Sequence[str] | None = None,
        *,
        num_samples: int = 1,
        num_retrieved: int = 2,
        seed: int | Sequence[int] = 0,
        documents: Documents | None = None,
        max_spans: int = 1,
        region_prompt: RegionPrompt = "masked",
        rank_by: RankBy = "auto",
        on_progress: OnProgress | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> list[GenerationOutput]:
        """Draws each image's region anew: a box, or a mask (see `regions.find_cells`).

        The query is the prompt, or the image without the region. `max_spans`: how many
        masks a region may take (see `regions`); what is known in one is kept.
        `region_prompt`: "masked" or "in_place" (see `infilling`).
        """
        hole = regions, prompts, max_spans, region_prompt
        return run_task(
            self,
            len(images),
            lambda: infilling.make_task(self, images, *hole),
            Given(num_retrieved, documents),
            Asked(num_samples, seed, settings, rank_by, on_progress),
        )

    def infill_text(
        self,
        text: str,
        image: Image | None = None,
        num_samples: int = 1,
        num_retrieved: int = 2,
        seed: int = 0,
        documents: Documents | None = None,
        *,
        max_span_length: int = 32,
        **settings: Unpack[SamplingSettings],
    ) -> GenerationOutput:
        """Writes what stands at `<mask>` in a text, beside an image if there is one."""
        return run_task(
            self,
            1,
            lambda: infilling.make_text_task(self, text, image, max_span_length),
            Given(num_retrieved, documents),
            Asked(num_samples, [seed], settings),
        )[0]

    def edit(
        self,
        image: Image,
        region: Region,
        documents: Documents,
        prompt: str = "",
        num_samples: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> GenerationOutput:
        """Draws a region anew as the chosen documents show it (section 5)."""
        options |= {"num_samples": num_samples, "seed": [seed]}
        return self.edit_batch([image], [region], [documents], [prompt], **options)[0]

    def edit_batch(
        self,
        images: Sequence[Image],
        regions: Sequence[Region],
        documents: Sequence[Documents],
        prompts: Sequence[str] | None = None,
        *,
        num_samples: int = 1,
        seed: int | Sequence[int] = 0,
        max_spans: int = 1,
        region_prompt: RegionPrompt = "masked",
        num_neighbours: int = 0,
        rank_by: RankBy = "auto",
        on_progress: OnProgress | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> list[GenerationOutput]:
        """Edits every image by its own documents, and `num_neighbours` like them."""
        hole = regions, prompts, max_spans, region_prompt
        return run_task(
            self,
            len(images),
            lambda: infilling.make_task(self, images, *hole, "edit"),
            Given(num_neighbours, None, documents, "document", "num_neighbours"),
            Asked(num_samples, seed, settings, rank_by, on_progress),
        )

    def classify(
        self,
        image: Image,
        support: Sequence[Example],
        labels: Sequence[str] | None = None,
        *,
        shots_per_pass: int | None = None,
        by: ClassifyBy = "image",
    ) -> Classification:
        """Chooses a label for an image, from labelled images in context."""
        return self.classify_batch(
            [image], support, labels, shots_per_pass=shots_per_pass, by=by
        )[0]

    def classify_batch(
        self,
        images: Sequence[Image],
        support: Sequence[Example],
        labels: Sequence[str] | None = None,
        *,
        shots_per_pass: int | None = None,
        by: ClassifyBy = "image",
    ) -> list[Classification]:
        """Classifies every image; labels may mean nothing ("dax", "wug").

        Args:
          images: to classify.
          support: images with their labels; none asks the model without context.
          labels: to choose from; those of `support` unless given.
          shots_per_pass: examples of each label in the context at once; as many as fit
            unless given. The rest is read in further passes, which are averaged.
          by: what is compared: the likelihood of the "image" after each label and its own
            examples, or of each "label" after all examples and the image.
        """
        if not len(images):
            return []
        images = [check_image(image) for image in images]
        return classification.classify_questions(
            self,
            [classification.Question(image, support, labels) for image in images],
            shots_per_pass=shots_per_pass,
            by=by,
        )

    def generate(
        self,
        parts: Sequence[str | Image] = (),
        num_samples: int = 1,
        num_retrieved: int = 2,
        seed: int = 0,
        documents: Documents | None = None,
        *,
        max_segments: int = 2,
        max_text_length: int = 64,
        **settings: Unpack[SamplingSettings],
    ) -> GenerationOutput:
        """Goes on after texts and images, with texts and images as the model chooses.

        The query is the first text, or else the first image.
        """
        return run_task(
            self,
            1,
            lambda: interleaving.make_task(self, parts, max_segments, max_text_length),
            Given(num_retrieved if len(parts) else 0, documents),
            Asked(num_samples, [seed], settings),
        )[0]
