"""The shipped weights match their manifest, are small, and can be loaded."""

import shutil

import numpy as np
import pytest
from PIL import Image

from racm3_jax import checkpoints, cli, wiring
from racm3_jax.flagworld import (
    FlagIdentifier,
    FlagworldConfig,
    make_nations,
    read_flagworld,
)
from racm3_jax.tokenizers.mixed import MixedTokenizer
from racm3_jax.wiring.generators import ask_as_trained, read_defaults

SHIPPED = wiring.resolve("shipped:flagworld")


def test_every_folder_has_checksums():
    assert checkpoints.verify_manifest(SHIPPED) is None
    for name in ("tokenizer", "tokenizer/image", "clip", "model", "twin"):
        assert checkpoints.verify_folder(SHIPPED / name) is not None, name
    manifest = checkpoints.read_manifest(SHIPPED)
    assert manifest is not None
    assert all(
        command.startswith("racm3 ") for command in manifest["commands"].values()
    )


def test_settings_of_another_training_are_refused(tmp_path):
    """A changed byte once gave other images silently."""
    shutil.copytree(SHIPPED / "model", tmp_path / "model")
    for name in ("tokenizer", "clip"):
        (tmp_path / name).symlink_to(SHIPPED / name)
    path = tmp_path / "model" / "config.json"
    text = path.read_text()
    for old, new in (
        ('"max_similarity": 0.95', '"max_similarity": 0.05'),
        ('"num_heads": 4', '"num_heads": 2'),
        ('"e6924480fa4a94df"', '"e6924480fa4a94d0"'),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(checkpoints.CheckpointError, match=r"checksum of config"):
            wiring.load_generator(tmp_path, None)
    # With valid checksums, but next to the tokenizer of another training.
    checkpoints.write_manifest(tmp_path / "model", {"kind": "generator"})
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        wiring.load_generator(tmp_path, None)


def test_captions_are_asked_for_in_the_order_of_the_training():
    measured = {"caption": {"num_candidates": 16, "image_first": True}}
    stored = ask_as_trained(measured, "stored")
    assert stored == {"caption": {"num_candidates": 16, "image_first": False}}
    turned = ask_as_trained({}, "as_main")
    assert turned == {"caption": {"image_first": True}}
    assert read_defaults({"defaults": turned}, SHIPPED / "model") == turned
    assert measured["caption"]["image_first"]


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ([1], r"says defaults=\[1\], which are not settings by task"),
        ({"caption": "none"}, "which are not settings by task"),
        ({"caption": {"guidance": "2"}}, "says guidance='2', but .* wants float"),
        ({"caption": {"num_candidates": 4.5}}, "says num_candidates=4.5, .* wants int"),
        ({"caption": {"temperature": -1}}, "temperature must be a number >= 0"),
        ({"caption": {"num_candidates": -1}}, "num_candidates must be >= 0; got -1"),
        ({"caption": {"top": 1}}, "says top, which CaptionDefaults does not have"),
        ({"image": {"top_p": 2.0}}, "top_p must be above 0 and at most 1"),
        ({"image": {"guidance": 2.0}}, "guidance, which ImageDefaults does not have"),
        ({"image": {"region_prompt": "near"}}, "'near'; allowed: 'masked', 'in_place'"),
        ({"image": {"rank_by": "luck"}}, "rank_by is 'luck'; allowed: 'auto', 'clip'"),
    ],
)
def test_measured_settings_of_wrong_types_are_refused(tmp_path, defaults, message):
    with pytest.raises(ValueError, match=message):
        read_defaults({"defaults": defaults}, tmp_path)


def test_a_folder_with_wrong_settings_is_refused_in_one_sentence(tmp_path, capsys):
    shutil.copytree(SHIPPED / "model", tmp_path / "model")
    for name in ("tokenizer", "clip"):
        (tmp_path / name).symlink_to(SHIPPED / name)
    path = tmp_path / "model" / "config.json"
    path.write_text(
        path.read_text().replace('"num_candidates": 16', '"num_candidates": "2"')
    )
    checkpoints.write_manifest(tmp_path / "model", {"kind": "generator"})
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    command = ["caption", f"--image={tmp_path / 'a.png'}", f"--workdir={tmp_path}"]
    assert cli.main([*command, "--num_retrieved=0"]) == 2
    assert (
        "says num_candidates='2', but CaptionDefaults wants" in capsys.readouterr().err
    )


def test_all_together_are_below_25_megabytes():
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*") if p.is_file()) <= 25e6


def test_every_model_opens_with_its_tokenizer():
    model = wiring.load_generator(SHIPPED, None)
    twin = wiring.load_generator(SHIPPED, None, model="twin")
    assert model.model.config == twin.model.config
    assert model.tokenizer.fingerprint() == twin.tokenizer.fingerprint()


@pytest.fixture(scope="module")
def roundtrip():
    """Unseen nations, and their reconstructions by the shipped VQGAN."""
    documents = list(read_flagworld(FlagworldConfig(num_nations=0), "heldout_memory"))
    images = np.stack([d.images[0] for d in documents[::10]])
    tokenizer = MixedTokenizer.load(SHIPPED / "tokenizer").image
    codes = tokenizer.encode(images)
    return documents[::10], images, codes, tokenizer.decode(codes)


def test_the_vqgan_keeps_24_decibels_with_most_of_its_codes(roundtrip):
    _, images, codes, decoded = roundtrip
    error = np.square(images.astype(np.float64) - decoded).mean((1, 2, 3))
    assert (10 * np.log10(255.0**2 / error)).mean() >= 24.0
    assert len(np.unique(codes)) >= 0.6 * 512


def test_flags_are_identified_after_the_round_trip(roundtrip):
    documents, _, _, decoded = roundtrip
    world = FlagworldConfig(num_nations=0)
    found = FlagIdentifier(make_nations(world, "heldout")).identify(list(decoded))
    right = [
        nation.name == document.metadata["nation"]
        for (nation, _), document in zip(found, documents, strict=True)
    ]
    assert len(right) >= 250 and np.mean(right) >= 0.98
