"""The suite of likelihoods, with a stand-in for the forward pass."""

import json
import threading
import zlib

import jax
import numpy as np
import pytest
from evaluation_fakes import caption, digest, make_generator, make_memory, picture

from racm3_jax.evaluation.document_sets import (
    ShotPool,
    choose_documents,
    choose_pool,
)
from racm3_jax.evaluation.fingerprints import describe_documents
from racm3_jax.evaluation.likelihood_suite import LikelihoodSuite
from racm3_jax.evaluation.settings import LikelihoodSettings
from racm3_jax.types import Document, Segment

COUNT = 22


class Scorer:
    """Nats that depend on a sequence alone; `budget` of them may be computed."""

    def __init__(self):
        self.budget = 10**9

    def __call__(self, generator, sequences, num_rows=8):
        if self.budget < len(sequences):
            raise KeyboardInterrupt
        self.budget -= len(sequences)
        found = []
        for context, targets in sequences:
            seed = zlib.crc32(np.concatenate([context, targets]).tobytes())
            spread = np.random.default_rng(seed).uniform(0, 1, len(targets))
            found.append(spread + 1 / len(context))
        return found


@pytest.fixture
def scorer(monkeypatch):
    stand_in = Scorer()
    for module in ("evaluation.perplexity", "generation.likelihood"):
        monkeypatch.setattr(f"racm3_jax.{module}.score_tokens", stand_in)
    return stand_in


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    opened = make_memory(tmp_path_factory.mktemp("memory") / "memory")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def documents():
    return [
        Document(
            f"m{i}" if i < 5 else f"d{i}",  # the memory has documents m0, m1, ...
            (
                Segment(text=f"memory {i}" if i < 5 else caption(i)),
                Segment(image=picture(i if i < 3 else 1000 + i)),
            ),
            metadata={"kind": f"k{i % 5}"},
        )
        for i in range(COUNT)
    ]


def make_settings(**changes):
    values = {
        "chunk_size": 6,
        "num_resamples": 20,
        "num_sheet_rows": 2,
        "num_episodes": 9,
        "shots": (0, 1),
    }
    return LikelihoodSettings(**(values | changes))


def run(memory, documents, workdir, settings=None, **more):
    generator = make_generator(memory)
    more = {"pool": choose_pool(documents, "kind"), "twin": generator} | more
    suite = LikelihoodSuite(
        generator, documents, settings or make_settings(), workdir, **more
    )
    return suite.run(log=lambda line: None)


def test_every_figure_stands_beside_its_baselines(scorer, memory, documents, tmp_path):
    results = run(memory, documents, tmp_path)
    assert results is not None
    for variant in ("retrieval", "no_retrieval", "random", "copy", "twin"):
        for figure in ("text_perplexity", "image_perplexity", "bits_per_image"):
            found = results[f"{variant}/{figure}"]
            low, high = found.interval
            assert low <= found.value <= high and found.total == COUNT
    assert results["retrieval/num_retrieved"] == results["random/num_retrieved"] == 2
    assert results["no_retrieval/num_retrieved"] == results["twin/num_retrieved"] == 0
    assert results["retrieval/text_perplexity"] != results["random/text_perplexity"]
    assert results["no_retrieval/bits_per_image"] == results["twin/bits_per_image"]
    assert results["kshot/0/model"].total == results["kshot/1/model"].total == 9
    assert results["kshot/1/random"].total == results["kshot/1/copy"].total == 9
    assert results["kshot/chance"] == 0.5
    # Five of the documents are in the memory too.
    assert results["recall/text_to_document@1"].total == 5
    assert results["recall/image_to_document@10"].total == 5
    assert results["recall/text_to_document@1/chance"] == pytest.approx(1 / 40)
    assert results["recall/text_to_image@1"].total == COUNT
    assert results["num_near_duplicates_removed"] >= 3
    record = json.loads((tmp_path / "results.json").read_text())
    for name in ("model", "twin", "tokenizer", "retrieval_clip", "run"):
        assert len(record["settings"][name]) > 4
    assert record["settings"]["memory"]["fingerprint"] == memory.fingerprint()
    assert record["settings"]["data"] == describe_documents(documents)
    assert record["settings"]["protocol"]["seed"] == 0
    table = (tmp_path / "table.md").read_text()
    assert "| bits_per_image |" in table and "| image_to_text@10 |" in table
    assert "| 1 shots |" in table
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_killed_once_and_resumed(scorer, memory, documents, tmp_path):
    run(memory, documents, tmp_path / "whole")
    scorer.budget = COUNT + 10
    with pytest.raises(KeyboardInterrupt):
        run(memory, documents, tmp_path / "killed")
    assert not (tmp_path / "killed" / "results.json").exists()
    made = list((tmp_path / "killed" / "parts").iterdir())
    assert len(made) == 4 + 4 + 1  # embedded, retrieval, some of no_retrieval
    stamps = {p: p.stat().st_mtime_ns for p in made}
    scorer.budget = 10**9
    run(memory, documents, tmp_path / "killed")
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    for name in ("results.json", "table.md", "samples.png"):
        assert digest(tmp_path / "killed" / name) == digest(tmp_path / "whole" / name)
    with pytest.raises(ValueError, match="other settings"):
        run(memory, documents, tmp_path / "killed", make_settings(seed=1))


