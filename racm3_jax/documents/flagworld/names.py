"""Invented, pronounceable names: they follow no pattern that a flag could share."""

from __future__ import annotations

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Onsets, vowels, middles and endings are few, so that a small text vocabulary trained on
# some names knows the pieces of all names; there are about six million combinations.
_ONSETS = _words("b br d dr f g gr h j k kl l m n p pr r s st t tr v z")
_VOWELS = _words("a e i o u")
_MIDDLES = _words("b d g k l ld lm m n nd r rd rk rm s sh st t v z")
_ENDINGS = _words(
    "ador akia amor andu aria athi elia enor erun essa iban idor ilon imar inth iska "
    "okar olin onia orim osta udan ulia umbra ural uvia"
)
_CODAS = _words("b d g k l m n p r s t x z")
# How many names have one syllable more.
_LONG_SHARE = 0.75


def make_name(rng: np.random.Generator) -> str:
    """Draw a name of three to five syllables, such as "Dravonia" or "Kelmidor"."""
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
    """Draws short words without meaning, such as "dam" or "kuvos", all different."""
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
    """Accepts names that no accepted name could be mistaken for.

    Two names are refused together if one is part of the other, or if dropping at most
    one letter from each makes them equal (so all names are at least two edits apart).
    """

    _SHORTEST = 4

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._parts: set[str] = set()
        self._shortened: set[str] = set()

    def accept(self, name: str) -> bool:
        """Take the name and return True, or return False and change nothing."""
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
