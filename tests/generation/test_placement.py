"""A model over several devices samples what it samples on one."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from generation_standins import VOCAB, FirstDocuments, grey, make_generator

from racm3_jax import sharding
from racm3_jax.evaluation.likelihood import Scored, score_tokens
from racm3_jax.model.config import tiny_chameleon

PROMPTS = ["a red flag", "the sea", "snow"]
MESHES = {
    "copies": {"data": 2},
    "copies of halves": {"data": 2, "tensor": 2},
    "gathered": {"data": 1, "fsdp": 2},
}


@pytest.fixture(scope="module")
def alone():
    return make_generator(tiny_chameleon, vocab_size=VOCAB.size + VOCAB.size % 2)


def run(generator):
    """Ids and scores of guided images, of captions and of a choice among labels."""
    images = generator.text_to_image_batch(
        PROMPTS, num_retrieved=2, guidance=2.0, num_samples=2, seed=[3, 4, 5]
    )
    shared = generator.text_to_image_batch(
        PROMPTS[:2], documents=FirstDocuments().documents[:1], guidance=2.0, seed=[3, 4]
    )
    captions = generator.caption_batch(
        [grey(16), grey(64)], num_retrieved=1, max_new_tokens=6, seed=[1, 2]
    )
    pixels = [x for out in (*images, *shared) for x in out.images]
    texts = [x for out in captions for x in out.texts]
    scores = [out.scores for out in (*images, *shared, *captions)]
    return np.stack(pixels), texts, np.concatenate(scores)


def test_tokens_are_those_of_one_device(alone):
    pixels, texts, scores = run(alone)
    assert len(np.unique(pixels.reshape(len(pixels), -1), axis=0)) > 4
    row = Scored(np.array([VOCAB.eod]), np.arange(5, dtype=np.int32))
    for name, sizes in MESHES.items():
        mesh = sharding.make_mesh(
            **sizes, devices=jax.devices()[: np.prod(list(sizes.values()))]
        )
        spread = alone.on_mesh(mesh)
        found = run(spread)
        np.testing.assert_array_equal(found[0], pixels, err_msg=name)
        assert found[1] == texts, name
        np.testing.assert_allclose(found[2], scores, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(
            score_tokens(spread, [row])[0], score_tokens(alone, [row])[0], atol=1e-4
        )
