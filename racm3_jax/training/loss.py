"""The generator's loss: weighted cross-entropy, computed in chunks of a row.

Logits of a whole batch are large (16 rows of 4096 tokens and a vocabulary of 65,536 are
17 GB in float32), so they exist for one chunk of positions at a time, and the gradient
is computed in the same pass instead of recomputing the logits in the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from racm3_jax.sharding import BATCH_AXES, constrain_rows, partition_spec
from racm3_jax.training.step import LossFn, Metrics
from racm3_jax.vocab import Vocab


@dataclasses.dataclass(frozen=True)
class GeneratorLossConfig:
    """Settings of the generator's loss.

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
    """Result of `chunked_cross_entropy`.

    Attributes:
      total: sum over tokens of weight x (nll + z_loss x log_partition^2), in nats; the
        only field through which gradients flow.
      nll: negative log-likelihood of each target, in nats.
      correct: True where no token is more likely than the target.
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

    Chunks are cut along the length, not the batch, so rows stay where they are sharded.
    Matmuls run in the dtype of `hidden`; logits, softmax, sums and the accumulated
    gradient of `head` are float32.

    Peak memory is one chunk's logits and their gradient, 8 bytes x batch x
    chunk_length x vocab, and the float32 gradient of `head`: for 2 rows of 4096 and a
    vocabulary of 65,536, 67 MB and 671 MB (width 2560), vs. 4.3 GB without chunks.

    Args:
      hidden: the last layer's output, after its norm.
      head: output weights; float32 master weights are cast here.
      targets: target tokens.
      weights: weight of each target in `total`; no gradient flows into it.
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


class _Place(NamedTuple):
    """How the operands are sharded, as mesh axes; all empty without a mesh.

    ```
    head [d_model, vocab] as P("fsdp", "tensor")
      embed   ("fsdp",)    gathered, before the first chunk
      vocab   ()           gathered in the same way
      split   ("tensor",)  every device computes the logits of its own vocabulary part
    rows    ("data", "fsdp")
    ```
    """

    rows: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    split: tuple[str, ...] = ()


def _find_place(head: Array) -> tuple[_Place, PartitionSpec]:
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names) or mesh.size == 1:
        return _Place(), PartitionSpec()
    spec = partition_spec("head", ("embed", "vocab"), head.shape, mesh)
    embed, vocab = (
        () if a is None else (a,) if isinstance(a, str) else a for a in spec
    )
    split = tuple(axis for axis in vocab if axis not in BATCH_AXES)
    vocab = tuple(axis for axis in vocab if axis in BATCH_AXES)
    return _Place(BATCH_AXES, embed, vocab, split), spec


def _over_the_mesh(
    compute: Callable[..., Any], makes_gradients: bool, arrays: tuple[Array, ...]
) -> Any:
    """Runs `compute(place, *arrays)` on each device's own rows.

    By `shard_map`, as the compiler would gather the head, and reduce its gradient over
    the devices, in every chunk: 64 times a step instead of once.
    """
    place, head = _find_place(arrays[1])
    if not place.rows:
        return compute(place, *arrays)
    rows = PartitionSpec(place.rows)
    losses = (PartitionSpec(), rows, rows)
    return jax.shard_map(
        functools.partial(compute, place),
        in_specs=(rows, head, rows, rows),
        out_specs=(losses, (rows, head)) if makes_gradients else losses,
        check_vma=False,
    )(*arrays)


def _compute_losses(
    chunk: int,
    z_loss: float,
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
) -> tuple[Array, Array, Array]:
    def compute(place: _Place, *arrays: Array) -> tuple[Array, Array, Array]:
        hidden, head, targets, weights = arrays
        matrix = _gather(head.astype(hidden.dtype), place)

        def visit(total: Array, xs: tuple[Array, ...]) -> tuple[Array, Any]:
            loss, nll, correct, _, _, _ = _chunk_losses(xs, matrix, z_loss, place)
            return total + loss, (nll, correct)

        xs = _split((hidden, targets, weights), chunk)
        total, stats = jax.lax.scan(visit, jnp.zeros((), jnp.float32), xs)
        return (_sum(total, place.rows), *_join(stats))

    return _over_the_mesh(compute, False, (hidden, head, targets, weights))


def _compute_gradients(
    chunk: int,
    z_loss: float,
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    """The losses, and both gradients of `total` as residuals."""

    def compute(place: _Place, *arrays: Array) -> tuple[Any, Any]:
        hidden, head, targets, weights = arrays
        matrix = _gather(head.astype(hidden.dtype), place)

        def visit(carry: tuple[Array, Array], xs: tuple[Array, ...]) -> tuple[Any, Any]:
            total, d_head = carry
            x, _, w = xs
            loss, nll, correct, logits, log_partition, is_target = _chunk_losses(
                xs, matrix, z_loss, place
            )
            probability = jnp.exp(logits - log_partition[..., None])
            scale = w * (1.0 + 2.0 * z_loss * log_partition)
            d_logits = probability * scale[..., None] - jnp.where(
                is_target, w[..., None], 0.0
            )
            # Both operands in the matmul's dtype: mixed dtypes are slow everywhere.
            d_logits = d_logits.astype(x.dtype)
            d_x = jnp.einsum(
                "blv,dv->bld", d_logits, matrix, preferred_element_type=jnp.float32
            )
            d_head += jnp.einsum(
                "bld,blv->dv", x, d_logits, preferred_element_type=jnp.float32
            )
            d_x = _sum(d_x, place.split).astype(x.dtype)
            return (total + loss, d_head), (nll, correct, d_x)

        xs = _split((hidden, targets, weights), chunk)
        start = (jnp.zeros((), jnp.float32), jnp.zeros(matrix.shape, jnp.float32))
        (total, d_head), stats = jax.lax.scan(visit, start, xs)
        nll, correct, d_hidden = _join(stats)
        d_head = _scatter(d_head, place).astype(head.dtype)
        return (_sum(total, place.rows), nll, correct), (d_hidden, d_head)

    return _over_the_mesh(compute, True, (hidden, head, targets, weights))


def _scale_gradients(
    chunk: int, z_loss: float, residuals: tuple[Array, Array], cotangents: Any
) -> tuple[Array, Array, None, None]:
    del chunk, z_loss
    scale = cotangents[0]
    d_hidden, d_head = ((scale * d).astype(d.dtype) for d in residuals)
    return d_hidden, d_head, None, None


_cross_entropy = jax.custom_vjp(_compute_losses, nondiff_argnums=(0, 1))
_cross_entropy.defvjp(_compute_gradients, _scale_gradients)


def _gather(head: Array, place: _Place) -> Array:
    """The whole head, or the full width for this device's part of the vocabulary."""
    for axis, names in enumerate((place.embed, place.vocab)):
        if names:
            head = jax.lax.all_gather(head, names, axis=axis, tiled=True)
    return head


