"""Ways to verify the sha256 of files without reading all of them every time.

    recall              unchanged files that this machine has read before are cached
    describe_together   the processes of a training divide the remaining files
    sample              only a fraction of the files is read

Each is a `describe` of `storage.verify_files`. Results are cached in
`~/.cache/racm3/checksums`, one file per folder and host:

    {"files": {"documents.array_record": {"stamp": [device, inode, bytes, mtime, ctime],
                                          "sha256": "…"}, …}, "sha256": "…"}

A file is considered unchanged as long as its stamp is the same, to the nanosecond. Any
write changes it; so does restoring a file's old mtime, which sets the ctime, on file
systems that have one. Known limit: bytes that change without a write (a failing disk),
or with the same size and times. `racm3 memory verify` reads every byte and ignores the
cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from racm3_jax import storage
from racm3_jax.storage import Describe

# A file changed just now may change again within one tick of the file system's clock.
_SETTLED_SECONDS = 2.0
_DIGEST_BYTES = 32


def recall(directory: pathlib.Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Like `storage.describe_files`, but skips files that were read before.

    Safe with any number of processes; a damaged or read-only cache is ignored.
    """
    started = time.time()
    before = {name: _stamp(directory / name) for name in names}
    known = _read(directory)
    found, unread = {}, []
    for name, stamp in before.items():
        entry = known.get(name, {})
        if entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str):
            found[name] = {"bytes": stamp[2], "sha256": entry["sha256"]}
        else:
            unread.append(name)
    if unread:
        found |= storage.describe_files(directory, unread)
        read = {name: (before[name], found[name]["sha256"]) for name in unread}
        _remember(directory, read, started)
    return {name: found[name] for name in before}


