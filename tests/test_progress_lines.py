"""Without a terminal, progress is one line per 10%; stages and their times."""

import io

import pytest

from racm3_jax import quickstart
from racm3_jax.progress import ProgressLines, StageClock, open_progress


def test_one_line_per_10_percent(capsys):
    with open_progress(total=1000, initial=150, desc="build", unit="rows") as bar:
        assert isinstance(bar, ProgressLines)
        bar.set_postfix({"loss": 2.34567})
        for _ in range(850):
            bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{p}%" for p in range(20, 101, 10)]
    assert lines[0].startswith("build: 20% (200 of 1,000 rows, ")
    assert lines[0].endswith(", loss 2.346)")


def test_steps_of_any_size_and_a_total_known_later(capsys):
    with open_progress(desc="build") as bar:
        bar.update(5)
        bar.total = 40
        bar.update(30)
        bar.update(5)
    with open_progress(total=10, disable=True) as bar:
        bar.update(10)
    shown = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["80%", "100%"]


def test_no_colour_is_respected(monkeypatch):
    """https://no-color.org: no escape sequence, even on a terminal."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = []
    for value in (None, "1"):
        if value:
            monkeypatch.setenv("NO_COLOR", value)
        stages = quickstart.Stages()
        stages.console._force_terminal = True
        stages.console.file = io.StringIO()
        stages.say("hello")
        shown.append(stages.console.file.getvalue())
    assert "hello" in shown[0] and "hello" in shown[1]
    assert "\x1b" not in shown[1]


def test_stages_inside_others_are_counted_once():
    times = iter([0.0, 2.0, 3.0, 7.0, 7.0, 8.0, 8.0, 8.004])
    clock = StageClock(lambda: next(times))
    with clock.measure("writing"):
        with clock.measure("embedding"):
            pass
        with clock.measure("reading"):
            pass
    with clock.measure("hashing"):
        pass
    seconds = {"writing": 7.0, "embedding": 1.0, "reading": 0.0, "hashing": 0.004}
    assert clock.seconds == pytest.approx(seconds)
    # Less than half a per cent is not shown.
    assert clock.describe() == "87% writing, 12% embedding"


def test_waiting_for_items_is_counted():
    now = [0.0]

    def make():
        for number in range(3):
            now[0] += 2
            yield number
        now[0] += 1

    clock = StageClock(lambda: now[0])
    for _ in clock.measure_each("reading", make()):
        now[0] += 10
    assert clock.seconds == {"reading": 7.0}
