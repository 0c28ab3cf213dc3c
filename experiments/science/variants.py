"""Small models trained from scratch, one per variant and seed; equal ones are shared.

Each is `racm3_jax.train(config, folder)` with configs/flagworld.py and the variant's
changes. The folder's name is a hash of the config, so that experiments share trained
models, and interrupted trainings resume.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import racm3_jax
from racm3_jax import wiring
from racm3_jax.commands.configs import find_config, load_config_file
from racm3_jax.flagworld import FlagworldConfig, read_flagworld
from racm3_jax.generation.tasks import Generator
from racm3_jax.metrics import read_jsonl
from racm3_jax.model.transformer import abstract_params, count_params
from racm3_jax.training.hardware import flops_per_token
from science.cells import cpu_seconds, write_json
from science.experiment import Place
from science.worlds import EASY, open_memory

# The model of experiments 3 to 8, unless one says otherwise: width, layers, steps. With
# half as many steps, whether a model has begun to copy depends on the seed (LOG.md).
D_MODEL, NUM_LAYERS = 128, 4
NUM_STEPS = 6000
# Many small steps: with half as many steps of twice the batch, and a learning rate of
# 2e-3, the same examples teach half as much copying (flags 26 of 100 vs. 48).
LEARNING_RATE = 4e-3
EXAMPLES, ROWS, ROW_LENGTH = 6, 4, 272
# Rows without documents are half as full: a plain model takes half the positions.
PLAIN_ROWS = 2
ROTATION = 0.25
# A weight of 2 for caption tokens loses half of the flags, and gains no names (LOG.md).
TEXT_WEIGHT = 1.0
SETTINGS = {
    "d_model": D_MODEL,
    "num_layers": NUM_LAYERS,
    "num_steps": NUM_STEPS,
    "learning_rate": LEARNING_RATE,
    "examples": EXAMPLES,
    "rows": ROWS,
    "row_length": ROW_LENGTH,
    "text_weight": TEXT_WEIGHT,
    "rotation_probability": ROTATION,
    "world": EASY,
}


def make_config(
    seed: int,
    place: Place,
    *,
    retrieval: bool = True,
    num_steps: int = NUM_STEPS,
    d_model: int = D_MODEL,
    num_layers: int = NUM_LAYERS,
    init_from: str = "",
    changes: Mapping[str, Any] | None = None,
    world_changes: Mapping[str, Any] | None = None,
    num_query_variants: int = 2,
) -> Any:
    """The config of a variant; its memory is built first.

    Args:
      seed: of initialisation, order, masks and queries.
      place: has the memory.
      retrieval: False trains the plain model.
      num_steps: of this training.
      d_model: width of the model.
      num_layers: of the model.
      init_from: folder of weights to start from.
      changes: more settings by dotted name.
      world_changes: of the training world.
      num_query_variants: queries with dropout; 0 uses full queries.
    """
    config = load_config_file(
        find_config("flagworld.py") + ("" if retrieval else ":twin")
    )
    d_model = min(d_model, place.scale.d_model)
    config.seed = seed
    config.init_from = init_from
    config.world.num_nations = place.scale.num_trained
    # Held-out nations of the training world are not used: each seed has its own.
    config.world.num_heldout = 0
    for name, value in (EASY | dict(world_changes or {})).items():
        config.world[name] = value
    config.memory.num_query_variants = num_query_variants
    config.memory.index = "exact"
    config.masking = ConfigDict(
        {
            "num_masks": "poisson_clamp0",
            "mean": 0.2,
            "rotation_probability": ROTATION,
            "text_weight": TEXT_WEIGHT,
        }
    )
    config.episodes = ConfigDict({"probability": 0.0})
    config.pipeline.rows = ROWS if retrieval else PLAIN_ROWS
    config.pipeline.row_length = ROW_LENGTH
    config.pipeline.examples_per_batch = EXAMPLES
    config.model.update(
        max_length=384,
        d_model=d_model,
        num_layers=min(num_layers, place.scale.num_layers),
        num_heads=4,
        head_dim=d_model // 4,
        d_ff=4 * d_model,
    )
    config.optimizer.learning_rate = LEARNING_RATE
    config.train.num_steps = min(num_steps, place.scale.max_steps)
    config.optimizer.warmup_steps = min(100, config.train.num_steps // 2)
    config.train.checkpoint_every = 500
    config.train.log_every = min(20, config.train.num_steps)
    for name, value in (changes or {}).items():
        *sections, key = name.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[key] = value
    memory = open_memory(
        list(read_flagworld(FlagworldConfig(**config.world), "train")),
        place,
        num_query_variants=num_query_variants,
        query_drop=config.memory.query_drop,
    )
    memory.close()
    config.memory_path = str(memory.path)
    return config


def train(config: Any, place: Place) -> Path:
    """Trains a variant, if not done yet; writes its cost to `cost.json`."""
    names = copy.deepcopy(config)
    names.memory_path = Path(config.memory_path).name
    names.init_from = Path(config.init_from).parent.name
    text = names.to_json(sort_keys=True)
    folder = place.work / "models" / hashlib.sha256(text.encode()).hexdigest()[:16]
    if (folder / "model").is_dir():
        return folder
    started, before = time.monotonic(), cpu_seconds()
    state = racm3_jax.train(config, folder, progress=False)
    cost = read_cost(folder)
    write_json(
        folder / "cost.json",
        {
            "wall_seconds": cost["wall_seconds"] + time.monotonic() - started,
            "cpu_seconds": cost["cpu_seconds"] + cpu_seconds() - before,
        },
    )
    if int(state.step) < config.train.num_steps:
        raise KeyboardInterrupt(f"the training in {folder} was interrupted")
    return folder


def read_cost(folder: Path) -> dict[str, float]:
    """Seconds of a training, without interruptions."""
    path = folder / "cost.json"
    if not path.exists():
        return {"wall_seconds": 0.0, "cpu_seconds": 0.0}
    return json.loads(path.read_text())


def open_variant(folder: Path) -> Generator:
    """The trained model, without a memory."""
    return wiring.load_generator(folder, None)


def train_model(seed: int, place: Place, **how: Any) -> Generator:
    """Trains a variant (see `make_config`) and opens it."""
    return open_variant(train(make_config(seed, place, **how), place))


def count_flops(config: Any, generator: Generator) -> float:
    """FLOPs of a whole training: all positions of all rows."""
    model = generator.model.config
    pipeline = config.pipeline
    a_token = flops_per_token(
        model, count_params(abstract_params(model)), pipeline.row_length
    )
    return a_token * pipeline.rows * pipeline.row_length * config.train.num_steps


def read_curve(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric of the training."""
    lines = [x for x in read_jsonl(folder) if x.get(name) is not None]
    return [x["step"] for x in lines], [x[name] for x in lines]
