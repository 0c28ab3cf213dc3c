"""Chameleon's vocabulary, read by name and mapped to our ranges.

    their id   0     1      2     3      4..8195     8196    8197           8198..8709
    name       <s>   <pad>  </s>  <unk>  IMGIMG...Z  <eoss>  <racm3:break>  <reserved...>
    role       eod   pad    eod   -      images      eoss    break          sentinels

    our ids:   text | images by codebook index | sentinels | pad eod break eoss | the rest

Their image tokens are not in codebook order: the index is in the name, with letters
A..J for digits. Our `<eod>` opens and closes a document; Chameleon's `<s>` opens and
`</s>` closes. So `<eod>` takes the input row of one and the output row of the other,
and the two unused rows are swapped among the rest: nothing is lost.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from racm3_jax.porting.tensors import PortingError
from racm3_jax.tokenizers.bpe import TextTokenizer

OPENS, CLOSES = "<s>", "</s>"
PAD, BREAK, EOSS, UNKNOWN = "<pad>", "<racm3:break>", "<eoss>", "<unk>"
IMAGE_PLACEHOLDER = "<image>"
MAX_SENTINELS = 512
_IMAGE_NAME = re.compile("IMGIMG([A-J]+)Z")
_RESERVED_NAME = re.compile(r"<reserved(\d+)>")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The mapping from our tokens to theirs.

    Attributes:
      text_ids: their ids of the text tokens, ascending.
      num_codes: number of image codes.
      num_sentinels: number of sentinels.
      inputs: for each of our tokens, their row of the embedding.
      outputs: for each of our tokens, their row of the head.
    """

    text_ids: Int[np.ndarray, " text"]
    num_codes: int
    num_sentinels: int
    inputs: Int[np.ndarray, " vocab"]
    outputs: Int[np.ndarray, " vocab"]


def code_of_name(name: str) -> int | None:
    """The codebook index of a name; None for other names."""
    match = _IMAGE_NAME.fullmatch(name)
    if match is None:
        return None
    return int("".join(str(ord(letter) - ord("A")) for letter in match.group(1)))


def read_vocabulary(
    tokenizer: Mapping[str, Any], vocab_size: int, where: str
) -> Vocabulary:
    """Orders all ids of a `tokenizer.json`.

    Args:
      tokenizer: its content.
      vocab_size: rows of the model's embedding; ids without a name go to the rest.
      where: the file, for error messages.

    Raises:
      PortingError: missing or contradictory names.
    """
    ids, added = _names(tokenizer, where)
    if max(ids.values()) >= vocab_size:
        raise PortingError(
            f"{where} has ids up to {max(ids.values())}, but the model has {vocab_size} "
            "rows: it is the tokenizer of another model"
        )
    absent = [name for name in (OPENS, CLOSES, PAD, BREAK, EOSS) if name not in ids]
    images = [
        (code, i) for name, i in ids.items() if (code := code_of_name(name)) is not None
    ]
    codes = dict(images)
    if absent or not codes:
        absent += [] if codes else ["IMGIMG...Z"]
        raise PortingError(
            f"{where} lacks {', '.join(absent)}: it is not Chameleon's vocabulary"
        )
    if sorted(code for code, _ in images) != list(range(len(images))):
        raise PortingError(
            f"{where} names {len(images)} image codes, but not each of 0.."
            f"{len(images) - 1} once: the vocabulary is damaged"
        )
    reserved = {
        int(match.group(1)): i
        for name, i in ids.items()
        if (match := _RESERVED_NAME.fullmatch(name))
    }
    sentinels = [reserved[number] for number in sorted(reserved)][:MAX_SENTINELS]
    if not sentinels:
        raise PortingError(f"{where} has no <reserved...> names to use as sentinels")
    special = {*codes.values(), *reserved.values(), *added}
    special |= {ids[n] for n in (OPENS, CLOSES, PAD, BREAK, EOSS)}
    special |= {ids[n] for n in (UNKNOWN, IMAGE_PLACEHOLDER) if n in ids}
    text = sorted(set(ids.values()) - special)
    front = text + [codes[code] for code in range(len(codes))] + sentinels
    used = {*front, *(ids[n] for n in (OPENS, PAD, BREAK, EOSS))}
    orders = []
    for eod, other in ((OPENS, CLOSES), (CLOSES, OPENS)):
        control = [ids[PAD], ids[eod], ids[BREAK], ids[EOSS]]
        rest = [i for i in range(vocab_size) if i not in used]
        rest[rest.index(ids[CLOSES])] = ids[other]
        orders.append(np.array(front + control + rest, np.int64))
    return Vocabulary(np.array(text), len(codes), len(sentinels), *orders)


def _names(tokenizer: Mapping[str, Any], where: str) -> tuple[dict[str, int], set[int]]:
    """All names with their ids, and the ids of the added tokens."""
    try:
        ids = {str(name): int(i) for name, i in tokenizer["model"]["vocab"].items()}
        added = {
            str(entry["content"]): int(entry["id"])
            for entry in tokenizer.get("added_tokens") or ()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PortingError(
            f"{where} is not a tokenizer.json of a BPE ({error})"
        ) from None
    for name, i in added.items():
        if ids.setdefault(name, i) != i:
            raise PortingError(f"{where} gives {name} two ids, {ids[name]} and {i}")
    if len(set(ids.values())) != len(ids):
        raise PortingError(f"{where} gives two names one id: it is damaged")
    return ids, set(added.values())


def build_text_tokenizer(
    tokenizer: Mapping[str, Any], vocabulary: Vocabulary, where: str
) -> TextTokenizer:
    """The text part of their tokenizer, with our ids and without control tokens.

    Raises:
      PortingError: merges that need other tokens than text, or not a byte-level BPE.
    """
    model = dict(tokenizer["model"])
    ours = {int(i): n for n, i in enumerate(vocabulary.text_ids)}
    model["vocab"] = {name: ours[i] for name, i in model["vocab"].items() if i in ours}
    model["unk_token"] = None
    fields = dict(tokenizer) | {
        "model": model,
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    try:
        return TextTokenizer(Tokenizer.from_str(json.dumps(fields)))
    # The library raises plain Exception for what it cannot read.
    except Exception as error:  # noqa: BLE001
        raise PortingError(
            f"the text part of {where} cannot be used: {error}"
        ) from None
