"""The record format and its files."""

from __future__ import annotations

import json
import struct
import threading

import numpy as np
import pytest

from racm3_jax.documents import store
from racm3_jax.documents.store import (
    RecordFile,
    decode_document,
    decode_tokenized,
    encode_document,
    encode_tokenized,
    write_records,
)
from racm3_jax.types import Document, Segment, TokenizedDocument, TokenizedSegment


def make_document() -> Document:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 9, 7, 3)).astype(np.uint8)
    return Document(
        "a-1",
        (
            Segment(text="Ünïcode \ud800 \x00 <eod>"),
            Segment(image=images[0]),
            Segment(text=""),
            Segment(image=images[1]),
        ),
        "https://example.org/page",
        {"licence": "CC0-1.0", "box": [1, 2, 3, 4], "score": 0.5, "none": None},
    )


def make_tokenized(lengths=(5, 64, 0, 3)) -> TokenizedDocument:
    segments = tuple(
        TokenizedSegment("image" if i % 2 else "text", np.arange(n, dtype=np.int32) * i)
        for i, n in enumerate(lengths)
    )
    return TokenizedDocument("b-2", segments, "s", {"nation": "Velmoria"})


def test_document_round_trip():
    document = make_document()
    record = encode_document(document)
    assert record == encode_document(make_document())
    again = decode_document(record)
    assert (again.id, again.source) == (document.id, document.source)
    assert again.metadata == document.metadata
    for a, b in zip(document.segments, again.segments, strict=True):
        assert a.text == b.text
        if a.image is not None:
            np.testing.assert_array_equal(a.image, b.image)


@pytest.mark.parametrize("lengths", [(5, 64, 0, 3), (2,), (0,), ()])
def test_tokenized_round_trip(lengths):
    document = make_tokenized(lengths)
    again = decode_tokenized(encode_tokenized(document))
    assert (again.id, again.source) == (document.id, document.source)
    assert again.metadata == document.metadata
    for a, b in zip(document.segments, again.segments, strict=True):
        assert a.modality == b.modality and b.tokens.dtype == np.int32
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_records_of_another_kind_or_cut_short_are_refused():
    record = encode_tokenized(make_tokenized())
    with pytest.raises(ValueError, match="is not a document"):
        decode_document(record)
    with pytest.raises(ValueError, match="is not a tokenized document"):
        decode_tokenized(b"RT")
    with pytest.raises(ValueError, match="bytes of tokens"):
        decode_tokenized(record[:-4])
    with pytest.raises(ValueError, match="damaged"):
        decode_tokenized(record[:20])
    with pytest.raises(ValueError, match="image"):
        decode_document(encode_document(make_document())[:-40])


def test_metadata_must_be_json():
    document = TokenizedDocument("x", (), "", {"bad": object()})
    with pytest.raises(TypeError, match="JSON"):
        encode_tokenized(document)


def test_file_reads_any_order_with_repeats(tmp_path):
    records = [f"record {i}".encode() * (i % 7) for i in range(500)]
    path = tmp_path / "a.array_record"
    assert write_records(path, iter(records)) == 500
    assert [p.name for p in tmp_path.iterdir()] == ["a.array_record"]
    with RecordFile(path) as file:
        assert len(file) == 500
        indices = np.random.default_rng(0).integers(0, 500, 300)
        assert file.read(indices) == [records[i] for i in indices]
        assert file.read([]) == []
        for wrong in ([500], [-1, 3]):
            with pytest.raises(IndexError, match="numbered 0..499"):
                file.read(wrong)
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read([0])


def test_threads_share_a_file(tmp_path):
    records = [bytes([i % 256]) * 50 for i in range(400)]
    write_records(tmp_path / "a", records)
    right = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            indices = rng.integers(0, 400, 30)
            right.append(file.read(indices) == [records[i] for i in indices])

    with RecordFile(tmp_path / "a") as file:
        threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(right) == 80 and all(right)


def test_failed_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_records(path, [b"old"])

    def failing():
        yield b"new"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_records(path, failing())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with RecordFile(path) as file:
        assert file.read([0]) == [b"old"]


def test_empty_file_is_fine_and_damage_is_found(tmp_path):
    path = tmp_path / "a"
    assert write_records(path, []) == 0
    with RecordFile(path) as file:
        assert len(file) == 0
        with pytest.raises(IndexError, match="has no records"):
            file.read([0])
    rng = np.random.default_rng(0)
    write_records(path, [rng.bytes(1000) for _ in range(300)])
    data = path.read_bytes()
    for broken in (b"", b"hello", data[: len(data) // 2], data[:-1]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is damaged or not ArrayRecord"):
            RecordFile(path)
    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 0xFF
    path.write_bytes(flipped)
    with RecordFile(path) as file, pytest.raises(ValueError, match="is damaged"):
        file.read(np.arange(300))
    with pytest.raises(FileNotFoundError, match="no record file"):
        RecordFile(tmp_path / "none")


def test_a_writer_that_fails_raises_one_sentence(tmp_path, monkeypatch):
    class Writer:
        def __init__(self, *args):
            pass

        def write(self, record):
            if record == b"full":
                raise RuntimeError("no space left on device")

        def close(self):
            raise RuntimeError("no space left on device")

    monkeypatch.setattr(store, "ArrayRecordWriter", Writer)
    for records in ([b"full"], []):
        with pytest.raises(OSError, match="cannot be written: no space left"):
            write_records(tmp_path / "a", records)
        assert not list(tmp_path.iterdir())


def record_of(tag: bytes, header: object, rest: bytes = b"") -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return tag + struct.pack("<I", len(data)) + data + rest


WHOLE = {"id": "a", "source": "", "metadata": {}, "segments": []}


@pytest.mark.parametrize(
    "header",
    [
        *(b"{", b"[" * 100_000, b"\xff", 5, [], {}),
        *({**WHOLE, name: 5} for name in WHOLE),
        {**WHOLE, "segments": [5]},
        *({**WHOLE, "segments": [{"text": text}]} for text in (5, None)),
        *({**WHOLE, "segments": [{"image": n}]} for n in (-1, 2.5, "x", True, 1 << 60)),
        {**WHOLE, "segments": [{"modality": "sound", "length": 0}]},
        {**WHOLE, "segments": [{"modality": "text", "length": -1}] * 2},
        {**WHOLE, "segments": [{"modality": [], "length": "x"}]},
    ],
)
def test_headers_of_wrong_types_are_refused_in_one_sentence(header):
    for tag, decode in ((b"RDOC", decode_document), (b"RTOK", decode_tokenized)):
        with pytest.raises(ValueError, match="."):
            decode(record_of(tag, header))
    with pytest.raises(ValueError, match="is not a document"):
        decode_document(record_of(b"RTOK", header))
