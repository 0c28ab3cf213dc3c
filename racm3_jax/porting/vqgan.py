"""Converts public VQGAN weights, encoder and decoder.

    layout     first names                            quantizer
    taming     encoder.down.0.block.0..., quantize.   codebook, or Gumbel's linear scores
    diffusers  encoder.down_blocks.0.resnets.0...     codebook

Chameleon's image tokenizer has taming's layout (512 pixels, factor 16, 8,192 codes).
Sizes are read from the shapes; only the image size must be given.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from racm3_jax.porting.files import open_tensors, read_json, suggest_part
from racm3_jax.porting.rules import (
    CONV,
    POINTWISE,
    Rule,
    check_names,
    count,
    norm,
    parameter_shapes,
)
from racm3_jax.porting.tensors import PortingError, TensorSource, foreign_settings
from racm3_jax.porting.writing import convert_weights, converted_folder
from racm3_jax.tokenizers.image import KIND
from racm3_jax.tokenizers.vqgan import VQGAN, VQGANConfig

Layout = Literal["taming", "diffusers"]
LAYOUT_NAMES = {"taming": "taming VQGAN", "diffusers": "diffusers VQModel"}
# Other contents of taming's checkpoints.
_IGNORED = (r"loss\..*", r"model_ema\..*", "colorize", r"quantize\.(used|re_embed)")
_FIRST_NAMES = (
    "encoder.down.0.block.0.conv1.weight",
    "encoder.down_blocks.0.resnets.0.conv1.weight",
)
_NORM_GROUPS = 32


def convert_vqgan(
    source: str | Path,
    out: str | Path,
    *,
    image_size: int | None = None,
    licence: str = "",
    part: str | None = None,
    overwrite: bool = False,
) -> VQGANConfig:
    """Converts public VQGAN weights for `ImageTokenizer.load`.

    Args:
      source: a weights file, or a folder with its config.
      out: new folder: `model.safetensors`, `config.json`, manifest.
      image_size: side in pixels; None means the config's `sample_size`, or 256.
      licence: from the weights' model card, for the manifest.
      part: which weights of a larger checkpoint: see `files.open_tensors`.
      overwrite: replace a VQGAN's folder at `out`.

    Returns:
      The detected sizes.

    Raises:
      PortingError: lists everything that does not match; nothing is written.
      FileExistsError: `out` exists.
    """
    path = Path(source)
    tensors = open_tensors(path, part)
    folder = path if path.is_dir() else path.parent
    with foreign_settings(path):
        layout = detect_layout(tensors)
        config = read_vqgan_config(tensors, layout, folder, image_size)
        rules = vqgan_rules(config, layout)
    check_names(rules, tensors, LAYOUT_NAMES[layout], _IGNORED)
    facts = {
        "source": path.name,
        "part": part,
        "layout": LAYOUT_NAMES[layout],
        "licence": licence,
    }
    with converted_folder(out, KIND, facts, overwrite=overwrite) as directory:
        write_vqgan(directory, tensors, rules, config)
    return config


def write_vqgan(
    directory: Path, source: TensorSource, rules: list[Rule], config: VQGANConfig
) -> None:
    """Writes the weights folder of an `ImageTokenizer`."""
    convert_weights(
        directory,
        source,
        rules,
        vqgan_shapes(config),
        kind=KIND,
        config=dataclasses.asdict(config),
    )


def detect_layout(source: TensorSource) -> Layout:
    """Detects the layout by the names.

    Raises:
      PortingError: unknown layout, or no decoder.
    """
    names = source.tensors
    if "encoder.conv_in.weight" in names and "decoder.conv_in.weight" not in names:
        raise PortingError(
            f"{source.where} has an encoder but no decoder (Hugging Face's Chameleon "
            "lacks it): give the original image tokenizer, vqgan.ckpt"
        )
    taming, diffusers = _FIRST_NAMES
    if taming in names:
        return "taming"
    if diffusers in names:
        return "diffusers"
    raise PortingError(
        f"{source.where} is not a VQGAN of taming's or diffusers' layout: it has "
        f"{', '.join(sorted(names)[:3])}{suggest_part(names, _FIRST_NAMES)}"
    )


def read_vqgan_config(
    source: TensorSource,
    layout: Layout,
    folder: Path | None = None,
    image_size: int | None = None,
) -> VQGANConfig:
    """Sizes from the shapes, and from diffusers' `config.json` if it exists.

    Raises:
      PortingError: shapes or settings that our network does not support.
    """
    tensors = source.tensors
    record: dict[str, Any] = {}
    if layout == "diffusers" and folder is not None:
        record = read_json(folder / "config.json")
        _check_diffusers(record, folder)
    size = image_size or record.get("sample_size") or 256
    down = "encoder.down" if layout == "taming" else "encoder.down_blocks"
    block = "block" if layout == "taming" else "resnets"
    attn = "attn" if layout == "taming" else "attentions"
    num_levels = count(tensors, rf"{down}\.(\d+)\.{block}\.")

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != rank:
            raise PortingError(f"{source.where} lacks {name} of rank {rank}")
        return tensors[name].shape

    channels = shape("encoder.conv_in.weight", 4)[0]
    widths = [
        shape(f"{down}.{i}.{block}.0.conv1.weight", 4)[0] for i in range(num_levels)
    ]
    if any(width % channels for width in widths):
        raise PortingError(
            f"{source.where} has levels of {widths} channels, not multiples of "
            f"the first convolution's {channels}"
        )
    attended = {
        size >> i
        for i in range(num_levels)
        if any(name.startswith(f"{down}.{i}.{attn}.") for name in tensors)
    }
    gumbel = "quantize.proj.weight" in tensors
    codebook = "quantize.embed.weight" if gumbel else "quantize.embedding.weight"
    num_codes, d_code = shape(codebook, 2)
    try:
        return VQGANConfig(
            image_size=size,
            channels=channels,
            channel_multipliers=tuple(width // channels for width in widths),
            num_res_blocks=count(tensors, rf"{down}\.0\.{block}\.(\d+)\."),
            attention_resolutions=tuple(sorted(attended, reverse=True)),
            z_channels=shape("encoder.conv_out.weight", 4)[0],
            num_codes=num_codes,
            d_code=d_code,
            quantizer="gumbel" if gumbel else "euclidean",
            norm_groups=record.get("norm_num_groups", _NORM_GROUPS),
        )
    except ValueError as error:
        raise PortingError(f"{source.where} is not supported: {error}") from None


def _check_diffusers(record: Mapping[str, Any], folder: Path) -> None:
    """Checks settings that affect the computation but not the shapes."""
    expected = {
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "norm_type": "group",
        "lookup_from_codebook": False,
        "mid_block_add_attention": True,
    }
    for name, value in expected.items():
        if record.get(name, value) != value:
            raise PortingError(
                f"{folder / 'config.json'} sets {name}={record[name]!r}; only {value!r} "
                "is supported"
            )


@functools.lru_cache(maxsize=8)
def vqgan_shapes(config: VQGANConfig) -> Mapping[str, tuple[int, ...]]:
    """Shapes of our parameters."""
    model: Any = VQGAN(config)
    size = config.image_size
    return parameter_shapes(
        lambda key: model.init(key, jnp.zeros((1, size, size, 3)))["params"]
    )


def vqgan_rules(config: VQGANConfig, layout: Layout) -> list[Rule]:
    """A rule for every parameter."""
    names = _TAMING if layout == "taming" else _DIFFUSERS
    return _Network(config, names).rules()


@dataclasses.dataclass(frozen=True)
class _Names:
    """A project's parameter names; `{i}` is the level, `{k}` counts from the bottom."""

    down: str
    up: str
    block: str
    attn: str
    downsample: str
    upsample: str
    mid_blocks: tuple[str, str]
    mid_attn: str
    norm_out: str
    shortcut: str
    attn_norm: str
    attn_parts: tuple[str, str, str, str]
    attn_is_linear: bool