def test_processes_and_devices_change_nothing(scorer, memory, documents, tmp_path):
    run(memory, documents, tmp_path / "one")
    threads = []
    for index in range(2):
        process = {"process_index": index, "process_count": 2}
        arguments = (memory, documents, tmp_path / "two")
        threads.append(threading.Thread(target=run, args=arguments, kwargs=process))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(memory, documents, tmp_path / "devices", devices=jax.devices()[:2])
    for place in ("two", "devices"):
        for name in ("results.json", "samples.png"):
            assert digest(tmp_path / place / name) == digest(tmp_path / "one" / name)


def test_without_a_twin_or_classes(scorer, memory, documents, tmp_path):
    texts = [Document(d.id, d.segments[:1]) for d in documents[:8]]
    results = run(
        memory, texts, tmp_path, make_settings(shots=()), twin=None, pool=None
    )
    assert results is not None
    assert not [name for name in results if name.startswith(("twin", "kshot"))]
    assert "retrieval/text_perplexity" in results
    assert "retrieval/image_perplexity" not in results
    assert "recall/text_to_image@1" not in results
    assert not list(tmp_path.glob("samples*"))


def test_right_documents_are_those_of_the_same_class(memory, documents, tmp_path):
    with pytest.raises(ValueError, match="a generator with a memory"):
        LikelihoodSuite(make_generator(), documents, make_settings(), tmp_path)
    with pytest.raises(ValueError, match="no documents"):
        LikelihoodSuite(make_generator(memory), [], make_settings(), tmp_path)
    suite = LikelihoodSuite(
        make_generator(memory), documents, make_settings(), tmp_path, class_key="kind"
    )
    assert suite.right == [[]] * COUNT  # this memory has no such metadata


def test_sets_are_chosen_by_hash(documents):
    chosen = choose_documents(documents, 7)
    assert choose_documents(documents[::-1], 7) == chosen
    assert choose_documents(documents, 0) == documents
    with pytest.raises(ValueError, match="the source has 22"):
        choose_documents(documents, 23)
    assert describe_documents(chosen) != describe_documents(chosen[::-1])
    pool = choose_pool(documents, "kind")
    assert isinstance(pool, ShotPool) and pool.classes[:2] == ["k0", "k1"]
    assert choose_pool(documents, "nation") is None
    assert choose_pool(documents, "") is None


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="no_retrieval"):
        make_settings(variants=("oracle",))
    with pytest.raises(ValueError, match="query is 'both'; allowed: text, image"):
        make_settings(query="both")
    with pytest.raises(ValueError, match="num_episodes must be >= 1"):
        make_settings(num_episodes=0)
