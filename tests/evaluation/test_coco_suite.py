import json
import threading

import jax
import numpy as np
import pytest
from evaluation_fakes import (
    VOCAB,
    ColourFeatures,
    Embedder,
    StubGenerator,
    caption,
    digest,
    make_coco,
    make_generator,
    make_memory,
)

from racm3_jax.evaluation.clip_score import CLIPFeatures, CLIPScorer
from racm3_jax.evaluation.coco import (
    choose_items,
    fingerprint_items,
    read_coco,
    read_karpathy,
)
from racm3_jax.evaluation.coco_tasks import CocoCaptioning, CocoTextToImage
from racm3_jax.evaluation.frechet import FeatureStatistics
from racm3_jax.evaluation.replicas import Replicas
from racm3_jax.evaluation.settings import CocoSettings
from racm3_jax.generation.likelihood import Scored, score_tokens
from racm3_jax.types import Document

COUNT = 200


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("coco") / "coco", COUNT)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    opened = make_memory(tmp_path_factory.mktemp("memory") / "memory")
    yield opened
    opened.close()


def make_settings(task="text_to_image", **changes):
    values = {
        "image_size": 16,
        "num_samples": 1,
        "chunk_size": 48,
        "num_resamples": 20,
        "num_distance_resamples": 4,
        "num_sheet_rows": 2,
    }
    return CocoSettings(task, **(values | changes))


def make_suite(generator, coco, workdir, settings, **process):
    if settings.task == "captioning":
        items = read_karpathy(coco)
        return CocoCaptioning(generator, items, settings, workdir, **process)
    judge: dict = {
        "extractors": {"colour": ColourFeatures(), "clip": CLIPFeatures(Embedder())},  # pyright: ignore
        "scorer": CLIPScorer(Embedder()),  # pyright: ignore
    }
    items = choose_items(read_coco(coco), COUNT)
    return CocoTextToImage(generator, items, settings, workdir, **judge, **process)


def run(generator, coco, workdir, settings=None, **process):
    settings = settings or make_settings()
    suite = make_suite(generator, coco, workdir, settings, **process)
    return suite.run(log=lambda line: None)


def test_lists_are_chosen_by_hash_and_named_by_fingerprint(coco):
    items = read_coco(coco)
    assert len(items) == COUNT
    assert {item.caption in item.captions for item in items} == {True}
    chosen = choose_items(items, 50)
    assert choose_items(items[::-1], 50) == chosen
    assert choose_items(items, 20) == chosen[:20]
    assert fingerprint_items(chosen) != fingerprint_items(chosen[::-1])
    assert chosen[0].read(16).shape == (16, 16, 3)
    karpathy = read_karpathy(coco)
    assert len(karpathy) == 150 and karpathy[0].captions[0] == caption(1)
    with pytest.raises(ValueError, match="the split has 200"):
        choose_items(items, 201)
    with pytest.raises(ValueError, match="no split 'val'"):
        read_karpathy(coco, "val")
    with pytest.raises(ValueError, match="unpack COCO's annotations"):
        read_coco(coco / "val2014")


def test_an_item_is_a_document(coco):
    document = read_coco(coco)[0].document(8)
    assert isinstance(document, Document)
    assert document.images[0].shape == (8, 8, 3) and document.text


