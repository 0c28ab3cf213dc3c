"""The doctor: its report on a working installation and on broken ones."""

from __future__ import annotations

import json

import pytest

from racm3_jax import cli, doctor
from racm3_jax.index import registry


def find(name: str, *args, **kwargs) -> doctor.Finding:
    findings = doctor.examine(*args, self_test=False, **kwargs)
    return next(f for f in findings if f.name == name)


def test_a_working_installation(capsys, tmp_path):
    """Also that the self-test of the shipped models passes."""
    assert cli.main(["doctor", "--json", f"--workdir={tmp_path}/new"]) == 0
    findings = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
    assert all(f["verdict"] != "problem" for f in findings.values()), findings
    assert "generation work" in findings["self-test"]["words"]
    assert findings["jax"]["words"].count(".") == 2
    assert str(tmp_path) in findings["disk"]["words"]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "_LIBRARIES", ("no_such_library",))
    assert find("no_such_library").verdict == "problem"
    assert "pip install" in find("no_such_library").words


def test_without_a_library_there_is_the_exact_index(monkeypatch):
    def fail(cls):
        raise ImportError(f"no wheel of {cls.kind}")

    assert find("search").verdict == "ok" and "scann" in find("search").words
    for kind, entry in registry.TABLE.items():
        if entry.library is not None:
            backend = registry.get_backend(kind)
            monkeypatch.setattr(backend, "import_library", classmethod(fail))
    found = find("search")
    assert found.verdict == "note" and "exact index" in found.words
    assert "no wheel of scann" in found.words and "no wheel of faiss" in found.words


def test_a_damaged_weight_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "x").write_bytes(b"damaged")
    manifest = {"files": {"x": {"bytes": 7, "sha256": "0" * 64}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    from racm3_jax import wiring

    monkeypatch.setattr(wiring, "resolve", lambda path: tmp_path)
    found = find("shipped weights")
    assert found.verdict == "problem" and "x differs" in found.words


@pytest.mark.parametrize("address", ["localhost:1", "nowhere"])
def test_a_coordinator_that_does_not_answer(monkeypatch, address):
    monkeypatch.setenv("RACM3_COORDINATOR", address)
    found = find("processes")
    assert found.verdict == "problem" and "does not answer" in found.words


def test_a_check_that_fails_is_reported(monkeypatch, capsys):
    def die():
        raise OSError("unplugged")

    monkeypatch.setattr(doctor, "_check_memory", die)
    assert cli.main(["doctor", "--no_self_test"]) == 1
    assert "OSError: unplugged" in capsys.readouterr().out
