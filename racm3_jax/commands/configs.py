"""Configs as ml_collections users give them: a file, its argument, overrides."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import racm3_jax
from racm3_jax.buckets import refuse_url


class UsageError(Exception):
    """Wrong input; the message is the one sentence that the user sees."""


def read_config(flags: Sequence[str], default: str = "") -> Any:
    """Parses `--config=file.py[:arg] --config.key=value ...` into a locked ConfigDict.

    Raises:
      UsageError: no such file, an invalid argument, or an unknown key
        (names the nearest one).
    """
    from absl import flags as absl_flags
    from ml_collections import config_flags

    files = [f.removeprefix("--config=") for f in flags if f.startswith("--config=")]
    if files and not files[-1].strip() or not files and not default:
        raise UsageError(f"give --config=NAME or FILE.py; names: {_names()}")
    config = load_config_file(files[-1] if files else default)
    values = absl_flags.FlagValues()
    overrides = [flag for flag in flags if flag.startswith("--config.")]
    arguments = ["racm3", *overrides]
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=arguments
        )
        values(arguments)
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        OverflowError,
        RecursionError,
        SyntaxError,
        absl_flags.Error,
    ) as error:
        raise UsageError(_override_problem(config, overrides, error)) from None
    return config.lock()


def load_config_file(path: str) -> Any:
    """Calls `get_config(arg)` of `file.py:arg`, or of `name:arg`.

    Raises:
      UsageError: the file, or the function in it, is missing or fails.
    """
    from ml_collections import ConfigDict

    module, argument = load_config_module(path)
    config = call_config(path, module, "get_config", argument)
    if not isinstance(config, ConfigDict):
        raise UsageError(
            f"get_config of {path} returns a {type(config).__name__}: it must return an "
            "ml_collections.ConfigDict"
        )
    return config


def call_config(path: str, module: types.ModuleType, name: str, given: Any) -> Any:
    """Calls a function of a config file; any failure is an error of the file.

    Raises:
      ValueError: raised by the function itself (for an invalid argument); with the
        config's name before its message.
      UsageError: it is missing, or raises another error; names file and line.
    """
    function = getattr(module, name, None)
    if not callable(function):
        example = find_config("flagworld_tiny.py")
        raise UsageError(f"{path} has no function {name}; an example is {example}")
    try:
        return function(given)
    except ValueError as error:
        raise ValueError(f"{path.partition(':')[0]}: {error}") from error
    except (Exception, SystemExit) as error:
        raise _broken_config(f"{name} of {path}", module.__file__, error) from error


def _broken_config(what: str, file: str | None, error: BaseException) -> UsageError:
    """Names the type of the error and the last line of the file in its traceback."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file
    ]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    where = f" (line {lines[-1]})" if lines else ""
    return UsageError(
        f"{what} fails{where} with {type(error).__name__}: {error}; correct the file "
        "(racm3 --traceback shows more)"
    )


def load_config_module(path: str) -> tuple[types.ModuleType, str]:
    """The module and the argument of `file.py:arg`, or of `name:arg`.

    Inside the file, `from configs import other` imports from the same `configs` folder,
    wherever it is.

    Raises:
      UsageError: there is no such file, or it fails.
    """
    refuse_url(path, "a config file")
    name, _, argument = path.partition(":")
    name = _find_file(os.path.expanduser(name))
    spec = importlib.util.spec_from_file_location("racm3_config", name)
    if spec is None or spec.loader is None:
        raise UsageError(f"{name} is not a Python file: a config ends in .py")
    module = importlib.util.module_from_spec(spec)
    with _configs_importable(Path(name).resolve()):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise _broken_config(f"config {name}", name, error) from error
    return module, argument


@contextlib.contextmanager
def _configs_importable(path: Path) -> Iterator[None]:
    """Temporarily makes the `configs` folder above `path` importable."""
    folder = next((p for p in path.parents if p.name == "configs"), path.parent)
    package = types.ModuleType("configs")
    package.__path__ = [str(folder)]

    def take() -> dict[str, types.ModuleType]:
        names = [n for n in sys.modules if n == "configs" or n.startswith("configs.")]
        return {name: sys.modules.pop(name) for name in names}

    before = take()
    sys.modules["configs"] = package
    try:
        yield
    finally:
        take()
        sys.modules.update(before)


def _override_problem(config: Any, overrides: Sequence[str], error: Exception) -> str:
    """Names the invalid override, and the nearest existing key."""
    for override in overrides:
        key = override.removeprefix("--config.").split("=")[0]
        place, where = config, "config"
        for part in key.split("."):
            keys = list(place) if hasattr(place, "keys") else []
            if part not in keys:
                near = difflib.get_close_matches(part, keys, 1, 0.0)
                hint = f"; did you mean {where}.{near[0]}?" if near else ""
                return f"{where}.{part} is not a setting{hint}"
            place, where = place[part], f"{where}.{part}"
    return "config: " + " ".join(str(error.args[0] if error.args else error).split())


def _find_file(name: str) -> str:
    """The path of a config: a file, or a name of `list_configs`.

    Raises:
      UsageError: there is no such file or name; suggests the nearest name.
    """
    if Path(name).is_file():
        return name
    if name in list_configs():
        return find_config(f"{name}.py")
    if Path(name).is_dir():
        raise UsageError(f"{name} is a folder: give --config=FILE.py, a file in it")
    near = difflib.get_close_matches(Path(name).stem, list_configs(), 1)
    hint = f"did you mean {near[0]}?" if near else f"names: {_names()}"
    raise UsageError(f"there is no config {name}; {hint}")


def list_configs() -> list[str]:
    """The names of the installed configs, for `--config=NAME`."""
    return sorted(
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in _folders()
        for path in folder.rglob("*.py")
        if path.stem != "__init__"
    )


def _names() -> str:
    return ", ".join(name for name in list_configs() if "/" not in name)


def _folders() -> list[Path]:
    """`configs/` next to the package (a clone), or inside it (a wheel)."""
    package = Path(racm3_jax.__file__).parent
    both = (package.parent / "configs", package / "configs")
    return [folder for folder in both if (folder / "flagworld.py").is_file()][:1]


def find_config(name: str) -> str:
    """The path of a file of `configs/`, in a clone or in an installed package."""
    for folder in _folders():
        if (folder / name).is_file():
            return str(folder / name)
    raise UsageError(f"the config {name} is not part of this installation")


def add_config_option(sub: Any) -> None:
    """Adds `--config`; `--config.key=value` is left to ml_collections."""
    sub.set_defaults(takes_config=True)
    sub.add_argument(
        "--config",
        metavar="NAME|FILE.py[:ARG]",
        help=f"a config file, or the name of an installed one ({_names()}), with its "
        "optional argument; --config.key=value overrides a setting",
    )
