"""From logits to one token per row: guidance, temperature, top-k, top-p, min-p, sampling.

Pure functions of arrays. `LogitSettings` are traced, so that changing them never
recompiles. Nothing is sorted: top-k and top-p look for a *threshold*, bit by bit (32
masked sums, exact), which is several times faster than sorting a vocabulary on a CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32


class LogitSettings(NamedTuple):
    """The traced fields of `SamplingConfig`, by the same names; see there."""

    temperature: Float[Array, ""] | float = 1.0
    top_k: Int[Array, ""] | int = 0
    top_p: Float[Array, ""] | float = 1.0
    min_p: Float[Array, ""] | float = 0.0
    guidance: Float[Array, ""] | float = 1.0
    contrastive_k: Int[Array, ""] | int = 0
    contrastive_alpha: Float[Array, ""] | float = 0.6

    @classmethod
    def of(cls, config: Any) -> LogitSettings:
        """The fields of these names as scalars of int32 or float32."""
        return cls(
            *(
                jnp.asarray(
                    getattr(config, name),
                    jnp.int32 if isinstance(default, int) else jnp.float32,
                )
                for name, default in cls._field_defaults.items()
            )
        )


def order_bits(values: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Float32 -> unsigned integers in the same order (-inf lowest, +inf highest)."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def keep_heaviest(
    values: Float[Array, "batch vocab"],
    weights: Float[Array, "batch vocab"],
    target: Float[Array, ""] | float,
) -> Bool[Array, "batch vocab"]:
    """Marks the fewest highest values of each row whose weights sum to `target` or more.

    Equal values are kept or dropped together, so ties can keep a few more. A row whose
    weights do not reach the target is kept completely.
    """
    ordered = order_bits(values)
    target = jnp.maximum(target, jnp.finfo(jnp.float32).tiny)

    def raise_threshold(i, threshold):
        raised = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        kept = jnp.where(ordered >= raised[:, None], weights, 0.0)
        return jnp.where(kept.sum(-1) >= target, raised, threshold)

    lowest = jnp.zeros(values.shape[:1], jnp.uint32)
    threshold = jax.lax.fori_loop(0, 32, raise_threshold, lowest)
    return ordered >= threshold[:, None]


def keep_top_k(
    logits: Float[Array, "batch vocab"], top_k: Int[Array, ""] | int
) -> Float[Array, "batch vocab"]:
    """Sets all but the k highest logits of each row to -inf; 0 keeps everything."""

    def keep(logits):
        ones = jnp.ones_like(logits)
        return jnp.where(
            keep_heaviest(logits, ones, jnp.float32(top_k)), logits, -jnp.inf
        )

    return jax.lax.cond(jnp.asarray(top_k) > 0, keep, lambda x: x, logits)


def keep_top_p(
    logits: Float[Array, "batch vocab"], top_p: Float[Array, ""] | float
) -> Float[Array, "batch vocab"]:
    """Keeps the nucleus: the fewest most probable tokens that hold `top_p` of the mass.

    The most probable token is always kept; 1 keeps everything (Holtzman et al.,
    arXiv 1904.09751, section 3.1).
    """

    def keep(logits):
        probabilities = jax.nn.softmax(logits, axis=-1)
        return jnp.where(
            keep_heaviest(probabilities, probabilities, top_p), logits, -jnp.inf
        )

    return jax.lax.cond(jnp.asarray(top_p) < 1, keep, lambda x: x, logits)


def keep_min_p(
    logits: Float[Array, "batch vocab"], min_p: Float[Array, ""] | float
) -> Float[Array, "batch vocab"]:
    """Keeps tokens of at least `min_p` times the largest probability of their row.

    The most probable token is always kept; 0 keeps everything, bit for bit (Nguyen et
    al., arXiv 2407.01082, section 3).
    """
    threshold = logits.max(-1, keepdims=True) + jnp.log(jnp.asarray(min_p, jnp.float32))
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def guide(
    logits: Float[Array, "batch vocab"],
    unconditional: Float[Array, "batch vocab"],
    weight: Float[Array, ""] | float,
) -> Float[Array, "batch vocab"]:
    """Classifier-free guidance: `unconditional + weight * (logits - unconditional)`.

    Written from the conditional side, so that weight 1 gives `logits` bit for bit
    (CM3Leon, arXiv 2309.02591, section 3.2).
    """
    return logits + (weight - 1) * (logits - unconditional)


def contrast(
    logits: Float[Array, "batch vocab"],
    unconditional: Float[Array, "batch vocab"],
    k: Int[Array, ""] | int,
    alpha: Float[Array, ""] | float,
) -> Float[Array, "batch vocab"]:
    """Contrastive decoding top-k (CD-K; CM3Leon, arXiv 2309.02591, section 3.2).

    Keeps the tokens whose probability is at least `alpha` times the k-th largest, with
    the score `log p - log p_unconditional`.

    Args:
      logits: with the prompt; -inf where the grammar forbids a token.
      unconditional: without it.
      k: at least 1.
      alpha: above 0 and at most 1.
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    log_q = jax.nn.log_softmax(unconditional, axis=-1)
    highest = keep_heaviest(log_p, jnp.ones_like(log_p), jnp.float32(k))
    threshold = jnp.where(highest, log_p, jnp.inf).min(-1, keepdims=True)
    # With fewer than k possible tokens the threshold is -inf, which must not let -inf in.
    keep = (log_p >= threshold + jnp.log(alpha)) & (log_p > -jnp.inf)
    return jnp.where(keep, log_p - log_q, -jnp.inf)


def filter_logits(
    logits: Float[Array, "batch vocab"], settings: LogitSettings
) -> Float[Array, "batch vocab"]:
    """Temperature, then top-k, top-p and min-p; temperature 0 keeps only the maxima."""
    temperature = jnp.asarray(settings.temperature, jnp.float32)
    greedy = temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)
    filtered = keep_top_p(keep_top_k(scaled, settings.top_k), settings.top_p)
    filtered = keep_min_p(filtered, settings.min_p)
    best = jnp.where(logits >= logits.max(-1, keepdims=True), logits, -jnp.inf)
    return jnp.where(greedy, best, filtered)


def sample_tokens(
    keys: Key[Array, " batch"],
    logits: Float[Array, "batch vocab"],
    settings: LogitSettings,
) -> Int[Array, " batch"]:
    """Samples one token per row, each row with its own key.

    A row's token depends on its key and its logits only, never on the other rows.
    Temperature 0 takes the first maximum.
    """
    filtered = filter_logits(logits, settings)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    noise = jnp.where(jnp.asarray(settings.temperature) == 0, 0.0, noise)
    return jnp.argmax(filtered + noise, axis=-1).astype(jnp.int32)
