"""Keys and values of the tokens that were read, so that decoding reads each once.

row 0:  k0 k1 k2 k3 .  .  .     length 4: the next token is written at 4
row 1:  k0 k1 ?  ?  .  .  .     length 2: ? came from right padding, is never
                                attended to, and is overwritten next
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from racm3_jax.model.config import ModelConfig


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer, heads before positions (the order of the dots)."""

    k: Float[Array, "batch kv_heads max_length head_dim"]
    v: Float[Array, "batch kv_heads max_length head_dim"]

    def write(
        self,
        k: Float[Array, "batch length kv_heads head_dim"],
        v: Float[Array, "batch length kv_heads head_dim"],
        write_at: Int[Array, "batch length"],
    ) -> LayerCache:
        """Puts each row's tokens at its own places; places past the end are dropped."""
        rows = jnp.arange(k.shape[0])[:, None]
        return LayerCache(
            k=self.k.at[rows, :, write_at].set(k, mode="drop", unique_indices=True),
            v=self.v.at[rows, :, write_at].set(v, mode="drop", unique_indices=True),
        )

    def pad(self, max_length: int) -> LayerCache:
        """Room for `max_length` tokens a row."""
        room = ((0, 0), (0, 0), (0, max_length - self.k.shape[2]), (0, 0))
        return LayerCache(k=jnp.pad(self.k, room), v=jnp.pad(self.v, room))


@flax.struct.dataclass
class Cache:
    """A pytree: one `LayerCache` a layer, and how many tokens each row has.

    A tuple over layers, not one stacked array: slicing a stack copies it each step.
    """

    layers: tuple[LayerCache, ...]
    length: Int32[Array, " batch"]

    @property
    def max_length(self) -> int:
        """How many tokens a row can hold."""
        return self.layers[0].k.shape[2]

    def repeat(self, num_samples: int) -> Cache:
        """Each row `num_samples` times, neighbours: rows a b -> a a a b b b."""
        return jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=0), self)


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
    shape = (batch, config.kv_heads, max_length, config.head_dim)
    empty = LayerCache(
        k=jnp.zeros(shape, config.compute_dtype),
        v=jnp.zeros(shape, config.compute_dtype),
    )
    return Cache(
        layers=(empty,) * config.num_layers, length=jnp.zeros(batch, jnp.int32)
    )
