"""Chameleon from four layouts: one model; vocabulary by name; atomic writes."""

from __future__ import annotations

import dataclasses
import shutil
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from chameleon_fakes import (
    LAYOUTS,
    NUM_CODES,
    VOCAB_SIZE,
    hf_record,
    make_tokenizer,
    native_state,
    write_chameleon,
)
from porting_fakes import write_torch_file
from vqgan_fakes import VQGAN_CONFIG, vqgan_state

from racm3_jax.checkpoints import load_weights, save_weights, verify_manifest
from racm3_jax.checkpoints.manifest import MANIFEST_NAME
from racm3_jax.porting.chameleon import convert_chameleon
from racm3_jax.porting.chameleon_rules import halves_from_neighbours
from racm3_jax.porting.export import export_hf
from racm3_jax.porting.files import open_tensors, read_json
from racm3_jax.porting.rules import flatten
from racm3_jax.porting.tensors import PortingError
from racm3_jax.porting.vocabulary import code_of_name, read_vocabulary
from racm3_jax.tokenizers.mixed import MixedTokenizer


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    path = tmp_path_factory.mktemp("vqgan") / "vqgan.ckpt"
    write_torch_file(path, vqgan_state(VQGAN_CONFIG))
    return path


def convert(source, out, vqgan):
    return convert_chameleon(
        source, out, vqgan=vqgan, accept_licence=True, image_size=16
    )


def test_neighbours_become_halves():
    rows = np.array(["a0", "b0", "a1", "b1", "c0", "d0", "c1", "d1"])
    halves = halves_from_neighbours(rows, 4)
    assert halves.tolist() == ["a0", "a1", "b0", "b1", "c0", "c1", "d0", "d1"]


def test_four_layouts_are_one_model(tmp_path, vqgan):
    record = hf_record()
    native = native_state(record)
    converted = {}
    for layout in LAYOUTS:
        source = write_chameleon(tmp_path / layout, record, native, layout)
        out = tmp_path / "out" / layout
        config = convert(source, out, vqgan)
        assert (config.kv_heads, config.qk_norm, config.position) == (2, True, "rope")
        assert verify_manifest(out) is None
        origin = read_json(out / MANIFEST_NAME)["origin"]
        assert origin["licence"] == "Chameleon Research License"
        assert origin["licence_accepted"] is True
        converted[layout] = flatten(load_weights(out / "model", "generator")[0])
    for layout in LAYOUTS:
        assert converted[layout].keys() == converted["hf"].keys()
        for name, array in converted[layout].items():
            np.testing.assert_array_equal(array, converted["hf"][name], name)

    # Tokens by name, in both directions.
    mixed = MixedTokenizer.load(tmp_path / "out" / "hf" / "tokenizer")
    vocab = mixed.vocab
    ids = make_tokenizer()["model"]["vocab"]
    embedding, head = converted["hf"]["embedding"], converted["hf"]["head"].T
    their_embedding, their_head = (
        native["tok_embeddings.weight"],
        native["output.weight"],
    )
    expected = {
        vocab.pad: ("<pad>", "<pad>"),
        vocab.eod: ("<s>", "</s>"),
        vocab.break_: ("<racm3:break>", "<racm3:break>"),
        vocab.eoss: ("<eoss>", "<eoss>"),
        vocab.sentinel(4): ("<reserved00004>", "<reserved00004>"),
        int(vocab.image_tokens(13)): ("IMGIMGBDZ", "IMGIMGBDZ"),
        int(mixed.encode_text("the")[0]): ("the", "the"),
    }
    for ours, (read, written) in expected.items():
        np.testing.assert_array_equal(embedding[ours], their_embedding[ids[read]])
        np.testing.assert_array_equal(head[ours], their_head[ids[written]])
    assert len(embedding) == VOCAB_SIZE >= vocab.size
    assert sorted(map(tuple, head)) == sorted(map(tuple, their_head))
    control = mixed.encode_text("<s>IMGIMGBDZ<eoss>")
    assert vocab.is_text(control).all() and len(control) == len("<s>IMGIMGBDZ<eoss>")


def test_export_is_bit_exact(tmp_path, vqgan):
    record = hf_record()
    native = native_state(record)
    source = write_chameleon(tmp_path / "hf", record, native, "hf")
    convert(source, tmp_path / "ours", vqgan)
    assert export_hf(tmp_path / "ours", tmp_path / "back") == "generator"
    before, after = open_tensors(source), open_tensors(tmp_path / "back")
    for name in before.tensors:
        np.testing.assert_array_equal(after.read(name), before.read(name), name)
    image = vqgan_state(VQGAN_CONFIG)
    for name in set(after.tensors) - set(before.tensors):
        original = image[name.removeprefix("model.vqmodel.")]
        np.testing.assert_array_equal(after.read(name), original, name)
    for name in ("tokenizer.json", "config.json"):
        assert read_json(tmp_path / "back" / name) == read_json(source / name)
    convert(tmp_path / "back", tmp_path / "again", vqgan)
    for part in ("model", "tokenizer/image"):
        again, ours = (
            (tmp_path / name / part / "model.safetensors").read_bytes()
            for name in ("again", "ours")
        )
        assert again == ours


