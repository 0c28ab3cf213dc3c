"""The loss of CLIP training: images vs. texts, and queries vs. documents.

A batch holds pairs of documents (a, b) that belong together (the same nation, album,
page), no two pairs from the same group:

    contrast   image b  <->  text b                          (CLIP, arXiv 2103.00020, 2.3)
    retrieval  text a, 20% dropped   ->  document b          r(q, m) of RA-CM3 (arXiv
               image a, 20% dropped  ->  document b          2211.12561, section 3.1)
    image      image a, 20% dropped  ->  image b             (SupCon, arXiv 2004.11362)

where `document = normalise(text + image)` is what the memory stores, and the other
documents of the batch are negatives. Without groups, pair a document with itself: the
query dropout then makes the two sides differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Int32, Shaped, UInt8

from racm3_jax.documents.augmentation import (
    NO_AUGMENTATION,
    AugmentationConfig,
    augment_each,
)
from racm3_jax.retrieval.clip import (
    CLIP,
    CLIPConfig,
    count_kept_patches,
    normalise_images,
)

# Maximum scale of the logits in OpenAI's code.
MAX_LOG_SCALE = float(np.log(100.0))

Metrics = dict[str, tuple[Array, Array]]
LossFn = Callable[[Any, "PairBatch", Array, Array], tuple[Array, Metrics]]
# Tokens of pairs of documents, given by their numbers, with names of this batch alone.
Rename = Callable[
    [Int[np.ndarray, "pairs 2"], np.random.Generator],
    Int32[np.ndarray, "pairs 2 context_length"],
]


class PairBatch(TypedDict):
    """Pairs of documents; rows i of `a` and `b` belong together."""

    images_a: UInt8[Shaped, "pairs height width 3"]
    tokens_a: Int32[Shaped, "pairs context_length"]
    images_b: UInt8[Shaped, "pairs height width 3"]
    tokens_b: Int32[Shaped, "pairs context_length"]


@dataclasses.dataclass(frozen=True)
class CLIPLossConfig:
    """Weights of the terms.

    Attributes:
      contrast_weight: weight of images vs. texts.
      retrieval_weight: weight of queries vs. documents.
      image_weight: weight of images vs. images. With few groups, a query finds its
        document by the text, as one of the groups that were trained; this term trains
        what is alike in two images of any group.
      retrieval_temperature: divides similarities of queries and documents.
      max_pair_similarity: a query and its document that are more similar than this are
        not pulled closer. It keeps the documents of a group distinguishable: the
        strategy drops documents with a similarity above 0.9. If texts and images are
        orthogonal, the maximum is 0.71; 1 turns the limit off.
      separation_weight: weight of the mean squared similarity of query embeddings with
        document embeddings of the other modality. With `CLIPConfig.aligned_dims` it is of
        the numbers after those, and the contrast of those alone.
      query_drop: fraction of a query's tokens or patches that is dropped.
    """

    contrast_weight: float = 0.1
    retrieval_weight: float = 1.0
    image_weight: float = 0.0
    retrieval_temperature: float = 0.05
    max_pair_similarity: float = 0.6
    separation_weight: float = 20.0
    query_drop: float = 0.2

    def __post_init__(self) -> None:
        if self.retrieval_temperature <= 0:
            raise ValueError(
                "clip_loss.retrieval_temperature must be > 0; got "
                f"{self.retrieval_temperature}"
            )
        if not 0 <= self.query_drop < 1:
            raise ValueError(
                f"clip_loss.query_drop must be in [0, 1); got {self.query_drop}"
            )


def clip_loss(config: CLIPConfig, loss_config: CLIPLossConfig) -> LossFn:
    """Builds the training loss: (params, batch, key, step) -> (loss, metrics)."""
    dims = config.aligned_dims
    model: Any = CLIP(config)

    def encode_images(params: Any, images: Array, kept: Array | None) -> Array:
        embeddings = model.apply(
            {"params": params},
            normalise_images(images, config),
            kept,
            method=CLIP.encode_image,
        )
        return normalise(embeddings)

    def encode_texts(params: Any, tokens: Array) -> Array:
        return normalise(
            model.apply({"params": params}, tokens, method=CLIP.encode_text)
        )

    def loss_fn(
        params: Any, batch: PairBatch, key: Array, step: Array
    ) -> tuple[Array, Metrics]:
        del step
        drop, num_pairs = loss_config.query_drop, len(batch["tokens_a"])
        text_key, image_key = jax.random.split(key)
        query_tokens = drop_tokens_on_device(
            batch["tokens_a"], drop, config.end, text_key
        )
        texts = encode_texts(params, jnp.concatenate([query_tokens, batch["tokens_b"]]))
        query_text, text = texts[:num_pairs], texts[num_pairs:]
        kept = sample_kept_patches(num_pairs, config.num_patches, drop, image_key)
        query_image = encode_images(params, batch["images_a"], kept)
        image = encode_images(params, batch["images_b"], None)
        document = normalise(text + image)

        scale = jnp.exp(jnp.minimum(params["logit_scale"], MAX_LOG_SCALE))
        contrast, contrast_hits = info_nce(
            take_aligned(image, dims), take_aligned(text, dims), scale
        )
        scale = 1 / loss_config.retrieval_temperature
        cap = loss_config.max_pair_similarity
        by_text, text_hits = info_nce(query_text, document, scale, cap)
        by_image, image_hits = info_nce(query_image, document, scale, cap)
        by_alike, alike_hits = info_nce(query_image, image, scale, cap)
        across = (
            jnp.square(query_text[:, dims:] @ image[:, dims:].T)
            + jnp.square(query_image[:, dims:] @ text[:, dims:].T)
        ) / 2
        separation = across.mean()
        loss = (
            loss_config.contrast_weight * contrast
            + loss_config.retrieval_weight * (by_text + by_image) / 2
            + loss_config.image_weight * by_alike
            + loss_config.separation_weight * separation
        )
        values = {
            "loss": loss,
            "contrast_loss": contrast,
            "contrast_accuracy": contrast_hits,
            "across_similarity": separation**0.5,
            "image_loss": by_alike,
            "image_accuracy": alike_hits,
            "text_query_loss": by_text,
            "text_query_accuracy": text_hits,
            "image_query_loss": by_image,
            "image_query_accuracy": image_hits,
            "text_query_similarity": (query_text * document).sum(-1).mean(),
            "image_query_similarity": (query_image * document).sum(-1).mean(),
        }
        weight = jnp.asarray(num_pairs, jnp.float32)
        return loss, {name: (v * weight, weight) for name, v in values.items()}

    return loss_fn


def normalise(x: Float[Array, "rows d_embed"]) -> Float[Array, "rows d_embed"]:
    """Unit rows; a row of zeros stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))


