"""The flagworld suite: is what was retrieved read, drawn and named?

Every figure is over held-out nations, which no model was trained on, with free-running
sampling. A nation's reserved scenes, in which the memory never shows it, are the ones
asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from racm3_jax.documents.flagworld import FlagIdentifier, FlagworldConfig, make_nations
from racm3_jax.evaluation.intervals import Share, compute_share
from racm3_jax.evaluation.reading import ReadingQuestion, generate_answers
from racm3_jax.evaluation.scenes import SceneClassifier
from racm3_jax.evaluation.stages import Stages
from racm3_jax.generation.tasks import Generator
from racm3_jax.types import Document, GenerationOutput

# Where the right one of two documents is.
READING_ORDERS = {"right_first": 0, "right_last": -1}


@dataclasses.dataclass(frozen=True)
class SuiteSettings:
    """How the suite samples.

    Attributes:
      num_retrieved: documents before each prompt (2 in the paper).
      temperature, top_p: of the drawing.
      guidance: of the drawing with retrieval, away from what is drawn without the
        documents and the text; 1 is none.
      caption_temperature: of the captions; 0 is greedy.
      caption_guidance: of the captions with retrieval, away from what is written without
        the documents; 1 is none.
      caption_candidates: documents retrieved for a caption, of which the `num_retrieved`
        after which the image is likeliest are kept; 0 keeps the retriever's.
      num_reading: questions with one right and one wrong document, in both orders (see
        `reading`); at most the held-out nations.
      seed: of all sampling.
    """

    num_retrieved: int = 2
    temperature: float = 1.0
    top_p: float = 0.9
    guidance: float = 1.0
    caption_temperature: float = 0.0
    caption_guidance: float = 1.0
    caption_candidates: int = 0
    num_reading: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Drawings:
    """Pictures that one model drew for the prompts, with the verdicts on them."""

    outputs: list[GenerationOutput]
    flags: list[bool]
    scenes: list[bool]


class FlagworldJudge:
    """Says whether pictures and captions are right; knows the world, no model.

    Args:
      world: the world that the prompts come from.
      tests: its "heldout_test" documents.
      training_pictures, training_scenes: what the scene classifier learns from.
    """

    def __init__(
        self,
        world: FlagworldConfig,
        tests: Sequence[Document],
        training_pictures: np.ndarray,
        training_scenes: Sequence[str],
    ) -> None:
        self.tests = tests
        self.nations = make_nations(world, "heldout")
        self._identifier = FlagIdentifier(self.nations)
        self._scenes = SceneClassifier(training_pictures, training_scenes)

    def flag_verdicts(self, images: Sequence[np.ndarray]) -> list[bool]:
        """Is the flag the asked nation's, among all held-out designs?"""
        found = self._identifier.identify(list(images))
        return [
            nation.name == test.metadata["nation"]
            for (nation, _), test in zip(found, self.tests, strict=True)
        ]

    def scene_verdicts(self, images: Sequence[np.ndarray]) -> list[bool]:
        """Is the scene the asked one?"""
        found = self._scenes.classify(np.stack(images))
        return [
            scene == test.metadata["scene"]
            for scene, test in zip(found, self.tests, strict=True)
        ]

    def caption_verdicts(self, captions: Sequence[str]) -> list[bool]:
        """Does the caption name the right nation?"""
        return [
            test.metadata["nation"].lower() in caption.lower()
            for caption, test in zip(captions, self.tests, strict=True)
        ]


def draw(
    generator: Generator,
    judge: FlagworldJudge,
    settings: SuiteSettings,
    num_retrieved: int,
) -> Drawings:
    """Draws every test caption once and judges the pictures.

    Without retrieval there are no documents to guide by, and no guidance.
    """
    outputs = generator.text_to_image_batch(
        [test.text for test in judge.tests],
        num_retrieved=num_retrieved,
        seed=settings.seed,
        temperature=settings.temperature,
        top_p=settings.top_p,
        guidance=settings.guidance if num_retrieved else 1.0,
        guide_documents=True,
    )
    images = [output.images[0] for output in outputs]
    return Drawings(outputs, judge.flag_verdicts(images), judge.scene_verdicts(images))


