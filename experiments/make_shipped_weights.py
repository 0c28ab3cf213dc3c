"""Trains the weights that the package ships, from nothing, and packs them.

    python experiments/make_shipped_weights.py --out=out

Runs these commands, in order (each resumes when it was interrupted), averages the
generators of the first and of the second training, and copies all into
racm3_jax/shipped/flagworld, with a manifest of sha256 sums, commands and hours:

    racm3 train --config=configs/flagworld_vqgan.py --workdir=out/vqgan
    racm3 train --config=configs/flagworld_clip.py --workdir=out/clip
    racm3 train --config=configs/flagworld.py --workdir=out/racm3 ...
    racm3 train --config=configs/flagworld.py:twin --workdir=out/cm3 ...
    racm3 train --config=configs/flagworld_tasks.py --workdir=out/racm3_tasks ...
    racm3 train --config=configs/flagworld_tasks.py:twin --workdir=out/cm3_tasks ...
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from racm3_jax import checkpoints, cli
from racm3_jax.metrics import plot_curves
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.tokenizers.image import ImageTokenizer
from racm3_jax.tokenizers.mixed import MixedTokenizer

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "racm3_jax" / "shipped" / "flagworld"


def commands(out: Path) -> dict[str, list[str]]:
    """The arguments of `racm3`, by the name of the stage."""
    configs = ROOT / "configs"
    parts = [
        f"--config.tokenizer.text={out}/clip/text",
        f"--config.tokenizer.image={out}/vqgan/vqgan",
        f"--config.embedder={out}/clip/clip",
    ]
    return {
        "vqgan": [f"--config={configs}/flagworld_vqgan.py"],
        "clip": [f"--config={configs}/flagworld_clip.py"],
        "racm3": [f"--config={configs}/flagworld.py", *parts],
        "cm3": [f"--config={configs}/flagworld.py:twin", *parts],
        "racm3_tasks": [
            f"--config={configs}/flagworld_tasks.py",
            *parts,
            f"--config.init_from={out}/racm3/model",
        ],
        "cm3_tasks": [
            f"--config={configs}/flagworld_tasks.py:twin",
            *parts,
            f"--config.init_from={out}/cm3/model",
        ],
    }


def run_stage(name: str, arguments: list[str], out: Path) -> None:
    """Trains one model; the hours it took are kept beside it."""
    started = time.time()
    status = cli.main(["train", f"--workdir={out / name}", *arguments])
    if status:
        raise SystemExit(status)
    record = out / name / "hours.json"
    before = json.loads(record.read_text())["hours"] if record.exists() else 0.0
    hours = before + (time.time() - started) / 3600
    record.write_text(json.dumps({"hours": round(hours, 3)}))


def pack(out: Path) -> None:
    """Writes the exported models in half precision."""
    aside = SHIPPED.with_name("flagworld.new")
    shutil.rmtree(aside, ignore_errors=True)
    tokenizer = MixedTokenizer.load(out / "racm3_tasks" / "tokenizer")
    image = ImageTokenizer(
        tokenizer.image.config, checkpoints.round_to_half(tokenizer.image.params)
    )
    MixedTokenizer(tokenizer.text, image, tokenizer.vocab.num_sentinels).save(
        aside / "tokenizer", dtype="float16"
    )
    embedder = DocumentEmbedder.load(out / "racm3_tasks" / "clip")
    DocumentEmbedder(
        embedder.config,
        checkpoints.round_to_half(embedder.params),
        embedder.text_tokenizer,
    ).save(aside / "clip", dtype="float16")
    for stage, name in (("racm3", "model"), ("cm3", "twin")):
        params, config, extra = average_models(
            out / stage / "model", out / f"{stage}_tasks" / "model"
        )
        checkpoints.save_weights(
            aside / name,
            params,
            kind="generator",
            config=config,
            extra=extra,
            dtype="float16",
        )
    plot_losses(out, aside)
    shutil.rmtree(SHIPPED, ignore_errors=True)
    aside.rename(SHIPPED)
    write_manifest(out)


def average_models(first: Path, second: Path) -> tuple[Any, Any, Any]:
    """The mean of the weights after the first and after the second training.

    The second starts where the first ends, so that both lie in one basin; the mean names
    and draws more held-out nations than either (see README.md, Results).
    """
    before, _, _ = checkpoints.load_weights(first, "generator")
    after, config, extra = checkpoints.load_weights(second, "generator")
    mean = jax.tree.map(
        lambda a, b: (np.asarray(a, np.float32) + np.asarray(b, np.float32)) / 2,
        before,
        after,
    )
    return mean, config, extra


def plot_losses(out: Path, directory: Path) -> None:
    """`loss.png` of the first training, `loss_tasks.png` of the second."""
    for end in ("", "_tasks"):
        plot_curves(
            {
                "RA-CM3": out / f"racm3{end}",
                "twin without retrieval": out / f"cm3{end}",
            },
            directory / f"loss{end}.png",
            names=("image_loss", "text_loss"),
        )


def write_manifest(out: Path) -> None:
    """`manifest.json`: what each file is, and the commands that made them all."""
    files = sorted(p for p in SHIPPED.rglob("*") if p.is_file())
    manifest = {
        "commands": {
            name: " ".join(["racm3", "train", f"--workdir=out/{name}", *arguments])
            for name, arguments in commands(Path("out")).items()
        },
        "hours": {
            name: json.loads((out / name / "hours.json").read_text())["hours"]
            for name in commands(out)
        },
        "files": {
            str(p.relative_to(SHIPPED)): {
                "bytes": p.stat().st_size,
                "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
            }
            for p in files
            if p.name != "manifest.json"
        },
    }
    text = json.dumps(manifest, indent=2, sort_keys=True).replace(f"{ROOT}/", "")
    (SHIPPED / "manifest.json").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument(
        "--stages", default="vqgan,clip,racm3,cm3,racm3_tasks,cm3_tasks,pack"
    )
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    for stage in arguments.stages.split(","):
        if stage == "pack":
            pack(out)
        else:
            run_stage(stage, commands(out)[stage], out)


if __name__ == "__main__":
    main()
