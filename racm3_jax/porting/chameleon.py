"""Converts public Chameleon weights to a folder for `racm3 generate`.

    OUT/model/      the Transformer, with rows in our token order
    OUT/tokenizer/  text, image (encoder and decoder), mixed.json
    OUT/clip/       the retriever's encoder, if one was given
    OUT/source/     their config and tokenizer, unchanged
    OUT/manifest.json   sha256 of every file, layout, licence and its acknowledgement

Weights are read one tensor at a time: at most two copies of the largest one are in
memory, 1.1 GB for the 7B model's embedding in bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax.checkpoints import (
    CONFIG_NAME,
    MANIFEST_NAME,
    CheckpointError,
    build_config,
    read_manifest,
    weights_folder,
    write_manifest,
)
from racm3_jax.model.config import CHAMELEON_STYLE, ModelConfig
from racm3_jax.model.transformer import init_params
from racm3_jax.porting.chameleon_rules import (
    LAYOUT_NAMES,
    Layout,
    chameleon_rules,
    detect_layout,
)
from racm3_jax.porting.files import open_tensors, read_json
from racm3_jax.porting.rules import check_count, check_names, count, parameter_shapes
from racm3_jax.porting.tensors import PortingError, TensorSource, foreign_settings
from racm3_jax.porting.vocabulary import (
    Vocabulary,
    build_text_tokenizer,
    read_vocabulary,
)
from racm3_jax.porting.vqgan import convert_vqgan
from racm3_jax.porting.writing import convert_weights, converted_folder
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.tokenizers.image import ImageTokenizer
from racm3_jax.tokenizers.mixed import MixedTokenizer

KIND = "chameleon"
LICENCE = "Chameleon Research License"
LICENCE_NOTICE = (
    "Chameleon's weights are under the Chameleon Research License: for research only, "
    "and it forbids re-enabling what was disabled before the release. Read it where "
    "you got the weights; if you accept it, repeat the command with --accept_licence"
)
CODEBOOK = "model.vqmodel.quantize.embedding.weight"
# Their image encoder (without decoder), and constants of the rotary code.
_IGNORED = (r"model\.vqmodel\..*", r".*rotary_emb\.inv_freq", r"rope\.freqs")
_TOKENIZERS = ("tokenizer.json", "tokenizer/text_tokenizer.json", "text_tokenizer.json")
_VQGANS = ("tokenizer/vqgan.ckpt", "vqgan.ckpt")
_NATIVE_FOLDERS = (".", "models/7b")
_NORM_EPSILON = 1e-5


def convert_chameleon(
    source: str | Path,
    out: str | Path,
    *,
    vqgan: str | Path | None = None,
    clip: str | Path | None = None,
    accept_licence: bool = False,
    image_size: int = 512,
    part: str | None = None,
    overwrite: bool = False,
) -> ModelConfig:
    """Converts Chameleon's weights, in any of the four layouts.

    Args:
      source: the folder of the checkpoint, with its config and tokenizer.
      out: new folder, see above.
      vqgan: the image tokenizer, converted or not; None looks for `vqgan.ckpt`.
      clip: a converted CLIP, copied into `out`.
      accept_licence: the user read the licence and accepts it.
      image_size: side in pixels, if `vqgan` is not converted yet.
      part: which weights of a larger checkpoint: see `files.open_tensors`.
      overwrite: replace a converted Chameleon at `out`.

    Returns:
      The detected sizes.

    Raises:
      PortingError: lists everything that does not match; nothing is written.
      FileExistsError: `out` exists.
    """
    if not accept_licence:
        raise PortingError(LICENCE_NOTICE)
    root = Path(source)
    folder = _weights_folder(root)
    tensors = open_tensors(folder, part)
    with foreign_settings(root):
        config = read_model_config(tensors, folder)
        layout = detect_layout(tensors, config.num_heads)
        tokenizer_path = _find(root, _TOKENIZERS)
        if tokenizer_path is None:
            raise PortingError(
                f"{root} lacks its tokenizer: {' or '.join(_TOKENIZERS)}"
            )
        tokenizer = read_json(tokenizer_path)
        vocabulary = read_vocabulary(tokenizer, config.vocab_size, str(tokenizer_path))
        rules = chameleon_rules(config, vocabulary, layout, _norm_rows(tensors, layout))
    check_names(rules, tensors, LAYOUT_NAMES[layout], _IGNORED)
    text = build_text_tokenizer(tokenizer, vocabulary, str(tokenizer_path))
    vqgan = Path(vqgan) if vqgan is not None else _find(root, _VQGANS)
    if vqgan is None:
        raise PortingError(
            f"{root} holds no {' or '.join(_VQGANS)}: give the image tokenizer with "
            "--vqgan; its decoder is needed to generate images"
        )
    facts = {"source": root.name, "part": part, "layout": LAYOUT_NAMES[layout]}
    facts |= {"licence": LICENCE, "licence_accepted": True}
    with converted_folder(out, KIND, facts, overwrite=overwrite) as directory:
        image = _open_image_tokenizer(vqgan, directory, image_size)
        _check_codes(image, vocabulary, tensors)
        mixed = MixedTokenizer(text, image, vocabulary.num_sentinels)
        mixed.save(directory / "tokenizer")
        extra: dict[str, Any] = {"tokenizer": mixed.fingerprint()}
        if clip is not None:
            extra["clip"] = DocumentEmbedder.load(clip).fingerprint()
            _copy_clip(Path(clip), directory / "clip")
        with weights_folder(directory / "model", "generator") as model_folder:
            convert_weights(
                model_folder,
                tensors,
                rules,
                chameleon_shapes(config),
                kind="generator",
                config=dataclasses.asdict(config),
                extra=extra,
            )
        _keep_source(directory / "source", folder, tokenizer_path, vocabulary)
    return config


@functools.lru_cache(maxsize=8)
def chameleon_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Shapes of our parameters."""
    return parameter_shapes(lambda key: init_params(config, key, boxed=True))


