"""Converts public CLIP weights: layouts of OpenAI, Hugging Face and OpenCLIP.

    layout     first names                          sizes and activation from
    hf         vision_model... text_model...        config.json
    openai     visual.conv1... transformer...       the shapes; heads of 64, quick_gelu
    openclip   the same, or with prefix `text.`     open_clip_config.json

The towers must be OpenAI's: ViT with a class token, MLPs four times as wide.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from racm3_jax.porting.clip_config import Layout, read_clip_config
from racm3_jax.porting.clip_text import (
    build_clip_tokenizer,
    find_merges,
)
from racm3_jax.porting.files import open_tensors, suggest_part
from racm3_jax.porting.rules import (
    PATCHES,
    Form,
    Rule,
    check_names,
    linear,
    linear_part,
    norm,
    parameter_shapes,
)
from racm3_jax.porting.tensors import (
    PortingError,
    TensorSource,
    foreign_settings,
    without_prefix,
)
from racm3_jax.porting.writing import convert_weights, converted_folder
from racm3_jax.retrieval.clip import CLIPConfig, init_params
from racm3_jax.retrieval.embedder import KIND, TOKENIZER_NAME

LAYOUT_NAMES = {
    "hf": "Hugging Face CLIP",
    "openai": "OpenAI CLIP",
    "openclip": "OpenCLIP",
}
# Buffers and settings among the weights.
_IGNORED = (
    r"(text|vision)_model\.embeddings\.position_ids",
    r"(visual\.)?attn_mask",
    "input_resolution|context_length|vocab_size",
)
_FIRST_NAMES = ("vision_model.embeddings.class_embedding", "visual.conv1.weight")
_PARTS = ("query", "key", "value")


def convert_clip(
    source: str | Path,
    out: str | Path,
    *,
    merges: str | Path | None = None,
    activation: str | None = None,
    licence: str = "",
    part: str | None = None,
    overwrite: bool = False,
) -> CLIPConfig:
    """Converts public CLIP weights for `DocumentEmbedder.load`.

    Args:
      source: a weights file, or a folder with its config and tokenizer.
      out: new folder: `model.safetensors`, `config.json`, `tokenizer.json`, manifest.
      merges: the BPE's merges, if they are not next to the weights.
      activation: for an OpenCLIP file without config.
      licence: from the weights' model card, for the manifest.
      part: which weights of a larger checkpoint: see `files.open_tensors`.
      overwrite: replace a CLIP's folder at `out`.

    Returns:
      The detected sizes.

    Raises:
      PortingError: lists everything that does not match; nothing is written.
      FileExistsError: `out` exists.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    tensors = open_tensors(path, part)
    with foreign_settings(folder):
        layout = detect_layout(tensors, folder if path.is_dir() else None)
        if layout != "hf" and "text.token_embedding.weight" in tensors.tensors:
            tensors = _TextUnwrapped(tensors)
        config = read_clip_config(tensors, layout, folder, activation)
        rules = clip_rules(config, layout)
    check_names(rules, tensors, LAYOUT_NAMES[layout], _IGNORED)
    tokenizer = build_clip_tokenizer(find_merges(folder, merges), config.vocab_size)
    facts = {
        "source": path.name,
        "part": part,
        "layout": LAYOUT_NAMES[layout],
        "licence": licence,
    }
    with converted_folder(out, KIND, facts, overwrite=overwrite) as directory:
        convert_weights(
            directory,
            tensors,
            rules,
            clip_shapes(config),
            kind=KIND,
            config=config.of_weights(),
        )
        tokenizer.save(directory / TOKENIZER_NAME)
    return config


def detect_layout(source: TensorSource, folder: Path | None) -> Layout:
    """Detects the layout by the names.

    Args:
      source: the checkpoint.
      folder: of an optional config; None for a single file.

    Raises:
      PortingError: none of the three.
    """
    names = source.tensors
    hf, openai = _FIRST_NAMES
    if hf in names:
        return "hf"
    if openai in names:
        wrapped = "text.token_embedding.weight" in names
        if wrapped or (folder and (folder / "open_clip_config.json").exists()):
            return "openclip"
        return "openai"
    raise PortingError(
        f"{source.where} is not a CLIP with ViT towers: it has neither "
        "vision_model.embeddings.class_embedding (Hugging Face) nor visual.conv1.weight "
        f"(OpenAI, OpenCLIP), but {', '.join(sorted(names)[:3])}"
        + suggest_part(names, _FIRST_NAMES)
    )


class _TextUnwrapped:
    """Handles OpenCLIP's newer class, which has the text tower under `text.`."""

    def __init__(self, source: TensorSource) -> None:
        inner = without_prefix(source, "text.")
        self.where = source.where
        self._parts = (inner, source)
        outer = {n: t for n, t in source.tensors.items() if not n.startswith("text.")}
        self.tensors = outer | dict(inner.tensors)

    def read(self, name: str):
        inner, outer = self._parts
        return inner.read(name) if name in inner.tensors else outer.read(name)


