"""Cells, intervals, reports and the state of the experiments; the tiny run is slow."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_all
from science import agreement, catalogue, cells, combining, report, sizes
from science.experiment import FULL, TINY, Curve, Experiment, Panel, Place
from science.page import ONE_PAIR, format_page

from racm3_jax.evaluation.intervals import Share

ROOT = Path(__file__).resolve().parents[2]


def _measure(condition, seed, place):
    """A fraction that depends on the condition, a number that depends on the seed."""
    if condition == "broken":
        raise ValueError("this cell cannot be measured")
    return {"flag": Share(9 if condition == "with" else 1, 10), "bits": 5.0 + seed}


FAKE = Experiment(
    number=1,
    name="fake",
    title="Does it work?",
    claim="It works.",
    conditions={"with": "with documents", "without": "without"},
    measure=_measure,
    columns={"flag": "flag right", "bits": "bits", "never": "never measured"},
    panels=(Panel("right", {"flag": "flag"}), Panel("bits", {"bits": "b"}, False)),
    hours=0.1,
    reference="without",
    settings={"steps": 3},
)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, TINY)


def test_fractions_of_seeds_have_the_wider_of_both_intervals():
    sure = combining.combine([Share(0, 100)] * 3)
    assert sure.value == 0
    assert sure.interval == pytest.approx((0.0, Share(0, 300).interval[1]))
    far = combining.combine([Share(10, 100), Share(50, 100), Share(90, 100)])
    assert far.interval == (0.0, 1.0)
    assert str(combining.combine([Share(1, 2)])).startswith("50.0% [")


def test_numbers_of_seeds_have_the_t_interval():
    found = combining.combine([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.3027; the standard error of the mean is 1 / sqrt(3).
    assert found.interval == pytest.approx(
        (2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), 1e-4
    )
    assert combining.combine([1.0]).interval is None
    with pytest.raises(ValueError, match="one kind"):
        combining.combine([1.0, Share(1, 2)])


def test_differences_are_taken_seed_by_seed():
    # The seeds differ a lot, the conditions always by the same amount.
    found = combining.compare([1.0, 11.0, 31.0], [0.5, 10.5, 30.5])
    assert found.value == pytest.approx(0.5)
    assert found.interval == pytest.approx((0.5, 0.5))


def test_agreeing_seeds_keep_the_error_of_their_questions():
    sure = combining.compare([Share(85, 100)] * 3, [Share(0, 100)] * 3)
    low, high = sure.interval
    assert sure.value == pytest.approx(0.85) and 0.04 < 0.85 - low < 0.08
    assert high - 0.85 == pytest.approx(0.85 - low)
    assert sure.p_value < 1e-6
    none = combining.compare([Share(51, 100)] * 3, [Share(49, 100)] * 3)
    assert none.interval[0] < 0 < none.interval[1] and none.p_value > 0.5
    numbers = combining.compare([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert numbers.p_value == pytest.approx(0.0742, abs=1e-3)
    assert combining.compare([1.0], [0.0]).p_value is None


def test_p_values_are_corrected_for_many_comparisons(place, tmp_path):
    """p = 0.03 is significant for one comparison, and not for one of 20."""
    found = combining.Combined(0.1, (0.01, 0.19), (0.1, 0.1), False, 0.03)
    alone = {"without": {"with": {"flag": found}}}
    assert report.adjust_differences(alone) == {("without", "with", "flag"): 0.03}
    other = dataclasses.replace(found, p_value=0.9)
    many = {"without": {"with": {"flag": found} | {f"x{i}": other for i in range(19)}}}
    adjusted = report.adjust_differences(many)
    assert adjusted["without", "with", "flag"] == pytest.approx(0.6)
    for rows, expected in ((alone, "- with documents: flag"), (many, "- none")):
        own = {(c, n): p for (_, c, n), p in report.adjust_differences(rows).items()}
        text = report.format_differences(FAKE, rows["without"], own)
        assert text.startswith(expected)


def test_a_cell_is_measured_once_and_again_with_other_settings(place):
    assert cells.read_cell(FAKE, "with", 1, place) is None
    cell = cells.measure_cell(FAKE, "with", 1, place)
    assert cells.read_cell(FAKE, "with", 1, place) == cell
    assert cells.read_figures(cell) == {"flag": Share(9, 10), "bits": 6.0}
    assert cell["wall_seconds"] >= 0 and cell["num_cores"] >= 1
    other = dataclasses.replace(FAKE, settings={"steps": 4})
    assert cells.read_cell(other, "with", 1, place) is None
    assert cells.read_cell(FAKE, "with", 1, Place(place.work, FULL)) is None


def test_curves_are_kept_with_a_cell_and_published(place, tmp_path):
    curve = sizes.smooth(range(20, 2420, 20), [0.5] * 120, a_step=0.1)
    assert len(curve.x) == len(curve.y) == sizes.CURVE_POINTS
    assert curve.x[0] == pytest.approx(3.0) and set(curve.y) == {0.5}
    assert sizes.smooth([20], [1.5], 0.1) == Curve([2.0], [1.5])

    def measure(condition, seed, place):
        return {"bits": 5.0, "image_loss": curve, "text_loss": curve}

    conditions = {"small_retrieval": "small, with", "large_plain": "large, without"}
    experiment = dataclasses.replace(
        FAKE, measure=measure, conditions=conditions, plot_curves=sizes.plot_curves
    )
    cell = cells.measure_cell(experiment, "small_retrieval", 1, place)
    assert cells.read_figures(cell) == {"bits": 5.0}
    assert cells.read_curves(json.loads(json.dumps(cell)))["text_loss"] == curve
    assert cells.read_curves({}) == {}
    cells.measure_cell(experiment, "large_plain", 2, place)
    report.write_report(experiment, place, tmp_path / "results")
    assert (tmp_path / "results" / "fake_curves.png").stat().st_size > 1000
    elsewhere = Place(tmp_path / "other", TINY)
    assert cells.restore_cells(experiment, elsewhere, tmp_path / "results") == 2
    assert cells.read_cells(experiment, elsewhere) == cells.read_cells(
        experiment, place
    )


def test_a_run_resumes_where_it_failed(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_all, "PAUSE_SECONDS", 0.0)
    broken = dataclasses.replace(
        FAKE, conditions={"with": "with documents", "broken": "broken"}
    )
    with pytest.raises(ValueError, match="cannot be measured"):
        run_all.run(broken, place, tmp_path / "results", set(), None)
    assert list(cells.read_cells(broken, place)) == [("with", 1)]
    run_all.run(FAKE, place, tmp_path / "results", set(), tmp_path / "lock")
    assert len(cells.read_cells(FAKE, place)) == 6
    lines = [x for x in capsys.readouterr().out.splitlines() if "with seed 1" in x]
    assert len(lines) == 1


def test_seeds_are_measured_in_parallel_and_cores_counted(place, tmp_path):
    run_all.run(FAKE, place, tmp_path / "results", set(), None, {2})
    found = cells.read_cells(FAKE, place)
    assert set(found) == {("with", 2), ("without", 2)}
    assert (tmp_path / "results" / "fake.json").exists()
    with pytest.raises(SystemExit, match="--seeds=7: choose from 1, 2, 3"):
        run_all.choose_seeds("2,7", FAKE.seeds)
    assert run_all.choose_seeds("3,1", FAKE.seeds) == {1, 3}
    assert run_all.choose_seeds("", FAKE.seeds) == set()
    two = [{"wall_seconds": 3600.0, "num_cores": n} for n in (1, 2)]
    assert cells.two_core_hours(two) == pytest.approx(1.5)


def test_a_report_has_figures_cost_and_commit(place, tmp_path):
    for condition in FAKE.conditions:
        for seed in FAKE.seeds:
            cells.measure_cell(FAKE, condition, seed, place)
    path = report.write_report(FAKE, place, tmp_path / "results")
    assert path is not None
    record = json.loads(path.read_text())
    assert record["cells_done"] == record["cells"] == 6
    assert record["figures"]["with"]["flag"]["value"] == pytest.approx(0.9)
    assert list(record["differences"]) == ["without"]
    found = record["differences"]["without"]["with"]
    assert found["flag"]["value"] == pytest.approx(0.8)
    assert len(record["commits"]) == 1
    text = path.with_suffix(".md").read_text()
    assert "| with documents | 90.0% [" in text and "never measured" not in text
    assert "- with documents: flag right +0.8" in text
    assert path.with_suffix(".png").stat().st_size > 1000


def test_a_condition_is_compared_with_every_reference_that_names_it(place, tmp_path):
    both = dataclasses.replace(FAKE, also_compared={"with": ("without",)})
    for condition in both.conditions:
        for seed in (1, 2) if condition == "with" else (2, 3, 1):
            cells.measure_cell(both, condition, seed, place)
    report.write_report(both, place, tmp_path)
    text = (tmp_path / "fake.md").read_text()
    assert '"without"' in text and "- with documents: flag right +0.8" in text
    assert '"with documents"' in text and "- without: flag right -0.8" in text
    alone = dataclasses.replace(FAKE, reference="")
    assert report.combine_cells(alone, cells.read_cells(FAKE, place))[1] == {}


def test_published_cells_are_not_measured_again(place, tmp_path):
    for seed in FAKE.seeds:
        cells.measure_cell(FAKE, "with", seed, place)
    report.write_report(FAKE, place, tmp_path / "results")
    elsewhere = Place(tmp_path / "other", TINY)
    assert cells.restore_cells(FAKE, elsewhere, tmp_path / "results") == 3
    assert cells.restore_cells(FAKE, elsewhere, tmp_path / "results") == 0
    assert cells.read_cells(FAKE, elsewhere) == cells.read_cells(FAKE, place)
    other = dataclasses.replace(FAKE, settings={"steps": 4})
    assert cells.restore_cells(other, place, tmp_path / "results") == 0
    full = Place(tmp_path / "full", FULL)
    assert cells.restore_cells(FAKE, full, tmp_path / "results") == 0


def test_nothing_measured_writes_nothing(place, tmp_path):
    assert report.write_report(FAKE, place, tmp_path / "results") is None
    assert not (tmp_path / "results").exists()


def test_a_rerun_is_compared_with_what_was_published(place, tmp_path):
    for first_seed, name in ((1, "published"), (2, "rerun")):
        seeds = tuple(range(first_seed, first_seed + 3))
        experiment = dataclasses.replace(FAKE, seeds=seeds)
        run_all.run(experiment, place, tmp_path / name, set(), None)
    path = agreement.write_agreement(FAKE, tmp_path / "rerun", tmp_path / "published")
    assert "4 of 4 figures of `fake` agree" in path.read_text()
    record = json.loads(path.with_suffix(".json").read_text())
    assert [row["agrees"] for row in record["rows"]] == [True] * 4
    far = json.loads((tmp_path / "rerun" / "fake.json").read_text())
    far["figures"]["with"]["bits"] |= {"value": 99.0, "interval95": [98.0, 100.0]}
    (tmp_path / "rerun" / "fake.json").write_text(json.dumps(far))
    agreement.write_agreement(FAKE, tmp_path / "rerun", tmp_path / "published")
    assert "3 of 4 figures" in path.read_text()


def test_the_state_lists_finished_cells(place, tmp_path):
    run_all.run(FAKE, place, tmp_path / "results", {"with"}, None)
    state = run_all.format_state([FAKE], place, tmp_path / "results")
    assert "3 of 6 cells" in state and "--only=fake" in state
    elsewhere = Place(tmp_path / "other", TINY)
    state = run_all.format_state([FAKE], elsewhere, tmp_path / "results")
    assert "published, 3 of 6 cells" in state
    assert "not started" in run_all.format_state([FAKE], elsewhere, tmp_path / "none")


def test_an_unknown_name_is_refused():
    with pytest.raises(SystemExit, match="choose from gains, num_documents"):
        run_all.choose("nothing", 1, False)
    (chosen,) = run_all.choose("kshot", 11, False)
    assert chosen.seeds == (11, 12, 13)


@pytest.mark.parametrize("experiment", catalogue.EXPERIMENTS, ids=lambda e: e.name)
def test_experiments_are_complete(experiment):
    assert len(experiment.seeds) >= 3
    assert experiment.claim and experiment.title
    for reference, conditions in experiment.comparisons.items():
        assert {reference, *conditions} <= set(experiment.conditions)
        assert reference not in conditions
    assert set(experiment.proof) <= set(experiment.conditions)
    assert experiment.proof
    for panel in experiment.panels:
        assert set(panel.figures) <= set(experiment.columns)
    if experiment.x_values:
        assert len(experiment.x_values) == len(experiment.conditions)
    json.dumps(dict(experiment.settings))


def test_the_list_is_complete_and_fits_into_the_budget():
    numbers = [e.number for e in catalogue.EXPERIMENTS]
    assert numbers == list(range(1, 11))
    assert len({e.name for e in catalogue.EXPERIMENTS}) == 10
    assert sum(e.hours for e in catalogue.EXPERIMENTS) <= 12


def test_the_page_is_that_of_the_committed_results():
    page = format_page(catalogue.EXPERIMENTS, run_all.RESULTS)
    assert run_all.PAGE.read_text() == page, "run experiments/run_all.py --page"


def test_the_page_mentions_seeds_that_share_one_trained_pair():
    text = run_all.PAGE.read_text()
    for experiment in catalogue.EXPERIMENTS:
        start = text.index(f"\n## {experiment.number}. ")
        section = text[start : text.index("\n## ", start + 4)]
        asks_shipped = "open_shipped" in inspect.getsource(
            sys.modules[experiment.measure.__module__]
        )
        assert (ONE_PAIR in section) == asks_shipped, experiment.name


def test_the_page_mentions_what_was_not_run(tmp_path):
    page = format_page(catalogue.EXPERIMENTS, tmp_path)
    assert page.count("**Not run yet**") == 10 and "What follows" not in page


@pytest.mark.slow
def test_every_experiment_runs_on_a_minimal_world(tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "run_all.py")]
    command += ["--run", "--tiny", f"--out={tmp_path}"]
    done = subprocess.run(
        command,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for experiment in catalogue.EXPERIMENTS:
        record = json.loads(
            (tmp_path / "results" / f"{experiment.name}.json").read_text()
        )
        assert record["cells_done"] == len(experiment.proof)
