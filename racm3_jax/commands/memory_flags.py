"""The flags of `racm3 memory` and its actions."""

from __future__ import annotations

from typing import Any

from racm3_jax.commands import arguments as options
from racm3_jax.index import registry

# Actions that copy a memory at a URL.
_READING = ("search", "stats", "verify")
_SHIPPED = "shipped:flagworld"
# Queries with dropout of each document, where a memory is built for a training.
TRAINING_VARIANTS = 4


def add_action(actions: Any, name: str) -> Any:
    """The parser of one action; all except `plan` need a memory."""
    text, add_flags = ACTIONS[name]
    sub = actions.add_parser(name, help=text, description=text)
    if name in _READING:
        options.add_memory(sub, required=True)
    elif name != "plan":
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
    sub.add_argument(
        "--for",
        dest="purpose",
        choices=("search", "training"),
        default="search",
        help="a training also needs queries with dropout, which take longer to build",
    )
    sub.add_argument(
        "--num_query_variants",
        type=options.integer(0, 1000),
        help=f"of each document for a training (default: {TRAINING_VARIANTS} with "
        "--for=training, else none)",
    )
    sub.add_argument(
        "--query_drop",
        type=options.number(0, 1),
        default=0.2,
        help="fraction of tokens that a training query drops",
    )
    sub.add_argument(
        "--seed",
        type=options.integer(0, options.MAX_SEED),
        default=0,
        help="of the query dropout",
    )
    sub.add_argument(
        "--max_ram",
        type=options.number(),
        default=0.0,
        help="RAM limit of the index build in GB; 0: no limit",
    )
    sub.add_argument(
        "--recall_target",
        type=options.number(0, 1),
        default=0.95,
        help="fraction of the exact 10 nearest that the index must find",
    )
    sub.add_argument(
        "--deduplicate", default="exact", help="duplicates to drop: none|exact|near"
    )
    sub.add_argument(
        "--overwrite", action="store_true", help="replace an existing memory"
    )
    sub.add_argument(
        "--beam",
        default=None,
        metavar="OPTIONS",
        help='run as an Apache Beam pipeline, e.g. --beam="--runner=FlinkRunner …"',
    )


def _add_search(sub: Any) -> None:
    _models(sub)
    sub.add_argument("--text", type=options.non_empty, default=None, help="query")
    sub.add_argument(
        "--words", type=options.non_empty, default=None, help="rank captions by BM25"
    )
    sub.add_argument(
        "--image", type=options.path, default=None, help="query, an image file"
    )
    sub.add_argument(
        "--k", type=options.integer(1, 10_000), default=8, help="documents to find"
    )
    sub.add_argument(
        "--out", type=options.path, default="search.png", help="PNG file of the results"
    )
    _originals(sub)
    sub.add_argument("--json", action="store_true", help="one line of JSON")


def _add_stats(sub: Any) -> None:
    _models(sub)
    sub.add_argument(
        "--num_queries",
        type=options.integer(1),
        default=200,
        help="documents sampled for recall, latency and near-duplicates",
    )
    sub.add_argument(
        "--out",
        type=options.path,
        default="memory.png",
        help="PNG file, a contact sheet",
    )
    _originals(sub)
    sub.add_argument("--json", action="store_true", help="one line of JSON")


def _add_verify(sub: Any) -> None:
    sub.add_argument(
        "--share",
        type=options.number(0, 1),
        default=1.0,
        help="fraction of bytes to read; below 1, randomly chosen files",
    )


def _add_remove(sub: Any) -> None:
    _models(sub)
    sub.add_argument(
        "--ids",
        type=options.place,
        default=None,
        help="a,b,c or a file with one id per line",
    )
    sub.add_argument(
        "--url_pattern",
        type=options.non_empty,
        default=None,
        help="e.g. https://example.org/*",
    )
    sub.add_argument("--like", type=options.path, default=None, help="an image file")
    sub.add_argument(
        "--min_similarity",
        type=options.number(-1, 1),
        default=0.95,
        help="minimum cosine similarity to --like",
    )
    sub.add_argument(
        "--compact", action="store_true", help="also delete removed documents from disk"
    )
    sub.add_argument("--dry_run", action="store_true", help="only list them")


