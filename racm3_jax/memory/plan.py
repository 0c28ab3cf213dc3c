"""Estimates for a memory before it is built: disk, RAM, FLOPs, hours.

All figures follow from the formats of this package and the numbers in `MACHINES`;
speeds are typical fractions of a machine's peak, not guarantees.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from racm3_jax.index import registry
from racm3_jax.index.contract import IndexKind

# Dense bf16 peak in FLOP/s, from the vendors' data sheets, and the fraction of it that
# a large matrix product, or a ViT, typically reaches.
MACHINES: dict[str, float] = {
    "NVIDIA H100 SXM": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v5p": 459e12,
    "TPU v5e": 197e12,
}
UTILISATION = 0.4
# Forward FLOPs of CLIP ViT-L/14 at 224 pixels: 2 * 304e6 weights * 257 tokens, and of
# its text tower: 2 * 85e6 weights * 77 tokens.
CLIP_IMAGE_FLOPS = 2 * 304e6 * 257
CLIP_TEXT_FLOPS = 2 * 85e6 * 77
_METADATA_BYTES = 300


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The memory to plan.

    Attributes:
      num_documents: each with one caption and one image.
      d_embed: width of the embeddings.
      hosts: number of hosts, one shard each.
      devices_per_host: accelerators per host.
      num_query_variants: queries with dropout per document.
      tokens_per_document: tokens of text and image.
      max_candidates: neighbours per query in a table.
      index: kind of index; "" means the first that can be sharded.
    """

    num_documents: int
    d_embed: int = 768
    hosts: int = 1
    devices_per_host: int = 8
    num_query_variants: int = 4
    tokens_per_document: int = 1024 + 32
    max_candidates: int = 32
    index: IndexKind = ""

    def __post_init__(self) -> None:
        kinds = registry.list_kinds()
        if self.index not in ("", *kinds):
            words = ", ".join(map(repr, kinds))
            raise ValueError(f"index must be one of {words}; got {self.index!r}")
        for field in dataclasses.fields(self)[:-1]:
            least = 0 if field.name == "num_query_variants" else 1
            if getattr(self, field.name) < least:
                raise ValueError(
                    f"{field.name} must be >= {least}; got {getattr(self, field.name)}"
                )


def compute_plan(config: PlanConfig) -> dict[str, Any]:
    """Bytes, FLOPs and hours.

    Returns:
      "index" kind, "disk_bytes" by kind of file and "disk_bytes_total", "ram_bytes_per_host" by use,
      "flops" of embedding and of the exact neighbours of all queries, and
      "hours" of both by machine (`hosts * devices_per_host` of them).
    """
    n, d = config.num_documents, config.d_embed
    variants = config.num_query_variants
    num_queries = 2 * (1 + variants) * n
    sharded = (k for k in registry.list_kinds() if k.endswith(registry.SUFFIX))
    index = config.index or next(sharded)
    backend = registry.get_backend(index)
    index_row = backend.index_row_bytes(d)
    disk = {
        "documents": n * (4 * config.tokens_per_document + _METADATA_BYTES),
        "embeddings": 3 * 4 * n * d,
        "queries": 2 * 2 * variants * n * d,
        "index": n * index_row,
        "table": num_queries * (8 + 12 * config.max_candidates),
    }
    rows_per_host = -(-n // config.hosts)
    ram = {
        "search": rows_per_host * index_row,
        "build": int(rows_per_host * 4 * d * backend.build_ram_factor),
        "exact": rows_per_host * 4 * d,
        "table": 0,
    }
    embed = n * (
        (1 + variants) * CLIP_TEXT_FLOPS + (1 + 0.8 * variants) * CLIP_IMAGE_FLOPS
    )
    flops = {"embed": embed, "exact_neighbours": 2.0 * num_queries * n * d}
    devices = config.hosts * config.devices_per_host
    hours = {
        name: {
            use: count / (peak * UTILISATION * devices) / 3600
            for use, count in flops.items()
        }
        for name, peak in MACHINES.items()
    }
    return {
        "index": index,
        "disk_bytes": disk,
        "disk_bytes_total": sum(disk.values()),
        "ram_bytes_per_host": ram,
        "flops": flops,
        "devices": devices,
        "hours": hours,
    }


def format_plan(config: PlanConfig, plan: dict[str, Any]) -> str:
    """The plan as text."""
    head = (
        f"{config.num_documents:,} documents x {config.d_embed}, {config.hosts} hosts "
        f"with {config.devices_per_host} devices each"
    )
    flops = (
        f"FLOPs: embedding (CLIP ViT-L/14) {plan['flops']['embed']:.2g}, exact "
        f"neighbours of all queries {plan['flops']['exact_neighbours']:.2g}"
    )
    lines = [
        head,
        f"disk: {_size(plan['disk_bytes_total'])}",
        *(f"  {name:<12} {_size(b)}" for name, b in plan["disk_bytes"].items()),
        "RAM of a host:",
        f"  search with {plan['index']:<16} {_size(plan['ram_bytes_per_host']['search'])}",
        f"  while its shard is built     {_size(plan['ram_bytes_per_host']['build'])}",
        f"  exact search (device memory) {_size(plan['ram_bytes_per_host']['exact'])}",
        "  table (mapped from disk)     0",
        flops,
        f"hours on {plan['devices']} devices at {UTILISATION:.0%} of their peak:",
    ]
    for name, hours in plan["hours"].items():
        lines.append(
            f"  {name:<16} embedding {hours['embed']:8.2f}   exact neighbours "
            f"{hours['exact_neighbours']:8.2f}"
        )
    return "\n".join(lines)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} PB"
