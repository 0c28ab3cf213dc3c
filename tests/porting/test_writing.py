"""Converted and exported folders: with checksums, atomic, never replacing other files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from crash_checks import check_every_crash
from porting_fakes import CLIP_CONFIG, clip_state, write_hf_clip

import racm3_jax
from racm3_jax import cli
from racm3_jax.checkpoints import CheckpointError, load_weights, verify_folder
from racm3_jax.porting.clip import convert_clip
from racm3_jax.porting.export import export_hf
from racm3_jax.porting.tensors import PortingError
from racm3_jax.retrieval.embedder import DocumentEmbedder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("a", "b")):
        write_hf_clip(folder / name, CLIP_CONFIG, clip_state(CLIP_CONFIG, seed))
        convert_clip(folder / name, folder / f"ours_{name}")
    return folder


def read_scale(path):
    return float(load_weights(path, "clip")[0]["vision"]["post_norm"]["scale"][0])


def test_a_conversion_is_old_or_new_after_any_crash(sources, tmp_path):
    path = tmp_path / "out"
    tried = check_every_crash(
        path,
        lambda: convert_clip(sources / "a", path, overwrite=True),
        lambda: convert_clip(sources / "b", path, overwrite=True),
        lambda: read_scale(path),
    )
    assert tried > 30


def test_an_export_is_old_or_new_after_any_crash(sources, tmp_path):
    path = tmp_path / "out"

    def read():
        record = verify_folder(path)
        if record is None:
            raise FileNotFoundError
        return record["files"]["model.safetensors"]["sha256"]

    tried = check_every_crash(
        path,
        lambda: export_hf(sources / "ours_a", path, overwrite=True),
        lambda: export_hf(sources / "ours_b", path, overwrite=True),
        read,
    )
    assert tried > 30


def test_every_file_of_a_conversion_has_a_checksum(sources, tmp_path):
    convert_clip(sources / "a", tmp_path / "out")
    names = ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    for name in names:
        path = tmp_path / "out" / name
        content = path.read_bytes()
        place = content.index(b"0") if name == "manifest.json" else len(content) // 2
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            DocumentEmbedder.load(tmp_path / "out")
        with pytest.raises(PortingError):
            export_hf(tmp_path / "out", tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
        path.write_bytes(content)
    assert DocumentEmbedder.load(tmp_path / "out").config == CLIP_CONFIG


def racm3(capsys, *words):
    status = cli.main([str(word) for word in words])
    return status, capsys.readouterr()


def test_the_command_replaces_only_its_own_kind(sources, tmp_path, capsys):
    out, export = tmp_path / "out", tmp_path / "hf"
    assert racm3(capsys, "convert", "clip", sources / "a", out)[0] == 0
    convert = ("convert", "clip", sources / "b", out)
    with pytest.raises(FileExistsError, match="already"):
        convert_clip(sources / "b", out)
    assert racm3(capsys, *convert, "--overwrite")[0] == 0
    assert read_scale(out) == read_scale(sources / "ours_b")
    assert racm3(capsys, "export", out, export)[0] == 0
    assert racm3(capsys, "export", out, export, "--overwrite")[0] == 0
    # An export is not a CLIP in our format, nor the reverse.
    with pytest.raises(FileExistsError, match="left alone"):
        convert_clip(sources / "b", export, overwrite=True)
    with pytest.raises(FileExistsError, match="left alone"):
        export_hf(out, out, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="left alone"):
        convert_clip(sources / "b", tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_exported_clip_of_two_parts_says_how_to_compare(tmp_path, capsys):
    clip = Path(racm3_jax.__file__).parent / "shipped/flagworld/clip"
    status, printed = racm3(capsys, "export", clip, tmp_path / "hf")
    assert status == 0
    assert "by the first 64 numbers of their embeddings only" in printed.out


def test_the_command_takes_a_part(sources, tmp_path, capsys):
    folder = tmp_path / "wrapped"
    state = clip_state(CLIP_CONFIG)
    wrapped = {f"clip.{name}": array for name, array in state.items()}
    write_hf_clip(
        folder, CLIP_CONFIG, wrapped | {"loss.scale": np.zeros(1, np.float32)}
    )
    status, printed = racm3(capsys, "convert", "clip", folder, tmp_path / "out")
    assert status == 2 and "give --part=clip" in printed.err
    words = ("convert", "clip", folder, tmp_path / "out", "--part=clip")
    assert racm3(capsys, *words)[0] == 0
    assert read_scale(tmp_path / "out") == read_scale(sources / "ours_a")
    origin = json.loads((tmp_path / "out" / "manifest.json").read_text())["origin"]
    assert origin["part"] == "clip"