_TAMING = _Names(
    down="down.{i}",
    up="up.{i}",
    block="block",
    attn="attn",
    downsample="downsample.conv",
    upsample="upsample.conv",
    mid_blocks=("mid.block_1", "mid.block_2"),
    mid_attn="mid.attn_1",
    norm_out="norm_out",
    shortcut="nin_shortcut",
    attn_norm="norm",
    attn_parts=("q", "k", "v", "proj_out"),
    attn_is_linear=False,
)
_DIFFUSERS = _Names(
    down="down_blocks.{i}",
    up="up_blocks.{k}",
    block="resnets",
    attn="attentions",
    downsample="downsamplers.0.conv",
    upsample="upsamplers.0.conv",
    mid_blocks=("mid_block.resnets.0", "mid_block.resnets.1"),
    mid_attn="mid_block.attentions.0",
    norm_out="conv_norm_out",
    shortcut="conv_shortcut",
    attn_norm="group_norm",
    attn_parts=("to_q", "to_k", "to_v", "to_out.0"),
    attn_is_linear=True,
)


class _Network:
    """Collects rules in the order of the forward pass."""

    def __init__(self, config: VQGANConfig, names: _Names) -> None:
        self.config, self.names = config, names
        self._rules: list[Rule] = []

    def rules(self) -> list[Rule]:
        config = self.config
        self._encoder()
        self._decoder()
        self._conv("quant_conv", "quant_conv", config.z_channels, config.d_code, 1)
        self._conv(
            "post_quant_conv", "post_quant_conv", config.d_code, config.z_channels, 1
        )
        shape = (config.num_codes, config.d_code)
        if config.quantizer == "gumbel":
            self._rules.append(Rule("codebook", "quantize.embed.weight", shape))
            self._conv(
                "code_scores", "quantize.proj", config.d_code, config.num_codes, 1
            )
        else:
            self._rules.append(Rule("codebook", "quantize.embedding.weight", shape))
        return self._rules

    def _encoder(self) -> None:
        config, names = self.config, self.names
        self._conv("encoder/conv_in", "encoder.conv_in", 3, config.channels)
        width = config.channels
        last = len(config.channel_multipliers) - 1
        for i, multiplier in enumerate(config.channel_multipliers):
            theirs = "encoder." + names.down.format(i=i)
            ours = f"encoder/down_{i}"
            width = self._level(ours, theirs, width, config.channels * multiplier, i, 0)
            if i != last:
                downsample = f"{theirs}.{names.downsample}"
                self._conv(f"{ours}_downsample", downsample, width, width)
        self._middle("encoder", width)
        self._norm("encoder/norm_out", f"encoder.{names.norm_out}", width)
        self._conv("encoder/conv_out", "encoder.conv_out", width, config.z_channels)

    def _decoder(self) -> None:
        config, names = self.config, self.names
        last = len(config.channel_multipliers) - 1
        width = config.channels * config.channel_multipliers[-1]
        self._conv("decoder/conv_in", "decoder.conv_in", config.z_channels, width)
        self._middle("decoder", width)
        for i in range(last, -1, -1):
            theirs = "decoder." + names.up.format(i=i, k=last - i)
            ours = f"decoder/up_{i}"
            new = config.channels * config.channel_multipliers[i]
            width = self._level(ours, theirs, width, new, i, 1)
            if i:
                upsample = f"{theirs}.{names.upsample}"
                self._conv(f"{ours}_upsample", upsample, width, width)
        self._norm("decoder/norm_out", f"decoder.{names.norm_out}", width)
        self._conv("decoder/conv_out", "decoder.conv_out", width, 3)

    def _level(
        self, ours: str, theirs: str, width: int, new: int, level: int, more: int
    ) -> int:
        """Blocks of a level, with attention after each if set for this map size."""
        config, names = self.config, self.names
        attended = (config.image_size >> level) in config.attention_resolutions
        for j in range(config.num_res_blocks + more):
            self._block(f"{ours}_block_{j}", f"{theirs}.{names.block}.{j}", width, new)
            width = new
            if attended:
                self._attention(f"{ours}_attn_{j}", f"{theirs}.{names.attn}.{j}", width)
        return width

    def _middle(self, part: str, width: int) -> None:
        names = self.names
        for j, name in enumerate(names.mid_blocks, start=1):
            self._block(f"{part}/mid_block_{j}", f"{part}.{name}", width, width)
        self._attention(f"{part}/mid_attn_1", f"{part}.{names.mid_attn}", width)

    def _block(self, ours: str, theirs: str, width: int, new: int) -> None:
        self._norm(f"{ours}/norm1", f"{theirs}.norm1", width)
        self._conv(f"{ours}/conv1", f"{theirs}.conv1", width, new)
        self._norm(f"{ours}/norm2", f"{theirs}.norm2", new)
        self._conv(f"{ours}/conv2", f"{theirs}.conv2", new, new)
        if width != new:
            shortcut = f"{theirs}.{self.names.shortcut}"
            self._conv(f"{ours}/nin_shortcut", shortcut, width, new, 1)

    def _attention(self, ours: str, theirs: str, width: int) -> None:
        names = self.names
        self._norm(f"{ours}/norm", f"{theirs}.{names.attn_norm}", width)
        parts = zip(("q", "k", "v", "proj_out"), names.attn_parts, strict=True)
        for own, other in parts:
            if not names.attn_is_linear:
                self._conv(f"{ours}/{own}", f"{theirs}.{other}", width, width, 1)
                continue
            weight, shape = f"{theirs}.{other}.weight", (width, width)
            self._rules.append(Rule(f"{ours}/{own}/kernel", weight, shape, POINTWISE))
            self._bias(f"{ours}/{own}", f"{theirs}.{other}", width)

    def _conv(
        self, ours: str, theirs: str, width: int, new: int, size: int = 3
    ) -> None:
        shape = (new, width, size, size)
        self._rules.append(Rule(f"{ours}/kernel", f"{theirs}.weight", shape, CONV))
        self._bias(ours, theirs, new)

    def _bias(self, ours: str, theirs: str, width: int) -> None:
        self._rules.append(Rule(f"{ours}/bias", f"{theirs}.bias", (width,)))

    def _norm(self, ours: str, theirs: str, width: int) -> None:
        self._rules += norm(ours, theirs, width)
