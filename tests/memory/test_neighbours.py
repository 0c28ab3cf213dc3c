"""Tables of neighbours, copies of the main document, figures about a memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from corpus_files import forty, line, write_corpus
from joined_processes import started_together
from memory_fakes import FakeEmbedder, FakeTokenizer

from racm3_jax import checksums, storage
from racm3_jax.index import sharded
from racm3_jax.memory import format as format_lib
from racm3_jax.memory import neighbours
from racm3_jax.memory.builder import CorpusConfig, build_memory
from racm3_jax.memory.memory import UNUSED_WITH_TABLE, Memory
from racm3_jax.memory.neighbours import compute_neighbours
from racm3_jax.memory.plan import PlanConfig, compute_plan, format_plan
from racm3_jax.memory.stats import compute_stats
from racm3_jax.retrieval.retriever import Retriever
from racm3_jax.retrieval.strategy import StrategyConfig
from racm3_jax.sequences.causal_masking import CausalMaskingConfig
from racm3_jax.sequences.pipeline import PipelineConfig, make_batches


def batches(opened, start, **strategy):
    config = PipelineConfig(8, 64, 6, num_query_variants=2, prefetch=0)
    with make_batches(
        opened,
        Retriever(opened, StrategyConfig(num_candidates=8, **strategy)),
        np.arange(40),
        opened.vocab,
        CausalMaskingConfig(max_masks=4),
        config,
        start_step=start,
        num_steps=4,
    ) as made:
        return list(made)


def test_training_with_a_table_gives_the_batches_of_a_live_search(
    build, documents, tmp_path
):
    memory = build(documents, index="scann")
    compute_neighbours(memory, tmp_path / "table", 40, engine="memory")
    with Memory.load(memory.path) as tabled:
        tabled.use_table(tmp_path / "table", fallback=False)
        for removed in ([], [3, 17, 20]):
            if removed:
                memory.remove(removed)  # the other reader sees it: no new table
            for (a, a_stats), (b, b_stats) in zip(
                batches(memory, 4), batches(tabled, 4), strict=True
            ):
                assert a_stats == b_stats and a_stats["retrieved"] > 0
                for x, y in zip(a, b, strict=True):
                    np.testing.assert_array_equal(x, y)
        with pytest.raises(ValueError, match="is not in the table"):
            tabled.search(np.eye(128, dtype=np.float32)[:1], 2)


def damage(path, *kinds):
    """Other bytes in the files of these kinds."""
    for name in format_lib.read_manifest(path)["files"]:
        if format_lib.kind_of(name) in kinds:
            data = (path / name).read_bytes()
            (path / name).write_bytes(data[:-9] + bytes(9))


@pytest.mark.parametrize("comparing", [True, False])
def test_a_table_makes_index_and_embeddings_unnecessary(
    build, documents, tmp_path, comparing
):
    """They may be damaged, as they are never opened."""
    memory = build(documents, index="scann")
    compute_neighbours(memory, tmp_path / "table", 40)
    strategy = {} if comparing else {"max_similarity": 1.0}
    expected = batches(memory, 4, **strategy)
    later = UNUSED_WITH_TABLE
    # Documents of one example are compared only by their embeddings.
    damage(memory.path, *(later - {"embeddings_document"} if comparing else later))
    with pytest.raises(storage.IntegrityError, match="is corrupt"):
        Memory.load(memory.path)
    with Memory.load(memory.path, later=later) as tabled:
        tabled.use_table(tmp_path / "table")
        for (a, a_stats), (b, b_stats) in zip(
            expected, batches(tabled, 4, **strategy), strict=True
        ):
            assert a_stats == b_stats and a_stats["retrieved"] > 0
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)
        for use in (
            lambda: tabled.image_embeddings,
            lambda: tabled.queries(np.arange(3), "text", 0),
            lambda: tabled.search(np.eye(128, dtype=np.float32)[:1], 2),
        ):
            with pytest.raises(storage.IntegrityError, match="is corrupt"):
                use()


def test_four_hosts_read_their_parts_of_a_table(
    build, documents, tmp_path, reading, four_hosts, monkeypatch
):
    memory = build(documents)
    compute_neighbours(memory, memory.path / "table", 8)
    monkeypatch.setenv("RACM3_CACHE", str(tmp_path / "cache"))
    describe = checksums.describe_together
    files = memory.manifest["files"].items()
    needed = [
        f["bytes"] for n, f in files if format_lib.kind_of(n) not in UNUSED_WITH_TABLE
    ]
    tables = [
        (memory.path / "table" / f"{n}.npy").stat() for n in ("ids", "keys", "scores")
    ]
    total = sum(needed) + sum(status.st_size for status in tables)
    reading.take()

    def open_and_search(_):
        opened = Memory.load(memory.path, describe=describe, later=UNUSED_WITH_TABLE)
        opened.use_table(memory.path / "table", describe=describe)
        found = opened.search(opened.queries(np.arange(40), "image", 1), 8)
        opened.close()
        return found.ids.tolist(), opened._files

    found = four_hosts(open_and_search)
    expected = memory.search(memory.queries(np.arange(40), "image", 1), 8).ids
    for ids, opened in found:
        assert ids == expected.tolist()
        assert opened._index is None and not UNUSED_WITH_TABLE & set(opened._columns)
    # Each file once, by one of the four.
    assert sum(reading.bytes.values()) == total and len(reading.bytes) == 4


def stop_after(num_queries):
    """Progress that stops the work after `num_queries`."""

    def progress(done, total):
        if done > num_queries:
            raise RuntimeError("no more")

    return progress


def test_an_interrupted_table_resumes(build, documents, tmp_path, monkeypatch):
    memory = build(documents)
    whole, again = tmp_path / "whole", memory.path / "table"
    compute_neighbours(memory, whole, 5)
    monkeypatch.setattr(neighbours, "ROWS_PER_PART", 16)
    monkeypatch.setattr(neighbours, "QUERIES_PER_BLOCK", 10)

    for done, num_folders in ((0, 0), (100, 1)):  # without a part nothing is left
        with pytest.raises(RuntimeError, match="no more"):
            compute_neighbours(memory, again, 5, progress=stop_after(done))
        assert len(list(memory.path.glob(".table-parts.*"))) == num_folders
    (work,) = memory.path.glob(".table-parts.*")
    parts = {p.name: p.stat().st_ino for p in work.glob("*.npz")}
    assert len(parts) == 7
    Memory.load(memory.path).close()  # readers do not see it
    with (
        storage.locked(work),
        pytest.raises(storage.BusyError, match="are already being computed"),
    ):
        compute_neighbours(memory, again, 5)
    counts = []
    damaged = work / "00002.npz"
    good, _ = damaged.read_bytes(), damaged.write_bytes(b"PK")
    with pytest.raises(storage.IntegrityError, match=r"00002.npz is damaged .* remove"):
        compute_neighbours(memory, again, 5, progress=lambda *c: counts.append(c))
    assert counts[0][0] > 96 and counts[-1] == (240, 240)
    damaged.write_bytes(good)
    assert {
        p.name: p.stat().st_ino for p in work.glob("*.npz")
    }.items() >= parts.items()
    compute_neighbours(memory, again, 5)
    for name in storage.list_files(whole):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    assert not work.exists()
    work.mkdir()
    (work / "00000.npz").write_bytes(b"of another table")
    assert compute_neighbours(memory, again, 4).width == 4


# The bytes two processes read to open a memory; its table; and their joint results.
TOGETHER = """
from racm3_jax.training.processes import join_processes
join_processes()
import pathlib, sys
import jax, numpy as np
from racm3_jax import checksums, storage
from racm3_jax.memory import neighbours
from racm3_jax.memory.memory import Memory
from racm3_jax.sharding import leader_first
path, out = map(pathlib.Path, sys.argv[1:])
hashed = {}
compute = storage.compute_sha256
def count(path):
    hashed[str(path)] = path.stat().st_size
    return compute(path)
