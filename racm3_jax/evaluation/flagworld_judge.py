"""Who says whether what a model drew and wrote of flagworld is right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from racm3_jax.documents.flagworld import FlagIdentifier, FlagworldConfig, make_nations
from racm3_jax.evaluation.scenes import SceneClassifier
from racm3_jax.types import Document, GenerationOutput


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

    def retrieval_verdicts(self, outputs: Sequence[GenerationOutput]) -> list[bool]:
        """Is a document of the right nation among those that were retrieved?"""
        return [
            any(
                document.metadata["nation"] == test.metadata["nation"]
                for document in output.retrieved.documents
            )
            for output, test in zip(outputs, self.tests, strict=True)
        ]
