"""Sizes and activation of a public CLIP, from its config file or from its shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from racm3_jax.checkpoints import CheckpointError, build_config
from racm3_jax.porting.files import read_json
from racm3_jax.porting.rules import check_count, count
from racm3_jax.porting.tensors import PortingError, TensorSource
from racm3_jax.retrieval.clip import CLIPConfig

Layout = Literal["hf", "openai", "openclip"]
_HEAD_WIDTH = 64
# Hugging Face omits settings equal to these (ViT-B/32).
_HF_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
_HF_VISION = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}


def read_clip_config(
    source: TensorSource,
    layout: Layout,
    folder: Path,
    activation: str | None = None,
) -> CLIPConfig:
    """Sizes and activation, from the config file or the shapes.

    Raises:
      PortingError: a missing or contradictory description.
    """
    if layout == "hf":
        fields = _hf_fields(folder)
    else:
        fields = _openai_fields(source)
        if layout == "openclip":
            fields |= _openclip_fields(folder)
        elif activation is None and "input_resolution" not in source.tensors:
            raise PortingError(
                f"{source.where} does not specify its activation: give "
                "--activation=quick_gelu for OpenAI's weights, gelu for most "
                "of OpenCLIP's"
            )
    if activation is not None:
        fields["activation"] = activation
    try:
        config = build_config(CLIPConfig, fields, folder)
    except CheckpointError as error:
        raise PortingError(str(error)) from None
    for tower in ("text", "vision"):
        number = getattr(config, f"{tower}_layers")
        check_count(number, source.tensors, f"the {tower} tower has {number} layers")
    return config


def _hf_fields(folder: Path) -> dict[str, Any]:
    record = read_json(folder / "config.json")
    text = _HF_TEXT | _section(record, "text_config")
    vision = _HF_VISION | _section(record, "vision_config")
    if text["hidden_act"] != vision["hidden_act"]:
        raise PortingError(
            f"{folder / 'config.json'} gives the towers different activations, "
            f"{text['hidden_act']} and {vision['hidden_act']}; ours share one"
        )
    # The output at the highest id is the text's embedding; "2" in old files means
    # the same.
    end = text["vocab_size"] - 1
    if text.get("eos_token_id", end) not in (2, end):
        raise PortingError(
            f"{folder / 'config.json'} reads texts out at id {text['eos_token_id']}, "
            f"not at the highest, {end}; such a CLIP is not supported"
        )
    fields = {
        "vocab_size": text["vocab_size"],
        "context_length": text["max_position_embeddings"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "d_embed": record.get("projection_dim", 512),
        "activation": text["hidden_act"],
    }
    for tower, section in (("text", text), ("vision", vision)):
        fields[f"{tower}_width"] = section["hidden_size"]
        fields[f"{tower}_layers"] = section["num_hidden_layers"]
        fields[f"{tower}_heads"] = section["num_attention_heads"]
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.exists():
        record = read_json(preprocessor)
        for name in ("image_mean", "image_std"):
            if name in record:
                fields[name] = tuple(record[name])
        if record.get("resample", 3) != 3:
            raise PortingError(
                f"{preprocessor} resamples by method {record['resample']}, not by "
                "bicubic (3); such a CLIP is not supported"
            )
    return fields


def _section(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    return {k: v for k, v in value.items() if v is not None} if value else {}


def _openai_fields(source: TensorSource) -> dict[str, Any]:
    """All sizes from the shapes, except the number of heads."""
    tensors = source.tensors

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != rank:
            raise PortingError(
                f"{source.where} lacks {name} of rank {rank}: not a CLIP of OpenAI's "
                "form"
            )
        return tensors[name].shape

    vision_width, _, patch_size, _ = shape("visual.conv1.weight", 4)
    grid = math.isqrt(shape("visual.positional_embedding", 2)[0] - 1)
    text_width = shape("ln_final.weight", 1)[0]
    return {
        "vocab_size": shape("token_embedding.weight", 2)[0],
        "context_length": shape("positional_embedding", 2)[0],
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "d_embed": shape("text_projection", 2)[1],
        "vision_width": vision_width,
        "vision_heads": max(1, vision_width // _HEAD_WIDTH),
        "vision_layers": count(tensors, r"visual\.transformer\.resblocks\.(\d+)\."),
        "text_width": text_width,
        "text_heads": max(1, text_width // _HEAD_WIDTH),
        "text_layers": count(tensors, r"transformer\.resblocks\.(\d+)\."),
    }


def _openclip_fields(folder: Path) -> dict[str, Any]:
    path = folder / "open_clip_config.json"
    record = read_json(path)
    model = record.get("model_cfg", record)
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    fields: dict[str, Any] = {
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu"
    }
    if "width" in vision:
        width = vision["width"]
        fields["vision_heads"] = width // vision.get("head_width", _HEAD_WIDTH)
    if "heads" in text:
        fields["text_heads"] = text["heads"]
    preprocess = record.get("preprocess_cfg", {})
    for ours, theirs in (("image_mean", "mean"), ("image_std", "std")):
        if theirs in preprocess:
            fields[ours] = tuple(preprocess[theirs])
    method = preprocess.get("interpolation", "bicubic")
    mode = preprocess.get("resize_mode", "shortest")
    if (method, mode) != ("bicubic", "shortest"):
        raise PortingError(
            f"{path} prepares images by {method} and {mode}, not by bicubic and "
            "shortest; such a CLIP is not supported"
        )
    return fields
