"""Target and documents are shown under one change, which the seed and the index choose."""

from __future__ import annotations

import types

import numpy as np

from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.pipeline import PipelineConfig, make_batches
from racm3_jax.sequences.variants import Variants
from racm3_jax.types import Retrieved

PLAIN = CausalMaskingConfig(num_masks="none", rotation_probability=0.0)
CONFIG = PipelineConfig(
    rows=4, row_length=24, examples_per_batch=4, min_documents=2, seed=5
)
NUM = 6


def make_variants(vocab):
    """Images of change n are all code n; document 5 has none."""
    codes = np.arange(3)[:, None, None] + np.zeros((3, NUM - 1, 2), int)
    places = {str(i): i for i in range(NUM - 1)}
    return Variants(vocab.image_tokens(codes + 1).astype(np.int32), places)


def collect(vocab, make_document, start_step, num_steps):
    documents = [make_document(f"t{i}", "i9 i9", id=str(i)) for i in range(NUM)]
    memory = types.SimpleNamespace(
        documents=lambda ids: [documents[i] for i in ids],
        queries=lambda ids, modality, variant: np.asarray(ids, np.float32)[:, None],
    )

    def retrieve(queries, nums, mains):
        rows = [(int(query[0]) + np.array([1, 2])) % NUM for query in queries]
        found = [tuple(documents[i] for i in pair) for pair in rows]
        ones = np.ones(2, np.float32)
        return [Retrieved(r, ones, d) for r, d in zip(rows, found, strict=True)]

    with make_batches(
        memory,
        types.SimpleNamespace(retrieve=retrieve),
        np.arange(NUM),
        vocab,
        PLAIN,
        CONFIG,
        start_step=start_step,
        num_steps=num_steps,
        variants=make_variants(vocab),
    ) as batches:
        return [batch for batch, _ in batches]


def test_all_images_of_an_example_have_its_change(vocab, make_document):
    seen = set()
    for batch in collect(vocab, make_document, 0, 12):
        for row, segments in zip(batch.inputs, batch.segment_ids, strict=True):
            for number in range(1, segments.max() + 1):
                tokens = row[segments == number]
                codes = vocab.image_codes(tokens[vocab.is_image(tokens)])
                # 9 is an image as the memory has it; document 5 knows no other.
                changed = set(codes.tolist()) - {9}
                assert len(codes) == 6 and len(changed) <= 1
                if vocab.name(int(tokens[1])) != "t5" and len(set(codes)) == 1:
                    seen |= set(codes.tolist())
    assert seen == {1, 2, 3, 9}


def test_a_resumed_training_draws_the_same_changes(vocab, make_document):
    whole, rest = (collect(vocab, make_document, start, 8 - start) for start in (0, 5))
    for batch, again in zip(whole[5:], rest, strict=True):
        np.testing.assert_array_equal(batch.inputs, again.inputs)