def caption(
    generator: Generator,
    judge: FlagworldJudge,
    settings: SuiteSettings,
    num_retrieved: int,
) -> tuple[list[GenerationOutput], list[bool]]:
    """Captions every test picture once and judges the names."""
    outputs = generator.caption_batch(
        [test.images[0] for test in judge.tests],
        num_retrieved=num_retrieved,
        seed=settings.seed,
        temperature=settings.caption_temperature,
        num_candidates=settings.caption_candidates if num_retrieved else 0,
        guidance=settings.caption_guidance if num_retrieved else 1.0,
        guide_documents=True,
    )
    return outputs, judge.caption_verdicts([output.texts[0] for output in outputs])


def top_retrieved_images(
    generator: Generator, outputs: Sequence[GenerationOutput]
) -> list[np.ndarray]:
    """The image of the best retrieved document of each output (the copying baseline)."""
    documents = [output.retrieved.documents[0] for output in outputs]
    return [generator.tokenizer.decode(d).images[-1] for d in documents]


def evaluate_flagworld(
    generator: Generator,
    twin: Generator | None,
    swapped: Generator,
    judge: FlagworldJudge,
    swapped_judge: FlagworldJudge,
    settings: SuiteSettings,
    log: Callable[[str], None] = print,
    questions: Sequence[ReadingQuestion] = (),
) -> tuple[dict[str, Any], dict[str, list[GenerationOutput]]]:
    """Runs the whole suite.

    Args:
      generator: the retrieval-augmented model with its memory.
      twin: the model trained without retrieval, or None to leave it out.
      swapped: the same model over a memory whose held-out flags are exchanged.
      judge: of the world.
      swapped_judge: of the world with exchanged flags.
      settings: of the sampling.
      log: receives one line a stage.
      questions: with a right and a wrong document, of `settings.num_reading`.

    Returns:
      (results, outputs): results are `Share`s by name and seconds by stage; outputs hold
      what was generated, for pictures.
    """
    k = settings.num_retrieved
    results: dict[str, Any] = {}
    outputs: dict[str, list[GenerationOutput]] = {}

    stages = Stages(log)

    test_images = [test.images[0] for test in judge.tests]
    results["scene_classifier/accuracy"] = compute_share(
        judge.scene_verdicts(roundtrip(generator, test_images))
    )
    results["identify_flag/accuracy_roundtrip"] = compute_share(
        judge.flag_verdicts(roundtrip(generator, test_images))
    )

    drawn = stages.run("draw", lambda: draw(generator, judge, settings, k))
    outputs["draw"] = drawn.outputs
    results["retrieval/draw_flag"] = compute_share(drawn.flags)
    results["retrieval/draw_scene"] = compute_share(drawn.scenes)
    if settings.guidance != 1:
        unguided = dataclasses.replace(settings, guidance=1.0)
        plain = stages.run("draw unguided", lambda: draw(generator, judge, unguided, k))
        results["unguided/draw_flag"] = compute_share(plain.flags)
        results["unguided/draw_scene"] = compute_share(plain.scenes)
    copied = top_retrieved_images(generator, drawn.outputs)
    results["copy/draw_flag"] = compute_share(judge.flag_verdicts(copied))
    results["copy/draw_scene"] = compute_share(judge.scene_verdicts(copied))
    results["retriever/text_to_nation@2"] = nation_recall(drawn.outputs, judge)

    captions, named = stages.run(
        "caption", lambda: caption(generator, judge, settings, k)
    )
    outputs["caption"] = captions
    results["retrieval/caption_name"] = compute_share(named)
    plain = captions
    if settings.caption_candidates:
        as_retrieved = dataclasses.replace(settings, caption_candidates=0)
        plain, named = stages.run(
            "caption as retrieved", lambda: caption(generator, judge, as_retrieved, k)
        )
        results["as_retrieved/caption_name"] = compute_share(named)
        results["reranked/image_to_nation@2"] = nation_recall(captions, judge)
    results["retriever/image_to_nation@2"] = nation_recall(plain, judge)

    moved = stages.run("swapped", lambda: draw(swapped, swapped_judge, settings, k))
    outputs["swapped"] = moved.outputs
    results["swapped/draw_flag"] = compute_share(moved.flags)

    for order, place in READING_ORDERS.items() if questions else ():
        answers = stages.run(
            f"reading, {order}",
            lambda place=place: generate_answers(
                generator,
                questions,
                judge.nations,
                right_place=place,
                seed=settings.seed,
                temperature=settings.temperature,
                top_p=settings.top_p,
            ),
        )
        for asked, share in answers.items():
            results[f"reading_{order}/{asked}"] = share

    if twin is not None:
        alone = stages.run("twin draw", lambda: draw(twin, judge, settings, 0))
        outputs["twin_draw"] = alone.outputs
        results["twin/draw_flag"] = compute_share(alone.flags)
        results["twin/draw_scene"] = compute_share(alone.scenes)
        _, guessed = stages.run(
            "twin caption", lambda: caption(twin, judge, settings, 0)
        )
        results["twin/caption_name"] = compute_share(guessed)
    results["seconds"] = stages.seconds
    return results, outputs


