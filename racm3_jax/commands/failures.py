"""Error messages of commands: one sentence that names the path and what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# What to do, by errno.
_WORDS = {
    errno.ENOSPC: "the disk is full: free some space, or give a path on another disk",
    errno.EDQUOT: "your quota is exceeded: free some space, or give another path",
    errno.EFBIG: "the file is too large for this disk: give a path on another disk",
    errno.EROFS: "this file system is read-only: give another path",
    errno.EACCES: "permission denied: change its permissions, or give another path",
    errno.EPERM: "permission denied: change its permissions, or give another path",
    errno.ENAMETOOLONG: "the name is too long: give a shorter path",
    errno.ENOTDIR: "a part of this path is a file, not a folder: give another path",
    errno.EISDIR: "this is a folder, not a file: give the path of a file",
    errno.ENOENT: "there is no such file or folder: check the path",
    errno.EEXIST: "this exists already: give another path",
    errno.ELOOP: "this link points to itself: give another path",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: close some programs",
    errno.ENOMEM: "there is not enough memory: close some programs",
    errno.EIO: "the disk has read or write errors: check it, or give another path",
}
_SHOWN_LENGTH = 120
_MAX_LENGTH = 2000


def explain(error: BaseException) -> str:
    """The message of an error that a user can correct."""
    if isinstance(error, OSError) and error.errno is not None:
        words = _WORDS.get(error.errno) or f"{error.strerror}: check the path"
        paths = [p for p in (error.filename, error.filename2) if p not in (None, "")]
        text = ": ".join([" -> ".join(map(_show, paths)), words]) if paths else words
    elif isinstance(error, UnicodeError):
        text = f"a file is not UTF-8 text ({error}): save it as UTF-8, or give another"
    else:
        text = str(error) or type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}…"


def _show(path: object) -> str:
    text = os.fsdecode(path) if isinstance(path, bytes) else str(path)
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}…"


def is_missing_setting(error: BaseException) -> bool:
    """Whether the error is a missing setting of a config."""
    if not isinstance(error, AttributeError | KeyError) or error.__traceback__ is None:
        return False
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return "ml_collections" in Path(trace.tb_frame.f_code.co_filename).parts
