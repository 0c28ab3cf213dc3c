"""A small `racm3 fit`: from files to images, stopped and resumed at every stage."""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from racm3_jax import fit, run
from racm3_jax.commands.configs import find_config, load_config_file
from racm3_jax.fit_plan import (
    SourceStats,
    choose_holdout,
    choose_plan,
    inspect_source,
)
from racm3_jax.metrics import read_jsonl

STEPS = {"tokenizer_steps": 2, "clip_steps": 2, "generator_steps": 2}
SIZES = {"num_codes": 16, "d_model": 64, "num_layers": 1, "num_variants": 1}
SMALL = STEPS | SIZES | {"batch_size": 8, "image_size": 64}


def load_small(name, argument):
    """The shipped files with networks that compile in a second."""
    config = load_config_file(find_config(name) + (argument and f":{argument}"))
    config.train.sheet_rows = 1
    config.train.eval_documents = 10 if config.kind == "clip" else 3
    if config.kind == "vqgan":
        config.vqgan.update(
            {"stem_patch": 8, "channels": 8, "channel_multipliers": (1,)}
        )
        config.vqgan.update({"z_channels": 8, "d_code": 4, "norm_groups": 4})
        config.codebook_images = 4
    elif config.kind == "clip":
        for tower in ("vision", "text"):
            config.clip[f"{tower}_width"] = config.clip.d_embed = 16
            config.clip[f"{tower}_layers"] = 1
        config.clip.patch_size = 32
        config.text_tokenizer.vocab_size = 270
    else:
        config.pipeline.rows, config.pipeline.examples_per_batch = 8, 8
        config.pipeline.window_steps = 2
        config.model.compute_dtype = "float32"
    return config


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"picture {i} of noise")
    return folder


def test_sizes_follow_the_images_and_the_machine():
    few = choose_plan(SourceStats(200, 192), cores=2, accelerated=False)
    assert (few.image_size, few.num_codes) == (128, 512)
    assert choose_plan(SourceStats(200, 90), 2, False).image_size == 64
    assert choose_plan(SourceStats(50_000, 512), 2, False).image_size == 64
    large = choose_plan(SourceStats(50_000, 512), 16, True)
    assert large.image_size == 256 and large.generator_steps > few.generator_steps


@pytest.mark.parametrize(
    ("count", "fraction"),
    [
        *[(2, "0.5"), (10, "0.4"), (60, "0.1")],
        *[(50_000, "0.01"), (150_000_000, "3.333e-06")],
    ],
)
def test_a_tenth_or_about_4_to_500_documents_are_held_out(count, fraction):
    assert choose_holdout(count) == fraction
    assert 0 < float(fraction) * count <= 501


@pytest.mark.slow
def test_it_runs_from_files_to_images_and_resumes(photos, tmp_path, monkeypatch):
    """Every stage is interrupted once: before its training, or during it by a signal."""
    workdir, cut = tmp_path / "run", []
    run_training, build_memory = run.run_training, fit.wiring.build_memory

    def cut_training(config, folder):
        if folder.name not in cut:
            cut.append(folder.name)
            whole = run_training(config, folder, progress=False)
            return whole._replace(has_ended=False)
        return run_training(config, folder, progress=False)

    def cut_memory(*arguments, **options):
        if "memory" not in cut:
            cut.append("memory")
            raise KeyboardInterrupt
        return build_memory(*arguments, **options)

    monkeypatch.setattr(run, "run_training", cut_training)
    monkeypatch.setattr(fit.wiring, "build_memory", cut_memory)

    def begin(**changed):
        options = {"holdout": "0.3", "sizes": SMALL} | changed
        fit.main(f"folder:{photos}", workdir, load_small, **options)

    for stage in ("tokenizer", "clip", "memory", "generator"):
        with pytest.raises((fit.StoppedEarly, KeyboardInterrupt)):
            begin()
        assert cut[-1] == stage
    begin()
    assert (workdir / "samples.png").stat().st_size > 1000
    report = (workdir / "report.html").read_text()
    assert "bits_per_image" in report and "own images" in report
    for name in ("tokenizer", "generator"):
        sheets = sorted(p.name for p in (workdir / name / "samples").iterdir())
        assert sheets == ["step-000001.png", "step-000002.png"]
    lines = read_jsonl(workdir / "generator")
    assert all(line["eval/bits_per_image"] > 0 for line in lines)


