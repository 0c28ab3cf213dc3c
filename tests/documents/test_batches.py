import itertools

import numpy as np

from racm3_jax.documents.batches import image_batches, scale_pixels

IMAGES = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)


def test_pixels_span_minus_one_to_one():
    scaled = scale_pixels(np.array([[[[0, 255, 51]]]], np.uint8))
    np.testing.assert_allclose(scaled.ravel(), [-1.0, 1.0, -0.6], rtol=1e-6)


def test_a_batch_depends_only_on_seed_and_step():
    def take(seed, start, count):
        batches = image_batches(IMAGES, 3, seed=seed, start_step=start)
        return [b["images"] for b in itertools.islice(batches, count)]

    whole = take(0, 0, 4)
    np.testing.assert_array_equal(whole[2:], take(0, 2, 2))
    assert not np.array_equal(whole, take(1, 0, 4))


def test_small_sets_are_sampled_with_replacement():
    batch = next(image_batches(IMAGES[:2], 5, seed=0))
    assert batch["images"].shape == (5, 4, 4, 3)
