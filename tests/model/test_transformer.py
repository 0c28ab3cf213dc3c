"""Equivalences of the Transformer: cached = full, scanned = unrolled, remat = none."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax.model.cache import Prefix, make_cache
from racm3_jax.model.config import tiny, tiny_chameleon
from racm3_jax.model.transformer import (
    Transformer,
    abstract_params,
    compute_logits,
    fit_image_positions,
    head_weights,
    init_params,
    prepare_decoding,
    stack_layers,
    unstack_layers,
)

STYLES = [tiny, tiny_chameleon]
# Half of the tokens are codes.
WITH_PLACES = functools.partial(
    tiny, image_positions=True, image_length=4, first_code=16, num_codes=32
)
LENGTH = 24
TOKENS = jax.random.randint(jax.random.key(7), (3, LENGTH), 0, 64)
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)
SEGMENTS = jnp.ones_like(TOKENS)


# These tests compare formulas: compiling them cheaply is half their time.
CHEAP = {"xla_backend_optimization_level": 0}


def make_params(config):
    """Large random weights everywhere, so that biases and scales matter as well."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
        nn.unbox(abstract_params(config)),
    )


@functools.partial(jax.jit, static_argnums=(0,))
def compute(config, params, tokens=TOKENS, positions=POSITIONS, segments=SEGMENTS):
    hidden = Transformer(config).apply({"params": params}, tokens, positions, segments)
    return compute_logits(params, config, hidden)


def assert_close(actual, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance),
        actual,
        expected,
    )


@functools.partial(jax.jit, static_argnums=(0,), compiler_options=CHEAP)
def loss_and_gradient(config, params):
    def loss(params):
        return jnp.sin(compute(config, params)).mean()

    return jax.value_and_grad(loss)(params)


@functools.partial(
    jax.jit, static_argnums=(0, 3), static_argnames="max_length", compiler_options=CHEAP
)
def run(config, params, inputs, method, *rest, max_length=None):
    rest = rest if max_length is None else (*rest, max_length)
    return Transformer(config).apply({"params": params}, inputs, *rest, method=method)


@pytest.mark.parametrize(
    ("style", "scan"), [(tiny, False), (tiny_chameleon, True), (WITH_PLACES, False)]
)
def test_cached_decode_equals_full_forward(style, scan):
    """Prompts of 5, 9 and 12 tokens, read by prefill, extend and decode."""
    config = style(scan_layers=scan)
    params = make_params(config)
    full, rows = compute(config, params), jnp.arange(3)
    lengths = jnp.asarray([5, 9, 12])
    logits, cache = run(
        config, params, TOKENS[:, :12], "prefill", lengths, max_length=LENGTH
    )
    assert_close(logits, full[rows, lengths - 1])
    more = jnp.asarray([2, 1, 3])
    chunk = TOKENS[rows[:, None], lengths[:, None] + jnp.arange(3)]
    logits, cache = run(config, params, chunk, "extend", more, cache)
    lengths += more
    assert_close(logits, full[rows, lengths - 1])
    for _ in range(6):
        logits, cache = run(config, params, TOKENS[rows, lengths], "decode", cache)
        assert_close(logits, full[rows, lengths])
        lengths += 1
    np.testing.assert_array_equal(cache.length, lengths)


def test_codes_are_at_the_same_place_of_every_image():
    """Two images of equal codes, after texts of 1 and 3 tokens."""
    config = WITH_PLACES()
    params = make_params(config)
    tokens = jnp.asarray([[1, 20, 21, 22, 2, 3, 4, 20, 21, 22]])
    model = Transformer(config).bind({"params": params})
    codes = model._count_codes(tokens)
    x, _ = model._embed(tokens, jnp.zeros_like(tokens), codes)
    assert codes[0].tolist() == [0, 1, 2, 3, 0, 0, 0, 1, 2, 3]
    np.testing.assert_array_equal(x[0, 1:4], x[0, 7:10])
    plain = params["embedding"][tokens[0]] + params["position_embedding"][0]
    added = np.stack(x[0] - plain)
    np.testing.assert_allclose(added[[0, 4, 5, 6]], 0, atol=1e-6)
    table = params["image_position_embedding"]
    np.testing.assert_allclose(added[1:4], table[:3], atol=1e-6)


def test_codes_after_a_shared_prefix_have_their_places():
    config = WITH_PLACES()
    params = make_params(config)
    tokens = jnp.asarray([[1, 20, 21, 2, 3, 22, 23], [1, 20, 21, 2, 24, 25, 26]])
    positions = jnp.broadcast_to(jnp.arange(7), tokens.shape)
    full = compute(config, params, tokens, positions, jnp.ones_like(tokens))
    one = jnp.asarray([4])
    _, read = run(config, params, tokens[:1, :4], "prefill", one, max_length=4)
    prefix = Prefix(read.layers, jnp.asarray([4, 4]))
    logits, cache = run(
        config,
        params,
        tokens[:, 4:6],
        "prefill_after",
        jnp.asarray([2, 2]),
        prefix,
        max_length=4,
    )
    assert_close(logits, full[:, 5])
    logits, _ = run(config, params, tokens[:, 6], "decode", cache)
    assert_close(logits, full[:, 6])