def test_finished_stages_are_not_run_again(photos, tmp_path, monkeypatch, capsys):
    """With stand-ins: the order, the arguments of each, and where a stopped one resumes."""
    runs, stops = [], ["clip"]

    def train(config, folder):
        runs.append((folder.name, config.train.num_steps, config.source))
        folder.mkdir(exist_ok=True)
        if folder.name in stops:
            stops.remove(folder.name)
            return run.Training(types.SimpleNamespace(step=1), False)  # type: ignore[arg-type]
        exported = {"tokenizer": "vqgan", "clip": "clip", "generator": "model"}
        (folder / exported[folder.name]).mkdir(parents=True)
        (folder / exported[folder.name] / "manifest.json").touch()
        line = {"step": 1, "eval/loss": 2.5, "eval/psnr": 21.0}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return run.Training(types.SimpleNamespace(step=2), True)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "run_training", train)
    monkeypatch.setattr(fit._Chain, "memory", lambda self: runs.append("memory"))
    monkeypatch.setattr(fit._Chain, "report", lambda self: runs.append("report"))

    def begin(**changed):
        options = {"holdout": "0.3", "sizes": SMALL} | changed
        fit.main(f"folder:{photos}", tmp_path, load_small, **options)

    with pytest.raises(fit.StoppedEarly, match="saved clip after step 1 of 2"):
        begin()
    assert "clip: up to 2 steps; about 0 min left" in capsys.readouterr().out
    begin()
    # A resumed training does not say how long whole ones take.
    assert "generator: up to 2 steps\n" in capsys.readouterr().out
    source = f"folder:{photos}"
    trained = [(name, 2, source) for name in ("tokenizer", "clip", "clip", "generator")]
    assert runs == [*trained[:3], "memory", trained[3], "report"]
    with pytest.raises(ValueError, match="started with another --num_codes"):
        begin(sizes=SMALL | {"num_codes": 8})
    with pytest.raises(ValueError, match=r"another --holdout \('0.3'\)"):
        begin(holdout="0.2")


def test_a_source_without_images_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match="has no image"):
        inspect_source(f"folder:{tmp_path}")


def never(*arguments, **options):
    raise AssertionError("a training was started")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": "1.5"}, "must be in 0..1"),
        ({"holdout": "0"}, "--holdout=0, 0 captioned images are held out; at least 2"),
        ({"holdout": "nobody"}, "0 captioned images are held out"),
        ({"holdout": "0.99999"}, "captioned images are for training"),
        (
            {"sizes": {"batch_size": 500}},
            "--batch_size is 500, but only 3[0-9] captioned",
        ),
        ({"sizes": {"d_model": 100}}, "must be a multiple of 64"),
    ],
)
def test_a_refused_fit_leaves_its_folder_free(
    photos, tmp_path, monkeypatch, options, message
):
    """All is checked before the first training, so that a corrected command runs."""
    monkeypatch.setattr(run, "run_training", never)
    options = {"sizes": SMALL} | options
    for workdir in (tmp_path / "new", tmp_path):
        with pytest.raises(ValueError, match=message):
            fit.main(f"folder:{photos}", workdir, load_small, **options)
        assert not list(tmp_path.iterdir())


def test_a_plan_is_dropped_if_its_first_training_is_refused(
    photos, tmp_path, monkeypatch
):
    def refuse(config, folder):
        raise ValueError("no")

    def fail_later(config, folder):
        folder.mkdir()
        (folder / "config.json").touch()
        raise ValueError("not finite")

    monkeypatch.setattr(run, "run_training", refuse)
    with pytest.raises(ValueError, match="no"):
        fit.main(f"folder:{photos}", tmp_path / "new", load_small, sizes=SMALL)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(run, "run_training", fail_later)
    with pytest.raises(ValueError, match="finite"):
        fit.main(f"folder:{photos}", tmp_path, load_small, sizes=SMALL)
    assert (tmp_path / "plan.json").exists()


def test_images_without_captions_are_refused_before_the_first_training(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "run_training", never)
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.new("RGB", (70, 70), (i, i, i)).save(tmp_path / "photos" / f"{i}.png")
    source, workdir = f"folder:{tmp_path / 'photos'}", tmp_path / "out"
    with pytest.raises(ValueError, match="no image with a caption: write"):
        fit.main(source, workdir, load_small, sizes=SMALL)
    (tmp_path / "photos" / "0.txt").write_text("one caption")
    with pytest.raises(ValueError, match="at least 2 are needed"):
        fit.main(source, workdir, load_small, sizes=SMALL)
    assert not workdir.exists()


def test_a_batch_has_no_more_images_than_there_are(tmp_path, monkeypatch):
    given = []

    def train(config, folder):
        given.append(config.batch_size)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_training", train)
    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.new("RGB", (70, 70), (i, i, i)).save(tmp_path / "photos" / f"{i}.png")
        (tmp_path / "photos" / f"{i}.txt").write_text(f"grey {i}")
    source = f"folder:{tmp_path / 'photos'}"
    with pytest.raises(KeyboardInterrupt):
        fit.main(source, tmp_path / "out", load_small, holdout="0.png,1.png")
    assert given == [8]  # of 10, in equal parts for 8 devices


def test_the_work_directory_is_not_inside_the_source(photos, monkeypatch):
    """Its sheets would be read as images when it resumes."""
    monkeypatch.setattr(run, "run_training", never)
    before = sorted(photos.iterdir())
    monkeypatch.chdir(photos)
    for source, workdir in (
        (f"folder:{photos}", photos),
        (f"2*folder:{photos}", photos / "out"),
        ("folder:.", Path("out")),
    ):
        with pytest.raises(ValueError, match="is inside .* give another --workdir"):
            fit.main(source, workdir, load_small, sizes=SMALL)
    config = load_small("own_tokenizer.py", "")
    config.source = f"folder:{photos}"
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is inside .* give another --workdir"):
        run.run_training(config, photos / "out")
    assert sorted(photos.iterdir()) == before
