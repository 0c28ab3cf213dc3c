"""A back end is a file and one line of the table; tested with a small one."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from index_vectors import D_EMBED, QUERIES, ROWS

from racm3_jax import cli, storage
from racm3_jax.index import registry
from racm3_jax.index.contract import Backend
from racm3_jax.memory.config import CorpusConfig
from racm3_jax.memory.plan import PlanConfig, compute_plan, format_plan


class HalfIndex(Backend):
    """All rows in half precision, in NumPy."""

    kind = "half"
    files = frozenset({"rows.npy"})

    def __init__(self, rows, settings):
        super().__init__(*rows.shape, settings)
        self._rows = rows

    @classmethod
    def _build(cls, embeddings, config):
        return cls(embeddings.astype(np.float16), {"num_read": 1})

    def _write(self, path):
        np.save(path / "rows.npy", self._rows)

    @classmethod
    def _open(cls, path, description, embeddings):
        return cls(np.load(path / "rows.npy"), description.settings)

    def _search(self, queries, k):
        scores = queries @ self._rows.astype(np.float32).T
        scores[:, self.settings["num_read"] :] = -np.inf
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return ids, np.take_along_axis(scores, ids, axis=1)

    @classmethod
    def allowed_settings(cls, settings, num_rows, d_embed):
        return {"num_read": (1, num_rows)}

    def cheapest_settings(self):
        return {"num_read": 1}

    def costlier_settings(self):
        read = self.settings["num_read"]
        return [{"num_read": min(len(self), 4 * read)}] if read < len(self) else []

    def compute_cost(self, settings):
        return 2.0 * settings["num_read"]


@pytest.fixture(autouse=True)
def table(monkeypatch):
    module = types.ModuleType("racm3_jax.index.half")
    module.HalfIndex = HalfIndex  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    line = registry.Entry("half:HalfIndex", library="numpy", is_shardable=True)
    monkeypatch.setattr(registry, "TABLE", {"half": line, **registry.TABLE})


def test_it_is_built_tuned_searched_and_opened(tmp_path):
    from racm3_jax.index import tuning

    def tune(index, path, rows):
        tuning.tune(index, path, rows, {"text": QUERIES}, recall_target=0.95)

    for kind in ("half", "half_sharded"):
        path = tmp_path / kind
        built = registry.build_index(kind, ROWS, path, 160, tune)
        opened = registry.open_index(path)
        assert type(opened) is type(built)
        expected = np.argsort(-(QUERIES @ ROWS.T), axis=1, kind="stable")[:, :10]
        assert (opened.search(QUERIES, 10).ids == expected).mean() > 0.9
        (path / "x").write_bytes(b"")
        with pytest.raises(storage.IntegrityError, match="'x', which was not written"):
            registry.open_index(path)
    assert opened._shards[0][1].settings["num_read"] == 160


def test_it_is_chosen(tmp_path):
    assert registry.choose_kind("auto", 10_000) == "half"
    assert registry.choose_kind("auto", 10) == "exact"
    with pytest.raises(ValueError, match='one of "half", .*"half_sharded"'):
        CorpusConfig(index="hnsw")
    assert CorpusConfig(index="half_sharded").index == "half_sharded"
    fitting = registry.fit_ram("half", 5000, D_EMBED, 2000 * 4 * D_EMBED)
    assert fitting == ("half_sharded", 2000)


def test_the_command_line_and_the_plan_know_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(["memory", "build", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert "auto|half|scann|faiss|exact|half_sharded|scann_sharded" in shown
    config = PlanConfig(1000, index="half")
    assert "search with half " in format_plan(config, compute_plan(config))
