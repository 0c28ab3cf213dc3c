"""Memories in buckets: copied to a local disk and searched there.

    gs://me/memory/               read-only
    ~/.cache/racm3/memories/
      5f0c…/                      one URL
        staged.json               the URL, and which copies racm3 made here
        manifest/                 of the URL, as last seen
        9b1e….partial/            being copied; an interrupted copy resumes there
        9b1e…/                    a memory; its name is its fingerprint
        9b1e….used                locked by every process that has it open

The first process of a machine copies, the others wait. Sizes and checksums come from
the manifest. The fingerprint covers the manifest except removals: those, and a table of
neighbours, are copied again when they change. If the memory at the URL has another
fingerprint, it is copied next to the old copy, which is then removed, unless a process
has it open or racm3 did not make it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Mapping
from typing import Any

from racm3_jax import storage
from racm3_jax.buckets import COPY_BYTES, Bucket, Found, each
from racm3_jax.memory import format as format_lib
from racm3_jax.memory.format import MANIFEST_FILE, TABLE_DIRECTORY
from racm3_jax.progress import open_progress

RECORD_FILE = "staged.json"
_FORMAT = "racm3-staged-memories"
_COPY_NAME = re.compile(r"[0-9a-f]{16}")
_SEEN_DIRECTORY = "manifest"
# Shared locks on the copies that this process may have open, until it exits.
_in_use: dict[pathlib.Path, int] = {}


def cache_directory(chosen: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """`chosen`, or `memories` in RACM3_CACHE, or `~/.cache/racm3/memories`."""
    if chosen:
        return pathlib.Path(chosen).expanduser().absolute()
    base = os.environ.get("RACM3_CACHE", "")
    base = "~/.cache/racm3" if base.lower() in ("", "off") else base
    return (pathlib.Path(base).expanduser() / "memories").absolute()


def stage(
    url: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """The folder of an up-to-date copy of a memory in a bucket.

    Args:
      url: of the memory's folder.
      cache: folder of the copies; see `cache_directory`.

    Raises:
      FileNotFoundError: there is no memory at `url`.
      IntegrityError: the memory there is damaged.
      OSError: the bucket cannot be read, or the disk is full.
      ValueError: the bucket's client is not installed, or an unsupported format.
    """
    bucket = Bucket(str(url))
    top = cache_directory(cache)
    try:
        data = bucket.read(MANIFEST_FILE)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no memory at {bucket.url} (it has no {MANIFEST_FILE}): give "
            "another URL, or copy a memory there"
        ) from error
    place = top / hashlib.sha256(bucket.url.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    with storage.locked(place / "lock"):
        manifest = _read_manifest(place / _SEEN_DIRECTORY, data, bucket.url)
        copy = place / format_lib.fingerprint(manifest)
        record = _read_record(place, bucket.url)
        known = record["copies"].setdefault(copy.name, {})
        if not copy.is_dir():
            known.clear()
            _write_record(place, record)
            _copy_all(bucket, data, manifest["files"], copy)
        _refresh(bucket, data, copy, known)
        _use(copy)
        for old in [n for n in record["copies"] if n != copy.name]:
            if _remove(place / old):
                del record["copies"][old]
        _write_record(place, record)
    return copy


def _read_manifest(folder: pathlib.Path, data: bytes, url: str) -> dict[str, Any]:
    """Checks a manifest from a bucket like one in a folder."""
    folder.mkdir(exist_ok=True)
    storage.write_file(folder / MANIFEST_FILE, data)
    try:
        return format_lib.read_manifest(folder)
    except ValueError as error:
        words = str(error).replace(format_lib.rebuild_remedy(folder), "copy it again")
        raise type(error)(words.replace(str(folder), url)) from None


def refuse_staged(path: pathlib.Path) -> None:
    """Refuses to change a copy made by `stage`: the next staging would undo it.

    Raises:
      ValueError: names the URL.
    """
    if not _COPY_NAME.fullmatch(path.name):
        return
    try:
        url = json.loads((path.parent / RECORD_FILE).read_bytes())["url"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    raise ValueError(
        f"{path} is a copy of {url}, and changes to it would be lost: change the "
        "original memory and upload it again"
    )


def _read_record(place: pathlib.Path, url: str) -> dict[str, Any]:
    try:
        record = json.loads((place / RECORD_FILE).read_bytes())
        known = record["copies"]
        if record["format"] == _FORMAT and record["url"] == url:
            copies = {n: dict(v) for n, v in known.items() if _COPY_NAME.fullmatch(n)}
            return {**record, "copies": copies}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {"format": _FORMAT, "url": url, "copies": {}}


def _write_record(place: pathlib.Path, record: Mapping[str, Any]) -> None:
    storage.write_file(
        place / RECORD_FILE, (json.dumps(record, indent=1) + "\n").encode()
    )


def _partial(copy: pathlib.Path) -> pathlib.Path:
    return copy.with_name(f"{copy.name}.partial")


def _copy_all(
    bucket: Bucket, data: bytes, files: Mapping[str, Any], copy: pathlib.Path
) -> None:
    """Copies the files that a manifest lists to `copy`, atomically."""
    if not all(storage.is_inside(n) and _is_size(e) for n, e in files.items()):
        raise storage.IntegrityError(
            f"{bucket.url}/{MANIFEST_FILE} is damaged: its list of files is invalid"
        )
    partial = _partial(copy)
    partial.mkdir(exist_ok=True)
    sizes = {name: entry["bytes"] for name, entry in files.items()}
    there = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file())
    wanted = sum(sizes.values()) - there
    free = shutil.disk_usage(partial).free
    if wanted > free:
        raise OSError(
            f"the memory at {bucket.url} needs {wanted / 1e9:.1f} GB more, but the "
            f"disk of {partial} has {free / 1e9:.1f} GB: free some space, or give another "
            "--memory_cache (config.memory.cache)"
        )
    lock = threading.Lock()
    with open_progress(
        total=sum(sizes.values()), desc=f"copy {bucket.url}", unit="bytes"
    ) as bar:

        def show(num_bytes: int) -> None:
            with lock:
                bar.update(num_bytes)

        each(
            lambda name: _copy_file(bucket, name, files[name], partial / name, show),
            sorted(sizes, key=lambda name: -sizes[name]),
        )
    for name in files:
        storage.sync_file(partial / name)
    storage.write_file(partial / MANIFEST_FILE, data)
    os.rename(partial, copy)
    storage.sync_directory(copy.parent)


def _is_size(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int)


def _copy_file(
    bucket: Bucket, name: str, entry: Mapping[str, Any], path: pathlib.Path, show: Any
) -> None:
    """Copies by ranges, resuming an interrupted copy; verified by its checksum.

    Raises:
      IntegrityError: the file does not match the manifest.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    started = path.stat().st_size if path.exists() else 0
    for start in dict.fromkeys((started, 0)):
        with open(path, "r+b" if start else "wb") as file:
            at = min(start, entry["bytes"])
            file.truncate(at)
            file.seek(at)
            show(at)
            while at < entry["bytes"]:
                stop = min(at + COPY_BYTES, entry["bytes"])
                block = bucket.read(name, at, stop)
                file.write(block)
                show(len(block))
                at += len(block)
                if len(block) == 0:
                    break
        try:
            storage.verify_files(path.parent, {path.name: entry}, "")
            return
        except storage.IntegrityError:
            show(-at)
    path.unlink()
    raise storage.IntegrityError(
        f"{bucket.url}/{name} is not the file that the memory's manifest lists: it is "
        "damaged, or the memory was being replaced; try again, or copy the memory there "
        "again"
    )


