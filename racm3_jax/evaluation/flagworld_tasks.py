"""The other tasks on flagworld: infilling, editing, demonstrations, k-shot, guidance.

Every figure is over held-out nations. Verdicts are made by the flag identifier, which
knows the world and no model.

    infill      the fly half of the flag is hidden; the caption names the nation
    edit        the flag's box is drawn anew, a document of another nation is chosen
    controlled  a document of another nation stands in front instead of retrieved ones;
                the prompt names that nation ("named") or its own ("other")
    kshot       two nations, labels without meaning, k examples of each in context
    guidance    the plain drawing task at several weights
    int8        the plain drawing task with weights in 8 bits
    rerank      the plain drawing task, best of n by CLIP, by likelihood, and all n
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from racm3_jax.documents.flagworld import FlagIdentifier, Nation
from racm3_jax.evaluation.intervals import Share, compute_share
from racm3_jax.generation.tasks import Generator
from racm3_jax.types import Document, GenerationOutput

Box = tuple[int, int, int, int]
LABELS = ("dax", "wug")


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """How the suite samples.

    Attributes:
      num_items: how many test documents; 0 is all.
      num_retrieved: documents before each prompt (2 in the paper).
      temperature, top_p: of all drawing.
      max_spans: of infilling and editing (see `generation.regions`).
      guidance: weights to compare, besides 1.
      num_samples: of re-ranking.
      shots: numbers of examples a label.
      seed: of all sampling and of the choice of nations.
    """

    num_items: int = 0
    num_retrieved: int = 2
    temperature: float = 1.0
    top_p: float = 0.9
    max_spans: int = 1
    guidance: tuple[float, ...] = (2.0, 3.0)
    num_samples: int = 4
    shots: tuple[int, ...] = (0, 1, 2, 4, 8)
    seed: int = 0


class TaskProbes:
    """What is asked, and who is right; knows the world, no model.

    Args:
      nations: the held-out ones, with their flags.
      tests: their "heldout_test" documents, one a nation.
      shown: their "heldout_memory" documents.
      settings: of the suite.

    Raises:
      ValueError: fewer than two nations, or a nation without memory documents.
    """

    def __init__(
        self,
        nations: Sequence[Nation],
        tests: Sequence[Document],
        shown: Sequence[Document],
        settings: TaskSettings,
    ) -> None:
        self.tests = list(tests)[: settings.num_items or None]
        if len(self.tests) < 2:
            raise ValueError(
                f"the suite compares nations and needs two; got {len(self.tests)}"
            )
        self._identifier = FlagIdentifier(nations)
        self._layouts = {n.name: n.design.layout for n in nations}
        self._shown: dict[str, list[Document]] = {}
        for document in shown:
            self._shown.setdefault(document.metadata["nation"], []).append(document)
        for test in self.tests:
            if test.metadata["nation"] not in self._shown:
                raise ValueError(
                    f"the memory shows no document of {test.metadata['nation']}"
                )
        # Item i is paired with another item, never with itself.
        self._rng = np.random.default_rng([settings.seed, 0])
        circle = self._rng.permutation(len(self.tests))
        self.partners = np.empty(len(circle), int)
        self.partners[circle] = np.roll(circle, 1)

    def nation(self, i: int) -> str:
        """The nation of test i."""
        return self.tests[i].metadata["nation"]

    def donor(self, i: int) -> Document:
        """A memory document of the nation that test i is paired with."""
        return self._shown[self.nation(self.partners[i])][0]

    def examples(self, i: int, count: int) -> list[Document]:
        """`count` memory documents of the nation of test i, or as many as there are."""
        return self._shown[self.nation(i)][:count]

    def captions_of_donors(self) -> list[str]:
        """Each test's caption with the name of its donor's nation."""
        return [
            test.text.replace(self.nation(i), self.donor(i).metadata["nation"])
            for i, test in enumerate(self.tests)
        ]

    def flag_boxes(self) -> list[Box]:
        """(left, top, right, bottom) of each test's flag."""
        boxes = []
        for test in self.tests:
            top, left, height, width = test.metadata["box"]
            boxes.append((left, top, left + width, top + height))
        return boxes

    def fly_halves(self) -> list[Box]:
        """The half of each flag that is away from the pole."""
        return [
            ((left + right) // 2, top, right, bottom)
            for left, top, right, bottom in self.flag_boxes()
        ]

    def name_flags(self, images: Sequence[np.ndarray]) -> list[str]:
        """The nation whose flag each image shows."""
        return [nation.name for nation, _ in self._identifier.identify(list(images))]

    def right_flags(
        self, images: Sequence[np.ndarray], names: Sequence[str]
    ) -> tuple[Share, Share]:
        """How many show the named nation's flag, and how many at least its layout."""
        found = self.name_flags(images)
        pairs = list(zip(found, names, strict=True))
        return (
            compute_share([a == b for a, b in pairs]),
            compute_share([self._layouts[a] == self._layouts[b] for a, b in pairs]),
        )


def _first_images(outputs: Sequence[GenerationOutput]) -> list[np.ndarray]:
    return [output.images[0] for output in outputs]


def evaluate_infill(
    generator: Generator,
    probes: TaskProbes,
    settings: TaskSettings,
    num_retrieved: int,
) -> tuple[Share, list[GenerationOutput]]:
    """Is the flag whole and right after its hidden half was drawn?"""
    outputs = generator.infill_batch(
        [test.images[0] for test in probes.tests],
        probes.fly_halves(),
        [test.text for test in probes.tests],
        num_retrieved=num_retrieved,
        max_spans=settings.max_spans,
        seed=settings.seed,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    names = [probes.nation(i) for i in range(len(probes.tests))]
    return probes.right_flags(_first_images(outputs), names)[0], outputs


def evaluate_edit(
    generator: Generator, probes: TaskProbes, settings: TaskSettings
) -> tuple[Share, Share, list[GenerationOutput]]:
    """Does the region show the chosen flag, and how much of the rest is as it was?"""
    items = range(len(probes.tests))
    outputs = generator.edit_batch(
        [test.images[0] for test in probes.tests],
        probes.flag_boxes(),
        [[probes.donor(i)] for i in items],
        probes.captions_of_donors(),
        max_spans=settings.max_spans,
        seed=settings.seed,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    names = [probes.donor(i).metadata["nation"] for i in items]
    facts = [output.documents[0].metadata for output in outputs]
    kept = Share(
        sum(fact["codes_outside_kept"] for fact in facts),
        sum(fact["codes_outside"] for fact in facts),
    )
    return probes.right_flags(_first_images(outputs), names)[0], kept, outputs


def evaluate_controlled(
    generator: Generator, probes: TaskProbes, settings: TaskSettings, *, named: bool
) -> tuple[Share, Share, list[GenerationOutput]]:
    """Does the drawing follow the demonstration: its flag, and its layout?"""
    items = range(len(probes.tests))
    prompts = [test.text for test in probes.tests]
    outputs = generator.continue_batch(
        probes.captions_of_donors() if named else prompts,
        [[probes.donor(i)] for i in items],
        seed=settings.seed,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    names = [probes.donor(i).metadata["nation"] for i in items]
    return *probes.right_flags(_first_images(outputs), names), outputs


def evaluate_kshot(
    generator: Generator, probes: TaskProbes, settings: TaskSettings, shots: int
) -> Share:
    """Two-way classification; which nation has which label changes from item to item."""
    rng = np.random.default_rng([settings.seed, 1])
    right = []
    for i, test in enumerate(probes.tests):
        labels = LABELS if rng.random() < 0.5 else LABELS[::-1]
        support = [
            (document.images[0], label)
            for item, label in zip((i, probes.partners[i]), labels, strict=True)
            for document in probes.examples(item, shots)
        ]
        found = generator.classify(test.images[0], support, LABELS)
        right.append(found.label == labels[0])
    return compute_share(right)


def evaluate_drawing(
    generator: Generator, probes: TaskProbes, settings: TaskSettings, **options: Any
) -> tuple[Share, Share]:
    """Share of best samples with the right flag, and of all samples."""
    outputs = generator.text_to_image_batch(
        [test.text for test in probes.tests],
        num_retrieved=settings.num_retrieved,
        seed=settings.seed,
        temperature=settings.temperature,
        top_p=settings.top_p,
        **options,
    )
    names = [probes.nation(i) for i in range(len(probes.tests))]
    count = len(outputs[0].images)
    every = [image for output in outputs for image in output.images]
    found = np.array(probes.name_flags(every)).reshape(len(names), count)
    right = found == np.array(names)[:, None]
    return compute_share(list(right[:, 0])), compute_share(list(right.reshape(-1)))


def evaluate_flagworld_tasks(
    generator: Generator,
    twin: Generator | None,
    probes: TaskProbes,
    settings: TaskSettings,
    log: Callable[[str], None] = print,
) -> tuple[dict[str, Any], dict[str, list[GenerationOutput]]]:
    """Runs the whole suite.

    Args:
      generator: the retrieval-augmented model with its memory.
      twin: the model trained without retrieval, or None to leave it out.
      probes: what is asked.
      settings: of the sampling.
      log: receives one line a stage.

    Returns:
      (results, outputs): results are `Share`s by name and seconds by stage; outputs hold
      what was generated, for pictures.
    """
    results: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    outputs: dict[str, list[GenerationOutput]] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        started = time.monotonic()
        value = run()
        seconds[name] = round(time.monotonic() - started, 1)
        log(f"{name}: {seconds[name]} s")
        return value

    k = settings.num_retrieved
    results["infill/flag"], outputs["infill"] = timed(
        "infill", lambda: evaluate_infill(generator, probes, settings, k)
    )
    results["infill/flag_alone"], _ = timed(
        "infill alone", lambda: evaluate_infill(generator, probes, settings, 0)
    )
    if twin is not None:
        results["twin/infill_flag"], outputs["twin_infill"] = timed(
            "twin infill", lambda: evaluate_infill(twin, probes, settings, 0)
        )
    results["edit/flag"], results["edit/codes_kept"], outputs["edit"] = timed(
        "edit", lambda: evaluate_edit(generator, probes, settings)
    )
    for name, named in (("named", True), ("other", False)):
        flag, layout, outputs[f"controlled_{name}"] = timed(
            f"controlled {name}",
            lambda named=named: evaluate_controlled(
                generator, probes, settings, named=named
            ),
        )
        results[f"controlled_{name}/flag"] = flag
        results[f"controlled_{name}/layout"] = layout
    for shots in settings.shots:
        results[f"kshot/{shots}"] = timed(
            f"{shots}-shot",
            lambda shots=shots: evaluate_kshot(generator, probes, settings, shots),
        )
    for weight in (1.0, *settings.guidance):
        results[f"guidance/{weight:g}"], _ = timed(
            f"guidance {weight:g}",
            lambda weight=weight: evaluate_drawing(
                generator, probes, settings, guidance=weight
            ),
        )
    results["int8/flag"], _ = timed(
        "int8", lambda: evaluate_drawing(generator.quantized(), probes, settings)
    )
    n = settings.num_samples
    for rank_by in ("clip", "likelihood"):
        best, every = timed(
            f"best of {n} by {rank_by}",
            lambda rank_by=rank_by: evaluate_drawing(
                generator, probes, settings, num_samples=n, rank_by=rank_by
            ),
        )
        results[f"rerank/{rank_by}"] = best
        results["rerank/none"] = every  # the samples are the same
    results["seconds"] = seconds
    return results, outputs


def choose_pictures(
    probes: TaskProbes, outputs: dict[str, list[GenerationOutput]], count: int
) -> dict[str, list[tuple[np.ndarray | None, GenerationOutput]]]:
    """`count` outputs of each task, with the image that it was given: the region grey."""
    boxes = {
        "infill": probes.fly_halves(),
        "twin_infill": probes.fly_halves(),
        "edit": probes.flag_boxes(),
    }
    chosen: dict[str, list[tuple[np.ndarray | None, GenerationOutput]]] = {}
    for task, found in outputs.items():
        pairs = chosen.setdefault(task, [])
        for i, output in enumerate(found[:count]):
            given = None
            if task in boxes:
                left, top, right, bottom = boxes[task][i]
                given = probes.tests[i].images[0].copy()
                given[top:bottom, left:right] = 128
            pairs.append((given, output))
    return chosen


def format_table(results: dict[str, Any]) -> str:
    """The suite's figures, one line each."""
    titles = {
        "infill/flag": "hidden half drawn: right flag, with retrieval",
        "infill/flag_alone": "the same model without documents",
        "twin/infill_flag": "the twin without retrieval",
        "edit/flag": "region shows the chosen document's flag",
        "edit/codes_kept": "codes outside the region that stay",
        "controlled_named/flag": "demonstration followed: flag (prompt names it)",
        "controlled_named/layout": "demonstration followed: layout (prompt names it)",
        "controlled_other/flag": "demonstration followed: flag (prompt names another)",
        "controlled_other/layout": "demonstration followed: layout (names another)",
        "int8/flag": "drawn flag right, weights in 8 bits",
        "rerank/none": "drawn flag right, any sample",
        "rerank/clip": "drawn flag right, best by CLIP",
        "rerank/likelihood": "drawn flag right, best by likelihood",
    }
    for name in results:
        task, _, value = name.partition("/")
        if task == "kshot":
            titles[name] = f"two-way classification, {value} examples a label"
        if task == "guidance":
            titles[name] = f"drawn flag right, guidance {value}"
    lines = ["| task | share [95% interval] |", "|---|---|"]
    lines += [f"| {titles[n]} | {results[n]} |" for n in titles if n in results]
    return "\n".join(lines)
