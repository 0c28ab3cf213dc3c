"""Checkpoints of random numbers in the layouts of other projects, made without torch."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from racm3_jax.porting.clip import clip_rules
from racm3_jax.retrieval.clip import CLIPConfig

TORCH_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}

CLIP_CONFIG = CLIPConfig(
    vocab_size=520,
    image_size=16,
    patch_size=8,
    vision_width=64,
    vision_layers=2,
    vision_heads=1,
    text_width=64,
    text_layers=1,
    text_heads=1,
    context_length=9,
    d_embed=12,
)


def random_state(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> dict[str, np.ndarray]:
    """Every tensor random, norms' scales near 1; float32."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape, np.float32)
        noise *= np.float32(np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.2)
        scale = name.endswith("weight") and ("norm" in name or "ln_" in name)
        state[name] = np.asarray(noise + (1 if scale else 0), np.float32)
    return state


def clip_state(config: CLIPConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face's names, from which the other layouts are made."""
    shapes = {rule.theirs: rule.shape for rule in clip_rules(config, "hf")}
    return random_state(shapes, seed)


def openai_clip_state(hf: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights under OpenAI's names, with their fused projections."""
    heads = {
        "logit_scale": "logit_scale",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": (
            "visual.positional_embedding"
        ),
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
    }
    state = {}
    for name, array in hf.items():
        if name in heads:
            state[heads[name]] = array
        elif name == "visual_projection.weight":
            state["visual.proj"] = array.T.copy()
        elif name == "text_projection.weight":
            state["text_projection"] = array.T.copy()
        else:
            for old, new in (
                ("vision_model.pre_layrnorm", "visual.ln_pre"),
                ("vision_model.post_layernorm", "visual.ln_post"),
                ("text_model.final_layer_norm", "ln_final"),
                ("vision_model.encoder.layers", "visual.transformer.resblocks"),
                ("text_model.encoder.layers", "transformer.resblocks"),
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm", "ln_"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                name = name.replace(old, new)
            state[name] = array
    for name in [n for n in state if ".self_attn.q_proj." in n]:
        parts = [state.pop(name.replace("q_proj", f"{p}_proj")) for p in "qkv"]
        fused = name.replace("self_attn.q_proj.", "attn.in_proj_")
        state[fused] = np.concatenate(parts)
    return state


def write_hf_clip(folder: Path, config: CLIPConfig, state: Mapping) -> None:
    """A folder as `CLIPModel.save_pretrained` leaves it, with merges."""
    folder.mkdir(parents=True)
    sections = {
        tower: {
            "hidden_size": getattr(config, f"{tower}_width"),
            "intermediate_size": 4 * getattr(config, f"{tower}_width"),
            "num_hidden_layers": getattr(config, f"{tower}_layers"),
            "num_attention_heads": getattr(config, f"{tower}_heads"),
            "hidden_act": config.activation,
        }
        for tower in ("text", "vision")
    }
    sections["text"] |= {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "bos_token_id": config.start,
        "eos_token_id": config.end,
        "pad_token_id": config.end,
    }
    sections["vision"] |= {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    record = {
        "model_type": "clip",
        "projection_dim": config.d_embed,
        **{f"{tower}_config": section for tower, section in sections.items()},
    }
    (folder / "config.json").write_text(json.dumps(record))
    safetensors.numpy.save_file(dict(state), folder / "model.safetensors")
    write_merges(folder / "merges.txt")


# Six merges after 512 single symbols: with two control ids, 520.
MERGES = ["t h", "th e</w>", "f l", "fl a", "fla g</w>", "o f</w>"]


def write_merges(path: Path) -> None:
    path.write_text("\n".join(["#version: 0.2", *MERGES, ""]))


def write_torch_file(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """What `torch.save(state_dict)` writes."""
    write_torch_zip(
        path,
        state_dict_program(state),
        {str(i): array.tobytes() for i, array in enumerate(state.values())},
    )


def write_torch_zip(path: Path, program: bytes, storages: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", "3\n")


def state_dict_program(state: Mapping[str, np.ndarray], first: int = 0) -> bytes:
    """The pickle of an OrderedDict of tensors, as torch writes it (protocol 2).

    Args:
      state: the tensors.
      first: number of the first storage.
    """
    out = pickle.PROTO + b"\x02"
    out += b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    out += pickle.MARK
    for i, (name, array) in enumerate(state.items(), first):
        strides = [
            s // array.itemsize for s in np.empty(array.shape, array.dtype).strides
        ]
        out += _string(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + pickle.MARK
        storage = TORCH_STORAGES[array.dtype.name]
        out += pickle.MARK + _string("storage") + f"ctorch\n{storage}\n".encode()
        out += _string(str(i)) + _string("cpu") + _integer(array.size)
        out += pickle.TUPLE + pickle.BINPERSID + _integer(0)
        out += _integers(array.shape) + _integers(strides) + pickle.NEWFALSE
        out += b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
        out += pickle.TUPLE + pickle.REDUCE
    return out + pickle.SETITEMS + pickle.STOP


def _string(text: str) -> bytes:
    content = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


def _integer(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)


def _integers(values: Iterable[int]) -> bytes:
    return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE
