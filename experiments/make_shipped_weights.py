"""Trains the weights that the package ships, from nothing, and packs them.

    python experiments/make_shipped_weights.py --out=out
    python experiments/make_shipped_weights.py --out=out --stages=racm3,cm3,generators

Runs these commands, in order; each resumes when it was interrupted:

    racm3 train --config=configs/flagworld_vqgan.py --workdir=out/vqgan
    racm3 train --config=configs/flagworld_clip.py --workdir=out/clip
    racm3 train --config=configs/flagworld.py --workdir=out/racm3
    racm3 train --config=configs/flagworld.py:twin --workdir=out/cm3

After the second, the stage `parts` puts tokenizers and CLIP into
racm3_jax/shipped/flagworld, where the other two find them; the stage `generators` puts RA-CM3
and its twin beside them. Both write `manifest.json`: sha256 sums, commands, hours. The
stage `seal` opens what is shipped and saves it again, for a new format of the folders.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from racm3_jax import checkpoints, cli, wiring
from racm3_jax.commands.configs import load_config_file
from racm3_jax.metrics import plot_curves
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.tokenizers.bpe import TextTokenizer
from racm3_jax.tokenizers.image import ImageTokenizer
from racm3_jax.tokenizers.mixed import MixedTokenizer

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "racm3_jax" / "shipped" / "flagworld"
CONFIGS = {
    "vqgan": "flagworld_vqgan.py",
    "clip": "flagworld_clip.py",
    "racm3": "flagworld.py",
    "cm3": "flagworld.py:twin",
}
STAGES = ("vqgan", "clip", "parts", "racm3", "cm3", "generators")


def run_stage(name: str, out: Path) -> None:
    """Trains one model; the hours it took are kept beside it."""
    started = time.time()
    config = f"--config={ROOT / 'configs' / CONFIGS[name]}"
    status = cli.main(["train", config, f"--workdir={out / name}"])
    if status:
        raise SystemExit(status)
    record = out / name / "hours.json"
    before = json.loads(record.read_text())["hours"] if record.exists() else 0.0
    hours = before + (time.time() - started) / 3600
    record.write_text(json.dumps({"hours": round(hours, 3)}))


def pack_parts(out: Path) -> None:
    """Writes both tokenizers and CLIP in half precision."""
    image = ImageTokenizer.load(out / "vqgan" / "vqgan")
    text = TextTokenizer.load(out / "clip" / "text" / "tokenizer.json")
    config = load_config_file(str(ROOT / "configs" / CONFIGS["racm3"]))
    MixedTokenizer(
        text,
        ImageTokenizer(image.config, checkpoints.round_to_half(image.params)),
        config.tokenizer.num_sentinels,
    ).save(SHIPPED / "tokenizer", dtype="float16")
    embedder = DocumentEmbedder.load(out / "clip" / "clip")
    DocumentEmbedder(
        embedder.config,
        checkpoints.round_to_half(embedder.params),
        embedder.text_tokenizer,
        alignment=embedder.alignment,
    ).save(SHIPPED / "clip", dtype="float16")
    write_manifest(out, ("vqgan", "clip"))


def pack_generators(out: Path) -> None:
    """Writes RA-CM3 and its twin in half precision, and how their losses fell."""
    for stage, name in (("racm3", "model"), ("cm3", "twin")):
        copy_generator(out / stage / "model", SHIPPED / name)
    plot_curves(
        {"RA-CM3": out / "racm3", "twin without retrieval": out / "cm3"},
        SHIPPED / "loss.png",
        names=("image_loss", "text_loss"),
    )
    wiring.load_generator(SHIPPED, None)  # what is shipped opens
    write_manifest(out, ("racm3", "cm3"))


def copy_generator(source: Path, target: Path) -> None:
    """Saves weights in half precision; of those that are, no tensor changes."""
    params, config, extra = checkpoints.load_weights(source, "generator")
    checkpoints.save_weights(
        target,
        params,
        kind="generator",
        config=config,
        extra=extra,
        dtype="float16",
    )


def seal() -> None:
    """Saves every shipped folder again, in the present format; no tensor changes."""
    MixedTokenizer.load(SHIPPED / "tokenizer").save(
        SHIPPED / "tokenizer", dtype="float16"
    )
    DocumentEmbedder.load(SHIPPED / "clip").save(SHIPPED / "clip", dtype="float16")
    for name in ("model", "twin"):
        copy_generator(SHIPPED / name, SHIPPED / name)
        wiring.load_generator(SHIPPED, None, model=name)
    write_manifest(Path(), ())


def write_manifest(out: Path, stages: tuple[str, ...]) -> None:
    """What each file is, and how long the stages took; other stages' hours stay."""
    path = SHIPPED / "manifest.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    hours = {k: v for k, v in before.get("hours", {}).items() if k in CONFIGS}
    for name in stages:
        hours[name] = json.loads((out / name / "hours.json").read_text())["hours"]
    commands = {
        name: f"racm3 train --config=configs/{config} --workdir=out/{name}"
        for name, config in CONFIGS.items()
    }
    checkpoints.write_manifest(
        SHIPPED, {"kind": "shipped", "commands": commands, "hours": hours}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--stages", default=",".join(STAGES))
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    for stage in arguments.stages.split(","):
        if stage == "parts":
            pack_parts(out)
        elif stage == "generators":
            pack_generators(out)
        elif stage == "seal":
            seal()
        else:
            run_stage(stage, out)


if __name__ == "__main__":
    main()
