"""The decoder-only Transformer: from tokens to hidden states or next-token logits.

Functional use, with `params` a plain (unboxed) tree of float32 arrays:

    model = Transformer(config)
    params = init_params(config, key)
    hidden = model.apply({"params": params}, inputs, positions, segment_ids)
    logits = compute_logits(params, config, hidden)

    logits, cache = model.apply(
        {"params": params}, tokens, lengths, max_length, method="prefill")
    logits, cache = model.apply({"params": params}, token, cache, method="decode")

With `scan_layers` the blocks' parameters are stacked under "layers"; without it they are
"layers_0", "layers_1", ... Call `prepare_decoding` once before a decode loop: slicing
stacked weights would copy them at every step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from racm3_jax.model.cache import Cache, LayerCache, Prefix, make_cache
from racm3_jax.model.config import ModelConfig
from racm3_jax.model.contract import contract, multiply_panels, to_panels
from racm3_jax.model.embedding import look_up
from racm3_jax.model.layers import (
    PRODUCT,
    Block,
    Norm,
    Rotary,
    make_rotary,
    partitioned,
)
from racm3_jax.model.quantization import num_inputs_of
from racm3_jax.sharding import current_platform

Params = Mapping[str, Any]
_Tokens = Int[Array, "batch length"]
_Hidden = Float[Array, "batch length d_model"]
_Logits = Float[Array, "batch vocab"]

# "dots" saves matmuls; it recomputes norms, activations and attention.
_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


class Transformer(nn.Module):
    """Causal Transformer over packed rows; see the module's docstring."""

    config: ModelConfig

    def setup(self) -> None:
        """Defines embedding, positions, blocks, output norm and head."""
        c = self.config
        # 0.02 at a width of 2,560. Small models learn sooner with it, and some only with
        # it, to choose between their documents (experiments/LOG.md).
        normal = nn.initializers.normal(c.d_model**-0.5)
        self.embedding = self.param(
            "embedding",
            partitioned(normal, "vocab", "embed"),
            (c.vocab_size, c.d_model),
        )
        if c.position == "learned":
            self.position_embedding = self.param(
                "position_embedding",
                partitioned(normal, "position", "embed"),
                (c.max_length, c.d_model),
            )
        if c.image_positions:
            self.image_position_embedding = self.param(
                "image_position_embedding",
                partitioned(normal, "position", "embed"),
                (c.image_length, c.d_model),
            )
        if not c.tie_embeddings:
            self.head = self.param(
                "head",
                partitioned(normal, "embed", "vocab"),
                (c.d_model, c.vocab_size),
            )
        block: Any = Block
        if c.remat != "none":
            block = nn.remat(
                Block,
                policy=_REMAT_POLICIES[c.remat],
                prevent_cse=not c.scan_layers,
            )
        if c.scan_layers:
            self.layers: Any = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c)
        else:
            self.layers = [block(c) for _ in range(c.num_layers)]
        self.output_norm = Norm(c.norm, c.norm_epsilon)
        self.dropout = nn.Dropout(c.dropout)

    def __call__(
        self, inputs: _Tokens, positions: _Tokens, segment_ids: _Tokens
    ) -> _Hidden:
        """Normalised hidden states, in the compute dtype; times the head: the logits.

        Dropout is on if `apply` gets `rngs={"dropout": key}`.

        Args:
          inputs: tokens.
          positions: of each token in its own example; below `config.max_length`.
          segment_ids: numbers the examples of each row; 0 is padding.
        """
        x, rotary = self._embed(inputs, positions, self._count_codes(inputs))
        if self.config.scan_layers:
            x, _ = self.layers(x, rotary, segment_ids)
        else:
            for layer in self.layers:
                x, _ = layer(x, rotary, segment_ids)
        return self.output_norm(x).astype(self.config.dtype)

    def prefill(
        self, tokens: _Tokens, lengths: Int[Array, " batch"], max_length: int
    ) -> tuple[_Logits, Cache]:
        """Reads prompts in one pass.

        Args:
          tokens: prompts, right-padded with any token.
          lengths: true length of each prompt, at least 1.
          max_length: size of the cache: prompt, padding and generated tokens.

        Returns:
          The logits that follow each prompt's last token, and the cache.

        Raises:
          ValueError: `max_length` is shorter than the prompts or longer than the
            model allows.
        """
        if not tokens.shape[1] <= max_length <= self.config.max_length:
            raise ValueError(
                f"a cache for {max_length} tokens does not fit: the prompts have "
                f"{tokens.shape[1]} and the model allows {self.config.max_length}; "
                "shorten the prompt or the generation"
            )
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segment_ids = (index < lengths[:, None]).astype(jnp.int32)
        codes = self._count_codes(tokens)
        x, rotary = self._embed(tokens, index, codes)
        layers = []
        for i in range(self.config.num_layers):
            x, cached = self._layer(i, "prefill", x, rotary, segment_ids)
            layers.append(cached.pad(max_length))
        if codes is not None:
            more = max_length - tokens.shape[1]
            codes = jnp.pad(codes, ((0, 0), (0, more)))
        cache = Cache(tuple(layers), lengths.astype(jnp.int32), codes=codes)
        last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
        return self._logits(last), cache

    def prefill_after(
        self,
        tokens: _Tokens,
        lengths: Int[Array, " batch"],
        prefix: Prefix,
        max_length: int,
    ) -> tuple[_Logits, Cache]:
        """Reads the rows' own tokens after a prefix that `prefill` has read.

        Args:
          tokens: the rows after the prefix, right-padded with any token.
          lengths: true length of each, at least 1.
          prefix: shared by the rows; it does not end within an image.
          max_length: room for each row's own and generated tokens; the caller must
            ensure that prefix and row together fit the model.
        """
        empty = make_cache(self.config, len(tokens), max_length)
        cache = Cache(empty.layers, empty.length, prefix, empty.codes)
        return self.extend(tokens, lengths, cache)

    def extend(
        self,
        tokens: _Tokens,
        lengths: Int[Array, " batch"],
        cache: Cache,
        head: Float[Array, "_ _"] | None = None,
    ) -> tuple[_Logits, Cache]:
        """Reads more tokens per row, after those in the cache.

        Args:
          tokens: continuations, right-padded with any token.
          lengths: true length of each continuation, at least 1; the caller must ensure
            that `cache.length + lengths <= cache.max_length`.
          cache: the tokens read so far; rows may differ in length.
          head: from `slice_head`, if only the logits of some tokens are needed.
        """
        x, cache = self._read_after(tokens, lengths, cache)
        cache = cache.advance(lengths)
        last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
        return self._logits(last, head), cache

    def decode(
        self,
        token: Int[Array, " batch"],
        cache: Cache,
        head: Float[Array, "_ _"] | None = None,
    ) -> tuple[_Logits, Cache]:
        """Reads one token per row; returns the next-token logits and the cache."""
        return self.extend(token[:, None], jnp.ones_like(token), cache, head)

    def decode_window(
        self,
        tokens: _Tokens,
        cache: Cache,
        head: Float[Array, "_ _"] | None = None,
    ) -> tuple[Float[Array, "batch length vocab"], Cache]:
        """Reads tokens of which only a prefix may be accepted.

        Args:
          tokens: of each row; those beyond the end of the cache are dropped.
          cache: the tokens read so far.
          head: from `slice_head`, if only the logits of some tokens are needed.

        Returns:
          The next-token logits of each token, and the cache with unchanged lengths:
          `cache.advance` accepts tokens.
        """
        lengths = jnp.full(len(tokens), tokens.shape[1], jnp.int32)
        x, cache = self._read_after(tokens, lengths, cache)
        logits = self._logits(x.reshape(-1, x.shape[2]), head)
        return logits.reshape(*tokens.shape, -1), cache

    def _read_after(
        self, tokens: _Tokens, lengths: Int[Array, " batch"], cache: Cache
    ) -> tuple[_Hidden, Cache]:
        """The last hidden states, and the cache with the tokens, not yet advanced."""
        index = jnp.arange(tokens.shape[1])
        positions = cache.length[:, None] + index
        write_at = jnp.where(
            index < lengths[:, None], positions, cache.max_length + index
        )
        shared = cache.prefix
        offset = 0 if shared is None else shared.visible[:, None]
        counts = self._count_codes(tokens, cache.last_codes())
        x, rotary = self._embed(tokens, positions + offset, counts)
        layers = []
        for i, cached in enumerate(cache.layers):
            prefix = None if shared is None else (shared.layers[i], shared.visible)
            x, cached = self._layer(
                i, "extend", x, rotary, cached, positions, write_at, prefix
            )
            layers.append(cached)
        codes = cache.write_codes(counts, write_at)
        return x, Cache(tuple(layers), cache.length, shared, codes)

    def _count_codes(
        self, tokens: _Tokens, before: Int[Array, "batch 1"] | int = 0
    ) -> _Tokens | None:
        """Number of adjacent codes that end with each token; 0 if it is not a code.

        tokens       a <break> c c c <eod>
        counts       0 0       1 2 3 0

        Args:
          tokens: adjacent ones.
          before: the count of the token before them.
        """
        c = self.config
        if not c.image_positions:
            return None
        is_code = (tokens >= c.first_code) & (tokens < c.first_code + c.num_codes)
        index = jnp.arange(tokens.shape[1])
        last = jax.lax.cummax(jnp.where(is_code, -1 - before, index), axis=1)
        return jnp.where(is_code, index - last, 0)

    def _embed(
        self, tokens: _Tokens, positions: _Tokens, codes: _Tokens | None
    ) -> tuple[_Hidden, Rotary]:
        x = look_up(self.embedding, tokens).astype(jnp.float32)
        if codes is not None:  # more codes than an image has only in wrong input
            place = jnp.clip(codes - 1, 0, self.config.image_length - 1)
            added = look_up(self.image_position_embedding, place, "position")
            x = x + jnp.where(codes[..., None] > 0, added, 0)
        if self.config.position == "learned":
            x = x + look_up(self.position_embedding, positions, "position")
        x = self.dropout(x, deterministic=not self.has_rng("dropout"))
        return x, make_rotary(self.config, positions)

    def _layer(self, i: int, method: str, *args: Any) -> tuple[_Hidden, LayerCache]:
        """Runs block `i`, with scan a slice of the stacked parameters."""
        if not self.config.scan_layers:
            return getattr(self.layers[i], method)(*args)
        stacked = self.variables["params"]["layers"]
        params = jax.tree.map(lambda x: x[i], stacked)
        block: Any = Block(self.config, parent=None)
        return block.apply({"params": params}, *args, method=method)

    def _logits(
        self,
        x: Float[Array, "batch d_model"],
        head: Float[Array, "_ _"] | None = None,
    ) -> _Logits:
        hidden = self.output_norm(x)
        c = self.config
        if head is not None and c.outputs_first:
            return multiply_panels(hidden, head, c.dtype)
        if head is None:
            head = jnp.asarray(self.embedding.T if c.tie_embeddings else self.head)
        if c.outputs_first:
            return contract("vd,bd->vb", head.T, hidden, c.dtype).T
        return contract("bd,dv->bv", hidden, head, c.dtype)


