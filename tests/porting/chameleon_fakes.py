"""A small Chameleon under native names, and the same weights in the other layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from porting_fakes import random_state, write_torch_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from vqgan_fakes import VQGAN_CONFIG

LAYOUTS = ("native", "anole", "lumina", "hf")
NUM_CODES = VQGAN_CONFIG.num_codes
NUM_SPARE = 3


def make_tokenizer() -> dict[str, Any]:
    """Chameleon's order of tokens, with 24 permuted image codes and 5 reserved tokens."""
    order = np.random.default_rng(7).permutation(NUM_CODES)
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    for code in order:
        letters = "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code))
        names.append(f"IMGIMG{letters}Z")
    names += ["<eoss>", "<racm3:break>", *(f"<reserved{i:05d}>" for i in range(5))]
    added = list(names)
    names += ["<image>", *sorted(ByteLevel.alphabet()), "th", "the"]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"] = [
        {
            "id": vocab[name],
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name in [*added, "<image>"]
    ]
    return fields


VOCAB_SIZE = len(make_tokenizer()["model"]["vocab"]) + NUM_SPARE


def hf_record(
    heads: int = 4, kv_heads: int = 2, head_dim: int = 8, layers: int = 2
) -> dict[str, Any]:
    """`config.json` of Hugging Face's form."""
    return {
        "model_type": "chameleon",
        "architectures": ["ChameleonForConditionalGeneration"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": heads * head_dim,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "vocabulary_map": make_tokenizer()["model"]["vocab"],
        "vq_config": {
            "resolution": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [8],
            "latent_channels": 8,
            "embed_dim": 8,
            "num_embeddings": NUM_CODES,
        },
    }


def native_state(record: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    d, d_ff = record["hidden_size"], record["intermediate_size"]
    heads, kv_heads = record["num_attention_heads"], record["num_key_value_heads"]
    head_dim = d // heads
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (VOCAB_SIZE, d),
        "norm.weight": (d,),
        "output.weight": (VOCAB_SIZE, d),
    }
    for i in range(record["num_hidden_layers"]):
        layer = f"layers.{i}"
        shapes |= {
            f"{layer}.attention.wq.weight": (heads * head_dim, d),
            f"{layer}.attention.wk.weight": (kv_heads * head_dim, d),
            f"{layer}.attention.wv.weight": (kv_heads * head_dim, d),
            f"{layer}.attention.wo.weight": (d, heads * head_dim),
            f"{layer}.attention.q_normalization.weight": (head_dim,),
            f"{layer}.attention.q_normalization.bias": (head_dim,),
            f"{layer}.attention.k_normalization.weight": (head_dim,),
            f"{layer}.attention.k_normalization.bias": (head_dim,),
            f"{layer}.feed_forward.w1.weight": (d_ff, d),
            f"{layer}.feed_forward.w2.weight": (d, d_ff),
            f"{layer}.feed_forward.w3.weight": (d_ff, d),
            f"{layer}.attention_norm.weight": (d,),
            f"{layer}.ffn_norm.weight": (d,),
        }
    return random_state(shapes, seed)


_HF_NAMES = {
    "tok_embeddings.": "model.embed_tokens.",
    "output.": "lm_head.",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_normalization": "self_attn.q_norm",
    "attention.k_normalization": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def in_layout(
    native: Mapping[str, np.ndarray], record: Mapping[str, Any], layout: str
) -> dict[str, np.ndarray]:
    """The same weights; head by head and pair by pair, so as to be obviously right."""
    if layout == "native":
        return dict(native)
    heads = {
        "q": record["num_attention_heads"],
        "k": record["num_key_value_heads"],
    }
    head_dim = record["hidden_size"] // record["num_attention_heads"]
    # Position in half-split order -> position among neighbours that turn together.
    order = [2 * i for i in range(head_dim // 2)]
    order += [2 * i + 1 for i in range(head_dim // 2)]
    state = {}
    for name, array in native.items():
        part = name.partition("attention.")[2]
        if layout != "anole" and part.startswith(("wq", "wk")):
            rows = [h * head_dim + i for h in range(heads[part[1]]) for i in order]
            array = array[rows]
        elif layout != "anole" and "_normalization" in part:
            count = 1 if layout == "lumina" else heads[part[0]]
            array = np.stack([array[order]] * count)
        for old, new in _HF_NAMES.items():
            name = name.replace(old, new)
        if name.startswith(("layers.", "norm.")):
            name = f"model.{name}"
        state[name] = array
    return state


def write_chameleon(
    folder: Path,
    record: Mapping[str, Any],
    native: Mapping[str, np.ndarray],
    layout: str,
    tokenizer: Mapping[str, Any] | None = None,
    num_shards: int = 2,
) -> Path:
    """A checkpoint folder as the project of that layout publishes it."""
    folder.mkdir(parents=True)
    state = in_layout(native, record, layout)
    text = json.dumps(tokenizer or make_tokenizer())
    if layout == "native":
        weights = folder / "models" / "7b"
        weights.mkdir(parents=True)
        write_torch_file(weights / "consolidated.pth", state)
        params = {
            "dim": record["hidden_size"],
            "n_heads": record["num_attention_heads"],
            "n_kv_heads": record["num_key_value_heads"],
            "norm_eps": 1e-5,
            "swin_norm": False,
        }
        (weights / "params.json").write_text(json.dumps({"model": params}))
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "text_tokenizer.json").write_text(text)
        return folder
    weight_map = {}
    names = sorted(state)
    for i in range(num_shards):
        shard = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {
            name: np.ascontiguousarray(state[name]) for name in names[i::num_shards]
        }
        safetensors.numpy.save_file(part, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(record)))
    (folder / "tokenizer.json").write_text(text)
    return folder
