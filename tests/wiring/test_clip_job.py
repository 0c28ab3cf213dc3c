"""The files of a CLIP training's work directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from racm3_jax import run, wiring
from racm3_jax.commands.configs import load_config_file
from racm3_jax.retrieval.clip import CLIPTokenizer
from racm3_jax.retrieval.clip_loss import make_pair_batches
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.tokenizers.bpe import TextTokenizer
from racm3_jax.wiring.corpora import build_corpus, read_pairs
from racm3_jax.wiring.encoder_jobs import build_rename

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_a_clip_is_measured_on_unseen_nations(tmp_path):
    config = load_config_file(f"{CONFIGS}/flagworld_clip.py")
    config.world.num_nations, config.world.num_heldout = 8, 5
    config.world.documents_per_nation = 2
    config.batch_size = 8
    for name in ("vision_width", "text_width"):
        config.clip[name] = 16
    for name in ("vision_layers", "text_layers"):
        config.clip[name] = 1
    config.train.num_steps, config.train.log_every = 2, 1
    run.train(config, tmp_path, progress=False)
    embedder = DocumentEmbedder.load(tmp_path / "clip")
    assert embedder.config.aligned_dims == config.clip.aligned_dims
    assert embedder.alignment is not None
    assert embedder.alignment.num_pairs == 5
    assert not embedder.alignment.may_rank  # after two steps
    kept = TextTokenizer.load(tmp_path / "text" / "tokenizer.json")
    shipped = wiring.resolve("shipped:flagworld/tokenizer/text/tokenizer.json")
    assert kept.fingerprint() == TextTokenizer.load(shipped).fingerprint()


def small_world():
    config = load_config_file(f"{CONFIGS}/flagworld_clip.py")
    config.world.num_nations, config.world.num_heldout = 6, 2
    config.world.documents_per_nation = 2
    return config


def test_a_wrong_scale_is_refused_before_the_training(tmp_path):
    config = small_world()
    config.aligned_scale = 0.0
    with pytest.raises(ValueError, match="aligned_scale must be above 0; got 0"):
        run.train(config, tmp_path, progress=False)


def test_the_texts_of_a_pair_get_one_invented_name():
    config = small_world()
    pairs = read_pairs(build_corpus(config), 64, 0, config.rename_key)
    text = TextTokenizer.load(
        wiring.resolve("shipped:flagworld/tokenizer/text/tokenizer.json")
    )
    tokenizer = CLIPTokenizer(text, 80)
    tokens = tokenizer.encode_batch(pairs.texts)
    make = lambda **more: make_pair_batches(
        pairs.images, tokens, pairs.groups, num_pairs=6, seed=3, **more
    )
    rename = build_rename(pairs, tokenizer)
    batches = list(make(num_steps=2, rename=rename))

    def read(row):
        return text.decode(row[1 : row.argmax()])

    known = set(pairs.names)
    written = {
        t.replace(n, "?"): n for t, n in zip(pairs.texts, pairs.names, strict=True)
    }
    invented = []
    for batch, plain in zip(batches, make(num_steps=2), strict=True):
        # Only the texts change.
        np.testing.assert_array_equal(batch["images_a"], plain["images_a"])
        for a, b, old in zip(
            batch["tokens_a"], batch["tokens_b"], plain["tokens_a"], strict=True
        ):
            name = next(n for n in known if n in read(old))
            before, after = read(old).split(name)
            new = read(a).removeprefix(before).removesuffix(after)
            assert before + new + after == read(a)
            assert new not in known
            assert read(b).replace(new, "?") in written
            invented.append(new)
    assert len(set(invented)) > len(known)  # another one in every batch
    resumed = next(make(start_step=1, rename=rename))
    np.testing.assert_array_equal(resumed["tokens_b"], batches[1]["tokens_b"])


def test_a_key_whose_values_no_text_has_is_refused():
    with pytest.raises(ValueError, match="rename_key is 'split', but no training"):
        read_pairs(build_corpus(small_world()), 64, 0, "split")


@pytest.mark.parametrize("part", ["held-out groups", "config.batch_size is 64"])
def test_a_refused_clip_training_leaves_its_folder_free(tmp_path, part):
    photos, workdir = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for i in range(9):
        Image.new("RGB", (64, 64), (20 * i, 0, 0)).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"red {i}")
    config = load_config_file(f"{CONFIGS}/own_clip.py")
    config.source = f"folder:{photos}"
    if part != "held-out groups":
        config.holdout = "0.png,1.png"
    else:
        config.holdout, config.batch_size = "0.png", 8
    with pytest.raises(ValueError, match=part):
        run.train(config, workdir, progress=False)
    assert not workdir.exists()