def test_no_weight_is_left_out_of_an_export(tmp_path, vqgan):
    """A model that was trained on with positions within images."""
    record = hf_record()
    source = write_chameleon(tmp_path / "hf", record, native_state(record), "hf")
    convert(source, tmp_path / "ours", vqgan)
    model = tmp_path / "ours" / "model"
    params, config, extra = load_weights(model, "generator")
    places = np.zeros((4, config["d_model"]), np.float32)
    shutil.rmtree(model)
    save_weights(
        model,
        {**params, "image_position_embedding": places},
        kind="generator",
        config=config,
        extra=extra,
    )
    with pytest.raises(PortingError, match="not have: image_position_embedding"):
        export_hf(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_licence_must_be_accepted(tmp_path, vqgan):
    source = write_chameleon(
        tmp_path / "hf", hf_record(), native_state(hf_record()), "hf"
    )
    with pytest.raises(PortingError, match="--accept_licence"):
        convert_chameleon(source, tmp_path / "out", vqgan=vqgan, image_size=16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fault, words",
    [
        ("no vqgan", "--vqgan"),
        ("codes", "image tokenizer has 24 codes, but the vocabulary has 23"),
        ("codebook", "codebook of the image tokenizer is not the one"),
        ("swin", "swin_norm=True"),
        ("nan", "holds a NaN"),
        ("shape", "v_proj.weight is"),
    ],
)
def test_mismatches_are_refused_without_output(tmp_path, vqgan, fault, words):
    record, tokenizer = hf_record(), make_tokenizer()
    native = native_state(record)
    if fault == "codes":
        name = "IMGIMG" + "CD" + "Z"  # code 23, the last
        tokenizer["model"]["vocab"]["other"] = tokenizer["model"]["vocab"].pop(name)
        added = tokenizer["added_tokens"]
        tokenizer["added_tokens"] = [t for t in added if t["content"] != name]
    elif fault == "swin":
        record["swin_norm"] = True
    elif fault == "nan":
        native["layers.1.ffn_norm.weight"][0] = np.nan
    elif fault == "shape":
        native["layers.1.attention.wv.weight"] = np.zeros((3, 32), np.float32)
    source = write_chameleon(tmp_path / "hf", record, native, "hf", tokenizer)
    if fault == "codebook":
        other = {"model.vqmodel.quantize.embedding.weight": np.ones((NUM_CODES, 8))}
        shard = source / "model-00001-of-00002.safetensors"
        content = safetensors.numpy.load_file(shard)
        safetensors.numpy.save_file(content | other, shard)
    with pytest.raises(PortingError) as error:
        convert(source, tmp_path / "out", None if fault == "no vqgan" else vqgan)
    assert words in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda vocab: vocab.pop("<racm3:break>"), "lacks <racm3:break>"),
        (lambda vocab: vocab.update(IMGIMGAFZ=VOCAB_SIZE - 1), "not each of 0"),
        (lambda vocab: vocab.update(a=VOCAB_SIZE), "of another model"),
        (lambda vocab: vocab.update({"<pad>": 0}), "two"),
    ],
)
def test_a_wrong_vocabulary_is_refused(change, words):
    tokenizer = make_tokenizer()
    tokenizer["added_tokens"] = []
    read_vocabulary(tokenizer, VOCAB_SIZE, "t")
    change(tokenizer["model"]["vocab"])
    with pytest.raises(PortingError, match=words):
        read_vocabulary(tokenizer, VOCAB_SIZE, "t")


def test_code_names():
    assert [code_of_name(n) for n in ("IMGIMGAZ", "IMGIMGBDEZ", "IMGIMG", "A")] == [
        0,
        134,
        None,
        None,
    ]


def test_peak_memory_stays_under_twice_the_largest_shard(tmp_path, vqgan):
    """Shards as a 7B checkpoint has them: three, none of whose tensors is large in it.

    Everything is traced: vocabulary, image tokenizer, checksums and manifest included.
    Its 32 layers are 8 here, and its sizes a sixteenth.
    """
    record = hf_record(heads=4, kv_heads=4, head_dim=64, layers=8)
    record["intermediate_size"] = 688
    native = native_state(record)
    source = write_chameleon(tmp_path / "hf", record, native, "hf", num_shards=3)
    shard_bytes = max(p.stat().st_size for p in source.glob("*.safetensors"))
    largest = max(x.nbytes for x in native.values())
    assert shard_bytes > 8 * largest
    del native
    convert(source, tmp_path / "first", vqgan)  # imports and compilations are finished
    tracemalloc.start()
    try:
        convert(source, tmp_path / "out", vqgan)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Less than twice: a shard is never completely in memory, and the rest is small.
    assert peak < shard_bytes, (peak, shard_bytes)


def test_half_precision_of_the_source_is_kept(tmp_path, vqgan):
    record = hf_record()
    native = {n: x.astype(np.float16) for n, x in native_state(record).items()}
    source = write_chameleon(tmp_path / "hf", record, native, "hf")
    config = convert(source, tmp_path / "out", vqgan)
    assert config.compute_dtype == "bfloat16"
    assert dataclasses.asdict(config)["num_kv_heads"] == 2
    stored = open_tensors(tmp_path / "out" / "model" / "model.safetensors")
    assert {info.dtype.name for info in stored.tensors.values()} == {"float16"}
