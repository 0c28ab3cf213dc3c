"""FAISS behind the `Index` contract (one host, CPU).

For platforms without a ScaNN wheel. Rows are in leaves (IVF); their residuals are 4-bit
product codes, scored in registers ("fast scan"); the best are rescored in half
precision. What the wrapper adds: a build that is the same in every process, one thread
a search unless asked (OpenMP threads of several searches slow each other down), files
verified before they are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NoReturn, Self, get_args

import numpy as np
from jaxtyping import Float, Float32, Int

from racm3_jax import storage
from racm3_jax.index import tuning
from racm3_jax.index.contract import Backend
from racm3_jax.index.folder import REMEDY, Allowed, Description
from racm3_jax.index.rows import Rows

Mode = Literal["auto", "flat", "ivf"]
FLAT_ROWS = 20_000
# A code of 4 bits learns 16 centres.
MIN_IVF_ROWS = 16
# FAISS reads many kinds of index, some of which open other files. Ours start like this
# and contain nothing else.
_MAGIC = {"flat": b"IxSQ", "ivf": b"IxRF"}
_FILE = "faiss.index"


@dataclasses.dataclass(frozen=True)
class FaissConfig:
    """How to search. The defaults depend on the number of rows.

    Attributes:
      mode: "flat" scores every row in half precision; "ivf" searches some leaves and
        rescores the best; "auto" is "ivf" from 20,000 rows on.
      num_leaves: None is 2·sqrt(rows).
      searched_share: fraction of the leaves that a query searches.
      num_reordered: number of candidates that are rescored.
      num_threads: of the build and of every search; 1, or builds may differ.
    """

    mode: Mode = "auto"
    num_leaves: int | None = None
    searched_share: float = 0.08
    num_reordered: int = 200
    num_threads: int = 1

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(
                f'faiss.mode must be "auto", "flat" or "ivf"; got {self.mode!r}'
            )
        if not 0 < self.searched_share <= 1:
            raise ValueError(
                f"faiss.searched_share must be in (0, 1]; got {self.searched_share}"
            )
        for name in ("num_leaves", "num_reordered", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"faiss.{name} must be >= 1; got {value}")


def import_faiss() -> Any:
    """FAISS.

    Raises:
      ImportError: if it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"FAISS cannot be imported here ({error}): pip install "
            '"racm3_jax[faiss]", or use index="exact"'
        ) from error
    return faiss


