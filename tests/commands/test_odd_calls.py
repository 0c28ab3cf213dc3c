"""Mistaken calls end in one sentence; a sample of them, and all (slow)."""

from __future__ import annotations

import collections

import odd_calls
import pytest
from odd_calls import Call, Runner, make_calls, run_odd_calls

# One in this many is in the default suite.
STRIDE = 24
LISTS = ("tracebacks", "hangs", "partial", "sentences")


def is_quick(call):
    """Whether the call loads no model, or only a small one."""
    return call.words[0] != "tokenize" and "--opt_out={empty}" not in call.words


def test_the_table_holds_every_command_and_every_fault():
    calls = make_calls()
    assert len(calls) >= 500 and len(set(calls)) == len(calls)
    commands = collections.Counter(call.words[0] for call in calls if call.words)
    for name in (
        "quickstart", "train", "evaluate", "sweep", "estimate", "generate", "caption",
        "infill", "edit", "classify", "demo", "memory", "convert", "export", "tokenize",
        "doctor",
    ):  # fmt: skip
        assert commands[name] >= 4, name
    faults = collections.Counter(call.fault for call in calls)
    assert all(faults[fault] >= 8 for fault in odd_calls.FAULTS)


def test_a_sample_of_odd_calls(tmp_path):
    calls = [call for call in make_calls() if is_quick(call)][::STRIDE]
    found = run_odd_calls(tmp_path / "run", calls)
    assert found["tried"] >= 50
    assert {name: found[name] for name in LISTS} == {name: [] for name in LISTS}
    assert found["refused"] > 0.9 * found["tried"]


@pytest.mark.slow
def test_all_odd_calls(tmp_path):
    found = run_odd_calls(tmp_path / "run")
    assert {name: found[name] for name in LISTS} == {name: [] for name in LISTS}


def test_the_runner_detects_every_fault(tmp_path, monkeypatch):
    runner = Runner(tmp_path / "run", seconds=0.2)

    def judge(main):
        monkeypatch.setattr(odd_calls.cli, "main", main)
        outcome = runner(Call(("x",)))
        assert not list(runner.out.iterdir())
        return outcome.fault

    def say(*lines):
        print(*lines, sep="\n", file=odd_calls.sys.stderr)
        return 2

    def write(path):
        path.write_text("x")
        return say("racm3: no")

    def hang():
        while True:
            pass

    assert judge(lambda words: say("racm3: no")) == ""
    assert judge(lambda words: say("progress", "racm3: no")) == ""
    assert judge(lambda words: say("racm3: no", "racm3: no")) == "sentence"
    assert judge(lambda words: say("Traceback")) == "sentence"
    assert judge(lambda words: 3) == "sentence"
    assert judge(lambda words: 1 / 0) == "traceback"
    assert judge(lambda words: hang()) == "hang"
    assert judge(lambda words: write(runner.out / "x")) == "partial"
    assert judge(lambda words: write(runner.world / "file")) == "partial"
    assert judge(lambda words: 0 * (runner.out / "x").write_text("x")) == ""
    assert judge(lambda words: 0 * (runner.out / ".x").write_text("x")) == "partial"
