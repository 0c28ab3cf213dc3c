"""The k-shot part of the suite of likelihoods: its stages, figures and table."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from racm3_jax.evaluation.clip_score import embed_any_size
from racm3_jax.evaluation.document_sets import ShotPool
from racm3_jax.evaluation.kshot import (
    Episode,
    classify_episodes,
    compute_accuracy,
    compute_auc,
    copy_nearest,
    mislead,
    sample_episodes,
)
from racm3_jax.evaluation.parts import Arrays, Parts
from racm3_jax.evaluation.replicas import Replicas
from racm3_jax.evaluation.settings import LikelihoodSettings
from racm3_jax.evaluation.suite import Stage, format_rows

_COLUMNS = ("model", "auc", "random", "copy")


class ShotQuestions:
    """Questions with 0, 1, 2, ... demonstrations of each label.

    Args:
      models: that are asked.
      pool: what is shown and asked.
      settings: of the suite.
      parts: chunks of the questions.
    """

    def __init__(
        self,
        models: Replicas,
        pool: ShotPool,
        settings: LikelihoodSettings,
        parts: Parts,
    ) -> None:
        self._models, self._pool, self._parts = models, pool, parts
        self._settings = settings
        self._episodes = {
            k: sample_episodes(
                pool.classes,
                num_episodes=parts.num_items,
                num_shots=k,
                num_ways=settings.num_ways,
                seed=settings.seed,
            )
            for k in settings.shots
        }

    def stages(self) -> list[Stage]:
        """The questions, and the same ones with other classes shown."""
        asked = {}
        for k, episodes in self._episodes.items():
            asked[f"kshot-{k}"] = episodes
            if k:
                others = mislead(episodes, self._pool.classes, self._settings.seed)
                asked[f"kshot-{k}-random"] = others
        return [
            Stage(name, self._parts, functools.partial(self._classify, episodes))
            for name, episodes in asked.items()
        ]

    def figures(self) -> dict[str, Any]:
        """Accuracy of the model, of copying the nearest image, and with others shown."""
        results: dict[str, Any] = {"kshot/chance": 1 / self._settings.num_ways}
        for k, episodes in self._episodes.items():
            found = self._parts.load(f"kshot-{k}")
            chosen = {"model": found["chosen"]}
            if k:
                chosen["copy"] = found["nearest"]
                chosen["random"] = self._parts.load(f"kshot-{k}-random")["chosen"]
            for name, labels in chosen.items():
                accuracy = compute_accuracy(episodes, labels.tolist())
                results[f"kshot/{k}/{name}"] = accuracy
            answers = [episode.answer for episode in episodes]
            results[f"kshot/{k}/auc"] = compute_auc(found["probabilities"], answers)
        return results

    def format_table(self, results: Mapping[str, Any]) -> list[str]:
        """Lines of markdown."""
        title = f"accuracy, {self._settings.num_ways} labels"
        rows = {
            f"{k} shots": [
                *(results.get(f"kshot/{k}/{column}") for column in _COLUMNS),
                results["kshot/chance"],
            ]
            for k in self._episodes
        }
        return format_rows([title, *_COLUMNS, "chance"], rows)

    def _classify(
        self, episodes: Sequence[Episode], items: range, device: Any
    ) -> Arrays:
        """The chosen label of every question, and the one of the nearest image."""
        asked, generator = [episodes[i] for i in items], self._models.on(device)
        used = {row for e in asked for rows in (*e.shown, (e.asked,)) for row in rows}
        images: Any = {row: self._pool.documents[row].images[0] for row in used}
        probabilities = classify_episodes(
            generator,
            images,
            asked,
            seed=self._settings.seed,
            num_rows=self._settings.num_rows,
            first=items.start,
        )
        nearest = np.full(len(asked), -1)
        if asked[0].shown[0]:
            assert generator.embedder is not None  # checked at the start
            order = sorted(used)
            found = embed_any_size(generator.embedder, [images[r] for r in order])
            nearest = copy_nearest(dict(zip(order, found, strict=True)), asked)
        return {
            "chosen": probabilities.argmax(-1),
            "probabilities": probabilities,
            "nearest": np.array(nearest),
        }