def describe_together(
    directory: pathlib.Path, names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Like `recall`, by all processes of a `jax.distributed` job together.

    Processes that see the same file (equal inode, size, times: one file system or one
    machine) read it once, and not at all if one of them has it cached. If every host
    has its own copy of a file, every host reads it.
    """
    names = sorted(names)
    if _is_alone() or not names:
        return recall(directory, names)
    import jax

    started = time.time()
    stamps = {name: _stamp(directory / name) for name in names}
    sizes = np.asarray([stamp[2] for stamp in stamps.values()], np.float32)
    # Device numbers differ between hosts.
    seen = np.stack([_digest(repr(stamp[1:])) for stamp in stamps.values()])
    known = _read(directory)
    is_known = [known.get(name, {}).get("stamp") == stamps[name] for name in names]
    owners = assign_readers(*map(_gather, (seen, np.asarray(is_known), sizes)))
    own = owners[jax.process_index()]
    here = recall(
        directory, [names[i] for i in np.flatnonzero(own == jax.process_index())]
    )
    digests = np.zeros((len(names), _DIGEST_BYTES), np.uint8)
    for i, name in enumerate(names):
        if name in here:
            digests[i] = np.frombuffer(bytes.fromhex(here[name]["sha256"]), np.uint8)
    digests = _gather(digests)[own, np.arange(len(names))]
    found = {n: d.tobytes().hex() for n, d in zip(names, digests, strict=True)}
    _remember(directory, {n: (stamps[n], found[n]) for n in names}, started)
    return {n: {"bytes": stamps[n][2], "sha256": found[n]} for n in names}


def assign_readers(
    seen: UInt8[np.ndarray, "processes files digest"],
    is_known: Bool[np.ndarray, "processes files"],
    sizes: Float[np.ndarray, "processes files"],
) -> Int[np.ndarray, "processes files"]:
    """Which process provides the sha256 of each file to each process.

    ```
    seen    process 0   a b c      a x means: another file than the one of process 0
            process 1   a b x
    owners  process 0   0 1 0      a is read by 0, b by 1, c and x by their own
            process 1   0 1 1
    ```

    Args:
      seen: equal where processes see the same file.
      is_known: which processes have its sha256 cached: these read nothing.
      sizes: in bytes; large files are assigned first.
    """
    owners = np.zeros(is_known.shape, np.int64)
    load = np.zeros(len(owners))
    for file in np.argsort(-sizes.max(axis=0), kind="stable"):
        _, kinds = np.unique(seen[:, file], axis=0, return_inverse=True)
        kinds = kinds.reshape(-1)
        for kind in np.unique(kinds):
            members = np.flatnonzero(kinds == kind)
            knowing = members[is_known[members, file]]
            owner = knowing[0] if len(knowing) else members[load[members].argmin()]
            if not len(knowing):
                load[owner] += sizes[owner, file]
            owners[members, file] = owner
    return owners


def sample(
    share: float, say: Callable[[str], object], describe: Describe = recall
) -> Describe:
    """Describes randomly chosen files with this fraction of the bytes, at least one.

    Args:
      share: fraction in (0, 1]; 1 means all files, without a message.
      say: called with a message about what was read and what was not.
      describe: how the chosen ones are read.

    Raises:
      ValueError: an invalid fraction.
    """
    if not 0 < share <= 1:
        raise ValueError(
            f"the fraction of a memory to verify must be in (0, 1]; got {share}"
        )
    if share == 1:
        return describe

    def describe_some(
        directory: pathlib.Path, names: Iterable[str]
    ) -> dict[str, dict[str, Any]]:
        names = list(names)
        sizes = np.asarray([(directory / name).stat().st_size for name in names])
        order = np.random.default_rng(_agreed_seed()).permutation(len(names))
        enough = np.searchsorted(np.cumsum(sizes[order]), share * sizes.sum())
        chosen = np.sort(order[: int(enough) + 1])
        found = describe(directory, [names[i] for i in chosen])
        say(
            f"of {directory}, {len(chosen)} of {len(names)} files chosen at random "
            f"({sizes[chosen].sum() / 1e6:,.1f} of {sizes.sum() / 1e6:,.1f} MB) were "
            "verified by sha256, the others by size only"
        )
        return found

    return describe_some


def _agreed_seed() -> int:
    """Random, and the same in all processes."""
    return int.from_bytes(_gather(np.frombuffer(secrets.token_bytes(4), np.uint8))[0])


def _gather(values: np.ndarray) -> np.ndarray:
    """`[processes, ...]`: the values of all. No 64-bit types, which JAX truncates."""
    if _is_alone():
        return values[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values))


def _is_alone() -> bool:
    """Whether this is the only process, without initialising devices."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized()


def _stamp(path: pathlib.Path) -> list[int]:
    status = os.stat(path)
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return [status.st_dev, status.st_ino, status.st_size, *times]


def _digest(text: str) -> np.ndarray:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.frombuffer(digest, np.uint8)


def _cache_file(directory: pathlib.Path) -> pathlib.Path | None:
    folder = storage.cache_directory("checksums")
    if folder is None:
        return None
    place = f"{socket.gethostname()}\0{directory.resolve()}"
    return folder / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.json"


def _read(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The cached entries; empty if the cache is damaged."""
    file = _cache_file(directory)
    try:
        if file is not None:
            return storage.decode_sealed(file.read_bytes(), str(file), "")["files"]
    except (OSError, storage.IntegrityError):
        pass
    return {}


def _remember(
    directory: pathlib.Path,
    read: Mapping[str, tuple[Sequence[int], str]],
    started: float,
) -> None:
    """Adds files that were read, unless they changed just before or meanwhile."""
    file = _cache_file(directory)
    if file is None:
        return
    latest = (started - _SETTLED_SECONDS) * 1e9
    with contextlib.suppress(OSError):
        new = {
            name: {"stamp": list(stamp), "sha256": digest}
            for name, (stamp, digest) in read.items()
            if max(stamp[3:]) < latest and _stamp(directory / name) == stamp
        }
        with storage.locked(file.parent):
            old = {
                n: e for n, e in _read(directory).items() if (directory / n).exists()
            }
            if new and {**old, **new} != old:
                content = {"files": {**old, **new}}
                storage.write_file(file, storage.encode_sealed(content))
