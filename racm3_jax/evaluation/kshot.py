"""k-shot image classification with labels that mean nothing (RA-CM3, section 5.4).

    shown           [image] dax     context: k demonstrations of each label, as documents
                    [image] blick
    asked           [image] ?       the label whose text the model finds most likely

The labels' texts are invented words, drawn anew for each episode: only the demonstrations
say what they stand for. Several episodes of one query set give the interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32

from racm3_jax.documents.images import resize_image
from racm3_jax.evaluation.intervals import Share, compute_share
from racm3_jax.evaluation.likelihood import Scored, score_tokens
from racm3_jax.generation.tasks import Generator, Image
from racm3_jax.sequences.layout import beginning_prompt
from racm3_jax.types import TokenizedDocument, TokenizedSegment

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
    """Draws episodes; an image is never shown and asked about at once.

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
        drawn = [rng.permutation(rows[name]) for name in names]
        spoken = [
            str(words[j]) for j in rng.choice(len(words), num_ways, replace=False)
        ]
        episodes.append(
            Episode(
                tuple(tuple(int(x) for x in d[:num_shots]) for d in drawn),
                int(drawn[answer][num_shots]),
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
    seed: int = 0,
    num_rows: int = 8,
    first: int = 0,
) -> list[int]:
    """The label that the model chooses in each episode.

    Demonstrations stand in random order, each label behind its image (as in
    `sequences.episodes`); the label's words are scored behind the asked image, by the
    mean over their ids, so that long words are not punished.

    Args:
      generator: its memory is not used.
      images: what the episodes' rows mean.
      episodes: the questions.
      seed: of the orders.
      num_rows: see `score_tokens`.
      first: number of the first episode, where these are some of a longer list.
    """
    tokenizer, vocab = generator.tokenizer, generator.tokenizer.vocab
    used = sorted(
        {row for e in episodes for rows in (*e.shown, (e.asked,)) for row in rows}
    )
    pixels = [resize_image(images[row], tokenizer.image.image_size) for row in used]
    codes = tokenizer.image.encode(np.stack(pixels))
    image_tokens = dict(zip(used, vocab.image_tokens(codes), strict=True))
    text_tokens = {
        word: tokenizer.encode_text(word) for e in episodes for word in e.words
    }
    end = np.array([vocab.eod], np.int32)
    sequences, owners = [], []
    for i, episode in enumerate(episodes):
        pairs = [
            (row, word)
            for rows, word in zip(episode.shown, episode.words, strict=True)
            for row in rows
        ]
        order = np.random.default_rng([seed, first + i]).permutation(len(pairs))
        shown = [
            TokenizedDocument(
                f"shown-{row}",
                (
                    TokenizedSegment("image", image_tokens[row]),
                    TokenizedSegment("text", text_tokens[word]),
                ),
            )
            for row, word in (pairs[j] for j in order)
        ]
        asked = np.append(image_tokens[episode.asked], np.int32(vocab.break_))
        context = beginning_prompt(shown, asked, vocab)
        for word in episode.words:
            sequences.append(Scored(context, np.concatenate([text_tokens[word], end])))
            owners.append(i)
    nats = score_tokens(generator, sequences, num_rows=num_rows)
    means = np.array([x.mean() for x in nats])
    return [int(means[np.array(owners) == i].argmin()) for i in range(len(episodes))]


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
        drawn = iter(rng.choice(others, need, replace=False).tolist())
        shown = tuple(tuple(next(drawn) for _ in rows) for rows in episode.shown)
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


def compute_accuracy(episodes: Sequence[Episode], chosen: Sequence[int]) -> Share:
    """Share of episodes in which the chosen label is the right one."""
    return compute_share(
        [e.answer == label for e, label in zip(episodes, chosen, strict=True)]
    )