def test_from_files_to_results_killed_once_and_resumed(coco, memory, tmp_path):
    whole = run(StubGenerator(memory), coco, tmp_path / "whole")
    killed = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run(StubGenerator(memory, budget=COUNT + 100), coco, killed)
    assert not (killed / "results.json").exists()
    finished = {p: p.stat().st_mtime_ns for p in killed.rglob("parts/*")}
    assert len(finished) == 5 + 5 + 2  # real, retrieval, some of no_retrieval
    run(StubGenerator(memory), coco, killed)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in finished.items())
    for name in ("results.json", "table.md", "samples.png"):
        assert digest(killed / name) == digest(tmp_path / "whole" / name)
    assert not list(killed.rglob("*.tmp"))

    record = json.loads((killed / "results.json").read_text())
    assert whole is not None
    for variant in ("retrieval", "no_retrieval", "copy", "random"):
        distance = record["results"][f"{variant}/colour_frechet"]
        assert distance["value"] > 0 and len(distance["interval95"]) == 2
        score = record["results"][f"{variant}/clip_score"]
        low, high = score["interval95"]
        assert low <= score["value"] <= high and score["total"] == COUNT
        assert 0 <= record["results"][f"{variant}/clip_precision"] <= 1
    values = {record["results"][f"{v}/colour_frechet"]["value"] for v in
              ("retrieval", "no_retrieval", "copy", "random")}  # fmt: skip
    assert len(values) == 4
    settings = record["settings"]
    assert settings["protocol"]["num_samples"] == 1
    assert settings["clip_score"]["is_retrieval_model"] is True
    for name in ("model", "pixels", "run", "tokenizer", "retrieval_clip"):
        assert len(settings[name]) > 4
    assert settings["memory"]["fingerprint"] == memory.fingerprint()
    assert "| colour_frechet |" in (killed / "table.md").read_text()


def test_near_duplicates_are_counted_and_never_retrieved(coco, memory, tmp_path):
    settings = make_settings(variants=("retrieval", "copy", "random"))
    suite = make_suite(StubGenerator(memory), coco, tmp_path, settings)
    results = suite.run(log=lambda line: None)
    assert results is not None and results["num_near_duplicates_removed"] == 3
    # The order of rows is the builder's; ids are fixed.
    near = set(memory.find(["m0", "m1", "m2"]).tolist())
    assert len(near) == 3
    for variant in settings.variants:
        rows = suite.parts.load(variant)["retrieved"]
        assert not set(rows.ravel().tolist()) & near
        assert (rows[:, 0] >= 0).all()
    assert memory.num_allowed == len(memory)


def test_a_foreign_image_is_not_replaced(coco, memory, tmp_path):
    suite = make_suite(
        StubGenerator(memory), coco, tmp_path, make_settings(variants=("copy",))
    )
    mine = suite.image_path("copy", 0)
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="give another --workdir"):
        suite.run(log=lambda line: None)
    assert mine.read_bytes() == b"mine"


def test_captioning_with_its_baselines(coco, memory, tmp_path):
    settings = make_settings("captioning", prefix="Photo of ")
    results = run(StubGenerator(memory), coco, tmp_path, settings)
    assert results is not None
    for variant in settings.variants:
        assert results[f"{variant}/cider"].total == 150
        assert results[f"{variant}/bleu_1"].interval is not None
    assert results["no_retrieval/bleu_1"].value > results["copy/bleu_1"].value
    # The prompt's words are not scored.
    plain = make_settings("captioning")
    without = run(StubGenerator(memory), coco, tmp_path / "plain", plain)
    assert without is not None
    for name in ("cider", "bleu_1", "rouge_l"):
        assert results[f"random/{name}"] == without[f"random/{name}"]
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_real_images_are_computed_once_for_all_runs(coco, memory, tmp_path):
    """Other sampling settings reuse the features and statistics; another network does not."""
    shared = {"reference": tmp_path / "real"}
    calls = []

    class Counted(ColourFeatures):
        def __call__(self, images):
            calls.append(len(images))
            return super().__call__(images)

    def compute(name, seed):
        extractor = Counted()
        suite = CocoTextToImage(
            StubGenerator(memory),  # pyright: ignore
            choose_items(read_coco(coco), COUNT),
            make_settings(variants=("copy",), seed=seed),
            tmp_path / name,
            extractors={"colour": extractor},
            **shared,
        )
        results = suite.run(log=lambda line: None)
        assert results is not None
        return suite.reference, results["copy/colour_frechet"].value

    first, value = compute("a", 0)
    assert sum(calls) == 2 * COUNT
    path = first.workdir / "statistics_colour.npz"
    stamp = path.stat().st_mtime_ns
    again, same = compute("b", 1)
    assert sum(calls) == 3 * COUNT and again.workdir == first.workdir
    assert path.stat().st_mtime_ns == stamp and same == value
    other = FeatureStatistics.of(np.random.default_rng(0).normal(size=(9, 6)))
    other.save(path, {"network": "colours", "pixels": "others"})
    with pytest.raises(ValueError, match="pixels='others', this run has"):
        compute("c", 2)
    name, stat = first.workdir.name, (coco / "val2014").iterdir()
    picked = sorted(stat)[7]
    before = picked.read_bytes()
    try:
        picked.write_bytes(before + b"\0")
        changed, _ = compute("d", 3)
    finally:
        picked.write_bytes(before)
    assert changed.workdir.name != name and sum(calls) == 6 * COUNT


