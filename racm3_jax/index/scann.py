"""ScaNN behind the `Index` contract (one host).

The wrapper adds: deterministic builds, checks of rows and queries that would crash the
library, marked unfilled slots, and verification of files before loading. Numbers
without explanation come from ScaNN's docs/algorithms.md.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
import threading
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, Self, get_args

import numpy as np
from jaxtyping import Float, Float32, Int

from racm3_jax import storage
from racm3_jax.index import tuning
from racm3_jax.index.contract import Backend
from racm3_jax.index.folder import REMEDY, Allowed, Description
from racm3_jax.index.rows import Rows

Mode = Literal["auto", "brute_force", "hash", "tree"]
BRUTE_FORCE_ROWS = 20_000
HASH_ROWS = 100_000
# Asymmetric hashing learns 16 centres per block of dimensions.
MIN_HASH_ROWS = 16
# More blocks than this lose the fast global top-N path.
MAX_HASH_BLOCKS = 256
_SUBDIRECTORY = "scann"
# All files of ScaNN 1.4.2 in the three modes, with and without SOAR.
_ASSETS_FILE = "scann_assets.pbtxt"
_ASSETS = (
    "ah_codebook.pb",
    "bfloat16_dataset.npy",
    "datapoint_to_token.npy",
    "hashed_dataset.npy",
    "hashed_dataset_soar.npy",
    "serialized_partitioner.pb",
)
_NAMES = (_ASSETS_FILE, "scann_config.pb", *_ASSETS)
# The asset file lists the others, and ScaNN reads every file listed.
_ASSETS_PATTERN = re.compile(
    r'(assets \{\s+asset_type: [A-Z0-9_]+\s+asset_path: "('
    + "|".join(map(re.escape, _ASSETS))
    + r')"\s+\}\s*)+'
)
_IMPORT_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class ScannConfig:
    """How to search. The defaults depend on the number of rows.

    Attributes:
      mode: "brute_force" scores every row in bfloat16; "hash" scores every row by
        asymmetric hashing and rescores the best; "tree" searches some leaves only;
        "auto" is the first below 20,000 rows, the second below 100,000, else the third.
      num_leaves: leaves of the tree; None is 2·sqrt(rows).
      searched_share: fraction of the leaves that a query searches.
      num_reordered: candidates of hashing that are rescored in bfloat16.
      soar_lambda: how much a row's second leaf differs from its first (SOAR).
      anisotropic_threshold: weight of the error along the row itself in hashing.
      num_training_threads: more than 1 makes builds non-deterministic.
    """

    mode: Mode = "auto"
    num_leaves: int | None = None
    searched_share: float = 0.08
    num_reordered: int = 200
    soar_lambda: float = 1.5
    anisotropic_threshold: float = 0.2
    num_training_threads: int = 1

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(
                'scann.mode must be "auto", "brute_force", "hash" or "tree"; '
                f"got {self.mode!r}"
            )
        if not 0 < self.searched_share <= 1:
            raise ValueError(
                f"scann.searched_share must be in (0, 1]; got {self.searched_share}"
            )


def import_scann() -> Any:
    """Imports ScaNN's NumPy module without TensorFlow.

    ScaNN probes for TensorFlow and fails (undefined symbol) where a newer one is
    installed; a None in `sys.modules` makes the probe end in ModuleNotFoundError.

    Raises:
      ImportError: ScaNN is not installed.
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
    """Resolves the configuration for `num_rows` rows of width `d_embed`.

    Raises:
      ValueError: too few rows for the mode.
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
        "dimensions_per_block": dimensions_per_block(d_embed),
        "anisotropic_threshold": config.anisotropic_threshold,
        "num_reordered": min(config.num_reordered, num_rows),
    }
    if mode == "tree":
        settings["num_leaves"] = num_leaves
        settings["num_searched"] = max(1, round(num_leaves * config.searched_share))
        settings["soar_lambda"] = config.soar_lambda
    return settings


class ScannIndex(Backend):
    """A ScaNN searcher whose datapoint indices are the rows.

    Immutable: ScaNN crashes when one thread searches while another
    changes the index, so a changed memory gets a new index.
    """

    kind = "scann"
    files = frozenset(f"{_SUBDIRECTORY}/{name}" for name in _NAMES)
    # A copy, ScaNN's own, its sample for training, half precision for reordering,
    # tables: a tree took more than 4 (ScaNN 1.4.2, measured).
    build_ram_factor = 5.0

    def __init__(
        self, searcher: Any, num_rows: int, d_embed: int, settings: Mapping[str, Any]
    ):
        super().__init__(num_rows, d_embed, settings)
        self._searcher = searcher

    @classmethod
    def import_library(cls) -> Any:
        """See `import_scann`."""
        return import_scann()

    @classmethod
    def _build(
        cls, embeddings: Float32[np.ndarray, "rows d_embed"], config: ScannConfig | None
    ) -> Self:
        config = config or ScannConfig()
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
        return cls(builder.build(), num_rows, d_embed, settings)

    def _write(self, path: pathlib.Path) -> None:
        directory = path / _SUBDIRECTORY
        directory.mkdir(exist_ok=True)
        self._searcher.serialize(str(directory), relative_path=True)

    @classmethod
    def _open(
        cls,
        path: pathlib.Path,
        description: Description,
        embeddings: Float[np.ndarray, "rows d_embed"] | Rows | None,
    ) -> Self:
        directory = path / _SUBDIRECTORY
        assets = directory / _ASSETS_FILE
        if not assets.is_file() or not _ASSETS_PATTERN.fullmatch(
            assets.read_text("utf-8", errors="replace")
        ):
            raise storage.IntegrityError(
                f"{assets} is missing, or lists files that our indexes do not have: "
                f"it is not opened; {REMEDY}"
            )
        searcher = import_scann().load_searcher(
            str(directory), assets_backcompat_shim=False
        )
        num_rows = searcher.searcher.size()
        if num_rows != description.num_rows:
            raise storage.IntegrityError(
                f"the ScaNN index at {path} has {num_rows} rows instead of "
                f"{description.num_rows}; {REMEDY}"
            )
        return cls(searcher, num_rows, description.d_embed, description.settings)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a ScaNN index cannot be sent to another process: open it there "
            "(Memory.load, or ScannIndex.load)"
        )

    def _search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
        """Scores carry bfloat16's error (about 0.3%)."""
        if self.settings["mode"] != "tree":
            return self._search_call(queries, k)
        # With a tree, the number of queries in a call (not their content) changes up to
        # 4% of the returned ids (ScaNN 1.4.2, measured). One at a time is as fast as
        # small batches.
        parts = [self._search_call(query[None], k) for query in queries]
        ids, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
        return ids, scores

    def _search_call(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
        # ScaNN returns no more than it reorders, silently. Slots that it cannot fill
        # have row 0 and a score of NaN.
        reordered = self.settings.get("num_reordered")
        ids, scores = self._searcher.search_batched(
            queries,
            final_num_neighbors=k,
            pre_reorder_num_neighbors=reordered and max(reordered, k),
            leaves_to_search=self.settings.get("num_searched"),
        )
        return ids.astype(np.int64), scores

    @classmethod
    def allowed_settings(
        cls, settings: Mapping[str, Any], num_rows: int, d_embed: int
    ) -> Mapping[str, Allowed]:
        """See `Backend.allowed_settings`."""
        allowed: dict[str, Allowed] = {"mode": get_args(Mode)[1:]}
        if settings.get("mode") in ("hash", "tree"):
            allowed["num_reordered"] = (1, num_rows)
            allowed["dimensions_per_block"] = (1, max(2, d_embed))
        if settings.get("mode") == "tree":
            allowed["num_leaves"] = (1, num_rows)
            allowed["num_searched"] = (1, num_rows)
        return allowed

    @classmethod
    def index_row_bytes(cls, d_embed: int) -> int:
        """4 bits a block, twice as SOAR has two leaves a row; bfloat16; an id."""
        return -(-d_embed // dimensions_per_block(d_embed)) + 2 * d_embed + 8

    def cheapest_settings(self) -> dict[str, Any] | None:
        """A hundredth of the leaves of a tree; see `Backend.cheapest_settings`."""
        if self.settings["mode"] == "brute_force":
            return None
        return tuning.search_few_leaves(self.settings)

    def costlier_settings(self) -> list[dict[str, Any]]:
        """More leaves, or more rescored rows; see `Backend.costlier_settings`."""
        return tuning.search_or_rescore_more(self.settings, self._num_rows)

    def compute_cost(self, settings: Mapping[str, Any]) -> float:
        """See `Backend.compute_cost`."""
        blocks = self._d_embed / settings["dimensions_per_block"]
        # SOAR puts every row into two leaves.
        copies = 2 if settings["mode"] == "tree" else 1
        coded = copies * self._num_rows * blocks / 2
        return tuning.count_bytes(settings, coded, 2 * self._d_embed)


def dimensions_per_block(d_embed: int) -> int:
    """Of asymmetric hashing."""
    return max(2, -(-d_embed // MAX_HASH_BLOCKS))
