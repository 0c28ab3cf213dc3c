"""Embeddings of texts, images and documents."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from crash_checks import check_every_crash
from flax import linen as nn
from PIL import Image

from racm3_jax import sharding
from racm3_jax.checkpoints import CheckpointError, write_manifest
from racm3_jax.retrieval import clip
from racm3_jax.retrieval.clip import CLIP, CLIPConfig, init_params, normalise_images
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.tokenizers.bpe import TextTokenizer
from racm3_jax.types import Document, Segment

TEXTS = ["the flag of Velmoria on the moon", "a beach with the Trozador flag", "sea"]


@pytest.fixture(scope="module")
def embedder():
    tokenizer = TextTokenizer.train(TEXTS, 270)
    config = CLIPConfig(
        vocab_size=tokenizer.vocab_size + 2,
        image_size=8,
        patch_size=4,
        vision_width=16,
        vision_layers=1,
        vision_heads=2,
        text_width=16,
        text_layers=1,
        text_heads=2,
        context_length=20,
        d_embed=8,
    )
    init = jax.jit(init_params, static_argnums=0)
    params = nn.unbox(init(config, jax.random.key(0)))
    return DocumentEmbedder(config, params, tokenizer, batch_size=2)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)


def test_unit_rows_that_do_not_depend_on_their_batch(embedder, images):
    for embed, inputs in (
        (embedder.embed_texts, TEXTS),
        (embedder.embed_images, images),
    ):
        together = embed(inputs)
        assert together.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
        for i in range(3):
            np.testing.assert_allclose(
                embed(inputs[i : i + 1])[0], together[i], atol=1e-5
            )


def test_several_devices_share_the_rows(embedder, images):
    """7 rows: two full batches of 2 on each of 3 devices; 2 rows: one per device."""
    mesh = sharding.make_mesh(devices=jax.devices()[1:4])
    shared = embedder.on_mesh(mesh)
    many = np.concatenate([images, images[::-1], images[:1]])
    for embed, alone, inputs in (
        (shared.embed_texts, embedder.embed_texts, TEXTS * 2 + TEXTS[:1]),
        (shared.embed_images, embedder.embed_images, many),
    ):
        for count in (7, 2, 0):
            found = embed(inputs[:count])
            np.testing.assert_allclose(found, alone(inputs[:count]), atol=1e-6)
    rng = np.random.default_rng
    np.testing.assert_allclose(
        shared.embed_images(many, 0.5, rng(0)),
        embedder.embed_images(many, 0.5, rng(0)),
        atol=1e-6,
    )
    assert shared.fingerprint() == embedder.fingerprint()
    assert embedder.mesh is None  # CPU devices share their cores


def test_empty_inputs(embedder, images):
    assert embedder.embed_texts([]).shape == (0, 8)
    assert embedder.embed_images(images[:0]).shape == (0, 8)
    assert embedder.embed_documents([]).document.shape == (0, 8)


def test_query_dropout_changes_rows_reproducibly(embedder, images):
    for embed, inputs in (
        (embedder.embed_texts, TEXTS[:2]),
        (embedder.embed_images, images[:2]),
    ):
        whole = embed(inputs)
        dropped = embed(inputs, drop=0.5, rng=np.random.default_rng(0))
        again = embed(inputs, drop=0.5, rng=np.random.default_rng(0))
        np.testing.assert_array_equal(dropped, again)
        assert (np.abs(dropped - whole).max(axis=1) > 1e-3).all()
        with pytest.raises(ValueError, match="needs an rng"):
            embed(inputs, drop=0.5)


def test_a_document_is_the_normalised_mean_of_its_parts(embedder, images):
    both = Document("a", (Segment(text=TEXTS[0]), Segment(image=images[0])))
    only_text = Document("b", (Segment(text=TEXTS[1]),))
    two_images = Document("c", (Segment(image=images[1]), Segment(image=images[2])))
    found = embedder.embed_documents([both, only_text, two_images])
    text = embedder.embed_texts(TEXTS)
    image = embedder.embed_images(images)

    def unit(row):
        return row / np.linalg.norm(row)

    zero = np.zeros(8)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
    close(found.text, [text[0], text[1], zero])
    close(found.image, [image[0], zero, unit(image[1] + image[2])])
    close(found.document[0], unit(text[0] + image[0]))
    close(found.document[1:], [text[1], found.image[2]])
    assert found.has_text.tolist() == [True, True, False]
    assert found.has_image.tolist() == [True, False, True]


def test_images_of_another_size_are_resampled_and_cropped(embedder):
    """In CLIP's order: the resampling reads pixels beyond the cut."""
    rng = np.random.default_rng(0)
    wide, small = (rng.integers(0, 256, (16, n, 3)).astype(np.uint8) for n in (32, 16))
    resampled = Image.fromarray(wide).resize((16, 8), Image.Resampling.BICUBIC)
    squares = [
        np.array(resampled)[:, 4:12],
        np.array(Image.fromarray(small).resize((8, 8), Image.Resampling.BICUBIC)),
    ]
    expected = embedder.embed_images(np.stack(squares))
    np.testing.assert_array_equal(embedder.embed_images([wide, small]), expected)
    np.testing.assert_allclose(
        embedder.embed_images(wide[None]), expected[:1], atol=1e-6
    )
    documents = [Document("a", (Segment(image=wide),))]
    found = embedder.embed_documents(documents).image
    np.testing.assert_allclose(found, expected[:1], atol=1e-6)


