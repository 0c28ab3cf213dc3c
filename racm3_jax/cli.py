"""The `racm3` command: one subcommand a task, thin over `run` and `build`.

Configs are given as ml_collections users expect:
`racm3 train --config=configs/flagworld.py:twin --config.optimizer.learning_rate=3e-4`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import json
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import racm3_jax

Arguments = argparse.Namespace


class UsageError(Exception):
    """Wrong input; its text is the one sentence that the user sees."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns the exit status: 0, or 2 after wrong input."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if not hasattr(arguments, "command"):
        parser.print_help()
        return 2
    takes_config = getattr(arguments, "takes_config", False)
    unknown = [a for a in rest if not (takes_config and a.startswith("--config"))]
    try:
        if unknown:
            raise UsageError(
                f"unknown argument {unknown[0]!r}; see racm3 {arguments.name} --help"
            )
        arguments.config_flags = rest
        _quiet_libraries()
        _keep_freed_memory()
        arguments.command(arguments)
    except (UsageError, ValueError, FileNotFoundError) as error:
        if arguments.traceback:
            raise
        print(f"racm3: {error}", file=sys.stderr)
        return 2
    return 0


def _quiet_libraries() -> None:
    """Progress bars and our own sentences are what a user should see."""
    import logging

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.WARNING)
    for name in ("jax", "orbax", "etils"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _keep_freed_memory() -> None:
    """Tells glibc not to give large blocks back after every step.

    XLA on CPU allocates and frees its buffers in each call; asking the kernel for fresh
    pages every time took a seventh of a training step.
    """
    import ctypes

    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # from malloc.h
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(arena_max, 1)


def read_config(flags: Sequence[str], default: str = "") -> Any:
    """Parses `--config=file.py[:arg] --config.key=value ...` into a locked ConfigDict.

    Raises:
      UsageError: no such file, an argument that it does not take, or an unknown key
        (names the nearest one).
    """
    from absl import flags as absl_flags
    from ml_collections import config_flags

    files = [f.removeprefix("--config=") for f in flags if f.startswith("--config=")]
    if not files and not default:
        raise UsageError("give --config=configs/NAME.py (see the folder configs/)")
    config = load_config_file(files[-1] if files else default)
    values = absl_flags.FlagValues()
    overrides = [flag for flag in flags if flag.startswith("--config.")]
    arguments = ["racm3", *overrides]
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=arguments
        )
        values(arguments)
    except (AttributeError, KeyError, TypeError, absl_flags.Error) as error:
        raise UsageError(_override_problem(config, overrides, error)) from None
    return config.lock()


def load_config_file(path: str) -> Any:
    """Calls `get_config(arg)` of `file.py:arg`.

    Inside the file, `from configs import other` finds the files of the same `configs`
    folder, wherever that folder is.
    """
    name, _, argument = path.partition(":")
    if not Path(name).is_file():
        raise UsageError(f"there is no config file {name}; see the folder configs/")
    spec = importlib.util.spec_from_file_location("racm3_config", name)
    if spec is None or spec.loader is None:
        raise UsageError(f"{name} is not a Python file: a config ends in .py")
    module = importlib.util.module_from_spec(spec)
    with _configs_importable(Path(name).resolve()):
        spec.loader.exec_module(module)
    return module.get_config(argument)


@contextlib.contextmanager
def _configs_importable(path: Path) -> Iterator[None]:
    """Makes the folder `configs` above `path` the package of that name, for a while."""
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
    """Names the override that does not fit, and the nearest key that exists."""
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


def find_config(name: str) -> str:
    """The path of a file of `configs/`, in a clone or in an installed package."""
    package = Path(racm3_jax.__file__).parent
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / name).is_file():
            return str(folder / name)
    raise UsageError(f"the config {name} is not part of this installation")


def _train(arguments: Arguments) -> None:
    from racm3_jax import run

    run.train(read_config(arguments.config_flags), arguments.workdir)


def _evaluate(arguments: Arguments) -> None:
    from racm3_jax import run

    default = find_config(f"eval/{arguments.suite}.py")
    run.evaluate(read_config(arguments.config_flags, default), arguments.workdir)


