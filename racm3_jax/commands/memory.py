"""memory build | search | stats | verify | remove | add | neighbours | plan."""

from __future__ import annotations

import argparse
import functools
import json
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from racm3_jax import own_files
from racm3_jax.commands import arguments as options
from racm3_jax.commands import memory_flags, memory_images
from racm3_jax.commands.configs import UsageError

Arguments = argparse.Namespace


def register(commands: Any) -> None:
    """Adds `memory` and its own subcommands."""
    text = "Build, search and change an external memory."
    family = commands.add_parser("memory", help=text, description=text)
    family.set_defaults(command=lambda _: family.print_help())
    actions = family.add_subparsers(metavar="ACTION", dest="action")
    handlers: dict[str, Callable[[Arguments], None]] = {
        "build": _build,
        "search": _search,
        "stats": _stats,
        "verify": _verify,
        "remove": _remove,
        "add": _add_documents,
        "neighbours": _neighbours,
        "plan": _plan,
    }
    for name, handler in handlers.items():
        sub = memory_flags.add_action(actions, name)
        sub.set_defaults(command=functools.partial(_run, handler))


def _read_source(arguments: Arguments) -> str:
    from racm3_jax.documents.readers import with_links

    source = arguments.source
    return with_links(source) if arguments.follow_links else source


def _run(command: Callable, arguments: Arguments) -> None:
    try:
        command(arguments)
    except (ImportError, FileExistsError, IndexError) as error:
        raise UsageError(str(error)) from error


def load_models(tokenizer: str, embedder: str) -> tuple[Any, Any]:
    """The tokenizer, and the embedder or its name."""
    from racm3_jax import wiring
    from racm3_jax.retrieval.embedder import DocumentEmbedder
    from racm3_jax.tokenizers.mixed import MixedTokenizer

    opened = MixedTokenizer.load(wiring.resolve(tokenizer))
    if embedder == "name:":
        raise UsageError("--embedder=name: has no encoder: give name:ENCODER")
    if embedder.startswith("name:"):
        return opened, embedder.removeprefix("name:")
    return opened, DocumentEmbedder.load(wiring.resolve(embedder))


def _load_models(arguments: Arguments) -> tuple[Any, Any]:
    return load_models(arguments.tokenizer, arguments.embedder)


def _config(arguments: Arguments, **more: Any) -> Any:
    from racm3_jax.memory.config import CorpusConfig

    return CorpusConfig(
        max_bad=arguments.max_bad,
        opt_out=arguments.opt_out or "",
        held_out=tuple(arguments.held_out),
        max_nsfw=arguments.max_nsfw,
        max_watermark=arguments.max_watermark,
        **more,
    )


def _build(arguments: Arguments) -> None:
    from racm3_jax.commands import memory_report
    from racm3_jax.memory import beam as beam_build
    from racm3_jax.memory import merge
    from racm3_jax.memory.format import read_manifest

    config = _config(
        arguments,
        index=arguments.index,
        num_query_variants=_count_variants(arguments),
        query_drop=arguments.query_drop,
        seed=arguments.seed,
        recall_target=arguments.recall_target,
        max_ram_gb=arguments.max_ram,
        deduplicate=arguments.deduplicate,
    )
    path = Path(arguments.memory)
    own_files.check_place(path, "give another --memory")
    if arguments.beam is None:
        _build_here(arguments, path, config)
    else:
        beam_build.build_memory_with_beam(
            _read_source(arguments),
            load_models=functools.partial(
                load_models, arguments.tokenizer, arguments.embedder
            ),
            path=path,
            config=config,
            overwrite=arguments.overwrite,
            options=shlex.split(arguments.beam),
        )
    manifest = read_manifest(path)
    print(f"{path}: {manifest['num_documents']} documents, {manifest['index']} index")
    _say(memory_report.describe_build(manifest))
    bad = merge.bad_records_file(path)
    if bad.is_file():
        print(f"  bad records are listed in {bad}")
    _print_mismatch(arguments)


def _count_variants(arguments: Arguments) -> int:
    if arguments.num_query_variants is not None:
        return arguments.num_query_variants
    return memory_flags.TRAINING_VARIANTS if arguments.purpose == "training" else 0


