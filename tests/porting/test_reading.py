"""Files of other projects: those that are read, and errors of one sentence."""

from __future__ import annotations

import json
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from porting_fakes import state_dict_program, write_torch_file, write_torch_zip

from racm3_jax.porting.files import open_tensors, resolve_source
from racm3_jax.porting.pickles import read_plain_pickle
from racm3_jax.porting.rules import Rule, check_names
from racm3_jax.porting.tensors import PortingError, read_finite

STATE = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.array(2.5, np.float16),
}


def refusal(function, *args) -> str:
    with pytest.raises(PortingError) as error:
        function(*args)
    message = str(error.value)
    assert "\n" not in message
    return message


def assert_holds_state(source):
    assert set(source.tensors) == set(STATE)
    for name, expected in STATE.items():
        found = source.read(name)
        assert found.dtype == expected.dtype == source.tensors[name].dtype
        np.testing.assert_array_equal(found, expected)
        assert found.shape == expected.shape == source.tensors[name].shape


def write_safetensors(path, state=STATE):
    header, content = {}, b""
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    for name, array in state.items():
        end = len(content) + array.nbytes
        header[name] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(content), end],
        }
        content += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def test_safetensors_one_tensor_at_a_time(tmp_path):
    write_safetensors(tmp_path / "model.safetensors")
    assert_holds_state(open_tensors(tmp_path))


def test_torch_zip(tmp_path):
    write_torch_file(tmp_path / "model.pt", STATE)
    assert_holds_state(open_tensors(tmp_path / "model.pt"))


def test_shards_are_one_source(tmp_path):
    names = list(STATE)
    weight_map = {}
    for i, part in enumerate((names[:1], names[1:])):
        shard = f"model-{i}.safetensors"
        write_safetensors(tmp_path / shard, {n: STATE[n] for n in part})
        weight_map |= dict.fromkeys(part, shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_holds_state(open_tensors(tmp_path))
    index.write_text(
        json.dumps({"weight_map": weight_map | {"d": "model-0.safetensors"}})
    )
    assert "lack d" in refusal(open_tensors, tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../model-0.safetensors"}}))
    assert "outside its folder" in refusal(open_tensors, tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "lacks the shard model-1" in refusal(open_tensors, tmp_path)


def test_nested_state_and_inert_class_names():
    """Lightning's callbacks have classes as keys, which are not called."""
    program = state_dict_program(STATE)[2:-1]
    wrapped = (
        pickle.PROTO + b"\x02}(X\x09\x00\x00\x00callbacks}(cpytorch_lightning\nSaver\n"
        b"}uX\x0a\x00\x00\x00state_dict" + program + b"u."
    )
    assert set(read_plain_pickle(wrapped, "x")["state_dict"]) == set(STATE)


class Malicious:
    def __reduce__(self):
        return os.system, ("echo owned > owned.txt",)


class Plain:
    """A harmless class is refused, too."""


@pytest.mark.parametrize("protocol", range(6))
def test_malicious_pickle_is_refused_by_name(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    for value, named in (
        (Malicious(), f"{os.system.__module__}.system"),
        (Plain(), ""),
    ):
        program = pickle.dumps({"a": value}, protocol)
        write_torch_zip(tmp_path / "evil.pt", program, {})
        message = refusal(open_tensors, tmp_path / "evil.pt")
        assert named in message and "neither a tensor nor a plain container" in message
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pt"]
    if protocol >= 2:
        assert "Plain" in message


@pytest.mark.parametrize(
    "program",
    [
        b"(S'echo'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'echo'\no.",  # OBJ
        b"\x82\x01.",  # EXT1
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__torch__\nModel\n(tR.",  # TorchScript modules are built, never called
    ],
)
def test_every_way_to_call_is_refused(program):
    assert "calls" in refusal(read_plain_pickle, program, "x.pt")


def test_truncated_files(tmp_path):
    safe, torch_file = tmp_path / "m.safetensors", tmp_path / "m.pt"
    write_safetensors(safe)
    write_torch_file(torch_file, STATE)
    whole = {path: path.read_bytes() for path in (safe, torch_file)}
    for path, content in whole.items():
        for keep in (0, 5, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:keep])
            assert "truncated" in refusal(open_tensors, path), keep
    safe.write_bytes(b"\xff" * 40)
    assert "truncated or not a safetensors file" in refusal(open_tensors, safe)


def test_a_flipped_byte_of_a_torch_file_is_detected(tmp_path):
    path = tmp_path / "m.pt"
    write_torch_file(path, STATE)
    content = bytearray(path.read_bytes())
    content[content.index(STATE["a.weight"].tobytes()) + 3] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(open_tensors(path).read, "a.weight")


def test_storages_of_wrong_sizes(tmp_path):
    program = state_dict_program({"a": np.zeros(4, np.float32)})
    write_torch_zip(tmp_path / "short.pt", program, {"0": b"\0" * 8})
    assert "needs 16 stored bytes and has 8" in refusal(
        open_tensors, tmp_path / "short.pt"
    )
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", b"\0" * 16)
    assert "damaged" in refusal(open_tensors, tmp_path / "bomb.pt")


@pytest.mark.parametrize("value, word", [(np.nan, "NaN"), (np.inf, "infinite")])
def test_values_that_are_not_numbers(tmp_path, value, word):
    array = np.ones((3, 3), np.float32)
    array[1, 2] = value
    safetensors.numpy.save_file({"w": array}, tmp_path / "m.safetensors")
    source = open_tensors(tmp_path)
    assert f"w of {source.where} holds a" in refusal(read_finite, source, "w")
    assert word in refusal(read_finite, source, "w")


def test_quantised_weights_are_refused(tmp_path):
    state = {"w": np.ones(3, np.int8)}
    safetensors.numpy.save_file(state, tmp_path / "m.safetensors")
    assert "quantised" in refusal(read_finite, open_tensors(tmp_path), "w")


def test_all_differences_are_listed(tmp_path):
    write_safetensors(tmp_path / "m.safetensors")
    rules = [
        Rule("x", "a.weight", (3, 2)),
        Rule("y", "gone.1", (1,)),
        Rule("z", "gone.2", (1,)),
    ]
    message = refusal(check_names, rules, open_tensors(tmp_path), "test", ["c"])
    assert "2 missing (gone.1, gone.2)" in message
    assert "1 unexpected (b)" in message
    assert "1 mis-shaped (a.weight is [2, 3], not [3, 2])" in message


def test_no_weights_and_too_many_weights(tmp_path):
    assert "holds no weights" in refusal(open_tensors, tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_tensors(tmp_path / "none.pt")
    for name in ("a.safetensors", "b.safetensors"):
        write_safetensors(tmp_path / name)
    assert "a.safetensors, b.safetensors" in refusal(open_tensors, tmp_path)
    (tmp_path / "w.npz").write_bytes(b"")
    assert "not a weights file" in refusal(open_tensors, tmp_path / "w.npz")


def test_hub_source_from_its_cache(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    write_safetensors(snapshot / "model.safetensors")
    found = resolve_source("hub:owner/name")
    assert found == snapshot
    assert_holds_state(open_tensors(found))
    assert "not hub:owner/name" in refusal(resolve_source, "hub:owner")
    assert "could not be fetched" in refusal(resolve_source, "hub:owner/absent")