def test_wrong_images_are_refused(embedder, images):
    with pytest.raises(ValueError, match=r"got float32\[3, 8, 8, 3\]"):
        embedder.embed_images(images.astype(np.float32))
    with pytest.raises(ValueError, match=r"got uint8\[8, 8, 3\]"):
        embedder.embed_images(images[0])
    with pytest.raises(ValueError, match=r"got uint8\[8, 8\]"):
        embedder.embed_images([images[0], images[0, :, :, 0]])


def test_another_vocabulary_is_refused(embedder):
    config = dataclasses.replace(embedder.config, vocab_size=100)
    with pytest.raises(ValueError, match="clip.vocab_size is 100, but the text"):
        DocumentEmbedder(config, embedder.params, embedder.tokenizer.text)


def test_save_and_load(embedder, images, tmp_path):
    embedder.save(tmp_path / "whole")
    loaded = DocumentEmbedder.load(tmp_path / "whole", batch_size=2)
    assert loaded.fingerprint() == embedder.fingerprint()
    assert loaded.config == embedder.config
    np.testing.assert_array_equal(
        loaded.embed_images(images), embedder.embed_images(images)
    )
    np.testing.assert_array_equal(
        loaded.embed_texts(TEXTS), embedder.embed_texts(TEXTS)
    )
    embedder.save(tmp_path / "half", dtype="float16")
    half = DocumentEmbedder.load(tmp_path / "half", batch_size=2)
    assert half.fingerprint() != embedder.fingerprint()
    np.testing.assert_allclose(
        half.embed_texts(TEXTS), embedder.embed_texts(TEXTS), atol=5e-3
    )