def _print_mismatch(arguments: Arguments) -> None:
    """Prints a note if the embedder does not suit the memory's documents."""
    from racm3_jax.memory.memory import Memory
    from racm3_jax.retrieval.mismatch import explain_mismatch

    tokenizer, embedder = _load_models(arguments)
    known = None if isinstance(embedder, str) else embedder
    with Memory.load(arguments.memory) as memory:
        if mismatch := explain_mismatch(memory, tokenizer, known):
            print(f"  note: {mismatch}")


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _build_here(arguments: Arguments, path: Path, config: Any) -> None:
    from racm3_jax.memory import builder
    from racm3_jax.progress import StageClock, open_progress

    tokenizer, embedder = _load_models(arguments)
    clock = StageClock()
    with open_progress(desc="build memory", unit="steps") as bar:

        def show(num_documents: int, done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix({"documents": num_documents}, refresh=False)
            bar.update(done - bar.n)

        builder.build_memory(
            _read_source(arguments),
            tokenizer=tokenizer,
            embedder=embedder,
            path=path,
            config=config,
            overwrite=arguments.overwrite,
            progress=show,
            clock=clock,
        )
    if clock.seconds:
        print(f"{sum(clock.seconds.values()):.1f} s: {clock.describe()}")


def _add_documents(arguments: Arguments) -> None:
    import dataclasses

    from racm3_jax.commands import memory_report
    from racm3_jax.memory import config as config_lib
    from racm3_jax.memory import edit
    from racm3_jax.memory.format import read_manifest

    manifest = read_manifest(Path(arguments.memory))
    config = dataclasses.replace(
        _config(arguments),
        num_query_variants=manifest["num_query_variants"],
        query_drop=manifest["query_drop"],
    )
    maker = config_lib.make_chunk_builder(config, *_load_models(arguments))
    counts = edit.add_documents(
        arguments.memory,
        _read_source(arguments),
        maker,
        arguments.max_bad,
        arguments.readmit,
    )
    print(f"{arguments.memory}: added {counts['added']} documents")
    for title in ("bad", "left_out", "filtered"):
        _say(memory_report.describe_counts(title, counts[title]))
    _say(memory_report.describe_renamed(counts["renamed"]))
    if counts["filtered"].get("removed before"):
        print("  --readmit takes back what was removed")


def _search(arguments: Arguments) -> None:
    from racm3_jax.commands.originals import read_for_display
    from racm3_jax.documents.images import read_image
    from racm3_jax.memory.memory import Memory
    from racm3_jax.retrieval.mismatch import explain_mismatch

    given = (arguments.text, arguments.image, arguments.words)
    if sum(value is not None for value in given) != 1:
        raise UsageError("give one of --text, --image and --words")
    _check_out(arguments)
    image = None if arguments.image is None else read_image(arguments.image)
    tokenizer, embedder = _load_models(arguments)
    if arguments.words is not None:
        embedder = None  # not needed for keyword search
    elif isinstance(embedder, str):
        raise UsageError("a query needs an encoder: give --embedder=FOLDER")
    mismatch = ""
    path = options.local_memory(arguments)
    with Memory.load(path, embedder, tokenizer) as memory:
        if embedder is None:
            rows, scores = _find_words(memory, tokenizer, arguments)
        else:
            queries = (
                embedder.embed_texts([arguments.text])
                if image is None
                else embedder.embed_images(image[None])
            )
            found = memory.search(queries, arguments.k)
            rows, scores = found.ids[found.valid], found.scores[found.valid]
            mismatch = explain_mismatch(memory, tokenizer, embedder)
        documents, note = read_for_display(memory, tokenizer, rows, arguments.originals)
    asked: Any = image if image is not None else arguments.text or arguments.words
    picture = memory_images.render_results(asked, documents, scores.tolist())
    own_files.write_png(arguments.out, picture)
    results = [
        {"id": d.id, "score": round(float(s), 4), "text": d.text, "source": d.source}
        for d, s in zip(documents, scores, strict=True)
    ]
    if arguments.json:
        record = {"results": results, "out": arguments.out, "note": mismatch}
        print(json.dumps(record))
        return
    for result in results:
        print(f"{result['score']:.3f}  {result['id']}  {result['text'][:80]}")
    print(f"wrote {arguments.out}{note}")
    if mismatch:
        print(f"note: {mismatch}")


def _find_words(
    memory: Any, tokenizer: Any, arguments: Arguments
) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose captions match the words, best first, with their scores.

    Raises:
      UsageError: no caption matches.
    """
    from racm3_jax.retrieval.bm25 import search_bm25

    rows = memory.allowed_ids()
    texts = [tokenizer.decode_text(document) for document in memory.documents(rows)]
    places, scores = search_bm25(texts, arguments.words, arguments.k)
    if not len(places):
        raise UsageError(
            f"no caption of {arguments.memory} has a word of --words={arguments.words!r}"
        )
    return rows[places], scores


def _stats(arguments: Arguments) -> None:
    from racm3_jax.commands import memory_report
    from racm3_jax.commands.originals import read_for_display
    from racm3_jax.memory.memory import Memory
    from racm3_jax.memory.stats import compute_stats

    _check_out(arguments)
    tokenizer, _ = _load_models(arguments)
    path = options.local_memory(arguments)
    with Memory.load(path, tokenizer=tokenizer) as memory:
        stats = compute_stats(memory, num_queries=arguments.num_queries)
        shown = memory_images.choose_rows(memory.allowed_ids())
        documents, note = read_for_display(
            memory, tokenizer, shown, arguments.originals
        )
    own_files.write_png(arguments.out, memory_images.render_contact_sheet(documents))
    if arguments.json:
        print(json.dumps({**stats, "out": arguments.out}))
        return
    _say(memory_report.describe_stats(stats, arguments.num_queries))
    print(f"wrote {arguments.out}{note}")


def _check_out(arguments: Arguments) -> None:
    image = getattr(arguments, "image", None)
    own_files.check_png_paths(
        arguments.out, inputs=[image] if image else [], change="give another --out"
    )


def _verify(arguments: Arguments) -> None:
    from racm3_jax.memory import edit

    counts = edit.verify(options.local_memory(arguments), arguments.share)
    checked = "are intact" if arguments.share == 1 else "were sampled (see above)"
    print(
        f"{arguments.memory}: {counts['files']} files {checked}, "
        f"{counts['documents']} documents, {counts['removed']} removed ones are not "
        f"found, {counts['on_disk']} of them on disk until compaction"
    )


def _remove(arguments: Arguments) -> None:
    from racm3_jax.memory import edit
    from racm3_jax.memory.memory import Memory

    chosen = [arguments.ids, arguments.url_pattern, arguments.like]
    given = sum(value is not None for value in chosen)
    if given > 1 or not given and not arguments.compact:
        raise UsageError("give one of --ids, --url_pattern, --like, or --compact alone")
    if given:
        with Memory.load(arguments.memory) as memory:
            rows = _rows_to_remove(arguments, memory)
            for document in memory.documents(rows[:20]):
                print(f"  {document.id}  {document.source}")
            if arguments.dry_run:
                print(f"{len(rows)} documents would be removed")
                return
            print(f"removed {memory.remove(rows)} of {len(rows)} documents found")
    if arguments.compact and not arguments.dry_run:
        count = edit.compact(arguments.memory)
        print(f"{count} documents deleted from disk")


def _rows_to_remove(arguments: Arguments, memory: Any) -> np.ndarray:
    from racm3_jax.documents.images import read_image
    from racm3_jax.memory import edit

    if arguments.ids is not None:
        file = Path(arguments.ids)
        lines = [arguments.ids]
        if file.is_file():
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError:
                raise UsageError(f"--ids={file} is not UTF-8 text") from None
        parts = lines if file.is_file() else lines[0].split(",")
        names = [name.strip() for name in parts if name.strip()]
        if not names:
            raise UsageError(f"--ids={arguments.ids} names no document")
        rows = memory.find(names)
        missing = [n for n, row in zip(names, rows, strict=True) if row < 0]
        if missing:
            raise UsageError(
                f"{len(missing)} of {len(names)} ids are not in the memory, the first "
                f"is {missing[0]!r}; nothing was removed"
            )
        return rows
    if arguments.url_pattern is not None:
        return edit.find_urls(memory, arguments.url_pattern)
    image = read_image(arguments.like)
    _, embedder = _load_models(arguments)
    memory.check(embedder=embedder)
    query = embedder.embed_images(image[None])[0]
    return edit.find_similar_images(memory, query, arguments.min_similarity)[0]


def _neighbours(arguments: Arguments) -> None:
    import jax

    from racm3_jax.checksums import describe_together
    from racm3_jax.memory.format import TABLE_DIRECTORY
    from racm3_jax.memory.memory import Memory
    from racm3_jax.memory.neighbours import compute_neighbours
    from racm3_jax.progress import open_progress
    from racm3_jax.training.processes import join_processes

    join_processes()
    is_leader = jax.process_index() == 0
    own_place = Path(arguments.memory) / TABLE_DIRECTORY
    out = Path(arguments.out or own_place)
    if out.absolute() != own_place.absolute():
        own_files.check_place(out, "give another --out")
    with (
        Memory.load(
            arguments.memory,
            describe=describe_together,
            later=("index",) if arguments.engine == "exact" else (),
        ) as memory,
        open_progress(desc="neighbours", disable=not is_leader) as bar,
    ):

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        table = compute_neighbours(
            memory, out, arguments.k, engine=arguments.engine, progress=show
        )
    if is_leader:
        print(f"wrote {table.width} neighbours of {table.num_queries} queries to {out}")


def _plan(arguments: Arguments) -> None:
    from racm3_jax.memory.plan import PlanConfig, compute_plan, format_plan

    config = PlanConfig(
        int(arguments.num_documents),
        arguments.d_embed,
        arguments.hosts,
        arguments.devices_per_host,
        index=arguments.index,
    )
    plan = compute_plan(config)
    print(json.dumps(plan) if arguments.json else format_plan(config, plan))
