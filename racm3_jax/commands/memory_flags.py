"""The flags of `racm3 memory` and its actions."""

from __future__ import annotations

from typing import Any

from racm3_jax.commands import arguments as options
from racm3_jax.index import registry

_SHIPPED = "shipped:flagworld"


def add_action(actions: Any, name: str) -> Any:
    """The parser of one action; all but `plan` are about a memory that is there."""
    text, add_flags = ACTIONS[name]
    sub = actions.add_parser(name, help=text, description=text)
    if name != "plan":
        sub.add_argument(
            "--memory", type=options.path, required=True, help="its directory"
        )
    add_flags(sub)
    return sub


def _kinds() -> str:
    return "|".join(registry.list_kinds())


def _add_build(sub: Any) -> None:
    _source(sub)
    _models(sub)
    _filters(sub)
    sub.add_argument("--index", default="auto", help=f"auto|{_kinds()}")
    sub.add_argument("--num_query_variants", type=options.whole(0, 1000), default=4)
    sub.add_argument("--query_drop", type=options.number(0, 1), default=0.2)
    sub.add_argument("--seed", type=options.whole(0, options.MAX_SEED), default=0)
    sub.add_argument(
        "--max_ram", type=options.number(), default=0.0, help="GB for the index build"
    )
    sub.add_argument(
        "--recall_target",
        type=options.number(0, 1),
        default=0.95,
        help="recall@10 of the index",
    )
    sub.add_argument("--deduplicate", default="exact", help="none|exact|near")
    sub.add_argument("--overwrite", action="store_true")
    sub.add_argument(
        "--beam",
        default=None,
        metavar="OPTIONS",
        help='run as an Apache Beam pipeline, as --beam="--runner=FlinkRunner …"',
    )


def _add_search(sub: Any) -> None:
    _models(sub)
    sub.add_argument("--text", type=options.filled, default=None)
    sub.add_argument("--image", type=options.path, default=None)
    sub.add_argument("--k", type=options.whole(1, 10_000), default=8)
    sub.add_argument(
        "--out", type=options.path, default="search.png", help="picture of the results"
    )
    _originals(sub)
    sub.add_argument("--json", action="store_true", help="one line of JSON")


def _add_stats(sub: Any) -> None:
    _models(sub)
    sub.add_argument("--num_queries", type=options.whole(1), default=200)
    sub.add_argument(
        "--out", type=options.path, default="memory.png", help="contact sheet"
    )
    _originals(sub)
    sub.add_argument("--json", action="store_true", help="one line of JSON")


def _add_verify(sub: Any) -> None:
    del sub  # the memory alone


def _add_remove(sub: Any) -> None:
    _models(sub)
    sub.add_argument(
        "--ids",
        type=options.path,
        default=None,
        help="a,b,c or a file of one id a line",
    )
    sub.add_argument(
        "--url_pattern",
        type=options.filled,
        default=None,
        help="as https://example.org/*",
    )
    sub.add_argument("--like", type=options.path, default=None, help="an image file")
    sub.add_argument(
        "--min_similarity", type=options.number(-1, 1), default=0.95, help="of --like"
    )
    sub.add_argument("--compact", action="store_true", help="also from the disk, now")
    sub.add_argument("--dry_run", action="store_true", help="only list them")


def _add_add(sub: Any) -> None:
    _source(sub)
    _models(sub)
    _filters(sub)
    sub.add_argument(
        "--readmit", action="store_true", help="take back what was removed"
    )


def _add_neighbours(sub: Any) -> None:
    sub.add_argument(
        "--out", type=options.path, default=None, help="the table; default MEMORY/table"
    )
    sub.add_argument("--k", type=options.whole(1), default=512)
    sub.add_argument("--engine", default="exact", help="exact (all devices)|memory")


def _add_plan(sub: Any) -> None:
    sub.add_argument(
        "--num_documents", type=options.number(1, 1e15), required=True, help="150e6"
    )
    sub.add_argument("--d_embed", type=options.whole(1), default=768)
    sub.add_argument("--hosts", type=options.whole(1), default=1)
    sub.add_argument("--devices_per_host", type=options.whole(1), default=8)
    sub.add_argument(
        "--index", default="", help=f"{_kinds()}; default: the first sharded"
    )
    sub.add_argument("--json", action="store_true", help="one line of JSON")


def _source(sub: Any) -> None:
    sub.add_argument(
        "--source",
        type=options.filled,
        required=True,
        help="kind:path, see documents.readers",
    )
    sub.add_argument(
        "--follow_links",
        action="store_true",
        help="read also what links point to outside of the source's folder",
    )


def _models(sub: Any) -> None:
    sub.add_argument("--tokenizer", type=options.path, default=f"{_SHIPPED}/tokenizer")
    sub.add_argument(
        "--embedder",
        type=options.path,
        default=f"{_SHIPPED}/clip",
        help="a folder, or name:ENCODER for a source that brings its embeddings",
    )


def _originals(sub: Any) -> None:
    sub.add_argument(
        "--originals",
        type=options.path,
        default=None,
        metavar="FOLDER",
        help="the image files, which are shown instead of what the memory keeps of them; "
        "default: the folder that it was built from",
    )


def _filters(sub: Any) -> None:
    sub.add_argument(
        "--max_bad",
        type=options.number(0, 1),
        default=0.1,
        help="share that may be bad",
    )
    sub.add_argument(
        "--opt_out", type=options.path, help="file of ids and URL patterns"
    )
    sub.add_argument(
        "--held_out",
        type=options.filled,
        action="append",
        default=[],
        help="source of evaluation documents",
    )
    sub.add_argument("--max_nsfw", type=options.number(), default=None)
    sub.add_argument("--max_watermark", type=options.number(), default=None)


ACTIONS = {
    "build": ("Index a corpus; the same call resumes.", _add_build),
    "search": ("Show what a query finds.", _add_search),
    "stats": ("Counts, sizes, recall, latency, duplicates.", _add_stats),
    "verify": ("Check every byte, and that removed is gone.", _add_verify),
    "remove": ("Remove documents for good.", _add_remove),
    "add": ("Add the documents of a source.", _add_add),
    "neighbours": ("Precompute all training searches.", _add_neighbours),
    "plan": (
        "Disk, RAM, FLOPs and hours of a memory that does not exist yet.",
        _add_plan,
    ),
}
