"""The argument parser: one-sentence errors, suggestions, defaults in the help."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from racm3_jax.commands.configs import UsageError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-sentence errors."""

    def error(self, message: str) -> NoReturn:
        """Raises the message as one sentence, with a hint to --help."""
        sentence = message.removeprefix("argument ")
        raise UsageError(f"{sentence}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """For an invalid choice, suggests the nearest, or lists all of them."""
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        hint = suggest(str(value), known) or f"; known: {', '.join(known)}"
        raise argparse.ArgumentError(action, f"there is no {value!r}{hint}")


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` with the nearest name, or "" if none is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def find_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands, at any depth."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from find_parsers(child)


def complete(parser: argparse.ArgumentParser) -> None:
    """Shows the defaults in the help, and stores the parser of each command."""
    for child in find_parsers(parser):
        child.set_defaults(parser=child)
        for action in child._actions:
            worth_saying = action.default not in (None, argparse.SUPPRESS, "", [])
            if action.option_strings and worth_saying and action.nargs != 0:
                action.help = f"{action.help} (default: {action.default})"


def join_config_values(words: Sequence[str]) -> list[str]:
    """`--config.key value` -> `--config.key=value`, as ml_collections accepts both.

    A word that starts with `--` is not a value: `--config.key` alone sets it to True.
    """
    joined: list[str] = []
    for word in words:
        last = joined[-1] if joined else ""
        waits = last.startswith("--config.") and "=" not in last
        if waits and not word.startswith("--"):
            joined[-1] = f"{last}={word}"
        else:
            joined.append(word)
    return joined


def check_unknown(
    words: Sequence[str], parser: argparse.ArgumentParser, takes_config: bool
) -> None:
    """Refuses unknown arguments, except the settings of a config.

    Raises:
      UsageError: names the first one, and the nearest option.
    """
    unknown = [w for w in words if not (takes_config and w.startswith("--config."))]
    if unknown:
        word = unknown[0]
        options = [name for a in parser._actions for name in a.option_strings]
        hint = suggest(word.split("=")[0], options) if word.startswith("-") else ""
        raise UsageError(f"unknown argument {word!r}{hint}; see {parser.prog} --help")
