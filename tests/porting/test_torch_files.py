"""Checkpoints of trainings: which weights are read, and what is never executed."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from porting_fakes import state_dict_program, write_torch_zip

from racm3_jax.porting import pickles, torch_files
from racm3_jax.porting.files import open_tensors, suggest_part
from racm3_jax.porting.pickled import Inert
from racm3_jax.porting.pickles import read_plain_pickle
from racm3_jax.porting.tensors import PortingError

A, B = np.arange(3, dtype=np.float32), np.full(2, 7, np.float32)


class Tensors:
    """Pickles as the state dict `{name: array}`; storages are numbered by `first`."""

    def __init__(self, arrays, first=0):
        self.arrays, self.first = arrays, first


class Shape(enum.Enum):
    SQUARE = 1


def refusal(function, *args) -> str:
    with pytest.raises(PortingError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def dump(value) -> bytes:
    """A pickle of nested dicts in which `Tensors` are state dicts of torch."""
    if isinstance(value, Tensors):
        program = state_dict_program(value.arrays, value.first)
        return program[2:-1]
    if isinstance(value, dict):
        out = pickle.EMPTY_DICT + pickle.MARK
        for key, item in value.items():
            content = key.encode()
            out += pickle.BINUNICODE + struct.pack("<I", len(content)) + content
            out += dump(item)
        return out + pickle.SETITEMS
    return pickle.dumps(value, 2)[2:-1]  # memo numbers are not shared


def write_checkpoint(path, value) -> None:
    storages = {}

    def collect(item):
        if isinstance(item, Tensors):
            for i, array in enumerate(item.arrays.values()):
                storages[str(item.first + i)] = array.tobytes()
        elif isinstance(item, dict):
            for inner in item.values():
                collect(inner)

    collect(value)
    write_torch_zip(path, pickle.PROTO + b"\x02" + dump(value) + pickle.STOP, storages)


def read(path, part=None):
    source = open_tensors(path, part)
    return {name: source.read(name).tolist() for name in source.tensors}


WEIGHTS, OTHER = Tensors({"w": A}), Tensors({"w": B}, first=10)


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"state_dict": WEIGHTS, "optimizer_states": OTHER, "epoch": 3},
        {"model": WEIGHTS, "optimizer": OTHER, "args": argparse.Namespace(lr=1)},
        {"model": WEIGHTS, "ema": OTHER},
        {"ema": WEIGHTS},
        {"state_dict": WEIGHTS, "state_dict_ema": OTHER},
        {"net": {"state_dict": WEIGHTS}, "scheduler": OTHER},
        {"module": WEIGHTS, "lr_schedulers": {"a": OTHER}},
        {"my_network": WEIGHTS, "optim": {"state": OTHER}},
    ],
)
def test_the_model_of_a_training_is_found(tmp_path, checkpoint):
    write_checkpoint(tmp_path / "last.ckpt", checkpoint)
    assert read(tmp_path / "last.ckpt") == {"w": A.tolist()}


def test_one_of_several_is_chosen_by_its_path(tmp_path):
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, {"teacher": WEIGHTS, "student": {"ema": OTHER}})
    write_checkpoint(
        tmp_path / "two.ckpt",
        {"teacher": WEIGHTS, "student": Tensors({"w": B}, first=10)},
    )
    message = refusal(open_tensors, tmp_path / "two.ckpt")
    assert "--part, one of teacher, student" in message
    assert read(tmp_path / "two.ckpt", "student") == {"w": B.tolist()}
    assert read(path, "student.ema") == {"w": B.tolist()}
    assert "one of teacher, student.ema" in refusal(open_tensors, path, "pupil")
    # Or by a prefix of their names.
    names = Tensors({"clip.w": A, "loss.w": B})
    write_checkpoint(path, {"state_dict": names, "optimizer": OTHER})
    for part in ("clip", "state_dict.clip"):
        assert read(path, part) == {"w": A.tolist()}


def test_one_dict_under_two_paths_is_found_under_both():
    """Before the first step, an averaged model is the model itself."""
    tensor = read_plain_pickle(state_dict_program({"w": A}), "x")["w"]
    state = {"w": tensor}
    value = {"model": state, "ema": state}
    for part in (None, "model", "ema"):
        assert torch_files.find_state_dict(value, "x.pt", part) == state
    value = {"generator": state, "discriminator": state}
    assert "one of generator, disc" in refusal(
        torch_files.find_state_dict, value, "x.pt"
    )


def test_endless_nesting_of_dicts(monkeypatch):
    monkeypatch.setattr(torch_files, "_MAX_DICTS", 1000)
    value = {}
    for _ in range(4):
        value = {str(i): value for i in range(9)}
    assert "nests more than 1,000 dicts" in refusal(
        torch_files.find_state_dict, value, "x.pt"
    )


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "model.", "module._orig_mod.", "model.module._orig_mod."],
)
@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_common_prefixes_are_removed(tmp_path, prefix, form):
    state = {prefix + "visual.a": A, prefix + "text._orig_mod.b": B}
    path = tmp_path / f"m.{form}"
    if form == "pt":
        write_checkpoint(path, {"state_dict": Tensors(state)})
    else:
        safetensors.numpy.save_file(state, path)
    assert read(path) == {"visual.a": A.tolist(), "text.b": B.tolist()}


def test_other_prefixes_are_kept(tmp_path):
    state = {"model.layers.0": A, "lm_head": B}
    safetensors.numpy.save_file(state, tmp_path / "m.safetensors")
    assert set(read(tmp_path)) == set(state)
    # Both names would be equal.
    state = {"a._orig_mod.b": A, "a.b": B}
    safetensors.numpy.save_file(state, tmp_path / "m.safetensors")
    assert set(read(tmp_path)) == set(state)


def test_weights_among_others_are_named_and_taken(tmp_path):
    state = {"model.visual.conv1.weight": A, "loss.scale": B}
    safetensors.numpy.save_file(state, tmp_path / "m.safetensors")
    advice = suggest_part(state, ["visual.conv1.weight"])
    assert advice == "; such weights are inside it: give --part=model"
    assert read(tmp_path, "model") == {"visual.conv1.weight": A.tolist()}
    assert "names begin with loss, model" in refusal(open_tensors, tmp_path, "x")
    assert suggest_part(["a"], ["b"]) == ""


UNRELATED = {
    "numpy scalar": np.float64(0.5),
    "numpy array": np.arange(3),
    "dtype": np.dtype("float32"),
    "namespace": argparse.Namespace(lr=0.1, layers=[1, 2]),
    "path": pathlib.PurePosixPath("a/b"),
    "default dict": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("aab"),
    "enum": Shape.SQUARE,
    "sets": [{1, 2}, frozenset("ab")],
    "bytes": [b"a", bytearray(b"a")],
    "complex": 1j,
}


@pytest.mark.parametrize("name", UNRELATED)
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_objects_next_to_the_weights_are_not_executed(name, protocol):
    """Never called and not kept: only the rest is read."""
    program = pickle.dumps({"other": UNRELATED[name], "after": 3}, protocol)
    found = read_plain_pickle(program, "x.ckpt")
    assert found["after"] == 3
    assert isinstance(found["other"], (Inert, list))


def test_a_lightning_checkpoint(tmp_path):
    write_checkpoint(
        tmp_path / "last.ckpt",
        {
            "epoch": 4,
            "best": np.float32(0.25),
            "hyper_parameters": {"args": argparse.Namespace(lr=1e-4), "w": OTHER},
            "state_dict": WEIGHTS,
        },
    )
    assert read(tmp_path / "last.ckpt") == {"w": A.tolist()}


def test_an_unknown_tensor_among_the_weights_is_refused(tmp_path):
    """Dropping it silently would fail later, or never."""
    program = pickle.dumps({"other": np.float64(1)}, 2)
    value = read_plain_pickle(program, "x")
    tensor = read_plain_pickle(state_dict_program({"w": A}), "x")["w"]
    message = refusal(
        torch_files.find_state_dict, {"w": tensor, "q": value["other"]}, "x.pt"
    )
    assert "(at q)" in message and "scalar" in message


def tensor_program(offset, shape, strides, size) -> bytes:
    """A state dict whose one tensor has the given view of `size` elements."""

    def number(n):
        return pickle.dumps(n, 2)[2:-1]

    def numbers(values):
        return pickle.MARK + b"".join(map(number, values)) + pickle.TUPLE

    whole = state_dict_program({"w": np.zeros(size, np.float32)})
    end = whole.index(pickle.BINPERSID) + 1
    tail = whole[whole.index(pickle.NEWFALSE, end) :]
    return whole[:end] + number(offset) + numbers(shape) + numbers(strides) + tail


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ((0, (2, 2), (2, 1)), None),
        ((0, (2, 2), (1, 2)), None),
        ((1, (3,), (1,)), None),
        ((0, (4, 1), (1, 0)), None),
        ((0, (0, 5), (5, 1)), None),
        ((0, (1_000_000_000,), (0,)), "overlap"),
        ((0, (2, 3), (1, 1)), "overlap"),
        ((0, (5,), (1,)), "past its storage"),
        ((2, (3,), (1,)), "past its storage"),
        ((0, (2**62, 2**62), (1, 1)), "past its storage"),
        ((-1, (2,), (1,)), "from 0 up"),
        ((0, (2,), (-1,)), "from 0 up"),
        ((0, (-2,), (1,)), "from 0 up"),
        ((0, (2,), (1, 1)), "without storage or strides"),
        ((0, (1,) * 40, (1,) * 40), "40 axes"),
        ((0.0, (2,), (1,)), "from 0 up"),
        ((0, (True,), (1,)), "from 0 up"),
        ((0, ("2",), (1,)), "from 0 up"),
    ],
)
def test_invalid_views(tmp_path, view, message):
    path = tmp_path / "m.pt"
    stored = np.arange(4, dtype=np.float32)
    write_torch_zip(path, tensor_program(*view, 4), {"0": stored.tobytes()})
    if message is None:
        offset, shape, strides = view
        expected = np.lib.stride_tricks.as_strided(
            stored[offset:], shape, [4 * s for s in strides]
        )
        np.testing.assert_array_equal(open_tensors(path).read("w"), expected)
    else:
        assert message in refusal(open_tensors, path)


def test_a_program_that_decompresses_endlessly(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "_MAX_PROGRAM_BYTES", 10_000)
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * 1_000_000 + b".")
    assert path.stat().st_size < 5000
    assert "more than 10,000 bytes" in refusal(open_tensors, path)


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02" + b"]" * 5000 + b".",
        # The same dict is copied again and again.
        b"\x80\x02}q\x00(" + b"".join(b"K%cN" % i for i in range(9)) + b"u"
        b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R0" * 200 + b".",
    ],
)
def test_a_program_of_too_many_steps(monkeypatch, program):
    monkeypatch.setattr(pickles, "_MAX_STEPS", 1500)
    assert "1,500 steps" in refusal(read_plain_pickle, program, "x.pt")


def test_endless_nesting_is_refused_in_one_sentence():
    deep = b"\x80\x02" + b"]" * 90_000 + b"a" * 89_999 + b"."
    assert isinstance(read_plain_pickle(deep, "x"), list)
    for program in (b"}%sNs.", b"\x8f(%s\x90.", b"(%s\x91."):
        key = program % (b")" + b"\x85" * 90_000)
        assert "nested tuples" in refusal(read_plain_pickle, key, "x.pt")
    itself = b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."
    value = read_plain_pickle(itself, "x")
    assert "no named tensors" in refusal(torch_files.find_state_dict, value, "x.pt")


@pytest.mark.parametrize(
    "program",
    [b"S'\\d\\x'\n.", b"Vab", b"I1x\n.", b"L" + b"9" * 9999 + b"L\n.", b"h\x07.", b"s."]
    + [b"(K\x01d.", b"K\x01(K\x02e.", b"\xff.", b"(\x00.", b"Q.", b"(K\x01tQ.", b""],
)
def test_damaged_programs(program):
    assert "x.pt" in refusal(read_plain_pickle, program, "x.pt")


def test_an_invalid_zip_directory(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    write_checkpoint(path, {"state_dict": WEIGHTS})
    monkeypatch.setattr(torch_files, "_MAX_DIRECTORY_BYTES", 100)
    assert "a directory of" in refusal(open_tensors, path)


def test_an_encrypted_zip(tmp_path):
    path = tmp_path / "m.pt"
    write_checkpoint(path, {"state_dict": WEIGHTS})
    content = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + place] |= 1
    path.write_bytes(content)
    assert "encrypted" in refusal(open_tensors, path)


def test_a_storage_of_more_bytes_than_the_file(tmp_path):
    """Only the directory claims this size; nothing is allocated."""
    path = tmp_path / "m.pt"
    size = 1 << 30
    program = state_dict_program({"w": np.broadcast_to(np.float32(0), (size,))})
    write_torch_zip(path, program, {"0": b"1234567"})
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"archive/data/0") - 46
    content[entry + 20 : entry + 28] = struct.pack("<II", 4 * size - 4, 4 * size - 4)
    path.write_bytes(content)
    assert "damaged" in refusal(open_tensors, path)


def test_a_whole_module_is_named():
    program = (
        b"\x80\x02cmodels\nMyNet\n)\x81}X\x01\x00\x00\x00wK\x01sb."  # torch.save(net)
    )
    assert "calls models.MyNet" in refusal(read_plain_pickle, program, "x.pt")


def test_the_machine_calls_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Writes:
        def __reduce__(self):
            return io.open, ("owned.txt", "w")

    class Makes:
        def __reduce__(self):
            return pathlib.Path.touch, (pathlib.PurePosixPath("owned.txt"),)

    for value in (Writes(), Makes()):
        program = pickle.dumps({"a": value}, 4)
        with pytest.raises(PortingError):
            torch_files.find_state_dict(read_plain_pickle(program, "x"), "x")
    assert list(tmp_path.iterdir()) == []
