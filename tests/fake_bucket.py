"""Buckets on this disk, which several processes see: fsspec's `gs://` for tests.

    $RACM3_TEST_BUCKETS/me/run/config.json      gs://me/run/config.json

As in an object store, files are written and replaced atomically, there are no folders, and
a bucket must exist before anything is written to it. The bucket `closed` is unreadable.
"""

from __future__ import annotations

import os
import pathlib
import sys

import fsspec
import pytest
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem

VARIABLE = "RACM3_TEST_BUCKETS"


class FolderBuckets(AbstractFileSystem):
    """Every bucket is a subfolder of the folder in the variable."""

    protocol = "gs"
    cachable = False
    # (method, path) of every reading call, for tests.
    log: list[tuple[str, str, int | None, int | None]] = []  # noqa: RUF012

    def _path(self, path):
        path = self._strip_protocol(path)
        top = pathlib.Path(os.environ[VARIABLE])
        bucket = path.partition("/")[0]
        if bucket == "closed":
            raise PermissionError(f"Forbidden: {path}")
        if not (top / bucket).is_dir():
            raise FileNotFoundError(
                f"b/{bucket}/o: The specified bucket does not exist"
            )
        return top / path

    def info(self, path, **_):
        local, name = self._path(path), self._strip_protocol(path)
        self.log.append(("info", name, None, None))
        if local.is_file():
            status = local.stat()
            return {
                "name": name,
                "type": "file",
                "size": status.st_size,
                "generation": f"{status.st_mtime_ns}-{status.st_ino}",
            }
        if local.is_dir() and any(p.is_file() for p in local.rglob("*")):
            return {"name": name, "type": "directory", "size": 0}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        local, name = self._path(path), self._strip_protocol(path)
        if local.is_file():
            found = [self.info(name)]
        elif local.is_dir():
            found = [
                self.info(f"{name}/{p.name}")
                for p in sorted(local.iterdir())
                if not p.name.startswith(".writing-")
            ]
        else:
            raise FileNotFoundError(path)
        return found if detail else [entry["name"] for entry in found]

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **_):
        assert maxdepth is None and not withdirs and detail
        local, name = self._path(path), self._strip_protocol(path)
        found = sorted(p for p in local.rglob("*") if p.is_file())
        names = [f"{name}/{p.relative_to(local).as_posix()}" for p in found]
        return {n: self.info(n) for n in names if "/.writing-" not in n}

    def cat_file(self, path, start=None, end=None, **_):
        self.log.append(("cat_file", self._strip_protocol(path), start, end))
        return self._path(path).read_bytes()[start:end]

    def pipe_file(self, path, value, **_):
        local = self._path(path)
        local.parent.mkdir(parents=True, exist_ok=True)
        writing = local.with_name(f".writing-{os.getpid()}-{local.name}")
        writing.write_bytes(value)
        os.replace(writing, local)

    def put_file(self, lpath, rpath, **_):
        self.pipe_file(rpath, pathlib.Path(lpath).read_bytes())

    def get_file(self, rpath, lpath, **_):
        pathlib.Path(lpath).write_bytes(self.cat_file(rpath))

    def rm_file(self, path):
        local = self._path(path)
        local.unlink()
        while local.parent.parent != pathlib.Path(os.environ[VARIABLE]):
            local = local.parent
            if any(local.iterdir()):
                break
            local.rmdir()


def install() -> None:
    """Makes `gs://` this file system, in a process with the variable."""
    fsspec.register_implementation("gs", FolderBuckets, clobber=True)


@pytest.fixture
def gs(tmp_path, monkeypatch):
    """The folder of `gs://`, with one bucket in it, `me`."""
    top = tmp_path / "buckets"
    (top / "me").mkdir(parents=True)
    monkeypatch.setenv(VARIABLE, str(top))
    monkeypatch.setitem(_registry, "gs", FolderBuckets)
    FolderBuckets.log.clear()
    return top


if __name__ == "__main__":
    # `python fake_bucket.py train --workdir=gs://…` is `racm3 train …` with such buckets.
    install()
    from racm3_jax import cli

    sys.exit(cli.main())