def test_places_of_larger_images_are_interpolated():
    """2 x 2 codes to 4 x 4: rows of the table 0 1 / 2 3 in its first column."""
    config = WITH_PLACES(image_length=16)
    table = jnp.zeros((4, config.d_model)).at[:, 0].set(jnp.arange(4.0))
    larger = fit_image_positions({"image_position_embedding": table}, config)
    grid = np.asarray(larger["image_position_embedding"][:, 0]).reshape(4, 4)
    np.testing.assert_allclose(grid[0], [0, 0.25, 0.75, 1], atol=1e-6)
    np.testing.assert_allclose(grid[:, 0], [0, 0.5, 1.5, 2], atol=1e-6)
    none = fit_image_positions({}, config)["image_position_embedding"]
    assert none.shape == (16, config.d_model)
    assert not none.any()
    assert fit_image_positions({}, tiny()) == {}
    with pytest.raises(ValueError, match="positions for images of 3 codes, and 16"):
        fit_image_positions({"image_position_embedding": table[:3]}, config)


def test_a_window_of_codes_is_read_as_one_by_one():
    """Of three tokens two are accepted: the next one continues the image."""
    config = WITH_PLACES()
    params = make_params(config)
    tokens = jnp.asarray([[1, 20, 21, 22, 2, 23], [1, 2, 20, 21, 22, 23]])
    lengths = jnp.asarray([2, 2])
    positions = jnp.broadcast_to(jnp.arange(6), tokens.shape)
    full = compute(config, params, tokens, positions, jnp.ones_like(tokens))
    _, cache = run(config, params, tokens[:, :2], "prefill", lengths, max_length=8)
    window = tokens[:, 2:5].at[:, 2].set(40)  # the last guess is wrong
    logits, cache = run(config, params, window, "decode_window", cache)
    assert_close(logits[:, :2], full[:, 2:4])
    cache = cache.advance(jnp.asarray([2, 2]))
    for place in (4, 5):
        logits, cache = run(config, params, tokens[:, place], "decode", cache)
        assert_close(logits, full[:, place])


def test_a_prefix_is_read_once_and_repeated():
    config = tiny()
    params = make_params(config)
    tokens = jnp.where(POSITIONS < 8, TOKENS[:1], TOKENS)
    lengths = jnp.asarray([8])
    full = compute(config, params, tokens)
    _, cache = run(
        config, params, tokens[:1, :8], "prefill", lengths, max_length=LENGTH
    )
    cache = cache.repeat(3)
    for i in (8, 9):
        logits, cache = run(config, params, tokens[:, i], "decode", cache)
        assert_close(logits, full[:, i])


@pytest.mark.parametrize("style", STYLES)
def test_scanned_equals_unrolled(style):
    scanned, unrolled = style(scan_layers=True), style()
    params = make_params(scanned)
    loss, gradient = loss_and_gradient(scanned, params)
    expected = loss_and_gradient(unrolled, unstack_layers(params))
    assert_close((loss, unstack_layers(gradient)), expected)
    restored = stack_layers(unstack_layers(params))
    jax.tree.map(np.testing.assert_array_equal, restored, params)


@pytest.mark.parametrize(
    ("remat", "scan"), [("full", True), ("dots", False), ("dots", True)]
)
def test_remat_changes_nothing(remat, scan):
    config = tiny(scan_layers=scan)
    params = make_params(config)
    recomputing = dataclasses.replace(config, remat=remat)
    assert_close(
        loss_and_gradient(recomputing, params), loss_and_gradient(config, params)
    )


def kept_bytes(config):
    """Bytes that the forward pass keeps for the backward pass."""
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    plain = dataclasses.replace(config, compute_dtype="float32", remat="none")
    params = nn.unbox(abstract_params(plain))

    def backward(params, ids):
        def hidden(params):
            return Transformer(config).apply({"params": params}, ids, ids, ids)

        return jax.vjp(hidden, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, params, ids))
    return sum(x.size * x.dtype.itemsize for x in kept)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dots_keeps_only_the_products(style, scan, dtype):
    c = style(compute_dtype=dtype, scan_layers=scan, attention="plain")
    full, dots, none = (
        kept_bytes(dataclasses.replace(c, remat=remat))
        for remat in ("full", "dots", "none")
    )
    size = 2 if dtype == "bfloat16" else 4
    keys = (c.num_heads + c.kv_heads) * c.head_dim
    gates = 2 if c.activation == "swiglu" else 1
    # Queries and keys whose norm has a gradient are kept as they were before it.
    token = keys * (4 if c.qk_norm else size)
    token += size * (c.kv_heads * c.head_dim + gates * c.d_ff) + 4 * c.d_model
    # Biases are read again only where the product is computed again.
    biases = keys + c.kv_heads * c.head_dim + c.d_ff + c.d_model if c.use_bias else 0
    assert dots - full == c.num_layers * (2 * 16 * token - 4 * biases)
    assert dots < none