def init_params(config: ModelConfig, key: Array, *, boxed: bool = False) -> Params:
    """Initial float32 parameters.

    Args:
      config: of the model.
      key: JAX random key.
      boxed: keep the logical axis names around every array (`nn.unbox` removes them).
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = Transformer(config).init(key, tokens, tokens, tokens)["params"]
    return params if boxed else nn.unbox(params)


def abstract_params(config: ModelConfig) -> Params:
    """Boxed shapes of the parameters, with logical axes; allocates nothing."""
    shapes = _trace_shapes(config, jax.sharding.get_abstract_mesh())
    return jax.tree.map(lambda shape: shape, shapes)  # the caller's own dicts


@functools.lru_cache(maxsize=16)
def _trace_shapes(config: ModelConfig, mesh: jax.sharding.AbstractMesh) -> Params:
    """Tracing a large model takes seconds; a training asks for its shapes repeatedly."""
    del mesh  # in which it is called: part of the key
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), boxed=True))


def fit_image_positions(params: Params, config: ModelConfig) -> Params:
    """Weights with the positions within images that `config` wants.

    Those of another number of codes are interpolated in two dimensions, so that a model
    can go on with larger images; where there are none yet, they start at zero.

    Raises:
      ValueError: they cannot be interpolated, as the images are not square.
    """
    name, wanted = "image_position_embedding", (config.image_length, config.d_model)
    table = params.get(name)
    if not config.image_positions or (table is not None and len(table) == wanted[0]):
        return params
    if table is None:
        return {**params, name: jnp.zeros(wanted)}
    old, new = (math.isqrt(length) for length in (len(table), wanted[0]))
    if old**2 != len(table) or new**2 != wanted[0]:
        raise ValueError(
            f"the initial weights have positions for images of {len(table)} codes, and "
            f"{wanted[0]} are wanted: only those of square images can be interpolated; "
            "use the tokenizer of these weights"
        )
    grid = jnp.asarray(table).reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[2]), "linear")
    return {**params, name: grid.reshape(wanted)}


def count_params(params: Params) -> int:
    """Number of parameters, of arrays or of shapes, boxed or not."""
    return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(params)))


def head_weights(params: Params, config: ModelConfig) -> Float[Array, "d_model vocab"]:
    """The matrix that turns hidden states into logits.

    The barrier keeps XLA from folding the transpose into the matmul of the gradient,
    for which its CPU backend has no bfloat16 kernel.
    """
    if config.tie_embeddings:
        return jax.lax.optimization_barrier(params["embedding"].T)
    return params["head"]


def slice_head(
    params: Params, config: ModelConfig, start: int, stop: int
) -> Float[Array, "d_model ids"] | Float[Array, "panels d_model width"]:
    """The columns of the head for the tokens `start` to `stop`; see `outputs_first`."""
    if config.tie_embeddings:
        columns = params["embedding"][start:stop].T
    else:
        columns = params["head"][:, start:stop]
    return to_panels(columns, 1) if config.outputs_first else columns


def compute_logits(
    params: Params, config: ModelConfig, hidden: Float[Array, "batch length d_model"]
) -> Float[Array, "batch length vocab"]:
    """Float32 logits of every position; training uses the chunked loss instead."""
    head = head_weights(params, config)
    return contract("bld,dv->blv", hidden, head, config.dtype)


def unstack_layers(params: Params) -> Params:
    """Parameters of a scanned model -> of the same model unrolled."""
    if "layers" not in params:
        return params
    rest = {name: value for name, value in params.items() if name != "layers"}
    num_layers = jax.tree.leaves(params["layers"])[0].shape[0]
    unrolled = {
        f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(num_layers)
    }
    return rest | unrolled


def stack_layers(params: Params) -> Params:
    """Parameters of an unrolled model -> of the same model scanned."""
    layers = [name for name in params if name.startswith("layers_")]
    rest = {name: value for name, value in params.items() if name not in layers}
    trees = [params[f"layers_{i}"] for i in range(len(layers))]
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *trees)}


def prepare_decoding(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The fastest form of a model for decoding; call once, outside the loop.

    Layers are unrolled, and the weights cast to the compute dtype, so that each step
    reads them in that size. On a CPU, decoding is always float32 (a bfloat16 matmul
    with one row is tens of times slower there), with kernels in panels, see
    `ModelConfig.outputs_first`.
    """
    on_cpu = current_platform() == "cpu"
    dtype = "float32" if on_cpu else config.dtype
    turn = on_cpu and not config.outputs_first
    config = dataclasses.replace(
        config,
        scan_layers=False,
        remat="none",
        compute_dtype=dtype,
        outputs_first=on_cpu or config.outputs_first,
    )
    names = {"kernel", "embedding", "head"}

    def cast(path: Any, x: Array) -> Array:
        if turn and path[-1].key == "kernel":
            x = to_panels(jnp.asarray(x), num_inputs_of(path[-2].key))
        return x.astype(dtype) if path[-1].key in names else jnp.asarray(x)

    return config, jax.tree_util.tree_map_with_path(cast, unstack_layers(params))


RACM3 = Transformer
