"""ScaNN behind the `Index` contract (one host).

What the wrapper adds: a build that is the same in every process, rows and queries that
cannot crash the library, unfilled slots marked, files verified before they are loaded.
Where a number is not explained, it comes from ScaNN's docs/algorithms.md.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import threading
from typing import Any, Literal, NoReturn

import numpy as np
from jaxtyping import Float, Float32

from racm3_jax import storage
from racm3_jax.index import contract
from racm3_jax.types import Neighbours

BRUTE_FORCE_ROWS = 20_000
HASH_ROWS = 100_000
# Asymmetric hashing learns 16 centres for every block of dimensions.
MIN_HASH_ROWS = 16
# More blocks than this lose the fast global top-N path.
MAX_HASH_BLOCKS = 256
_SUBDIRECTORY = "scann"
_IMPORT_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class ScannConfig:
    """How to search. The defaults follow the number of rows.

    Attributes:
      mode: "brute_force" scores every row in bfloat16; "hash" scores every row by
        asymmetric hashing and rescores the best; "tree" looks into some leaves only;
        "auto" takes them in this order below 20,000, below 100,000 and from there on.
      num_leaves: leaves of the tree; None is 2·sqrt(rows).
      searched_share: share of the leaves that a query looks into.
      num_reordered: candidates of hashing that are rescored in bfloat16.
      soar_lambda: how much a row's second leaf differs from its first (SOAR).
      anisotropic_threshold: weight of the error along the row itself in hashing.
      num_training_threads: 1, or builds differ from process to process.
    """

    mode: Literal["auto", "brute_force", "hash", "tree"] = "auto"
    num_leaves: int | None = None
    searched_share: float = 0.08
    num_reordered: int = 200
    soar_lambda: float = 1.5
    anisotropic_threshold: float = 0.2
    num_training_threads: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "brute_force", "hash", "tree"):
            raise ValueError(
                'scann.mode must be "auto", "brute_force", "hash" or "tree"; '
                f"got {self.mode!r}"
            )
        if not 0 < self.searched_share <= 1:
            raise ValueError(
                f"scann.searched_share must be in (0, 1]; got {self.searched_share}"
            )


def import_scann() -> Any:
    """ScaNN's NumPy module, imported so that it cannot find TensorFlow.

    ScaNN probes for TensorFlow and fails (undefined symbol) where a newer one is
    installed; a None in `sys.modules` makes the probe end in ModuleNotFoundError.

    Raises:
      ImportError: if ScaNN is not installed.
    """
    with _IMPORT_LOCK:
        missing = object()
        seen = sys.modules.get("tensorflow", missing)
        sys.modules["tensorflow"] = None  # type: ignore[assignment]
        try:
            from scann.scann_ops.py import scann_ops_pybind
        except ImportError as error:
            raise ImportError(
                f"ScaNN cannot be imported here ({error}); it has wheels for Linux: "
                'use index="exact" elsewhere'
            ) from error
        finally:
            if seen is missing:
                del sys.modules["tensorflow"]
            else:
                sys.modules["tensorflow"] = seen  # type: ignore[assignment]
    return scann_ops_pybind


def resolve_settings(
    config: ScannConfig, num_rows: int, d_embed: int
) -> dict[str, Any]:
    """What the configuration means for `num_rows` rows of width `d_embed`.

    Raises:
      ValueError: if there are too few rows for the mode.
    """
    mode = config.mode
    if mode == "auto":
        mode = "brute_force" if num_rows < BRUTE_FORCE_ROWS else "hash"
        mode = "tree" if num_rows >= HASH_ROWS else mode
    if mode == "brute_force":
        return {"mode": mode}
    num_leaves = config.num_leaves or max(1, round(2 * num_rows**0.5))
    minimum = max(MIN_HASH_ROWS, num_leaves if mode == "tree" else 0)
    if num_rows < minimum:
        raise ValueError(
            f"scann.mode={mode!r} needs >= {minimum} rows; there are {num_rows}: "
            'use mode="brute_force"'
        )
    settings = {
        "mode": mode,
        "dimensions_per_block": max(2, -(-d_embed // MAX_HASH_BLOCKS)),
        "anisotropic_threshold": config.anisotropic_threshold,
        "num_reordered": min(config.num_reordered, num_rows),
    }
    if mode == "tree":
        settings["num_leaves"] = num_leaves
        settings["num_searched"] = max(1, round(num_leaves * config.searched_share))
        settings["soar_lambda"] = config.soar_lambda
    return settings


class ScannIndex:
    """A ScaNN searcher whose datapoint numbers are the rows.

    Never changed once built: ScaNN crashes when one thread searches while another
    changes the index, so a changed memory gets a new index.
    """

    def __init__(
        self, searcher: Any, num_rows: int, d_embed: int, settings: dict[str, Any]
    ):
        self.settings = settings
        self._searcher = searcher
        self._num_rows = num_rows
        self._d_embed = d_embed

    @classmethod
    def build(
        cls,
        embeddings: Float[np.ndarray, "rows d_embed"],
        config: ScannConfig,
        path: str | pathlib.Path,
    ) -> ScannIndex:
        """Builds an index and writes it into the directory `path`.

        Args:
          embeddings: finite rows.
          config: how to search.
          path: directory; made when it does not exist.

        Raises:
          ValueError: on rows that are not finite, or too few for the mode.
          ImportError: where ScaNN is not installed.
        """
        embeddings = contract.check_embeddings(embeddings)
        settings = resolve_settings(config, *embeddings.shape)
        scann = import_scann()
        reorder_type = scann.scann_builder.ReorderType
        builder = scann.builder(embeddings, 10, "dot_product")
        builder.set_n_training_threads(config.num_training_threads)
        if settings["mode"] == "brute_force":
            builder.score_brute_force(quantize=reorder_type.BFLOAT16)
        else:
            if settings["mode"] == "tree":
                builder.tree(
                    num_leaves=settings["num_leaves"],
                    num_leaves_to_search=settings["num_searched"],
                    random_init=False,
                    soar_lambda=settings["soar_lambda"],
                )
            builder.score_ah(
                dimensions_per_block=settings["dimensions_per_block"],
                anisotropic_quantization_threshold=settings["anisotropic_threshold"],
            )
            builder.reorder(
                reordering_num_neighbors=settings["num_reordered"],
                quantize=reorder_type.BFLOAT16,
            )
        num_rows, d_embed = embeddings.shape
        built = cls(builder.build(), num_rows, d_embed, settings)
        built.save(pathlib.Path(path))
        return built

    def save(self, path: pathlib.Path) -> None:
        """Writes the index into the directory `path`; see `Index.save`."""
        directory = path / _SUBDIRECTORY
        directory.mkdir(parents=True, exist_ok=True)
        self._searcher.serialize(str(directory), relative_path=True)
        for name in storage.list_files(directory):
            storage.sync_file(directory / name)
        self.describe(path)

    def describe(self, path: pathlib.Path) -> None:
        """Writes index.json anew, with the present settings, for files at `path`."""
        directory = path / _SUBDIRECTORY
        names = [f"{_SUBDIRECTORY}/{n}" for n in storage.list_files(directory)]
        contract.write_description(
            path, "scann", self._num_rows, self._d_embed, self.settings, names
        )

    @classmethod
    def load(cls, path: str | pathlib.Path, *, verify: bool = True) -> ScannIndex:
        """Opens what `build` wrote.

        Args:
          path: the directory.
          verify: False where the caller has checked the sha256 of the files already.

        Raises:
          FileNotFoundError: if there is no index.
          IntegrityError: if a file is damaged, missing, or not ours.
        """
        path = pathlib.Path(path)
        description = contract.read_description(path)
        directory = path / _SUBDIRECTORY
        # ScaNN would unpickle a file of document ids: any stranger is refused.
        strangers = {
            f"{_SUBDIRECTORY}/{name}" for name in storage.list_files(directory)
        } - set(description["files"])
        if strangers:
            raise storage.IntegrityError(
                f"{path} holds {min(strangers)}, which was not written with the "
                f"index; {contract.REMEDY}"
            )
        if verify:
            storage.verify_files(path, description["files"], contract.REMEDY)
        searcher = import_scann().load_searcher(
            str(directory), assets_backcompat_shim=False
        )
        return cls(
            searcher,
            description["num_rows"],
            description["d_embed"],
            description["settings"],
        )

    def __len__(self) -> int:
        return self._num_rows

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a ScaNN index cannot be sent to another process: open it there "
            "(Memory.load, or ScannIndex.load)"
        )

    def search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        """See `Index.search`; scores carry bfloat16's error (about 0.3%)."""
        queries = contract.check_queries(queries, self._d_embed, k)
        if len(queries) == 0:
            return contract.empty_neighbours(0, k)
        if self.settings["mode"] != "tree":
            return self._search_call(queries, k)
        # With a tree, the number of queries in a call (not what they are) changes up to
        # 4% of the ids that come back (ScaNN 1.4.2, measured). One at a time costs no
        # more than small batches do.
        parts = [self._search_call(query[None], k) for query in queries]
        return Neighbours(*(np.concatenate(c) for c in zip(*parts, strict=True)))

    def _search_call(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> Neighbours:
        width = min(k, self._num_rows)
        # ScaNN returns no more than it reorders, silently.
        reordered = self.settings.get("num_reordered")
        ids, scores = self._searcher.search_batched(
            queries,
            final_num_neighbors=width,
            pre_reorder_num_neighbors=reordered and max(reordered, width),
            leaves_to_search=self.settings.get("num_searched"),
        )
        return contract.fill_slots(ids.astype(np.int64), scores, k)
