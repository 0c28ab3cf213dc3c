"""A writer killed at any change of the file system leaves the old or the new files."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

from crash_points import crashed


def check_every_crash(
    path: Path,
    save_old: Callable[[], Any],
    save_new: Callable[[], Any],
    read: Callable[[], Any],
) -> int:
    """Ends `save_new` at every point, with and without an old folder at `path`.

    Args:
      path: of the folder; nothing else may be in its parent.
      save_old: writes the folder that is replaced.
      save_new: writes over it.
      read: a value that differs between old and new; fails where there is nothing.

    Returns:
      How many points there were.
    """
    with mock.patch.object(os, "fsync", lambda descriptor: None):
        return _check(path, save_old, save_new, read)


def _check(path: Path, save_old: Any, save_new: Any, read: Any) -> int:
    kept = path.parent.parent / f"{path.parent.name}.kept"
    save_new()
    new = read()
    shutil.rmtree(path)
    save_old()
    old = read()
    shutil.copytree(path, kept)
    assert old != new
    number = tried = 0
    for replaces in (False, True):
        for number in range(1, 1000):
            shutil.rmtree(path, ignore_errors=True)
            if replaces:
                shutil.copytree(kept, path)
            if not crashed(save_new, number):
                break
            tried += 1
            try:
                found = read()
            except (ValueError, FileNotFoundError):
                assert not replaces and not path.exists(), number
            else:
                assert found == new or (replaces and found == old), number
            save_new()
            assert [p.name for p in path.parent.iterdir()] == [path.name], number
            assert not list(path.rglob(".*")), number
        assert read() == new
    return tried
