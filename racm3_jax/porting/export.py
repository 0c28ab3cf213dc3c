"""Exports our weights to folders for `transformers`: CLIP and Chameleon.

It inverts the forms of `rules`, so that weights converted from Hugging Face's layout
are restored bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.checkpoints import (
    WEIGHTS_NAME,
    CheckpointError,
    build_config,
    read_config,
    verify_folder,
)
from racm3_jax.model.config import ModelConfig
from racm3_jax.porting.chameleon_rules import chameleon_rules
from racm3_jax.porting.clip import clip_rules
from racm3_jax.porting.clip_text import CONTROL
from racm3_jax.porting.files import read_json
from racm3_jax.porting.rules import Rule
from racm3_jax.porting.tensors import (
    PortingError,
    SafetensorsFile,
    TensorInfo,
    foreign_settings,
)
from racm3_jax.porting.vocabulary import Vocabulary
from racm3_jax.porting.vqgan import vqgan_rules
from racm3_jax.porting.writing import converted_folder, write_safetensors
from racm3_jax.retrieval.clip import CLIPConfig
from racm3_jax.retrieval.embedder import TOKENIZER_NAME
from racm3_jax.tokenizers.vqgan import VQGANConfig

_METADATA = {"format": "pt"}  # required by transformers


def export_hf(source: str | Path, out: str | Path, *, overwrite: bool = False) -> str:
    """Writes a CLIP or a converted Chameleon as a Hugging Face folder.

    Args:
      source: a folder of `convert_clip` or `convert_chameleon`, or of a trained CLIP.
      out: new folder: `model.safetensors`, `config.json`, `tokenizer.json`, manifest.
      overwrite: replace an earlier export at `out`.

    Returns:
      The kind, "clip" or "generator". Of a CLIP with `aligned_dims` all numbers are
      exported; which of them compare texts with images, `transformers` does not know.

    Raises:
      PortingError: another kind, or a model without a class in `transformers`, or
        weights that this class does not have.
    """
    source = Path(source)
    generator = (source / "model").is_dir()
    parts = ["model", "tokenizer", "source"] if generator else ["."]
    try:
        for part in parts:
            verify_folder(source / part)
        record = read_config(source / parts[0])
    except CheckpointError as error:
        raise PortingError(str(error)) from None
    kind = record["kind"]
    if kind != ("generator" if generator else "clip"):
        raise PortingError(
            f"{source} holds a {kind!r}: export needs the folder of a CLIP, or of a "
            "generator with its tokenizer"
        )
    with (
        converted_folder(
            out, f"exported {kind}", {"source": source.name}, overwrite=overwrite
        ) as directory,
        foreign_settings(source),
    ):
        if generator:
            _export_chameleon(source, record, directory)
        else:
            _export_clip(source, record, directory)
    return kind


def _export_clip(source: Path, record: Mapping[str, Any], directory: Path) -> None:
    config = build_config(CLIPConfig, record["config"], source)
    weights = _Outgoing(source)
    weights.add(clip_rules(config, "hf"))
    weights.write(directory / WEIGHTS_NAME)
    sections: dict[str, Any] = {}
    for tower in ("text", "vision"):
        width = getattr(config, f"{tower}_width")
        sections[f"{tower}_config"] = {
            "model_type": f"clip_{tower}_model",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": getattr(config, f"{tower}_layers"),
            "num_attention_heads": getattr(config, f"{tower}_heads"),
            "hidden_act": config.activation,
            "layer_norm_eps": 1e-5,
            "projection_dim": config.d_embed,
        }
    sections["text_config"] |= {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "bos_token_id": config.start,
        "eos_token_id": config.end,
        "pad_token_id": config.end,
    }
    sections["vision_config"] |= {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
    }
    _write_json(
        directory / "config.json",
        {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config.d_embed,
            **sections,
        },
    )
    size = config.image_size
    _write_json(
        directory / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(config.image_mean),
            "image_std": list(config.image_std),
            "do_convert_rgb": True,
        },
    )
    _export_clip_tokenizer(source, config, directory)


def _export_clip_tokenizer(source: Path, config: CLIPConfig, directory: Path) -> None:
    """Our tokenizer plus their control tokens and text cleaning."""
    fields = read_json(source / TOKENIZER_NAME)
    ids = dict(zip(CONTROL, (config.start, config.end), strict=True))
    fields["model"]["vocab"] |= ids
    fields["model"]["unk_token"] = CONTROL[1]
    fields["added_tokens"] = [_added_token(name, i) for name, i in ids.items()]
    fields["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    }
    fields["post_processor"] = {
        "type": "RobertaProcessing",
        "sep": [CONTROL[1], config.end],
        "cls": [CONTROL[0], config.start],
        "trim_offsets": False,
        "add_prefix_space": False,
    }
    _write_json(directory / "tokenizer.json", fields)
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": config.context_length,
            "bos_token": CONTROL[0],
            "eos_token": CONTROL[1],
            "pad_token": CONTROL[1],
            "unk_token": CONTROL[1],
        },
    )


def _added_token(name: str, i: int) -> dict[str, Any]:
    return {
        "id": i,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _export_chameleon(source: Path, record: Mapping[str, Any], directory: Path) -> None:
    config = build_config(ModelConfig, record["config"], source)
    if not (source / "source" / "vocabulary.json").exists():
        raise PortingError(
            f"{source} was not converted from Chameleon: transformers has no class for "
            "a model of our own vocabulary"
        )
    tokenizer = read_json(source / "source" / "tokenizer.json")
    orders = read_json(source / "source" / "vocabulary.json")
    vocabulary = Vocabulary(
        np.zeros(0, np.int64),
        0,
        0,
        np.array(orders["inputs"], np.int64),
        np.array(orders["outputs"], np.int64),
    )
    image = read_config(source / "tokenizer" / "image")
    vqgan = build_config(VQGANConfig, image["config"], source / "tokenizer")
    weights = _Outgoing(source / "model")
    weights.add(chameleon_rules(config, vocabulary, "hf"))
    encoder = [r for r in vqgan_rules(vqgan, "taming") if "decoder/" not in r.ours]
    image_folder = source / "tokenizer" / "image"
    weights.add(encoder, image_folder, "model.vqmodel.", whole=False)
    weights.write(directory / WEIGHTS_NAME)
    shutil.copyfile(source / "source" / "tokenizer.json", directory / "tokenizer.json")
    theirs = source / "source" / "config.json"
    if theirs.exists() and "hidden_size" in (kept := read_json(theirs)):
        # Settings without a counterpart here, such as ids of special tokens.
        fields = kept
    else:
        fields = _chameleon_fields(config, vqgan, tokenizer)
    _write_json(directory / "config.json", fields)


def _chameleon_fields(
    config: ModelConfig, vqgan: VQGANConfig, tokenizer: Mapping[str, Any]
) -> dict[str, Any]:
    names = dict(tokenizer["model"]["vocab"])
    names |= {t["content"]: t["id"] for t in tokenizer.get("added_tokens") or ()}
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": False,
        "swin_norm": False,
        "vocabulary_map": names,
        "vq_config": {
            "embed_dim": vqgan.d_code,
            "num_embeddings": vqgan.num_codes,
            "double_latent": False,
            "latent_channels": vqgan.z_channels,
            "resolution": vqgan.image_size,
            "in_channels": 3,
            "base_channels": vqgan.channels,
            "channel_multiplier": list(vqgan.channel_multipliers),
            "num_res_blocks": vqgan.num_res_blocks,
            "attn_resolutions": list(vqgan.attention_resolutions),
            "attn_type": "vanilla",
        },
    }


class _Outgoing:
    """Collects rules to invert, and streams the result to one file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rules: dict[str, tuple[Rule, SafetensorsFile]] = {}

    def add(
        self,
        rules: list[Rule],
        folder: Path | None = None,
        prefix: str = "",
        *,
        whole: bool = True,
    ) -> None:
        """Adds the weights of a folder; `whole`: all of them.

        Raises:
          PortingError: some would be left out.
        """
        weights = SafetensorsFile((folder or self._folder) / WEIGHTS_NAME)
        more = sorted(set(weights.tensors) - {rule.ours for rule in rules})
        if whole and more:
            raise PortingError(
                f"{folder or self._folder} has weights that the model in transformers "
                f"does not have: {', '.join(more[:3])}; it can be used here only"
            )
        for rule in rules:
            self._rules[prefix + rule.theirs] = (rule, weights)

    def write(self, path: Path) -> None:
        plan = {
            name: TensorInfo(rule.shape, weights.tensors[rule.ours].dtype)
            for name, (rule, weights) in self._rules.items()
        }

        def make(name: str) -> np.ndarray:
            rule, weights = self._rules[name]
            assert rule.form.to_theirs is not None, name  # Hugging Face's all have one
            return rule.form.to_theirs(weights.read(rule.ours))

        write_safetensors(path, plan, make, _METADATA)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
