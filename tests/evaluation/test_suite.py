"""What all suites have in common, tested with one that counts even numbers."""

import json

import numpy as np
import pytest

from racm3_jax.evaluation.intervals import compute_share
from racm3_jax.evaluation.retrieval import stack_rows
from racm3_jax.evaluation.suite import (
    Stage,
    Suite,
    format_rows,
    format_variants,
    to_json,
)


class EvenNumbers(Suite):
    """`calls` are the chunks that were computed; 3 numbers each."""

    def __init__(self, workdir, rule=2, **process):
        super().__init__(workdir, {"rule": rule}, 7, 3, **process)
        self.calls = []

    def stages(self):
        figures = {"even": "numbers/even", "digits": "numbers/digits"}
        return [Stage("numbers", self.parts, self.compute, figures)]

    def compute(self, items, device):
        self.calls.append(items)
        even = np.array([i % 2 == 0 for i in items])
        return {"even": even, "digits": np.array([[i, 9] for i in items])}

    def figures(self):
        return self.count_shares()

    def format_table(self, results):
        return "\n".join(format_variants("7 numbers", ["numbers"], results))

    def write_images(self):
        (self.parts.workdir / "image").write_text("")


def test_a_suite_writes_its_figures_and_resumes(tmp_path):
    lines, suite = [], EvenNumbers(tmp_path)
    results = suite.run(lines.append)
    assert suite.calls == [range(3), range(3, 6), range(6, 7)]
    assert results["numbers/even"] == compute_share([True, False] * 3 + [True])
    digits = results["numbers/digits"]
    assert (digits.successes, digits.total) == (21, 63) and digits.design_effect > 1
    assert lines[0].startswith("1 of 1, numbers: 3 chunks")
    assert lines[1].splitlines()[0] == "| 7 numbers | numbers |"
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["settings"] == {"rule": 2, "run": suite.parts.fingerprint}
    assert record["results"]["numbers/even"]["successes"] == 4
    assert lines[1] in (tmp_path / "table.md").read_text()
    assert (tmp_path / "image").exists()
    suite.parts.path("numbers", 1).unlink()
    again = EvenNumbers(tmp_path)
    assert again.run(lines.append) == results and again.calls == [range(3, 6)]
    with pytest.raises(ValueError, match="other settings"):
        EvenNumbers(tmp_path, rule=3).run(lines.append)


def test_seconds_are_kept_with_the_chunks(tmp_path):
    suite = EvenNumbers(tmp_path)
    suite.run_stages(lambda line: None)
    for chunk in range(3):  # the seconds of the first computation
        path = suite.parts.path("numbers", chunk)
        with np.load(path) as file:
            arrays = dict(file)
        np.savez(path, **(arrays | {"seconds": 2.0}))
    again = EvenNumbers(tmp_path)
    again.run_stages(lambda line: None)
    assert again.read_seconds() == {"numbers": 6.0} and again.calls == []
    assert set(again.parts.load("numbers")) == {"even", "digits"}


def test_only_the_first_process_writes(tmp_path):
    second = EvenNumbers(tmp_path, process_index=1, process_count=2)
    assert second.run(lambda line: None) is None and second.calls == [range(3, 6)]
    assert not (tmp_path / "results.json").exists()
    first = EvenNumbers(tmp_path, process_index=0, process_count=2)
    assert first.run(lambda line: None) is not None
    assert first.calls == [range(3), range(6, 7)]


def test_tables_rows_and_records_as_diagrams():
    assert format_rows(["a", "b", "c"], {"x": [0.25, None], "y": ["z", 3]}, 2) == [
        "| a | b | c |",
        "|---|---|---|",
        "| x | 0.25 | - |",
        "| y | z | 3 |",
    ]
    assert stack_rows([[4, 2], [], [7]]).tolist() == [[4, 2], [-1, -1], [7, -1]]
    assert stack_rows([[4]], 3).tolist() == [[4, -1, -1]]
    fraction = compute_share([True])
    assert to_json({"a": {"b": fraction}, "c": 1}) == {
        "a": {"b": fraction.to_json()},
        "c": 1,
    }