@contextlib.contextmanager
def _threads(faiss: Any, num_threads: int) -> Iterator[None]:
    """Sets OpenMP's number of threads, which is per thread."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def resolve_settings(
    config: FaissConfig, num_rows: int, d_embed: int
) -> dict[str, Any]:
    """Resolves the configuration for `num_rows` rows of width `d_embed`.

    Raises:
      ValueError: too few rows for the mode.
    """
    mode = config.mode
    if mode == "auto":
        mode = "flat" if num_rows < FLAT_ROWS else "ivf"
    if mode == "flat":
        return {"mode": mode, "num_threads": config.num_threads}
    num_leaves = config.num_leaves or max(1, round(2 * num_rows**0.5))
    minimum = max(MIN_IVF_ROWS, num_leaves)
    if num_rows < minimum:
        raise ValueError(
            f"faiss.mode={mode!r} needs >= {minimum} rows; there are {num_rows}: "
            'use mode="flat"'
        )
    return {
        "mode": mode,
        "num_threads": config.num_threads,
        "dimensions_per_code": dimensions_per_code(d_embed),
        "num_leaves": num_leaves,
        "num_searched": max(1, round(num_leaves * config.searched_share)),
        "num_reordered": min(config.num_reordered, num_rows),
    }


def dimensions_per_code(d_embed: int) -> int:
    """2 where they divide the width: at 4 a code, recall ends at 0.92 (768-d)."""
    return 2 if d_embed % 2 == 0 else 1


class FaissIndex(Backend):
    """A FAISS index whose ids are the rows; immutable."""

    kind = "faiss"
    files = frozenset({_FILE})
    # The rows, their sample for training, half precision for rescoring, codes.
    build_ram_factor = 3.0

    def __init__(
        self, index: Any, num_rows: int, d_embed: int, settings: Mapping[str, Any]
    ):
        super().__init__(num_rows, d_embed, settings)
        self._faiss = import_faiss()
        self._index = index

    @classmethod
    def import_library(cls) -> Any:
        """See `import_faiss`."""
        return import_faiss()

    @classmethod
    def _build(
        cls, embeddings: Float32[np.ndarray, "rows d_embed"], config: FaissConfig | None
    ) -> Self:
        num_rows, d_embed = embeddings.shape
        settings = resolve_settings(config or FaissConfig(), num_rows, d_embed)
        faiss = import_faiss()
        recipe = "SQfp16"
        if settings["mode"] == "ivf":
            num_codes = d_embed // settings["dimensions_per_code"]
            recipe = f"IVF{settings['num_leaves']},PQ{num_codes}x4fsr,Refine(SQfp16)"
        index = faiss.index_factory(d_embed, recipe, faiss.METRIC_INNER_PRODUCT)
        if settings["mode"] == "ivf":
            base = faiss.downcast_index(index.base_index)
            # FAISS warns on the console below 39 rows per centre; its seeds are fixed.
            base.cp.min_points_per_centroid = base.pq.cp.min_points_per_centroid = 1
        with _threads(faiss, settings["num_threads"]):
            index.train(embeddings)
            index.add(embeddings)
        return cls(index, num_rows, d_embed, settings)

    def _write(self, path: pathlib.Path) -> None:
        try:
            self._faiss.write_index(self._index, str(path / _FILE))
        except RuntimeError as error:
            raise OSError(f"{path / _FILE} could not be written: {error}") from error

    @classmethod
    def _open(
        cls,
        path: pathlib.Path,
        description: Description,
        embeddings: Float[np.ndarray, "rows d_embed"] | Rows | None,
    ) -> Self:
        file = path / _FILE
        mode = description.settings["mode"]
        if not file.is_file():
            raise storage.IntegrityError(f"{file} is missing; {REMEDY}")
        with open(file, "rb") as opened:
            magic = opened.read(4)
        faiss = import_faiss()
        if magic == _MAGIC[mode]:
            # Leaves may be in another file, which must not be in another folder.
            index = faiss.read_index(str(file), faiss.IO_FLAG_ONDISK_SAME_DIR)
            expected = (*description[1:3], faiss.METRIC_INNER_PRODUCT)
            right = (index.ntotal, index.d, index.metric_type) == expected
            if right and mode == "ivf":
                base = faiss.downcast_index(index.base_index)
                refine = index.refine_index
                right = isinstance(base, faiss.IndexIVFPQFastScan)
                right = right and base.nlist == description.settings["num_leaves"]
                for part in (base, refine):
                    found = (part.ntotal, part.d, part.metric_type)
                    right = right and found == expected
            if right:
                opened = cls(index, *expected[:2], description.settings)
                # Inconsistent parts are detected by a first search.
                opened._search(np.ones((1, description.d_embed), np.float32), 1)
                return opened
        raise storage.IntegrityError(
            f"{file} is not a FAISS index of mode {mode!r} of {description.num_rows} "
            f"rows as described in {path}: it is not used; {REMEDY}"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a FAISS index cannot be sent to another process: open it there "
            "(Memory.load, or FaissIndex.load)"
        )

    def _search(
        self, queries: Float32[np.ndarray, "queries d_embed"], k: int
    ) -> tuple[Int[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
        """Scores carry half precision's error (about 0.05%)."""
        parameters = None
        if self.settings["mode"] == "ivf":
            # Only for this call: other threads may use other parameters.
            parameters = self._faiss.IndexRefineSearchParameters(
                k_factor=max(1.0, self.settings["num_reordered"] / k),
                base_index_params=self._faiss.SearchParametersIVF(
                    nprobe=self.settings["num_searched"]
                ),
            )
        with _threads(self._faiss, self.settings["num_threads"]):
            try:
                scores, ids = self._index.search(queries, k, params=parameters)
            except RuntimeError as error:
                # FAISS checks the ids of its leaves only during search.
                raise storage.IntegrityError(
                    f"the FAISS index is inconsistent ({error}); {REMEDY}"
                ) from error
        return ids, scores

    @classmethod
    def allowed_settings(
        cls, settings: Mapping[str, Any], num_rows: int, d_embed: int
    ) -> Mapping[str, Allowed]:
        """See `Backend.allowed_settings`."""
        allowed: dict[str, Allowed] = {
            "mode": get_args(Mode)[1:],
            "num_threads": (1, 1024),
        }
        if settings.get("mode") == "ivf":
            allowed["dimensions_per_code"] = (1, 2)
            for name in ("num_leaves", "num_searched", "num_reordered"):
                allowed[name] = (1, num_rows)
        return allowed

    @classmethod
    def index_row_bytes(cls, d_embed: int) -> int:
        """4 bits a code; half precision; an id."""
        codes = d_embed // dimensions_per_code(d_embed)
        return -(-codes // 2) + 2 * d_embed + 8

    def cheapest_settings(self) -> dict[str, Any] | None:
        """A hundredth of the leaves; see `Backend.cheapest_settings`."""
        if self.settings["mode"] == "flat":
            return None
        return tuning.search_few_leaves(self.settings)

    def costlier_settings(self) -> list[dict[str, Any]]:
        """More leaves, or more rescored rows; see `Backend.costlier_settings`."""
        return tuning.search_or_rescore_more(self.settings, self._num_rows)

    def compute_cost(self, settings: Mapping[str, Any]) -> float:
        """See `Backend.compute_cost`."""
        codes = self._d_embed / settings["dimensions_per_code"]
        return tuning.count_bytes(
            settings, self._num_rows * codes / 2, 2 * self._d_embed
        )
