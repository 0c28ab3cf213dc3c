"""The decode loop: equal to the full forward, reproducible, compiled once per bucket."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax.generation.grammar import image_grammar, text_grammar
from racm3_jax.generation.sample import SamplingConfig, sample
from racm3_jax.model.config import tiny
from racm3_jax.model.transformer import Transformer, compute_logits, init_params
from racm3_jax.vocab import Vocab

VOCAB = Vocab(num_text_ids=20, num_image_codes=30, image_length=6, num_sentinels=2)
MAX_LENGTH = 160
KEY = jax.random.key(0)


@flax.struct.dataclass
class SumCache:
    """In place of keys and values, the sum of the embeddings that were read."""

    total: Any

    def repeat(self, num_samples):
        return SumCache(jnp.repeat(self.total, num_samples, axis=0))


class SumModel:
    """Next-token logits from the sum of all embeddings; counts how often it is traced."""

    def __init__(self):
        self.config = types.SimpleNamespace(max_length=MAX_LENGTH)
        self.num_traces = 0

    def apply(self, variables, *args, method):
        return getattr(self, method)(variables["params"], *args)

    def prefill(self, params, tokens, lengths, max_length):
        self.num_traces += 1
        assert max_length <= MAX_LENGTH
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        total = (params["embed"][tokens] * real[..., None]).sum(1)
        return total @ params["head"], SumCache(total)

    def decode(self, params, token, cache):
        total = cache.total + params["embed"][token]
        return total @ params["head"], SumCache(total)


MODEL = SumModel()


def sum_params():
    rng = np.random.default_rng(0)
    return {
        "embed": jnp.asarray(rng.normal(size=(VOCAB.size, 8)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(8, VOCAB.size)) / 3, jnp.float32),
    }


def make_prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB.num_text_ids, (len(lengths), max(lengths)))
    return tokens.astype(np.int32), np.asarray(lengths, np.int32)


IMAGE = SamplingConfig(max_new_tokens=6, fixed_length=True)
TEXT = SamplingConfig(max_new_tokens=9)


def test_greedy_equals_the_argmax_of_the_full_forward():
    """At every step, for prompts of different lengths and a table larger than the vocab.

    One forward over prompt and samples checks all steps: each sees what came before.
    """
    config = tiny(vocab_size=VOCAB.size + 5, max_length=40, num_layers=1)
    params = jax.jit(init_params, static_argnums=0)(config, KEY)
    params["embedding"] = params["embedding"] * 20  # sharper, so that no two logits tie
    tokens, lengths = make_prompts([3, 9, 14, 30])
    grammar = text_grammar(VOCAB, 8)
    greedy = dataclasses.replace(TEXT, temperature=0.0)
    model = Transformer(config)
    samples = sample(model, params, tokens, lengths, grammar, greedy, KEY)

    @jax.jit
    def full_logits(rows, segments):
        positions = jnp.broadcast_to(jnp.arange(40), rows.shape)
        hidden = model.apply({"params": params}, rows, positions, segments)
        return compute_logits(params, config, hidden)

    rows, segments = np.zeros((2, 4, 40), np.int32)
    for i, length in enumerate(lengths):
        end = length + samples.lengths[i, 0]
        rows[i, :length] = tokens[i, :length]
        rows[i, length:end] = samples.tokens[i, 0, : end - length]
        segments[i, :end] = 1
    logits = np.asarray(full_logits(rows, segments))
    for i, length in enumerate(lengths):
        for step in range(samples.lengths[i, 0]):
            here = logits[i, length + step - 1]
            allowed = np.zeros(len(here), bool)
            allowed[: VOCAB.num_text_ids] = step < 8
            allowed[VOCAB.eoss] = step > 0
            expected = np.argmax(np.where(allowed, here, -np.inf))
            assert samples.tokens[i, 0, step] == expected
            log_prob = here[expected] - np.logaddexp.reduce(here)
            np.testing.assert_allclose(
                samples.log_probs[i, 0, step], log_prob, atol=1e-4
            )


def test_images_have_exactly_their_length_and_seeds_reproduce():
    model, params = MODEL, sum_params()
    tokens, lengths = make_prompts([5, 30, 11])
    grammar = image_grammar(VOCAB)

    def run(key):
        return sample(
            model, params, tokens, lengths, grammar, IMAGE, key, num_samples=4
        )

    first, again, other = run(KEY), run(KEY), run(jax.random.key(1))
    assert first.tokens.shape == (3, 4, 6)
    assert VOCAB.is_image(first.tokens).all()
    assert (first.lengths == 6).all()
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()
    assert len({t.tobytes() for t in first.tokens.reshape(12, 6)}) == 12


def test_batching_and_the_number_of_samples_change_no_sample():
    model, params = MODEL, sum_params()
    tokens, lengths = make_prompts([7, 40, 90, 23])
    grammar = text_grammar(VOCAB, 8)
    seeds = np.array([5, 0, 77, 2**32 - 1])
    prompts = (tokens, lengths, grammar, TEXT, KEY)
    together = sample(model, params, *prompts, num_samples=4, row_seeds=seeds)
    for i in (0, 1, 3):  # alone in the bucket of 64, together in that of 128
        alone = sample(
            model,
            params,
            tokens[i : i + 1, : lengths[i]],
            lengths[i : i + 1],
            grammar,
            TEXT,
            KEY,
            num_samples=2,
            row_seeds=seeds[i : i + 1],
        )
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i, :2])
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[i, :2], 1e-4)


def test_text_ends_with_one_eoss_and_padding_follows():
    model, params = MODEL, sum_params()
    tokens, lengths = make_prompts([4, 4, 4, 90])
    grammar = text_grammar(VOCAB, 8)
    samples = sample(model, params, tokens, lengths, grammar, TEXT, KEY, num_samples=4)
    assert len(set(samples.lengths.ravel())) > 1
    for row, log_probs, length in zip(
        samples.tokens.reshape(16, -1),
        samples.log_probs.reshape(16, -1),
        samples.lengths.ravel(),
        strict=True,
    ):
        assert VOCAB.is_text(row[: length - 1]).all()
        assert row[length - 1] == VOCAB.eoss
        assert (row[length:] == VOCAB.pad).all()
        assert (log_probs[:length] < 0).all()
        assert (log_probs[length:] == 0).all()


def test_one_compiled_program_serves_a_bucket():
    """Lengths, rows, settings, grammar limits and seeds: none recompiles."""
    model, params = SumModel(), sum_params()
    for rows, longest, limit, config in [
        (3, 3, 8, TEXT),
        (4, 64, 2, dataclasses.replace(TEXT, temperature=0.0)),
        (4, 31, 15, SamplingConfig(0.5, 0.8, 3, 16)),
    ]:
        tokens, lengths = make_prompts([longest] + [2] * (rows - 1))
        grammar = text_grammar(VOCAB, limit)
        samples = sample(model, params, tokens, lengths, grammar, config, KEY)
        assert samples.tokens.shape == (rows, 1, config.max_new_tokens)
    assert model.num_traces == 1
    tokens, lengths = make_prompts([65, 1, 1])
    sample(model, params, tokens, lengths, text_grammar(VOCAB, 8), TEXT, KEY)
    assert model.num_traces == 2


def test_a_row_stops_at_the_max_length_of_the_model():
    """Text gets the rest of the 160 positions; an image must fit completely."""
    model, params = MODEL, sum_params()
    tokens, lengths = make_prompts([157, 10])
    grammar = text_grammar(VOCAB, 8, min_length=8)
    samples = sample(model, params, tokens, lengths, grammar, TEXT, KEY)
    assert samples.lengths[:, 0].tolist() == [3, 9]
    assert (samples.tokens[0, 0, 3:] == VOCAB.pad).all()
    with pytest.raises(ValueError, match="157 tokens and at least 6 .* max_length 160"):
        sample(model, params, tokens, lengths, image_grammar(VOCAB), IMAGE, KEY)


def test_frequencies_follow_the_model():
    """Chi-square of the first token over 6,000 samples of one prompt."""
    model, params = MODEL, sum_params()
    tokens, lengths = make_prompts([5])
    one = SamplingConfig(max_new_tokens=1, fixed_length=True)
    grammar = image_grammar(VOCAB, 1)
    samples = sample(
        model, params, tokens, lengths, grammar, one, KEY, num_samples=6000
    )
    codes = VOCAB.image_codes(samples.tokens.ravel())
    logits = np.asarray(model.prefill(params, tokens, lengths, 6)[0])[0]
    weights = np.exp(logits[VOCAB.image_range.start : VOCAB.image_range.stop])
    expected = weights / weights.sum() * 6000
    rare = expected < 20
    counts = np.bincount(codes, minlength=30)
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    chi_square = ((counts - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    assert chi_square < 59.7  # at most 30 - 1 + 1 cells, p = 0.001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature .* got -0.1"),
        ({"temperature": float("nan")}, "temperature .* got nan"),
        ({"top_p": 0.0}, "top_p .* got 0.0"),
        ({"top_p": 1.5}, "top_p .* got 1.5"),
        ({"top_k": -1}, "top_k .* got -1"),
        ({"min_p": -0.1}, "min_p .* got -0.1"),
        ({"min_p": 1.5}, "min_p .* got 1.5"),
        ({"min_p": float("nan")}, "min_p .* got nan"),
        ({"max_new_tokens": 0}, "max_new_tokens .* got 0"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**changes)


def test_invalid_prompts_are_refused():
    model, params = MODEL, sum_params()
    grammar = image_grammar(VOCAB)
    tokens, lengths = make_prompts([5, 3])
    with pytest.raises(ValueError, match="num_samples must be >= 1; got 0"):
        sample(model, params, tokens, lengths, grammar, IMAGE, KEY, num_samples=0)
    with pytest.raises(ValueError, match="at least one token"):
        sample(model, params, tokens, np.array([5, 0]), grammar, IMAGE, KEY)
    with pytest.raises(ValueError, match="do not hold 2 prompts"):
        sample(model, params, tokens, np.array([5, 6]), grammar, IMAGE, KEY)


def test_forced_tokens_are_read_and_each_row_ends_at_its_length():
    """`f f * f` and `* *`: a star is sampled, given the forced tokens before it."""
    model, params = MODEL, sum_params()
    tokens, lengths = make_prompts([5, 9])
    code = VOCAB.image_range.start
    forced = np.array([[code, code + 1, -1, code + 2], [-1, -1, -1, -1]], np.int32)
    config = SamplingConfig(max_new_tokens=4, temperature=0.0)
    grammar = image_grammar(VOCAB, 4)
    samples = sample(
        model, params, tokens, lengths, grammar, config, KEY,
        forced=forced, row_lengths=np.array([4, 2]),
    )  # fmt: skip
    assert samples.tokens[0, 0, [0, 1, 3]].tolist() == [code, code + 1, code + 2]
    total = params["embed"][jnp.array([*tokens[0, :5], code, code + 1])].sum(0)
    logits = np.asarray(total @ params["head"])[code : code + 30]
    assert samples.tokens[0, 0, 2] == code + logits.argmax()
    assert samples.log_probs[0, 0, [0, 1, 3]].tolist() == [0, 0, 0]
    assert samples.lengths[:, 0].tolist() == [4, 2]
    assert (samples.tokens[1, 0, 2:] == VOCAB.pad).all()


def test_progress_reports_beginnings_of_the_samples():
    model, params = MODEL, sum_params()
    tokens, lengths = make_prompts([5, 9])
    grammar = image_grammar(VOCAB, 40)
    config = SamplingConfig(max_new_tokens=40, fixed_length=True)
    reports = []
    prompts = (tokens, lengths, grammar, config, KEY)
    samples = sample(model, params, *prompts, num_samples=2, on_progress=reports.append)
    silent = sample(model, params, *prompts, num_samples=2)
    np.testing.assert_array_equal(samples.tokens, silent.tokens)
    assert [r.num_sampled for r in reports] == [16, 32, 40]
    assert all(r.max_new_tokens == 40 and r.tokens_per_second > 0 for r in reports)
    for report in reports:
        np.testing.assert_array_equal(
            report.tokens, samples.tokens[..., : report.num_sampled]
        )
