import importlib.util
import pathlib

import numpy as np
import pytest

from racm3_jax.evaluation.clip_score import CLIPScorer, score_embeddings
from racm3_jax.retrieval.embedder import DocumentEmbedder

SHIPPED = pathlib.Path(__file__).parents[2] / "racm3_jax" / "shipped" / "flagworld"


def test_the_formula():
    a = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    b = np.array([[1, 0], [1, 0], [0, -1]], np.float32)
    np.testing.assert_allclose(score_embeddings(a, b), [2.5, 1.5, 0], atol=1e-6)


def test_scores_and_settings_of_a_real_embedder():
    embedder = DocumentEmbedder.load(SHIPPED / "clip", batch_size=4)
    images = [
        np.random.default_rng(i).integers(0, 256, (64 + i, 70, 3), np.uint8)
        for i in range(3)
    ]
    texts = ["the moon", "a beach", "x"]
    scorer = CLIPScorer(embedder)
    found = scorer.score(images, texts)
    assert found.shape == (3,) and (found >= 0).all() and (found <= 2.5).all()
    plain = CLIPScorer(embedder, prompt="").score(images, texts)
    assert np.abs(found - plain).max() > 1e-3
    assert scorer.settings(embedder)["is_retrieval_model"] is True
    assert scorer.settings(None)["is_retrieval_model"] is False
    with pytest.raises(ValueError, match="3 images and 1 texts"):
        scorer.score(images, ["x"])


def test_scores_equal_the_formula_on_transformers_embeddings(tmp_path, monkeypatch):
    """Their embeddings are stored; ours come from the same weights, converted."""
    tests = pathlib.Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(tests / "porting"))
    fakes = importlib.import_module("porting_fakes")
    from racm3_jax.porting.clip import convert_clip

    state = fakes.clip_state(fakes.CLIP_CONFIG)
    fakes.write_hf_clip(tmp_path / "hf", fakes.CLIP_CONFIG, state)
    convert_clip(tmp_path / "hf", tmp_path / "out")
    embedder = DocumentEmbedder.load(tmp_path / "out", batch_size=4)
    with np.load(tests / "golden" / "porting" / "clip.npz") as golden:
        cosine = (golden["image_embeds"] * golden["text_embeds"]).sum(1)
        images, tokens = list(golden["images"]), golden["tokens"]
    monkeypatch.setattr(embedder.tokenizer, "encode_batch", lambda *_: tokens)
    found = CLIPScorer(embedder).score(images, ["", "", ""])
    np.testing.assert_allclose(found, 2.5 * np.maximum(cosine, 0), atol=1e-4)
    assert found.max() > 0.05


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_score_equals_the_formula_on_transformers():
    torch = pytest.importorskip("torch")
    path = pathlib.Path(__file__).parents[1] / "retrieval" / "test_clip_parity.py"
    spec = importlib.util.spec_from_file_location("clip_parity", path)
    assert spec is not None and spec.loader is not None
    parity = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parity)
    from racm3_jax.tokenizers.bpe import TextTokenizer

    tokenizer = TextTokenizer.load(SHIPPED / "clip" / "tokenizer.json")
    config = parity.CLIPConfig(
        vocab_size=tokenizer.vocab_size + 2, vision_layers=2, text_layers=2
    )
    model = parity.make_reference(config)
    embedder = DocumentEmbedder(config, parity.port(model, config), tokenizer, 4)
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (3, 64, 64, 3), np.uint8))
    texts = ["a flag on the moon", "two dogs", "no"]
    found = CLIPScorer(embedder).score(images, texts)
    tokens = embedder.tokenizer.encode_batch(["A photo depicts " + t for t in texts])
    pixels = (np.stack(images) / 255 - config.image_mean) / config.image_std
    with torch.no_grad():
        theirs = model(
            input_ids=torch.from_numpy(tokens).long(),
            pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float(),
        )
    cosine = (theirs.image_embeds * theirs.text_embeds).sum(1).numpy()
    np.testing.assert_allclose(found, 2.5 * np.maximum(cosine, 0), atol=1e-4)
