"""FAISS behind the `Index` contract (one host, CPU).

Up to a million rows are linked to near ones (HNSW, arXiv 1603.09320), in half precision:
the fastest of what was measured (experiments/results). More are in leaves (IVF); their residuals are 4-bit product codes, scored in registers ("fast scan");
the best are rescored in half precision. What the wrapper adds: a build that is the same
in every process, one thread a search unless asked (OpenMP threads of several searches
slow each other down), files verified before they are read.
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

Mode = Literal["auto", "flat", "hnsw", "ivf"]
FLAT_ROWS = 20_000
# A larger graph takes long to build, and more memory than codes.
GRAPH_ROWS = 1_000_000
# A code of 4 bits learns 16 centres.
MIN_IVF_ROWS = 16
# FAISS reads many kinds of index, some of which open other files. Ours start like this
# and contain nothing else.
_MAGIC = {"flat": b"IxSQ", "hnsw": b"IHNs", "ivf": b"IxRF"}
_FILE = "faiss.index"
MAX_LINKS = 512
MAX_EF_SEARCH = 100_000
_FIRST_EF_SEARCH = 16
_EF_SEARCH_GROWTH = 1.25


@dataclasses.dataclass(frozen=True)
class FaissConfig:
    """How to search. The defaults depend on the number of rows.

    Attributes:
      mode: "flat" scores every row in half precision; "hnsw" walks a graph of them;
        "ivf" searches some leaves and rescores the best; "auto" is "hnsw" from 20,000
        rows on, and "ivf" from a million.
      num_links: of a row in the graph; twice as many in its lowest layer.
      ef_search: rows that a walk keeps; tuned.
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
    num_links: int = 32
    ef_search: int = 64

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            words = ", ".join(map(repr, get_args(Mode)))
            raise ValueError(f"faiss.mode must be one of {words}; got {self.mode!r}")
        if not 0 < self.searched_share <= 1:
            raise ValueError(
                f"faiss.searched_share must be in (0, 1]; got {self.searched_share}"
            )
        for name in ("num_leaves", "num_reordered", "num_threads", "ef_search"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"faiss.{name} must be >= 1; got {value}")
        if not 2 <= self.num_links <= MAX_LINKS:
            raise ValueError(
                f"faiss.num_links must be in 2..{MAX_LINKS}; got {self.num_links}"
            )


def import_faiss() -> Any:
    """FAISS.

    Raises:
      ImportError: if it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"FAISS cannot be imported here ({error}): pip install faiss-cpu, or use "
            'index="exact"'
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
        mode = "flat" if num_rows < FLAT_ROWS else "hnsw"
        mode = "ivf" if num_rows >= GRAPH_ROWS else mode
    if mode == "flat":
        return {"mode": mode, "num_threads": config.num_threads}
    if mode == "hnsw":
        return {
            "mode": mode,
            "num_threads": config.num_threads,
            "num_links": config.num_links,
            "ef_search": config.ef_search,
        }
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


def _is_ours(
    faiss: Any, index: Any, expected: tuple[int, int, int], settings: Mapping[str, Any]
) -> bool:
    """Whether an opened index is what `_build` makes with these settings.

    Args:
      faiss: the library.
      index: as opened.
      expected: number of rows, width, and metric.
      settings: of its description.
    """
    parts = [index]
    if settings["mode"] == "hnsw":
        if not isinstance(index, faiss.IndexHNSWSQ) or not _is_graph(faiss, index.hnsw):
            return False
        parts.append(faiss.downcast_index(index.storage))
        if not isinstance(parts[1], faiss.IndexScalarQuantizer):
            return False
    elif settings["mode"] == "ivf":
        base = faiss.downcast_index(index.base_index)
        if not isinstance(base, faiss.IndexIVFPQFastScan):
            return False
        if base.nlist != settings["num_leaves"]:
            return False
        parts += [base, index.refine_index]
    return all((p.ntotal, p.d, p.metric_type) == expected for p in parts)


def _is_graph(faiss: Any, graph: Any) -> bool:
    """Whether the links of a graph are inside it: FAISS follows them unchecked."""
    levels = faiss.vector_to_array(graph.levels)
    offsets = faiss.vector_to_array(graph.offsets).astype(np.int64)
    links = faiss.vector_to_array(graph.neighbors)
    sums = faiss.vector_to_array(graph.cum_nneighbor_per_level).astype(np.int64)
    num_rows = len(levels)
    if not num_rows or len(offsets) != num_rows + 1 or not 0 < levels.min():
        return False
    if levels.max() >= len(sums) or (np.diff(sums) < 0).any() or sums[0] != 0:
        return False
    return bool(
        offsets[0] == 0
        and offsets[-1] == len(links)
        and (np.diff(offsets) == sums[levels]).all()
        and links.min(initial=0) >= -1
        and links.max(initial=-1) < num_rows
        and 0 <= graph.entry_point < num_rows
        and graph.max_level == levels[graph.entry_point] - 1
    )


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
        if settings["mode"] == "hnsw":
            recipe = f"HNSW{settings['num_links']},SQfp16"
        elif settings["mode"] == "ivf":
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
            if _is_ours(faiss, index, expected, description.settings):
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
        if self.settings["mode"] == "hnsw":
            parameters = self._faiss.SearchParametersHNSW(
                efSearch=max(k, self.settings["ef_search"])
            )
        elif self.settings["mode"] == "ivf":
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
        if settings.get("mode") == "hnsw":
            allowed["num_links"] = (2, MAX_LINKS)
            allowed["ef_search"] = (1, MAX_EF_SEARCH)
        if settings.get("mode") == "ivf":
            allowed["dimensions_per_code"] = (1, 2)
            for name in ("num_leaves", "num_searched", "num_reordered"):
                allowed[name] = (1, num_rows)
        return allowed

    @classmethod
    def index_row_bytes(cls, d_embed: int) -> int:
        """Of leaves: 4 bits a code; half precision; an id."""
        codes = d_embed // dimensions_per_code(d_embed)
        return -(-codes // 2) + 2 * d_embed + 8

    def cheapest_settings(self) -> dict[str, Any] | None:
        """Few rows or leaves; see `Backend.cheapest_settings`."""
        if self.settings["mode"] == "flat":
            return None
        if self.settings["mode"] == "hnsw":
            return {"ef_search": _FIRST_EF_SEARCH}
        return tuning.search_few_leaves(self.settings)

    def costlier_settings(self) -> list[dict[str, Any]]:
        """A longer walk, more leaves or more rescored rows: `Backend.costlier_settings`."""
        if self.settings["mode"] == "hnsw":
            kept = self.settings["ef_search"]
            most = min(MAX_EF_SEARCH, max(kept, self._num_rows))
            more = min(most, round(kept * _EF_SEARCH_GROWTH))
            return [{"ef_search": more}] if more > kept else []
        return tuning.search_or_rescore_more(self.settings, self._num_rows)

    def compute_cost(self, settings: Mapping[str, Any]) -> float:
        """See `Backend.compute_cost`."""
        if self.settings["mode"] == "hnsw":
            return 2.0 * self._d_embed * settings["num_links"] * settings["ef_search"]
        codes = self._d_embed / settings["dimensions_per_code"]
        return tuning.count_bytes(
            settings, self._num_rows * codes / 2, 2 * self._d_embed
        )
