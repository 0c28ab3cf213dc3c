"""The shipped weights are what their manifest says, small, and open."""

import hashlib
import json

from racm3_jax import build

SHIPPED = build.resolve("shipped:flagworld")


def test_files_match_the_manifest():
    manifest = json.loads((SHIPPED / "manifest.json").read_text())
    found = {
        str(p.relative_to(SHIPPED)): p
        for p in SHIPPED.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }
    assert set(found) == set(manifest["files"])
    for name, path in found.items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest == manifest["files"][name]["sha256"], name
    assert all(
        command.startswith("racm3 ") for command in manifest["commands"].values()
    )


def test_all_together_are_below_25_megabytes():
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*") if p.is_file()) <= 25e6


def test_every_model_opens_with_its_tokenizer():
    model = build.load_generator(SHIPPED, None)
    twin = build.load_generator(SHIPPED, None, model="twin")
    assert model.model.config == twin.model.config
    assert model.tokenizer.fingerprint() == twin.tokenizer.fingerprint()
