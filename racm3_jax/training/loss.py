"""The generator's loss: weighted cross-entropy, computed in chunks of a row.

Logits of a whole batch are large (16 rows of 4096 ids over 65,536 words are 17 GB in
float32), so they exist for one chunk of positions at a time, and the gradient is formed
in the same visit instead of computing the logits a second time in the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from racm3_jax.sharding import constrain_rows
from racm3_jax.training.step import LossFn, Metrics
from racm3_jax.vocab import Vocab


@dataclasses.dataclass(frozen=True)
class GeneratorLossConfig:
    """How the generator's loss is formed.

    Attributes:
      z_loss: weight of the squared log-partition (Chameleon, section 2.3: 1e-5), which
        keeps logits from drifting; 0 turns it off.
      chunk_length: positions of a row whose logits exist at a time; 0: the whole row.
    """

    z_loss: float = 0.0
    chunk_length: int = 64

    def __post_init__(self) -> None:
        if self.z_loss < 0 or self.chunk_length < 0:
            raise ValueError(
                "loss.z_loss and loss.chunk_length must be >= 0; got "
                f"{self.z_loss} and {self.chunk_length}"
            )


class TokenLosses(NamedTuple):
    """What `chunked_cross_entropy` returns.

    Attributes:
      total: sum over tokens of weight x (nll + z_loss x log_partition^2), in nats; the
        only field through which gradients flow.
      nll: negative log-likelihood of each target, in nats.
      correct: True where no id is more likely than the target.
    """

    total: Float[Array, ""]
    nll: Float[Array, "batch length"]
    correct: Bool[Array, "batch length"]


def chunked_cross_entropy(
    hidden: Float[Array, "batch length d_model"],
    head: Float[Array, "d_model vocab"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    chunk_length: int = 64,
    z_loss: float = 0.0,
) -> TokenLosses:
    """Cross-entropy of `hidden @ head` against `targets`, without keeping logits.

    Chunks run along the length, never the batch, so rows stay where they are sharded.
    Products are computed in the dtype of `hidden`; logits, softmax, sums and the
    accumulated gradient of `head` are float32.

    At its peak it holds one chunk's logits and their gradient, 8 bytes x batch x
    chunk_length x vocab, and the float32 gradient of `head`: for 2 rows of 4096 over
    65,536 ids 67 MB and 671 MB (width 2560), where plain cross-entropy holds 4.3 GB.

    Args:
      hidden: the last layer's output, after its norm.
      head: output weights; float32 master weights are cast here.
      targets: vocabulary ids.
      weights: factor of each target in `total`; gradients do not flow into it.
      chunk_length: see `GeneratorLossConfig`.
      z_loss: see `GeneratorLossConfig`.
    """
    hidden = constrain_rows(hidden)
    length = targets.shape[1]
    chunk = min(chunk_length or length, length)
    padding = -length % chunk
    if padding:
        hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
        targets = jnp.pad(targets, ((0, 0), (0, padding)))
        weights = jnp.pad(weights, ((0, 0), (0, padding)))
    total, nll, correct = _cross_entropy(chunk, z_loss, hidden, head, targets, weights)
    return TokenLosses(total, nll[:, :length], correct[:, :length])


def _compute_losses(
    chunk: int,
    z_loss: float,
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
) -> tuple[Array, Array, Array]:
    matrix = head.astype(hidden.dtype)

    def visit(total: Array, xs: tuple[Array, ...]) -> tuple[Array, Any]:
        loss, nll, correct, _, _ = _chunk_losses(xs, matrix, z_loss)
        return total + loss, (nll, correct)

    xs = _split((hidden, targets, weights), chunk)
    total, stats = jax.lax.scan(visit, jnp.zeros((), jnp.float32), xs)
    return (total, *_join(stats))


def _compute_gradients(
    chunk: int,
    z_loss: float,
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    """The losses, and both gradients of `total` as residuals."""
    matrix = head.astype(hidden.dtype)

    def visit(carry: tuple[Array, Array], xs: tuple[Array, ...]) -> tuple[Any, Any]:
        total, d_head = carry
        x, ids, w = xs
        loss, nll, correct, logits, log_partition = _chunk_losses(xs, matrix, z_loss)
        probability = jnp.exp(logits - log_partition[..., None])
        scale = w * (1.0 + 2.0 * z_loss * log_partition)
        d_logits = probability * scale[..., None] - jnp.where(
            _one_hot(ids, logits), w[..., None], 0.0
        )
        # Both operands in the matmul's dtype: a mixed dot is slow on every back end.
        d_logits = d_logits.astype(x.dtype)
        d_x = jnp.einsum(
            "blv,dv->bld", d_logits, matrix, preferred_element_type=jnp.float32
        )
        d_head += jnp.einsum(
            "bld,blv->dv", x, d_logits, preferred_element_type=jnp.float32
        )
        d_x = constrain_rows(d_x.astype(x.dtype))
        return (total + loss, d_head), (nll, correct, d_x)

    xs = _split((hidden, targets, weights), chunk)
    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
    (total, d_head), stats = jax.lax.scan(visit, start, xs)
    nll, correct, d_hidden = _join(stats)
    return (total, nll, correct), (d_hidden, d_head.astype(head.dtype))


def _scale_gradients(
    chunk: int, z_loss: float, residuals: tuple[Array, Array], cotangents: Any
) -> tuple[Array, Array, None, None]:
    del chunk, z_loss
    scale = cotangents[0]
    d_hidden, d_head = ((scale * d).astype(d.dtype) for d in residuals)
    return d_hidden, d_head, None, None


_cross_entropy = jax.custom_vjp(_compute_losses, nondiff_argnums=(0, 1))
_cross_entropy.defvjp(_compute_gradients, _scale_gradients)


def _chunk_losses(
    xs: tuple[Array, ...], matrix: Array, z_loss: float
) -> tuple[Array, Array, Array, Array, Array]:
    x, ids, weights = map(constrain_rows, xs)
    logits = jnp.einsum("bld,dv->blv", x, matrix, preferred_element_type=jnp.float32)
    highest = logits.max(axis=-1)
    log_partition = highest + jnp.log(jnp.exp(logits - highest[..., None]).sum(axis=-1))
    # A masked sum instead of a gather, which would collect a sharded vocabulary.
    target_logit = jnp.where(_one_hot(ids, logits), logits, 0.0).sum(axis=-1)
    nll = log_partition - target_logit
    loss = (weights * (nll + z_loss * jnp.square(log_partition))).sum()
    return loss, nll, target_logit >= highest, logits, log_partition


def _one_hot(ids: Array, logits: Array) -> Array:
    return ids[..., None] == jnp.arange(logits.shape[-1], dtype=ids.dtype)


def _split(arrays: Any, chunk: int) -> Any:
    """`[batch, length, ...] -> [chunks, batch, chunk, ...]`."""

    def split(x: Array) -> Array:
        batch, length, *rest = x.shape
        return x.reshape(batch, length // chunk, chunk, *rest).swapaxes(0, 1)

    return jax.tree.map(split, arrays)


def _join(arrays: Any) -> Any:
    """`[chunks, batch, chunk, ...] -> [batch, length, ...]`."""

    def join(x: Array) -> Array:
        chunks, batch, chunk, *rest = x.shape
        return x.swapaxes(0, 1).reshape(batch, chunks * chunk, *rest)

    return jax.tree.map(join, arrays)


def make_generator_loss(
    apply_hidden: Callable[[Any, Array, Array, Array], Array],
    head_weights: Callable[[Any], Array],
    vocab: Vocab,
    config: GeneratorLossConfig | None = None,
) -> LossFn:
    """The loss over a `types.Batch`: a mean over targets, weighted by `loss_weights`.

    With weight 1 on the main document and alpha on retrieved ones this is RA-CM3's
    L = -log p(x | m) - alpha log p(m) (arXiv 2211.12561, section 3.3), divided by the
    sum of all weights in the batch.

    Args:
      apply_hidden: `(params, inputs, positions, segment_ids) -> hidden[b, l, d_model]`.
      head_weights: `params -> [d_model, vocab]`.
      vocab: tells text targets from image targets in the metrics.
      config: see `GeneratorLossConfig`.
    """
    config = config or GeneratorLossConfig()

    def loss_fn(
        params: Any, batch: Any, key: Array, step: Array
    ) -> tuple[Array, Metrics]:
        del key, step
        hidden = apply_hidden(params, batch.inputs, batch.positions, batch.segment_ids)
        losses = chunked_cross_entropy(
            hidden,
            head_weights(params),
            batch.targets,
            batch.loss_weights,
            chunk_length=config.chunk_length,
            z_loss=config.z_loss,
        )
        weight = batch.loss_weights.sum()
        loss = losses.total / jnp.maximum(weight, 1e-9)
        return loss, compute_generator_metrics(losses, batch, vocab)

    return loss_fn


def compute_generator_metrics(losses: TokenLosses, batch: Any, vocab: Vocab) -> Metrics:
    """Sums and weights of what is logged, over a `types.Batch` of device arrays.

    `loss` is weighted as in training, without z-loss. All others count each target
    with a loss weight > 0 once: `main_loss`, `retrieved_loss`, and of the main document
    `text_loss`, `image_loss`, `text_accuracy`, `image_accuracy`, of the retrieved ones
    `retrieved_text_loss`, `retrieved_image_loss`. `tokens` is the number of inputs that
    are no padding, `row_fill` their share.
    """
    counted = batch.loss_weights > 0
    main = counted & batch.is_main
    retrieved = counted & ~batch.is_main
    text = main & vocab.is_text(batch.targets)
    image = main & vocab.is_image(batch.targets)

    def mean(values: Array, mask: Array) -> tuple[Array, Array]:
        mask = mask.astype(jnp.float32)
        return (values * mask).sum(), mask.sum()

    filled = batch.segment_ids > 0
    num_tokens = filled.sum().astype(jnp.float32)
    return {
        "loss": ((losses.nll * batch.loss_weights).sum(), batch.loss_weights.sum()),
        "main_loss": mean(losses.nll, main),
        "retrieved_loss": mean(losses.nll, retrieved),
        "text_loss": mean(losses.nll, text),
        "image_loss": mean(losses.nll, image),
        "retrieved_text_loss": mean(
            losses.nll, retrieved & vocab.is_text(batch.targets)
        ),
        "retrieved_image_loss": mean(
            losses.nll, retrieved & vocab.is_image(batch.targets)
        ),
        "text_accuracy": mean(losses.correct, text),
        "image_accuracy": mean(losses.correct, image),
        "tokens": (num_tokens, jnp.ones(())),
        "row_fill": (num_tokens, jnp.float32(filled.size)),
    }
