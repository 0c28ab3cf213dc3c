"""CIDEr-D, BLEU-1..4 and ROUGE-L, as in the COCO caption evaluation.

All three are functions of n-gram counts or common subsequences of words; the words are
those of `treebank.tokenize_captions`. Equal to `pycocoevalcap`, quirks included: CIDEr-D
uses the number of *bigrams* as a caption's length, BLEU adds small constants.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import math
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int

from racm3_jax.evaluation.treebank import tokenize_captions

MAX_ORDER = 4
_LENGTH_SIGMA = 6.0
_ROUGE_BETA = 1.2
_BLEU_SMALL, _BLEU_TINY = 1e-9, 1e-15
_SPICE_PARSER = ("spice", "lib", "stanford-corenlp-3.6.0-models.jar")

Words = Sequence[str]
Counts = collections.Counter[tuple[str, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionScores:
    """Scores of a set of captions, per caption where possible.

    Attributes:
      cider: CIDEr-D of every caption, 0..10; the set's score is its mean (papers print
        100 times that).
      rouge_l: of every caption, 0..1.
      bleu_counts: of every caption, the counts that BLEU sums: its length, the closest
        reference's length, all n-grams and matching n-grams for n = 1..4.
    """

    cider: Float64[np.ndarray, " captions"]
    rouge_l: Float64[np.ndarray, " captions"]
    bleu_counts: Int[np.ndarray, "captions 10"]

    def means(self, rows: Int[np.ndarray, " rows"] | None = None) -> dict[str, float]:
        """The scores of the set by name, or of the captions `rows` (for bootstrap)."""
        if rows is None:
            rows = np.arange(len(self.cider))
        bleu = compute_bleu(self.bleu_counts[rows].sum(0))
        return {
            "cider": float(self.cider[rows].mean()),
            "rouge_l": float(self.rouge_l[rows].mean()),
            **{f"bleu_{n + 1}": value for n, value in enumerate(bleu)},
        }


def strip_prefix(text: str, prefix: str) -> str:
    """A caption without the prefix in its prompt.

    "Photo of a dog", "Photo of"  ->  "a dog"

    Reference captions do not begin with it, so scoring these words lowers CIDEr-D. Case
    and spaces do not matter; a caption without the prefix is not changed.
    """
    words, start = text.split(), prefix.split()
    if not start or [w.lower() for w in words[: len(start)]] != [
        w.lower() for w in start
    ]:
        return text
    return " ".join(words[len(start) :])


def score_captions(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> CaptionScores:
    """Tokenizes and scores one candidate per image.

    Args:
      candidates: the caption of each image.
      references: the reference captions of the same images, in the same order. Document
        frequencies of CIDEr-D are counted over these, so a score depends on the set.

    Raises:
      ValueError: the lengths differ, there are none, or an image has no reference.
    """
    if len(candidates) != len(references) or not len(candidates):
        raise ValueError(
            "candidates and references go together, one entry an image, at least one; "
            f"got {len(candidates)} and {len(references)}"
        )
    lacking = [i for i, group in enumerate(references) if not len(group)]
    if lacking:
        raise ValueError(
            f"image {lacking[0]} has no reference caption ({len(lacking)} have none): "
            "leave images without references out"
        )
    found = tokenize_captions(candidates)
    flat = iter(tokenize_captions([text for group in references for text in group]))
    wanted = [[next(flat) for _ in group] for group in references]
    # A token with a hard space inside ("1 1/2") is one word to ROUGE-L, two to the others.
    split = [_split(words) for words in found]
    split_wanted = [[_split(words) for words in group] for group in wanted]
    return CaptionScores(
        compute_cider(split, split_wanted),
        np.array([rouge_l(c, r) for c, r in zip(found, wanted, strict=True)]),
        np.array([bleu_counts(*x) for x in zip(split, split_wanted, strict=True)]),
    )


def _split(words: Words) -> Words:
    return " ".join(words).split()


def count_ngrams(words: Words) -> Counts:
    """Counts each sequence of 1 to 4 words."""
    return collections.Counter(
        tuple(words[i : i + n])
        for n in range(1, MAX_ORDER + 1)
        for i in range(len(words) - n + 1)
    )


def compute_cider(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]]
) -> Float64[np.ndarray, " images"]:
    """CIDEr-D of every image (arXiv 1411.5726, section 5), times 10 as in the tool.

    The mean over references and n of the clipped cosine similarity of tf-idf vectors of
    n-grams, times a Gaussian of the difference in length. With a single image all idf
    are 0, and so is the score.
    """
    reference_counts = [[count_ngrams(r) for r in group] for group in references]
    frequency: Counts = collections.Counter(
        ngram for group in reference_counts for ngram in set().union(*group)
    )
    log_images = math.log(len(references))

    def weigh(
        counts: Counts,
    ) -> tuple[dict[tuple[str, ...], float], Float64[np.ndarray, " orders"], int]:
        vector = {
            ngram: count * (log_images - math.log(max(1, frequency[ngram])))
            for ngram, count in counts.items()
        }
        squares = np.zeros(MAX_ORDER)
        for ngram, value in vector.items():
            squares[len(ngram) - 1] += value * value
        length = sum(c for ngram, c in counts.items() if len(ngram) == 2)
        return vector, np.sqrt(squares), length

    scores = np.zeros(len(references))
    for i, (words, group) in enumerate(zip(candidates, reference_counts, strict=True)):
        vector, norm, length = weigh(count_ngrams(words))
        for counts in group:
            other, other_norm, other_length = weigh(counts)
            products = np.zeros(MAX_ORDER)
            for ngram, value in vector.items():
                if ngram in other:
                    wanted = other[ngram]
                    products[len(ngram) - 1] += min(value, wanted) * wanted
            norms = norm * other_norm
            cosine = np.divide(products, norms, out=products, where=norms != 0)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * _LENGTH_SIGMA**2))
            scores[i] += 10 * cosine.mean() * penalty / len(group)
    return scores


def bleu_counts(candidate: Words, references: Sequence[Words]) -> list[int]:
    """The counts that BLEU sums over images (see `CaptionScores.bleu_counts`)."""
    counts, highest = count_ngrams(candidate), collections.Counter()
    for reference in references:
        highest |= count_ngrams(reference)
    length = len(candidate)
    closest = min((abs(len(r) - length), len(r)) for r in references)[1]
    guessed = [max(0, length - n) for n in range(MAX_ORDER)]
    right = [0] * MAX_ORDER
    for ngram, count in counts.items():
        right[len(ngram) - 1] += min(count, highest[ngram])
    return [length, closest, *guessed, *right]


def compute_bleu(counts: Int[np.ndarray, " counts"]) -> list[float]:
    """BLEU-1..4 of summed `bleu_counts`, with the brevity penalty of the whole set."""
    length, closest = (int(x) for x in counts[:2])
    ratio = (length + _BLEU_TINY) / (closest + _BLEU_SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(MAX_ORDER):
        guessed, right = int(counts[2 + n]), int(counts[2 + MAX_ORDER + n])
        product *= (right + _BLEU_TINY) / (guessed + _BLEU_SMALL)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return scores


def rouge_l(candidate: Words, references: Sequence[Words]) -> float:
    """F-measure (beta 1.2) of the longest common subsequence with the references.

    Precision and recall are each the best over all references, as in the COCO tool; an
    empty caption counts as one empty word there, so two empty ones agree.
    """
    words = list(candidate) or [""]
    others = [list(reference) or [""] for reference in references]
    common = [_common_length(words, other) for other in others]
    precision = max(common) / len(words)
    recall = max(c / len(other) for c, other in zip(common, others, strict=True))
    if not precision:
        return 0.0
    squared = _ROUGE_BETA**2
    return (1 + squared) * precision * recall / (recall + squared * precision)


def _common_length(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def score_with_java(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Float64[np.ndarray, " captions"]]:
    """METEOR and SPICE of every caption by the original programs, Java archives.

    Returns:
      {"meteor": ..., "spice": ...}, or fewer where Java, `pycocoevalcap` or SPICE's parser
      is missing: all are optional.
    """
    package = importlib.util.find_spec("pycocoevalcap")
    if not shutil.which("java") or package is None:
        return {}
    from pycocoevalcap.meteor.meteor import Meteor  # pyright: ignore

    found = tokenize_captions(candidates)
    flat = iter(tokenize_captions([text for group in references for text in group]))
    wanted = {
        i: [" ".join(next(flat)) for _ in group] for i, group in enumerate(references)
    }
    given = {i: [" ".join(words)] for i, words in enumerate(found)}
    meteor = Meteor()
    # It is never told to end, and leaves its pipes open.
    with meteor.meteor_p as process:
        _, meteors = meteor.compute_score(wanted, given)
        process.kill()
    scores = {"meteor": np.asarray(meteors, np.float64)}
    (folder,) = package.submodule_search_locations or [""]
    # Without its parser's files SPICE would download 400 MB by itself.
    if pathlib.Path(folder, *_SPICE_PARSER).is_file():
        from pycocoevalcap.spice.spice import Spice  # pyright: ignore

        _, spices = Spice().compute_score(wanted, given)
        # Where neither side has any tuples, there is no score.
        values = [float(score["All"]["f"]) for score in spices]
        scores["spice"] = np.nan_to_num(np.array(values, np.float64))
    return scores
