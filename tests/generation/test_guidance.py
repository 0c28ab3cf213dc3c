"""Shared prefixes and second prompts: samples equal those of two full forwards."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax.generation import decoding
from racm3_jax.generation import logits as L
from racm3_jax.generation.grammar import image_grammar
from racm3_jax.generation.sample import SamplingConfig, Unconditional, sample
from racm3_jax.model.config import tiny, tiny_chameleon
from racm3_jax.model.transformer import Transformer, compute_logits, init_params
from racm3_jax.vocab import Vocab

VOCAB = Vocab(num_text_ids=20, num_image_codes=30, image_length=6, num_sentinels=2)
LENGTH = 48
KEY = jax.random.key(0)
IMAGE = image_grammar(VOCAB)
CODES = VOCAB.image_range


@functools.cache
def make_model(style):
    config = style(
        vocab_size=VOCAB.size + 3,
        max_length=LENGTH,
        num_layers=1,
        tie_embeddings=False,  # else an untrained model repeats its last token
    )
    params = jax.jit(init_params, static_argnums=0)(config, KEY)
    louder = {"embedding": params["embedding"] * 20, "head": params["head"] * 3}
    return Transformer(config), params | louder


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, rows, segments):
    positions = jnp.broadcast_to(jnp.arange(LENGTH), rows.shape)
    hidden = model.apply({"params": params}, rows, positions, segments)
    return compute_logits(params, model.config, hidden)


def full_logits(model, params, prompts, samples):
    """Logits before each sampled token, by one uncached pass; `[row, step, token]`."""
    rows, segments = np.zeros((2, len(prompts), LENGTH), np.int32)
    for i, (prompt, new) in enumerate(zip(prompts, samples, strict=True)):
        rows[i, : len(prompt) + len(new)] = [*prompt, *new]
        segments[i, : len(prompt) + len(new)] = 1
    logits = np.asarray(forward(model, params, rows, segments))
    starts = [len(prompt) - 1 for prompt in prompts]
    return np.stack(
        [x[s : s + samples.shape[1]] for x, s in zip(logits, starts, strict=True)]
    )


def make_prompts(*, same_prefix=False, drop_documents=False):
    """Three prompts after documents of 9, 5 and 12 tokens, and their second prompts."""
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 20, n).tolist() for n in (9, 5, 12)]
    if same_prefix:
        documents = [documents[0]] * 3
    documents = [[VOCAB.eod, *d, VOCAB.eod] for d in documents]
    texts = [rng.integers(0, 20, n).tolist() for n in (3, 7, 2)]
    first = [[*d, *t, VOCAB.break_] for d, t in zip(documents, texts, strict=True)]
    plain = [VOCAB.sentinel(0), VOCAB.break_]
    kept = [[VOCAB.eod] if drop_documents else d for d in documents]
    second = [[*d, *plain] for d in kept]
    return first, second, [len(d) for d in documents], [len(d) for d in kept]


def pad(prompts):
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(p) for p in prompts])


def run_sample(
    style, config, *, prefix=True, num_samples=2, rows=slice(None), **prompts
):
    model, params = make_model(style)
    first, second, prefixes, seconds = (x[rows] for x in make_prompts(**prompts))
    return sample(
        model,
        params,
        *pad(first),
        IMAGE,
        config,
        KEY,
        num_samples=num_samples,
        row_seeds=np.arange(3)[rows],
        prefix_lengths=np.array(prefixes) if prefix else None,
        unconditional=Unconditional(*pad(second), np.array(seconds)),
        token_range=CODES,
    )


def settings(**changes):
    return SamplingConfig(
        **({"max_new_tokens": 6, "fixed_length": True, "temperature": 0.0} | changes)
    )


@pytest.mark.parametrize(
    ("style", "same_prefix", "drop_documents"),
    [(tiny, False, True), (tiny, True, False), (tiny_chameleon, False, False)],
)
def test_guided_sampling_equals_two_full_forwards(style, same_prefix, drop_documents):
    prompts = {"same_prefix": same_prefix, "drop_documents": drop_documents}
    samples = run_sample(style, settings(guidance=9.0), **prompts)
    first, second, _, _ = make_prompts(**prompts)
    model, params = make_model(style)
    given = full_logits(model, params, first, samples.tokens[:, 0])
    other = full_logits(model, params, second, samples.tokens[:, 0])
    guided = (other + 9 * (given - other))[..., CODES.start : CODES.stop]
    np.testing.assert_array_equal(
        VOCAB.image_codes(samples.tokens[:, 1]), guided.argmax(-1)
    )
    assert (samples.tokens[:, 0] == samples.tokens[:, 1]).all()
    codes = given[..., CODES.start : CODES.stop]
    log_p = codes - np.logaddexp.reduce(codes, axis=-1, keepdims=True)
    expected = np.take_along_axis(
        log_p, VOCAB.image_codes(samples.tokens[:, 1])[..., None], -1
    )
    np.testing.assert_allclose(samples.log_probs[:, 1], expected[..., 0], atol=2e-5)
    assert (guided.argmax(-1) != codes.argmax(-1)).any()


def test_contrastive_decoding_equals_the_definition():
    config = settings(contrastive_k=3, contrastive_alpha=0.5)
    samples = run_sample(tiny, config)
    first, second, _, _ = make_prompts()
    model, params = make_model(tiny)
    given = full_logits(model, params, first, samples.tokens[:, 0])
    other = full_logits(model, params, second, samples.tokens[:, 0])
    for i, step in np.ndindex(3, 6):
        here, there = (x[i, step, CODES.start : CODES.stop] for x in (given, other))
        scores = reference_contrast(here, there, 3, 0.5)
        assert VOCAB.image_codes(samples.tokens[i, 0, step]) == scores.argmax()


def reference_contrast(logits, unconditional, k, alpha):
    """CM3Leon, section 3.2, literally."""
    p, q = (
        np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (logits, unconditional)
    )
    keep = p >= alpha * np.sort(p)[-min(k, len(p))]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(keep & (p > 0), np.log(p) - np.log(q), -np.inf)


@pytest.mark.parametrize(("k", "alpha"), [(1, 1.0), (1, 0.3), (4, 0.8), (40, 0.1)])
def test_contrast_equals_the_sorting_reference(k, alpha):
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 2, (2, 16, 33)).astype(np.float32)
    rows[:, :, 5] = -np.inf  # what a grammar forbids stays forbidden
    got = np.asarray(L.contrast(rows[0], rows[1], k, alpha))
    for row, other, out in zip(*rows, got, strict=True):
        expected = reference_contrast(row.astype(float), other.astype(float), k, alpha)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_guidance_of_weight_one_changes_no_bit():
    free = settings(temperature=1.0, top_p=0.9)
    none = run_sample(tiny, free)
    one = run_sample(tiny, settings(temperature=1.0, top_p=0.9, guidance=1.0))
    for a, b in zip(none, one, strict=True):
        np.testing.assert_array_equal(a, b)
    rows = jax.random.normal(KEY, (2, 8, 33))
    np.testing.assert_array_equal(L.guide(rows[0], rows[1], 1.0), rows[0])
    np.testing.assert_allclose(L.guide(rows[0], rows[1], 0.0), rows[1], atol=1e-6)


def test_a_shared_prefix_changes_no_sample():
    free = settings(temperature=1.0)
    apart = run_sample(tiny, free, prefix=False)
    for rows in (slice(None), slice(1, 2)):
        shared = run_sample(tiny, free, rows=rows)
        np.testing.assert_array_equal(shared.tokens, apart.tokens[rows])
        np.testing.assert_allclose(shared.log_probs, apart.log_probs[rows], atol=1e-5)


def test_guidance_settings_do_not_recompile():
    run_sample(tiny, settings(guidance=3.0))
    sizes = decoding.decode_steps._cache_size(), decoding.read_prompts._cache_size()
    for changes in (
        {"guidance": 0.5, "temperature": 1.0},
        {"contrastive_k": 2, "contrastive_alpha": 0.9, "top_p": 0.5},
    ):
        run_sample(tiny, settings(**changes))
        run_sample(tiny, settings(**changes), drop_documents=True)
    assert sizes == (
        decoding.decode_steps._cache_size(),
        decoding.read_prompts._cache_size(),
    )


def test_the_keys_and_values_of_a_prefix_are_held_once():
    """10 samples in two streams share one copy of the documents."""
    model, params = make_model(tiny)
    first, _, prefixes, _ = make_prompts()
    rows = decoding.Rows(
        jnp.zeros((2, 8), jnp.int32),
        jnp.array([4, 2]),
        jnp.asarray(pad(first[:1])[0]),
        jnp.asarray(prefixes[:1]),
        jnp.array([prefixes[0]] * 2),
    )
    cache, logits = decoding.read_prompts(model, 10, 6, None, params, rows)
    assert cache.prefix.layers[0].k.shape[0] == 1
    assert cache.layers[0].k.shape[0] == len(logits) == 20
    assert cache.prefix.visible.tolist() == [prefixes[0]] * 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": -1.0}, "guidance must be .* got -1.0"),
        ({"contrastive_k": -1}, "contrastive_k must be .* got -1"),
        (
            {"contrastive_k": 2, "contrastive_alpha": 0.0},
            "contrastive_alpha .* got 0.0",
        ),
        ({"contrastive_k": 2, "guidance": 2.0}, "both compare .* use one of them"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_invalid_second_prompts_are_refused():
    model, params = make_model(tiny)
    first, second, prefixes, _ = make_prompts()
    guided = settings(guidance=2.0)
    call = functools.partial(sample, model, params, *pad(first), IMAGE, guided, KEY)
    with pytest.raises(ValueError, match="this call has none"):
        call()
    wrong = Unconditional(*pad(second), np.array(prefixes))
    wrong.tokens[:, 1] += 1
    with pytest.raises(ValueError, match="prompt 0 does not begin with the 11 tokens"):
        call(prefix_lengths=np.array(prefixes), unconditional=wrong)
    with pytest.raises(ValueError, match="at least one token after its prefix"):
        sample(
            model,
            params,
            *pad(first),
            IMAGE,
            settings(),
            KEY,
            prefix_lengths=np.array([len(p) for p in first]),
        )
