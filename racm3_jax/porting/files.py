"""A file, a folder or `hub:owner/name` -> one source of tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from racm3_jax.porting.pickles import TorchFile
from racm3_jax.porting.tensors import (
    MergedTensors,
    PortingError,
    SafetensorsFile,
    TensorSource,
)

HUB_PREFIX = "hub:"
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
# Safetensors first: they hold nothing but tensors.
_WEIGHT_NAMES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "consolidated.pth",
    "consolidated.00.pth",
)
_HUB_TEXT = ("*.json", "*.txt", "*.gz", "*.yaml")


def open_tensors(path: str | os.PathLike[str]) -> TensorSource:
    """Opens a weights file, or the one weights file (or set of shards) of a folder.

    Raises:
      FileNotFoundError: nothing at `path`.
      PortingError: no weights there, more than one candidate, or a damaged file.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a weights file, a folder or "
            f"{HUB_PREFIX}owner/name"
        )
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in TORCH_SUFFIXES:
        return TorchFile(path)
    raise PortingError(
        f"{path} is not a weights file: the name must end in .safetensors, "
        + ", ".join(TORCH_SUFFIXES)
    )


def _open_folder(folder: Path) -> TensorSource:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    indexes += sorted(folder.glob("*.bin.index.json"))
    if indexes:
        return _open_shards(indexes[0])
    for name in _WEIGHT_NAMES:
        if (folder / name).exists():
            if name == "consolidated.00.pth":
                parts = sorted(folder.glob("consolidated.*.pth"))
                return MergedTensors(str(folder), [TorchFile(p) for p in parts])
            return open_tensors(folder / name)
    for suffix in (".safetensors", *TORCH_SUFFIXES):
        found = sorted(folder.glob(f"*{suffix}"))
        if len(found) == 1:
            return open_tensors(found[0])
        if found:
            raise PortingError(
                f"{folder} holds several weights files ("
                f"{', '.join(p.name for p in found)}) and no index: name one of them"
            )
    raise PortingError(f"{folder} holds no weights: no *.safetensors, *.pt or *.bin")


def _open_shards(index: Path) -> MergedTensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise PortingError(f"{index} has no weight_map: download it again")
    shards = []
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name:
            raise PortingError(f"{index} names the shard {name!r} outside its folder")
        if not (index.parent / name).exists():
            raise PortingError(
                f"{index.parent} lacks the shard {name}: download it again"
            )
        shards.append(open_tensors(index.parent / name))
    merged = MergedTensors(str(index.parent), shards)
    absent = sorted(set(weight_map) - set(merged.tensors))
    if absent:
        raise PortingError(
            f"the shards of {index.parent} lack {', '.join(absent)}: they are of "
            "another checkpoint than the index; download all of it again"
        )
    return merged


def resolve_source(source: str) -> Path:
    """The local path of `SRC`; `hub:owner/name[@revision]` is fetched, or found cached.

    Raises:
      PortingError: a wrong hub name, no huggingface_hub, or a failed download.
    """
    if not source.startswith(HUB_PREFIX):
        return Path(source)
    name, _, revision = source.removeprefix(HUB_PREFIX).partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise PortingError(f"{source!r} is not {HUB_PREFIX}owner/name[@revision]")
    try:
        import huggingface_hub
    except ImportError:
        raise PortingError(
            f"{source} needs huggingface_hub: pip install 'racm3_jax[hub]', or download "
            "the files and give their folder"
        ) from None
    return _fetch(huggingface_hub, name, revision or None)


def _fetch(hub: Any, name: str, revision: str | None) -> Path:
    """The cached snapshot if there is one with weights, else a download."""

    def snapshot(patterns: tuple[str, ...], local: bool) -> Path | None:
        try:
            folder = hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*_HUB_TEXT, *patterns],
                local_files_only=local,
            )
        except (OSError, ValueError) as error:
            if local:
                return None
            raise PortingError(
                f"{HUB_PREFIX}{name} could not be fetched ("
                f"{str(error).splitlines()[0]}): check the name, the network, and that "
                "you accepted its licence on the hub"
            ) from None
        folder = Path(folder)
        weights = {p.name for pattern in patterns for p in folder.rglob(pattern)}
        # An interrupted download leaves a snapshot without some of its shards.
        for index in folder.rglob("*.safetensors.index.json") if local else ():
            if not set(read_json(index).get("weight_map", {}).values()) <= weights:
                return None
        return folder if weights else None

    torch_files = tuple(f"*{suffix}" for suffix in TORCH_SUFFIXES)
    for local in (True, False):
        # Both forms of one model are often there: the second is fetched only if needed.
        for patterns in (("*.safetensors",), torch_files):
            folder = snapshot(patterns, local)
            if folder is not None:
                return folder
    raise PortingError(f"{HUB_PREFIX}{name} holds no weights that can be read")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      PortingError: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PortingError(f"{path} is missing: give the whole folder") from None
    except ValueError as error:
        raise PortingError(f"{path} is not JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise PortingError(f"{path} is not a JSON object: download it again")
    return value