def test_another_kind_of_model_is_refused(embedder, tmp_path):
    embedder.save(tmp_path)
    path = tmp_path / "config.json"
    record = json.loads(path.read_text()) | {"kind": "vqgan"}
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"config\.json has .* bytes, not"):
        DocumentEmbedder.load(tmp_path)
    write_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="'vqgan'"):
        DocumentEmbedder.load(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        DocumentEmbedder.load(tmp_path / "nowhere")


def test_a_save_is_old_or_new_after_any_crash(embedder, tmp_path):
    path = tmp_path / "clip"
    other = DocumentEmbedder(
        embedder.config,
        jax.tree.map(lambda x: x * 2, embedder.params),
        embedder.text_tokenizer,
    )
    tried = check_every_crash(
        path,
        lambda: other.save(path),
        lambda: embedder.save(path),
        lambda: DocumentEmbedder.load(path).fingerprint(),
    )
    assert tried > 30


def test_its_tokenizer_has_a_checksum(embedder, tmp_path):
    embedder.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = path.read_text()
    path.write_text(content.replace('"version": "1.0"', '"version": "1.1"'))
    with pytest.raises(CheckpointError, match=r"checksum of tokenizer\.json"):
        DocumentEmbedder.load(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        DocumentEmbedder.load(tmp_path)


def test_a_text_of_any_length_is_embedded_by_its_head(embedder, monkeypatch):
    longest = []
    encode = embedder.text_tokenizer._encode
    monkeypatch.setattr(
        embedder.text_tokenizer,
        "_encode",
        lambda texts: longest.append(max(map(len, texts))) or encode(texts),
    )
    text = " ".join(TEXTS * 2000)
    assert len(text) > 100_000
    rows = embedder.embed_texts([text, text[:2000]])
    assert max(longest) < 2000
    np.testing.assert_array_equal(rows[0], rows[1])


def test_the_measured_alignment_is_kept_with_the_weights(embedder, images, tmp_path):
    assert embedder.alignment is None
    embedder.save(tmp_path / "before")
    assert DocumentEmbedder.load(tmp_path / "before").alignment is None
    documents = [
        Document(str(i), (Segment(text=text), Segment(image=image)))
        for i, (text, image) in enumerate(zip(TEXTS, images, strict=True))
    ]
    try:
        found = embedder.measure([*documents, Document("t", (Segment(text="sea"),))])
        assert found.num_pairs == 3
        embedder.save(tmp_path / "after")
    finally:
        embedder.alignment = None
    loaded = DocumentEmbedder.load(tmp_path / "after")
    assert loaded.alignment == found
    # A measurement changes no embedding, so memories stay valid.
    assert loaded.fingerprint() == embedder.fingerprint()


def test_patches_cut_on_the_host_are_those_that_the_tower_cuts(embedder):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    config = embedder.config

    @jax.jit
    def encode(params, images):
        pixels = normalise_images(images, config)
        return CLIP(config).apply({"params": params}, pixels, method=CLIP.encode_image)

    whole = np.asarray(encode(embedder.params, images))
    whole = whole / np.linalg.norm(whole, axis=-1, keepdims=True)
    np.testing.assert_allclose(embedder.embed_images(images), whole, atol=1e-6)


def test_texts_are_compared_with_images_by_the_aligned_part(embedder):
    """Weights without such a part keep their fingerprint."""
    assert "aligned_dims" not in embedder.config.of_weights()
    config = dataclasses.replace(embedder.config, aligned_dims=3)
    assert config.of_weights()["aligned_dims"] == 3
    other = DocumentEmbedder(config, embedder.params, embedder.text_tokenizer)
    rows = np.random.default_rng(0).normal(size=(5, embedder.d_embed))
    found = other.align(rows)
    expected = rows[:, :3] / np.linalg.norm(rows[:, :3], axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert embedder.align(rows) is rows
    assert other.fingerprint() != embedder.fingerprint()


def test_the_aligned_part_weighs_less_in_scaled_weights(embedder, images):
    config = dataclasses.replace(embedder.config, aligned_dims=3)
    params = clip.scale_aligned(embedder.params, config, 0.25)
    other = DocumentEmbedder(config, params, embedder.text_tokenizer)
    for embed, inputs in (("embed_texts", TEXTS), ("embed_images", images)):
        before, after = (getattr(e, embed)(inputs) for e in (embedder, other))
        expected = before * np.where(np.arange(8) < 3, 0.25, 1)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)
        aligned = before[:, :3] / np.linalg.norm(before[:, :3], axis=1, keepdims=True)
        np.testing.assert_allclose(other.align(after), aligned, rtol=1e-5, atol=1e-6)
    for factor in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="aligned_scale must be above 0"):
            clip.scale_aligned(embedder.params, config, factor)
    with pytest.raises(ValueError, match="there is no part to scale: set it"):
        clip.scale_aligned(embedder.params, embedder.config, 0.5)
