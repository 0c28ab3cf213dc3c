"""Keys and values of the tokens that were read, so that decoding reads each once.

row 0:  k0 k1 k2 k3 .  .  .     length 4: the next token is written at 4
row 1:  k0 k1 ?  ?  .  .  .     length 2: ? came from right padding, is never
                                attended to, and is overwritten next

Behind a shared prefix (the retrieved documents, read once for all samples and for both
streams of guidance) the rows hold only what is their own:

prefix:  p0 p1 p2          row 0:  k0 k1 .      reads p0 p1 p2, then k0 k1
                           row 1:  k0 .  .      sees 1 of the prefix: p0, then k0
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
    """Keys and values of one layer, each as its product reads it: no pass turns them."""

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
        """Puts each row's tokens at its own places; places past the end are dropped."""

        # Row by row, so that the compiler sees that no row's places are another's: it
        # would send all new tokens to all devices that hold some of the rows.
        def put(axis: int, rows: Array, values: Array) -> Array:
            def put_in_row(row: Array, value: Array, places: Array) -> Array:
                at = (slice(None),) * axis + (places,)
                return row.at[at].set(value, mode="drop", unique_indices=True)

            return jax.vmap(put_in_row)(rows, values, write_at)

        return LayerCache(k=put(2, self.k, new.k), v=put(1, self.v, new.v))

    def pad(self, max_length: int) -> LayerCache:
        """Room for `max_length` tokens a row."""
        none, more = (0, 0), (0, max_length - self.v.shape[2])
        return LayerCache(
            k=jnp.pad(self.k, (none, none, none, more)),
            v=jnp.pad(self.v, (none, none, more, none)),
        )


@flax.struct.dataclass
class Prefix:
    """What several rows have read in common.

    The rows of a prefix are neighbours: of 2 prefixes and 6 rows, 0 1 2 read the first.

    Attributes:
      layers: keys and values of the prefixes.
      visible: how many of its prefix's tokens each row reads.
    """

    layers: tuple[LayerCache, ...]
    visible: Int32[Array, " batch"]


@flax.struct.dataclass
class Cache:
    """A pytree: one `LayerCache` a layer, and how many tokens each row has of its own.

    A tuple over layers, not one stacked array: slicing a stack copies it each step.
    """

    layers: tuple[LayerCache, ...]
    length: Int32[Array, " batch"]
    prefix: Prefix | None = None

    @property
    def max_length(self) -> int:
        """How many tokens a row can hold."""
        return self.layers[0].v.shape[2]

    def advance(self, counts: Int[Array, " batch"]) -> Cache:
        """So many more tokens of each row, which lie there already, count as read."""
        return self.replace(length=self.length + counts)  # pyright: ignore

    def repeat(self, num_samples: int) -> Cache:
        """Each row `num_samples` times, neighbours: rows a b -> a a a b b b."""
        repeat = functools.partial(jnp.repeat, repeats=num_samples, axis=0)
        prefix = self.prefix
        if prefix is not None:  # its keys and values are shared, not repeated
            prefix = Prefix(prefix.layers, repeat(prefix.visible))
        layers = jax.tree.map(repeat, self.layers)
        return Cache(layers=layers, length=repeat(self.length), prefix=prefix)


def make_cache(config: ModelConfig, batch: int, max_length: int) -> Cache:
    """An empty cache.

    Raises:
      ValueError: if `max_length` exceeds the model's.
    """
    if max_length > config.max_length:
        raise ValueError(
            f"a cache of max_length={max_length} exceeds the model's max_length="
            f"{config.max_length}; shorten the prompt or the generation"
        )
    shape = (batch, max_length, config.kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, config.dtype)
    empty = LayerCache.of(zeros, zeros)
    return Cache(
        layers=(empty,) * config.num_layers, length=jnp.zeros(batch, jnp.int32)
    )
