"""The text output of `racm3 memory build` and `stats`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from racm3_jax.memory.stats import NEAR
from racm3_jax.training.hardware import format_bytes

_NOT_KEPT = ("bad", "left_out", "filtered", "duplicates")


def describe_build(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What a build read and kept; only reasons with a count above 0."""
    report = manifest["report"]
    yield f"  read {report['read']}, bad {sum(report['bad'].values())}"
    for title in _NOT_KEPT:
        yield from describe_counts(title, report.get(title, {}))
    yield from describe_renamed(report["renamed"])
    shared = _join_counts(report["leakage"])
    if shared:
        yield f"  excluded from retrieval for some documents: {shared}"


def describe_counts(title: str, counts: Mapping[str, int]) -> Iterator[str]:
    """A line for each reason with a count above 0."""
    for reason, count in counts.items():
        if count:
            yield f"  {title.replace('_', ' ')}: {count} {reason}"


def describe_renamed(count: int) -> Iterator[str]:
    """The number of documents whose id got a suffix, if any."""
    if count:
        yield f"  renamed: {count} with the id of another document (id#content)"


def describe_stats(stats: Mapping[str, Any], num_queries: int) -> Iterator[str]:
    """`compute_stats` as sentences.

    Args:
      stats: of `memory.stats.compute_stats`.
      num_queries: requested number; a smaller memory is used completely.
    """
    documents, removed = stats["documents"], stats["removed"]
    yield f"{documents:,} documents" + (f", {removed:,} removed" if removed else "")
    yield (
        f"  with text {stats['with_text']:,}, with an image {stats['with_image']:,}, "
        f"with both {stats['multimodal']:,}"
    )
    total = sum(stats["bytes"].values())
    parts = sorted(stats["bytes"].items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts)
    yield f"  on disk {format_bytes(total)}: {named}"
    yield f"  {stats['index']} index of {stats['d_embed']} dimensions"
    sampled = min(num_queries, documents)
    for name, recall in stats["recall"].items():
        times = stats["latency_ms"][name]
        yield (
            f"  {name} queries: finds {recall:.1%} of the exact 10 nearest; "
            f"{times['p50']:.2f} ms (median), {times['p99']:.2f} ms (99th percentile)"
        )
    yield (
        f"  near-duplicates (similarity >= {NEAR}): {stats['near_duplicates']:.1%} of "
        f"{sampled:,} sampled documents"
    )
    build = stats["build"]
    if build:
        lost = {
            f"{title.replace('_', ' ')} ({reason})": count
            for title in _NOT_KEPT
            for reason, count in build.get(title, {}).items()
        }
        said = _join_counts(lost)
        yield f"  built from {build['read']:,} documents" + (
            f": {said}" if said else ""
        )


def _join_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)
