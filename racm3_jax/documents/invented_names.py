"""Invented, pronounceable names and labels, which mean nothing."""

from __future__ import annotations

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# There are few onsets, vowels, middles and endings, so that a small text vocabulary
# that was trained on some names covers all names; about six million combinations.
_ONSETS = _words("b br d dr f g gr h j k kl l m n p pr r s st t tr v z")
_VOWELS = _words("a e i o u")
_MIDDLES = _words("b d g k l ld lm m n nd r rd rk rm s sh st t v z")
_ENDINGS = _words(
    "ador akia amor andu aria athi elia enor erun essa iban idor ilon imar inth iska "
    "okar olin onia orim osta udan ulia umbra ural uvia"
)
_CODAS = _words("b d g k l m n p r s t x z")
# Fraction of names with one more syllable.
_LONG_SHARE = 0.75


def make_name(rng: np.random.Generator) -> str:
    """Samples a name of three to five syllables, such as "Dravonia" or "Kelmidor"."""
    parts = [_ONSETS[rng.integers(len(_ONSETS))], _VOWELS[rng.integers(len(_VOWELS))]]
    if rng.random() < _LONG_SHARE:
        parts += [
            _MIDDLES[rng.integers(len(_MIDDLES))],
            _VOWELS[rng.integers(len(_VOWELS))],
        ]
    parts += [_MIDDLES[rng.integers(len(_MIDDLES))]]
    parts += [_ENDINGS[rng.integers(len(_ENDINGS))]]
    return "".join(parts).capitalize()


def make_labels(count: int, rng: np.random.Generator) -> list[str]:
    """Samples different short nonsense words, such as "dam" or "kuvos"."""
    labels: dict[str, None] = {}
    while len(labels) < count:
        syllables = [
            _ONSETS[rng.integers(len(_ONSETS))] + _VOWELS[rng.integers(len(_VOWELS))]
            for _ in range(1 + rng.integers(2))
        ]
        coda = _CODAS[rng.integers(len(_CODAS))]
        labels.setdefault("".join(syllables) + coda)
    return list(labels)


class NameRegister:
    """Accepts names that cannot be confused with each other.

    Two names conflict if one contains the other, or if dropping at most one letter from
    each makes them equal (so all names are at least two edits apart).
    """

    _SHORTEST = 4

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._parts: set[str] = set()
        self._shortened: set[str] = set()

    def accept(self, name: str) -> bool:
        """Adds the name and returns True, or returns False without a change."""
        lower = name.lower()
        shortened = {lower[:i] + lower[i + 1 :] for i in range(len(lower))} | {lower}
        parts = {
            lower[i:j]
            for i in range(len(lower))
            for j in range(i + self._SHORTEST, len(lower) + 1)
        }
        if (
            lower in self._parts
            or not parts.isdisjoint(self._names)
            or not shortened.isdisjoint(self._shortened)
        ):
            return False
        self._names.add(lower)
        self._parts |= parts
        self._shortened |= shortened
        return True
