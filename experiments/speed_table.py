"""The table of speeds in results/README.md, from the records next to it.

    python experiments/speed_table.py              # rewrites the table
    python experiments/speed_table.py --check      # fails if it is not the records'

Each peer of a record is a row: its settings, how many times as fast ours is, and under
which conditions. What an older record does not have is "not known". A record whose peer
had neither its best setting nor an idle machine gives a sentence, and no ratio.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench_sides import MOST_LOAD

START = "<!-- Made by `python experiments/speed_table.py` from the records. -->"
END = "<!-- End of the table of speeds. -->"
TITLES = ("what", "peer and its settings", "ours is faster: medians", "fastest calls")
TITLES += ("threads", "load at the start", "calls", "measured by")

DECODE_SHAPES = {
    "tiny": "1 layer, 32 wide",
    "small": "8 layers, 512 wide",
    "2b7": "2.7 B parameters",
}
CLIP_SHAPES = {"b_32": "ViT-B/32", "b_16": "ViT-B/16", "l_14": "ViT-L/14"}
# Settings of the peers, by their names in the records.
PEERS = {
    "transformers, dynamic": "`generate`, dynamic cache, float32",
    "transformers, static": "`generate`, static cache, float32",
    "transformers, compiled": "`generate`, static cache, compiled, float32",
    "torch loop, float32": "a plain loop, static cache, float32",
    "torch loop, bfloat16": "a plain loop, static cache, bfloat16",
    "transformers": "float32",
    "torch, float32": "float32",
    "torch, bfloat16 autocast": "bfloat16 autocast",
}

# Those that are shown of an index.
SEARCH_SETTINGS = ("kind", "mode", "searched", "reordered", "ef_search")
SEARCH_SETTINGS += ("num_searched", "num_reordered")

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: ours is `median` times as fast, `fastest` by the fastest calls.

    `conditions` is the part of the record with threads, load and number of calls.
    """

    what: str
    peer: str
    median: float
    fastest: float | None
    conditions: Record


def compare(
    what: str, seconds: Record, fastest: Record | None, conditions: Record
) -> Iterator[Row]:
    """A row for each peer; the first side is ours, and others may be, too."""
    own = next(iter(seconds))
    for name in seconds:
        if not name.startswith("ours"):
            median = seconds[name] / seconds[own]
            best = fastest[name] / fastest[own] if fastest else None
            versions = conditions.get("versions", {})
            yield Row(what, name_peer(name, versions), median, best, conditions)


def name_peer(name: str, versions: Record) -> str:
    """The library, its version if recorded, and the settings."""
    if name not in PEERS:
        return name
    library = name.replace(",", "").split()[0]
    return f"{library} {versions.get(library, '')}".strip() + f", {PEERS[name]}"


def read_decode(record: Record) -> Iterator[Row | str]:
    if "load_at_start" not in record:
        yield (
            "The record of generating images is an older one: all sides were in one "
            "process, and neither the load nor the fastest calls were recorded."
        )
    shape, length = DECODE_SHAPES[record["shape"]], record["image_length"]
    dtype = "float32" if record["device"] == "cpu" else "bfloat16"
    for name in ("one", "guided", "guided samples"):
        if part := record.get(name):
            # "guided" was one image or ten.
            tokens = part["ids_per_second"]["ours"] * part["seconds"]["ours"]
            count = round(tokens / length)
            images = "1 image" if count == 1 else f"{count} images"
            how = "" if name == "one" else " with guidance, after 2 documents"
            what = f"generating {images} of {length} codes{how}; {shape}, {dtype}"
            yield from compare(what, part["seconds"], part.get("fastest"), record)


def read_clip(record: Record) -> Iterator[Row | str]:
    for name, part in record["shapes"].items():
        shape = CLIP_SHAPES.get(name, name)
        what = f"embedding {record['batch']} images, CLIP {shape}, float32"
        yield from compare(what, part["seconds"], part["fastest"], record)