def _add_add(sub: Any) -> None:
    _source(sub)
    _models(sub)
    _filters(sub)
    sub.add_argument(
        "--readmit", action="store_true", help="also add removed documents"
    )


def _add_neighbours(sub: Any) -> None:
    sub.add_argument(
        "--out",
        type=options.path,
        default=None,
        help="the table; default: MEMORY/table",
    )
    sub.add_argument(
        "--k", type=options.integer(1), default=512, help="neighbours of each query"
    )
    sub.add_argument(
        "--engine", default="exact", help="exact (all devices of all processes)|memory"
    )


def _add_plan(sub: Any) -> None:
    sub.add_argument(
        "--num_documents",
        type=options.number(1, 1e15),
        required=True,
        help="number of documents, e.g. 150e6",
    )
    sub.add_argument(
        "--d_embed",
        type=options.integer(1),
        default=768,
        help="dimensions of an embedding",
    )
    sub.add_argument(
        "--hosts",
        type=options.integer(1),
        default=1,
        help="number of hosts",
    )
    sub.add_argument(
        "--devices_per_host",
        type=options.integer(1),
        default=8,
        help="accelerators per host",
    )
    sub.add_argument(
        "--index", default="", help=f"{_kinds()}; default: the first sharded"
    )
    sub.add_argument("--json", action="store_true", help="one line of JSON")


def _source(sub: Any) -> None:
    sub.add_argument(
        "--source",
        type=options.non_empty,
        required=True,
        help="kind:path, e.g. folder:photos, webdataset:*.tar, parquet:FILE, coco:FOLDER",
    )
    sub.add_argument(
        "--follow_links",
        action="store_true",
        help="also follow links to outside the source's folder",
    )


def _models(sub: Any) -> None:
    sub.add_argument(
        "--tokenizer", type=options.path, default=f"{_SHIPPED}/tokenizer", help="folder"
    )
    sub.add_argument(
        "--embedder",
        type=options.path,
        default=f"{_SHIPPED}/clip",
        help="a folder, or name:ENCODER for a source with embeddings",
    )


def _originals(sub: Any) -> None:
    sub.add_argument(
        "--originals",
        type=options.path,
        default=None,
        metavar="FOLDER",
        help="folder of the image files, shown instead of the memory's decoded images; "
        "default: the folder it was built from",
    )


def _filters(sub: Any) -> None:
    sub.add_argument(
        "--max_bad",
        type=options.number(0, 1),
        default=0.1,
        help="maximum fraction of bad records",
    )
    sub.add_argument(
        "--opt_out",
        type=options.path,
        help="file of ids and URL patterns of documents to leave out, one per line",
    )
    sub.add_argument(
        "--held_out",
        type=options.non_empty,
        action="append",
        default=[],
        help="source of evaluation documents, which are left out, as are their copies; may be given "
        "more than once",
    )
    sub.add_argument(
        "--max_nsfw",
        type=options.number(),
        default=None,
        help="largest NSFW score (0 to 1) in the source's columns",
    )
    sub.add_argument(
        "--max_watermark",
        type=options.number(),
        default=None,
        help="largest watermark score (0 to 1) in the source's columns",
    )


ACTIONS = {
    "build": ("Build a memory from a corpus; the same call resumes.", _add_build),
    "search": ("Search with a query and show the results.", _add_search),
    "stats": ("Counts, sizes, recall, latency, duplicates.", _add_stats),
    "verify": ("Verify every byte, and that removed documents are gone.", _add_verify),
    "remove": ("Remove documents permanently.", _add_remove),
    "add": ("Add the documents of a source.", _add_add),
    "neighbours": ("Precompute all training searches.", _add_neighbours),
    "plan": (
        "Estimate disk, RAM, FLOPs and hours of a memory before it is built.",
        _add_plan,
    ),
}
