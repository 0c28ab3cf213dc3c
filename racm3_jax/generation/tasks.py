"""`Generator`: every task of the paper, one method each.

    prompts -> query embeddings -> retrieved documents -> prompt tokens -> samples

`runner.run_task` does each step once for all prompts of a batch (and decodes in chunks of
`max_rows`), in the same way for all tasks; a task's own module says what differs. The
methods for a single item are batches of one, so both give the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
from jaxtyping import Float32, UInt8

from racm3_jax.generation import (
    captioning,
    classification,
    infilling,
    interleaving,
    rerank,
    text_to_image,
)
from racm3_jax.generation.attribution import attribute_sample
from racm3_jax.generation.captioning import CaptionPrompt
from racm3_jax.generation.classification import Classification, ClassifyBy, Example
from racm3_jax.generation.engine import Engine
from racm3_jax.generation.regions import Region
from racm3_jax.generation.requests import (
    CallOptions,
    Documents,
    Given,
    Image,
    check_image,
)
from racm3_jax.generation.runner import run_task
from racm3_jax.generation.sample import OnProgress, Progress
from racm3_jax.generation.settings import RankBy, RegionPrompt, SamplingSettings
from racm3_jax.types import GenerationOutput


class Generator(Engine):
    """Generates, captions, fills in, edits and classifies, with or without documents.

    Common arguments of the tasks:
      num_samples: samples of each prompt or image, returned best first.
      num_retrieved: documents of the memory before the prompt (2 in the paper); 0 is
        without retrieval.
      seed: reproduces the samples. In a batch, item i has the seed `seed + i` (or the
        i-th of a list), and gives the same samples alone with that seed.
      documents: hand-picked documents instead of retrieved ones, shared by the batch;
        an empty list is the same as `num_retrieved=0`.
      rank_by: "clip" (similarity of prompt and image; without an embedder, or without a
        prompt, the likelihood), "document" (similarity to the image of the first
        document), "likelihood" (mean log-likelihood of the sampled tokens) or "auto" (by
        CLIP if it was measured to align texts with images, else by likelihood).
      **settings: see `SamplingConfig`; top_p is 0.9 unless given, and of images
        temperature and top_p are those measured as the best for these weights, if any
        (`Engine.defaults`).
      **options: further arguments of the batched form.

    All raise ValueError on invalid arguments.
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
        """Generates images (RA-CM3, section 4: the caption is the query)."""
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
        """Generates images of every prompt; `preview` shows the progress as images."""
        return run_task(
            self,
            len(prompts),
            lambda: text_to_image.make_task(self, prompts),
            Given(num_retrieved, documents),
            CallOptions(num_samples, seed, settings, rank_by, on_progress),
        )

    def preview(self, progress: Progress) -> UInt8[np.ndarray, "n s h w 3"]:
        """The unfinished images, `[prompt, sample]`; missing parts are grey."""
        return text_to_image.preview_images(self, progress.tokens)

    def attribute(
        self, output: GenerationOutput, sample: int = 0
    ) -> Float32[np.ndarray, " documents"]:
        """How many bits each document of an output adds to a sample's log-likelihood.

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
        """Controlled generation: images in the style of demonstrations (section 5)."""
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
        """Generates images of every prompt after its own demonstrations.

        After them come `num_neighbours` similar documents of the memory, chosen by the
        retriever's strategy.
        """
        return run_task(
            self,
            len(prompts),
            lambda: text_to_image.make_task(self, prompts, "continue"),
            Given(
                num_neighbours, None, demonstrations, "demonstration", "num_neighbours"
            ),
            CallOptions(num_samples, seed, settings, rank_by, on_progress),
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
        `max_caption_length` counts text tokens; the model's max_length may leave fewer.
        `caption_prompt` is "masked", or "last" for a model trained on captions after
        images. `num_candidates` documents are retrieved, and the `num_retrieved` after
        which the image is most likely are kept, the best first; 0 keeps the retriever's
        order. `image_first` puts the documents' images before their texts. What is not
        given (candidates, image_first, temperature, guidance, guide_documents) has the
        values measured as the best for these weights, if any (`Engine.defaults`).
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
            CallOptions(num_samples, seed, settings),
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
        """Fills in a region of an image; `prompt` is the image's caption, if any."""
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
        region_prompt: RegionPrompt | None = None,
        rank_by: RankBy = "auto",
        on_progress: OnProgress | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> list[GenerationOutput]:
        """Fills in each image's region: a box, or a mask (see `regions.find_cells`).

        The query is the prompt, or the image without the region. `max_spans`: how many
        masks a region may have (see `regions`); known codes inside them are kept.
        `region_prompt`: "masked" or "in_place" (see `infilling`); None is what was
        measured best with the weights, or "masked".
        """
        hole = regions, prompts, max_spans, region_prompt
        return run_task(
            self,
            len(images),
            lambda: infilling.make_task(self, images, *hole),
            Given(num_retrieved, documents),
            CallOptions(num_samples, seed, settings, rank_by, on_progress),
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
        """Fills in `<mask>` in a text, given an image if there is one."""
        return run_task(
            self,
            1,
            lambda: infilling.make_text_task(self, text, image, max_span_length),
            Given(num_retrieved, documents),
            CallOptions(num_samples, [seed], settings),
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
        """Fills in a region as in the chosen documents (section 5)."""
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
        region_prompt: RegionPrompt | None = None,
        num_neighbours: int = 0,
        rank_by: RankBy = "auto",
        on_progress: OnProgress | None = None,
        **settings: Unpack[SamplingSettings],
    ) -> list[GenerationOutput]:
        """Edits every image with its own documents and `num_neighbours` similar ones."""
        hole = regions, prompts, max_spans, region_prompt
        return run_task(
            self,
            len(images),
            lambda: infilling.make_task(self, images, *hole, "edit"),
            Given(num_neighbours, None, documents, "document", "num_neighbours"),
            CallOptions(num_samples, seed, settings, rank_by, on_progress),
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
        """Classifies every image; labels may be meaningless ("dax", "wug").

        Args:
          images: to classify.
          support: images with their labels; may be empty.
          labels: to choose from; those of `support` by default.
          shots_per_pass: examples of each label in the context at once; by default as
            many as fit. The rest is read in further passes, whose results are averaged.
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
        """Continues texts and images with texts and images, as the model chooses.

        The query is the first text, or else the first image.
        """
        return run_task(
            self,
            1,
            lambda: interleaving.make_task(self, parts, max_segments, max_text_length),
            Given(num_retrieved if len(parts) else 0, documents),
            CallOptions(num_samples, [seed], settings),
        )[0]
