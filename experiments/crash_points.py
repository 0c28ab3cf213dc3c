"""Simulates a crash at one chosen write, rename or delete, inside the process.

    with crash_at(7):      # the seventh change of the file system does not happen,
        build(...)         # nor anything after it

Every function of the operating system that changes files is wrapped: renames, deletes,
new folders, files opened for writing, and what is written into them (the write at which
the process dies is half done). After the chosen point every further change raises too, so
that no `finally` can clean up, as after a kill. `count_points` gives their number.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any, Self
from unittest import mock

_CHANGES = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "truncate")


class Crash(BaseException):
    """The simulated end of the process."""


class Points:
    """The changes made so far.

    Attributes:
      changes: name and target of each.
    """

    def __init__(self, last: int | None) -> None:
        self.changes: list[str] = []
        self._last = last

    @property
    def dead(self) -> bool:
        return self._last is not None and len(self.changes) >= self._last

    def pass_one(self, name: str, target: Any) -> None:
        """Counts one change, or crashes."""
        if self.dead:
            raise Crash
        self.changes.append(f"{name} {target}")
        if self.dead:
            raise Crash


class _File:
    """An open file whose writes are counted."""

    def __init__(self, file: Any, points: Points) -> None:
        self._file, self._points = file, points

    def write(self, data: Any) -> int:
        try:
            self._points.pass_one("write", getattr(self._file, "name", "?"))
        except Crash:
            with contextlib.suppress(ValueError, OSError):
                self._file.write(data[: len(data) // 2])
                self._file.flush()
            raise
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextlib.contextmanager
def crash_at(number: int | None) -> Iterator[Points]:
    """Crashes at change `number` (1 is the first); None only counts.

    Raises:
      Crash: when the change is reached.
    """
    points = Points(number)

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            points.pass_one(name, " -> ".join(map(str, args)))
            return function(*args, **kwargs)

        return change

    def open_file(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wxa+"):
            return original(file, mode, *args, **kwargs)
        points.pass_one("open", file)
        opened = original(file, mode, *args, **kwargs)
        stack.callback(opened.close)  # as the end of the process does
        return _File(opened, points)

    original = builtins.open
    os_open = os.open

    def open_descriptor(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT and not os.path.exists(path):
            points.pass_one("create", path)
        return os_open(path, flags, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name in _CHANGES:
            stack.enter_context(
                mock.patch.object(os, name, wrap(name, getattr(os, name)))
            )
        stack.enter_context(mock.patch.object(os, "open", open_descriptor))
        stack.enter_context(mock.patch.object(builtins, "open", open_file))
        stack.enter_context(mock.patch.object(io, "open", open_file))
        yield points


def count_points(action: Callable[[], object]) -> int:
    """Number of file-system changes of an action."""
    with crash_at(None) as points:
        action()
    return len(points.changes)


def crashed(action: Callable[[], object], number: int) -> bool:
    """Runs an action up to change `number`; False if it finishes before."""
    try:
        with crash_at(number):
            action()
    except Crash:
        return True
    return False