def _quickstart(arguments: Arguments) -> None:
    from racm3_jax import quickstart

    default = find_config("flagworld_quickstart.py")
    if arguments.short:
        default += ":short"
    quickstart.main(
        read_config(arguments.config_flags, default), Path(arguments.workdir)
    )


def _generate(arguments: Arguments) -> None:
    from PIL import Image

    from racm3_jax import run

    generator = run.load(arguments.workdir, memory=arguments.memory)
    output = generator.text_to_image(
        arguments.prompt,
        num_samples=arguments.num_samples,
        num_retrieved=arguments.num_retrieved,
        seed=arguments.seed,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
    )
    from racm3_jax.evaluation.pictures import tile

    picture = tile(output.images)
    Image.fromarray(picture).save(arguments.out)
    _report(arguments, output, {"out": arguments.out})


def _caption(arguments: Arguments) -> None:
    from racm3_jax import run
    from racm3_jax.documents.images import read_image

    image = read_image(arguments.image)
    generator = run.load(arguments.workdir, memory=arguments.memory)
    output = generator.caption(
        image,
        num_samples=arguments.num_samples,
        num_retrieved=arguments.num_retrieved,
        seed=arguments.seed,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
    )
    _report(arguments, output, {"captions": output.texts})


def _report(arguments: Arguments, output: Any, more: dict[str, Any]) -> None:
    """Prints what was made and which documents it was made from."""
    retrieved = [
        {
            "id": document.id,
            "score": _number(score),
            "source": document.source,
            "licence": document.metadata.get("licence", ""),
        }
        for document, score in zip(
            output.retrieved.documents, output.retrieved.scores, strict=True
        )
    ]
    record = {
        "prompt": output.prompt,
        "seed": output.seed,
        "scores": [_number(score) for score in output.scores],
        "retrieved": retrieved,
        **more,
    }
    if arguments.json:
        print(json.dumps(record))
        return
    for caption in more.get("captions", []):
        print(caption)
    if "out" in more:
        print(f"wrote {more['out']}")
    for entry in retrieved:
        print(f"  retrieved {entry['id']} (score {entry['score']:.3f})")


def _number(value: float) -> float | None:
    """JSON has no NaN, which is the score of a document that was picked by hand."""
    return round(float(value), 4) if math.isfinite(value) else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="racm3",
        description="Retrieval-augmented multimodal language modelling (RA-CM3).",
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error came from"
    )
    parser.add_argument(
        "--version", action="version", version=f"racm3_jax {racm3_jax.__version__}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(
        name: str, command: Callable[[Arguments], None], text: str, **more: Any
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command, name=name, **more)
        return sub

    config_help = "; takes --config=FILE.py[:arg] and --config.key=value"
    sub = add("quickstart", _quickstart, "The main job on flagworld, in minutes.")
    sub.set_defaults(takes_config=True)
    sub.add_argument("--workdir", default="racm3_out")
    sub.add_argument("--short", action="store_true", help="under 90 seconds, for CI")
    sub = add("train", _train, f"Train or resume{config_help}.", takes_config=True)
    sub.add_argument("--workdir", required=True)
    sub = add("evaluate", _evaluate, f"Run a suite{config_help}.", takes_config=True)
    sub.add_argument("--suite", default="flagworld", choices=["flagworld"])
    sub.add_argument("--workdir", default="racm3_evaluation")

    for name, command, text, needs in (
        ("generate", _generate, "Draw what a prompt says.", "prompt"),
        ("caption", _caption, "Describe an image.", "image"),
    ):
        sub = add(name, command, text)
        sub.add_argument("--workdir", required=True, help="of quickstart or train")
        sub.add_argument(f"--{needs}", required=True)
        sub.add_argument("--memory", default=None, help="another memory directory")
        sub.add_argument("--num_samples", type=int, default=1)
        sub.add_argument("--num_retrieved", type=int, default=2)
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--temperature", type=float, default=1.0)
        sub.add_argument("--top_p", type=float, default=0.9)
        sub.add_argument("--json", action="store_true", help="one line of JSON")
        if name == "generate":
            sub.add_argument("--out", default="sample.png")
    return parser


if __name__ == "__main__":
    sys.exit(main())
