"""The Beam pipeline builds what the plain build does; needs the [beam] extra."""

from __future__ import annotations

import dataclasses
import os
import pathlib

import numpy as np
import pytest
from corpus_files import line, load_models, write_corpus

from racm3_jax import storage
from racm3_jax.memory import beam as beam_build
from racm3_jax.memory import merge
from racm3_jax.memory.builder import CorpusConfig, build_memory
from racm3_jax.memory.memory import Memory

TESTS = pathlib.Path(__file__).parents[1]
CONFIG = CorpusConfig("exact", num_query_variants=2, deduplicate="near")
PROCESSES = (
    "--runner=FnApiRunner",
    "--direct_running_mode=multi_processing",
    "--direct_num_workers=2",
)


def corpus(folder: pathlib.Path) -> str:
    """40 documents in 4 shards, with repeats in and across them, one bad, one empty."""
    lines = [[line(i) for i in range(s, s + 10)] for s in range(0, 40, 10)]
    lines[0] += [line(3), "{no json"]
    lines[1] += [line(2, id="copy of 2"), line(5)]
    lines[3] += [line(12, id="12 in other words", caption="nation9 on scene1")]
    return write_corpus(folder, [*lines, ["{"]])


def bytes_of(path: pathlib.Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in storage.list_files(path)}


def build_plainly(source: str, path: pathlib.Path, config: CorpusConfig) -> None:
    tokenizer, embedder = load_models()
    build_memory(
        source, tokenizer=tokenizer, embedder=embedder, path=path, config=config
    )


def test_without_beam(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with pytest.raises(ImportError, match=r'pip install "racm3_jax\[beam\]"'):
        beam_build.import_beam()


def test_repeats_are_those_of_the_plain_build(tmp_path):
    """Tests the functions of the pipeline in one process and without Beam."""
    source = corpus(tmp_path / "in")
    build_plainly(source, tmp_path / "whole", CONFIG)
    job = beam_build._Job(source, load_models, str(tmp_path / "memory"), CONFIG)
    worker = beam_build._load_worker(job)
    job.work.mkdir()
    shared = type("Shared", (), {"acquire": lambda self, load: worker})()
    groups: dict = {}
    for number in (3, 0, 4, 2, 1):
        assert beam_build._make_part(job, shared, number) == number
        for key, place in beam_build._hash_rows(job, number):
            groups.setdefault(key, []).append(place)
    repeats = [
        x for group in groups.items() for x in beam_build._find_repeats(job, group)
    ]
    (job.work / "repeats-00000-of-00001").write_text("\n".join(repeats))
    folders = [p for p in sorted(job.work.glob("part-*")) if p.is_dir()][:4]
    found = beam_build._read_first_occurrences(job.work, folders)
    expected = merge.find_first_occurrences(folders)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [int((~a).sum()) for a in found] == [3, 0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [("--runner=FnApiRunner",), PROCESSES])
def test_the_pipeline_builds_the_same_bytes(tmp_path, monkeypatch, options):
    pytest.importorskip("apache_beam")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    source = corpus(tmp_path / "in")
    config = dataclasses.replace(CONFIG, max_bad=0.2)
    build_plainly(source, tmp_path / "whole", config)
    beam_build.build_memory_with_beam(
        source,
        load_models=load_models,
        path=tmp_path / "memory",
        config=config,
        options=options,
    )
    assert bytes_of(tmp_path / "memory") == bytes_of(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
        *("in", "memory", "whole")
    ]
    with Memory.load(tmp_path / "memory") as memory:
        report = memory.manifest["report"]
        assert report["bad"] == {"damaged JSON": 2}
        assert report["duplicates"]["equal id"] == 1
        assert report["duplicates"]["exact"] == 1
        assert len(memory) == 41
