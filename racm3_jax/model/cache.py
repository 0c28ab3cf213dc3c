"""The KV cache: keys and values of the tokens read so far.

row 0:  k0 k1 k2 k3 .  .  .     length 4: the next token is written at 4
row 1:  k0 k1 ?  ?  .  .  .     length 2: ? came from right padding, is never
                                attended to, and is overwritten next

After a shared prefix (the retrieved documents, read once for all samples and for both
streams of guidance) the rows contain only their own tokens:

prefix:  p0 p1 p2          row 0:  k0 k1 .      attends to p0 p1 p2, then k0 k1
                           row 1:  k0 .  .      attends to 1 of the prefix: p0, then k0
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from racm3_jax.model.config import ModelConfig


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer, in the layout of their matmuls (no transposes)."""

    k: Float[Array, "batch kv_heads head_dim max_length"]
    v: Float[Array, "batch kv_heads max_length head_dim"]

    @classmethod
    def of(
        cls,
        k: Float[Array, "batch length kv_heads head_dim"],
        v: Float[Array, "batch length kv_heads head_dim"],
    ) -> LayerCache:
        """Keys and values as a layer computes them."""
        return cls(k=jnp.moveaxis(k, 1, 3), v=jnp.moveaxis(v, 1, 2))

    def write(
        self, new: LayerCache, write_at: Int[Array, "batch length"]
    ) -> LayerCache:
        """Writes each row's tokens at its positions; drops those past the end."""

        # Row by row, so that the compiler knows that rows are independent: otherwise it
        # would send all new tokens to all devices that have some of the rows.
        def put(axis: int, rows: Array, values: Array) -> Array:
            def put_in_row(row: Array, value: Array, places: Array) -> Array:
                at = (slice(None),) * axis + (places,)
                return row.at[at].set(value, mode="drop", unique_indices=True)

            return jax.vmap(put_in_row)(rows, values, write_at)

        return LayerCache(k=put(2, self.k, new.k), v=put(1, self.v, new.v))

    def pad(self, max_length: int) -> LayerCache:
        """Pads to `max_length` tokens per row."""
        none, more = (0, 0), (0, max_length - self.v.shape[2])
        return LayerCache(
            k=jnp.pad(self.k, (none, none, none, more)),
            v=jnp.pad(self.v, (none, none, more, none)),
        )


@flax.struct.dataclass
class Prefix:
    """Prefixes shared by several rows.

    The rows of a prefix are adjacent: with 2 prefixes and 6 rows, 0 1 2 use the first.

    Attributes:
      layers: keys and values of the prefixes.
      visible: number of prefix tokens that each row attends to.
    """

    layers: tuple[LayerCache, ...]
    visible: Int32[Array, " batch"]


@flax.struct.dataclass
class Cache:
    """A pytree: one `LayerCache` per layer, and the number of each row's own tokens.

    A tuple over layers, not one stacked array: slicing a stack copies it each step.
    `codes` counts, for each own token, the adjacent image codes that end with it; only
    for models with `image_positions`.
    """

    layers: tuple[LayerCache, ...]
    length: Int32[Array, " batch"]
    prefix: Prefix | None = None
    codes: Int32[Array, "batch max_length"] | None = None

    @property
    def max_length(self) -> int:
        """Maximum number of tokens per row."""
        return self.layers[0].v.shape[2]

    def last_codes(self) -> Int32[Array, "batch 1"] | int:
        """The count of each row's last token."""
        if self.codes is None:
            return 0
        last = jnp.maximum(self.length - 1, 0)[:, None]
        found = jnp.take_along_axis(self.codes, last, axis=1)
        return jnp.where(self.length[:, None] > 0, found, 0)

    def write_codes(
        self,
        counts: Int[Array, "batch length"] | None,
        write_at: Int[Array, "batch length"],
    ) -> Int32[Array, "batch max_length"] | None:
        """The counts with those of new tokens; drops those past the end."""
        if self.codes is None or counts is None:
            return None
        return jax.vmap(lambda row, new, at: row.at[at].set(new, mode="drop"))(
            self.codes, counts, write_at
        )

    def advance(self, counts: Int[Array, " batch"]) -> Cache:
        """Marks the next `counts` tokens of each row, already written, as read."""
        return self.replace(length=self.length + counts)  # pyright: ignore

    def repeat(self, num_samples: int) -> Cache:
        """Repeats each row `num_samples` times: rows a b -> a a a b b b."""
        repeat = functools.partial(jnp.repeat, repeats=num_samples, axis=0)
        prefix = self.prefix
        if prefix is not None:  # its keys and values are shared, not repeated
            prefix = Prefix(prefix.layers, repeat(prefix.visible))
        layers, codes = jax.tree.map(repeat, (self.layers, self.codes))
        return Cache(layers, repeat(self.length), prefix, codes)


def make_cache(config: ModelConfig, batch: int, max_length: int) -> Cache:
    """An empty cache.

    Raises:
      ValueError: `max_length` exceeds the model's.
    """
    if max_length > config.max_length:
        raise ValueError(
            f"a cache of max_length={max_length} exceeds the model's max_length="
            f"{config.max_length}; shorten the prompt or the generation"
        )
    shape = (batch, max_length, config.kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, config.dtype)
    empty = LayerCache.of(zeros, zeros)
    codes = jnp.zeros((batch, max_length), jnp.int32)
    return Cache(
        layers=(empty,) * config.num_layers,
        length=jnp.zeros(batch, jnp.int32),
        codes=codes if config.image_positions else None,
    )
