"""The CM3 objective: spans of a document are moved to its end.

    plain    <eod> t1 t2 t3 <break> i1 i2 <eod>
    masked   <eod> t1 <mask:0> t3 <break> i1 i2 <eod> <mask:0> t2 <eoss>
    rotated  <eod> <mask:0> <break> i1 i2 <eod> <mask:0> t1 t2 t3 <eoss>

Retrieved documents, if they are masked, end with their own moved spans: at the end of the
sequence, after the main document, these would not be there when it is predicted, and a
small model then forgets to read (experiments/LOG.md, 2026-11-30).

A causal model trained on such sequences learns infilling with context on both sides
(arXiv 2201.07520, section 2). Spans do not cross `<break>` (arXiv 2309.02591): one that
would is clipped to the segment with the largest overlap, the first one if equal, as in
the public code of CM3 and CM3Leon. Clipping to the segment where a span starts would
give captions more spans, but nearly all of them suffixes, and image spans would almost
never start at the first code (one mask, rotation off):

    caption and image in tokens     spans in     of those,   of image spans,
                                    captions     suffixes    from the first code
    32 and 1024, largest overlap       0.19%       53.80%        5.98%
    32 and 1024, where it starts       5.97%       98.56%        0.20%
    10 and 64, largest overlap         3.83%       61.43%       24.63%
    10 and 64, where it starts        25.20%       94.13%        3.10%

A span almost never covers a whole caption by chance, so rotation of a whole segment has
its own probability: without it, captioning by infilling would not be trained.

Pure NumPy: functions take `rng` and return arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from racm3_jax.limits import check_choices, check_range
from racm3_jax.sequences import layout
from racm3_jax.types import Example, TokenizedDocument
from racm3_jax.vocab import Vocab

NumMasks = Literal["poisson_clamp1", "poisson_clamp0", "fixed", "single", "none"]
SegmentOrder = Literal["stored", "as_main"]
Span = tuple[int, int]


class ExampleTooLong(ValueError):
    """The moved spans of a document are longer than a row."""


@dataclasses.dataclass(frozen=True)
class CausalMaskingConfig:
    """How many spans are moved, and which.

    With `num_masks="none"` and `rotation_probability=0` sequences are plain documents.

    Attributes:
      num_masks: distribution of the number of spans of a document that is not rotated.
        "poisson_clamp1" is the paper's Clamp(Poisson(mean), 1, max_masks),
        "poisson_clamp0" the later code's clamp from 0 (at mean 1, 37% stay plain),
        "fixed" is `mean` spans, "single" one span, "none" no span.
      mean: of the Poisson distribution, or the number of spans for "fixed".
      max_masks: maximum spans per document; at most the number of sentinels.
      rotation_probability: fraction of main documents with one whole segment as the
        only span. Independent of `num_masks`. Not of retrieved documents, whose captions
        would follow what is read in them.
      rotation_text_share: fraction of the rotated documents in which a text is moved,
        not an image. A document without the sampled modality rotates the other one.
      mask_retrieved: retrieved documents have spans too, as in the paper, each sampled
        independently and moved to the document's own end.
      retrieved_probability: with `mask_retrieved`, the fraction of retrieved documents
        that have spans; 1 in the paper. The documents that a user's prompt reads have
        none, and a model that never saw such ones forgets how to answer after them.
      sentinel_weight: loss weight of `<mask:i>` as a target.
      text_weight: loss weight of the main document's text tokens; image tokens have 1.
    """

    num_masks: NumMasks = "poisson_clamp1"
    mean: float = 1.0
    max_masks: int = 16
    rotation_probability: float = 0.25
    rotation_text_share: float = 1.0
    mask_retrieved: bool = False
    retrieved_probability: float = 1.0
    sentinel_weight: float = 0.0
    text_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, "causal_masking", num_masks=get_args(NumMasks))
        if self.mean < 0 or (self.num_masks == "fixed" and self.mean % 1):
            raise ValueError(
                "causal_masking.mean must be >= 0, and whole when num_masks is "
                f"'fixed'; got {self.mean}"
            )
        check_range(self, "causal_masking", "max_masks", low=1)
        if not 0 < self.text_weight < float("inf"):
            raise ValueError(
                f"causal_masking.text_weight must be above 0; got {self.text_weight}"
            )
        shares = "rotation_probability", "rotation_text_share", "retrieved_probability"
        check_range(self, "causal_masking", *shares, low=0, high=1)


def sample_num_masks(config: CausalMaskingConfig, rng: np.random.Generator) -> int:
    """Samples the number of spans of a document without rotation, before overlaps."""
    if config.num_masks == "none":
        return 0
    if config.num_masks == "single":
        return 1
    if config.num_masks == "fixed":
        return min(int(config.mean), config.max_masks)
    least = 1 if config.num_masks == "poisson_clamp1" else 0
    return int(np.clip(rng.poisson(config.mean), least, config.max_masks))


def sample_spans(
    tokens: Int32[np.ndarray, " length"],
    config: CausalMaskingConfig,
    vocab: Vocab,
    rng: np.random.Generator,
) -> list[Span]:
    """Samples the ranges of one document that are moved.

    Args:
      tokens: a document as `layout.document_tokens` makes it.
      config: the distribution.
      vocab: identifies `<break>`.
      rng: the only source of randomness.

    Returns:
      Half-open ranges of `tokens`, ascending, disjoint, not empty, without `<break>`.
      Fewer than sampled if the document is too short to keep them disjoint.
    """
    if rng.random() < config.rotation_probability:
        return _sample_rotation(tokens, config, vocab, rng)
    num_masks = sample_num_masks(config, rng)
    inside = np.flatnonzero(tokens != vocab.break_)
    if num_masks == 0 or len(inside) == 0:
        return []
    # n*n candidates for n masks, the first ones that fit win, as in the authors' code.
    ends = _segment_ends(tokens, vocab)
    starts = np.append(0, ends[:-1] + 1)
    candidates = rng.integers(len(inside), size=(num_masks * num_masks, 2))
    candidates = inside[np.sort(candidates, axis=1)]
    taken: list[Span] = []
    for first, last in candidates.tolist():
        firsts, lasts = np.maximum(starts, first), np.minimum(ends, last + 1)
        largest = int((lasts - firsts).argmax())
        span = (int(firsts[largest]), int(lasts[largest]))
        if all(span[1] <= start or end <= span[0] for start, end in taken):
            taken.append(span)
        if len(taken) == num_masks:
            break
    return sorted(taken)


def apply_masks(
    tokens: Int32[np.ndarray, " length"], spans: Sequence[Span], vocab: Vocab
) -> Int32[np.ndarray, " masked_length"]:
    """Replaces each span by its sentinel and moves it after the last `<eod>`.

    index    0     1  2  3  4       5  6  7
    tokens   <eod> t1 t2 t3 <break> i1 i2 <eod>          spans [(2, 3), (5, 6)]
    result   <eod> t1 <mask:0> t3 <break> <mask:1> i2 <eod>
                                     <mask:0> t2 <eoss> <mask:1> i1 <eoss>

    Args:
      tokens: a whole sequence as `layout.join` makes it.
      spans: half-open ranges of `tokens`, ascending, disjoint, not empty, without
        `<eod>` and `<break>`; they get `<mask:0>`, `<mask:1>`, ... from left to right.
      vocab: of the tokens.

    Raises:
      ValueError: spans overlap, are empty, leave the sequence, or hold a control token.
    """
    return _apply(tokens, _arrange(tokens, spans, vocab))


def unmask(
    tokens: Int32[np.ndarray, " masked_length"], vocab: Vocab
) -> Int32[np.ndarray, " length"]:
    """Moves spans back, document by document: the inverse of `apply_masks`.

    <eod> t1 <mask:0> t3 <eod> <mask:0> t2 <eoss>  ->  <eod> t1 t2 t3 <eod>

    Raises:
      ValueError: the sequence has no `<eod>`; a moved span is not
        `<mask:i> ... <eoss>`; or a sentinel has no span, or a span has no sentinel.
    """
    tokens = np.asarray(tokens, np.int32)
    eods = np.flatnonzero(tokens == vocab.eod)
    if not len(eods):
        raise ValueError("unmask needs a sequence with <eod>; got one without")
    pieces, start = [], 0
    for end, limit in zip(eods + 1, [*eods[1:], len(tokens)], strict=True):
        # The next document starts after the last moved span of this one.
        ends = end + 1 + np.flatnonzero(tokens[end:limit] == vocab.eoss)
        stop = limit if limit == len(tokens) else max(end, *ends.tolist(), 0)
        pieces.append(_put_back(tokens[start:end], tokens[end:stop], vocab))
        start = stop
    return np.concatenate(pieces)


def _put_back(
    body: Int32[np.ndarray, " body"], moved: Int32[np.ndarray, " moved"], vocab: Vocab
) -> Int32[np.ndarray, " length"]:
    """One document with its moved spans in place; see `unmask`."""
    spans: dict[int, np.ndarray] = {}
    start = 0
    for end in np.flatnonzero(moved == vocab.eoss):
        name = int(moved[start]) if start < end else vocab.eoss
        if not vocab.is_sentinel(name) or name in spans:
            raise ValueError(
                "a moved span must start with its own sentinel and end with "
                f"<eoss>; got {vocab.to_text(moved[start : end + 1])}"
            )
        spans[name] = moved[start + 1 : end]
        start = int(end) + 1
    if start != len(moved):
        raise ValueError(
            f"a moved span has no <eoss>: {vocab.to_text(moved[start:][:8])} ..."
        )
    pieces, position = [], 0
    for at in np.flatnonzero(vocab.is_sentinel(body)):
        name = int(body[at])
        if name not in spans:
            raise ValueError(f"{vocab.name(name)} has no moved span to put back")
        pieces += [body[position:at], spans.pop(name)]
        position = int(at) + 1
    if spans:
        names = " ".join(vocab.name(name) for name in spans)
        raise ValueError(f"moved spans without a place in the document: {names}")
    return np.concatenate([*pieces, body[position:]])


def build_example(
    main: TokenizedDocument,
    retrieved: Sequence[TokenizedDocument],
    config: CausalMaskingConfig,
    vocab: Vocab,
    *,
    alpha: float,
    max_length: int,
    rng: np.random.Generator,
    ranks: Sequence[int] | None = None,
    segment_order: SegmentOrder = "stored",
) -> Example:
    """One training sequence: retrieved documents, main document, moved spans.

        tokens   <eod> r1 <break> r2 <eod> <mask:0> <break> i1 <eod> <mask:0> t1 <eoss>
        weights  0     a  a       a  a     0        1       1  1     0        1  1
        is_main  .     .  .       .  .     x        x       x  x     x        x  x

    Spans of a retrieved document are moved to its own end, so that the main document is
    predicted from whole documents: log p(x | m1 .. mK) + alpha log p(m1 .. mK).

    Retrieved documents are added in order if they fit completely; one that does not is
    skipped, and a shorter one after it may still be added. If the main document alone
    is too long, it is truncated from its beginning (images as a whole). Moved spans are
    never truncated, and their sentinels stay in place. The masks of the main document
    depend only on `main` and `rng`, not on what was retrieved.

    Args:
      main: the main document.
      retrieved: documents of the memory, in the order of the sequence.
      config: the masking distribution.
      vocab: of the tokens.
      alpha: loss weight of retrieved documents (the paper: 0.1).
      max_length: maximum number of tokens; a row of n positions holds n + 1.
      rng: the only source of randomness.
      ranks: relevance rank of each retrieved document, 0 for the most relevant one, if
        they are not in that order.
      segment_order: "as_main" puts the images of retrieved documents before their texts
        where a whole text of the main document is moved after its image, as a caption
        that is asked for. What is asked then comes last in all documents, and is found
        by what precedes it: captions by images as images by captions.

    Raises:
      ExampleTooLong: the moved spans do not fit into `max_length`.
      ValueError: `config.max_masks` exceeds the sentinels of the vocabulary.
    """
    if config.max_masks > vocab.num_sentinels:
        raise ValueError(
            f"causal_masking.max_masks is {config.max_masks}, but the vocabulary has "
            f"{vocab.num_sentinels} sentinels: lower max_masks"
        )
    main_tokens = layout.document_tokens(main, vocab)
    main_spans = sample_spans(main_tokens, config, vocab, rng)
    if segment_order == "as_main" and _moves_a_text(main_tokens, main_spans, vocab):
        retrieved = [layout.put_images_first(document) for document in retrieved]
    unrotated = dataclasses.replace(config, rotation_probability=0.0)
    room = max_length - (len(main_tokens) + 2 + 3 * len(main_spans))
    kept: list[TokenizedDocument] = []
    kept_ranks: list[int] = []
    starts: list[int] = []
    start = 1  # after the first <eod>
    first_source, first_inserted = _copied(0, start)
    orders = [_Order(first_source, first_inserted, np.zeros(start, bool))]
    ranks = range(len(retrieved)) if ranks is None else ranks
    for document, rank in zip(retrieved, ranks, strict=True):
        tokens = layout.document_tokens(document, vocab)
        spans = []
        masked = config.mask_retrieved
        if masked and config.retrieved_probability < 1:
            masked = rng.random() < config.retrieved_probability
        if masked:
            spans = sample_spans(tokens, unrotated, vocab, rng)
        length = len(tokens) + 1 + 3 * len(spans)
        if length > room:
            continue
        kept.append(document)
        kept_ranks.append(rank)
        starts.append(start)
        orders.append(_arrange(_close(tokens, vocab), spans, vocab).after(start))
        room -= length
        start += len(tokens) + 1

    orders.append(_arrange(_close(main_tokens, vocab), main_spans, vocab).after(start))
    row = layout.join(kept, main_tokens, vocab)
    order = _Order(*map(np.concatenate, zip(*orders, strict=True)))
    if room < 0:
        order = _trim(order, row, -room, start, vocab, main.id)
    tokens = _apply(row, order)
    is_main = order.source >= start
    weights = _weigh(tokens, is_main, config, vocab, alpha)
    owners = _find_owners(order, starts, is_main)
    cuts = _find_cuts(tokens, owners, np.array(kept_ranks, np.int64), vocab)
    return Example(tokens=tokens, weights=weights, is_main=is_main, cuts=cuts)


def _close(
    tokens: Int32[np.ndarray, " length"], vocab: Vocab
) -> Int32[np.ndarray, " closed"]:
    """A document with its `<eod>`."""
    return np.append(tokens, vocab.eod).astype(np.int32)


def _moves_a_text(
    tokens: Int32[np.ndarray, " length"], spans: Sequence[Span], vocab: Vocab
) -> bool:
    """Whether one of the spans is a whole text of the document."""
    ends = _segment_ends(tokens, vocab)
    texts = set(zip([0, *(ends[:-1] + 1).tolist()], ends.tolist(), strict=True))
    return any(span in texts and vocab.is_text(tokens[span[0]]) for span in spans)


def _find_owners(
    order: _Order, starts: Sequence[int], is_main: Bool[np.ndarray, " length"]
) -> Int64[np.ndarray, " length"]:
    """Which retrieved document each token is of; -1 for others and for moved spans."""
    owners = np.searchsorted(starts, order.source, side="right") - 1
    owners[is_main | order.is_moved] = -1
    return owners


def _weigh(
    tokens: Int32[np.ndarray, " length"],
    is_main: Bool[np.ndarray, " length"],
    config: CausalMaskingConfig,
    vocab: Vocab,
    alpha: float,
) -> Float32[np.ndarray, " length"]:
    """The loss weight of each token."""
    weights = np.where(is_main, np.float32(1), np.float32(alpha)).astype(np.float32)
    weights[vocab.is_sentinel(tokens)] *= config.sentinel_weight
    weights[is_main & vocab.is_text(tokens)] *= config.text_weight
    weights[0] = 0  # the first token is never a target
    return weights


def _find_cuts(
    tokens: Int32[np.ndarray, " length"],
    owners: Int64[np.ndarray, " length"],
    ranks: Int64[np.ndarray, " retrieved"],
    vocab: Vocab,
) -> Int64[np.ndarray, "images 2"]:
    """Images of retrieved documents, from the last of the least relevant document on.

        tokens   <eod> t1 <break> i1 i2 <eod> i3 i4 <break> t2 <eod> ...      ranks 0 1
        owners     -1   0      0  0  0     0   1  1       1  1     1 ...
        cuts                     [3,    5)   [6,    8)                second, then first

    A part of an image that ends in a sentinel is not a cut: its tail was moved.
    """
    is_image = vocab.is_image(tokens) & (owners >= 0)
    edges = np.diff(is_image.astype(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    whole = np.isin(tokens[ends], (vocab.eod, vocab.break_))
    starts, ends = starts[whole], ends[whole]
    order = np.lexsort((-starts, -ranks[owners[starts]]))
    return np.stack([starts, ends], axis=1)[order].astype(np.int64)


class _Order(NamedTuple):
    """The source of each token of a masked sequence.

    Attributes:
      source: index into the plain sequence; for an inserted token, the index of a token
        of its span (so that both belong to the same document).
      inserted: the inserted token, or -1 if the token is copied from `source`.
      is_moved: True in moved spans, with their sentinels and `<eoss>`.
    """

    source: Int64[np.ndarray, " masked_length"]
    inserted: Int64[np.ndarray, " masked_length"]
    is_moved: Bool[np.ndarray, " masked_length"]

    def after(self, length: int) -> _Order:
        """The same in a sequence that has `length` tokens before it."""
        return self._replace(source=self.source + length)


def _segment_ends(
    tokens: Int32[np.ndarray, " length"], vocab: Vocab
) -> Int64[np.ndarray, " segments"]:
    """Index one past the last token of each segment of a document."""
    return np.append(np.flatnonzero(tokens == vocab.break_), len(tokens))


def _sample_rotation(
    tokens: Int32[np.ndarray, " length"],
    config: CausalMaskingConfig,
    vocab: Vocab,
    rng: np.random.Generator,
) -> list[Span]:
    """One whole segment as the only span; none if the document is empty."""
    ends = _segment_ends(tokens, vocab)
    starts = np.append(0, ends[:-1] + 1)
    spans = [(int(s), int(e)) for s, e in zip(starts, ends, strict=True) if s < e]
    texts = [span for span in spans if vocab.is_text(tokens[span[0]])]
    images = [span for span in spans if not vocab.is_text(tokens[span[0]])]
    if rng.random() < config.rotation_text_share:
        choices = texts or images
    else:
        choices = images or texts
    return [choices[rng.integers(len(choices))]] if choices else []


def _arrange(
    tokens: Int32[np.ndarray, " length"], spans: Sequence[Span], vocab: Vocab
) -> _Order:
    """The order of the masked sequence; see the diagram of `apply_masks`."""
    body: list[np.ndarray] = []
    moved: list[np.ndarray] = []
    position = 0
    for i, (start, end) in enumerate(spans):
        if not position <= start < end <= len(tokens):
            raise ValueError(
                f"span {i} is [{start}, {end}); spans must ascend, not overlap, not be "
                f"empty and lie within the {len(tokens)} tokens"
            )
        if vocab.is_control(tokens[start:end]).any():
            raise ValueError(
                f"span {i} is [{start}, {end}) and holds a control token: "
                f"{vocab.to_text(tokens[start:end])}; spans stay within a segment"
            )
        sentinel = vocab.sentinel(i)
        body += [_copied(position, start), _inserted(start, sentinel)]
        moved += [_inserted(start, sentinel), _copied(start, end)]
        moved.append(_inserted(start, vocab.eoss))
        position = end
    body.append(_copied(position, len(tokens)))
    source, inserted = np.concatenate([*body, *moved], axis=1)
    body_length = sum(piece.shape[1] for piece in body)
    return _Order(source, inserted, np.arange(len(source)) >= body_length)


def _copied(start: int, end: int) -> Int64[np.ndarray, "2 length"]:
    source = np.arange(start, end, dtype=np.int64)
    return np.stack([source, np.full_like(source, -1)])


def _inserted(source: int, token: int) -> Int64[np.ndarray, "2 1"]:
    return np.array([[source], [token]], np.int64)


def _apply(
    tokens: Int32[np.ndarray, " length"], order: _Order
) -> Int32[np.ndarray, " masked_length"]:
    copied = np.asarray(tokens, np.int32)[order.source]
    return np.where(order.inserted < 0, copied, order.inserted).astype(np.int32)


def _trim(
    order: _Order,
    row: Int32[np.ndarray, " length"],
    overflow: int,
    main_start: int,
    vocab: Vocab,
    document_id: str,
) -> _Order:
    """Drops `overflow` or more tokens from the beginning of the main document.

    <eod> t1 <mask:0> t3 t4 <eod> <mask:0> t2 <eoss>      overflow 2
    <eod>    <mask:0>    t4 <eod> <mask:0> t2 <eoss>
    """
    is_last = np.arange(len(row)) == len(row) - 1  # the last <eod>
    trimmable = ~order.is_moved & (order.source >= main_start) & (order.inserted < 0)
    trimmable &= ~is_last[order.source]
    candidates = np.flatnonzero(trimmable)
    if overflow > len(candidates):
        raise ExampleTooLong(
            f"document {document_id!r}: its moved spans are {overflow - len(candidates)}"
            " tokens longer than a row; use longer rows or shorter documents"
        )
    tokens = row[order.source[candidates]]
    is_image: Bool[np.ndarray, " candidates"] = vocab.is_image(tokens)
    while overflow < len(candidates) and is_image[overflow - 1] and is_image[overflow]:
        overflow += 1
    keep = np.ones(len(order.source), bool)
    keep[candidates[:overflow]] = False
    return _Order(*(part[keep] for part in order))