def _copy_clip(clip: Path, directory: Path) -> None:
    """Copies the folder with its manifest; one of an earlier version has none."""
    shutil.copytree(clip, directory)
    record = read_manifest(directory)
    if record is not None and record["format_version"] == 1:
        (directory / MANIFEST_NAME).unlink()


def _weights_folder(root: Path) -> Path:
    """The original release keeps the weights in `models/7b`."""
    if not root.is_dir():
        raise PortingError(f"{root} is not a folder: give the one of the checkpoint")
    for name in _NATIVE_FOLDERS:
        if any((root / name).glob("consolidated*.pth")):
            return root / name
    return root


def _find(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).exists()), None)


def read_model_config(source: TensorSource, folder: Path) -> ModelConfig:
    """Sizes from `config.json` (Hugging Face's form) or `params.json` and the shapes.

    Raises:
      PortingError: settings that our network does not support.
    """
    if (folder / "params.json").exists():
        fields = _native_fields(source, folder)
    else:
        fields = _hf_fields(folder)
    names = {info.dtype.name for info in source.tensors.values()}
    half = bool(names & {"bfloat16", "float16"})
    fields |= CHAMELEON_STYLE
    fields["compute_dtype"] = "bfloat16" if half else "float32"
    try:
        config = build_config(ModelConfig, fields, folder)
    except CheckpointError as error:
        raise PortingError(str(error)) from None
    num_layers, rows = config.num_layers, config.vocab_size
    check_count(num_layers, source.tensors, f"{folder} says {num_layers} layers")
    if not any(info.shape[:1] == (rows,) for info in source.tensors.values()):
        raise PortingError(
            f"{folder} says vocab_size={rows}, but no tensor has as many rows: its "
            "config is of another checkpoint"
        )
    return config


