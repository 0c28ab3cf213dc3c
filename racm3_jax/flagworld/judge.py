"""Judges whether images and captions of flagworld are right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8

from racm3_jax.flagworld import FlagIdentifier, FlagworldConfig, make_nations
from racm3_jax.types import Document, GenerationOutput

_CELLS = 16  # images are averaged to 16x16 cells: scenes are coarse
_NUM_FEATURES = 1500
_RIDGE = 3.0


def _cell_means(
    images: UInt8[np.ndarray, "images height width 3"],
) -> Float32[np.ndarray, "images features"]:
    n, height, width, _ = images.shape
    cells = images.reshape(
        n, _CELLS, height // _CELLS, _CELLS, width // _CELLS, 3
    ).mean((2, 4))
    return (cells.reshape(n, -1) / 127.5 - 1.0).astype(np.float32)


class SceneClassifier:
    """Ridge regression on random ReLU features of a 16x16 thumbnail.

    Deterministic; fits in about a second on some thousand 64x64 images.
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "images height width 3"],
        scenes: Sequence[str],
        *,
        seed: int = 0,
    ) -> None:
        """Fits the classifier.

        Args:
          images: training images; sides are multiples of 16.
          scenes: the scene of each image.
          seed: of the random features.

        Raises:
          ValueError: if the lengths differ or the sides do not divide.
        """
        if len(images) != len(scenes):
            raise ValueError(f"{len(images)} images but {len(scenes)} scenes")
        if images.shape[1] % _CELLS or images.shape[2] % _CELLS:
            raise ValueError(
                f"image sides must be multiples of {_CELLS}; got {images.shape[1:3]}"
            )
        self.scenes = tuple(sorted(set(scenes)))
        cells = _cell_means(images)
        rng = np.random.default_rng(seed)
        inputs = cells.shape[1]
        self._projection = rng.normal(0, 1 / np.sqrt(inputs), (inputs, _NUM_FEATURES))
        self._projection = self._projection.astype(np.float32) * 3.0
        self._bias = rng.uniform(-1, 1, _NUM_FEATURES).astype(np.float32)
        features = self._features(cells)
        targets = np.array([[s == name for name in self.scenes] for s in scenes])
        targets = targets.astype(np.float32) - 1.0 / len(self.scenes)
        gram = features.T @ features + _RIDGE * np.eye(features.shape[1])
        self._weights = np.linalg.solve(gram, features.T @ targets)

    def _features(self, cells: np.ndarray) -> np.ndarray:
        hidden = np.maximum(cells @ self._projection + self._bias, 0)
        return np.concatenate([cells, hidden, np.ones((len(cells), 1))], axis=1)

    def classify(self, images: UInt8[np.ndarray, "images height width 3"]) -> list[str]:
        """The most likely scene of each image."""
        scores = self._features(_cell_means(images)) @ self._weights
        return [self.scenes[i] for i in scores.argmax(1)]


class FlagworldJudge:
    """Judges images and captions from the world's definition, without a model.

    Args:
      world: the world of the prompts.
      tests: its "heldout_test" documents.
      training_images, training_scenes: for the scene classifier.
    """

    def __init__(
        self,
        world: FlagworldConfig,
        tests: Sequence[Document],
        training_images: np.ndarray,
        training_scenes: Sequence[str],
    ) -> None:
        self.tests = tests
        self.nations = make_nations(world, "heldout")
        self._identifier = FlagIdentifier(self.nations)
        self._scenes = SceneClassifier(training_images, training_scenes)

    def flag_verdicts(self, images: Sequence[np.ndarray]) -> list[bool]:
        """Is the flag the requested nation's, among all held-out designs?"""
        found = self._identifier.identify(list(images))
        return [
            nation.name == test.metadata["nation"]
            for (nation, _), test in zip(found, self.tests, strict=True)
        ]

    def scene_verdicts(self, images: Sequence[np.ndarray]) -> list[bool]:
        """Is the scene the requested one?"""
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
        """Is a document of the right nation among the retrieved ones?"""
        return [
            any(
                document.metadata["nation"] == test.metadata["nation"]
                for document in output.retrieved.documents
            )
            for output, test in zip(outputs, self.tests, strict=True)
        ]
