"""Live search of an index whose shards are spread over several processes.

    process 0   holds shards 0, 2     its queries go to all; their candidates
    process 1   holds shards 1, 3     are merged by (-score, id)

Results are the same as those of one index with all shards. Processes search at any time
and with any frequency, so this does not use device collectives, which all processes
would have to join in the same order: messages go over TCP between all pairs of
processes. They are plain numbers, without pickle, authenticated with the key of this
job.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float32

from racm3_jax.index import contract
from racm3_jax.index.contract import Index
from racm3_jax.index.sharded import merge_neighbours
from racm3_jax.types import Neighbours

_REQUEST = struct.Struct("<qq")  # queries, k
_ADDRESS_BYTES = 64
_FOUND, _FAILED = b"+", b"-"


class HostsIndex:
    """The shards of all processes as one index. Made by `connect`.

    Args:
      own: the shards of this process; None if it has none.
      num_rows: of all processes.
      peers: connections on which other processes answer, by process index.
      askers: connections on which this process answers others.
    """

    def __init__(
        self,
        own: Index | None,
        num_rows: int,
        peers: dict[int, Connection],
        askers: Sequence[Connection],
    ):
        self._own = own
        self._num_rows = num_rows
        self._peers = peers
        self._askers = askers
        self._asking = threading.Lock()
        self._answering = [
            threading.Thread(target=self._answer, args=[asker], daemon=True)
            for asker in askers
        ]
        for thread in self._answering:
            thread.start()

    @classmethod
    def connect(cls, own: Index | None, num_rows: int) -> Self:
        """Connects the shards of all processes; a collective call.

        Args:
          own: the shards of this process; None if it has none.
          num_rows: of all processes.
        """
        number, total = jax.process_index(), jax.process_count()
        keys = _gather(np.frombuffer(secrets.token_bytes(32), np.uint8))
        key = keys[0].tobytes()
        host = _find_own_host()
        with Listener((host, 0), "AF_INET", total, authkey=key) as listener:
            assert isinstance(listener.address, tuple)
            address = f"{host}:{listener.address[1]}".encode()
            padded = np.frombuffer(address.ljust(_ADDRESS_BYTES), np.uint8)
            addresses = [row.tobytes().decode().strip() for row in _gather(padded)]
            askers: list[Connection] = []

            def accept() -> None:
                while len(askers) < total - 1:
                    with contextlib.suppress(AuthenticationError, EOFError):
                        askers.append(listener.accept())

            accepting = threading.Thread(target=accept, daemon=True)
            accepting.start()
            peers = {}
            for other, place in enumerate(addresses):
                if other != number:
                    name, _, port = place.rpartition(":")
                    peers[other] = Client((name, int(port)), "AF_INET", authkey=key)
            accepting.join()
        return cls(own, num_rows, peers, askers)

    def close(self) -> None:
        """Closes the connections; other processes cannot search any more, either."""
        for connection in (*self._peers.values(), *self._askers):
            # Wakes the reading thread, which closing does not.
            with (
                contextlib.suppress(OSError),
                socket.socket(fileno=os.dup(connection.fileno())) as way,
            ):
                way.shutdown(socket.SHUT_RDWR)
        for thread in self._answering:
            thread.join()
        for connection in (*self._peers.values(), *self._askers):
            connection.close()

    def __len__(self) -> int:
        return self._num_rows

    def search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        """See `Index.search`.

        Raises:
          OSError: a process has exited; names it.
        """
        queries = np.ascontiguousarray(queries, "<f4")
        request = _REQUEST.pack(len(queries), k) + queries.tobytes()
        with self._asking:
            number = -1
            try:
                for number, peer in self._peers.items():  # noqa: B007
                    peer.send_bytes(request)
                try:
                    found = [self._search_own(queries, k)]
                finally:  # or the next search would read these replies
                    replies = []
                    for number, peer in self._peers.items():  # noqa: B007
                        replies.append(peer.recv_bytes())
            except (EOFError, OSError) as error:
                raise OSError(
                    f"process {number}, which has some index shards, does not answer "
                    f"({error or 'it has exited'}): the same command resumes"
                ) from error
        found += [_unpack(reply, len(queries), k) for reply in replies]
        return merge_neighbours(found, k)

    def _search_own(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        if self._own is None:
            return contract.empty_neighbours(len(queries), k)
        return self._own.search(queries, k)

    def _answer(self, asker: Connection) -> None:
        """Answers one process until it exits."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                request = asker.recv_bytes()
                try:
                    num, k = _REQUEST.unpack_from(request)
                    queries = np.frombuffer(request, "<f4", offset=_REQUEST.size)
                    found = self._search_own(queries.reshape(num, -1), k)
                    ids, scores = found.ids.astype("<i8"), found.scores.astype("<f4")
                    reply = _FOUND + ids.tobytes() + scores.tobytes()
                except Exception as error:  # noqa: BLE001 -- the asker raises it
                    reply = _FAILED + str(error).encode()
                asker.send_bytes(reply)


def _unpack(reply: bytes, num: int, k: int) -> Neighbours:
    if not reply.startswith(_FOUND):
        raise ValueError(reply[1:].decode(errors="replace"))
    ids = np.frombuffer(reply, "<i8", num * k, offset=1).reshape(num, k)
    scores = np.frombuffer(reply, "<f4", offset=1 + ids.nbytes).reshape(num, k)
    return Neighbours(ids, scores, ids >= 0)


def _gather(values: np.ndarray) -> np.ndarray:
    """`[processes, ...]`: of every process."""
    return np.asarray(multihost_utils.process_allgather(values))


def _find_own_host() -> str:
    """This machine's address as seen by the others: on the route to process 0.

    JAX has no public API for the address of process 0.
    """
    from jax._src import distributed

    coordinator = distributed.global_state.coordinator_address or ""
    name, _, port = coordinator.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect((name, int(port)))  # UDP: sends nothing
            return way.getsockname()[0]
        except (OSError, ValueError):
            return socket.gethostbyname(socket.gethostname())
