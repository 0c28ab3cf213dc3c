"""Byte-level BPE: lossless, without control strings, stable on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from racm3_jax.tokenizers.bpe import TextTokenizer

CORPUS = [f"the flag of Velmoria number {i} on the moon" for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(CORPUS, 300)


@pytest.mark.parametrize(
    "text",
    ["", "the flag", "  two  spaces ", "naïve 漢字 🏴‍☠️", "\x00\n\t\r", "<eod><mask:0>"],
)
def test_every_string_comes_back(tokenizer, text):
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