def _scatter(d_head: Array, place: _Place) -> Array:
    """Reduces the gradient over all rows and keeps the shard of this device.

    Shards are the first axis during the reduction. Along the last axis a TPU would
    all-reduce everything and keep a slice, unless shards are multiples of 128.
    """
    for axis, names in enumerate((place.embed, place.vocab)):
        if names:
            size = jax.lax.axis_size(names)
            shape = d_head.shape
            parts = d_head.reshape(
                *shape[:axis], size, shape[axis] // size, *shape[axis + 1 :]
            )
            d_head = jax.lax.psum_scatter(jnp.moveaxis(parts, axis, 0), names)
    held = {*place.embed, *place.vocab}
    return _sum(d_head, tuple(name for name in place.rows if name not in held))


def _sum(x: Array, names: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, names) if names else x


def _chunk_losses(
    xs: tuple[Array, ...], matrix: Array, z_loss: float, place: _Place
) -> tuple[Array, Array, Array, Array, Array, Array]:
    x, ids, weights = xs
    logits = jnp.einsum("bld,dv->blv", x, matrix, preferred_element_type=jnp.float32)
    highest = logits.max(axis=-1)
    first = 0
    if place.split:
        highest = jax.lax.pmax(highest, place.split)
        first = jax.lax.axis_index(place.split) * logits.shape[-1]
    exponentials = jnp.exp(logits - highest[..., None]).sum(axis=-1)
    log_partition = highest + jnp.log(_sum(exponentials, place.split))
    # A masked sum instead of a gather: the target may be another device's.
    own = first + jnp.arange(logits.shape[-1], dtype=ids.dtype)
    is_target = ids[..., None] == own
    target_logit = _sum(jnp.where(is_target, logits, 0.0).sum(axis=-1), place.split)
    nll = log_partition - target_logit
    loss = (weights * (nll + z_loss * jnp.square(log_partition))).sum()
    return loss, nll, target_logit >= highest, logits, log_partition, is_target


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
      vocab: separates text targets from image targets in the metrics.
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
    """Sums and weights of the logged metrics of a `types.Batch` of device arrays.

    `loss` is weighted as in training, without z-loss. All others count each target
    with a loss weight > 0 once: `main_loss`, `retrieved_loss`; for the main document
    `text_loss`, `image_loss`, `text_accuracy`, `image_accuracy`; for the retrieved ones
    `retrieved_text_loss`, `retrieved_image_loss`. `tokens` is the number of inputs that
    are not padding, `row_fill` their fraction.
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
