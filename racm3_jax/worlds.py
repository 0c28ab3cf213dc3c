"""Worlds, and suites of evaluation, by name: this package's, and those of others.

    config.world_name, "flagworld:train" (a source)  ->  find_world  ->  World
    config.suite                                     ->  find_suite  ->  SuiteEntry

An installed package adds its own as entry points; nothing is imported until it is named:

    [project.entry-points."racm3_jax.worlds"]
    emojiworld = "emojiworld:WORLD"
    [project.entry-points."racm3_jax.suites"]
    emojiworld = "emojiworld.suites:SUITE"
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from racm3_jax.types import Document

Split = Literal["train", "heldout_memory", "heldout_test"]
SPLITS: tuple[Split, ...] = ("train", "heldout_memory", "heldout_test")

# The world of a config that names none.
DEFAULT_WORLD = "flagworld"
# "module:attribute" by name; a package of the same name does not replace them.
WORLDS = {"flagworld": "racm3_jax.flagworld:WORLD"}
SUITES = {
    "flagworld": "racm3_jax.flagworld.entries:FLAGWORLD",
    "flagworld_tasks": "racm3_jax.flagworld.entries:TASKS",
    "coco": "racm3_jax.wiring.suites:COCO",
    "likelihood": "racm3_jax.wiring.suites:LIKELIHOOD",
}
WORLDS_GROUP, SUITES_GROUP = "racm3_jax.worlds", "racm3_jax.suites"

T = TypeVar("T")


def _unchanged(settings: Any) -> Any:
    return settings


@dataclasses.dataclass(frozen=True)
class World:
    """Documents that are generated from a few settings, some of them held out.

    The module that defines it is imported wherever documents are read: it should need
    NumPy only.

    Attributes:
      settings: the frozen dataclass of `config.world`; equal settings give equal
        documents.
      read: (settings, split) -> documents: "train"; "heldout_memory", of groups that no
        training sees; "heldout_test", other documents of these groups.
      group_key: the metadata key of the groups.
      source: the settings that a source may change (`NAME:train;seed=1`), with their
        defaults there.
      measured: settings -> those of the "heldout_test" documents that trainings are
        evaluated on.
      count: settings -> number of documents in "train" and "heldout_memory", for
        progress bars.
      class_key: the metadata key of a document's class as its texts spell it, for
        episodes, pairing and k-shot questions; "" is `group_key`.
    """

    settings: type[Any]
    read: Callable[[Any, Split], Iterator[Document]]
    group_key: str
    source: Mapping[str, bool | int | str]
    measured: Callable[[Any], Any] = _unchanged
    count: Callable[[Any], int | None] = lambda settings: None
    class_key: str = ""


@dataclasses.dataclass(frozen=True)
class SuiteEntry:
    """A suite of evaluation.

    Attributes:
      config: the frozen dataclass of its config files, with one field per key, see
        `wiring.sections`.
      build: (config, work directory) -> `evaluation.suite.Suite`.
    """

    config: type[Any]
    build: Callable[[Any, Path], Any]


def list_worlds() -> list[str]:
    """The names of all worlds."""
    return list(_places(WORLDS, WORLDS_GROUP))


def list_suites() -> list[str]:
    """The names of all suites."""
    return list(_places(SUITES, SUITES_GROUP))


def find_world(name: str) -> World:
    """Imports a world.

    Raises:
      ValueError: there is none of this name, or an entry point is something else.
    """
    return _find(name, WORLDS, WORLDS_GROUP, World)


def find_suite(name: str) -> SuiteEntry:
    """Imports a suite.

    Raises:
      ValueError: there is none of this name, or an entry point is something else.
    """
    return _find(name, SUITES, SUITES_GROUP, SuiteEntry)


def _find(name: str, own: Mapping[str, str], group: str, cls: type[T]) -> T:
    # Reading the entry points of all installed packages takes a while.
    places = own if name in own else _places(own, group)
    if name not in places:
        raise ValueError(
            f"unknown name {name!r}; allowed: {', '.join(sorted(places))}, or an entry "
            f"point {group} of an installed package"
        )
    found = pkgutil.resolve_name(places[name])
    if not isinstance(found, cls):
        # Commands show the message of a ValueError alone.
        raise ValueError(  # noqa: TRY004
            f"the entry point {name} of {group}, {places[name]}, is of type "
            f"{type(found).__name__}; it must be a racm3_jax.worlds.{cls.__name__}"
        )
    return found


def _places(own: Mapping[str, str], group: str) -> dict[str, str]:
    """`own`, then the entry points of installed packages."""
    import importlib.metadata

    installed = importlib.metadata.entry_points(group=group)
    return {**own, **{e.name: e.value for e in installed if e.name not in own}}
