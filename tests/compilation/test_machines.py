"""Machines by name: those that exist, and errors for the others."""

from __future__ import annotations

import importlib.util

import pytest

from racm3_jax.compilation import machines
from racm3_jax.compilation.machines import Machine, MachineError, find_machine


@pytest.mark.parametrize(
    ("name", "chips", "shape"),
    [
        ("v5e", 1, (1, 1)),
        ("v5e", 4, (2, 2)),
        ("v5e", 8, (2, 4)),
        ("v6e", 32, (4, 8)),
        ("v5e", 64, (8, 8)),
        ("v5e", 256, (16, 16)),
        ("v5p", 1, (1, 1, 1)),
        ("v5p", 4, (2, 2, 1)),
        ("v5p", 8, (2, 2, 2)),
        ("v5p", 16, (2, 2, 4)),
        ("v5p", 32, (2, 4, 4)),
        ("v5p", 64, (4, 4, 4)),
        ("v5p", 128, (4, 4, 8)),
    ],
)
def test_the_usual_slice_for_a_number_of_chips(name, chips, shape):
    assert machines.usual_slice(name, chips) == shape


def test_machines():
    assert find_machine("v5p", 64) == Machine("v5p", 64, "4x4x4")
    assert find_machine("v5p", 1, "2x2x4") == Machine("v5p", 16, "2x2x4")
    assert find_machine("v5e", 64, num_slices=2) == Machine("v5e", 128, "8x8", 2)
    assert str(find_machine("v5e", 64, num_slices=2)) == "2 slices of v5e:8x8"
    assert find_machine("tpu7x", 8) == Machine("tpu7x", 8, "2x2x1")
    assert find_machine("h100", 8).topology == "1x1x8"
    assert find_machine("h100", 4).topology == "1x1x4"
    assert find_machine("h200", 32).topology == "1x4x8"
    assert find_machine("a100", 1, "1x2x4") == Machine("a100", 8, "1x2x4")
    assert [find_machine(n, 1).platform for n in ("v6e", "h100", "cpu")] == [
        "tpu",
        "gpu",
        "cpu",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("b200", 8), "--compile supports v5e"),
        (("v5p", 48), "no usual shape; give a --topology, e.g. 4x4x4"),
        (("v5p", 1, "8x8"), "has 3 axes, e.g. 2x2x4"),
        (("v5p", 32, "4x4x4"), "has 64 devices, but --device=v5p:32 says 32"),
        (("v5e", 1, "4xx4"), "give sizes"),
        (("tpu7x", 5), "even number"),
        (("h100", 12), "a multiple of 8"),
        (("h100", 1, "4x4"), "groups x nodes x GPUs"),
        (("cpu", 1, "4x4"), "have none"),
        (("h100", 16, "", 2), "--slices=2"),
        (("v5e", 4, "", 0), "--slices=0"),
    ],
)
def test_unknown_machines_are_refused_in_one_sentence(arguments, words):
    with pytest.raises(MachineError, match=words):
        find_machine(*arguments)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("v5e", "libtpu", "tpu-compile"), ("h100", "jax_cuda12_plugin", "gpu-compile")],
)
def test_without_its_compiler_the_extra_is_named(monkeypatch, name, package, extra):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == package else find_spec(n)
    )
    with pytest.raises(MachineError, match=rf"{name} needs .*\[{extra}\]"):
        machines.find_devices(find_machine(name, 4))


def test_a_gpu_is_described_by_its_own_figures():
    text = machines.describe_gpu("a100")
    assert "core_count: 108" in text and "{ major: 8 minor: 0 }" in text
    assert text.count("{") == text.count("}")


def test_cudnn_describes_the_absent_gpu_only_temporarily():
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    before = cudnn.check_compute_capability
    with machines.absent_cudnn(find_machine("h100", 8)):
        assert cudnn.check_compute_capability("9.0")
        assert not cudnn.check_compute_capability("10.0")
        assert cudnn.is_cuda_compute_capability_equal("9.0")
    with machines.absent_cudnn(find_machine("a100", 8)):
        assert not cudnn.check_compute_capability("9.0")
    assert cudnn.check_compute_capability is before


def test_more_cpus_than_exist():
    with pytest.raises(MachineError, match="JAX_NUM_CPU_DEVICES=99"):
        machines.find_devices(find_machine("cpu", 99))
