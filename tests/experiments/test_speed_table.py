"""The README's table of speeds is that of the records."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import speed_table

RESULTS = Path(speed_table.__file__).parent / "results"


def read_records():
    paths = {name: RESULTS / f"{name}.json" for name in speed_table.READERS}
    return {n: json.loads(p.read_text("utf-8")) for n, p in paths.items() if p.exists()}


def cells(table):
    """The cells of each row, without the titles."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[1:]]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["speed_table.py", *map(str, arguments)])
    speed_table.main()


def ratios(record):
    """All numbers under names like `times_faster` or `times`, at any depth."""
    found = []
    for name, value in record.items():
        if name.startswith(("times", "ours_is")):
            found += flatten(value)
        elif isinstance(value, dict):
            found += ratios(value)
    return found


def flatten(value):
    if isinstance(value, dict):
        return [number for part in value.values() for number in flatten(part)]
    return [value]


def decode_record(**part):
    names = ("ours", "ours, int8", "transformers, static", "torch loop, float32")
    seconds = dict(zip(names, (2.0, 1.0, 5.0, 1.5), strict=True))
    part |= {"seconds": seconds, "ids_per_second": {"ours": 3 * 16 / 2.0}}
    return {
        "shape": "tiny",
        "image_length": 16,
        "device": "cpu",
        "cores": 2,
        "guided": part,
    }


def memory_record():
    def side(median, best, **settings):
        return {"settings": settings, "median": median, "best": best, "recall": 0.96}

    best = {"kind": "IVF64,SQ8", "searched": 8}
    return {
        "rows": 4000,
        "d_embed": 32,
        "threads": 2,
        "load_average": 0.25,
        "repeats": 5,
        "common_recall": 0.95,
        "kind": "faiss",
        "qps": {
            "ours": side(300.0, 400.0),
            "flat": side(100.0, 100.0),
            "FAISS": side(600.0, 800.0, **best),
        },
        "p50_ms": {
            "ours": side(0.2, 0.05),
            "flat": side(0.6, 0.5),
            "FAISS": side(0.1, 0.08, kind="HNSW32", ef_search=64),
        },
        "sweeps": {"FAISS": {"facts": {"version": "1.2.3"}}},
    }


def test_the_readme_has_the_table_of_the_records():
    text = (RESULTS / "README.md").read_text("utf-8")
    table = speed_table.format_table(read_records())
    assert speed_table.update(text, table) == text, "run experiments/speed_table.py"
    assert len(cells(table)) >= 8


def test_medians_are_the_ratios_that_the_records_have():
    for name, record in read_records().items():
        known = {f"{ratio:.2f}" for ratio in ratios(record)}
        for row in cells(speed_table.format_table({name: record})):
            assert re.findall(r"([\d.]+)×", row[2])[0] in known, row


def test_a_faster_peer_is_called_faster():
    record = decode_record() | {"load_at_start": 0.2, "repeats": 3}
    record["guided"]["fastest"] = {
        "ours": 1.0,
        "transformers, static": 0.5,
        "torch loop, float32": 1.0,
    }
    record["versions"] = {"transformers": "5.0"}
    transformers, torch = cells(speed_table.format_table({"bench_decode": record}))
    what = "generating 3 images of 16 codes with guidance, after 2 documents; "
    what += "1 layer, 32 wide, float32"
    assert transformers == [
        what,
        "transformers 5.0, `generate`, static cache, float32",
        "2.50×",
        "**0.50×, the peer is faster**",
        "2",
        "0.2",
        "3",
        "`experiments/bench_decode.py`",
    ]
    assert torch[1:4] == [
        "torch, a plain loop, static cache, float32",
        "**0.75×, the peer is faster**",
        "1.00×",
    ]


def test_what_an_old_record_does_not_have_is_not_known():
    table = speed_table.format_table({"bench_decode": decode_record()})
    for row in cells(table):
        assert row[3:7] == ["not known", "2", "not known", "not known"]
    assert "all sides were in one process" in table.splitlines()[-1]


def test_a_busy_machine_is_named():
    record = decode_record() | {"load_at_start": 1.2}
    rows = cells(speed_table.format_table({"bench_decode": record}))
    assert [row[5] for row in rows] == ["1.2, busy"] * 2


def test_search_has_the_settings_of_each_peer():
    rows = cells(speed_table.format_table({"bench_memory": memory_record()}))
    assert [row[1:4] for row in rows] == [
        ["exact search in NumPy (recall 0.960)", "3.00×", "4.00×"],
        [
            "FAISS 1.2.3; kind IVF64,SQ8; searched 8 (recall 0.960)",
            "**0.50×, the peer is faster**",
            "**0.50×, the peer is faster**",
        ],
        ["exact search in NumPy (recall 0.960)", "3.00×", "10.00×"],
        [
            "FAISS 1.2.3; kind HNSW32; ef_search 64 (recall 0.960)",
            "**0.50×, the peer is faster**",
            "1.60×",
        ],
    ]
    assert all(row[4:7] == ["2", "0.2", "5"] for row in rows)
    assert "in batches" in rows[0][0] and "one query at a time" in rows[2][0]


def test_the_first_layout_of_search_has_no_ratio():
    record = {
        "rows": 1_000_000,
        "d_embed": 768,
        "load_average": [6.0, 5.8, 5.6],
        "times_flat": 25.2,
        "times_faiss": 9.6,
    }
    table = speed_table.format_table({"bench_memory": record})
    assert not cells(table) and "×" not in table.replace("1,000,000 × 768", "")
    assert "load 6.0" in table


def test_the_command_rewrites_the_table_and_checks_it(tmp_path, monkeypatch):
    for path in (RESULTS / "README.md", *RESULTS.glob("bench_*.json")):
        shutil.copy(path, tmp_path)
    run(monkeypatch, "--check", f"--results={tmp_path}")
    (tmp_path / "bench_memory.json").write_text(json.dumps(memory_record()))
    with pytest.raises(SystemExit, match="not that of the records"):
        run(monkeypatch, "--check", f"--results={tmp_path}")
    run(monkeypatch, f"--results={tmp_path}")
    run(monkeypatch, "--check", f"--results={tmp_path}")
    assert "HNSW32" in (tmp_path / "README.md").read_text("utf-8")


def test_a_readme_without_the_marks_is_refused():
    with pytest.raises(SystemExit, match="needs the lines"):
        speed_table.update(f"{speed_table.START}\n", "")