storage.compute_sha256 = count
own = out / str(jax.process_index())
with Memory.load(path, describe=checksums.describe_together, later={"index"}) as memory:
    (own / "hashed").write_text(str(sum(hashed.values())))
    neighbours.ROWS_PER_PART, neighbours.QUERIES_PER_BLOCK = 30, 20
    neighbours.compute_neighbours(memory, out / "two", 5)
    hashed.clear()
    memory.share_index()
    (own / "shards").write_text("\\n".join(hashed))
    for start in range(0, 10 * (2 - jax.process_index()), 10):  # one asks more often
        found = memory.index.search(memory.queries(np.arange(40), "text"), 7)
    np.savez(own / "found.npz", **found._asdict())
    with leader_first():
        pass  # the others have asked
"""


def test_two_processes_give_the_table_of_one(build, documents, tmp_path, monkeypatch):
    """Each reads its part of the files, its part of the queries, its shards."""
    monkeypatch.setattr(sharded, "ROWS_PER_SHARD", 15)
    memory = build(documents, index="scann_sharded")
    compute_neighbours(memory, tmp_path / "one", 5)
    # An odd number of parts is left to make, of one block and of two.
    monkeypatch.setattr(neighbours, "ROWS_PER_PART", 30)
    with pytest.raises(RuntimeError, match="no more"):
        compute_neighbours(memory, tmp_path / "two", 5, progress=stop_after(30))
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    monkeypatch.setenv("RACM3_CACHE", str(tmp_path / "cache"))
    arguments = (TOGETHER, memory.path, tmp_path)
    with started_together(*arguments, total=2, devices=2) as running:
        done = [process.communicate(timeout=300) for process in running]
    for process, (_, errors) in zip(running, done, strict=True):
        assert process.returncode == 0, errors.decode()[-2000:]
    for name in storage.list_files(tmp_path / "one"):
        assert (tmp_path / "two" / name).read_bytes() == (
            tmp_path / "one" / name
        ).read_bytes()
    files = memory.manifest["files"]
    total = sum(f["bytes"] for n, f in files.items() if "index/" not in n)
    hashed = [int((tmp_path / n / "hashed").read_text()) for n in "01"]
    assert sum(hashed) == total and max(hashed) < 0.6 * total
    expected = memory.index.search(memory.queries(np.arange(40), "text"), 7)
    for number, own in (("0", {0, 2}), ("1", {1})):
        opened = (tmp_path / number / "shards").read_text().split("\n")
        names = [name.partition("/index/")[2] for name in opened]
        # The whole description is available once one process of a machine has read it.
        assert set(map(sharded.shard_of, names)) - {None} == own
        found = np.load(tmp_path / number / "found.npz")
        for name, values in expected._asdict().items():
            np.testing.assert_array_equal(found[name], values)


def test_the_table_of_a_config_is_built_once_and_read(build, documents, monkeypatch):
    from ml_collections import ConfigDict

    from racm3_jax.wiring import parts

    memory = build(documents)
    config = ConfigDict(
        {"memory": {"index": "exact"}, "strategy": {"max_candidates": 64}}
    )
    parts.prepare_search(config, memory)
    assert not (memory.path / "table").exists()
    config.memory.index = "table"
    queries = memory.queries(np.arange(40), "text", 1)
    expected = memory.search(queries, 5)
    parts.prepare_search(config, memory)
    assert memory.index.width == 40 and memory.index.num_queries == 240
    monkeypatch.setattr(parts, "compute_neighbours", None)  # not built again
    damage(memory.path, *UNUSED_WITH_TABLE)
    said = []
    monkeypatch.setattr(parts.logging, "info", said.append)
    for share in (1.0, 0.1):
        config.memory.verify_share = share
        models = (FakeTokenizer(), FakeEmbedder())
        with parts.open_memory(config, memory.path, *models) as again:
            parts.prepare_search(config, again)
            np.testing.assert_array_equal(again.search(queries, 5).ids, expected.ids)
        assert len(said) == (2 if share < 1 else 0)
    assert f"of {memory.path}, " in said[0] and f"of {memory.path / 'table'}" in said[1]


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
    with pytest.raises(ValueError, match="was computed from another memory"):
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
        # Without hashes they would be: the copy is the nearest of all.
        memory.content_hashes = None
        results = Retriever(memory, strategy).retrieve(queries, np.full(24, 3), mains)
        assert (results[0].ids[:1] == [12]).all()


def test_a_table_replaces_only_a_table(build, documents, tmp_path):
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
