"""completion: prints a shell script for tab completion."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from typing import Any

from racm3_jax.commands import arguments as options
from racm3_jax.commands import parser as parsers
from racm3_jax.commands.configs import UsageError, list_configs

_DETAILS = """
bash:  eval "$(racm3 completion bash)"      in ~/.bashrc
zsh:   racm3 completion zsh >~/.zfunc/_racm3   (with ~/.zfunc in $fpath)"""


def register(
    commands: Any, build_parser: Callable[[], argparse.ArgumentParser]
) -> None:
    """Adds `completion` to the parser's subcommands.

    Args:
      commands: of the parser.
      build_parser: builds that parser, with all of its commands.
    """
    text = "Print a script for tab completion."
    sub = commands.add_parser(
        "completion",
        help=text,
        description=f"{text}\n{_DETAILS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(command=lambda arguments: _print(arguments.shell, build_parser()))
    sub.add_argument("shell", choices=("bash", "zsh"), help="the shell")


def _print(shell: str, parser: argparse.ArgumentParser) -> None:
    try:
        import shtab
    except ImportError:
        raise UsageError("completion needs shtab: pip install shtab") from None
    names = " ".join(map(shlex.quote, list_configs()))
    # Names of configs, and files.
    preamble = {
        "bash": f'_racm3_configs() {{ compgen -W "{names}" -- $1; compgen -f -- $1; }}',
        "zsh": f"_racm3_configs() {{ compadd {names}; _files -g '*.py'; }}",
    }
    configs = {"bash": "_racm3_configs", "zsh": "_racm3_configs"}
    for child in parsers.find_parsers(parser):
        for action in child._actions:
            if action.type is options.path:
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
            if "--config" in action.option_strings:
                action.complete = configs  # pyright: ignore[reportAttributeAccessIssue]
    print(shtab.complete(parser, shell, preamble=preamble))  # pyright: ignore[reportArgumentType]
