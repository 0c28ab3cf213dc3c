"""Ways to know the sha256 of files that read less than all of them, every time.

    recall              what this machine has read before, and has not changed, is known
    describe_together   each process of a training reads its share of the others
    sample              a share of the files is enough

Each is a `describe` of `storage.verify_files`. What was read is remembered in
`~/.cache/racm3/checksums`, a file for each folder and host:

    {"files": {"documents.array_record": {"stamp": [device, inode, bytes, mtime, ctime],
                                          "sha256": "…"}, …}, "sha256": "…"}

A file is believed to hold the bytes that were read as long as its stamp is the same, to
the nanosecond. Any write changes it; so does giving a file its old time back, which sets
the ctime, on file systems that keep one. The known limit: bytes that change without a
write (a failing disk), or with size and all times as they were. `racm3 memory verify`
reads every byte, whatever is remembered.
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

# A file that was changed just now may change again within one tick of its clock.
_SETTLED_SECONDS = 2.0
_DIGEST_BYTES = 32


def recall(directory: pathlib.Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """As `storage.describe_files`, but files that were read before are not read again.

    Safe with any number of processes; a cache that is damaged, or cannot be written, is
    no error.
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
    """As `recall`, by all processes of a `jax.distributed` job at once.

    Processes that see the same file (inode, size and times are equal: one file system, or
    one machine) read it once among them, and what one of them remembers none of them
    reads. A file of which every host has a copy is read by every host.
    """
    names = sorted(names)
    if _is_alone() or not names:
        return recall(directory, names)
    import jax

    started = time.time()
    stamps = {name: _stamp(directory / name) for name in names}
    sizes = np.asarray([stamp[2] for stamp in stamps.values()], np.float32)
    # Devices have other numbers on other hosts.
    seen = np.stack([_digest(repr(stamp[1:])) for stamp in stamps.values()])
    known = _read(directory)
    is_known = [known.get(name, {}).get("stamp") == stamps[name] for name in names]
    owners = share_out(*map(_gather, (seen, np.asarray(is_known), sizes)))
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


def share_out(
    seen: UInt8[np.ndarray, "processes files digest"],
    is_known: Bool[np.ndarray, "processes files"],
    sizes: Float[np.ndarray, "processes files"],
) -> Int[np.ndarray, "processes files"]:
    """Which process tells each process the sha256 of each file.

    ```
    seen    process 0   a b c      a x means: another file than the one of process 0
            process 1   a b x
    owners  process 0   0 1 0      a is read by 0, b by 1, c and x by those who see them
            process 1   0 1 1
    ```

    Args:
      seen: equal where processes see the same file.
      is_known: by whom its sha256 is remembered: that process reads nothing.
      sizes: in bytes; large files are shared out first.
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
    """Describes files chosen at random that hold this share of the bytes, at least one.

    Args:
      share: in (0, 1]; 1 is all of them, and nothing is said.
      say: called with the sentence about what was read and what was not.
      describe: the way of the chosen ones.

    Raises:
      ValueError: another share.
    """
    if not 0 < share <= 1:
        raise ValueError(
            f"the share of a memory to verify must be in (0, 1]; got {share}"
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
            "compared with their sha256, of the others the sizes alone"
        )
        return found

    return describe_some


def _agreed_seed() -> int:
    """By chance, and the same in all processes."""
    return int.from_bytes(_gather(np.frombuffer(secrets.token_bytes(4), np.uint8))[0])


def _gather(values: np.ndarray) -> np.ndarray:
    """`[processes, ...]`: of every process. No 64-bit types, which JAX cuts."""
    if _is_alone():
        return values[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values))


def _is_alone() -> bool:
    """Without starting a device for the answer."""
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
    """What is remembered; nothing, if the cache is damaged."""
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
    """Adds files that were read, unless they changed meanwhile or a moment before."""
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
