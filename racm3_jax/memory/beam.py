"""Builds a memory with an Apache Beam pipeline, on any runner.

    shard numbers     -> parts: read, filter, tokenise, embed    on workers
                      -> hashes of their rows, grouped           on workers
                      -> rows that repeat an earlier one         repeats-00000-of-00003 …
    parts and repeats -> the memory                              in the calling process

Workers and caller run this package and share the file system of the memory. The parts
are made by the same function and under the same locks as in `builder`: each can resume
a build of the other, and both give the same bytes. The limit of bad records is checked
when all parts are made.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from racm3_jax import storage
from racm3_jax.buckets import refuse_url
from racm3_jax.documents.readers import Shard, find_shards
from racm3_jax.memory import builder, filters, merge
from racm3_jax.memory import parts as parts_lib
from racm3_jax.memory.chunks import DocumentTokenizer, Embedder
from racm3_jax.memory.config import CorpusConfig, make_chunk_builder
from racm3_jax.memory.merge import FirstOccurrences, part_path
from racm3_jax.memory.parts import ChunkBuilder

REPEATS = "repeats"
# What a row may repeat, in the order of `FirstOccurrences`, and the column of its
# hashes.
_KINDS = {"contents": "content_hashes", "images": "image_hashes"}

LoadModels = Callable[[], tuple[DocumentTokenizer, Embedder | str]]
Place = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _Job:
    """The job description for all workers; pickled by Beam.

    Attributes:
      source: of the documents.
      load_models: loads tokenizer and embedder on a worker.
      path: of the memory.
      config: of the build.
    """

    source: str
    load_models: LoadModels
    path: str
    config: CorpusConfig

    @property
    def work(self) -> pathlib.Path:
        return builder.work_directory(pathlib.Path(self.path))


@dataclasses.dataclass(frozen=True, eq=False)
class _Worker:
    """The models of a worker process; loaded once."""

    shards: Sequence[Shard]
    chunk_builder: ChunkBuilder


def import_beam() -> Any:
    """Imports apache_beam.

    Raises:
      ImportError: names the extra to install.
    """
    try:
        for name in ("io", "options.pipeline_options", "utils.shared"):
            importlib.import_module(f"apache_beam.{name}")
    except ImportError as error:
        raise ImportError(
            f"Apache Beam cannot be imported ({error}); install it with "
            'pip install "racm3_jax[beam]"'
        ) from error
    return importlib.import_module("apache_beam")


def build_memory_with_beam(
    source: str,
    *,
    load_models: LoadModels,
    path: str | os.PathLike[str],
    config: CorpusConfig | None = None,
    overwrite: bool = False,
    options: Sequence[str] = (),
) -> None:
    """Like `builder.build_memory`, with Beam.

    Args:
      source: see `readers.read_documents`; read by all workers.
      load_models: returns tokenizer and embedder; must be picklable, e.g. a function of
        a module.
      path: the directory to create, on a file system that all workers share.
      config: see `CorpusConfig`.
      overwrite: replace an existing memory at `path`.
      options: of the pipeline, e.g. `["--runner=FlinkRunner", …]`; without any, Beam's
        local runner.

    Raises:
      FileExistsError: `path` exists and may not be replaced.
      ImportError: Apache Beam is not installed.
      ValueError: another build is unfinished at `path`, or too many records are bad.
    """
    beam = import_beam()
    config = config or CorpusConfig()
    refuse_url(path, "a memory that is built")
    path = pathlib.Path(path).absolute()
    shards = find_shards(source)
    tokenizer, embedder = load_models()
    job = _Job(source, load_models, str(path), config)
    spec = builder.make_build_spec(source, shards, config, tokenizer, embedder)
    if not builder.begin(path, spec, overwrite):
        return
    for stale in job.work.glob(f"{REPEATS}-*"):
        stale.unlink()
    _run_pipeline(beam, job, len(shards), options)
    merge.merge_parts(
        job.work,
        path,
        source,
        storage.content_digest(spec),
        len(shards),
        make_chunk_builder(config, tokenizer, embedder),
        config,
        overwrite,
        functools.partial(_read_first_occurrences, job.work),
    )
    storage.delete_directory(job.work)


def _run_pipeline(
    beam: Any, job: _Job, num_shards: int, options: Sequence[str]
) -> None:
    pipeline_options = beam.options.pipeline_options.PipelineOptions(list(options))
    shared = beam.utils.shared.Shared()
    with beam.Pipeline(options=pipeline_options) as pipeline:
        _ = (
            pipeline
            | "number the shards" >> beam.Create(range(num_shards))
            | "spread them" >> beam.Reshuffle()
            | "make parts" >> beam.Map(functools.partial(_make_part, job, shared))
            | "hash rows" >> beam.FlatMap(functools.partial(_hash_rows, job))
            | "group rows" >> beam.GroupByKey()
            | "find repeats" >> beam.FlatMap(functools.partial(_find_repeats, job))
            | "write repeats" >> beam.io.WriteToText(str(job.work / REPEATS))
        )


def _make_part(job: _Job, shared: Any, number: int) -> int:
    """Makes a part if it does not exist yet; Beam may call it more than once."""
    path = part_path(job.work, number)
    with storage.locked(path.with_name(f"{path.name}.lock")):
        if not path.is_dir():
            worker = shared.acquire(functools.partial(_load_worker, job))
            shard = worker.shards[number]
            parts_lib.write_shard_part(path, shard, number, worker.chunk_builder)
    return number


def _load_worker(job: _Job) -> _Worker:
    chunk_builder = make_chunk_builder(job.config, *job.load_models())
    return _Worker(find_shards(job.source), chunk_builder)


def _hash_rows(job: _Job, number: int) -> Iterator[tuple[tuple[str, int], Place]]:
    """Kind and hash of every row, with its place; hash 0 is never a repeat."""
    path = part_path(job.work, number)
    if not parts_lib.read_report(path)["num_documents"]:
        return
    for kind, column in _KINDS.items():
        for row, value in enumerate(np.asarray(parts_lib.open_rows([path], column))):
            if value:
                yield (kind, int(value)), (number, row)


def _find_repeats(
    job: _Job, group: tuple[tuple[str, int], Iterable[Place]]
) -> Iterator[str]:
    """`kind part row` of the rows with one hash that repeat an earlier one."""
    (kind, value), found = group
    places = sorted(found)
    if len(places) == 1:
        return
    first = np.zeros(len(places), bool)
    first[0] = True
    if kind == "images":
        hashes = np.full(len(places), value, np.uint64)
        rows = functools.partial(_gather_images, job, places)
        first = filters.find_first_near_duplicates(hashes, rows)
    for place in np.flatnonzero(~first):
        yield f"{kind} {places[place][0]} {places[place][1]}"


def _gather_images(job: _Job, places: Sequence[Place], wanted: np.ndarray) -> Any:
    rows = []
    for number, row in (places[i] for i in wanted):
        part = part_path(job.work, number)
        rows.append(parts_lib.open_rows([part], "embeddings_image")[[row]])
    return np.concatenate(rows)


def _read_first_occurrences(
    work: pathlib.Path, folders: Sequence[pathlib.Path]
) -> FirstOccurrences:
    """The repeats that the pipeline found, over the rows of all parts in order."""
    starts, total = {}, 0
    for folder in folders:
        starts[int(folder.name.removeprefix("part-"))] = total
        total += parts_lib.read_report(folder)["num_documents"]
    firsts = FirstOccurrences(*np.ones((len(_KINDS), total), bool))
    for file in sorted(work.glob(f"{REPEATS}-*")):
        for line in file.read_text().splitlines():
            kind, number, row = line.split()
            getattr(firsts, kind)[starts[int(number)] + int(row)] = False
    return firsts
