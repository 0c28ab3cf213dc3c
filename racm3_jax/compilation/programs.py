"""The project's accelerator programs, by shape: nothing is loaded or allocated.

train    the training step of a config           size: rows of a batch
decode   reading prompts, then sampling images    size: prompts, on a host's devices
embed    CLIP's image tower and text tower        size: images, on each device
search   exact search over all devices            size: documents of the memory
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from racm3_jax import checkpoints, sharding, wiring
from racm3_jax.generation import decoding, placement
from racm3_jax.generation.draft_choice import usual_drafter
from racm3_jax.generation.drafts import Drafter, empty_table
from racm3_jax.generation.grammar import image_grammar
from racm3_jax.generation.logits import LogitSettings
from racm3_jax.generation.settings import SamplingConfig
from racm3_jax.index import exact
from racm3_jax.model.config import ModelConfig
from racm3_jax.model.transformer import (
    Transformer,
    abstract_params,
    prepare_decoding,
)
from racm3_jax.retrieval import clip, embedder
from racm3_jax.training.step import TrainStep
from racm3_jax.vocab import Vocab

PROGRAMS = ("train", "decode", "embed", "search")
DEFAULT_SIZES = {"decode": 8, "embed": 128, "search": 1_000_000}
# Tokens of a prompt, and of a retrieved caption.
TEXT_LENGTH = 64
# A guided prompt is read twice: as it is, and without its text.
_STREAMS = 2


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of the project, to be compiled at any size.

    Attributes:
      name: one of `PROGRAMS`.
      unit: what `size` counts.
      size: requested size.
      step: sizes are multiples of it.
      trace: size -> its compiled parts by name, traced.
      facts: what determines its shapes, for the user.
    """

    name: str
    unit: str
    size: int
    step: int
    trace: Callable[[int], Mapping[str, jax.stages.Traced]]
    facts: dict[str, str] = dataclasses.field(default_factory=dict)


def build_program(
    what: str,
    config: Any,
    devices: Sequence[Any],
    size: int | None = None,
    capacity: float | None = None,
) -> Program:
    """The program of `--what`.

    Args:
      what: one of `PROGRAMS`.
      config: of a generator.
      devices: attached or not.
      size: see `Program`; by default the config's, or a typical one.
      capacity: bytes that a program may use on one device, if known.

    Raises:
      ValueError: a config without what the program needs, or an invalid size.
    """
    if size is not None and size < 1:
        raise ValueError(f"--size={size}: give a number above 0")
    builders = {
        "train": _build_training,
        "decode": functools.partial(_build_decoding, capacity=capacity),
        "embed": _build_embedding,
        "search": _build_search,
    }
    return builders[what](config, devices, size)


def _build_training(config: Any, devices: Sequence[Any], size: int | None) -> Program:
    training = wiring.build_abstract_training(config, devices)
    rows, length = training.batch.inputs.shape
    mesh = training.mesh
    step = sharding.count_row_shards(mesh) * config.train.get("num_microbatches", 1)

    def trace(rows: int) -> dict[str, jax.stages.Traced]:
        batch = wiring.abstract_batch((rows, length), mesh)
        return {"training step": trace_step(training.step, training.state, batch)}

    shape = " x ".join(f"{n}={size}" for n, size in mesh.shape.items() if size > 1)
    return Program(
        "train", "rows", size or rows, step, trace, {"mesh": shape or "one device"}
    )


def trace_step(step: TrainStep, state: Any, batch: Any) -> jax.stages.Traced:
    """A training step traced by shape, for the devices of its mesh."""
    compiled: Any = step.compiled
    with jax.set_mesh(step.mesh):
        return compiled.trace(state, batch)


def _of_one_process(devices: Sequence[Any]) -> list[Any]:
    """The devices of one process (host), for decoding and embedding."""
    return [d for d in devices if d.process_index == devices[0].process_index]


