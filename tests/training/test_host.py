"""Compiled programs are cached by default."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from racm3_jax.training import host

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAM = """
import sys
from racm3_jax.training.host import prepare_host
if "first" in sys.argv: import jax
prepare_host()
import jax
print(jax.config.jax_compilation_cache_dir)
jax.jit(lambda x: x * 3 + x.sum())(jax.numpy.ones(8))
"""


def start(home, *arguments, **variables):
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "RACM3"))
    }
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("order", ["first", "last"])
def test_on_by_default_whenever_jax_is_imported(tmp_path, order):
    folder = tmp_path / ".cache" / "racm3" / "programs"
    variables = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    variables = variables if order == "last" else {}
    done = start(tmp_path, order, **variables)
    assert done.stdout.strip() == str(folder), done.stderr
    assert order == "first" or list(folder.iterdir())


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RACM3_CACHE": "off"}, "None"),
        ({"RACM3_CACHE": "{home}/own"}, "{home}/own/programs"),
        ({"JAX_COMPILATION_CACHE_DIR": "{home}/jax"}, "{home}/jax"),
    ],
)
def test_explicit_settings_are_respected(tmp_path, variables, expected):
    given = {name: value.format(home=tmp_path) for name, value in variables.items()}
    done = start(tmp_path, **given)
    assert done.stdout.strip() == expected.format(home=tmp_path), done.stderr
    assert not (tmp_path / ".cache" / "racm3").exists()


def test_a_folder_that_cannot_be_created_is_refused_in_a_sentence(
    monkeypatch, tmp_path
):
    from racm3_jax.training.host import keep_compiled_programs

    (tmp_path / "file").write_text("")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("RACM3_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="give another path, or RACM3_CACHE=off"):
        keep_compiled_programs()


def test_programs_that_were_not_read_for_longest_are_removed(tmp_path, monkeypatch):
    for age, name in enumerate(("d-cache", "c-cache", "b-cache", "a-cache", "notes")):
        path = tmp_path / "programs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10))
        os.utime(path, (1000 - age, 900))
    monkeypatch.setenv("RACM3_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)

    def left():
        return sorted(path.name for path in (tmp_path / "programs").iterdir())

    everything = left()
    monkeypatch.setattr(host, "MAX_CACHE_BYTES", 40)
    host.keep_compiled_programs()
    assert left() == everything
    monkeypatch.setattr(host, "MAX_CACHE_BYTES", 25)
    host.keep_compiled_programs()
    assert left() == ["c-cache", "d-cache", "notes"]
    assert host.remove_oldest(tmp_path / "programs", "*-cache", 0) == [
        *("c-cache", "d-cache")
    ]
    assert left() == ["notes"]
