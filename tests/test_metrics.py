from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from racm3_jax.metrics import MetricSums, MetricsWriter, plot_curves, read_jsonl


def test_sums_form_means_over_what_was_counted():
    sums = MetricSums()
    sums.add({"loss": (6.0, 2.0), "never": (0.0, 0.0)})
    sums.add({"loss": (jnp.float32(2), np.int32(6))})
    sums.add_values({"plain": 3, "note": "text", "nothing": None})
    assert sums.compute() == {"loss": 1.0, "plain": 3.0}
    assert sums.total("loss") == 8.0
    sums.clear()
    assert sums.compute() == {}


def test_writer_round_trip(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": np.float32(0.5), "bad": float("nan")})
        writer.write(2, {"loss": 0.25})
    first, second = read_jsonl(tmp_path / "run")
    assert (first["step"], first["loss"], first["bad"]) == (1, 0.5, None)
    assert second["loss"] == 0.25
    assert first["time"] <= second["time"]
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_a_resumed_run_appends_and_its_lines_win(tmp_path):
    for value in (1.0, 2.0):
        with MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.write(5, {"loss": value})
            writer.write(5, {"eval/loss": value + 10})
    (line,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["eval/loss"]) == (2.0, 12.0)


def test_a_truncated_last_line_is_ignored_but_not_a_damaged_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"step": 1, "loss": 1.0})
    path.write_text(good + "\n" + good[:9])
    assert len(read_jsonl(path)) == 1
    path.write_text(good[:9] + "\n" + good)
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_jsonl(path)


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a workdir that trained"):
        read_jsonl(tmp_path)


def test_plot_curves_writes_an_image(tmp_path):
    for run in ("a", "b"):
        with MetricsWriter(tmp_path / run, tensorboard=False) as writer:
            writer.write(1, {"loss": 2.0})
            writer.write(2, {"loss": 1.0, "only_late": 3.0})
    plot = tmp_path / "plots" / "loss.png"
    plot_curves(
        {"with": tmp_path / "a", "without": tmp_path / "b"},
        plot,
        names=["loss", "only_late", "absent"],
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
