"""One change of target and documents, determined by the seed and the index."""

from __future__ import annotations

import numpy as np
import pytest

from racm3_jax.sequences.variants import Variants

NUM = 6


@pytest.fixture
def collect(vocab, make_document, ring_batches):
    """Images of change n are all code n; document 5 has none."""
    codes = np.arange(3)[:, None, None] + np.zeros((3, NUM - 1, 2), int)
    places = {str(i): i for i in range(NUM - 1)}
    variants = Variants(vocab.image_tokens(codes + 1).astype(np.int32), places)
    documents = [make_document(f"t{i}", "i9 i9", id=str(i)) for i in range(NUM)]
    return lambda start, num: ring_batches(documents, start, num, variants)


def test_all_images_of_an_example_have_its_change(vocab, collect):
    seen = set()
    for batch in collect(0, 12):
        for row, segments in zip(batch.inputs, batch.segment_ids, strict=True):
            for number in range(1, segments.max() + 1):
                tokens = row[segments == number]
                codes = vocab.image_codes(tokens[vocab.is_image(tokens)])
                # 9 is the image in the memory; document 5 has no other.
                changed = set(codes.tolist()) - {9}
                assert len(codes) == 6 and len(changed) <= 1
                if vocab.name(int(tokens[1])) != "t5" and len(set(codes)) == 1:
                    seen |= set(codes.tolist())
    assert seen == {1, 2, 3, 9}


def test_a_resumed_training_has_the_same_changes(collect):
    whole, rest = (collect(start, 8 - start) for start in (0, 5))
    for batch, again in zip(whole[5:], rest, strict=True):
        np.testing.assert_array_equal(batch.inputs, again.inputs)
