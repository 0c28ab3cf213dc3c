"""The output of a training on a terminal."""

from __future__ import annotations

import io
import logging as python_logging
import re
import sys

import jax.numpy as jnp
import pytest
from absl import logging

from racm3_jax.training.progress import StepLog, describe_parameters, report_parameters


@pytest.mark.parametrize("console", ["absl", "python"])
def test_a_log_line_is_a_separate_line(monkeypatch, console):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    handler = python_logging.StreamHandler(stream)
    if console == "python":
        monkeypatch.setattr(python_logging.getLogger(), "handlers", [handler])
    else:
        monkeypatch.setattr(
            python_logging.getLogger(), "handlers", [logging.get_absl_handler()]
        )
    with StepLog(0, 3, None, True, "train") as log:
        logging.warning("take care")
        log.enqueue(1, {}, {})
    logging.warning("no bar")
    lines = re.split(r"[\r\n]", stream.getvalue())
    assert any("train" in line and "1/3" in line for line in lines)
    (said,) = [line for line in lines if "take care" in line]
    assert "train" not in said and said.endswith("take care")
    assert "emit" not in vars(handler)
    assert "emit" not in vars(logging.get_absl_handler())


def test_parameters_are_printed(capsys):
    report_parameters({"up": {"kernel": jnp.ones((3, 5))}}, progress=False)
    assert capsys.readouterr().err == ""
    report_parameters({"up": {"kernel": jnp.ones((3, 5))}}, progress=True)
    said = capsys.readouterr().err
    assert "up/kernel" in said and "Total: 15" in said


def test_equal_parameters_of_numbered_layers_share_a_row():
    layers = {f"layers_{i}": {"kernel": jnp.ones((3, 5))} for i in range(12)}
    other = {"layers_12": {"kernel": jnp.ones((7,))}, "head": jnp.ones(2, jnp.int8)}
    *_, total = lines = describe_parameters(layers | other).splitlines()
    assert [re.split(r"\s*\|\s*", line)[1:-1] for line in lines if "|" in line] == [
        ["Name", "Shape", "Dtype", "Number", "Size"],
        ["layers_*/kernel", "(3, 5)", "float32", "12", "180"],
        ["layers_12/kernel", "(7,)", "float32", "1", "7"],
        ["head", "(2,)", "int8", "1", "2"],
    ]
    assert total == "Total: 189 -- 750 bytes"
