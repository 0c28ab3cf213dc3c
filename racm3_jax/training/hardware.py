"""What a training step costs, and what devices give: the arithmetic of MFU and plans."""

from __future__ import annotations

import dataclasses
from typing import Any

from racm3_jax.model.config import ModelConfig

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator, by its vendor's data sheet.

    Attributes:
      flops: dense bfloat16 products and sums a second.
      memory: bytes.
      utilisation: share of `flops` that a well-built step of billions of parameters
        reaches (PaLM's count); what a plan assumes before anything was measured.
    """

    flops: float
    memory: float
    utilisation: float = 0.4


DEVICES: dict[str, Device] = {
    "a100": Device(312e12, 80 * GB),
    "h100": Device(989e12, 80 * GB),
    "h200": Device(989e12, 141 * GB),
    "b200": Device(2250e12, 192 * GB),
    "v4": Device(275e12, 32 * GB, 0.5),
    "v5e": Device(197e12, 16 * GB, 0.5),
    "v5p": Device(459e12, 95 * GB, 0.5),
    "v6e": Device(918e12, 32 * GB, 0.45),
}
# What jax calls them -> the names above; the first that is part of the kind wins.
_KINDS = {
    "a100": "a100",
    "h100": "h100",
    "h200": "h200",
    "b200": "b200",
    "v4": "v4",
    "v5 lite": "v5e",
    "v5e": "v5e",
    "v5p": "v5p",
    "v5": "v5p",
    "v6": "v6e",
}


def find_device(kind: str) -> Device | None:
    """The entry for a `jax.Device.device_kind` ("NVIDIA H200"); None for others."""
    kind = kind.lower()
    name = next((name for part, name in _KINDS.items() if part in kind), None)
    return DEVICES[name] if name else None


def flops_per_token(config: ModelConfig, num_params: int, length: float) -> float:
    """Products and sums of a training step, a token of input (PaLM, appendix B).

    6 a parameter that multiplies (the embedding counts once, as the head), and
    12 x layers x heads x head_dim x length for full attention; a causal, packed row
    reads half of its example's length, as counted here. Recomputation does not count.

    Args:
      config: of the model.
      num_params: all of them.
      length: mean length of an example in a row.
    """
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    if config.position == "learned":
        looked_up += config.max_length * config.d_model
    width = config.num_heads * config.head_dim
    return 6.0 * (num_params - looked_up) + 6.0 * config.num_layers * width * length


def activation_bytes(config: ModelConfig, tokens: int) -> float:
    """Bytes that the forward pass keeps for the backward pass, a formula, not measured.

    A token and layer keep, without recomputation, the inputs of every product and of
    every norm and activation; with `remat="full"` the block's input alone, and one block
    at a time in full; with "dots" the products' outputs.
    """
    size = 2 if config.compute_dtype == "bfloat16" else 4
    width = config.num_heads * config.head_dim
    kv = config.kv_heads * config.head_dim
    matrices = 2 if config.activation == "swiglu" else 1
    dots = size * (width + 2 * kv + config.d_model * 2 + config.d_ff * matrices)
    rest = 4 * 3 * config.d_model + size * (width + config.d_ff + 2 * config.d_model)
    block_input = 4 * config.d_model
    per_layer = {
        "none": block_input + dots + rest,
        "dots": block_input + dots,
        "full": block_input,
    }[config.remat]
    total = tokens * config.num_layers * per_layer
    if config.remat != "none":
        total += tokens * (dots + rest)
    return total


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan_training` finds; bytes are for one device.

    Attributes:
      num_params: of the model.
      weights: float32 master weights.
      optimizer: Adam's two moments.
      gradients: float32, alive between the backward pass and the update.
      activations: of the rows that one device holds.
      logits: of one chunk of the loss.
      memory: of the device.
      largest_rows: rows a device that fit beside the weights.
      tokens_per_second: of all devices, padding counted.
      hours: for all steps.
    """

    num_params: int
    weights: float
    optimizer: float
    gradients: float
    activations: float
    logits: float
    memory: float
    largest_rows: int
    tokens_per_second: float
    hours: float

    @property
    def total(self) -> float:
        """Bytes of everything."""
        parts = (self.weights, self.optimizer, self.gradients)
        return sum(parts) + self.activations + self.logits


def plan_training(
    config: ModelConfig,
    num_params: int,
    device: Device,
    num_devices: int,
    *,
    rows: int,
    row_length: int,
    num_steps: int,
    shards: int,
    num_microbatches: int = 1,
    chunk_length: int = 64,
    example_length: float | None = None,
    first_moment_bytes: int = 4,
) -> Plan:
    """Memory, speed and hours of a training, before it is begun.

    Args:
      config: of the model.
      num_params: of the model.
      device: from `DEVICES`.
      num_devices: how many.
      rows: of a batch, over all devices.
      row_length: positions of a row.
      num_steps: of the training.
      shards: over how many devices each weight is split (fsdp x tensor).
      num_microbatches: see `make_train_step`.
      chunk_length: see `GeneratorLossConfig`.
      example_length: mean length of an example; a row's by default.
      first_moment_bytes: of one number of Adam's first moment.
    """
    moments = 4 + first_moment_bytes
    own = num_params / shards
    rows_at_once = rows / num_devices / num_microbatches

    def for_rows(count: float) -> tuple[float, float]:
        activations = activation_bytes(config, round(count * row_length))
        logits = 2 * 4 * count * min(chunk_length, row_length) * config.vocab_size
        return activations, logits

    activations, logits = for_rows(rows_at_once)
    free = 0.92 * device.memory - (8 + moments) * own  # a tenth or so is the runtime's
    per_row = sum(for_rows(1.0))
    flops = flops_per_token(config, num_params, example_length or row_length)
    tokens_per_second = num_devices * device.flops * device.utilisation / flops
    return Plan(
        num_params=num_params,
        weights=4 * own,
        optimizer=moments * own,
        gradients=4 * own,
        activations=activations,
        logits=logits,
        memory=device.memory,
        largest_rows=max(0, int(free // per_row)),
        tokens_per_second=tokens_per_second,
        hours=num_steps * rows * row_length / tokens_per_second / 3600,
    )


def suggest_changes(config: ModelConfig, plan: Plan, rows: int) -> list[str]:
    """Config changes that would mend a plan that does not fit, the mildest first."""
    changes = []
    if config.remat == "none":
        changes.append('config.model.remat="dots" (recomputes norms and activations)')
    if config.remat != "full":
        changes.append('config.model.remat="full" (a third more compute)')
    if plan.largest_rows:
        changes.append(
            f"config.train.num_microbatches so that a device holds "
            f"{plan.largest_rows} rows at a time (now a batch of {rows})"
        )
    else:
        changes.append("config.mesh.fsdp over more devices (weights do not fit)")
    return changes


def explain_out_of_memory(error: BaseException, config: Any) -> str:
    """What to change in a config after this error; "" if it is another error.

    Args:
      error: what a step or its compilation raised.
      config: the training's ConfigDict; only what it has is suggested.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Out of memory" not in text:
        return ""
    sections = config.to_dict()
    model, train = sections.get("model", {}), sections.get("train", {})
    changes = []
    if model.get("remat") == "none":
        changes.append('config.model.remat="dots"  (a few per cent more compute)')
    if model.get("remat", "full") != "full":
        changes.append('config.model.remat="full"  (a third more compute)')
    if model.get("compute_dtype") == "float32":
        changes.append('config.model.compute_dtype="bfloat16"')
    if "num_microbatches" in train:
        twice = 2 * train["num_microbatches"]
        changes.append(f"config.train.num_microbatches={twice}  (the same gradients)")
    if "fsdp" in sections.get("mesh", {}):
        changes.append("config.mesh.fsdp=-1 --config.mesh.data=1  (splits the weights)")
    if sections.get("optimizer", {}).get("first_moment_dtype") == "float32":
        changes.append('config.optimizer.first_moment_dtype="bfloat16"')
    for name in ("pipeline.rows", "batch_size"):
        *path, last = name.split(".")
        section = sections.get(path[0], {}) if path else sections
        if last in section:
            changes.append(f"config.{name} below {section[last]}")
    lines = "\n".join(f"  --{change}" for change in changes)
    return (
        "the device's memory is full; what would mend it, the mildest first (and "
        f"`racm3 estimate` says by how much):\n{lines}"
    )


def format_plan(plan: Plan, details: dict[str, Any]) -> str:
    """The plan as aligned lines."""
    lines = {
        "parameters": f"{plan.num_params / 1e6:,.1f} M",
        "weights (f32)": _bytes(plan.weights),
        "Adam moments": _bytes(plan.optimizer),
        "gradients": _bytes(plan.gradients),
        "activations": _bytes(plan.activations),
        "logits of a chunk": _bytes(plan.logits),
        "together, a device": f"{_bytes(plan.total)} of {_bytes(plan.memory)}",
        "largest rows a device": str(plan.largest_rows),
        "tokens/s, expected": f"{plan.tokens_per_second:,.0f}",
        "hours, expected": f"{plan.hours:,.1f}",
        **details,
    }
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines.items())


def _bytes(number: float) -> str:
    return f"{number / GB:,.2f} GB" if number >= GB / 10 else f"{number / 1e6:,.1f} MB"
