"""Captions -> words, as in COCO's caption evaluation, without Java.

COCO's scores are defined on the output of Stanford's Penn Treebank tokenizer (CoreNLP
3.4.1, `-preserveLines -lowerCase`), from which punctuation is then removed:

    A man's dog can't sit (ever).  ->  a man 's dog ca n't sit -lrb- ever -rrb- .
                                   ->  a man 's dog ca n't sit -lrb- ever -rrb-

The rules here were found by comparing with that program (brackets stay: it lowers their
names, and the list of removed words has them in capitals). The longest match wins, the
earlier rule on a tie. Like the original, whether an abbreviation ends a sentence depends
on the first letter of the *next caption*; so tokenize all captions of a set in one call.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence

_PUNCTUATION_TEXT = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;"
PUNCTUATION = frozenset(_PUNCTUATION_TEXT.split())

# Abbreviations whose period ends a sentence too when a capital or two spaces follow.
_ENDING = (
    "al az co ct ga jr ky la md mo rd rt sq sr va vt ala apr aug bhd cos dak dec esq est "
    "etc ext feb fla fri inc ind jan jul jun kan ltd mar mon neb nev nov oct plc pte pty "
    "sep seq sys tel thu tue wed wis wyo assn blvd bldg calif corp intl okla penn sept "
    "tenn thurs tues univ wisc minn mich conn colo ariz kans bros mont ppte ppty ptes ptys"
)
_ENDING_CAPITAL = "Pa Ark Del Ill Ore Tex Wash Mass Miss"
# Abbreviations before a name: their period never ends a sentence.
_TITLES = (
    "cf dr ft lt mr ms mt ph st vs wm adj adm adv ave cie col cpl det drs ens gen gov hon "
    "jos maj mfg mme mrs mtg pfc pvt rep rev sen sfc sgt spc ste assoc asst atty capt cmdr "
    "comdr dept messrs mlle natl pres prof supt sens reps govs lieut insp brig elec treas "
    "invt msgr alex"
)
_BEFORE_NUMBER = "ca no op pp art fig figs nos prop"
# After an acronym only these words begin a new sentence.
_STARTERS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In "
    "It Last Many More Now Once One Other Our She Since So Some Such That The Their Then "
    "There These They This We What When While Yet You"
)
_WITH_APOSTROPHE = "e'er ne'er o'er s'mores nat'l li'l cap'n hallowe'en ma'ams ma'am c'mon ol' dunkin' somethin'"
_NAMES = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "£": "#", "€": "$", "¤": "$", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4",
    "⅓": "1/3", "⅔": "2/3", "‘": "`", "’": "'", "“": "``", "”": "''", "«": "``",
    "»": "''", "‹": "`", "›": "'", "…": "...", "–": "--", "—": "--", "―": "--",
}  # fmt: skip
_ENTITIES = {
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&apos;": "'", "&mdash;": "--",
    "&ndash;": "--", "&nbsp;": "",
}  # fmt: skip
_SPLIT_WORDS = {"cannot", "gonna", "gotta", "lemme", "gimme", "wanna"}
_KEPT_OPENERS = "„‟‚"

_QUOTE = "['’]"
_SPACE = r"[ \u00a0]"

Action = Callable[[str], str] | None
# Group 1 of a rule is the token; the rest is context, which counts for the length of the
# match and is read again.
Rule = tuple[str, Action]


def tokenize_captions(captions: Sequence[str]) -> list[list[str]]:
    """The words of every caption, lower case, without punctuation.

    Args:
      captions: all captions of one set; a line break inside one counts as a space.
    """
    return [
        [word for word in words if word not in PUNCTUATION]
        for words in cut_tokens(captions)
    ]


def cut_tokens(captions: Sequence[str]) -> list[list[str]]:
    """All tokens of every caption with punctuation, as in the program's output."""
    text = "\n".join(re.sub(r"[\n\r]", " ", caption) for caption in captions)
    lines: list[list[str]] = [[]]
    position = 0
    plain, rules = _rules()
    while position < len(text):
        character = text[position]
        if character == "\n":
            lines.append([])
            position += 1
            continue
        if character.isspace():
            position += 1
            continue
        found = plain.match(text, position)
        if found is not None and found[0].lower() not in _SPLIT_WORDS:
            lines[-1].append(found[0].lower())
            position = found.end()
            continue
        longest, token, end = position, "", position + 1
        for rule, action in rules:
            found = rule.match(text, position)
            if found is not None and found.end() > longest:
                longest, end = found.end(), found.end(1)
                token = found[1] if action is None else action(found[1])
        if longest == position:
            token = _single(character)
        # A token with a space inside (a telephone number) is one word with a hard space.
        lines[-1] += token.replace(" ", "\u00a0").lower().split("\n") if token else []
        position = end
    return lines if captions else []


