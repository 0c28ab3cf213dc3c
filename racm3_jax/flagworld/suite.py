"""The flagworld suite: does the model use retrieved flags and names?

Every figure is over held-out nations, which no model was trained on, with free-running
sampling. The tests are a nation's reserved scenes, in which the memory never shows it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.evaluation.intervals import compute_share
from racm3_jax.evaluation.parts import Arrays, Parts
from racm3_jax.evaluation.pictures import memory_panels, save_comparison
from racm3_jax.evaluation.suite import Stage, Suite, format_rows, keep_outputs
from racm3_jax.flagworld.judge import FlagworldJudge
from racm3_jax.flagworld.reading import ASKED, ReadingQuestion, generate_answers
from racm3_jax.flagworld.settings import FlagworldSettings
from racm3_jax.generation.tasks import Generator

# Position of the right one of two documents.
READING_ORDERS = {"right_first": 0, "right_last": -1}
_TITLES = {
    "draw_flag": "generated flag is the right nation's",
    "draw_scene": "generated scene is the requested one",
    "caption_name": "caption names the right nation",
}
_UNTITLED = (
    "retriever/text_to_nation@2",
    "retriever/image_to_nation@2",
    "reranked/image_to_nation@2",
    "scene_classifier/accuracy",
    "identify_flag/accuracy_roundtrip",
)


class FlagworldSuite(Suite):
    """Models and judges. A stage is one chunk: batches as large as the devices allow."""

    def __init__(
        self,
        generator: Generator,
        twin: Generator | None,
        swapped: Generator,
        judge: FlagworldJudge,
        swapped_judge: FlagworldJudge,
        settings: FlagworldSettings,
        workdir: Path,
        record: Mapping[str, Any],
        *,
        questions: Sequence[ReadingQuestion] = (),
        num_sheet_rows: int = 0,
        **process: Any,
    ) -> None:
        """Computes nothing yet.

        Args:
          generator: the retrieval-augmented model with its memory.
          twin: the baseline without retrieval, or None to leave it out.
          swapped: the same model with a memory whose held-out flags are swapped.
          judge: of the world.
          swapped_judge: of the world with swapped flags.
          settings: of the sampling.
          workdir: see `Suite`.
          record: see `Suite`.
          questions: with a right and a wrong document, of `settings.num_reading`.
          num_sheet_rows: of the image sheet.
          **process: see `Suite`.
        """
        super().__init__(workdir, record, len(judge.tests), len(judge.tests), **process)
        self.generator, self.twin, self.swapped = generator, twin, swapped
        self.judge, self.swapped_judge, self.settings = judge, swapped_judge, settings
        self.questions, self._num_sheet_rows = questions, num_sheet_rows
        count = len(questions)
        self._question_parts = Parts(workdir, count, max(1, count), self.record)

    def stages(self) -> list[Stage]:
        """Images and captions with and without retrieval; then the questions."""
        own, twin, settings = self.generator, self.twin, self.settings
        judge, guidance = self.judge, settings.guidance
        stages = []

        def add(name: str, figures: Mapping[str, str], compute: Any, *how: Any) -> None:
            compute = functools.partial(compute, *how)
            stages.append(Stage(name, self.parts, compute, figures))

        def of(variant: str) -> dict[str, str]:
            return {name: f"{variant}/draw_{name}" for name in ("flag", "scene")}

        found = {"nation": "retriever/text_to_nation@2"}
        add("draw", of("retrieval") | found, self._draw, own, judge, guidance)
        if guidance != 1:
            add("unguided_draw", of("unguided"), self._draw, own, judge, 1.0)
        found = {"nation": "retriever/image_to_nation@2"}
        first = {"name": "retrieval/caption_name"}
        if num := settings.caption_candidates:
            first["nation"] = "reranked/image_to_nation@2"
            add("caption", first, self._caption, own, num)
            plain = found | {"name": "as_retrieved/caption_name"}
            add("as_retrieved_caption", plain, self._caption, own, 0)
        else:
            add("caption", first | found, self._caption, own, 0)
        moved, who = {"flag": "swapped/draw_flag"}, (self.swapped, self.swapped_judge)
        add("swapped_draw", moved, self._draw, *who, guidance)
        for order, place in READING_ORDERS.items() if self.questions else ():
            figures = {asked: f"reading_{order}/{asked}" for asked in ASKED}
            how = (self._question_parts, functools.partial(self._read, place))
            stages.append(Stage(f"reading_{order}", *how, figures))
        if twin is not None:
            add("twin_draw", of("twin"), self._draw, twin, judge, None)
            named = {"name": "twin/caption_name"}
            add("twin_caption", named, self._caption, twin, None)
        return stages

    def figures(self) -> dict[str, Any]:
        """`Share`s by name, and seconds by stage."""
        tokenizer, retriever = self.generator.tokenizer, self.generator.retriever
        assert retriever is not None  # it is the one with a memory
        tests = np.stack([test.images[0] for test in self.judge.tests])
        coded = list(tokenizer.image.decode(tokenizer.image.encode(tests)))
        best = self.parts.load("draw")["retrieved"][:, 0]
        documents = retriever.memory.documents(best)
        copied = [tokenizer.decode(document).images[-1] for document in documents]
        outcomes = {
            "scene_classifier/accuracy": self.judge.scene_verdicts(coded),
            "identify_flag/accuracy_roundtrip": self.judge.flag_verdicts(coded),
            "copy/draw_flag": self.judge.flag_verdicts(copied),
            "copy/draw_scene": self.judge.scene_verdicts(copied),
        }
        results: dict[str, Any] = {n: compute_share(x) for n, x in outcomes.items()}
        return results | self.count_shares() | {"seconds": self.read_seconds()}

    def format_table(self, results: Mapping[str, Any]) -> str:
        """The figures as in the README."""
        total = results["retrieval/draw_flag"].total
        methods = ("retrieval", "twin", "copy")
        headings = ("with retrieval", "no retrieval", "copy retrieved")
        rows = {
            title: [results.get(f"{method}/{key}") for method in methods]
            for key, title in _TITLES.items()
        }
        alone = {
            "swapped/draw_flag": "swapped memory: the image follows the memory",
            "unguided/draw_flag": f"{_TITLES['draw_flag']}, no guidance",
            "unguided/draw_scene": f"{_TITLES['draw_scene']}, no guidance",
            "as_retrieved/caption_name": (
                f"{_TITLES['caption_name']}, documents as retrieved"
            ),
        }
        for order in READING_ORDERS:
            words = order.replace("_", " ")
            for asked in ("flag", "name"):
                title = f"{asked} of the right one of two documents, {words}"
                alone[f"reading_{order}/{asked}"] = title
        alone |= {name: name for name in _UNTITLED}
        for name, title in alone.items():
            if name in results:
                rows[title] = [results[name], None, None]
        return "\n".join(format_rows([f"{total} held-out nations", *headings], rows))

    def write_images(self) -> None:
        """`samples.png`: prompt | retrieved | generated with retrieval | without."""
        if self.twin is None or not self._num_sheet_rows:
            return
        with_retrieval, plain = self.parts.load("draw"), self.parts.load("twin_draw")
        assert self.generator.retriever is not None  # it is the one with a memory
        memory, tokenizer = self.generator.retriever.memory, self.generator.tokenizer
        rows = []
        for i in range(min(self._num_sheet_rows, len(plain["images"]))):
            found, scores = with_retrieval["retrieved"][i], with_retrieval["scores"][i]
            panels = memory_panels(memory, tokenizer, found, scores)
            images = with_retrieval["images"][i], plain["images"][i]
            rows.append((str(with_retrieval["prompt"][i]), panels, *images))
        path = self.parts.workdir / "samples.png"
        save_comparison(path, rows)

    def _draw(
        self,
        generator: Generator,
        judge: FlagworldJudge,
        guidance: float | None,
        items: range,
        device: Any,
    ) -> Arrays:
        """Generates one image of every test caption and judges it.

        Without retrieval (None) there is no guidance by documents.
        """
        del items, device
        outputs = generator.text_to_image_batch(
            [test.text for test in judge.tests],
            num_retrieved=0 if guidance is None else self.settings.num_retrieved,
            seed=self.settings.seed,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            guidance=1.0 if guidance is None else guidance,
            guide_documents=True,
        )
        images = [output.images[0] for output in outputs]
        return {
            "flag": np.array(judge.flag_verdicts(images)),
            "scene": np.array(judge.scene_verdicts(images)),
            "nation": np.array(judge.retrieval_verdicts(outputs)),
            **keep_outputs(outputs, generator),
        }

    def _caption(
        self, generator: Generator, candidates: int | None, items: range, device: Any
    ) -> Arrays:
        """Captions every test image once and judges the names; None is no retrieval."""
        del items, device
        settings, alone = self.settings, candidates is None
        outputs = generator.caption_batch(
            [test.images[0] for test in self.judge.tests],
            num_retrieved=0 if alone else settings.num_retrieved,
            seed=settings.seed,
            temperature=settings.caption_temperature,
            num_candidates=candidates or 0,
            guidance=1.0 if alone else settings.caption_guidance,
            guide_documents=True,
        )
        texts = [output.texts[0] for output in outputs]
        return {
            "name": np.array(self.judge.caption_verdicts(texts)),
            "nation": np.array(self.judge.retrieval_verdicts(outputs)),
            "text": np.array(texts, np.str_),
        }

    def _read(self, place: int, items: range, device: Any) -> Arrays:
        del items, device
        answers = generate_answers(
            self.generator,
            self.questions,
            self.judge.nations,
            right_place=place,
            seed=self.settings.seed,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
        )
        return {name: np.array(outcomes) for name, outcomes in answers.items()}
