"""Files that torch itself saves, as in trainings."""

from __future__ import annotations

import argparse
import collections
import pathlib

import numpy as np
import pytest

from racm3_jax.porting.files import open_tensors
from racm3_jax.porting.tensors import PortingError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))


@pytest.fixture(scope="module")
def optimizer(network):
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(2, 3)).square().sum().backward()
    optimizer.step()
    return optimizer


def assert_holds(path, network, part=None):
    source = open_tensors(path, part)
    expected = network.state_dict()
    assert set(source.tensors) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(source.read(name), tensor.numpy())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_state_dicts(tmp_path, network):
    for name, value in {
        "state": network.state_dict(),
        "parameters": dict(network.named_parameters()),
        "compiled": torch.compile(network).state_dict(),
        "parallel": torch.nn.DataParallel(network).state_dict(),
    }.items():
        torch.save(value, tmp_path / f"{name}.pt")
        assert_holds(tmp_path / f"{name}.pt", network)
    torch.jit.trace(network, torch.randn(2, 3)).save(str(tmp_path / "script.pt"))
    assert_holds(tmp_path / "script.pt", network)


def test_trainings(tmp_path, network, optimizer):
    state = network.state_dict()
    arguments = argparse.Namespace(
        rate=np.float64(0.1),
        sizes=np.arange(3),
        path=pathlib.PurePosixPath("x"),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    torch.save(
        {
            "epoch": 1,
            "best": np.float32(2),
            "state_dict": {f"model.{name}": x for name, x in state.items()},
            "optimizer_states": [optimizer.state_dict()],
            "hyper_parameters": arguments,
            "callbacks": {argparse.Namespace: collections.defaultdict(list)},
        },
        tmp_path / "lightning.ckpt",
    )
    assert_holds(tmp_path / "lightning.ckpt", network)
    average = {name: x + 1 for name, x in state.items()}
    torch.save(
        {"model": state, "optimizer": optimizer.state_dict(), "ema": average},
        tmp_path / "train.pt",
    )
    assert_holds(tmp_path / "train.pt", network)
    found = open_tensors(tmp_path / "train.pt", "ema")
    np.testing.assert_array_equal(found.read("0.bias"), average["0.bias"].numpy())


def test_other_kinds_of_tensors(tmp_path, network):
    for value, message in (
        (network, "Sequential"),
        ({"w": torch.eye(3).to_sparse()}, "_rebuild_sparse_tensor"),
        (
            {"w": torch.randn(3).to(torch.float8_e4m3fn)},
            "_rebuild_tensor_v3.*in float32",
        ),
        ({"w": torch.ones(1).expand(1000)}, "overlap"),
    ):
        torch.save(value, tmp_path / "m.pt")
        with pytest.raises(PortingError, match=message):
            open_tensors(tmp_path / "m.pt")
