"""Which rows are trained on, and how they are found."""

from __future__ import annotations

import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from racm3_jax import storage
from racm3_jax.memory.format import hash_name
from racm3_jax.memory.memory import Memory
from racm3_jax.wiring import build_episodes, parts, rows

SPLITS = ["train", "heldout", None]
WANTED = [i for i in range(40) if SPLITS[i % 3] != "heldout"]


@pytest.fixture
def memory(build, documents):
    for i, document in enumerate(documents):
        document.metadata.update({"split": SPLITS[i % 3]} if SPLITS[i % 3] else {})
    return build(documents)


@pytest.fixture
def reads(monkeypatch):
    """How many documents were read by each call."""
    counts = []
    documents = Memory.documents

    def count(self, ids):
        counts.append(len(ids))
        return documents(self, ids)

    monkeypatch.setattr(Memory, "documents", count)
    return counts


def test_main_rows_come_from_a_column(memory, tmp_path, reads):
    assert rows.find_main_rows(memory, tmp_path / "run").tolist() == WANTED
    memory.remove([0, 1])
    assert rows.find_main_rows(memory, tmp_path / "run").tolist() == WANTED[1:]
    assert reads == [] and not (tmp_path / "run").exists()


def test_for_an_older_memory_they_are_read_once_per_work_directory(
    memory, tmp_path, reads
):
    memory.split_hashes = None
    for _ in range(2):
        assert rows.find_main_rows(memory, tmp_path / "run").tolist() == WANTED
    assert reads == [40]
    (file,) = (tmp_path / "run" / rows.COLUMNS_DIRECTORY).iterdir()
    np.save(file, np.zeros(3))
    with pytest.raises(storage.IntegrityError, match=r"float64\[3\] instead of"):
        rows.find_main_rows(memory, tmp_path / "run")


def test_any_key_is_a_column(memory, tmp_path, reads):
    for _ in range(2):
        column = rows.read_column(memory, "nation", tmp_path / "run")
    assert column.tolist() == [hash_name(str(i // 4)) for i in range(40)]
    assert reads == [40]
    assert not rows.read_column(memory, "absent", tmp_path / "run").any()


def test_classes_of_episodes_are_numbered_as_they_appear(build, documents, tmp_path):
    names = ["pear", "fig", None, "apple"]
    for i, document in enumerate(documents):
        document.metadata.pop("nation")
        if names[i % 4]:
            document.metadata["nation"] = names[i % 4]
    memory = build(documents)
    memory.remove([0])
    section = {"probability": 1.0, "class_key": "nation"}
    config = ConfigDict({"seed": 0, "episodes": section})
    tokenizer = types.SimpleNamespace(encode_text=lambda word: np.zeros(1, np.int32))
    episodes = build_episodes(config, memory, tokenizer, tmp_path / "run")
    expected = [-1, 0, -1, 1, *[2, 0, -1, 1] * 9]
    assert episodes._classes.tolist() == expected
    # Left out, the key is the world's.
    config = ConfigDict({"seed": 0, "episodes": {"probability": 1.0}, "world": {}})
    episodes = build_episodes(config, memory, tokenizer, tmp_path / "run")
    assert episodes.config.class_key == "nation"
    assert episodes._classes.tolist() == expected


@pytest.mark.parametrize("name", ["episodes", "pairing"])
def test_without_a_world_the_key_of_classes_must_be_named(memory, tmp_path, name):
    section = {"probability": 1.0}
    config = ConfigDict({"seed": 0, "source": "folder:photos", name: section})
    text = types.SimpleNamespace(decode=None, encode=None)
    image = types.SimpleNamespace(image_size=64)
    tokenizer = types.SimpleNamespace(encode_text=str.encode, text=text, image=image)
    build = {"episodes": build_episodes, "pairing": parts.build_pairing}[name]
    with pytest.raises(ValueError, match=f"config.{name}.class_key is empty"):
        build(config, memory, tokenizer, tmp_path / "run")
    section["class_key"] = "nation"
    config = ConfigDict({"seed": 0, "source": "folder:photos", name: section})
    built = build(config, memory, tokenizer, tmp_path / "run")
    assert len(np.unique(built._classes[built._classes >= 0])) == 10


@pytest.mark.parametrize("change", [{"mirror": True}, {"shift": 0.1}])
def test_boxes_of_moved_images_are_refused(memory, tmp_path, change):
    section = {"probability": 1.0, "class_key": "nation", "box_weight": 2.0}
    config = ConfigDict({"seed": 0, "pairing": section, "augmentation": change})
    with pytest.raises(ValueError, match="box_weight needs the boxes"):
        parts.build_pairing(config, memory, types.SimpleNamespace(), tmp_path)


def test_held_out_documents_have_no_class(memory, tmp_path):
    """Documents that are chosen by class are never held out either."""
    classes = parts._read_classes(memory, "nation", tmp_path / "run")
    assert np.flatnonzero(classes >= 0).tolist() == WANTED
