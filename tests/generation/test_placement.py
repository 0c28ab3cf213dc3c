"""A model over several devices samples what it samples on one."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest
from generation_standins import VOCAB, FirstDocuments, grey, make_generator

from racm3_jax import sharding
from racm3_jax.generation import decoding, placement
from racm3_jax.generation.likelihood import Scored, score_tokens
from racm3_jax.model.config import racm3_2b7, tiny_chameleon
from racm3_jax.model.transformer import abstract_params, count_params
from racm3_jax.training.collectives import find_collectives

PROMPTS = ["a red flag", "the sea", "snow"]
GB = 10**9


@pytest.fixture(scope="module")
def alone():
    return make_generator(tiny_chameleon, vocab_size=VOCAB.size + VOCAB.size % 2)


def spread(generator, **sizes):
    number = int(np.prod(list(sizes.values())))
    return generator.on_mesh(
        sharding.make_mesh(**sizes, devices=jax.devices()[:number])
    )


def generate_images(generator, prompts=PROMPTS, **settings):
    """Images and scores of guided samples."""
    outputs = generator.text_to_image_batch(
        prompts, guidance=2.0, seed=[3, 4, 5][: len(prompts)], **settings
    )
    images = [image for output in outputs for image in output.images]
    return np.stack(images), np.concatenate([output.scores for output in outputs])


@pytest.fixture(scope="module")
def on_one_device(alone):
    images, scores = generate_images(alone, num_retrieved=2, num_samples=2)
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) > 3
    return images, scores


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"data": 1, "fsdp": 2}])
def test_images_are_those_of_one_device(alone, on_one_device, sizes):
    images, scores = generate_images(
        spread(alone, **sizes), num_retrieved=2, num_samples=2
    )
    np.testing.assert_array_equal(images, on_one_device[0])
    np.testing.assert_allclose(scores, on_one_device[1], atol=1e-5)


@pytest.mark.parametrize("draft", ["off", "jacobi"])
def test_copies_exchange_nothing_while_they_decode(alone, monkeypatch, draft):
    compiled = []

    def spy(*arguments):
        compiled.append(decoding.decode_steps.lower(*arguments).compile().as_text())
        return decoding.decode_steps(*arguments)

    monkeypatch.setattr("racm3_jax.generation.sample.decode_steps", spy)
    generate_images(spread(alone, data=2), num_retrieved=2, num_samples=2, draft=draft)
    assert compiled
    found = [c for text in compiled for c in find_collectives(text)]
    assert not found  # a loop's own condition is not counted


def test_what_all_rows_share_is_on_all_devices(alone):
    """One prefix for all prompts; captions, whose loop ends when all have ended."""
    both = spread(alone, data=2)
    shown = FirstDocuments().documents[:1]
    for one, other in zip(
        generate_images(alone, PROMPTS[:2], documents=shown),
        generate_images(both, PROMPTS[:2], documents=shown),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)
    settings = {"num_retrieved": 1, "max_new_tokens": 6, "seed": [1, 2, 3]}
    images = [grey(16), grey(64), grey(96)]
    texts = [
        [output.texts for output in generator.caption_batch(images, **settings)]
        for generator in (alone, both)
    ]
    assert texts[0] == texts[1]


def test_likelihoods_are_those_of_one_device(alone):
    both = spread(alone, data=2, tensor=2)
    rows = [np.arange(1, n, dtype=np.int32) for n in (4, 6, 9)]
    sequences = [Scored(np.array([VOCAB.eod]), row) for row in rows]
    for one, other in zip(
        score_tokens(alone, sequences), score_tokens(both, sequences), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_8_bit_weights_may_be_sharded_and_keep_their_values(alone):
    small = alone.quantized()
    leaves = jax.tree.leaves(spread(small, tensor=2, data=1).params)
    for leaf, other in zip(leaves, jax.tree.leaves(small.params), strict=True):
        np.testing.assert_array_equal(leaf, other)
    kernel = spread(small, tensor=2, data=1).params["layers_0"]["feed_forward"]["up"]
    assert kernel["kernel"].dtype == np.int8
    assert kernel["kernel"].sharding.shard_shape(kernel["kernel"].shape) == (2, 32, 16)


@pytest.mark.parametrize(
    ("num_devices", "capacity", "shape"),
    [
        (4, None, (4, 1)),  # unknown: a copy on each
        (4, 80 * GB, (4, 1)),
        (4, 8 * GB, (2, 2)),
        (4, 3 * GB, (1, 4)),
        (4, 1 * GB, (1, 4)),  # nothing fits: as small as can be
        (8, 1 * GB, (2, 4)),  # 20 heads are not split in 8
        (3, 1 * GB, (3, 1)),
    ],
)
def test_a_copy_uses_as_few_devices_as_possible(num_devices, capacity, shape):
    devices = jax.devices()[:num_devices]
    mesh = placement.choose_mesh(racm3_2b7(), devices, capacity)
    assert (mesh.shape["data"], mesh.shape["tensor"]) == shape


def test_as_many_rows_at_once_as_fit(alone, monkeypatch):
    config = alone.model.config
    _, row = placement.decoding_bytes(config, 0)
    assert alone.max_rows == placement.MAX_ROWS  # CPU devices do not report memory
    for rows, expected in ((1, 2), (11.5, 8), (1e6, 64)):
        stats = {"bytes_limit": 5 * GB + int(rows * row), "bytes_in_use": 5 * GB}
        device = types.SimpleNamespace(memory_stats=lambda stats=stats: stats)
        free = placement.free_bytes([device])
        monkeypatch.setattr(placement, "free_bytes", lambda _, free=free: free)
        assert placement.choose_max_rows(config, alone.params) == expected
        monkeypatch.undo()


def test_the_formula_agrees_with_the_compiler():
    """`racm3 estimate --config=configs/racm3_2b7.py --device=v5e:4 --compile --what=decode`

    8 guided prompts after 2 documents of 1088 tokens; each chip has two of them.
    """
    config = racm3_2b7()
    weights, row = placement.decoding_bytes(
        config, count_params(abstract_params(config))
    )
    tokens = 2 * 2 * 1088 + 4 * (64 + 1024)
    needed = weights + row * tokens / config.max_length
    assert needed == pytest.approx(10.10e9, rel=0.03)
