"""k-shot image classification with labels that mean nothing (RA-CM3, section 5.4).

    shown           [image] dax     context: k demonstrations of each label, as documents
                    [image] blick
    asked           [image] ?       the label whose text the model finds most likely

The labels' texts are invented words, sampled for each episode: only the demonstrations
say what they mean. Prompts and scores are those of `generation.classification`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64

from racm3_jax.evaluation.clip_score import embed_any_size
from racm3_jax.evaluation.document_sets import ShotPool
from racm3_jax.evaluation.intervals import Share, compute_share
from racm3_jax.evaluation.parts import Arrays, Parts
from racm3_jax.evaluation.replicas import Replicas
from racm3_jax.evaluation.settings import LikelihoodSettings
from racm3_jax.evaluation.suite import Stage, format_rows
from racm3_jax.generation.classification import Question, classify_questions
from racm3_jax.generation.tasks import Generator, Image

_TABLE_COLUMNS = ("model", "auc", "random", "copy")
INVENTED = ("dax", "blick", "wug", "toma", "fep", "zorp", "kiki", "bouba")


@dataclasses.dataclass(frozen=True)
class Episode:
    """One question: rows of the images that are shown, and of the one asked about.

    Attributes:
      shown: for each label, the rows of its demonstrations.
      asked: the row of the image to classify.
      answer: the position of its label.
      words: the text of each label.
    """

    shown: tuple[tuple[int, ...], ...]
    asked: int
    answer: int
    words: tuple[str, ...]


def sample_episodes(
    classes: Sequence[str],
    *,
    num_episodes: int,
    num_shots: int,
    num_ways: int = 2,
    words: Sequence[str] = INVENTED,
    seed: int = 0,
) -> list[Episode]:
    """Samples episodes; no episode shows the image that it asks about.

    Args:
      classes: the class of every image.
      num_episodes: questions.
      num_shots: demonstrations of each label; 0 leaves the model to guess.
      num_ways: labels to choose from.
      words: texts of the labels, at least `num_ways`.
      seed: episode i depends on (seed, i) alone.

    Raises:
      ValueError: too few classes, words, or images of a class.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(classes):
        rows.setdefault(name, []).append(row)
    usable = sorted(name for name, found in rows.items() if len(found) > num_shots)
    if len(usable) < num_ways or len(words) < num_ways:
        raise ValueError(
            f"{num_ways} labels with {num_shots} demonstrations need as many classes of "
            f"at least {num_shots + 1} images, and words; got {len(usable)} classes and "
            f"{len(words)} words"
        )
    episodes = []
    for i in range(num_episodes):
        rng = np.random.default_rng([seed, i])
        names = [usable[j] for j in rng.choice(len(usable), num_ways, replace=False)]
        answer = int(rng.integers(num_ways))
        sampled = [rng.permutation(rows[name]) for name in names]
        spoken = [
            str(words[j]) for j in rng.choice(len(words), num_ways, replace=False)
        ]
        episodes.append(
            Episode(
                tuple(tuple(int(x) for x in d[:num_shots]) for d in sampled),
                int(sampled[answer][num_shots]),
                answer,
                tuple(spoken),
            )
        )
    return episodes


def classify_episodes(
    generator: Generator,
    images: Sequence[Image] | Mapping[int, Image],
    episodes: Sequence[Episode],
    *,
    num_rows: int = 8,
) -> Float64[np.ndarray, "episodes labels"]:
    """How probable the model finds each label in each episode.

    Args:
      generator: its memory is not used.
      images: what the episodes' rows mean.
      episodes: the questions.
      num_rows: see `score_tokens`.
    """
    questions = [
        Question(
            images[episode.asked],
            [
                (images[row], word)
                for rows, word in zip(episode.shown, episode.words, strict=True)
                for row in rows
            ],
            episode.words,
        )
        for episode in episodes
    ]
    found = classify_questions(generator, questions, by="label", num_rows=num_rows)
    return np.stack([answer.probabilities for answer in found])


def mislead(
    episodes: Sequence[Episode], classes: Sequence[str], seed: int = 0
) -> list[Episode]:
    """The baseline of random retrieval: the same questions, other classes shown.

    What is shown under the labels has nothing to do with the image that is asked about,
    so that a model can only guess.

    Raises:
      ValueError: if an episode shows every class there is.
    """
    named = np.asarray(classes)
    changed = []
    for i, episode in enumerate(episodes):
        rng = np.random.default_rng([seed, i])
        taken = {classes[row] for rows in episode.shown for row in rows}
        others = np.flatnonzero(~np.isin(named, [*taken, classes[episode.asked]]))
        need = sum(len(rows) for rows in episode.shown)
        if len(others) < need:
            raise ValueError(
                f"{need} images of other classes are needed to mislead; there are "
                f"{len(others)}"
            )
        sampled = iter(rng.choice(others, need, replace=False).tolist())
        shown = tuple(tuple(next(sampled) for _ in rows) for rows in episode.shown)
        changed.append(dataclasses.replace(episode, shown=shown))
    return changed


def copy_nearest(
    embeddings: Mapping[int, Float32[np.ndarray, " d_embed"]],
    episodes: Sequence[Episode],
) -> list[int]:
    """The baseline of copying: the label of the demonstration that looks most alike.

    Args:
      embeddings: unit vectors of the images, by their rows.
      episodes: with at least one demonstration of each label.
    """
    return [
        int(
            np.argmax(
                [
                    max(embeddings[row] @ embeddings[episode.asked] for row in rows)
                    for rows in episode.shown
                ]
            )
        )
        for episode in episodes
    ]


def compute_auc(
    probabilities: Float[np.ndarray, "questions labels"], answers: Sequence[int]
) -> float:
    """Area under the ROC curve of all (question, label) pairs, one against the rest.

    The probability that a right label is given more than a wrong one, of all questions
    together; equal ones count half. 0.5 is chance, also for a model that prefers one label
    whatever is asked.

    Raises:
      ValueError: no questions, or fewer than two labels.
    """
    probabilities = np.asarray(probabilities, np.float64)
    if probabilities.ndim != 2 or not len(probabilities) or probabilities.shape[1] < 2:
        raise ValueError(
            "the area needs questions of at least two labels; got probabilities of "
            f"shape {list(probabilities.shape)}"
        )
    is_right = np.zeros(probabilities.shape, bool)
    is_right[np.arange(len(probabilities)), np.asarray(answers, int)] = True
    right, wrong = probabilities[is_right], np.sort(probabilities[~is_right])
    below = np.searchsorted(wrong, right, side="left")
    not_above = np.searchsorted(wrong, right, side="right")
    return float((below + not_above).sum() / (2 * len(right) * len(wrong)))


def compute_accuracy(episodes: Sequence[Episode], chosen: Sequence[int]) -> Share:
    """Share of episodes in which the chosen label is the right one."""
    return compute_share(
        [e.answer == label for e, label in zip(episodes, chosen, strict=True)]
    )


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
                *(results.get(f"kshot/{k}/{column}") for column in _TABLE_COLUMNS),
                results["kshot/chance"],
            ]
            for k in self._episodes
        }
        return format_rows([title, *_TABLE_COLUMNS, "chance"], rows)

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
            num_rows=self._settings.num_rows,
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
