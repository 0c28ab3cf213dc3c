"""Crops of photographs, whole scenes held out."""

from __future__ import annotations

import numpy as np
import photographs
import pytest

from racm3_jax.documents.sources import source_corpus

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


def test_crops_of_a_scene_are_held_out_together(tmp_path):
    photographs.write_photos(tmp_path / "photos", 32)
    corpus = source_corpus(
        f"folder:{tmp_path / 'photos'}", "scene", ",".join(photographs.HELD_OUT)
    )
    held_out, train = list(corpus.heldout()), list(corpus.train())
    assert len(held_out) == 6 and len(train) == 26
    assert {d.metadata["scene"] for d in held_out} == set(photographs.HELD_OUT)
    for document in (*held_out, *train):
        (image,) = document.images
        assert image.shape[0] == image.shape[1] >= 128
        words, place = document.text.rsplit(", ", 1)
        assert words == photographs.SCENES[document.metadata["scene"]]
        row, column = place.split()
        assert row in photographs.ROWS and column in photographs.COLUMNS


class GreyTokenizer:
    """A code for the brightness of each quarter."""

    image_size, num_codes = 64, 256

    def encode(self, images):
        quarters = images.reshape(len(images), 2, 32, 2, 32 * 3).astype(float)
        return quarters.mean(axis=(2, 4)).reshape(len(images), 4).astype(np.int32)

    def decode(self, codes):
        grey = codes.reshape(-1, 2, 2, 1).astype(np.uint8).repeat(3, 3)
        return grey.repeat(32, 1).repeat(32, 2)


def test_held_out_and_seen_scenes_are_measured_apart(tmp_path):
    photographs.write_photos(tmp_path / "photos", 32)
    found = {}
    for only in (True, False):
        found[only], rows = photographs.measure_tokenizer(
            GreyTokenizer(), tmp_path / "photos", only
        )
        assert len(rows) == found[only]["photos"]
        assert 5 < found[only]["psnr"] < 25
        assert 0 < found[only]["codes_used"] < 0.5
        by_scene = found[only]["psnr_by_scene"].values()
        assert min(by_scene) <= found[only]["psnr"] <= max(by_scene)
    assert set(found[True]["psnr_by_scene"]) == set(photographs.HELD_OUT)
    assert not set(found[False]["psnr_by_scene"]) & set(photographs.HELD_OUT)
    assert (found[True]["photos"], found[False]["photos"]) == (6, 26)