def _refresh(
    bucket: Bucket, data: bytes, copy: pathlib.Path, known: dict[str, Any]
) -> None:
    """Copies removals and the table again if they changed.

    Args:
      bucket: the memory's.
      data: its manifest, which counts the removals.
      copy: the local copy.
      known: versions of these files when they were copied; changed in place.
    """
    deny = format_lib.deny_path(copy, format_lib.read_manifest(copy)).name
    found = {name: f for name, f in bucket.find().items() if _is_mutable(name, deny)}
    new = {name: _version(facts) for name, facts in found.items()}
    changed = [n for n in new if known.get(n) != new[n] or not (copy / n).is_file()]
    for name in changed:
        (copy / name).parent.mkdir(exist_ok=True)
        with storage.replacing(copy / name) as partial:
            bucket.get(name, partial)
    if (copy / MANIFEST_FILE).read_bytes() != data:
        storage.write_file(copy / MANIFEST_FILE, data)
    for name in known.keys() - new.keys():
        (copy / name).unlink(missing_ok=True)
    known.clear()
    known.update(new)


def _is_mutable(name: str, deny: str) -> bool:
    folder, _, rest = name.partition("/")
    return name == deny or (
        folder == TABLE_DIRECTORY and storage.is_inside(rest) and "/" not in rest
    )


def _version(facts: Found) -> list[str]:
    return [str(facts.size), *facts.version]


def _use(copy: pathlib.Path) -> None:
    """Prevents other processes from removing a copy while this one runs."""
    if copy in _in_use:
        return
    descriptor = os.open(copy.with_name(f"{copy.name}.used"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    _in_use[copy] = descriptor


def _remove(copy: pathlib.Path) -> bool:
    """Removes an old copy, complete or not; False while a process has it open."""
    used = copy.with_name(f"{copy.name}.used")
    with storage.locked(used, wait=False) as is_free:
        if not is_free:
            return False
        shutil.rmtree(_partial(copy), ignore_errors=True)
        storage.delete_directory(copy)
        used.unlink(missing_ok=True)
    return True
