"""Damaged files of every format: the same content, or an error of one sentence."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from chameleon_fakes import VOCAB_SIZE, make_tokenizer
from porting_fakes import (
    CLIP_CONFIG,
    MERGES,
    clip_state,
    write_hf_clip,
    write_merges,
    write_torch_file,
)

from racm3_jax.porting.clip import clip_rules
from racm3_jax.porting.clip_config import read_clip_config
from racm3_jax.porting.clip_text import build_clip_tokenizer, read_merges
from racm3_jax.porting.files import open_tensors
from racm3_jax.porting.rules import check_names
from racm3_jax.porting.tensors import PortingError, foreign_settings
from racm3_jax.porting.vocabulary import build_text_tokenizer, read_vocabulary
from racm3_jax.tokenizers.bpe import TextTokenizer

CASES = 60
STATE = {
    "visual.a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "visual.b": np.arange(40, dtype=np.float16),
    "text.c": np.array(2.5, np.float32),
}


def damages(content: bytes, seed: int, cases: int = CASES):
    """Flips, cuts, repetitions and extreme numbers, always the same ones."""
    rng = random.Random(seed)
    for _ in range(cases):
        changed, kind = bytearray(content), rng.randrange(5)
        place = rng.randrange(len(content))
        if kind == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed = changed[:place]
        elif kind == 2:
            changed[place : place + 8] = rng.choice((b"\xff", b"\0")) * 8
        elif kind == 3:
            changed[place:place] = changed[place // 2 : place]
        else:
            for _ in range(20):
                changed[rng.randrange(len(content))] = rng.randrange(256)
        yield bytes(changed)


def number_damages(text: str, seed: int, cases: int = CASES):
    """One value of a JSON text becomes something else."""
    rng = random.Random(seed)
    values = ["-1", "0", "1e999", "9" * 30, '"7"', "null", "[]", "{}", "[[[1]]]", "0.5"]

    def walk(value, path=()):
        yield path
        items = value.items() if isinstance(value, dict) else ()
        for key, item in items:
            yield from walk(item, (*path, key))

    paths = [p for p in walk(json.loads(text)) if p]
    for _ in range(cases):
        whole = json.loads(text)
        *parents, last = rng.choice(paths)
        place = whole
        for key in parents:
            place = place[key]
        place[last] = "MARK"
        yield json.dumps(whole).replace('"MARK"', rng.choice(values)).encode()


def judge(read, expected) -> str:
    """ "same", "other" or "sentence"; anything else, and a big allocation, is an error."""
    tracemalloc.start()
    try:
        found = read()
        outcome = "same" if found == expected else "other"
    except (ValueError, FileNotFoundError) as error:
        assert str(error) and "\n" not in str(error)
        outcome = "sentence"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50_000_000
    return outcome


def read_all(path):
    source = open_tensors(path)
    return {
        name: (str(array.dtype), array.shape, array.tobytes())
        for name in source.tensors
        for array in [source.read(name)]
    }


def write_deflated(path):
    """The same torch file, compressed by another tool."""
    write_torch_file(path, STATE)
    with zipfile.ZipFile(path) as archive:
        entries = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            stored = None if name.endswith("data.pkl") else zipfile.ZIP_STORED
            archive.writestr(name, content, stored)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("m.safetensors", lambda p: safetensors.numpy.save_file(STATE, p)),
        ("m.pt", lambda p: write_torch_file(p, STATE)),
        ("deflated.pt", write_deflated),
    ],
)
def test_weights(tmp_path, name, write):
    path = tmp_path / name
    write(path)
    content, expected = path.read_bytes(), read_all(path)
    outcomes = []
    for changed in damages(content, 1, 4 * CASES):
        path.write_bytes(changed)
        outcomes.append(judge(lambda: read_all(path), expected))
    assert outcomes.count("sentence") > 2 * CASES
    # The zip format has checksums; for safetensors the manifest has them.
    assert name == "m.safetensors" or "other" not in outcomes


def header_of(entries) -> bytes:
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return len(text).to_bytes(8, "little") + text


W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header_of({"w": W}) + b"12345678", None),
        ((1 << 62).to_bytes(8, "little") + b"{}", "its header would"),
        (header_of(b"[" * 50_000), "nested too deeply"),
        (header_of(b'{"w":' * 50_000), "nested too deeply"),
        (header_of(b"[]"), "damaged"),
        (header_of({"w": W}) + b"1234567", "truncated or damaged"),
        (header_of({"w": W}) + b"123456789", "truncated or damaged"),
        (header_of({"w": W | {"dtype": "F64"}}) + b"12345678", "does not match"),
        (header_of({"w": W | {"dtype": "Q4"}}) + b"12345678", "unknown dtype"),
        (header_of({"w": W | {"dtype": []}}) + b"12345678", "damaged"),
        (header_of({"w": W | {"shape": [2.0]}}) + b"12345678", "has an invalid"),
        (header_of({"w": W | {"shape": [-2]}}) + b"12345678", "has an invalid"),
        (header_of({"w": W | {"shape": [2**60, 0]}}) + b"", "has an invalid"),
        (
            header_of({"w": W | {"shape": [1] * 40 + [2]}}) + b"12345678",
            "has an invalid",
        ),
        (header_of({"w": W | {"shape": 2}}) + b"12345678", "damaged"),
        (header_of({"w": W | {"data_offsets": [8, 16]}}) + b"1" * 16, "gap"),
        (header_of({"w": W, "v": W}) + b"12345678", "overlaps"),
        (header_of({"w": 3}), "damaged"),
        (header_of(b'{"w":1,"w":2}'), "occurs twice"),
    ],
)
def test_wrong_safetensors_headers(tmp_path, content, message):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    if message is None:
        assert read_all(path)["w"] == ("float32", (2,), b"12345678")
        return
    with pytest.raises(PortingError, match=message):
        open_tensors(path)


def test_settings_of_a_clip(tmp_path):
    write_hf_clip(tmp_path / "hf", CLIP_CONFIG, clip_state(CLIP_CONFIG))
    tensors = open_tensors(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"

    def read():
        with foreign_settings(path):
            config = read_clip_config(tensors, "hf", path.parent)
            check_names(clip_rules(config, "hf"), tensors, "CLIP")
        return config

    expected, text = read(), path.read_text()
    outcomes = []
    for changed in [
        *number_damages(text, 2, 3 * CASES),
        *damages(text.encode(), 3, CASES // 2),
        b"[" * 100_000,
    ]:
        path.write_bytes(changed)
        outcomes.append(judge(read, expected))
    assert outcomes.count("sentence") > 2 * CASES


def test_merges(tmp_path):
    plain, zipped = tmp_path / "merges.txt", tmp_path / "merges.txt.gz"
    write_merges(plain)
    zipped.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    for path in (plain, zipped):
        content, expected = path.read_bytes(), read_merges(path)

        def read(path=path):
            merges = read_merges(path)
            build_clip_tokenizer(merges, 514 + min(len(merges), len(MERGES)))
            return merges

        for changed in damages(content, 4):
            path.write_bytes(changed)
            judge(read, expected)


def test_merges_that_decompress_endlessly(tmp_path):
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress(b"a b\n" * 6_000_000, 1))
    with pytest.raises(PortingError, match="more than 20,000,000 bytes"):
        read_merges(path)


def test_a_vocabulary():
    text = json.dumps(make_tokenizer())

    def read(content):
        with foreign_settings("tokenizer.json"):
            tokenizer = json.loads(content)
            vocabulary = read_vocabulary(tokenizer, VOCAB_SIZE, "tokenizer.json")
            text = build_text_tokenizer(tokenizer, vocabulary, "tokenizer.json")
        return text.fingerprint(), vocabulary.inputs.tolist()

    expected = read(text)
    for changed in number_damages(text, 5):
        judge(lambda changed=changed: read(changed), expected)


def test_a_tokenizer_without_checksums(tmp_path):
    path = tmp_path / "tokenizer.json"
    TextTokenizer.train(["the flag of the moon"] * 9, 270).save(path)
    expected, text = TextTokenizer.load(path).fingerprint(), path.read_text()

    def read():
        return TextTokenizer.load(path).fingerprint()

    outcomes = []
    for changed in [*damages(text.encode(), 6), *number_damages(text, 7)]:
        path.write_bytes(changed)
        outcomes.append(judge(read, expected))
    assert outcomes.count("sentence") > CASES // 2
