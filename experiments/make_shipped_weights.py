"""Trains the shipped weights from scratch, and packs them.

    python experiments/make_shipped_weights.py --out=out
    python experiments/make_shipped_weights.py --out=out --stages=racm3,cm3,generators

Runs these commands in order; interrupted ones resume:

    racm3 train --config=configs/flagworld_vqgan.py --workdir=out/vqgan
    racm3 train --config=configs/flagworld_clip.py --workdir=out/clip
    racm3 train --config=configs/flagworld.py --workdir=out/racm3
    racm3 train --config=configs/flagworld.py:twin --workdir=out/cm3

After the second, the stage `parts` copies tokenizers and CLIP to
racm3_jax/shipped/flagworld, for the other two; the stage `generators` adds RA-CM3 and
the baseline without retrieval. Both write `manifest.json`: sha256, commands, hours. The
stage `seal` saves the shipped weights again, for a new format of the folders.

    python experiments/make_shipped_weights.py --out=out --recipe=reading

uses the curriculum of configs/flagworld_reading.py and the CLIP that aligns texts with
images, in five stages `alike`, `names`, `first`, `second` and `racm3`, each initialised
from the previous one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
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


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the weights are trained.

    Attributes:
      configs: of each trained model, in order.
      starts: initial weights of a model, if not from scratch.
      defaults: by task, the settings that were measured best (experiments/results).
    """

    configs: dict[str, str]
    starts: dict[str, str] = dataclasses.field(default_factory=dict)
    defaults: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def stages(self) -> list[str]:
        """The trainings, with `parts` after the CLIP and `generators` at the end."""
        names = list(self.configs)
        after = names.index("clip") + 1
        return [*names[:after], "parts", *names[after:], "generators"]

    def command(
        self, name: str, configs: str = "configs", out: str = "out"
    ) -> list[str]:
        """The arguments of `racm3` that train one model."""
        words = ["train", f"--config={configs}/{self.configs[name]}"]
        words.append(f"--workdir={out}/{name}")
        if name in self.starts:
            words.append(f"--config.init_from={out}/{self.starts[name]}/model")
        return words


RECIPES = {
    "copying": Recipe(
        {
            "vqgan": "flagworld_vqgan.py",
            "clip": "flagworld_clip.py",
            "racm3": "flagworld.py",
            "cm3": "flagworld.py:twin",
        },
        defaults={
            "caption": {
                "num_candidates": 16,
                "temperature": 0.0,
                "guidance": 2.0,
                "guide_documents": True,
            }
        },
    ),
    "reading": Recipe(
        {
            "vqgan": "flagworld_vqgan.py",
            "clip": "flagworld_clip.py:aligned",
            "alike": "flagworld_reading.py:alike",
            "names": "flagworld_reading.py:names",
            "first": "flagworld_reading.py:first",
            "larger": "flagworld_reading.py:larger",
            "full": "flagworld_reading.py:full",
            "second": "flagworld_reading.py:second",
            "waves": "flagworld_reading.py:waves",
            "racm3": "flagworld_reading.py:third",
            "cm3": "flagworld_reading.py:twin",
        },
        {
            "names": "alike",
            "first": "names",
            "larger": "first",
            "full": "larger",
            "second": "full",
            "waves": "second",
            "racm3": "waves",
        },
    ),
}


def run_stage(recipe: Recipe, name: str, out: Path) -> None:
    """Trains one model; records its hours next to it."""
    started = time.time()
    status = cli.main(recipe.command(name, str(ROOT / "configs"), str(out)))
    if status:
        raise SystemExit(status)
    record = out / name / "hours.json"
    before = json.loads(record.read_text())["hours"] if record.exists() else 0.0
    hours = before + (time.time() - started) / 3600
    record.write_text(json.dumps({"hours": round(hours, 3)}))


def pack_parts(recipe: Recipe, out: Path) -> None:
    """Writes both tokenizers and CLIP in half precision."""
    image = ImageTokenizer.load(out / "vqgan" / "vqgan")
    text = TextTokenizer.load(out / "clip" / "text" / "tokenizer.json")
    config = load_config_file(str(ROOT / "configs" / recipe.configs["racm3"]))
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
    write_manifest(recipe, out, ("vqgan", "clip"))


def pack_generators(recipe: Recipe, out: Path) -> None:
    """Writes RA-CM3 and the baseline in half precision, and their loss curves."""
    for stage, name in (("racm3", "model"), ("cm3", "twin")):
        copy_generator(recipe, out / stage / "model", SHIPPED / name)
    plot_curves(
        {"RA-CM3": out / "racm3", "twin without retrieval": out / "cm3"},
        SHIPPED / "loss.png",
        names=("image_loss", "text_loss"),
    )
    wiring.load_generator(SHIPPED, None)  # checks that it loads
    trained = [name for name in recipe.configs if name not in ("vqgan", "clip")]
    write_manifest(recipe, out, trained)


def copy_generator(recipe: Recipe, source: Path, target: Path) -> None:
    """Saves weights in half precision; those that already are do not change."""
    params, config, extra = checkpoints.load_weights(source, "generator")
    checkpoints.save_weights(
        target,
        params,
        kind="generator",
        config=config,
        extra=extra | {"defaults": recipe.defaults},
        dtype="float16",
    )


def seal(recipe: Recipe) -> None:
    """Saves every shipped folder again in the current format; tensors do not change."""
    MixedTokenizer.load(SHIPPED / "tokenizer").save(
        SHIPPED / "tokenizer", dtype="float16"
    )
    DocumentEmbedder.load(SHIPPED / "clip").save(SHIPPED / "clip", dtype="float16")
    for name in ("model", "twin"):
        copy_generator(recipe, SHIPPED / name, SHIPPED / name)
        wiring.load_generator(SHIPPED, None, model=name)
    write_manifest(recipe, Path(), ())


def write_manifest(recipe: Recipe, out: Path, stages: Sequence[str]) -> None:
    """Describes each file, and the hours of the stages; keeps those of other stages."""
    path = SHIPPED / "manifest.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    hours = {k: v for k, v in before.get("hours", {}).items() if k in recipe.configs}
    for name in stages:
        hours[name] = json.loads((out / name / "hours.json").read_text())["hours"]
    commands = {
        name: " ".join(["racm3", *recipe.command(name)]) for name in recipe.configs
    }
    checkpoints.write_manifest(
        SHIPPED, {"kind": "shipped", "commands": commands, "hours": hours}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--recipe", choices=RECIPES, default="copying")
    parser.add_argument("--stages", default="", help="all of the recipe unless given")
    arguments = parser.parse_args()
    out, recipe = arguments.out.resolve(), RECIPES[arguments.recipe]
    stages = arguments.stages.split(",") if arguments.stages else recipe.stages
    for stage in stages:
        if stage not in (*recipe.stages, "seal"):
            known = ", ".join((*recipe.stages, "seal"))
            parser.error(f"stage {stage!r}: choose from {known}")
    for stage in stages:
        if stage == "parts":
            pack_parts(recipe, out)
        elif stage == "generators":
            pack_generators(recipe, out)
        elif stage == "seal":
            seal(recipe)
        else:
            run_stage(recipe, stage, out)


if __name__ == "__main__":
    main()
