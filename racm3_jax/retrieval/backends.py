"""Which back end a memory gets: built by its kind, opened by its description."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Literal

import numpy as np
from jaxtyping import Float

from racm3_jax.retrieval.exact_index import ExactIndex
from racm3_jax.retrieval.index import Index, IndexKind, read_description
from racm3_jax.retrieval.rows import Rows
from racm3_jax.retrieval.scann_index import ScannConfig, ScannIndex

# Below this, the exact search is as fast as any.
MIN_SCANN_ROWS = 1024


def has_scann() -> bool:
    """ScaNN has wheels for Linux only."""
    return importlib.util.find_spec("scann") is not None


def choose_kind(kind: IndexKind | Literal["auto"], num_rows: int) -> IndexKind:
    """Resolves "auto": ScaNN where it exists and the memory is not tiny.

    Raises:
      ValueError: on any other word.
    """
    if kind == "auto":
        return "scann" if has_scann() and num_rows >= MIN_SCANN_ROWS else "exact"
    if kind not in ("exact", "scann"):
        raise ValueError(f'index must be "exact", "scann" or "auto"; got {kind!r}')
    return kind


def build_index(
    kind: IndexKind | Literal["auto"],
    embeddings: Float[np.ndarray, "rows d_embed"],
    path: pathlib.Path,
) -> Index:
    """Builds an index of the rows and writes it into the directory `path`."""
    if choose_kind(kind, len(embeddings)) == "scann":
        return ScannIndex.build(embeddings, ScannConfig(), pathlib.Path(path))
    index = ExactIndex(embeddings)
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    index.save(pathlib.Path(path))
    return index


def open_index(
    path: str | pathlib.Path,
    embeddings: Float[np.ndarray, "rows d_embed"] | Rows | None = None,
    *,
    verify: bool = True,
) -> Index:
    """Opens an index of either kind.

    Args:
      path: the directory that `build_index` wrote.
      embeddings: the rows; an exact index keeps no copy of its own.
      verify: False where the caller has checked the sha256 of the files already.

    Raises:
      FileNotFoundError: if there is no index.
      IntegrityError: if a file is damaged.
      ValueError: if an exact index is opened without its rows, or with others.
    """
    path = pathlib.Path(path)
    description = read_description(path)
    if description["kind"] == "scann":
        return ScannIndex.load(path, verify=verify)
    if embeddings is None:
        raise ValueError(
            f"the index at {path} is exact and keeps no rows of its own: "
            "pass the embeddings that it was built from"
        )
    expected = (description["num_rows"], description["d_embed"])
    if embeddings.shape != expected:
        raise ValueError(
            f"the index at {path} was built from {list(expected)} embeddings; "
            f"got {list(embeddings.shape)}"
        )
    return ExactIndex(np.asarray(embeddings))