def _hf_fields(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    record = read_json(path)
    rope = record.get("rope_parameters") or {}
    scaling = record.get("rope_scaling") or {}
    expected = {
        "swin_norm": False,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": _NORM_EPSILON,
    }
    for name, value in expected.items():
        _check_setting(path, name, record.get(name, value), value)
    kind = scaling.get("rope_type") or rope.get("rope_type") or "default"
    _check_setting(path, "rope_type", kind, "default")
    d_model = record.get("hidden_size", 4096)
    heads = record.get("num_attention_heads", 32)
    return {
        "vocab_size": record.get("vocab_size", 65_536),
        "d_model": d_model,
        "num_layers": record.get("num_hidden_layers", 32),
        "num_heads": heads,
        "num_kv_heads": record.get("num_key_value_heads") or heads,
        "head_dim": d_model // heads,
        "d_ff": record.get("intermediate_size", 11_008),
        "max_length": record.get("max_position_embeddings", 4096),
        "rope_base": float(rope.get("rope_theta") or record.get("rope_theta") or 1e4),
        "norm_epsilon": _NORM_EPSILON,
    }


def _native_fields(source: TensorSource, folder: Path) -> dict[str, Any]:
    path = folder / "params.json"
    record = read_json(path)
    record = record.get("model", record)
    _check_setting(path, "swin_norm", record.get("swin_norm", False), False)
    epsilon = record.get("norm_eps", _NORM_EPSILON)
    _check_setting(path, "norm_eps", epsilon, _NORM_EPSILON)
    tensors = source.tensors
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in tensors:
            raise PortingError(
                f"{source.where} lacks {name}: it is not a native Chameleon"
            )
    try:
        d_model, heads = int(record["dim"]), int(record["n_heads"])
    except (KeyError, TypeError, ValueError):
        raise PortingError(f"{path} lacks dim or n_heads: download it again") from None
    return {
        "vocab_size": tensors["tok_embeddings.weight"].shape[0],
        "d_model": d_model,
        "num_layers": count(tensors, r"layers\.(\d+)\."),
        "num_heads": heads,
        "num_kv_heads": record.get("n_kv_heads") or heads,
        "head_dim": d_model // heads,
        "d_ff": tensors["layers.0.feed_forward.w1.weight"].shape[0],
        "max_length": 4096,
        "rope_base": float(record.get("rope_theta") or 1e4),
        "norm_epsilon": _NORM_EPSILON,
    }


def _check_setting(path: Path, name: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise PortingError(
            f"{path} sets {name}={found!r}; only {wanted!r} is supported"
        )


def _norm_rows(source: TensorSource, layout: Layout) -> tuple[int, int] | None:
    """Lumina's norms have one row for all heads (or one per tensor-parallel part)."""
    if layout != "lumina":
        return None
    prefix = "model.layers.0.self_attn"
    rows = tuple(
        source.tensors[f"{prefix}.{part}_norm.weight"].shape[0]
        for part in "qk"
        if f"{prefix}.{part}_norm.weight" in source.tensors
    )
    return rows if len(rows) == 2 else (1, 1)


def _open_image_tokenizer(
    vqgan: Path, directory: Path, image_size: int
) -> ImageTokenizer:
    """Opens a converted image tokenizer, or converts another one."""
    config = vqgan / CONFIG_NAME
    # Other projects' folders may have a config.json too, but without a fingerprint.
    if config.is_file() and "fingerprint" in read_json(config):
        return ImageTokenizer.load(vqgan)
    folder = directory / "image"
    convert_vqgan(vqgan, folder, image_size=image_size)
    image = ImageTokenizer.load(folder)
    shutil.rmtree(folder)
    return image


def _check_codes(
    image: ImageTokenizer, vocabulary: Vocabulary, source: TensorSource
) -> None:
    """Checks that the image tokenizer is the one of the vocabulary's image tokens."""
    if image.num_codes != vocabulary.num_codes:
        raise PortingError(
            f"the image tokenizer has {image.num_codes} codes, but the vocabulary has "
            f"{vocabulary.num_codes}: give the model's own with --vqgan"
        )
    if CODEBOOK not in source.tensors:
        return
    theirs = np.asarray(source.read(CODEBOOK), np.float32)
    ours = np.asarray(image.params["codebook"], np.float32)
    # Theirs may be rounded to bfloat16 (3 digits).
    if theirs.shape != ours.shape or not np.allclose(theirs, ours, 1e-2, 1e-4):
        raise PortingError(
            f"the codebook of the image tokenizer is not the one in {source.where}: "
            "give the model's own with --vqgan"
        )


def _keep_source(
    directory: Path, folder: Path, tokenizer: Path, vocabulary: Vocabulary
) -> None:
    """Keeps the files that `export` needs to write their format."""
    directory.mkdir()
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    if (folder / CONFIG_NAME).exists():
        shutil.copyfile(folder / CONFIG_NAME, directory / CONFIG_NAME)
    orders = {
        "inputs": vocabulary.inputs.tolist(),
        "outputs": vocabulary.outputs.tolist(),
    }
    (directory / "vocabulary.json").write_text(json.dumps(orders))
    write_manifest(directory, {"kind": "source"})
