"""Fréchet distance between sets of features, from sums that can be streamed and merged.

FID (arXiv 1706.08500) is this distance on Inception features, CLIP-FID on CLIP's image
embeddings. It needs only the number of images, the sum of their features and the sum of
the features' outer products, in float64: sets may be read in any order, in shards, by
several processes, and saved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from racm3_jax import storage

Symmetric = Float64[np.ndarray, "d d"]


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Sums over a set of images; immutable, so that partial sums cannot be counted twice.

    Attributes:
      count: number of images.
      total: sum of their features.
      products: sum of the outer products of each feature vector with itself.
    """

    count: int
    total: Float64[np.ndarray, " d"]
    products: Symmetric

    @classmethod
    def of(cls, features: Float[np.ndarray, "images d"]) -> FeatureStatistics:
        """The sums of some images.

        Raises:
          ValueError: if a feature is not finite: a single one would invalidate the set.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or not np.isfinite(features).all():
            raise ValueError(
                "features must be finite numbers [images, d]; got shape "
                f"{list(features.shape)} with {int((~np.isfinite(features)).sum())} that "
                "are not finite"
            )
        return cls(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        """The sums of both sets together."""
        if len(self.total) != len(other.total):
            raise ValueError(
                f"cannot add statistics of {len(self.total)} and {len(other.total)} "
                "features: they come from different networks"
            )
        return FeatureStatistics(
            self.count + other.count,
            self.total + other.total,
            self.products + other.products,
        )

    @property
    def mean(self) -> Float64[np.ndarray, " d"]:
        return self.total / self.count

    @property
    def covariance(self) -> Symmetric:
        """Divided by `count - 1`, as in `numpy.cov` and the FID tools.

        Raises:
          ValueError: for fewer than 2 images.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 images; got {self.count}")
        centred = self.products - np.outer(self.total, self.mean)
        return (centred + centred.T) / (2 * (self.count - 1))

    def fingerprint(self) -> str:
        """A fingerprint of the sums, bit for bit."""
        digest = hashlib.sha256(str(self.count).encode())
        digest.update(np.ascontiguousarray(self.total).tobytes())
        digest.update(np.ascontiguousarray(self.products).tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        """Writes an .npz atomically (temporary file, then rename).

        Args:
          path: ends in .npz.
          settings: of the features (network, resizing, images); `load` requires the same.
        """
        record = {"settings": dict(settings), "fingerprint": self.fingerprint()}
        stream = io.BytesIO()
        np.savez(
            stream,
            count=np.int64(self.count),
            total=self.total,
            products=self.products,
            record=np.frombuffer(json.dumps(record, sort_keys=True).encode(), np.uint8),
        )
        storage.write_file(Path(path), stream.getvalue())

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], settings: Mapping[str, Any]
    ) -> FeatureStatistics:
        """Loads a file of `save`.

        Raises:
          ValueError: the file is damaged, or has other settings.
        """
        try:
            stream = io.BytesIO(Path(path).read_bytes())
            with np.load(stream, allow_pickle=False) as file:
                found = cls(int(file["count"]), file["total"], file["products"])
                record = json.loads(file["record"].tobytes())
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no feature statistics: {error}") from error
        if record["fingerprint"] != found.fingerprint():
            raise ValueError(f"{path} is damaged: remove it to compute it again")
        wanted = json.loads(json.dumps(dict(settings)))
        for name in sorted(wanted.keys() | record["settings"].keys()):
            old, new = record["settings"].get(name), wanted.get(name)
            if old != new:
                raise ValueError(
                    f"{path} was made with {name}={old!r}, this run has {new!r}: distances "
                    "between them mean nothing; remove the file or change the setting"
                )
        return found


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2
    C1^(1/2), which is symmetric: singular covariances (fewer images than features) need no
    added constant, and the result is never complex.
    """
    if len(a.total) != len(b.total):
        raise ValueError(
            f"the sets have {len(a.total)} and {len(b.total)} features: use one network"
        )
    difference = a.mean - b.mean
    first, second = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle = root @ second @ root
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh((middle + middle.T) / 2), 0)).sum()
    distance = difference @ difference + np.trace(first) + np.trace(second) - 2 * shared
    return float(max(distance, 0.0))


def add_statistics(parts: Sequence[FeatureStatistics]) -> FeatureStatistics:
    """The sum of several sets, in the order given.

    Raises:
      ValueError: if there are none.
    """
    if not parts:
        raise ValueError("there are no statistics to add")
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
