"""Inputs of the flagworld tasks: tests, their partners, boxes; and the right answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from racm3_jax.flagworld import FlagIdentifier, Nation
from racm3_jax.flagworld.settings import TaskSettings
from racm3_jax.types import Document

Box = tuple[int, int, int, int]


class TaskProbes:
    """Inputs and right answers, from the world's definition, without a model.

    Args:
      nations: the held-out ones, with their flags.
      tests: their "heldout_test" documents, one per nation.
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

    def donor_of_size(self, i: int) -> Document:
        """One of the same nation whose flag is about as large as in test i."""
        shown = self._shown[self.nation(self.partners[i])]
        size = np.array(self.tests[i].metadata["box"][2:])
        differences = [
            np.abs(np.array(document.metadata["box"][2:]) - size).sum()
            for document in shown
        ]
        return shown[int(np.argmin(differences))]

    def examples(self, i: int, count: int) -> list[Document]:
        """`count` memory documents of the nation of test i, or all if there are fewer."""
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

    def judge_flags(
        self, images: Sequence[np.ndarray], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Do they show the named nations' flags, and at least their layouts?"""
        pairs = list(zip(self.name_flags(images), names, strict=True))
        layouts = self._layouts
        return {
            "flag": np.array([a == b for a, b in pairs]),
            "layout": np.array([layouts[a] == layouts[b] for a, b in pairs]),
        }
