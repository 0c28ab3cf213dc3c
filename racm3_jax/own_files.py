"""Output files that a later run may replace: images, records, tables, pages.

Each carries a marker, and files without one are never replaced:

    .png           a text chunk "racm3" (its text is the record of what was made)
    .json          {"made_by": "racm3_jax", ...}
    .html, .md     a line that names racm3_jax

A command calls `check` before its work and a `write_` function after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from racm3_jax import storage

# The keyword of the PNG's text chunk that holds the record.
PNG_KEY = "racm3"
MAKER = "racm3_jax"
HTML_MARK = f"<meta name='generator' content='{MAKER}'>"
MARKDOWN_MARK = f"<!-- {MAKER} -->"
# Chunks of text come before the pixels.
_PNG_HEAD_BYTES = 1 << 16
_PNG_MARK = re.compile(rb"[it][TE]Xt" + PNG_KEY.encode() + rb"\x00")
# Files of version 0.1.0 have no marker; these titles and keys identify them.
_OLD_HTML_MARK = "<title>racm3 report</title>"
_OLD_KEYS = ({"settings", "results"}, {"point", "metrics"})
_OLD_NAMES = ("samples.png", "table.md")
_MAX_RECORD_BYTES = 1 << 26


def check(
    *paths: str | os.PathLike[str],
    inputs: Iterable[str | os.PathLike[str]] = (),
    change: str = "give another path",
    key: str | None = None,
) -> None:
    """Refuses paths that cannot be written, or that racm3 did not write.

    Args:
      *paths: of files that will be written, with missing folders created.
      inputs: files that the same command reads.
      key: a key that only records of this kind have, if `paths` are records.
      change: what to do; ends the error message.

    Raises:
      FileExistsError: a path is an input, or a file that racm3 did not write.
      OSError: a path is a folder, or below a file, or in a read-only folder.
    """
    for path in map(Path, paths):
        check_place(path, change)
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            continue
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, not a file: {change}")
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise FileExistsError(f"{path} is not a regular file: {change}")
        for read in inputs:
            if os.path.exists(read) and os.path.samefile(read, path):
                raise FileExistsError(
                    f"{path} is read by this command, so it is not replaced: {change}"
                )
        if not is_own(path, key):
            raise FileExistsError(
                f"{path} exists and is not what this command writes, so it is left alone: {change}"
            )


def check_png_paths(
    *paths: str | os.PathLike[str],
    inputs: Iterable[str | os.PathLike[str]] = (),
    change: str = "give another path",
) -> None:
    """Like `check`, for images: their names must end in .png."""
    for path in paths:
        if Path(path).suffix.lower() != ".png":
            raise ValueError(
                f"{os.fspath(path)!r} does not end in .png, the format that is written: "
                f"{change}"
            )
    check(*paths, inputs=inputs, change=change)


def check_place(path: Path, change: str) -> None:
    """Refuses a path whose folder cannot be created or written, or is a memory.

    Raises:
      OSError: names the folder and ends with `change`.
    """
    path = path.absolute()
    for folder in path.parents:
        try:
            mode = os.stat(folder).st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue  # a file in the way is named further up
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(
                f"{folder} is a file, so {path} cannot be written: {change}"
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(
                f"the folder {folder} may not be written to: {change}"
            )
        break
    if path.is_symlink() and not path.exists():
        raise FileExistsError(f"{path} is a link to nothing: {change}")
    for folder in path.parents:
        if _is_memory(folder):
            raise FileExistsError(
                f"{path} is inside {folder}, a memory, which holds its own files only: "
                f"{change}"
            )


def _is_memory(folder: Path) -> bool:
    manifest = folder / "manifest.json"
    return manifest.is_file() and b'"racm3-memory"' in manifest.read_bytes()


def is_own(path: str | os.PathLike[str], key: str | None = None) -> bool:
    """Whether the file at `path` may be replaced: written by racm3, or empty.

    Args:
      path: of the file.
      key: a key that a record must have to be replaced by one of its kind.
    """
    path = Path(path)
    if not path.is_file():
        return False
    if path.stat().st_size == 0:
        return True
    return _is_marked(path, key) or _is_of_old_run(path)


def _is_marked(path: Path, key: str | None) -> bool:
    suffix = path.suffix.lower()
    if suffix == ".png":
        with open(path, "rb") as file:
            head = file.read(_PNG_HEAD_BYTES)
        return head.startswith(b"\x89PNG") and _PNG_MARK.search(head) is not None
    if path.stat().st_size > _MAX_RECORD_BYTES:
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    if suffix == ".json":
        content = _parse(text)
        return _is_record(content) and (key is None or key in content)
    if suffix == ".html":
        return HTML_MARK in text or _OLD_HTML_MARK in text
    return suffix == ".md" and MARKDOWN_MARK in text


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_record(content: Any) -> bool:
    if isinstance(content, list):  # sweep.json
        return all(isinstance(x, dict) and set(x) in _OLD_KEYS for x in content)
    if not isinstance(content, dict):
        return False
    return _is_marked_record(content) or set(content) in _OLD_KEYS


def _is_marked_record(content: Mapping[str, Any]) -> bool:
    versions = content.get("versions")
    named = isinstance(versions, Mapping) and MAKER in versions
    return named or content.get("made_by") == MAKER


def _is_of_old_run(path: Path) -> bool:
    """Whether `path` is one of the unmarked files of a run of version 0.1.0."""
    if path.name == "loss.png":
        with open(path, "rb") as file:
            drawn = b"Matplotlib" in file.read(_PNG_HEAD_BYTES)
        return drawn and (path.parent / "metrics.jsonl").is_file()
    if path.name not in _OLD_NAMES:
        return False
    page, record = path.parent / "report.html", path.parent / "results.json"
    if page.is_file():
        text = page.read_text(encoding="utf-8", errors="replace")
        if _OLD_HTML_MARK in text and HTML_MARK not in text:
            return True
    if record.is_file() and record.stat().st_size <= _MAX_RECORD_BYTES:
        content = _parse(record.read_text(encoding="utf-8", errors="replace"))
        return isinstance(content, dict) and set(content) in _OLD_KEYS
    return False


def write_png(
    path: str | os.PathLike[str],
    pixels: UInt8[np.ndarray, "height width 3"],
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes an image with its record inside.

    Raises:
      OSError: the disk is full, …; the old file is unchanged.
    """
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, json.dumps(record or {}))
    with _replacing(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG", pnginfo=info)


def write_figure(path: str | os.PathLike[str], figure: Any) -> None:
    """Writes a matplotlib figure as a PNG with the marker."""
    with _replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=100, metadata={PNG_KEY: "{}"})


def write_json(
    path: str | os.PathLike[str], content: Mapping[str, Any], sort_keys: bool = False
) -> None:
    """Writes a record; if it has no version of racm3, adds the marker as a key."""
    if not _is_marked_record(content):
        content = {"made_by": MAKER, **content}
    text = json.dumps(content, indent=2, sort_keys=sort_keys) + "\n"
    with _replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_html(path: str | os.PathLike[str], head: str, body: str) -> None:
    """Writes a page; `head` is the content of its head besides the marker."""
    start = f"<!doctype html><html lang='en'><head><meta charset='utf-8'>{HTML_MARK}"
    text = f"{start}\n{head}</head><body>\n{body}\n</body></html>\n"
    with _replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_markdown(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text with the marker as a comment at its end."""
    with _replacing(path) as partial:
        partial.write_text(f"{text}\n\n{MARKDOWN_MARK}\n", encoding="utf-8")


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`storage.replacing` that creates the folder and follows a link."""
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    new = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with storage.replacing(path) as partial:
            yield partial
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()
        raise
