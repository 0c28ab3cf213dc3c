"""`racm3 demo` before there is a page: missing parts are named in one sentence."""

from __future__ import annotations

import importlib.util
import socket

import pytest

from racm3_jax import cli
from racm3_jax.commands import demo
from racm3_jax.demo import server


def sentence(capsys, *arguments):
    assert cli.main(["demo", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("racm3: ") and "\n" not in error
    return error


@pytest.fixture
def find_spec(monkeypatch):
    found = importlib.util.find_spec

    def set_gradio(spec):
        monkeypatch.setattr(
            demo.importlib.util,
            "find_spec",
            lambda name: spec if name == "gradio" else found(name),
        )

    return set_gradio


def test_without_gradio_the_static_report_is_suggested(find_spec, capsys, tmp_path):
    find_spec(None)
    error = sentence(capsys, f"--workdir={tmp_path}")
    assert "pip install 'racm3_jax[demo]'" in error and "racm3 quickstart" in error
    (tmp_path / "report.html").write_text("")
    assert f"open {tmp_path}/report.html" in sentence(capsys, f"--workdir={tmp_path}")


def test_a_workdir_without_a_model(find_spec, capsys, tmp_path):
    find_spec(object())
    error = sentence(capsys, f"--workdir={tmp_path}", "--port=0")
    assert "no trained model" in error


def test_a_port_that_is_taken(find_spec, capsys, tmp_path):
    find_spec(object())
    with socket.create_server((server.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        error = sentence(capsys, f"--workdir={tmp_path}", f"--port={port}")
    assert f"port {port} cannot be used" in error and "0 for any free one" in error
    assert "from 0 to 65535" in sentence(capsys, "--workdir=x", "--port=70000")
    assert 0 < server.find_port(0) < 2**16


def test_a_workdir_without_a_memory_names_its_parts():
    words = demo.missing_memory("out")
    assert "no memory in out" in words and "--memory=FOLDER" in words