def _single(character: str) -> str:
    """A character without a rule: symbols are kept, others are dropped."""
    if character in _KEPT_OPENERS:
        return character
    if character.isascii():
        return character
    dropped = unicodedata.category(character) in (
        "Ps",
        "Pe",
        "Pd",
        "Cc",
        "Cf",
        "Cs",
        "Co",
    )
    return "" if dropped or ord(character) > 0xFFFF else character


def _letter_class() -> str:
    """A character class of letters and the marks on them (the regular expressions of
    Python would count fractions, and leave Thai and Hindi vowels out)."""
    ranges: list[list[int]] = []
    for code in [0xAD, *range(0x300, 0x10000), *range(0x41, 0x300)]:
        if code == 0xAD or unicodedata.category(chr(code))[:2] in (
            "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc"
        ):  # fmt: skip
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in ranges)


@functools.cache
def _rules() -> tuple[re.Pattern[str], list[tuple[re.Pattern[str], Action]]]:
    """(a word between blanks, [(rule, output)])."""
    letters = _letter_class()
    rules = [
        *_word_rules(letters),
        *_number_rules(),
        *_abbreviation_rules(letters),
        *_mark_rules(letters),
    ]
    return (
        re.compile(r"[A-Za-z]+(?=[ \n])"),
        [(re.compile(rule), action) for rule, action in rules],
    )


def _word(letters: str) -> str:
    """Letters and digits, with points between them."""
    letter, alnum = f"[{letters}]", f"[{letters}0-9]"
    return f"{letter}{alnum}*(?:[.!?]{letter}{alnum}*)*"


def _word_rules(letters: str) -> list[Rule]:
    """Words that are split, and whole words."""
    letter, alnum, quote = f"[{letters}]", f"[{letters}0-9]", _QUOTE
    not_letter = r"(?:[^A-Za-z]|$)"
    prefixed = f"(?:[dDoOlL]{quote}{alnum})?"
    word = _word(letters)
    special = "|".join(w.replace("'", quote) for w in _WITH_APOSTROPHE.split())
    auxiliary = f"{quote}(?:[msdMSD]|[rR][eE]|[vV][eE]|[lL][lL])"
    part = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    return [
        (f"({letter}{alnum}*?)[nN]['’`][tT]", None),
        ("([nN]['’`][tT])(?![A-Za-z])", lambda t: t.replace("’", "'")),
        (f"({letter}{alnum}*){auxiliary}{not_letter}", None),
        (f"({auxiliary}){not_letter}", lambda t: t.replace("’", "'")),
        ("([cC][aA][nN])[nN][oO][tT]", None),
        ("([gG][oO][nN])[nN][aA]", None),
        ("([wW][aA][nN])[nN][aA]", None),
        ("([gG][oO][tT])[tT][aA]", None),
        ("([lL][eE][mM])[mM][eE]", None),
        ("([gG][iI][mM])[mM][eE]", None),
        ("('[tT])(?:[iI][sS]|[wW][aA][sS])", None),
        (f"({word})", None),
        (f"({prefixed}{alnum}+(?:[-_]{prefixed}{alnum}+)*)", None),
        (r"([A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+)", lambda t: t.replace("&amp;", "&")),
        (rf"({part}(?:\\?/{part}){{1,2}})", None),
        (f"((?i:{special}))", None),
        (f"([A-HJ-XZn]{quote}{letter}{{2,}})", None),
        (f"([yY]{quote}){letter}", None),
        (f"([lLdDjJ]{quote})", None),
        (f"({quote}[nN]{quote})", None),
        (f"({quote}[nN]){not_letter}", None),
        (f"({quote}(?i:em|till?|cause))", None),
        (f"({quote}[2-9]0s)", None),
        (rf"({quote}[0-9]{{2}})\s", None),
    ]  # fmt: skip


def _number_rules() -> list[Rule]:
    number = r"(?:[0-9]*(?:[.:,][0-9]+)+|[0-9]+)"
    telephone = (
        rf"(?:\([0-9]{{2,3}}\){_SPACE}?|(?:\+\+?)?(?:[0-9]{{2,4}}[- \u00a0])?[0-9]{{2,4}}"
        r"[- \u00a0])[0-9]{3,4}[- \u00a0]?[0-9]{3,5}"
    )
    return [
        (r"((?:[0-9]{1,4}[- \u00a0])?[0-9]{1,4}\\?/[0-9]{1,4})", None),
        (f"({telephone})", _name_brackets),
        (f"([-+]?{number})", None),
    ]  # fmt: skip


