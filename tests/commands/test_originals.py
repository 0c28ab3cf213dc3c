"""Images of a memory are shown from the original files, where these are unchanged."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from racm3_jax.commands.configs import UsageError
from racm3_jax.commands.originals import find_folder, show_originals
from racm3_jax.memory.filters import hash_image
from racm3_jax.types import Document, Segment

RNG = np.random.default_rng(0)
PHOTOS = [RNG.integers(0, 256, (40, 50, 3)).astype(np.uint8) for _ in range(4)]
CODED = np.full((8, 8, 3), 99, np.uint8)


def make_document(id, *images):
    segments = (Segment(text=f"photo {id}"), *(Segment(image=i) for i in images))
    return Document(id, segments, f"http://a/{id}", {"licence": "CC0"})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for i, photo in enumerate(PHOTOS[:3]):
        Image.fromarray(photo).save(tmp_path / "photos" / f"{i}.png")
    Image.fromarray(PHOTOS[3]).save(tmp_path / "photos" / "sub" / "3.png")
    Image.fromarray(PHOTOS[3]).save(tmp_path / "outside.png")
    (tmp_path / "photos" / "text.png").write_text("no image")
    return tmp_path / "photos"


def test_unchanged_files_are_shown(folder):
    documents = [
        make_document("0.png", CODED),
        make_document("sub/3.png", CODED),
        make_document("1.png", CODED),  # another image now
        make_document("gone.png", CODED),
        make_document("text.png", CODED),
        make_document("../outside.png", CODED),
        make_document("2.png", CODED, CODED),  # ambiguous
        make_document("2.png"),
    ]
    known = [PHOTOS[0], PHOTOS[3], *[PHOTOS[3]] * 6]
    hashes = np.array([hash_image(photo) for photo in known], np.uint64)
    shown, found = show_originals(documents, hashes, folder)
    assert found == 2
    np.testing.assert_array_equal(shown[0].images[0], PHOTOS[0])
    np.testing.assert_array_equal(shown[1].images[0], PHOTOS[3])
    assert shown[2:] == documents[2:]
    for new, old in zip(shown, documents, strict=True):
        assert (new.id, new.text, new.source) == (old.id, old.text, old.source)
        assert new.metadata == old.metadata


def test_without_a_folder_or_hashes_nothing_changes(folder):
    documents = [make_document("0.png", CODED)]
    hashes = np.array([hash_image(PHOTOS[0])], np.uint64)
    assert show_originals(documents, hashes, None) == (documents, 0)
    assert show_originals(documents, None, folder) == (documents, 0)


def test_the_folder_is_the_given_one_or_that_of_the_memory(folder, tmp_path):
    assert find_folder(None, f"folder:{folder}") == folder
    assert find_folder(None, f"folder:{folder};captions=a.csv") == folder
    assert find_folder(None, f"folder:{tmp_path}/moved") is None
    assert find_folder(None, f"coco:{folder}") is None
    assert find_folder(None, "") is None
    assert find_folder(str(tmp_path), f"folder:{folder}") == tmp_path
    with pytest.raises(UsageError, match="--originals=nowhere: there is no such"):
        find_folder("nowhere", "")
