"""The order of tokens in a sequence, defined only here.

    <eod> text <break> image <eod> text <break> image <eod> text <break> image <eod>
    `-- retrieved ------------'-- retrieved --------------'-- the main document ---'

The caller decides the order of the retrieved documents: best first in generation, and
in training unless `pipeline.document_order` or pairing shuffles them.

With causal masking (`causal_masking`), spans are moved after the `<eod>` of their
document:

    ... <eod> text <mask:0> text <break> image <eod> <mask:0> span <eoss>

Generation prompts are prefixes of these sequences, so that the model generates only
what it was trained on. This is the layout of CM3Leon (arXiv 2309.02591) and Chameleon,
the successors of RA-CM3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from racm3_jax.types import TokenizedDocument
from racm3_jax.vocab import Vocab


def put_images_first(document: TokenizedDocument) -> TokenizedDocument:
    """The same document with its images in front of its texts.

    As a caption asks: after an image, a text is found by looking the image up.

        (t1 t2) (i3 i4)  ->  (i3 i4) (t1 t2)
    """
    segments = sorted(document.segments, key=lambda s: s.modality != "image")
    return dataclasses.replace(document, segments=tuple(segments))


def document_tokens(
    document: TokenizedDocument, vocab: Vocab
) -> Int32[np.ndarray, " length"]:
    """Segments of one document joined by `<break>`, without `<eod>` around them.

        (t1 t2) (i3 i4)  ->  t1 t2 <break> i3 i4

    Raises:
      ValueError: the document has no segments, a text segment has other tokens than
        text tokens, or an image segment does not have `vocab.image_length` image
        tokens.
    """
    if not document.segments:
        raise ValueError(f"document {document.id!r} has no segments")
    pieces: list[np.ndarray] = []
    for segment in document.segments:
        tokens = np.asarray(segment.tokens, np.int32)
        if segment.modality == "image":
            if len(tokens) != vocab.image_length or not vocab.is_image(tokens).all():
                raise ValueError(
                    f"an image of document {document.id!r} has {len(tokens)} tokens, "
                    f"{int(vocab.is_image(tokens).sum())} of them image tokens; the "
                    f"vocabulary needs {vocab.image_length} image tokens: was the "
                    "document tokenised with another tokenizer?"
                )
        elif ((tokens < 0) | ~vocab.is_text(tokens)).any():
            raise ValueError(
                f"a text of document {document.id!r} has tokens outside 0.."
                f"{vocab.num_text_ids - 1}: was the document tokenised with another "
                "tokenizer?"
            )
        if pieces:
            pieces.append(np.array([vocab.break_], np.int32))
        pieces.append(tokens)
    return np.concatenate(pieces)


def retrieved_prefix(
    retrieved: Sequence[TokenizedDocument], vocab: Vocab
) -> Int32[np.ndarray, " length"]:
    """The prefix before the main document; equal for all prompts with these documents.

    []      ->  <eod>
    [a, b]  ->  <eod> a <eod> b <eod>
    """
    eod = np.array([vocab.eod], np.int32)
    pieces = [eod]
    for document in retrieved:
        pieces += [document_tokens(document, vocab), eod]
    return np.concatenate(pieces)


def join(
    retrieved: Sequence[TokenizedDocument],
    main_tokens: Int32[np.ndarray, " main_length"],
    vocab: Vocab,
) -> Int32[np.ndarray, " length"]:
    """Retrieved documents first, the main document last, `<eod>` between documents.

    [a, b], main  ->  <eod> a <eod> b <eod> main <eod>
    """
    eod = np.array([vocab.eod], np.int32)
    main_tokens = np.asarray(main_tokens, np.int32)
    return np.concatenate([retrieved_prefix(retrieved, vocab), main_tokens, eod])


def text_to_image_prompt(
    retrieved: Sequence[TokenizedDocument],
    text_tokens: Int32[np.ndarray, " text_length"],
    vocab: Vocab,
) -> Int32[np.ndarray, " length"]:
    """The sequence up to the start of the main document's image.

    [a], t1 t2  ->  <eod> a <eod> t1 t2 <break>
    """
    known = np.append(np.asarray(text_tokens, np.int32), np.int32(vocab.break_))
    return beginning_prompt(retrieved, known, vocab)


def beginning_prompt(
    retrieved: Sequence[TokenizedDocument],
    tokens: Int32[np.ndarray, " known"],
    vocab: Vocab,
) -> Int32[np.ndarray, " length"]:
    """The sequence up to the end of the main document's known tokens.

    [a], t1 t2 <break> i1  ->  <eod> a <eod> t1 t2 <break> i1
    """
    tokens = np.asarray(tokens, np.int32)
    return np.concatenate([retrieved_prefix(retrieved, vocab), tokens])


def infill_prompt(
    retrieved: Sequence[TokenizedDocument],
    tokens: Int32[np.ndarray, " document_length"],
    spans: Sequence[tuple[int, int]],
    vocab: Vocab,
) -> Int32[np.ndarray, " length"]:
    """The prompt for the first of the missing spans of a document.

    The model continues with the tokens of the first span and `<eoss>`; for the next
    span append `<mask:1>`, and so on.

        [a], t1 t2 t3 t4, [(1, 3)]  ->  <eod> a <eod> t1 <mask:0> t4 <eod> <mask:0>

    Args:
      retrieved: documents of the memory, in the order of the sequence.
      tokens: the document from `document_tokens`; tokens inside a span are ignored.
      spans: half-open ranges of `tokens`, ascending, disjoint; an empty range
        (start = end) means an insertion.
      vocab: of the tokens.

    Raises:
      ValueError: there is no span, or spans overlap or leave the document.
    """
    if not spans:
        raise ValueError("infill_prompt needs at least one span; got none")
    tokens = np.asarray(tokens, np.int32)
    pieces, position = [], 0
    for i, (start, end) in enumerate(spans):
        if not position <= start <= end <= len(tokens):
            raise ValueError(
                f"span {i} is [{start}, {end}); spans must ascend, not overlap and lie "
                f"within the {len(tokens)} tokens of the document"
            )
        pieces += [tokens[position:start], np.array([vocab.sentinel(i)], np.int32)]
        position = end
    masked = np.concatenate([*pieces, tokens[position:]])
    ask = np.array([vocab.sentinel(0)], np.int32)
    return np.concatenate([join(retrieved, masked, vocab), ask])


def caption_prompt(
    retrieved: Sequence[TokenizedDocument],
    image_tokens: Int32[np.ndarray, " image_length"],
    vocab: Vocab,
    prefix_tokens: Int32[np.ndarray, " prefix_length"] | Sequence[int] = (),
) -> Int32[np.ndarray, " length"]:
    """The prompt for an image's caption: the sequence with the caption rotated.

        [a], i1 i2  ->  <eod> a <eod> <mask:0> <break> i1 i2 <eod> <mask:0>

    `prefix_tokens` ("Photo of", as in the paper) come before `<mask:0>`.
    """
    prefix = np.asarray(prefix_tokens, np.int32)
    break_ = np.array([vocab.break_], np.int32)
    image_tokens = np.asarray(image_tokens, np.int32)
    tokens = np.concatenate([prefix, break_, image_tokens])
    return infill_prompt(retrieved, tokens, [(len(prefix), len(prefix))], vocab)