def test_more_devices_change_nothing(coco, memory, tmp_path):
    settings = make_settings(variants=("retrieval", "copy"))
    with_four = {"devices": jax.devices()[:4]}
    run(StubGenerator(memory), coco, tmp_path / "one", settings)
    run(StubGenerator(memory), coco, tmp_path / "four", settings, **with_four)
    for name in ("results.json", "samples.png"):
        assert digest(tmp_path / "four" / name) == digest(tmp_path / "one" / name)
    broken = StubGenerator(memory, budget=20)
    with pytest.raises(KeyboardInterrupt):
        run(broken, coco, tmp_path / "broken", **with_four)


@pytest.mark.slow
def test_a_copy_on_another_device_computes_the_same(memory):
    generator, device = make_generator(memory), jax.devices()[1]
    placed = Replicas(generator, [device]).on(device)
    leaves = jax.tree.leaves(placed.params)
    assert {d for leaf in leaves for d in leaf.devices()} == {device}
    assert all(device not in x.devices() for x in jax.tree.leaves(generator.params))
    rows = [Scored(np.array([VOCAB.eod]), np.arange(5, dtype=np.int32))]
    with jax.default_device(device):
        found = score_tokens(placed, rows)[0]
    np.testing.assert_array_equal(found, score_tokens(generator, rows)[0])


def test_two_processes_give_the_results_of_one(coco, memory, tmp_path):
    run(StubGenerator(memory), coco, tmp_path / "one")
    found = {}

    def work(index):
        found[index] = run(
            StubGenerator(memory),
            coco,
            tmp_path / "two",
            process_index=index,
            process_count=2,
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[1] is None and found[0] is not None
    for name in ("results.json", "samples.png"):
        assert digest(tmp_path / "two" / name) == digest(tmp_path / "one" / name)


def test_parts_of_another_run_are_refused(coco, memory, tmp_path):
    settings = make_settings(variants=("copy",))
    run(StubGenerator(memory), coco, tmp_path, settings)
    with pytest.raises(ValueError, match="other settings"):
        run(StubGenerator(memory), coco, tmp_path, make_settings(seed=1))
    part = tmp_path / "parts" / "copy-00001.npz"
    part.write_bytes(part.read_bytes()[:300])
    with pytest.raises(ValueError, match="damaged"):
        run(StubGenerator(memory), coco, tmp_path, settings)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="'vqa'; allowed: text_to_image, captioning"):
        make_settings("vqa")
    with pytest.raises(ValueError, match="no_retrieval"):
        make_settings(variants=("oracle",))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text_to_image", "captioning"])
def test_a_random_model_runs_the_whole_suite(task, coco, memory, tmp_path):
    settings = make_settings(task)
    results = run(make_generator(memory), coco, tmp_path, settings)
    assert results is not None
    figure = "clip_score" if task == "text_to_image" else "rouge_l"
    assert np.isfinite(results[f"retrieval/{figure}"].value)