def take_aligned(
    embeddings: Float[Array, "rows d_embed"], dims: int
) -> Float[Array, "rows aligned"]:
    """Unit rows of the first `dims` numbers, or all of them if 0."""
    return normalise(embeddings[:, :dims]) if dims else embeddings


def info_nce(
    queries: Float[Array, "n d_embed"],
    keys: Float[Array, "n d_embed"],
    scale: float | Float[Array, ""],
    max_similarity: float = float("inf"),
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Symmetric InfoNCE, row i with row i.

    Args:
      queries: unit rows.
      keys: unit rows.
      scale: inverse temperature.
      max_similarity: pairs above it are clipped to it, without gradient.

    Returns:
      The loss in nats, and the fraction of queries whose nearest key is their own.
    """
    similarities = queries @ keys.T
    is_pair = jnp.eye(len(similarities), dtype=bool)
    capped = jnp.minimum(similarities, jnp.where(is_pair, max_similarity, jnp.inf))
    logits, labels = scale * capped, jnp.arange(len(similarities))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)).mean() / 2
    return loss, (similarities.argmax(axis=1) == labels).mean()


def drop_tokens_on_device(
    tokens: Int[Array, "batch length"], drop: float, end: int, key: Array
) -> Int[Array, "batch length"]:
    """Drops each text token with probability `drop` and closes the gaps.

    `<start>` and `<end>` are always kept:

        <start> a b c d <end> 0 0   ->   <start> a c d <end> 0 0 0
    """
    if drop == 0:
        return tokens
    batch, length = tokens.shape
    place = jnp.arange(length)
    end_place = jnp.argmax(tokens == end, axis=1)[:, None]
    is_text = (place > 0) & (place < end_place)
    is_dropped = is_text & (jax.random.uniform(key, (batch, length)) < drop)
    # A stable sort by "dropped" moves the kept tokens forward, in order.
    order = jnp.argsort(is_dropped, axis=1, stable=True)
    moved = jnp.take_along_axis(tokens, order, axis=1)
    num_kept = length - is_dropped.sum(axis=1, keepdims=True)
    return jnp.where(place < num_kept, moved, 0)


def sample_kept_patches(
    batch: int, num_patches: int, drop: float, key: Array
) -> Int[Array, "batch kept"] | None:
    """Indices of the kept patches, ascending; None if all are kept."""
    num_kept = count_kept_patches(num_patches, drop)
    if num_kept == num_patches:
        return None
    noise = jax.random.uniform(key, (batch, num_patches))
    return jnp.sort(jnp.argsort(noise, axis=1)[:, :num_kept], axis=1)


def make_pair_batches(
    images: UInt8[np.ndarray, "documents height width 3"],
    tokens: Int32[np.ndarray, "documents context_length"],
    groups: Int[np.ndarray, " documents"],
    *,
    num_pairs: int,
    seed: int,
    start_step: int = 0,
    num_steps: int | None = None,
    augmentation: AugmentationConfig = NO_AUGMENTATION,
    rename: Rename | None = None,
) -> Iterator[PairBatch]:
    """Samples pairs of two documents of a group; step t depends only on `seed` and t.

    Every epoch visits all groups once, in a new order. A single document of a group is
    paired with itself.

    Args:
      images: of every document, all of the same size.
      tokens: of every document, from `CLIPTokenizer`.
      groups: equal numbers for documents that are correct results for each other.
      num_pairs: pairs (groups) per batch; at most the number of groups.
      seed: of order and sampling.
      start_step: the first step (for resuming).
      num_steps: ends after the batch of step `num_steps - 1`; None is endless.
      augmentation: of each image.
      rename: writes the texts of a batch with new names; its tokens replace `tokens`.

    Raises:
      ValueError: `num_pairs` is larger than the number of groups.
    """
    # Rows are cut to the longest text; context_length may be longer, for queries.
    tokens = tokens[:, : 1 + int(tokens.argmax(axis=1).max())]
    names, sizes = np.unique(groups, return_counts=True)
    if not 1 <= num_pairs <= len(names):
        raise ValueError(
            f"clip num_pairs is {num_pairs}, but the documents form {len(names)} groups; "
            f"it must be in 1..{len(names)}"
        )
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])
    steps_per_epoch = len(names) // num_pairs
    step = start_step
    while num_steps is None or step < num_steps:
        epoch, place = divmod(step, steps_per_epoch)
        order = np.random.default_rng((seed, 0, epoch)).permutation(len(names))
        chosen = order[place * num_pairs : (place + 1) * num_pairs]
        rng = np.random.default_rng((seed, 1, step))
        pairs = np.stack([_sample_pair(members[group], rng) for group in chosen])
        if rename is None:
            texts = tokens[pairs]
        else:
            texts = rename(pairs, np.random.default_rng((seed, 2, step)))
        yield {
            "images_a": augment_each(images[pairs[:, 0]], augmentation, rng),
            "tokens_a": texts[:, 0],
            "images_b": augment_each(images[pairs[:, 1]], augmentation, rng),
            "tokens_b": texts[:, 1],
        }
        step += 1


def _sample_pair(
    members: Int[np.ndarray, " members"], rng: np.random.Generator
) -> Int[np.ndarray, " 2"]:
    if len(members) == 1:
        return members.repeat(2)
    return rng.choice(members, 2, replace=False)