def _abbreviation_rules(letters: str) -> list[Rule]:
    alnum, space, word = f"[{letters}0-9]", _SPACE, _word(letters)
    doctor = r"[Pp][Hh]\.[Dd]"
    abbreviation = f"(?:{doctor}|{_any_case(_ENDING, _ENDING_CAPITAL, _TITLES)})"
    ending = f"(?:{doctor}|{_any_case(_ENDING, _ENDING_CAPITAL)})"
    before_number = _any_case(_BEFORE_NUMBER)
    acronym = r"(?:[A-Za-z](?:\.[A-Za-z])+)"
    starter = rf"\s(?:{'|'.join(_STARTERS.split())}|M[rs]\.|</?[A-Za-z]+>)\s"
    return [
        (rf"({acronym}\.)", None),
        (r"([A-Za-z]\.)", None),
        (rf"({acronym})\.{starter}", lambda t: f"{t}."),
        (rf"([A-Za-z])\.{starter}", None),
        (rf"({abbreviation}\.)", None),
        (rf"({ending})\.\s(?:\s|[A-Z<])", lambda t: f"{t}."),
        (rf"({before_number}\.)(?:{space}?[0-9]|,)", None),
        (rf"({alnum}[{letters}0-9.,]*(?:-{alnum}+)+)", None),
        (rf"({acronym}\.-{alnum}(?:\.{alnum})*\.)", None),
        (rf"((?:{word}|{alnum}+(?:[-_]{alnum}+)*)\.)[,;:]", None),
        (r"((?:Canada|Sino|Korean|EU|Japan|non)-U\.S\.?)", None),
    ]  # fmt: skip


def _mark_rules(letters: str) -> list[Rule]:
    """Emoticons, addresses, tags, entities, quotes, brackets, dashes."""
    letter, space = f"[{letters}]", _SPACE
    suffixes = "jpe?g|png|gif|bmp|html?|txt|pdf|docx?|zip|exe|mp3|mpe?g|avi|mov|xml|gz"
    attribute = (
        r"""\s+[A-Za-z][\w:.-]*(?:\s*=\s*(?:'[^'\n]*'|"[^"\n]*"|[A-Za-z]\w*))?"""
    )
    host = r"""[^\s"`<>|.!?(){},/-]+\."""
    path = r"""(?:/[^\s"<>|()]+[^\s"<>|.!?(){},-])?"""
    return [
        (r"""([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])(?:[^A-Za-z0-9]|$)""", _name_brackets),
        (r"(\^_\^|-_-)", None),
        (r"""((?i:https?)://[^\s"<>|()]+[^\s"<>|.!?(){},-])""", None),
        (rf"(www\.(?:{host})+[a-zA-Z]{{2,4}}{path})", None),
        (rf"((?:{host})+(?:com|net|org|edu){path})", None),
        (r"""(<?[a-zA-Z0-9][^\s"<>|(){}]*@(?:[^\s"<>|(){}.]+\.)*[^\s"<>|(){}.]+>?)""", None),
        (r"(@[A-Za-z_][A-Za-z0-9_]*)", None),
        (f"(#{letter}+)", None),
        (rf"(<(?:[!?][A-Za-z-][^>\n]*|/?[A-Za-z][\w:.-]*(?:{attribute})*\s*/?)>)", None),
        (r"(&(?i:amp|lt|gt|apos|mdash|ndash|nbsp);)", lambda t: _ENTITIES[t.lower()]),
        (r"(&(?:#[0-9]+|[aeiouAEIOU](?:acute|grave|uml));)", None),
        (r"([A-Z]*\$)", None),
        (r"([cC](?:\+\+|#))", None),
        (rf"([A-Za-z0-9]+\.(?i:{suffixes}))(?![A-Za-z0-9])", None),
        (r'("|&quot;)[A-Za-z0-9$]', lambda _: "``"),
        (r'("|&quot;)', lambda _: "''"),
        (r"(')[A-Za-z][^ \t\n]", lambda _: "`"),
        (r"(''|``|`|')", None),
        (r"([(){}\[\]£€¤¢½¼¾⅓⅔‘’“”«»‹›…–—―])", _NAMES.__getitem__),
        (rf"(\.{{3,}}|\.(?:{space}\.){{2,}})", lambda _: "..."),
        (r"(-{2,4}(?!-))", lambda _: "--"),
        (r"(-{5,}|[?!]+|\\?\*+|_+|@+|#+|<<|>>|[⁰¹²³⁴-⁹₀-₉]+)", None),
    ]  # fmt: skip


def _any_case(*lists: str) -> str:
    """Lower-case entries in three cases; capitalised ones as they are, and all capitals."""
    words = {
        form
        for entry in " ".join(lists).split()
        for form in (entry, entry.capitalize(), entry.upper())
    }
    return f"(?:{'|'.join(sorted(words, key=lambda w: (-len(w), w)))})"


def _name_brackets(text: str) -> str:
    return text.replace("(", "-lrb-").replace(")", "-rrb-")
