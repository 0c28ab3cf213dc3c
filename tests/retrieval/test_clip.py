"""CLIP's towers, their inputs, and the losses."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from racm3_jax import sharding
from racm3_jax.retrieval import clip as clip_lib
from racm3_jax.retrieval import clip_layers
from racm3_jax.retrieval import clip_loss as loss_lib
from racm3_jax.retrieval.clip import CLIP, CLIPConfig, CLIPTokenizer
from racm3_jax.retrieval.clip_loss import CLIPLossConfig

SMALL = CLIPConfig(
    vocab_size=34,
    image_size=8,
    patch_size=4,
    vision_width=16,
    vision_layers=1,
    vision_heads=2,
    text_width=16,
    text_layers=1,
    text_heads=2,
    context_length=9,
    d_embed=8,
)
VIT_L_14 = CLIPConfig(
    vocab_size=49408,
    image_size=224,
    patch_size=14,
    vision_width=1024,
    vision_layers=24,
    vision_heads=16,
    text_width=768,
    text_layers=12,
    text_heads=12,
    context_length=77,
    d_embed=768,
)


class Letters:
    """A text tokenizer of the letters a, b, c, ..."""

    vocab_size = 32

    def encode_batch(self, texts, max_length=None):
        return [
            np.array([ord(c) - ord("a") for c in text[:max_length]], np.int32)
            for text in texts
        ]


@pytest.fixture(scope="module")
def params():
    init = jax.jit(clip_lib.init_params, static_argnums=0)
    return nn.unbox(init(SMALL, jax.random.key(0)))


@jax.jit
def encode_text(params, rows):
    return CLIP(SMALL).apply({"params": params}, rows, method=CLIP.encode_text)


def test_vit_l_14_has_the_published_number_of_parameters_and_can_be_sharded():
    boxed = jax.eval_shape(
        lambda key: clip_lib.init_params(VIT_L_14, key), jax.random.key(0)
    )
    sizes = [leaf.size for leaf in jax.tree.leaves(nn.unbox(boxed))]
    assert sum(sizes) == 427_616_513  # of OpenAI's ViT-L/14
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    placed = sharding.shardings_for(boxed, mesh)
    assert len(jax.tree.leaves(placed)) == len(sizes)


def test_every_matrix_names_its_axes():
    boxed = jax.eval_shape(
        lambda key: clip_lib.init_params(SMALL, key), jax.random.key(0)
    )
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    assert all(isinstance(leaf, nn.Partitioned) for leaf in leaves)
    assert all(len(leaf.names) == leaf.value.ndim for leaf in leaves)


def test_cut_patches_is_the_diagram():
    image = np.array([list("abcd"), list("efgh"), list("ijkl"), list("mnop")])
    numbers = np.vectorize(ord)(image)[None, :, :, None]
    patches = np.vectorize(chr)(clip_lib.cut_patches(jnp.asarray(numbers), 2))
    assert ["".join(p) for p in patches[0]] == ["abef", "cdgh", "ijmn", "klop"]


def test_tokenizer_rows():
    tokenizer = CLIPTokenizer(Letters(), 6)
    rows = tokenizer.encode_batch(["abc", "", "abcdefgh"])
    np.testing.assert_array_equal(
        rows, [[32, 0, 1, 2, 33, 0], [32, 33, 0, 0, 0, 0], [32, 0, 1, 2, 3, 33]]
    )
    assert rows.dtype == np.int32
    assert tokenizer.vocab_size == 34


def test_dropped_tokens_keep_their_order_and_their_fraction():
    rng = np.random.default_rng(0)
    ids = np.arange(10, dtype=np.int32)
    for _ in range(20):
        kept = clip_lib.drop_tokens(ids, 0.2, rng)
        assert len(kept) == 8
        assert (np.diff(kept) > 0).all()
    assert len(clip_lib.drop_tokens(ids[:1], 0.9, rng)) == 1
    assert len(clip_lib.drop_tokens(ids[:0], 0.5, rng)) == 0
    with pytest.raises(ValueError, match="needs an rng"):
        clip_lib.drop_tokens(ids, 0.2, None)
    with pytest.raises(ValueError, match=r"\[0, 1\); got 1"):
        clip_lib.drop_tokens(ids, 1.0, rng)


def test_text_ignores_what_follows_its_end(params):
    rows = CLIPTokenizer(Letters(), 9).encode_batch(["abc", "abd"])
    changed = rows.copy()
    changed[:, 5:] = 7
    same = encode_text(params, rows)
    np.testing.assert_array_equal(same, encode_text(params, changed))
    np.testing.assert_allclose(same, encode_text(params, rows[:, :5]), atol=1e-6)
    assert np.abs(same[0] - same[1]).max() > 1e-3


def test_too_long_rows_are_refused(params):
    with pytest.raises(ValueError, match="longer than clip.context_length 9"):
        encode_text(params, np.zeros((1, 10), np.int32))


def test_keeping_all_patches_changes_nothing_and_dropped_ones_are_not_read(params):
    @jax.jit
    def encode(images, kept=None):
        return CLIP(SMALL).apply(
            {"params": params}, images, kept, method=CLIP.encode_image
        )

    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    everything = jnp.tile(jnp.arange(4), (2, 1))
    np.testing.assert_allclose(
        encode(images), encode(images, everything), rtol=1e-6, atol=1e-6
    )
    without_last = everything[:, :3]
    changed = images.at[:, 4:, 4:].set(0)
    np.testing.assert_array_equal(
        encode(images, without_last), encode(changed, without_last)
    )
    assert np.abs(encode(images) - encode(changed)).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "image_size 8 is not a multiple of clip.patch_size 5"),
        ({"text_heads": 3}, "text_width 16 is not a multiple of clip.text_heads 3"),
        ({"activation": "relu"}, "allowed: gelu, quick_gelu"),
        ({"context_length": 2}, "must be >= 3"),
    ],
)
def test_wrong_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_info_nce_is_the_textbook_formula():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 5, 8)).astype(np.float32)
    logits = 3.0 * q @ k.T
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    log_p_back = logits - np.log(np.exp(logits).sum(0, keepdims=True))
    expected = -(np.diag(log_p) + np.diag(log_p_back)).mean() / 2
    loss, accuracy = jax.jit(loss_lib.info_nce)(q, k, 3.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(accuracy, (logits.argmax(1) == np.arange(5)).mean())


def test_similar_pairs_are_not_pulled_closer():
    unit = jnp.eye(2, 3)
    tilted = unit.at[:, 2].set(1.0) / jnp.sqrt(2.0)

    @functools.partial(jax.jit, static_argnums=0)
    def pull(max_similarity):
        return jax.grad(lambda q: loss_lib.info_nce(q, tilted, 5.0, max_similarity)[0])(
            unit
        )

    assert (jnp.diagonal(pull(0.8)) < 0).all()
    assert (jnp.diagonal(pull(0.6)) == 0).all()


def test_dropping_on_device_closes_the_gaps():
    rows = CLIPTokenizer(Letters(), 9).encode_batch(["abcdef", "", "ab"])
    drop = jax.jit(loss_lib.drop_tokens_on_device, static_argnums=(1, 2))
    dropped = np.asarray(drop(jnp.asarray(rows), 0.5, 33, jax.random.key(3)))
    assert not np.array_equal(rows, dropped)
    for row, full in zip(dropped, rows, strict=True):
        end = row.argmax()
        assert row[0] == 32
        assert row[end] == 33
        assert (row[end + 1 :] == 0).all()
        kept = list(row[1:end])
        assert kept == [t for t in full[1 : full.argmax()] if t in kept]


def test_kept_patches_are_distinct_and_ascending():
    sample = jax.jit(loss_lib.sample_kept_patches, static_argnums=(0, 1, 2))
    kept = np.asarray(sample(6, 10, 0.2, jax.random.key(0)))
    assert kept.shape == (6, 8)
    assert (np.diff(kept, axis=1) > 0).all()
    assert loss_lib.sample_kept_patches(6, 10, 0.0, jax.random.key(0)) is None


def make_data(num_groups=8, per_group=3):
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(num_groups), per_group)
    images = np.repeat(
        rng.integers(0, 256, (num_groups, 8, 8, 3)), per_group, axis=0
    ).astype(np.uint8)
    texts = [chr(ord("a") + g) * 2 + chr(ord("k") + i) for i, g in enumerate(groups)]
    tokens = CLIPTokenizer(Letters(), 9).encode_batch([t[:3] for t in texts])
    return images, tokens, groups


def test_pairs_share_their_group_and_a_batch_has_no_group_twice():
    images, tokens, groups = make_data()
    make = lambda **more: loss_lib.make_pair_batches(
        images, tokens, groups, num_pairs=4, seed=5, **more
    )
    group_of = {row.tobytes(): g for row, g in zip(tokens[:, :5], groups, strict=True)}
    batches = list(make(num_steps=4))
    for batch in batches:
        a = [group_of[row.tobytes()] for row in batch["tokens_a"]]
        b = [group_of[row.tobytes()] for row in batch["tokens_b"]]
        assert a == b
        assert len(set(a)) == 4
        assert (batch["tokens_a"] != batch["tokens_b"]).any(axis=1).all()
    epoch = [group_of[r.tobytes()] for batch in batches[:2] for r in batch["tokens_a"]]
    assert sorted(epoch) == list(range(8))
    for ours, resumed in zip(batches[2:], make(start_step=2, num_steps=4), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, resumed)


def test_a_single_document_is_paired_with_itself_and_too_many_pairs_are_refused():
    images, tokens, groups = make_data(per_group=1)
    batch = next(
        loss_lib.make_pair_batches(images, tokens, groups, num_pairs=8, seed=0)
    )
    np.testing.assert_array_equal(batch["images_a"], batch["images_b"])
    with pytest.raises(ValueError, match="num_pairs is 9, but the documents form 8"):
        next(loss_lib.make_pair_batches(images, tokens, groups, num_pairs=9, seed=0))


def test_training_finds_the_group(params):
    images, tokens, groups = make_data()
    loss_fn = loss_lib.clip_loss(SMALL, CLIPLossConfig(query_drop=0.0))

    @jax.jit
    def step(params, batch, key):
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, batch, key, jnp.int32(0)
        )
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, grads), metrics

    losses = []
    for i, batch in enumerate(
        loss_lib.make_pair_batches(
            images, tokens, groups, num_pairs=8, seed=0, num_steps=40
        )
    ):
        params, metrics = step(params, batch, jax.random.key(i))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.5 * losses[0]
    assert set(metrics) >= {"contrast_loss", "text_query_accuracy"}


def test_the_loss_is_the_weighted_sum_of_its_terms(params):
    config = CLIPLossConfig(
        contrast_weight=0.3, retrieval_weight=0.7, image_weight=1.9, separation_weight=2
    )
    loss_fn = loss_lib.clip_loss(SMALL, config)
    batch = next(loss_lib.make_pair_batches(*make_data(), num_pairs=8, seed=0))
    loss, metrics = jax.jit(loss_fn)(params, batch, jax.random.key(0), jnp.int32(0))
    value = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    expected = (
        0.3 * value["contrast_loss"]
        + 0.7 * (value["text_query_loss"] + value["image_query_loss"]) / 2
        + 1.9 * value["image_loss"]
        + 2 * value["across_similarity"] ** 2
    )
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)


@pytest.mark.parametrize("dims", [0, 3])
def test_one_part_of_an_embedding_is_aligned_and_the_other_separated(params, dims):
    config = CLIPLossConfig(query_drop=0.0)
    clip = dataclasses.replace(SMALL, aligned_dims=dims)
    batch = next(loss_lib.make_pair_batches(*make_data(), num_pairs=8, seed=0))
    metrics = loss_lib.clip_loss(clip, config)(
        params, batch, jax.random.key(0), jnp.int32(0)
    )[1]
    value = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    model, vectors = CLIP(SMALL), {}
    for side in "ab":
        pixels = loss_lib.normalise_images(batch[f"images_{side}"], SMALL)
        for kind, inputs in (("image", pixels), ("text", batch[f"tokens_{side}"])):
            method = getattr(CLIP, f"encode_{kind}")
            found = np.asarray(model.apply({"params": params}, inputs, method=method))
            vectors[kind, side] = found / np.linalg.norm(found, axis=1, keepdims=True)
    image, text = (vectors[kind, "b"][:, : dims or None] for kind in ("image", "text"))
    cosines = (image @ text.T) / np.outer(
        np.linalg.norm(image, axis=1), np.linalg.norm(text, axis=1)
    )
    logits = cosines * float(np.exp(params["logit_scale"]))
    lost = [
        (np.log(np.exp(rows).sum(1)) - np.diag(rows)).mean()
        for rows in (logits, logits.T)
    ]
    np.testing.assert_allclose(value["contrast_loss"], np.mean(lost), rtol=1e-4)
    across = [
        vectors["text", "a"][:, dims:] @ vectors["image", "b"][:, dims:].T,
        vectors["image", "a"][:, dims:] @ vectors["text", "b"][:, dims:].T,
    ]
    np.testing.assert_allclose(
        value["across_similarity"], np.square(across).mean() ** 0.5, rtol=1e-4
    )


def test_a_zero_embedding_has_a_finite_gradient():
    grad = jax.grad(lambda x: loss_lib.normalise(x).sum())(jnp.zeros((1, 4)))
    assert np.isfinite(grad).all()


def test_wrong_loss_settings_are_refused():
    with pytest.raises(ValueError, match="retrieval_temperature must be > 0; got 0"):
        CLIPLossConfig(retrieval_temperature=0)
    with pytest.raises(ValueError, match=r"query_drop must be in \[0, 1\); got 1"):
        CLIPLossConfig(query_drop=1)
    for dims in (-1, SMALL.d_embed):
        with pytest.raises(ValueError, match=r"clip.aligned_dims must be in 0\.\."):
            dataclasses.replace(SMALL, aligned_dims=dims)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_head_by_head_is_attention(causal):
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 2, 6, 2, 4)).astype(np.float32)
    may_attend = np.tril(np.ones((6, 6), bool)) if causal else None
    np.testing.assert_allclose(
        clip_layers.attend_head_by_head(query, key, value, may_attend),
        clip_layers.attend(query, key, value, may_attend),
        atol=1e-6,
    )


@pytest.mark.parametrize("longest_at_once", [1, 99])
def test_a_layer_whose_first_position_is_read(monkeypatch, longest_at_once):
    """The same row, whichever other rows are left out, in both forms of attention."""
    monkeypatch.setattr(clip_layers, "_HEAD_BY_HEAD_LENGTH", longest_at_once)
    layer = clip_layers.Layer(2, 1, "gelu", "float32")
    x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
    params = jax.jit(layer.init)(jax.random.key(0), x)
    apply = jax.jit(layer.apply, static_argnames="num_read")
    np.testing.assert_allclose(
        apply(params, x, num_read=1), apply(params, x)[:, :1], atol=1e-6
    )


def test_accelerators_compute_in_bfloat16(params):
    """Embeddings stay float32 and keep their directions."""
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
    tokens = np.array([[32, 1, 5, 33], [32, 4, 2, 33]])

    @functools.partial(jax.jit, static_argnums=0)
    def embed(dtype="auto"):
        model = CLIP(dataclasses.replace(SMALL, compute_dtype=dtype))
        both = (
            model.apply({"params": params}, images, method="encode_image"),
            model.apply({"params": params}, tokens, method="encode_text"),
        )
        return [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in both]

    expected = embed()
    program = embed.lower("bfloat16").as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert sum("xbf16>, tensor" in line for line in products) > 0.7 * len(products)
    for got, want in zip(embed("bfloat16"), expected, strict=True):
        assert got.dtype == jnp.float32
        assert ((got * want).sum(-1) > 0.999).all()
        assert not np.array_equal(got, want)
    with pytest.raises(ValueError, match="compute_dtype is 'half'"):
        embed("half")


def test_training_uses_bfloat16_if_the_cpu_has_it(monkeypatch):
    for has, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(clip_lib, "multiplies_bfloat16", lambda has=has: has)
        assert SMALL.for_training().dtype == dtype
        assert SMALL.dtype == "float32"
        chosen = dataclasses.replace(SMALL, compute_dtype="float32")
        assert chosen.for_training() == chosen


def test_the_devices_of_a_program_decide_its_dtype():
    """By the mesh, also for absent machines and inside `shard_map`."""
    found = []
    device = jax.sharding.AbstractDevice("TPU v5 lite", None, "tpu")
    mesh = jax.sharding.AbstractMesh(
        (1, 2, 1, 1), sharding.MESH_AXES, abstract_device=device
    )

    def note(_, rows):
        found.append((SMALL.dtype, len(rows)))
        return rows

    call = functools.partial(sharding.on_each_device, note, None)
    jax.eval_shape(call, jnp.zeros(4))
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(call, jnp.zeros(4))
    assert found == [("float32", 4), ("bfloat16", 2)]
