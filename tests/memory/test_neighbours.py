"""Tables of neighbours, copies of the main document, figures about a memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from corpus_files import forty, line, write_corpus
from memory_fakes import FakeEmbedder, FakeTokenizer

from racm3_jax.memory.builder import CorpusConfig, build_memory
from racm3_jax.memory.memory import Memory
from racm3_jax.memory.neighbours import compute_neighbours
from racm3_jax.memory.plan import PlanConfig, compute_plan, format_plan
from racm3_jax.memory.stats import compute_stats
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.pipeline import PipelineConfig, make_batches


def test_training_with_a_table_gives_the_batches_of_a_live_search(
    build, documents, tmp_path
):
    memory = build(documents, index="scann")
    compute_neighbours(memory, tmp_path / "table", 40, engine="memory")
    config = PipelineConfig(8, 64, 6, num_query_variants=2, prefetch=0)

    def batches(opened, start):
        with make_batches(
            opened,
            Retriever(opened, StrategyConfig(num_candidates=8)),
            np.arange(40),
            opened.vocab,
            CausalMaskingConfig(max_masks=4),
            config,
            start_step=start,
            num_steps=4,
        ) as made:
            return list(made)

    with Memory.load(memory.path) as tabled:
        tabled.use_table(tmp_path / "table", fallback=False)
        for removed in ([], [3, 17, 20]):
            if removed:
                memory.remove(removed)  # reaches the other reader: no new table
            for (a, a_stats), (b, b_stats) in zip(
                batches(memory, 4), batches(tabled, 4), strict=True
            ):
                assert a_stats == b_stats and a_stats["retrieved"] > 0
                for x, y in zip(a, b, strict=True):
                    np.testing.assert_array_equal(x, y)
        with pytest.raises(ValueError, match="is not in the table"):
            tabled.search(np.eye(128, dtype=np.float32)[:1], 2)


def test_the_config_s_table_is_made_once_and_read(build, documents, monkeypatch):
    from ml_collections import ConfigDict

    from racm3_jax.wiring import parts

    memory = build(documents)
    config = ConfigDict(
        {"memory": {"index": "exact"}, "strategy": {"max_candidates": 64}}
    )
    parts.use_table(config, memory)
    assert not (memory.path / "table").exists()
    config.memory.index = "table"
    queries = memory.queries(np.arange(40), "text", 1)
    expected = memory.search(queries, 5)
    parts.use_table(config, memory)
    assert memory.index.width == 40 and memory.index.num_queries == 240
    monkeypatch.setattr(parts, "compute_neighbours", None)  # not made again
    with Memory.load(memory.path) as again:
        parts.use_table(config, again)
        np.testing.assert_array_equal(again.search(queries, 5).ids, expected.ids)


def test_exact_neighbours_on_the_mesh(build, documents, tmp_path):
    memory = build(documents)
    counts = []
    table = compute_neighbours(
        memory, tmp_path / "t", 5, progress=lambda *c: counts.append(c)
    )
    assert counts[-1] == (240, 240)
    queries = memory.queries(np.arange(40), "image", 2)
    expected = np.sort(queries @ np.asarray(memory.embeddings).T, axis=1)[:, :-6:-1]
    found = table.search(queries, 5)
    np.testing.assert_allclose(found.scores, expected, atol=1e-6)
    other = build(documents[:20], "other")
    with pytest.raises(ValueError, match="was made of another memory"):
        other.use_table(tmp_path / "t")
    with pytest.raises(ValueError, match='"exact" or "memory"; got \'faiss\''):
        compute_neighbours(memory, tmp_path / "t", 5, engine="faiss")


def test_copies_of_the_main_document_are_not_retrieved(tmp_path):
    lines = [line(i) for i in range(12)]
    lines += [line(i, id=f"copy-{i}", url=f"http://other/{i}") for i in range(12)]
    build_memory(
        write_corpus(tmp_path / "in", [lines]),
        tokenizer=FakeTokenizer(),
        embedder=FakeEmbedder(),
        path=tmp_path / "memory",
        config=CorpusConfig("exact", num_query_variants=0, deduplicate="none"),
    )
    with Memory.load(tmp_path / "memory") as memory:
        mains = memory.documents(np.arange(24))
        strategy = StrategyConfig(max_similarity=1.01)
        queries = memory.queries(np.arange(24), "text")
        results = Retriever(memory, strategy).retrieve(queries, np.full(24, 3), mains)
        for row, result in enumerate(results):
            assert len(result.ids) == 3
            assert not set(result.ids.tolist()) & {row % 12, row % 12 + 12}
        # Without hashes they would have been: the copy is the nearest of all.
        memory.content_hashes = None
        results = Retriever(memory, strategy).retrieve(queries, np.full(24, 3), mains)
        assert (results[0].ids[:1] == [12]).all()


def test_a_table_replaces_nothing_but_a_table(build, documents, tmp_path):
    memory = build(documents[:6])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (memory.path, tmp_path / "folder", tmp_path / "file"):
        with pytest.raises(FileExistsError, match="is not a table of neighbours"):
            compute_neighbours(memory, path, 2)
    assert (tmp_path / "folder" / "mine.txt").exists() and len(Memory.load(memory.path))
    for k in (2, 3):
        assert compute_neighbours(memory, tmp_path / "table", k).width == k


def test_stats(tmp_path):
    build_memory(
        forty(tmp_path / "in"),
        tokenizer=FakeTokenizer(),
        embedder=FakeEmbedder(),
        path=tmp_path / "memory",
        config=CorpusConfig("scann", num_query_variants=1),
    )
    with Memory.load(tmp_path / "memory") as memory:
        memory.remove([2])
        stats = compute_stats(memory, num_queries=20, k=5)
        assert stats["documents"] == 39 and stats["removed"] == 1
        assert stats["multimodal"] == stats["with_text"] == 40
        assert stats["recall"]["text"] > 0.9 and stats["recall"]["image"] > 0.9
        assert stats["latency_ms"]["text"]["p50"] > 0
        assert stats["near_duplicates"] == 0
        assert stats["bytes"]["embeddings_text"] > 40 * 128 * 4
        assert stats["bytes"]["index"] > 0
        assert sum(stats["bytes"].values()) == sum(
            f["bytes"] for f in memory.manifest["files"].values()
        )
        memory.remove(np.arange(40))
        with pytest.raises(ValueError, match="every document"):
            compute_stats(memory)


def test_plan():
    config = PlanConfig(150_000_000, hosts=64)
    plan = compute_plan(config)
    assert plan["disk_bytes"]["embeddings"] == 3 * 4 * 768 * 150_000_000
    assert plan["disk_bytes"]["queries"] == 2 * 4 * 2 * 768 * 150_000_000
    assert plan["ram_bytes_per_host"]["exact"] == 2_343_750 * 768 * 4
    assert plan["flops"]["exact_neighbours"] == 2 * 10 * 150e6**2 * 768
    half = compute_plan(dataclasses.replace(config, hosts=128))
    for name, hours in plan["hours"].items():
        assert half["hours"][name]["embed"] == pytest.approx(hours["embed"] / 2)
    text = format_plan(config, plan)
    assert "150,000,000 documents x 768" in text and "NVIDIA H100" in text
    assert "search with scann_sharded" in text and plan["index"] == "scann_sharded"
    other = compute_plan(dataclasses.replace(config, index="exact"))
    assert other["disk_bytes"]["index"] == 4 * 768 * 150_000_000
    with pytest.raises(ValueError, match="'faiss_sharded'; got 'hnsw'"):
        PlanConfig(10, index="hnsw")
    with pytest.raises(ValueError, match="hosts must be >= 1; got 0"):
        PlanConfig(10, hosts=0)
