"""Trains the shipped weights from scratch, and packs them.

    python experiments/make_shipped_weights.py --out=out
    python experiments/make_shipped_weights.py --out=out --stages=racm3,cm3,generators

Runs these commands in order; interrupted ones resume:

    racm3 train --config=configs/flagworld_vqgan.py --workdir=out/vqgan
    racm3 train --config=configs/flagworld_clip.py --workdir=out/clip
    racm3 train --config=configs/flagworld_reading.py:alike --workdir=out/alike
    racm3 train --config=configs/flagworld_reading.py:names --workdir=out/names \
        --config.init_from=out/alike/model
    ...
    racm3 train --config=configs/flagworld_reading.py:fifth --workdir=out/racm3 \
        --config.init_from=out/fourth/model
    racm3 train --config=configs/flagworld_reading.py:twin --workdir=out/cm3

After the second, the stage `parts` copies tokenizers and CLIP to
racm3_jax/shipped/flagworld, for the others; the stage `generators` adds RA-CM3 and
the baseline without retrieval. Both write `manifest.json`: sha256, commands, hours. The
stage `seal` saves the shipped weights again, for a new format of the folders.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from racm3_jax import checkpoints, cli, wiring
from racm3_jax.commands.configs import load_config_file
from racm3_jax.metrics import plot_curves
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.tokenizers.image import ImageTokenizer
from racm3_jax.tokenizers.mixed import MixedTokenizer

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "racm3_jax" / "shipped" / "flagworld"


# The configs of the trained models, in order.
CONFIGS = {
    "vqgan": "flagworld_vqgan.py",
    "clip": "flagworld_clip.py",
    "alike": "flagworld_reading.py:alike",
    "names": "flagworld_reading.py:names",
    "first": "flagworld_reading.py:first",
    "larger": "flagworld_reading.py:larger",
    "full": "flagworld_reading.py:full",
    "second": "flagworld_reading.py:second",
    "waves": "flagworld_reading.py:waves",
    "third": "flagworld_reading.py:third",
    "fourth": "flagworld_reading.py:fourth",
    "racm3": "flagworld_reading.py:fifth",
    "cm3": "flagworld_reading.py:twin",
}
# The stage whose weights a model starts from, if any.
STARTS = {
    "names": "alike",
    "first": "names",
    "larger": "first",
    "full": "larger",
    "second": "full",
    "waves": "second",
    "third": "waves",
    "fourth": "third",
    "racm3": "fourth",
}
# By task, the settings that were measured best (experiments/LOG.md).
DEFAULTS: dict[str, dict[str, Any]] = {
    "image": {
        "temperature": 0.7,
        "top_p": 1.0,
        "region_prompt": "in_place",
        "rank_by": "likelihood",
    },
    "caption": {"num_candidates": 16, "temperature": 0.0, "image_first": True},
}


def list_stages() -> list[str]:
    """The trainings, with `parts` after the CLIP and `generators` at the end."""
    names = list(CONFIGS)
    after = names.index("clip") + 1
    return [*names[:after], "parts", *names[after:], "generators"]


def make_command(name: str, configs: str = "configs", out: str = "out") -> list[str]:
    """The arguments of `racm3` that train one model."""
    words = ["train", f"--config={configs}/{CONFIGS[name]}", f"--workdir={out}/{name}"]
    if name in STARTS:
        words.append(f"--config.init_from={out}/{STARTS[name]}/model")
    return words


def run_stage(name: str, out: Path) -> None:
    """Trains one model; records its hours next to it."""
    started = time.time()
    status = cli.main(make_command(name, str(ROOT / "configs"), str(out)))
    if status:
        raise SystemExit(status)
    record = out / name / "hours.json"
    before = json.loads(record.read_text())["hours"] if record.exists() else 0.0
    hours = before + (time.time() - started) / 3600
    record.write_text(json.dumps({"hours": round(hours, 3)}))


def pack_parts(out: Path) -> None:
    """Writes both tokenizers and CLIP in half precision."""
    image = ImageTokenizer.load(out / "vqgan" / "vqgan")
    embedder = DocumentEmbedder.load(out / "clip" / "clip")
    config = load_config_file(str(ROOT / "configs" / CONFIGS["racm3"]))
    MixedTokenizer(
        embedder.text_tokenizer,
        ImageTokenizer(image.config, checkpoints.round_to_half(image.params)),
        config.tokenizer.num_sentinels,
    ).save(SHIPPED / "tokenizer", dtype="float16")
    DocumentEmbedder(
        embedder.config,
        checkpoints.round_to_half(embedder.params),
        embedder.text_tokenizer,
        alignment=embedder.alignment,
    ).save(SHIPPED / "clip", dtype="float16")
    write_manifest(out, ("vqgan", "clip"))


def pack_generators(out: Path) -> None:
    """Writes RA-CM3 and the baseline in half precision, and their loss curves."""
    for stage, name in (("racm3", "model"), ("cm3", "twin")):
        copy_generator(out / stage / "model", SHIPPED / name)
    plot_curves(
        {"RA-CM3, last stage": out / "racm3", "twin without retrieval": out / "cm3"},
        SHIPPED / "loss.png",
        names=("image_loss", "text_loss"),
    )
    wiring.load_generator(SHIPPED, None)  # checks that it loads
    trained = [name for name in CONFIGS if name not in ("vqgan", "clip")]
    write_manifest(out, trained)


def copy_generator(source: Path, target: Path) -> None:
    """Saves weights in half precision; those that already are do not change."""
    params, config, extra = checkpoints.load_weights(source, "generator")
    checkpoints.save_weights(
        target,
        params,
        kind="generator",
        config=config,
        extra=extra | {"defaults": DEFAULTS},
        dtype="float16",
    )


def seal() -> None:
    """Saves every shipped folder again in the current format; tensors do not change."""
    MixedTokenizer.load(SHIPPED / "tokenizer").save(
        SHIPPED / "tokenizer", dtype="float16"
    )
    DocumentEmbedder.load(SHIPPED / "clip").save(SHIPPED / "clip", dtype="float16")
    for name in ("model", "twin"):
        copy_generator(SHIPPED / name, SHIPPED / name)
        wiring.load_generator(SHIPPED, None, model=name)
    write_manifest(Path(), ())


def write_manifest(out: Path, stages: Sequence[str]) -> None:
    """Describes each file, and the hours of the stages; keeps those of other stages."""
    path = SHIPPED / "manifest.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    hours = {k: v for k, v in before.get("hours", {}).items() if k in CONFIGS}
    for name in stages:
        hours[name] = json.loads((out / name / "hours.json").read_text())["hours"]
    commands = {name: " ".join(["racm3", *make_command(name)]) for name in CONFIGS}
    checkpoints.write_manifest(
        SHIPPED, {"kind": "shipped", "commands": commands, "hours": hours}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--stages", default="", help="all unless given")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    stages = arguments.stages.split(",") if arguments.stages else list_stages()
    for stage in stages:
        if stage not in (*list_stages(), "seal"):
            known = ", ".join((*list_stages(), "seal"))
            parser.error(f"stage {stage!r}: choose from {known}")
    for stage in stages:
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
