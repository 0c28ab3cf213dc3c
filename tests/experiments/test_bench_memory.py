"""Sweeps of search settings are kept until the run is finished."""

from __future__ import annotations

import argparse

import bench_memory
import pytest

POINT = {"settings": {"searched": 3}, "recall": 0.9, "qps": 100.0, "p50_ms": 1.0}
END = {"facts": {"version": "1"}, "peak_gb": 0.5}


class FakeSide:
    """Gives its answers one by one, and ends after them like a killed process."""

    name = "FAISS"

    def __init__(self, *answers):
        self.answers = list(answers)

    def ask(self, request):
        assert request == {}
        if not self.answers:
            raise SystemExit("FAISS ended")
        return self.answers.pop(0)


def test_a_finished_sweep_is_reused(tmp_path, capsys):
    side = FakeSide(POINT, POINT, END)
    found = bench_memory.sweep(side, tmp_path, 0.25)
    assert found == {"points": [POINT, POINT], **END, "load_average": 0.25}
    assert capsys.readouterr().err.count("FAISS: {") == 3
    assert bench_memory.sweep(FakeSide(), tmp_path, 0.5) == found


def test_an_interrupted_sweep_is_repeated(tmp_path):
    with pytest.raises(SystemExit, match="FAISS ended"):
        bench_memory.sweep(FakeSide(POINT), tmp_path, 0.25)
    found = bench_memory.sweep(FakeSide(POINT, END), tmp_path, 0.25)
    assert found["points"] == [POINT]


def test_a_folder_is_used_again_with_the_same_parameters_only(tmp_path, capsys):
    parser, folder = argparse.ArgumentParser(), tmp_path / "out"
    for _ in range(2):
        bench_memory.check_folder(parser, folder, {"num_rows": 4000})
    with pytest.raises(SystemExit):
        bench_memory.check_folder(parser, folder, {"num_rows": 5000})
    assert "is a run with {'num_rows': 4000}" in capsys.readouterr().err
    (folder / "parameters.json").unlink()
    with pytest.raises(SystemExit):
        bench_memory.check_folder(parser, folder, {"num_rows": 4000})
    assert "not an interrupted run" in capsys.readouterr().err
