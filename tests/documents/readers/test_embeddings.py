"""Precomputed embeddings, in every form that NumPy saves."""

from __future__ import annotations

import re

import numpy as np
import pytest

from racm3_jax.documents import readers
from racm3_jax.documents.readers import ReadReport, with_links

arrow = pytest.importorskip("pyarrow")

ROWS = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)


def write(root, rows, *, fields=("caption",), number: int = 0, part: str = "img_emb"):
    from pyarrow import parquet

    for folder in (part, "metadata"):
        (root / folder).mkdir(exist_ok=True)
    np.save(root / part / f"{part}_{number}.npy", rows)
    table = [
        {"image_path": f"/data/{i}.jpg", **{name: f"{name} {i}" for name in fields}}
        for i in range(6)
    ]
    file = root / "metadata" / f"metadata_{number}.parquet"
    parquet.write_table(arrow.Table.from_pylist(table), file)
    return f"embeddings:{root}"


def read(source):
    report = ReadReport(1.0)
    found = [
        record
        for shard in readers.find_shards(source)
        for record in readers.read_shard(shard, report)
    ]
    return found, report


@pytest.mark.parametrize(
    "rows",
    [
        ROWS.astype(np.float16),
        ROWS.astype(np.float64) * 1e300,
        ROWS * np.float32(1e-30),
        np.asfortranarray(ROWS),
        ROWS.astype(">f4"),
        ROWS[:, None],
        np.round(ROWS * 40).astype(np.int8),
        (np.sign(ROWS) * 60_000).astype(np.float16),
    ],
)
def test_numbers_of_every_kind(tmp_path, rows):
    found, report = read(write(tmp_path, rows))
    assert report.num_bad == 0 and len(found) == 6
    wide = np.asarray(rows.reshape(6, 16), np.float64) / np.abs(rows).max()
    expected = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    for record, row in zip(found, expected, strict=True):
        assert record.image_embedding is not None
        assert record.image_embedding.dtype == np.float32
        np.testing.assert_allclose(record.image_embedding, row, atol=1e-3)
        assert record.text_embedding is None
    assert [r.document.text for r in found] == [f"caption {i}" for i in range(6)]


def test_documents_may_consist_of_an_embedding_only(tmp_path):
    found, report = read(write(tmp_path, ROWS, fields=()))
    assert report.num_bad == 0
    assert [r.document.id for r in found] == [f"metadata_0/{i:08d}" for i in range(6)]
    assert [r.document.text for r in found] == [""] * 6
    assert found[3].document.metadata == {"image_path": "/data/3.jpg"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([None] * 6), "holds Python objects, .* np.save"),
        (ROWS.astype(complex), r"complex64|complex128 of shape \[6, 16\]"),
        (ROWS[:, 0], r"shape \[rows, d_embed\]; got float32 of shape \[6\]"),
        (ROWS.reshape(6, 2, 8), r"float32 of shape \[6, 2, 8\]"),
        (ROWS[:, :0], r"float32 of shape \[6, 0\]"),
        (ROWS[:5], "different numbers of rows: 5 of image, 6 of metadata"),
        (ROWS > 0, "got bool"),
    ],
)
def test_other_arrays_are_refused_in_a_sentence(tmp_path, rows, message):
    found, report = read(write(tmp_path, rows))
    assert not found and report.reasons == {"damaged file": 1}
    assert re.search(message, report.listed[0]["error"])


def test_a_truncated_array(tmp_path):
    source = write(tmp_path, ROWS)
    file = tmp_path / "img_emb" / "img_emb_0.npy"
    for data in (file.read_bytes()[:300], b"", b"\x93NUMPY\1\0"):
        file.write_bytes(data)
        found, report = read(source)
        assert not found and report.reasons == {"damaged file": 1}


def test_zero_rows_are_counted(tmp_path):
    rows = ROWS.copy()
    rows[1], rows[3, 2], rows[4, 0] = 0, np.nan, np.inf
    found, report = read(write(tmp_path, rows))
    assert [r.document.text[-1] for r in found] == ["0", "2", "5"]
    assert report.reasons == {"bad embedding": 3}


def test_files_are_matched_by_number(tmp_path):
    source = write(tmp_path, ROWS)
    write(tmp_path, ROWS, number=1)
    (tmp_path / "img_emb" / "._img_emb_0.npy").write_bytes(b"hidden")
    found, _ = read(source)
    assert len({r.document.id for r in found}) == 12
    (tmp_path / "metadata" / "metadata_1.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="no metadata file of number 1"):
        read(source)
    (tmp_path / "img_emb" / "img_emb_1.npy").rename(tmp_path / "img_emb" / "b00.npy")
    with pytest.raises(ValueError, match="have the same number 0"):
        read(source)


def test_links_of_embeddings(tmp_path):
    (tmp_path / "in").mkdir()
    source = write(tmp_path / "in", ROWS)
    file = tmp_path / "in" / "img_emb" / "img_emb_0.npy"
    file.rename(tmp_path / "elsewhere.npy")
    file.symlink_to(tmp_path / "elsewhere.npy")
    assert read(source)[1].reasons == {"link outside the folder": 1}
    assert len(read(with_links(source))[0]) == 6
