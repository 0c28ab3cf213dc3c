"""Text cleaning of CLIP's tokenizer: repaired, unescaped, in lower case.

OpenAI's code calls `ftfy.fix_text`, unescapes HTML twice, normalises white space and
lowers the case. All character-level repairs of ftfy are implemented here, but not its
contextual ones (text decoded with a wrong encoding, "mojibake"): such texts get other
ids than with OpenAI's code.
"""

from __future__ import annotations

import html
import re
import unicodedata

_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
# Repeatedly escaped ampersands: &amp;amp;amp;
_AMPERSAND = re.compile("&(?:(?:amp|AMP|#0{0,20}38|#[xX]0{0,20}26);)+")
# Python refuses to parse numbers of thousands of digits.
_ZEROS = re.compile("(&#)0{20,}(?=[0-9])|(&#[xX])0{20,}(?=[0-9a-fA-F])")
_LONG_NUMBER = re.compile("(&#(?:[0-9]{20}|[xX][0-9a-fA-F]{20}))[0-9a-fA-F]+")
_TERMINAL_ESCAPE = re.compile("\033\\[[\\d;]*[a-zA-Z]")
_LINE_BREAK = re.compile("\r\n|[\r\u2028\u2029\x85]")
_C1_CONTROL = re.compile("[\x80-\x9f]")
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _character_table() -> dict[int, str | None]:
    """Ligatures, full and half width forms, curled quotes, control characters."""
    table: dict[int, str | None] = {}
    # Digraphs of Latin scripts and typographic ligatures: their letters.
    latin = (0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4))
    for code in (*latin, *range(0xFB00, 0xFB07)):
        table[code] = unicodedata.normalize("NFKC", chr(code))
    table[0xFB05] = "\u017ft"  # keeps its long s
    table[0x149] = "'n"  # its apostrophe is uncurled too
    table[0x3000] = " "
    for code in range(0xFF01, 0xFFF0):
        plain = unicodedata.normalize("NFKC", chr(code))
        if plain != chr(code):
            table[code] = plain
    for code in (0x2BC, *range(0x2018, 0x201C)):
        table[code] = "'"
    for code in range(0x201C, 0x2020):
        table[code] = '"'
    controls = (*range(9), 0x0B, *range(0x0E, 0x20), 0x7F, 0xFEFF)
    for code in (*controls, *range(0x206A, 0x2070), *range(0xFFF9, 0xFFFD)):
        table[code] = None
    return table


_CHARACTERS = _character_table()
# Real texts need two or three.
_MAX_REPAIRS = 32


def clean_text(text: str, rest: str = "") -> str:
    """The cleaned text that CLIP's BPE encodes.

    "Caf&eacute;  “ﬁne”\\n"  ->  'café "fine"'

    Args:
      text: any string.
      rest: the rest of its last line, if it was cut.
    """
    cleaned, unescapes = [], True
    lines = text.split("\n")
    for i, line in enumerate(lines):
        # A text with entities and no tag so far is considered escaped.
        unescapes = unescapes and "<" not in line
        if i == len(lines) - 1:
            unescapes = unescapes and "<" not in rest
        cleaned.append(_repair(line, unescapes))
    text = _unescape(_unescape("\n".join(cleaned))).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


def _unescape(text: str) -> str:
    """`html.unescape` for numbers of any length."""
    if "&#" in text:
        text = _ZEROS.sub(lambda match: match.group(1) or match.group(2), text)
        text = _LONG_NUMBER.sub(r"\1", text)
    return html.unescape(text)


def _repair(line: str, unescapes: bool) -> str:
    """Repairs until nothing changes, as one repair may enable another."""
    for _ in range(_MAX_REPAIRS):
        before = line
        if unescapes:
            line = _AMPERSAND.sub("&", line)
            line = _ENTITY.sub(_unescape_one, line)
        line = _TERMINAL_ESCAPE.sub("", line)
        line = _C1_CONTROL.sub(_from_windows, line)
        line = _LINE_BREAK.sub("\n", line.translate(_CHARACTERS))
        if _SURROGATE.search(line):
            line = _SURROGATE_PAIR.sub(_join_pair, line)
            line = _SURROGATE.sub("\ufffd", line)
        line = unicodedata.normalize("NFC", line)
        if line == before:
            break
    return line


def _unescape_one(match: re.Match[str]) -> str:
    entity = match.group(0)
    plain = html.unescape(entity)
    if ";" in plain and plain.isupper():
        # &EACUTE; is not an entity, but the intention is clear.
        plain = html.unescape(entity.lower()).upper()
    return entity if ";" in plain else plain


def _from_windows(match: re.Match[str]) -> str:
    """C1 controls are unused; these bytes were Windows-1252."""
    return match.group(0).encode("latin-1").decode("cp1252", "ignore") or match.group(0)


def _join_pair(match: re.Match[str]) -> str:
    pair = match.group(0)
    return pair.encode("utf-16", "surrogatepass").decode("utf-16")