def roundtrip(generator: Generator, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The pictures as the image tokenizer gives them back."""
    tokenizer = generator.tokenizer.image
    return list(tokenizer.decode(tokenizer.encode(np.stack(images))))


def nation_recall(outputs: Sequence[GenerationOutput], judge: FlagworldJudge) -> Share:
    """Is a document of the right nation among those that were retrieved?"""
    return compute_share(
        [
            any(
                document.metadata["nation"] == test.metadata["nation"]
                for document in output.retrieved.documents
            )
            for output, test in zip(outputs, judge.tests, strict=True)
        ]
    )


def format_table(results: dict[str, Any]) -> str:
    """The suite's figures as the README shows them."""

    def cell(name: str) -> str:
        return str(results[name]) if name in results else "-"

    rows = [
        ("generated flag is the right nation's", "draw_flag"),
        ("generated scene is the requested one", "draw_scene"),
        ("caption names the right nation", "caption_name"),
    ]
    total = results["retrieval/draw_flag"].total
    lines = [
        f"| {total} held-out nations | with retrieval | no retrieval | copy retrieved |",
        "|---|---|---|---|",
    ]
    for title, key in rows:
        cells = " | ".join(cell(f"{m}/{key}") for m in ("retrieval", "twin", "copy"))
        lines.append(f"| {title} | {cells} |")
    lines.append(
        f"| swapped memory: the image follows the memory | {cell('swapped/draw_flag')} "
        "| - | - |"
    )
    if "unguided/draw_flag" in results:
        for title, key in rows[:2]:
            lines.append(
                f"| {title}, no guidance | {cell(f'unguided/{key}')} | - | - |"
            )
    if "as_retrieved/caption_name" in results:
        lines.append(
            f"| {rows[2][0]}, documents as retrieved | "
            f"{cell('as_retrieved/caption_name')} | - | - |"
        )
    for order in READING_ORDERS:
        for asked in ("flag", "name"):
            if (name := f"reading_{order}/{asked}") in results:
                title = order.replace("_", " ")
                lines.append(
                    f"| {asked} of the right one of two documents, {title} | "
                    f"{cell(name)} | - | - |"
                )
    for name in (
        "retriever/text_to_nation@2",
        "retriever/image_to_nation@2",
        "reranked/image_to_nation@2",
        "scene_classifier/accuracy",
        "identify_flag/accuracy_roundtrip",
    ):
        if name in results:
            lines.append(f"| {name} | {cell(name)} | - | - |")
    return "\n".join(lines)
