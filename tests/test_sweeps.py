"""Sweeps: their points, their folders, resuming, the table."""

from __future__ import annotations

import json
import pathlib

import pytest

from racm3_jax import cli
from racm3_jax.sweeps import (
    Hyper,
    SweepError,
    format_sweep,
    last_metrics,
    name_point,
    run_sweep,
)

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
LR, ALPHA = "config.optimizer.learning_rate", "config.pipeline.alpha"


def test_points():
    hyper = Hyper()
    rates, alphas = hyper.sweep(LR, [1, 2]), hyper.sweep(ALPHA, [3, 4])
    assert hyper.product([rates, alphas]) == [
        {LR: 1, ALPHA: 3},
        {LR: 1, ALPHA: 4},
        {LR: 2, ALPHA: 3},
        {LR: 2, ALPHA: 4},
    ]
    assert hyper.zipit([rates, alphas]) == [{LR: 1, ALPHA: 3}, {LR: 2, ALPHA: 4}]
    assert hyper.chainit([rates, alphas]) == rates + alphas
    assert hyper.product([rates, hyper.fixed(ALPHA, 0)])[1] == {LR: 2, ALPHA: 0}
    with pytest.raises(ValueError, match="one length"):
        hyper.zipit([rates, alphas[:1]])
    with pytest.raises(ValueError, match="twice in one point"):
        hyper.product([rates, rates])


def test_points_have_folders_of_their_own():
    names = {name_point({LR: x, ALPHA: y}) for x in (1, 2) for y in (0.1, "a/b")}
    assert len(names) == 4 and not any("/" in name for name in names)
    assert name_point({LR: 0.5}).startswith("learning_rate=0.5-")


def write_log(folder: pathlib.Path, loss: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": s, "time": 0.0, "loss": loss + 20 - s} for s in range(1, 21)]
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def test_finished_points_are_not_trained_again_and_a_failed_one_does_not_stop_others(
    tmp_path,
):
    points = [{LR: x} for x in (1.0, 2.0, 3.0)]
    trained = []

    def train_point(point, folder):
        trained.append(point[LR])
        if point[LR] == 2.0 and len(trained) < 4:
            raise ValueError("too large")
        write_log(folder, point[LR])

    with pytest.raises(SweepError, match="1 points failed: learning_rate=2.0"):
        run_sweep(points, tmp_path, train_point, say=lambda line: None)
    finished = run_sweep(points, tmp_path, train_point, say=lambda line: None)
    assert trained == [1.0, 2.0, 3.0, 2.0]
    assert [metrics["loss"] for _, metrics in finished] == [1.5, 2.5, 3.5]
    stored = json.loads((tmp_path / "sweep.json").read_text())
    assert [entry["point"] for entry in stored["points"]] == points


def test_last_metrics_are_means_of_the_last_tenth():
    lines = [{"step": s, "time": 9.0, "loss": float(s), "x": None} for s in range(40)]
    assert last_metrics(lines) == {"loss": 37.5, "step": 39}


def test_the_best_point_is_the_first_line():
    rows = [({LR: 1}, {"loss": 2.0}), ({LR: 2}, {"loss": 1.0, "psnr": 3.0})]
    lines = format_sweep(rows, ["loss", "psnr", "absent"]).splitlines()
    assert lines[0].split() == ["optimizer.learning_rate", "loss", "psnr"]
    assert lines[1].split() == ["2", "1.0000", "3.0000"]
    assert lines[2].split() == ["1", "2.0000"]


def test_commands_for_a_cluster(capsys):
    config = f"--config={CONFIGS}/sweeps/flagworld_alpha.py:tiny"
    assert cli.main(["sweep", config, "--workdir=out", "--print_commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(
        "racm3 train --workdir=out/alpha=0.1,learning_rate=0.001"
    )
    assert lines[3].endswith(
        "--config.pipeline.alpha=1.0 --config.optimizer.learning_rate=0.003"
    )


def test_a_config_without_points_is_refused(capsys):
    config = f"--config={CONFIGS}/flagworld_tiny.py"
    assert cli.main(["sweep", config, "--workdir=out"]) == 2
    assert "has no get_hyper" in capsys.readouterr().err