@pytest.mark.parametrize("style", STYLES)
def test_blocked_equals_plain(style):
    config = style()
    params = make_params(config)
    blocked = style(attention="blocked")
    assert_close(loss_and_gradient(blocked, params), loss_and_gradient(config, params))


@pytest.mark.parametrize(
    ("style", "implementation"),
    [(tiny, "plain"), (tiny, "blocked"), (tiny_chameleon, "blocked")],
)
def test_packed_examples_do_not_influence_each_other(style, implementation):
    """One row of three examples and padding; the second one is replaced."""
    config = style(attention=implementation)
    params = make_params(config)
    segments = jnp.repeat(jnp.asarray([1, 2, 3, 0]), jnp.asarray([7, 8, 6, 3]))[None]
    positions = jnp.concatenate([jnp.arange(n) for n in (7, 8, 6, 3)])[None]
    second = np.asarray(segments[0] == 2)
    tokens = TOKENS[:1]
    other = jnp.where(segments == 2, (tokens + 17) % 64, tokens)

    logits, changed = (
        compute(config, params, ids, positions, segments) for ids in (tokens, other)
    )
    np.testing.assert_array_equal(logits[:, ~second], changed[:, ~second])
    assert not np.array_equal(logits[:, second], changed[:, second])

    # The gradient of the neighbours' logits with respect to each position's input.
    model = Transformer(config)

    @jax.jit
    def gradient(table):
        def loss(table):
            # Every position has its own row of the table.
            own = {**params, "embedding": table}
            ids = jnp.arange(LENGTH)[None]
            hidden = model.apply({"params": own}, ids, positions, segments)
            return jnp.where(second[None, :, None], 0.0, jnp.sin(hidden)).sum()

        return jax.grad(loss)(table)

    by_position = gradient(params["embedding"])[:LENGTH]
    assert not np.any(by_position[second])
    assert np.all(np.any(by_position[~second], axis=-1))


def test_a_single_example_equals_itself_packed():
    config = tiny()
    params = make_params(config)
    segments = jnp.asarray([[1] * 10 + [2] * 14])
    positions = jnp.concatenate([jnp.arange(10), jnp.arange(14)])[None]
    packed = compute(config, params, TOKENS[:1], positions, segments)
    alone = compute(
        config, params, TOKENS[:1, 10:], positions[:, 10:], segments[:, 10:]
    )
    assert_close(packed[:, 10:], alone)


@pytest.mark.parametrize("style", STYLES)
def test_bfloat16_training_is_close_to_float32(style):
    params = make_params(style())
    near = style(compute_dtype="bfloat16")
    hidden = jax.eval_shape(
        Transformer(near).apply, {"params": params}, TOKENS, POSITIONS, SEGMENTS
    )
    assert hidden.dtype == jnp.bfloat16
    _, gradient = loss_and_gradient(near, params)
    _, exact = loss_and_gradient(style(), params)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(a - b) <= 0.05 * np.linalg.norm(b) + 1e-4


@pytest.mark.parametrize("style", STYLES)
def test_prepared_for_decoding_is_the_same_model(style):
    config = style(scan_layers=True, remat="full")
    params = make_params(config)
    prepared, unrolled = prepare_decoding(config, params)
    assert not prepared.scan_layers
    assert_close(compute(prepared, unrolled), compute(config, params))


def test_dropout_needs_a_key():
    config = tiny(dropout=0.5)
    params = make_params(config)
    assert_close(compute(config, params), compute(tiny(), params), 0)

    @jax.jit
    def dropped(key):
        arguments = (TOKENS, POSITIONS, SEGMENTS)
        rngs = {"dropout": key}
        return Transformer(config).apply({"params": params}, *arguments, rngs=rngs)

    first, again, other = (dropped(jax.random.key(i)) for i in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_every_parameter_names_every_axis(style, scan):
    boxed = abstract_params(style(scan_layers=scan))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    assert any("layers" in leaf.names for leaf in leaves) == scan
    for leaf in leaves:
        assert None not in leaf.names
        assert len(leaf.names) == len(leaf.value.shape)


def test_fresh_parameters_predict_little_and_keep_tokens_in_the_hidden_states():
    config = tiny()
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, make_params(config)
    )
    log_probs = jax.nn.log_softmax(compute(config, params))
    # Of a random target: logits of about one unit.
    assert -log_probs.mean() < np.log(64) + 1.0
    for width in (32, 512):
        wide = dataclasses.replace(config, d_model=width)
        fresh = jax.jit(lambda key, c=wide: init_params(c, key)["embedding"])
        size = np.sqrt(np.mean(np.square(fresh(jax.random.key(0)))))
        np.testing.assert_allclose(size, width**-0.5, rtol=0.1)


def test_head_weights_are_the_matrix_of_the_logits():
    for style in STYLES:
        config = style()
        params = make_params(config)
        assert head_weights(params, config).shape == (32, 64)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="exceeds the model's max_length=64"):
        make_cache(tiny(), 1, 65)
    lengths, params = jnp.full(3, 24), make_params(tiny())
    for max_length in (8, 65):
        with pytest.raises(ValueError, match="does not fit: the prompts have 24"):
            run(tiny(), params, TOKENS, "prefill", lengths, max_length=max_length)
