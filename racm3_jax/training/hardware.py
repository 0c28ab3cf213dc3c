"""Cost of a training step and speed of devices: arithmetic for MFU and estimates."""

from __future__ import annotations

import dataclasses
from typing import Any

from racm3_jax.model.config import ModelConfig

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One JAX device, with figures from the vendor's data sheet.

    Attributes:
      flops: peak dense bfloat16 FLOP/s.
      memory: bytes.
      utilisation: MFU that a good step with billions of parameters reaches (PaLM's
        definition); estimates assume it until something was measured.
      usable: bytes available to a program, according to its compiler; None means
        unknown: 92% of `memory` is assumed.
    """

    flops: float
    memory: float
    utilisation: float = 0.4
    usable: float | None = None

    @property
    def platform(self) -> str:
        """JAX's name of the platform: "tpu" or "gpu"."""
        return "tpu" if self in _TPUS else "gpu"

    @property
    def capacity(self) -> float:
        """Bytes available to a program; the runtime reserves the rest."""
        return 0.92 * self.memory if self.usable is None else self.usable


DEVICES: dict[str, Device] = {
    "t4": Device(65e12, 16 * GB, 0.3),  # float16; no bfloat16
    "l4": Device(121e12, 24 * GB),
    "a10": Device(125e12, 24 * GB),
    "a10g": Device(70e12, 24 * GB),
    "a100-40gb": Device(312e12, 40 * GB),
    "a100": Device(312e12, 80 * GB),
    "h100-pcie": Device(756e12, 80 * GB),
    "h100": Device(989e12, 80 * GB),
    "h200": Device(989e12, 141 * GB),
    "b200": Device(2250e12, 180 * GB),
    "gb200": Device(2500e12, 186 * GB),
    "b300": Device(2250e12, 270 * GB),
    "gb300": Device(2500e12, 279 * GB),
    "mi300x": Device(1307e12, 192 * GB),
    "v4": Device(275e12, 32 * GIB, 0.5),
    "v5e": Device(197e12, 16 * GIB, 0.5, 15.75 * GIB),
    "v5p": Device(459e12, 96 * GIB, 0.5, 95.74 * GIB),
    "v6e": Device(918e12, 32 * GIB, 0.45, 31.25 * GIB),
    # JAX shows each half of a chip (Ironwood) as a device.
    "tpu7x": Device(1153.5e12, 96 * GIB, 0.45),
}
_TPUS = [DEVICES[name] for name in ("v4", "v5e", "v5p", "v6e", "tpu7x")]
# Substrings of JAX's device kind -> the names above; the first match wins.
_KINDS: dict[str, str | None] = {
    "a100-sxm4-40gb": "a100-40gb",
    "a100-pcie-40gb": "a100-40gb",
    "a100": "a100",
    "a10g": "a10g",
    "nvidia a10": "a10",
    "h100 pcie": "h100-pcie",
    "h100": "h100",
    "h200": "h200",
    "gb300": "gb300",
    "gb200": "gb200",
    "b300": "b300",
    "b200": "b200",
    "nvidia l40": None,  # not in the table; a prefix of the next one
    "nvidia l4": "l4",
    "tesla t4": "t4",
    "mi300x": "mi300x",
    "tpu7x": "tpu7x",
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
    """FLOPs of a training step per input token (PaLM, appendix B).

    6 per parameter that multiplies (the embedding counts once, as the head), plus
    12 x layers x heads x head_dim x length for full attention; in a causal, packed row
    each token attends to half of its example, as counted here. Recomputation does not
    count.

    Args:
      config: of the model.
      num_params: of the whole model.
      length: mean length of an example in a row.
    """
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    if config.position == "learned":
        looked_up += config.max_length * config.d_model
    width = config.num_heads * config.head_dim
    return 6.0 * (num_params - looked_up) + 6.0 * config.num_layers * width * length


def activation_bytes(
    config: ModelConfig, tokens: float, tensor: int = 1
) -> tuple[float, float]:
    """Activation bytes on one device: saved for the backward pass, and of one layer.

    Without rematerialisation, each layer saves per token the inputs of every matmul,
    norm and activation; with `remat="full"` only the block's input; with "dots" the
    outputs of the matmuls. The layer being computed holds all of them and their
    gradients. The factors are fitted to what XLA allocates on TPUs and GPUs (tests
    check them within 10%).

    Args:
      config: of the model.
      tokens: positions of the rows on the device.
      tensor: number of devices over which heads and the MLP width are split.

    Returns:
      (saved for the backward pass, of the layer being computed).
    """
    size = 4 if config.compute_dtype == "float32" else 2
    heads = config.num_heads * config.head_dim / tensor
    kv = config.kv_heads * config.head_dim / tensor
    inner = config.d_ff / tensor
    width = config.d_model
    matrices = 2 if config.activation == "swiglu" else 1
    dots = size * (heads + 2 * kv + 2 * width + inner * matrices)
    rest = 4 * 2.5 * width + size * (heads + inner + 2 * width)
    block_input = 4 * width
    per_layer = {
        "none": block_input + dots + rest,
        "dots": block_input + dots,
        "full": block_input,
    }[config.remat]
    last = 3 * 4 * width  # hidden states after the last layer, and their gradients
    copies = 1 if config.remat == "none" else 2
    kept = tokens * (config.num_layers * per_layer + last)
    return kept, copies * tokens * (dots + rest)


def gathered_bytes(
    config: ModelConfig, num_params: int, tensor: int = 1
) -> tuple[float, float]:
    """Bytes of weights that are gathered on a device while in use: a layer, the head.

    A layer in the compute dtype, the next one, and its gradient in float32; the head
    and its gradient, once per step.

    Args:
      config: of the model.
      num_params: of the model.
      tensor: number of devices over which both stay split.
    """
    size = 4 if config.compute_dtype == "float32" else 2
    head = config.vocab_size * config.d_model
    tables = head if config.tie_embeddings else 2 * head
    layer = max(0, num_params - tables) / config.num_layers
    return (2 * size + 4) * layer / tensor, (size + 4) * head / tensor


@dataclasses.dataclass(frozen=True)
class TrainingEstimate:
    """Result of `estimate_training`; bytes are per device.

    Attributes:
      num_params: of the model.
      weights: float32 master weights.
      optimizer: Adam's two moments.
      gradients: float32, live between the backward pass and the update.
      activations: saved for the backward pass, for the rows of one device.
      layer: of the layer being computed: its activations, and its weights where they
        are gathered from other devices.
      loss: of the loss: logits of one chunk, and the head where it is gathered.
      memory: of the device.
      capacity: the part of it that a program may use.
      largest_rows: largest number of rows that fit on each device (or on each group of
        `tensor` devices) at a time.
      tokens_per_second: of all devices, including padding.
      hours: for all steps.
    """

    num_params: int
    weights: float
    optimizer: float
    gradients: float
    activations: float
    layer: float
    loss: float
    memory: float
    capacity: float
    largest_rows: int
    tokens_per_second: float
    hours: float

    @property
    def total(self) -> float:
        """Peak bytes; a layer and the loss are never computed at the same time."""
        parts = (self.weights, self.optimizer, self.gradients, self.activations)
        return sum(parts) + max(self.layer, self.loss)

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


def estimate_training(
    config: ModelConfig,
    num_params: int,
    device: Device,
    num_devices: int,
    *,
    rows: int,
    row_length: int,
    num_steps: int,
    shards: int,
    tensor: int = 1,
    num_microbatches: int = 1,
    chunk_length: int = 64,
    example_length: float | None = None,
    first_moment_bytes: int = 4,
) -> TrainingEstimate:
    """Estimates memory, speed and hours of a training run before it starts.

    Args:
      config: of the model.
      num_params: of the model.
      device: from `DEVICES`.
      num_devices: total number of devices.
      rows: global batch size in rows.
      row_length: positions of a row.
      num_steps: of the training.
      shards: number of devices over which each weight is split (fsdp x tensor).
      tensor: the tensor-parallel factor of `shards`, which splits heads and widths.
      num_microbatches: see `make_train_step`.
      chunk_length: see `GeneratorLossConfig`.
      example_length: mean length of an example; a row's by default.
      first_moment_bytes: per parameter, of Adam's first moment.
    """
    moments = 4 + first_moment_bytes
    own = num_params / shards
    rows_at_once = rows / (num_devices / tensor) / num_microbatches
    # Microbatches accumulate into sums that live next to each one's own gradients.
    gradients = 4 * own * (2 if num_microbatches > 1 else 1)
    is_split = shards > tensor
    gathered = gathered_bytes(config, num_params, tensor) if is_split else (0.0, 0.0)
    chunk = min(chunk_length, row_length)

    def for_rows(count: float) -> tuple[float, float, float]:
        kept, work = activation_bytes(config, count * row_length, tensor)
        logits = 2 * 4 * count * chunk * config.vocab_size / tensor
        return kept, gathered[0] + work, gathered[1] + logits

    def needed(count: float) -> float:
        kept, layer, loss = for_rows(count)
        return kept + max(layer, loss)

    activations, layer, loss = for_rows(rows_at_once)
    free = device.capacity - (4 + moments) * own - gradients
    largest = 0
    if needed(1) <= free:  # piecewise linear: the loss dominates for few rows
        kept, work = activation_bytes(config, row_length, tensor)
        largest = int((free - gathered[0]) // (kept + work))
        while largest > 1 and needed(largest) > free:
            largest -= 1
    flops = flops_per_token(config, num_params, example_length or row_length)
    tokens_per_second = num_devices * device.flops * device.utilisation / flops
    return TrainingEstimate(
        num_params=num_params,
        weights=4 * own,
        optimizer=moments * own,
        gradients=gradients,
        activations=activations,
        layer=layer,
        loss=loss,
        memory=device.memory,
        capacity=device.capacity,
        largest_rows=largest,
        tokens_per_second=tokens_per_second,
        hours=num_steps * rows * row_length / tokens_per_second / 3600,
    )


def suggest_changes(
    config: ModelConfig, estimate: TrainingEstimate, rows: int
) -> list[str]:
    """Suggested fixes for a run that does not fit, least intrusive first."""
    changes = []
    if config.remat == "none":
        changes.append('config.model.remat="dots" (recomputes norms and activations)')
    if config.remat != "full":
        changes.append('config.model.remat="full" (a third more compute)')
    if estimate.largest_rows:
        changes.append(
            f"config.train.num_microbatches so that a device holds "
            f"{estimate.largest_rows} rows at a time (now a batch of {rows})"
        )
    else:
        changes.append("config.mesh.fsdp over more devices (weights do not fit)")
    return changes


def explain_out_of_memory(error: BaseException, config: Any) -> str:
    """What to change in a config after an out-of-memory error; "" for other errors.

    Args:
      error: raised by a step or its compilation.
      config: the training's ConfigDict; only settings that it has are suggested.
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
    mesh = sections.get("mesh", {})
    if "fsdp" in mesh and (mesh["fsdp"], mesh.get("data")) != (-1, -1):
        # With both free, `sharding.mesh_sizes` chooses for the machine.
        changes.append(
            "config.mesh.fsdp=-1 --config.mesh.data=-1  (splits the weights as far as "
            "pays)"
        )
    if sections.get("optimizer", {}).get("first_moment_dtype") == "float32":
        changes.append('config.optimizer.first_moment_dtype="bfloat16"')
    for name in ("pipeline.rows", "batch_size"):
        *path, last = name.split(".")
        section = sections.get(path[0], {}) if path else sections
        if last in section:
            changes.append(f"config.{name} below {section[last]}")
    lines = "\n".join(f"  --{change}" for change in changes)
    return (
        "the device's memory is full; suggested fixes, least intrusive first (and "
        f"`racm3 estimate` says by how much):\n{lines}"
    )


def format_estimate(estimate: TrainingEstimate, details: dict[str, Any]) -> str:
    """The estimate as aligned lines."""
    lines = {
        "parameters": f"{estimate.num_params / 1e6:,.1f} M",
        "weights (f32)": format_bytes(estimate.weights),
        "Adam moments": format_bytes(estimate.optimizer),
        "gradients": format_bytes(estimate.gradients),
        "activations": format_bytes(estimate.activations),
        "layer in progress": format_bytes(estimate.layer),
        "loss": format_bytes(estimate.loss),
        "total per device": f"{format_bytes(estimate.total)} of {format_bytes(estimate.capacity)}",
        "largest rows per device": str(estimate.largest_rows),
        "tokens/s, expected": f"{estimate.tokens_per_second:,.0f}",
        "hours, expected": f"{estimate.hours:,.1f}",
        **details,
    }
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines.items())


def format_bytes(number: float) -> str:
    """In GB (10**9 bytes), MB or KB."""
    if number >= GB / 10:
        return f"{number / GB:,.2f} GB"
    if number >= GB / 10_000:
        return f"{number / 1e6:,.1f} MB"
    return f"{number / 1e3:,.1f} KB"