def _put(tree: Any, place: NamedSharding) -> Any:
    """Shapes with a sharding."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )


def _build_decoding(
    config: Any, devices: Sequence[Any], size: int | None, capacity: float | None
) -> Program:
    """Images with guidance and retrieved documents, as in `generation.sample`.

    With the default speculative decoding.
    """
    vocab = wiring.build_vocab(config)
    model_config = wiring.build_model_config(config, vocab)
    num_documents = config.pipeline.max_documents
    documents_length = num_documents * (TEXT_LENGTH + vocab.image_length)
    needed = documents_length + TEXT_LENGTH + vocab.image_length
    if needed > model_config.max_length:
        raise ValueError(
            f"an image after {num_documents} documents has {needed} tokens, more than "
            f"config.model.max_length={model_config.max_length}; lower "
            "config.pipeline.max_documents"
        )
    devices = _of_one_process(devices)
    tensor = config.mesh.tensor
    mesh = (
        placement.choose_mesh(model_config, devices, capacity)
        if tensor == 1
        else sharding.make_mesh(tensor=tensor, devices=devices)
    )
    copies = sharding.count_row_shards(mesh)
    model, params = _place_decoder(model_config, mesh)

    def choose_drafter(prompts: int) -> Drafter | None:
        with jax.set_mesh(mesh):
            return usual_drafter(vocab, prompts * _STREAMS, num_documents > 0)

    def trace(prompts: int) -> dict[str, jax.stages.Traced]:
        drafter = choose_drafter(prompts)
        with jax.set_mesh(mesh):
            return _trace_decoding(
                model, params, mesh, vocab, prompts, documents_length, drafter
            )

    prompts = -(-(size or DEFAULT_SIZES["decode"]) // copies) * copies
    usual = choose_drafter(prompts)
    facts = {
        "prompts": f"guided, after {num_documents} documents of "
        f"{TEXT_LENGTH + vocab.image_length} tokens",
        "drafts": f"{usual.source}, {usual.window} tokens a pass" if usual else "none",
        "on": f"a host's {mesh.size} devices: {copies} copies of the model, each over "
        f"{mesh.size // copies}",
    }
    return Program("decode", "prompts", prompts, copies, trace, facts)


def _place_decoder(config: ModelConfig, mesh: Mesh) -> tuple[Transformer, Any]:
    """A model in the form that decodes fastest, and the shapes of its parameters."""
    forms: list[ModelConfig] = []

    def prepare(params: Any) -> Any:
        form, cast = prepare_decoding(config, params)
        forms.append(form)
        return cast

    with jax.set_mesh(mesh):
        params = meta.unbox(abstract_params(config))
        params = jax.eval_shape(prepare, params)
    table = sharding.shardings_for(abstract_params(forms[0]), mesh)
    return Transformer(forms[0]), jax.tree.map(_put, params, table)


def _trace_decoding(
    model: Transformer,
    params: Any,
    mesh: Mesh,
    vocab: Vocab,
    prompts: int,
    documents_length: int,
    drafter: Drafter | None,
) -> dict[str, jax.stages.Traced]:
    """The two programs of so many guided prompts, on the current mesh."""
    put = functools.partial(_put, place=sharding.replicated(mesh))
    split = functools.partial(_put, place=sharding.batch_sharding(mesh))
    only = (vocab.image_range.start, vocab.image_range.stop)
    count, room = prompts * _STREAMS, vocab.image_length

    def shape(*dimensions: int) -> Any:
        place = split if dimensions else put
        return place(jax.ShapeDtypeStruct(dimensions, jnp.int32))

    shared = (shape(prompts, documents_length), shape(prompts), shape(count))
    if not documents_length:
        shared = (None, None, None)
    rows = decoding.Rows(shape(count, TEXT_LENGTH), shape(count), *shared)
    read = functools.partial(decoding.read_prompts, model, 1, room, only)
    cache, logits = jax.eval_shape(read, params, rows)
    cache = jax.tree.map(
        lambda x, spec: _put(x, NamedSharding(mesh, spec)),
        cache,
        placement.cache_specs(cache, mesh),
    )
    reading = decoding.read_prompts.trace(model, 1, room, only, params, rows)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), prompts))
    guesses = drafter is not None and drafter.source == "table"
    plan = decoding.Plan(
        grammar=put(jax.tree.map(np.asarray, image_grammar(vocab))),
        limits=shape(prompts),
        forced=None,
        keys=split(keys),
        settings=put(jax.eval_shape(lambda: LogitSettings.of(SamplingConfig()))),
        table=put(empty_table()) if guesses else None,
    )
    start = functools.partial(
        decoding.init_decode_state, 1, _STREAMS, only, room, drafter
    )
    state = split(jax.eval_shape(start, plan, split(logits)))
    sampling = decoding.decode_steps.trace(
        model, 1, _STREAMS, only, room - 1 if drafter is None else None,
        drafter, params, plan, cache, state, shape(),
    )  # fmt: skip
    return {"read the prompts": reading, "sample images": sampling}


def _read_clip_config(config: Any) -> clip.CLIPConfig:
    if not config.get("embedder"):
        raise ValueError(
            "config.embedder is empty: give the folder of a CLIP, "
            "--config.embedder=FOLDER; only its sizes are read"
        )
    fields = checkpoints.read_config(wiring.resolve(config.embedder))["config"]
    dtype = config.get("embedder_dtype", "auto")
    return clip.CLIPConfig(**fields, compute_dtype=dtype)


def _build_embedding(config: Any, devices: Sequence[Any], size: int | None) -> Program:
    settings = _read_clip_config(config)
    mesh = sharding.make_mesh(devices=_of_one_process(devices))
    put = functools.partial(_put, place=sharding.replicated(mesh))
    rows = functools.partial(
        jax.ShapeDtypeStruct, sharding=sharding.batch_sharding(mesh)
    )
    params = put(
        jax.eval_shape(
            lambda: meta.unbox(clip.init_params(settings, jax.random.key(0)))
        )
    )
    pixels = settings.image_size

    def trace(count: int) -> dict[str, jax.stages.Traced]:
        whole = count * mesh.size
        values = 3 * settings.patch_size**2
        patches = rows((whole, settings.num_patches, values), jnp.uint8)
        tokens = rows((whole, settings.context_length), jnp.int32)
        with jax.set_mesh(mesh):
            return {
                "embed images": embedder.encode_patches.trace(
                    settings, params, patches
                ),
                "embed texts": embedder.encode_texts.trace(settings, params, tokens),
            }

    with jax.set_mesh(mesh):
        dtype = settings.dtype
    facts = {
        "images": f"{pixels} x {pixels}, patches of {settings.patch_size}, {dtype}",
        "on": f"each of a host's {mesh.size} devices for itself",
    }
    return Program("embed", "images", size or DEFAULT_SIZES["embed"], 1, trace, facts)


def _build_search(config: Any, devices: Sequence[Any], size: int | None) -> Program:
    d_embed = _read_clip_config(config).d_embed
    found = config.strategy.num_candidates
    mesh = Mesh(np.asarray(devices), ("rows",), axis_types=(AxisType.Auto,))
    queries_per_call = exact.MAX_QUERIES_PER_CALL

    def trace(documents: int) -> dict[str, jax.stages.Traced]:
        def matrix(*shape: int, place: PartitionSpec) -> Any:
            where = NamedSharding(mesh, place)
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

        split = exact.split_rows(documents, mesh.size)
        blocks = matrix(*split, d_embed, place=PartitionSpec("rows"))
        queries = matrix(queries_per_call, d_embed, place=PartitionSpec())
        with jax.set_mesh(mesh):
            traced = exact.search_all.trace(blocks, queries, mesh, found, documents)
        return {"search": traced}

    facts = {
        "queries": f"{queries_per_call} of {d_embed} numbers, {found} found for each",
        "on": f"all {mesh.size} devices, each with its own documents",
    }
    asked = size or DEFAULT_SIZES["search"]
    return Program("search", "documents", asked, mesh.size, trace, facts)
