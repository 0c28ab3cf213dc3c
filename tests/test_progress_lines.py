"""Without a terminal, progress is one line per 10%."""

import io

from racm3_jax import quickstart
from racm3_jax.progress import ProgressLines, open_progress


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
