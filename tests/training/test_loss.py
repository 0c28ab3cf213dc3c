from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from racm3_jax import sharding
from racm3_jax.training.collectives import find_collectives
from racm3_jax.training.loss import GeneratorLossConfig, chunked_cross_entropy

BATCH, LENGTH, D_MODEL, VOCAB = 3, 11, 8, 40


@pytest.fixture(scope="module")
def inputs():
    hidden, head, targets, weights = make_inputs(0, BATCH, LENGTH, D_MODEL, VOCAB)
    return hidden, head, targets, weights.at[:, -3:].set(0.0)


def make_inputs(seed, rows, length, d_model, vocab):
    rng = np.random.default_rng(seed)
    arrays = (
        rng.standard_normal((rows, length, d_model)),
        rng.standard_normal((d_model, vocab)),
        rng.integers(0, vocab, (rows, length)),
        rng.random((rows, length)),
    )
    dtypes = (np.float32, np.float32, np.int32, np.float32)
    return [jnp.asarray(x.astype(t)) for x, t in zip(arrays, dtypes, strict=True)]


def plain_cross_entropy(hidden, head, targets, weights, z_loss):
    logits = hidden @ head
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = log_partition - chosen
    return (weights * (nll + z_loss * log_partition**2)).sum(), nll


def differentiate(function, *inputs):
    """The value of `function`, which has an aux, and its gradients."""
    numbers = tuple(range(len(inputs)))
    return jax.jit(jax.value_and_grad(function, numbers, has_aux=True))(*inputs)


@pytest.mark.parametrize(("chunk_length", "z_loss"), [(0, 0.1), (4, 0.0), (4, 0.1)])
def test_equals_plain(inputs, chunk_length, z_loss):
    hidden, head, targets, weights = inputs

    def chunked(hidden, head):
        losses = chunked_cross_entropy(
            hidden, head, targets, weights, chunk_length=chunk_length, z_loss=z_loss
        )
        return 3.0 * losses.total, losses.nll

    def plain(hidden, head):
        total, nll = plain_cross_entropy(hidden, head, targets, weights, z_loss)
        return 3.0 * total, nll

    got, got_gradients = differentiate(chunked, hidden, head)
    want, want_gradients = differentiate(plain, hidden, head)
    without_gradient = jax.jit(chunked)(hidden, head)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)
    np.testing.assert_array_equal(without_gradient[0], got[0])


@pytest.mark.parametrize(
    "shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 2, 2), (1, 2, 4)]
)
def test_every_mesh_computes_the_same(shape):
    """And gathers the head and reduces its gradient once per step, not once per chunk."""
    hidden, head, targets, weights = make_inputs(1, 8, 12, 16, 640)

    def total(hidden, head, targets, weights):
        losses = chunked_cross_entropy(
            hidden, head, targets, weights, chunk_length=5, z_loss=0.1
        )
        return losses.total / weights.sum(), losses

    both = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    arrays = hidden, head, targets, weights
    want = both(*arrays)
    mesh = sharding.make_mesh(*shape)
    rows = sharding.batch_sharding(mesh)
    spec = sharding.partition_spec("head", ("embed", "vocab"), head.shape, mesh)
    places = rows, NamedSharding(mesh, spec), rows, rows
    with jax.set_mesh(mesh):
        arrays = jax.device_put(arrays, places)
        got = both(*arrays)
        without_gradient = jax.jit(total)(*arrays)
        program = both.lower(*arrays).compile().as_text()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(without_gradient[1], got[0][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    size = head.size * head.itemsize // shape[2]
    moved = [c for c in find_collectives(program) if c.whole_bytes >= size]
    assert all(c.trips == 1 for c in moved), moved
    assert bool(moved) == (shape[0] * shape[1] > 1)


def test_correct_counts_the_argmax(inputs):
    hidden, head, _, weights = inputs
    best = jnp.argmax(hidden @ head, axis=-1)
    compute = jax.jit(chunked_cross_entropy, static_argnames="chunk_length")
    right = compute(hidden, head, best, weights, chunk_length=4)
    wrong = compute(hidden, head, (best + 1) % VOCAB, weights, chunk_length=4)
    assert right.correct.all()
    assert not wrong.correct.any()


def test_bfloat16_keeps_float32_sums_and_head_gradient(inputs):
    hidden, head, targets, weights = inputs
    narrow = hidden.astype(jnp.bfloat16)

    def total(head):
        return chunked_cross_entropy(narrow, head, targets, weights).total

    value, gradient = jax.jit(jax.value_and_grad(total))(head)
    want, _ = plain_cross_entropy(hidden, head, targets, weights, 0.0)
    assert value.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(value, want, rtol=0.02)


def test_targets_of_weight_0_have_no_gradient(inputs):
    hidden, head, targets, weights = inputs

    @jax.jit
    @jax.grad
    def compute_gradient(hidden):
        return chunked_cross_entropy(
            hidden, head, targets, weights, chunk_length=4, z_loss=0.1
        ).total

    gradient = compute_gradient(hidden)
    assert not gradient[:, -3:].any()
    assert gradient[:, :-3].any()


def test_metrics_by_modality_and_origin(toy):
    """One row: targets t1 t2 i0 i1 of the main document, t3 retrieved, one padding."""
    vocab = toy.vocab
    batch = toy.make_batch(np.random.default_rng(0), rows=1)
    image = vocab.image_range.start
    targets = np.zeros((1, 12), np.int32)
    targets[0, :6] = [1, 2, image, image + 1, 3, vocab.pad]
    weights = np.zeros((1, 12), np.float32)
    weights[0, :6] = [1, 1, 1, 1, 0.1, 0]
    main = np.zeros((1, 12), bool)
    main[0, :4] = True
    filled = (np.arange(12) < 9).astype(np.int32)[None]
    batch = batch._replace(
        targets=jnp.asarray(targets),
        loss_weights=jnp.asarray(weights),
        is_main=jnp.asarray(main),
        segment_ids=jnp.asarray(filled),
    )
    params = toy.make_trainer()[0].params
    loss_fn = jax.jit(toy.loss_fn_with(GeneratorLossConfig()))
    loss, metrics = loss_fn(params, batch, None, None)
    counts = {name: float(weight) for name, (_, weight) in metrics.items()}
    assert counts["main_loss"] == 4
    assert counts["text_loss"] == counts["text_accuracy"] == 2
    assert counts["image_loss"] == counts["image_accuracy"] == 2
    assert counts["retrieved_loss"] == 1
    assert counts["loss"] == pytest.approx(4.1)
    assert metrics["tokens"] == (9, 1)
    total, weight = metrics["loss"]
    np.testing.assert_allclose(loss, total / weight, rtol=1e-6)
    parts = metrics["main_loss"][0] + 0.1 * metrics["retrieved_loss"][0]
    np.testing.assert_allclose(total, parts, rtol=1e-6)


def test_negative_settings_are_refused():
    with pytest.raises(ValueError, match="must be >= 0"):
        GeneratorLossConfig(z_loss=-1.0)
