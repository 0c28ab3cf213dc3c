"""Byte-level BPE: lossless, without control strings, stable on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from racm3_jax.checkpoints import CheckpointError, write_manifest
from racm3_jax.porting.clip_text import build_clip_tokenizer
from racm3_jax.tokenizers.bpe import TextTokenizer
from racm3_jax.tokenizers.clean_text import clean_text

CORPUS = [f"the flag of Velmoria number {i} on the moon" for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(CORPUS, 300)


@pytest.mark.parametrize(
    "text",
    ["", "the flag", "  two  spaces ", "naïve 漢字 🏴‍☠️", "\x00\n\t\r", "<eod><mask:0>"],
)
def test_every_string_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text


def test_training_shortens_its_corpus_and_is_deterministic(tokenizer):
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(CORPUS[0])) < len(CORPUS[0]) // 2
    again = TextTokenizer.train(iter(CORPUS), 300)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert TextTokenizer.train(CORPUS, 290).fingerprint() != tokenizer.fingerprint()


def test_batches_equal_single_calls(tokenizer):
    texts = ["a moon", "", *CORPUS[:3]]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "text" / "tokenizer.json"
    tokenizer.save(path)
    loaded = TextTokenizer.load(path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    np.testing.assert_array_equal(loaded.encode(CORPUS[0]), tokenizer.encode(CORPUS[0]))


def test_unpaired_surrogates_are_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_wrong_inputs(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TextTokenizer.load(tmp_path / "tokenizer.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer.json"):
        TextTokenizer.load(broken)
    with pytest.raises(ValueError, match="vocab_size must be >= 256; |>= 256, one id"):
        TextTokenizer.train(CORPUS, 100)
    with pytest.raises(ValueError, match=r"text ids lie in 0\.\.299"):
        tokenizer.decode([300])


def test_a_tokenizer_with_special_tokens_is_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    special = Tokenizer.from_file(str(path))
    special.add_special_tokens(["<eod>"])
    path.write_text(json.dumps(json.loads(special.to_str())))
    with pytest.raises(ValueError, match="no added"):
        TextTokenizer.load(path)


def test_tokens_that_are_not_a_range_are_refused(tokenizer, tmp_path):
    """A token above the others would be an image token."""
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    fields = json.loads(path.read_text())
    fields["model"]["vocab"][next(iter(fields["model"]["vocab"]))] = 70_000
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"0\.\.299 .the highest is 70000"):
        TextTokenizer.load(path)


def test_a_file_that_differs_from_its_manifest_is_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    write_manifest(tmp_path)
    assert TextTokenizer.load(path).vocab_size == 300
    path.write_bytes(path.read_bytes().replace(b'"BPE"', b'"Bpe"'))
    with pytest.raises(CheckpointError, match="corrupt"):
        TextTokenizer.load(path)


# `of` and `flag` become one token, so cuts within words would show.
MERGES = [("f", "l"), ("fl", "a"), ("fla", "g</w>"), ("o", "f</w>")]
LONG_TEXTS = [
    "the flag of the moon " * 5000,
    "flagofflag" * 10_000,
    "&lt;b&gt; the flag &amp; the moon " * 3000,
    " \n\t" * 30_000 + "the flag of the moon" + " " * 30_000,
    "a\n" + "&amp;lt; flag " * 9000 + "<br>",
    "ﬁne “flags” cafe\u0301 " * 6000,
    "🏴‍☠️漢字" * 9000,
    "x" * 100_000,
]


@pytest.mark.parametrize("cleans", [True, False])
@pytest.mark.parametrize("max_length", [1, 9, 75])
def test_a_head_equals_the_head_of_the_whole(tokenizer, cleans, max_length):
    if cleans:
        tokenizer = build_clip_tokenizer(MERGES, 512 + len(MERGES) + 2)
    texts = [*LONG_TEXTS, "", "the flag", *CORPUS[:3], *(t[:999] for t in LONG_TEXTS)]
    heads = tokenizer.encode_batch(texts, max_length)
    for text, head in zip(texts, heads, strict=True):
        np.testing.assert_array_equal(head, tokenizer.encode(text)[:max_length])


def test_the_head_of_a_long_text_is_fast(monkeypatch):
    """Nested escapes once took quadratic time."""
    tokenizer = build_clip_tokenizer(MERGES, 512 + len(MERGES) + 2)
    seen = []
    encode = tokenizer._encode
    monkeypatch.setattr(
        tokenizer, "_encode", lambda texts: seen.extend(texts) or encode(texts)
    )
    for text in LONG_TEXTS[:3]:
        tokenizer.encode_batch([text], 75)
    assert len(seen) == 3 and max(map(len, seen)) < 2000
    amp = "&" + "amp;" * 25_000
    assert clean_text(amp) == "&"
    assert clean_text("&#" + "9" * 100_000 + ";") == "\ufffd"
    assert clean_text("&#" + "0" * 100_000 + "65;x") == "ax"
