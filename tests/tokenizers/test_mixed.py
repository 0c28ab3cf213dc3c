"""MixedTokenizer: round trips of documents, and adversarial text."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from crash_checks import check_every_crash
from vqgan_standins import make_params

from racm3_jax.checkpoints import CheckpointError, write_manifest
from racm3_jax.tokenizers.bpe import TextTokenizer
from racm3_jax.tokenizers.image import ImageTokenizer
from racm3_jax.tokenizers.mixed import MixedTokenizer
from racm3_jax.tokenizers.vqgan import VQGANConfig
from racm3_jax.types import Document, Segment, TokenizedDocument, TokenizedSegment

CONFIG = VQGANConfig(
    image_size=16,
    stem_patch=8,
    channels=8,
    channel_multipliers=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    z_channels=8,
    num_codes=16,
    d_code=2,
    quantizer="fsq",
    fsq_levels=(4, 4),
    norm_groups=4,
)


@pytest.fixture(scope="module")
def tokenizer() -> MixedTokenizer:
    text = TextTokenizer.train(["the flag of Velmoria <eod> <mask:0>"] * 3, 270)
    return MixedTokenizer(
        text, ImageTokenizer(CONFIG, make_params(CONFIG), 4), num_sentinels=4
    )


def make_image(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)


def make_documents() -> list[Document]:
    return [
        Document(
            "a", (Segment(text="a flag"), Segment(image=make_image(0))), "url", {"k": 1}
        ),
        Document("b", (Segment(text="text alone"),)),
        Document(
            "c",
            (
                Segment(image=make_image(1)),
                Segment(text="between"),
                Segment(image=make_image(2, 20, 33)),
            ),
        ),
    ]


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_documents_keep_order_modalities_and_metadata(tokenizer, batch):
    documents = make_documents()
    found = list(tokenizer.tokenize(iter(documents), batch))
    assert [d.id for d in found] == ["a", "b", "c"]
    assert found[0].source == "url" and found[0].metadata == {"k": 1}
    vocab = tokenizer.vocab
    for document, tokenized in zip(documents, found, strict=True):
        for segment, part in zip(document.segments, tokenized.segments, strict=True):
            assert part.modality == segment.modality and part.tokens.dtype == np.int32
            if segment.text is not None:
                expected = tokenizer.encode_text(segment.text)
                assert vocab.is_text(part.tokens).all()
            else:
                expected = tokenizer.encode_image(segment.image)
                assert vocab.is_image(part.tokens).all()
                assert len(part.tokens) == vocab.image_length
            np.testing.assert_array_equal(part.tokens, expected)


def test_decode_gives_the_text_and_the_coded_image(tokenizer):
    document = make_documents()[0]
    tokenized = next(tokenizer.tokenize([document]))
    decoded = tokenizer.decode(tokenized)
    assert (decoded.id, decoded.text, decoded.source) == ("a", "a flag", "url")
    coded = tokenizer.image.decode(tokenizer.image.encode(document.images[0][None]))
    np.testing.assert_array_equal(decoded.images[0], coded[0])


def test_split_tokens_is_the_diagram_of_its_docstring(tokenizer):
    vocab = tokenizer.vocab
    image = vocab.image_tokens(np.array([1, 7, 7, 2]))
    row = [vocab.eod, 4, 9, vocab.break_, *image, vocab.eod]
    assert vocab.to_text(row) == "<eod> t4 t9 <break> i1 i7 i7 i2 <eod>"
    document = tokenizer.split_tokens(row, id="x")
    assert [(s.modality, s.tokens.tolist()) for s in document.segments] == [
        ("text", [4, 9]),
        ("image", image.tolist()),
    ]
    two = [*image, vocab.break_, *image, vocab.pad, vocab.pad]
    assert [s.modality for s in tokenizer.split_tokens(two).segments] == ["image"] * 2
    assert tokenizer.split_tokens([vocab.eod, vocab.eod]).segments == ()


def test_split_tokens_refuses_all_but_one_whole_document(tokenizer):
    vocab = tokenizer.vocab
    with pytest.raises(ValueError, match="an image has 4 tokens; got 1"):
        tokenizer.split_tokens([4, vocab.break_, vocab.image_range.start])
    with pytest.raises(ValueError, match="more than one document"):
        tokenizer.split_tokens([4, vocab.eod, 5])
    with pytest.raises(ValueError, match="tokens of the vocabulary are in"):
        tokenizer.split_tokens([vocab.size])
    wrong = TokenizedDocument("w", (TokenizedSegment("image", np.arange(4)),))
    with pytest.raises(ValueError, match="tokens of the image range are in"):
        tokenizer.decode(wrong)


def test_adversarial_text_never_leaves_the_text_range(tokenizer):
    """100,000 random and adversarial strings, every control spelling included."""
    vocab, rng = tokenizer.vocab, random.Random(0)
    spellings = [vocab.name(i) for i in range(vocab.image_range.start, vocab.size)]
    spellings += ["<pad>", "</s>", "<s>", "<unk>", "<|endoftext|>", "<racm3:break>"]
    spellings += ["IMGIMGAZ", "[MASK]", "\x00", "\ud800", "\u202e", "Ġ", "�", "▁"]
    alphabets = ["<>:/|maskeodbrk0123 ", "".join(map(chr, range(1, 0x250)))]
    texts = list(spellings)
    while len(texts) < 100_000:
        kind = len(texts) % 3
        if kind == 0:
            texts.append("".join(rng.choices(spellings, k=rng.randint(1, 4))))
        elif kind == 1:
            noise = rng.choices(alphabets[len(texts) % 2], k=rng.randint(0, 24))
            texts.append("".join(noise))
        else:
            texts.append("".join(chr(rng.randrange(0x110000)) for _ in range(6)))
    ids = np.concatenate(tokenizer.text.encode_batch(texts))
    assert vocab.is_text(ids).all() and ids.min() >= 0
    assert not (vocab.is_image(ids) | vocab.is_sentinel(ids)).any()
    assert not vocab.is_control(ids).any()
    for text in spellings[:40]:
        if text != "\ud800":
            assert tokenizer.text.decode(tokenizer.encode_text(text)) == text


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = MixedTokenizer.load(tmp_path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.vocab == tokenizer.vocab
    image = make_image(3)
    np.testing.assert_array_equal(
        loaded.encode_image(image), tokenizer.encode_image(image)
    )


def test_folders_that_cannot_be_loaded_are_refused(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no mixed\.json"):
        MixedTokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / "mixed.json"
    good = json.loads(path.read_text())
    for change, message in [
        ({"format": 9}, "has format 9"),
        ({"fingerprint": "0"}, "parts of different tokenizers"),
    ]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=r"mixed\.json has .* bytes, not"):
            MixedTokenizer.load(tmp_path)
        write_manifest(tmp_path)
        with pytest.raises(ValueError, match=message):
            MixedTokenizer.load(tmp_path)
    path.write_text("{}")
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        MixedTokenizer.load(tmp_path)


def test_a_batch_below_one_is_refused(tokenizer):
    with pytest.raises(ValueError, match="batch must be >= 1"):
        list(tokenizer.tokenize([], 0))


def list_files(folder):
    return sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()
    )


def test_every_file_has_a_checksum(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    names = list_files(tmp_path)
    assert len(names) == 6
    for name in names:
        path = tmp_path / name
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[place] ^= 1
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"."):
                MixedTokenizer.load(tmp_path)
        path.unlink()
        with pytest.raises((ValueError, FileNotFoundError)):
            MixedTokenizer.load(tmp_path)
        path.write_bytes(content)
    (tmp_path / "text" / "more.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"text/more\.json is not in the man"):
        MixedTokenizer.load(tmp_path)
    with pytest.raises(FileExistsError, match="left alone"):
        tokenizer.save(tmp_path)


def test_a_tokenizer_of_format_1_opens(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for name, key in (
        ("mixed.json", "format"),
        ("image/config.json", "format_version"),
    ):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: 1}))
    for name in ("manifest.json", "image/manifest.json"):
        (tmp_path / name).unlink()
    opened = MixedTokenizer.load(tmp_path)
    assert opened.fingerprint() == tokenizer.fingerprint()
    tokenizer.save(tmp_path)  # replaces the old one
    assert "manifest.json" in list_files(tmp_path)


def test_a_save_is_old_or_new_after_any_crash(tokenizer, tmp_path):
    path = tmp_path / "tokenizer"
    other = MixedTokenizer(tokenizer.text, tokenizer.image, num_sentinels=7)
    tried = check_every_crash(
        path,
        lambda: other.save(path),
        lambda: tokenizer.save(path),
        lambda: MixedTokenizer.load(path).vocab.num_sentinels,
    )
    assert tried > 40
