"""Random files are read, counted, or refused in a sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from reader_files import jpeg, read, write_tar

NAMES = (
    *("caption", "captions", "text", "image", "images", "file_name", "path", "bytes"),
    *("segments", "texts", "metadata", "id", "url", "conversations", "messages"),
    *("value", "content", "image_base64", "annotations", "image_id", "licenses"),
)
VALUES = (
    *(None, True, 0, -1.5, float("nan"), 10**30, "", " ", "x", "1.jpg", "in\\1.jpg"),
    *("../1.jpg", "/etc/passwd", "a\0b", "https://x/1.jpg", "\ud83d", "y" * 300),
    *("data:image/png;base64,AAAA", "<image>", "%%%", "file:///etc/hosts"),
)


class Random:
    """Random JSON, and files with a few changed bytes."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def value(self, depth: int = 0):
        kind = self.rng.random()
        if depth > 3 or kind < 0.6:
            return VALUES[self.rng.integers(len(VALUES))]
        if kind < 0.8:
            return [self.value(depth + 1) for _ in range(self.rng.integers(4))]
        return self.fields(depth + 1)

    def fields(self, depth: int = 0) -> dict:
        names = self.rng.choice(NAMES, self.rng.integers(1, 6))
        return {str(name): self.value(depth) for name in names}

    def spoil(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for place in self.rng.integers(0, len(data), self.rng.integers(3)):
            changed[place] = self.rng.integers(256)
        return bytes(changed)


def check(source: str) -> None:
    try:
        found, report = read(source)
    except (ValueError, FileNotFoundError) as error:
        assert not isinstance(error, UnicodeError) and str(error)
        return
    assert all(entry["error"] for entry in report.listed)
    for document in found:
        shown = (document.id, document.text, document.source, document.metadata)
        json.dumps(shown, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize("seed", range(8))
def test_random_records(tmp_path, seed):
    random = Random(seed)
    (tmp_path / "in").mkdir()
    for name in ("1.jpg", "in/1.jpg"):
        (tmp_path / name).write_bytes(jpeg(1))
    lines = "\n".join(json.dumps(random.fields()) for _ in range(30)).encode()
    (tmp_path / "a.jsonl").write_bytes(random.spoil(lines))
    check(f"jsonl:{tmp_path}/a.jsonl")
    (tmp_path / "b.json").write_text(json.dumps([random.value() for _ in range(9)]))
    check(f"jsonl:{tmp_path}/b.json")
    (tmp_path / "in" / "metadata.jsonl").write_bytes(random.spoil(lines))
    (tmp_path / "1.json").write_text(json.dumps(random.value()))
    (tmp_path / "captions.json").write_text(json.dumps(random.value()))
    check(f"folder:{tmp_path}")
    members = {
        f"{i}{suffix}": data
        for i in range(6)
        for suffix, data in (
            (".jpg", random.spoil(jpeg(i))),
            (".json", json.dumps(random.value()).encode()),
        )
    }
    write_tar(tmp_path / "a.tar", members)
    (tmp_path / "b.tar").write_bytes(random.spoil((tmp_path / "a.tar").read_bytes()))
    check(f"webdataset:{tmp_path}/*.tar")
    (tmp_path / "annotations").mkdir()
    content = {
        "images": [{"id": 1, "file_name": "1.jpg"}, random.fields(), random.value()],
        "annotations": [random.fields() for _ in range(5)],
        "licenses": random.value(),
    }
    file = tmp_path / "annotations" / "captions_in.json"
    file.write_bytes(random.spoil(json.dumps(content).encode()))
    check(f"coco:{tmp_path};split=in")
