"""CLIP's tokenisation step by step, as its paper's code defines it; for comparison.

Needs `ftfy` and `regex`, which the package itself does not.
"""

from __future__ import annotations

import html
import itertools

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ReferenceTokenizer:
    """Slow and simple: merges are applied to one word at a time, best rank first."""

    def __init__(self, merges: list[tuple[str, str]]) -> None:
        import regex

        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [byte for byte in range(256) if byte not in printable]
        order = printable + rest
        letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
        self.letter = dict(zip(order, letters, strict=True))
        vocab = letters + [letter + "</w>" for letter in letters]
        vocab += [first + second for first, second in merges]
        self.ids = {token: i for i, token in enumerate(vocab)}
        self.ranks = {merge: i for i, merge in enumerate(merges)}
        self.words = regex.compile(WORDS, regex.IGNORECASE)
        self.space = regex.compile(r"\s+")

    def clean(self, text: str, *, guess_encoding: bool = True) -> str:
        import ftfy

        # "Mojibake" is what ftfy guesses from context: the only step that is optional.
        text = ftfy.fix_text(text, fix_encoding=guess_encoding)
        text = html.unescape(html.unescape(text)).strip()
        return self.space.sub(" ", text).strip().lower()

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in self.words.findall(self.clean(text)):
            parts = [self.letter[byte] for byte in word.encode()]
            parts[-1] += "</w>"
            while len(parts) > 1:
                pairs = list(itertools.pairwise(parts))
                best = min(pairs, key=lambda pair: self.ranks.get(pair, 1 << 30))
                if best not in self.ranks:
                    break
                merged: list[str] = []
                i = 0
                while i < len(parts):
                    if tuple(parts[i : i + 2]) == best:
                        merged.append(parts[i] + parts[i + 1])
                        i += 2
                    else:
                        merged.append(parts[i])
                        i += 1
                parts = merged
            ids += [self.ids[part] for part in parts]
        return ids