@functools.lru_cache(maxsize=8)
def clip_shapes(config: CLIPConfig) -> Mapping[str, tuple[int, ...]]:
    """Shapes of our parameters."""
    return parameter_shapes(lambda key: init_params(config, key))


def clip_rules(config: CLIPConfig, layout: Layout) -> list[Rule]:
    """A rule for every parameter of both towers."""
    return _hf_rules(config) if layout == "hf" else _openai_rules(config)


def _hf_rules(config: CLIPConfig) -> list[Rule]:
    width, patch = config.vision_width, config.patch_size
    vision, text = "vision_model.embeddings", "text_model.embeddings"
    rules = [
        Rule("logit_scale", "logit_scale", ()),
        Rule(
            "vision/patch_embedding/kernel",
            f"{vision}.patch_embedding.weight",
            (width, 3, patch, patch),
            PATCHES,
        ),
        Rule("vision/class_embedding", f"{vision}.class_embedding", (width,)),
        Rule(
            "vision/position_embedding",
            f"{vision}.position_embedding.weight",
            (1 + config.num_patches, width),
        ),
        Rule(
            "text/token_embedding",
            f"{text}.token_embedding.weight",
            (config.vocab_size, config.text_width),
        ),
        Rule(
            "text/position_embedding",
            f"{text}.position_embedding.weight",
            (config.context_length, config.text_width),
        ),
        # The typo is in the public names.
        *norm("vision/pre_norm", "vision_model.pre_layrnorm", width),
        *norm("vision/post_norm", "vision_model.post_layernorm", width),
        *norm("text/final_norm", "text_model.final_layer_norm", config.text_width),
        *linear(
            "vision/projection",
            "visual_projection",
            (config.d_embed, width),
            bias=False,
        ),
        *linear(
            "text/projection",
            "text_projection",
            (config.d_embed, config.text_width),
            bias=False,
        ),
    ]
    heads = {"query": "q", "key": "k", "value": "v", "out": "out"}
    for tower, width, layers in _towers(config):
        for i in range(layers):
            ours, theirs = f"{tower}/layers_{i}", f"{tower}_model.encoder.layers.{i}"
            for name, letter in heads.items():
                rules += linear(
                    f"{ours}/attention/{name}",
                    f"{theirs}.self_attn.{letter}_proj",
                    (width, width),
                )
            rules += linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1", (4 * width, width))
            rules += linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2", (width, 4 * width))
            for j in (1, 2):
                rules += norm(f"{ours}/norm_{j}", f"{theirs}.layer_norm{j}", width)
    return rules


def _openai_rules(config: CLIPConfig) -> list[Rule]:
    width, patch = config.vision_width, config.patch_size
    rules = [
        Rule("logit_scale", "logit_scale", ()),
        Rule(
            "vision/patch_embedding/kernel",
            "visual.conv1.weight",
            (width, 3, patch, patch),
            PATCHES,
        ),
        Rule("vision/class_embedding", "visual.class_embedding", (width,)),
        Rule(
            "vision/position_embedding",
            "visual.positional_embedding",
            (1 + config.num_patches, width),
        ),
        Rule(
            "text/token_embedding",
            "token_embedding.weight",
            (config.vocab_size, config.text_width),
        ),
        Rule(
            "text/position_embedding",
            "positional_embedding",
            (config.context_length, config.text_width),
        ),
        *norm("vision/pre_norm", "visual.ln_pre", width),
        *norm("vision/post_norm", "visual.ln_post", width),
        *norm("text/final_norm", "ln_final", config.text_width),
        # Both projections are plain matrices, not linear layers.
        Rule("vision/projection/kernel", "visual.proj", (width, config.d_embed)),
        Rule(
            "text/projection/kernel",
            "text_projection",
            (config.text_width, config.d_embed),
        ),
    ]
    for tower, width, layers in _towers(config):
        prefix = "visual." if tower == "vision" else ""
        for i in range(layers):
            ours = f"{tower}/layers_{i}"
            theirs = f"{prefix}transformer.resblocks.{i}"
            for part, name in enumerate(_PARTS):
                form: Form = linear_part(part, 3)
                attention = f"{ours}/attention/{name}"
                stacked = f"{theirs}.attn.in_proj"
                rules += [
                    Rule(
                        f"{attention}/kernel",
                        f"{stacked}_weight",
                        (3 * width, width),
                        form,
                    ),
                    Rule(f"{attention}/bias", f"{stacked}_bias", (3 * width,), form),
                ]
            out = f"{theirs}.attn.out_proj"
            rules += linear(f"{ours}/attention/out", out, (width, width))
            rules += linear(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc", (4 * width, width))
            down = f"{theirs}.mlp.c_proj"
            rules += linear(f"{ours}/mlp/down", down, (width, 4 * width))
            for j in (1, 2):
                rules += norm(f"{ours}/norm_{j}", f"{theirs}.ln_{j}", width)
    return rules


def _towers(config: CLIPConfig) -> list[tuple[str, int, int]]:
    return [
        ("vision", config.vision_width, config.vision_layers),
        ("text", config.text_width, config.text_layers),
    ]
