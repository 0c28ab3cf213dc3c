"""Opens a file, a folder or `hub:owner/name` as one source of tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from racm3_jax.checkpoints import CheckpointError, read_object
from racm3_jax.porting.tensors import (
    MergedTensors,
    PortingError,
    RenamedTensors,
    SafetensorsFile,
    TensorSource,
    without_prefix,
)
from racm3_jax.porting.torch_files import TorchFile

HUB_PREFIX = "hub:"
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_FIRST_OF_SEVERAL = "consolidated.00.pth"
# Safetensors first: they contain only tensors.
_WEIGHT_NAMES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "consolidated.pth",
    _FIRST_OF_SEVERAL,
)
# Prefixes of wrappers, and what they insert anywhere in a name.
_OUTER_WRAPPERS = ("module.", "model.")
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_HUB_TEXT = ("*.json", "*.txt", "*.gz", "*.yaml")


def open_tensors(path: str | os.PathLike[str], part: str | None = None) -> TensorSource:
    """Opens a weights file, or the one weights file (or set of shards) of a folder.

    Prefixes that wrappers add to all names (`module.`, `_orig_mod.`, `model.`) are
    removed.

    Args:
      path: of the file or the folder.
      part: which weights of a larger checkpoint: their keys, joined
        by dots, or a prefix of the names ("ema", "state_dict", "model.clip").

    Raises:
      FileNotFoundError: `path` does not exist.
      PortingError: no weights, more than one candidate, or a damaged file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a weights file, a folder or "
            f"{HUB_PREFIX}owner/name"
        )
    file = _find_file(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        source: TensorSource = _open_shards(file)
    elif file.name == _FIRST_OF_SEVERAL:
        parts = sorted(path.glob("consolidated.*.pth"))
        source = MergedTensors(str(path), [TorchFile(p) for p in parts])
    elif file.suffix in TORCH_SUFFIXES:
        return _unwrap(TorchFile(file, part))
    else:
        source = _open_file(file)
    if part is not None:
        inner = without_prefix(source, f"{part}.")
        if not inner.tensors:
            heads = sorted({name.partition(".")[0] for name in source.tensors})
            raise PortingError(
                f"{path} has no weights under {part!r}: its names begin with "
                f"{', '.join(heads[:5])}; give one of those as --part, or none"
            )
        source = inner
    return _unwrap(source)


def suggest_part(names: Iterable[str], first_names: Sequence[str]) -> str:
    """A hint for an error message: the prefix of the wanted names, if found.

    Args:
      names: of a checkpoint.
      first_names: that identify a layout.
    """
    found = {
        name.removesuffix(f".{first}")
        for name in names
        for first in first_names
        if name.endswith(f".{first}")
    }
    if not found:
        return ""
    listed = " or ".join(f"--part={part}" for part in sorted(found)[:3])
    return f"; such weights are inside it: give {listed}"


def _unwrap(source: TensorSource) -> TensorSource:
    names = {name: name for name in source.tensors}
    for wrapper in _WRAPPERS:
        shorter = {name.replace(wrapper, ""): old for name, old in names.items()}
        if len(shorter) == len(names):  # otherwise names would collide
            names = shorter
    while prefix := next(
        (p for p in _OUTER_WRAPPERS if names and all(n.startswith(p) for n in names)),
        None,
    ):
        names = {name.removeprefix(prefix): old for name, old in names.items()}
    return RenamedTensors(source, names)


def _open_file(path: Path) -> TensorSource:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in TORCH_SUFFIXES:
        return TorchFile(path)
    raise PortingError(
        f"{path} is not a weights file: the name must end in .safetensors, "
        + ", ".join(TORCH_SUFFIXES)
    )


def _find_file(folder: Path) -> Path:
    """The one weights file of a folder, or the index of its shards."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    indexes += sorted(folder.glob("*.bin.index.json"))
    if indexes:
        return indexes[0]
    for name in _WEIGHT_NAMES:
        if (folder / name).exists():
            return folder / name
    for suffix in (".safetensors", *TORCH_SUFFIXES):
        found = sorted(folder.glob(f"*{suffix}"))
        if len(found) == 1:
            return found[0]
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
        shards.append(_open_file(index.parent / name))
    merged = MergedTensors(str(index.parent), shards)
    absent = sorted(set(weight_map) - set(merged.tensors))
    if absent:
        raise PortingError(
            f"the shards of {index.parent} lack {', '.join(absent)}: they are of "
            "another checkpoint than the index; download all of it again"
        )
    return merged


def resolve_source(source: str) -> Path:
    """The local path of `SRC`; downloads `hub:owner/name[@revision]` if not cached.

    Raises:
      PortingError: a wrong hub name, no huggingface_hub, or a failed download.
    """
    if not source.startswith(HUB_PREFIX):
        return Path(source).expanduser()
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
        # An interrupted download leaves an incomplete snapshot.
        for index in folder.rglob("*.safetensors.index.json") if local else ():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not set(listed.values()) <= weights:
                return None
        return folder if weights else None

    torch_files = tuple(f"*{suffix}" for suffix in TORCH_SUFFIXES)
    for local in (True, False):
        # Models often have both formats: the second is downloaded only if needed.
        for patterns in (("*.safetensors",), torch_files):
            folder = snapshot(patterns, local)
            if folder is not None:
                return folder
    raise PortingError(f"{HUB_PREFIX}{name} has no supported weights")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      PortingError: missing, not JSON, or not an object.
    """
    try:
        return read_object(path, "download it again")
    except FileNotFoundError:
        raise PortingError(f"{path} is missing: give the whole folder") from None
    except CheckpointError as error:
        raise PortingError(str(error)) from None
