"""The files of a CLIP training's work directory."""

from __future__ import annotations

from pathlib import Path

from racm3_jax import run, wiring
from racm3_jax.commands.configs import load_config_file
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.tokenizers.bpe import TextTokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_a_clip_is_measured_on_unseen_nations(tmp_path):
    config = load_config_file(f"{CONFIGS}/flagworld_clip.py:aligned")
    config.world.num_nations, config.world.num_heldout = 8, 5
    config.world.documents_per_nation = 2
    config.batch_size = 8
    for name in ("vision_width", "text_width", "d_embed"):
        config.clip[name] = 16
    for name in ("vision_layers", "text_layers"):
        config.clip[name] = 1
    config.train.num_steps, config.train.log_every = 2, 1
    run.train(config, tmp_path, progress=False)
    embedder = DocumentEmbedder.load(tmp_path / "clip")
    assert embedder.alignment is not None
    assert embedder.alignment.num_pairs == 5
    assert not embedder.alignment.may_rank  # after two steps
    kept = TextTokenizer.load(tmp_path / "text" / "tokenizer.json")
    shipped = wiring.resolve("shipped:flagworld/tokenizer/text/tokenizer.json")
    assert kept.fingerprint() == TextTokenizer.load(shipped).fingerprint()
