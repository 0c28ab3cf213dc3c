"""Captions as people write them: "a cactus in the style of OpenMoji"."""

from __future__ import annotations

import hashlib
import re

# {a_house} is "an OpenMoji", "a Twemoji".
TEMPLATES = (
    "{thing} in the style of {house}",
    "{thing}, {house} style",
    "{thing} drawn by {house}",
    "{a_house} drawing of {thing}",
    "{a_house} emoji of {thing}",
    "{thing} as an emoji, {house}",
)
_NAMES = {
    "mount fuji": "Mount Fuji",
    "tokyo tower": "the Tokyo tower",
    "statue of liberty": "the Statue of Liberty",
    "milky way": "the Milky Way",
    "kaaba": "the Kaaba",
    "sun": "the sun",
    "sun with face": "the sun with a face",
    "dvd": "a DVD",
}
# Substances, games and states.
_UNCOUNTED = (
    *("bread", "bacon", "popcorn", "sushi", "oden", "spaghetti", "custard", "sake"),
    *("camping", "cooking", "fog", "foggy", "construction", "building construction"),
    *("tennis", "bowling", "badminton", "ping pong", "field hockey", "ice hockey"),
    *("fire", "high voltage", "ice cream", "soft ice cream", "shaved ice"),
    *(
        "cooked rice",
        "curry rice",
        "baguette bread",
        "meat on bone",
        "american football",
    ),
    *("locked", "unlocked", "locked with pen", "locked with key"),
)
_HEAD_ENDS = re.compile(r" (?:with|without|of|on|in|behind|over|at|and|not|showing) ")
_VOWEL = re.compile(r"[aeiou]|hour|8", re.IGNORECASE)
_CONSONANT = re.compile(r"uni|eu|ew|ut|one", re.IGNORECASE)


def with_article(name: str) -> str:
    """A thing as in a sentence.

    cactus -> a cactus, octopus -> an octopus, scissors -> scissors
    """
    lower = name.lower()
    if lower in _NAMES:
        return _NAMES[lower]
    if lower in _UNCOUNTED or lower.endswith(("o’clock", "-thirty")):
        return name
    head = _HEAD_ENDS.split(lower)[0]
    if head.endswith("s") and not head.endswith(("ss", "us", "os")):
        return name
    return f"{_article(name)} {name}"


def _article(name: str) -> str:
    starts_with_vowel = _VOWEL.match(name) and not _CONSONANT.match(name)
    return "an" if starts_with_vowel else "a"


def write_captions(thing: str, house: str, key: str) -> list[str]:
    """All phrasings of an image's caption; the key determines which comes first.

    Args:
      thing: its label.
      house: the title of its icon set.
      key: of the image.
    """
    words = {
        "thing": with_article(thing),
        "house": house,
        "a_house": f"{_article(house)} {house}",
    }
    first = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    first %= len(TEMPLATES)
    turned = TEMPLATES[first:] + TEMPLATES[:first]
    return [template.format(**words) for template in turned]


def names_thing(caption: str, thing: str) -> bool:
    """Whether the caption has the thing's label, in any case and with any article."""
    words = re.findall(r"[\w’'-]+", caption.lower())
    label = re.findall(r"[\w’'-]+", thing.lower())
    return any(
        words[i : i + len(label)] == label for i in range(len(words) - len(label) + 1)
    )
