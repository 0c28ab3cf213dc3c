"""Sources in buckets: files that match a URL pattern, and images next to them.

    webdataset:gs://me/cc3m/{00000..00331}.tar     one listing per folder, not per file
    parquet:s3://me/**/*.parquet

Document ids are the same as for local files.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re

from racm3_jax.buckets import Bucket, BucketPath, is_url
from racm3_jax.documents.readers.files import MAX_FILE_BYTES, is_hidden
from racm3_jax.documents.readers.records import BadRecord

# Kinds that read from buckets.
KINDS = ("webdataset", "parquet", "jsonl")
_SPECIAL = re.compile(r"[*?\[{]")


def refuse_kind(kind: str, path: str) -> None:
    """Refuses a URL for a reader of local files.

    Raises:
      ValueError: says which kinds read from buckets.
    """
    if kind not in KINDS and is_url(path):
        raise ValueError(
            f"{kind}:{path} is in a bucket, from which only {', '.join(KINDS)} can be "
            "read: copy it to this machine, or mount the bucket"
        )


def match_urls(
    pattern: str, expand: list[str], usual: str
) -> tuple[str, list[BucketPath]]:
    """The fixed part of a URL with a pattern, and the files that match, sorted.

    Args:
      pattern: the URL.
      expand: the patterns with braces expanded.
      usual: usual file names.

    Raises:
      FileNotFoundError: nothing matches, or a name in braces does not exist.
      ValueError: a folder, or the bucket's client is not installed.
      OSError: the bucket cannot be read.
    """
    whole = BucketPath(pattern)
    if not _SPECIAL.search(pattern):
        if whole.is_file():
            return posixpath.dirname(pattern), [whole]
        if Bucket(pattern).find():
            raise ValueError(
                f"{pattern!r} is a folder; name its files, as "
                f"{posixpath.join(pattern, usual)!r}"
            )
        raise FileNotFoundError(f"there is no {pattern}")
    scheme, _, rest = pattern.partition("://")
    parts = rest.split("/")
    num_fixed = next(n for n, part in enumerate(parts) if _SPECIAL.search(part))
    if num_fixed == 0:
        raise ValueError(f"{pattern!r} names no bucket: its first part must be one")
    fixed = f"{scheme}://{'/'.join(parts[:num_fixed])}"
    wanted = [name.removeprefix(f"{fixed}/") for name in expand]
    found = Bucket(fixed).find(depth=_depth(wanted))
    if not found:
        raise FileNotFoundError(f"there is no file below {fixed}")
    names: set[str] = set()
    missing = []
    for name in wanted:
        matches = {name} & found.keys()
        if not matches and _SPECIAL.search(name):
            matches = {
                match
                for match in found
                if _fits(name.split("/"), match.split("/")) and not is_hidden(match)
            }
        names |= matches
        if not matches:
            missing.append(name)
    if not names:
        raise FileNotFoundError(f"no file matches {pattern}")
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the names in {pattern} do not exist; the first is "
            f"{fixed}/{missing[0]}"
        )
    return fixed, [BucketPath(f"{fixed}/{n}", found[n].size) for n in sorted(names)]


def _depth(names: list[str]) -> int | None:
    """Maximum depth of matches; None is unlimited."""
    if any("**" in name for name in names):
        return None
    return max(name.count("/") for name in names) + 1


def _fits(parts: list[str], names: list[str]) -> bool:
    """Matches like `glob`: `*` within a folder, `**` any number of folders."""
    if not parts:
        return not names
    if parts[0] == "**":
        return _fits(parts[1:], names) or (bool(names) and _fits(parts, names[1:]))
    return (
        bool(names)
        and fnmatch.fnmatchcase(names[0], parts[0])
        and _fits(parts[1:], names[1:])
    )


class BucketFolder:
    """A folder in a bucket, to read images by relative path."""

    def __init__(self, url: str) -> None:
        self._bucket = Bucket(url)

    def read(self, name: str) -> bytes:
        """The bytes of a file below the folder.

        Raises:
          BadRecord: another URL, a path outside the folder, or too large.
          FileNotFoundError: there is no such file.
          OSError: it cannot be read.
        """
        url = self._bucket.url
        inner = posixpath.normpath(name.removeprefix(f"{url}/").replace("\\", "/"))
        if is_url(inner):
            raise BadRecord(
                "image is a URL", f"{name[:200]} is not in {url}; copy the images there"
            )
        if inner.startswith(("/", "..")) or not inner.isprintable():
            raise BadRecord(
                "path outside the folder",
                f"{name[:200]!r} leads out of {url}; only files below it are read",
            )
        path = BucketPath(f"{url}/{inner}")
        if path.size > MAX_FILE_BYTES:
            raise BadRecord(
                "oversized file",
                f"{path} has {path.size} bytes, more than the {MAX_FILE_BYTES} allowed",
            )
        return path.read_range(0, path.size)
