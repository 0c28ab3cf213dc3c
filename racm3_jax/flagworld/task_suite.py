"""More tasks on flagworld: infilling, editing, demonstrations, k-shot, guidance.

Every figure is over held-out nations. The flag identifier judges from the world's
definition, without a model.

    infill      the fly half of the flag is hidden; the caption names the nation
    edit        the flag's box is generated again after a chosen document of another
                nation: any, or one with a flag about as large as the box ("sized"), or
                any and the most similar one of the memory ("beside")
                (both by the CM3 mask, "masked", and in the image's order, "in_place")
    controlled  one document of another nation, or two ("two"), or one and a similar one
                of the memory ("beside"), instead of retrieved ones; the prompt names
                that nation ("named") or its own ("other")
    kshot       two nations, meaningless labels, k examples of each in context (by the
                likelihood of the "image" after a label and its examples, or of the "label")
    guidance    text to image at several weights
    int8        text to image with 8-bit weights
    rerank      text to image, best of n by CLIP, by likelihood, and all n; and of n
                guided edits ("beside", in place) the one most similar to the document
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from racm3_jax.evaluation.kshot import compute_auc
from racm3_jax.evaluation.parts import Arrays
from racm3_jax.evaluation.suite import Stage, Suite, format_rows
from racm3_jax.flagworld import task_answers
from racm3_jax.flagworld.settings import TaskSettings
from racm3_jax.flagworld.task_probes import TaskProbes
from racm3_jax.flagworld.task_sheets import make_titles, write_task_sheets
from racm3_jax.generation.settings import RegionPrompt
from racm3_jax.generation.tasks import Generator

# Suffixes of task names, and their arguments.
EDITS: dict[str, dict[str, Any]] = {
    "": {},
    "_sized": {"sized": True},
    "_beside": {"num_neighbours": 1},
}
DEMONSTRATIONS: dict[str, dict[str, Any]] = {
    "": {},
    "_two": {"count": 2},
    "_beside": {"num_neighbours": 1},
}


class TasksSuite(Suite):
    """Models and probes. A stage is one chunk: batches as large as the devices allow."""

    def __init__(
        self,
        generator: Generator,
        twin: Generator | None,
        probes: TaskProbes,
        settings: TaskSettings,
        workdir: Path,
        record: Mapping[str, Any],
        *,
        num_sheet_rows: int = 0,
        **process: Any,
    ) -> None:
        """Computes nothing yet.

        Args:
          generator: the retrieval-augmented model with its memory.
          twin: the baseline without retrieval, or None to leave it out.
          probes: the inputs of the tasks.
          settings: of the sampling.
          workdir: see `Suite`.
          record: see `Suite`.
          num_sheet_rows: of each image sheet.
          **process: see `Suite`.
        """
        count = len(probes.tests)
        super().__init__(workdir, record, count, count, **process)
        self.generator, self.twin, self.probes = generator, twin, probes
        self.settings, self._num_sheet_rows = settings, num_sheet_rows
        guidance = settings.document_guidance[-1]
        self._guided = {"guidance": guidance, "guide_documents": True}
        # Stages by task and variant, for the sheets.
        self.sheets: dict[str, dict[str, str]] = {}
        self._stages: list[Stage] = []
        for prompt in settings.region_prompts:
            self._ask_regions(prompt)
        self._ask_demonstrations()
        self._ask_kshot()
        self._ask_text_to_image()

    def stages(self) -> list[Stage]:
        """Every variant of every task."""
        return self._stages

    def figures(self) -> dict[str, Any]:
        """`Share`s by name, areas under the curve, and seconds by stage."""
        results: dict[str, Any] = {}
        for name, share in self.count_shares().items():
            results[name] = share
            if name.startswith("kshot_"):
                found = self.parts.load(name.replace("/", "_"))["probabilities"]
                area = compute_auc(found, [0] * len(found))
                results[name.replace("/", "_auc/")] = area
        return results | {"seconds": self.read_seconds()}

    def format_table(self, results: Mapping[str, Any]) -> str:
        """The figures, one line each."""
        titles = make_titles(results)
        rows = {title: [results[name]] for name, title in titles.items()}
        return "\n".join(format_rows(["task", "fraction [95% interval]"], rows, 3))

    def write_images(self) -> None:
        """`samples/TASK.png`."""
        outputs = {
            task: {way: self.parts.load(stage) for way, stage in ways.items()}
            for task, ways in self.sheets.items()
        }
        folder, rows = self.parts.workdir / "samples", self._num_sheet_rows
        write_task_sheets(folder, self.generator, self.probes, outputs, rows)

    def _ask(
        self,
        name: str,
        figures: Mapping[str, str],
        ask: Callable[..., Arrays],
        generator: Generator,
        *args: Any,
        sheet: tuple[str, str] | None = None,
        **how: Any,
    ) -> None:
        """Adds a stage: a function of `task_answers`."""

        def compute(items: range, device: Any) -> Arrays:
            del items, device
            return ask(generator, self.probes, self.settings, *args, **how)

        self._stages.append(Stage(name, self.parts, compute, figures))
        if sheet is not None:
            task, way = sheet
            self.sheets.setdefault(task, {})[way] = name

    def _ask_regions(self, prompt: RegionPrompt) -> None:
        """Infilling and editing with one kind of prompt."""
        infill, number = f"infill_{prompt}", self.settings.num_retrieved
        fill, change = task_answers.infill, task_answers.edit
        alone = {"flag": f"alone/{infill}"}
        self._ask(f"{infill}_alone", alone, fill, self.generator, 0, prompt)
        if self.twin is not None:
            flag, sheet = {"flag": f"twin/{infill}"}, ("infill", f"{prompt}, twin")
            self._ask(f"{infill}_twin", flag, fill, self.twin, 0, prompt, sheet=sheet)
        for end, how in (("", {}), ("_guided", self._guided)):
            way = prompt + end.replace("_", ", ")
            ask = functools.partial(self._ask, **how)
            name, sheet = f"{infill}{end}", ("infill", way)
            flag = {"flag": f"{name}/flag"}
            ask(name, flag, fill, self.generator, number, prompt, sheet=sheet)
            for kind, documents in EDITS.items():
                name, sheet = f"edit_{prompt}{kind}{end}", (f"edit{kind}", way)
                figures = {key: f"{name}/{key}" for key in ("flag", "codes_kept")}
                ask(
                    name,
                    figures,
                    change,
                    self.generator,
                    prompt,
                    sheet=sheet,
                    **documents,
                )

    def _ask_demonstrations(self) -> None:
        ends = (("", {}), ("_guided", self._guided))
        for (end, how), named, kind in itertools.product(
            ends, ("named", "other"), DEMONSTRATIONS
        ):
            name = f"controlled_{named}{kind}{end}"
            self._ask(
                name,
                {key: f"{name}/{key}" for key in ("flag", "layout")},
                task_answers.demonstrate,
                self.generator,
                sheet=(f"controlled_{named}{kind}", "guided" if how else "plain"),
                named=named == "named",
                **how,
                **DEMONSTRATIONS[kind],
            )

    def _ask_kshot(self) -> None:
        settings = self.settings
        for by, shots in itertools.product(settings.classify_by, settings.shots):
            name, figures = f"kshot_{by}_{shots}", {"right": f"kshot_{by}/{shots}"}
            classify = task_answers.classify
            self._ask(name, figures, classify, self.generator, shots, by)

    def _ask_text_to_image(self) -> None:
        """Guidance, 8-bit weights, re-ranking."""
        settings, generator, draw = self.settings, self.generator, task_answers.draw
        for task, weights in (
            ("guidance", (1.0, *settings.guidance)),
            ("document_guidance", settings.document_guidance),
        ):
            for weight in weights:
                how = {"guidance": weight, "guide_documents": task != "guidance"}
                name = f"{task}/{weight:g}"
                self._ask(
                    name.replace("/", "_"), {"flag": name}, draw, generator, **how
                )
        self._ask("int8", {"flag": "int8/flag"}, task_answers.draw_in_8_bits, generator)
        for rank_by in ("clip", "likelihood"):
            # The samples are the same.
            figures = {"flag": f"rerank/{rank_by}", "any_sample": "rerank/none"}
            how = {"num_samples": settings.num_samples, "rank_by": rank_by}
            self._ask(f"rerank_{rank_by}", figures, draw, generator, **how)
        self._ask(
            "rerank_document",
            {"flag": "rerank/document"},
            task_answers.edit,
            generator,
            "in_place",
            num_samples=settings.num_samples,
            rank_by="document",
            **EDITS["_beside"],
            **self._guided,
        )