def read_train(record: Record) -> Iterator[Row | str]:
    if part := record.get("cpu"):
        what = (
            f"a training step of {part['rows']} rows of {part['length']}, "
            f"{part['parameters'] / 1e6:.0f} M parameters, bfloat16"
        )
        seconds = part["median_seconds"], part["fastest_seconds"]
        yield from compare(what, *seconds, part)


def read_memory(record: Record) -> Iterator[Row | str]:
    rows = f"{record['rows']:,} × {record['d_embed']}"
    if "qps" not in record:
        yield (
            f"Search has no ratio: its record ({rows}) was measured at load "
            f"{record['load_average'][0]:.1f}, and FAISS not at its best setting."
        )
        return
    version = record["sweeps"].get("FAISS", {}).get("facts", {}).get("version", "")
    for by, how in (("qps", "in batches"), ("p50_ms", "one query at a time")):
        sides = record[by]
        titles = {"flat": "exact search in NumPy", "FAISS": f"FAISS {version}".strip()}
        names = {
            name: titles.get(name, name)
            + "".join(
                f"; {key} {side['settings'][key]}"
                for key in SEARCH_SETTINGS
                if key in side["settings"]
            )
            + f" (recall {side['recall']:.3f})"
            for name, side in sides.items()
        }
        what = (
            f"search of {rows} rows {how}, recall {record['common_recall']:.3f}; ours is "
            f"`--index={record['kind']}` (recall {sides['ours']['recall']:.3f})"
        )
        power = -1 if by == "qps" else 1  # seconds of a query
        seconds = {names[n]: side["median"] ** power for n, side in sides.items()}
        fastest = {names[n]: side["best"] ** power for n, side in sides.items()}
        yield from compare(what, seconds, fastest, record)


READERS: dict[str, Callable[[Record], Iterator[Row | str]]] = {
    "bench_decode": read_decode,
    "bench_clip": read_clip,
    "bench_train": read_train,
    "bench_memory": read_memory,
}


def format_ratio(ratio: float | None) -> str:
    if ratio is None:
        return "not known"
    shown = f"{ratio:.2f}×"
    return f"**{shown}, the peer is faster**" if round(ratio, 2) < 1 else shown


def format_row(row: Row, bench: str) -> str:
    found = row.conditions
    load = found.get("load_at_start", found.get("load_average"))
    busy = load is not None and load > MOST_LOAD
    cells = (
        row.what,
        row.peer,
        format_ratio(row.median),
        format_ratio(row.fastest),
        found.get("threads", found.get("cores", "not known")),
        "not known" if load is None else f"{load:.1f}{', busy' if busy else ''}",
        found.get("repeats", "not known"),
        f"`experiments/{bench}.py`",
    )
    return f"| {' | '.join(map(str, cells))} |"


def format_table(records: Mapping[str, Record]) -> str:
    """The rows of the records, by the names of their benchmarks, then the sentences."""
    lines = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    sentences = []
    for bench, record in records.items():
        for found in READERS[bench](record):
            if isinstance(found, str):
                sentences.append(found)
            else:
                lines.append(format_row(found, bench))
    return "\n".join([*lines, *(f"\n{sentence}" for sentence in sentences)])


def update(text: str, table: str) -> str:
    """The README with this table between the two marks."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"the README needs the lines {START!r} and {END!r}")
    return f"{before}{start}\n\n{table}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The table of speeds.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    folder = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=folder, help="records, README")
    arguments = parser.parse_args()
    paths = {name: arguments.results / f"{name}.json" for name in READERS}
    table = format_table(
        {n: json.loads(p.read_text("utf-8")) for n, p in paths.items() if p.exists()}
    )
    readme = arguments.results / "README.md"
    text = readme.read_text("utf-8")
    made = update(text, table)
    if not arguments.check:
        aside = arguments.results / ".README.md.tmp"
        aside.write_text(made, "utf-8")
        os.replace(aside, readme)
    elif made != text:
        raise SystemExit(
            f"the table in {readme} is not that of the records: run "
            "python experiments/speed_table.py"
        )


if __name__ == "__main__":
    main()
