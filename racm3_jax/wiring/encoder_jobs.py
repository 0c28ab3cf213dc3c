"""The training jobs of the encoders: the image tokenizer, and CLIP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Int, Int32

from racm3_jax import checkpoints
from racm3_jax.documents import batches as image_data
from racm3_jax.documents.images import resize_image
from racm3_jax.documents.invented_names import make_name
from racm3_jax.retrieval import clip as clip_model
from racm3_jax.retrieval import clip_loss as clip_objective
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.sharding import leader_first, local_rows
from racm3_jax.tokenizers import vqgan as vqgan_model
from racm3_jax.tokenizers import vqgan_loss as vqgan_objective
from racm3_jax.tokenizers.bpe import TextTokenizer
from racm3_jax.tokenizers.image import ImageTokenizer
from racm3_jax.training.processes import fetch_all
from racm3_jax.training.step import TrainState
from racm3_jax.wiring import heldout
from racm3_jax.wiring.corpora import (
    Pairs,
    build_augmentation,
    build_corpus,
    read_heldout,
    read_images,
    read_pairs,
)
from racm3_jax.wiring.job import Job, make_job, take_rows
from racm3_jax.wiring.parts import build_mesh, resolve
from racm3_jax.wiring.sections import TrainConfig, construct

# Number of held-out documents, one per group, for measuring the alignment.
_NUM_MEASURED = 1 << 14


def build_vqgan_job(config: Any, workdir: Path) -> Job:
    """Trains the image tokenizer; exports `workdir/vqgan`."""
    model_config = construct(vqgan_model.VQGANConfig, config.vqgan, "vqgan")
    loss_config = construct(
        vqgan_objective.VQGANLossConfig, config.vqgan_loss, "vqgan_loss"
    )
    mesh = build_mesh(config)
    rows = local_rows(mesh, config.batch_size)
    corpus, augmentation = build_corpus(config), build_augmentation(config)
    images = read_images(corpus, model_config.image_size, config.seed)

    params = None
    if config.codebook_images:
        params = vqgan_objective.init_vqgan_from_images(
            model_config,
            loss_config,
            jax.random.key(config.seed),
            images[:: max(1, len(images) // config.codebook_images)],
        )
    loss_fn = vqgan_objective.vqgan_loss(model_config, loss_config)

    def make(start_step: int) -> Iterator[Any]:
        batches = image_data.image_batches(
            images,
            config.batch_size,
            seed=config.seed,
            start_step=start_step,
            augmentation=augmentation,
        )
        return take_rows(batches, rows)

    def export(state: TrainState) -> None:
        params = checkpoints.round_to_half(fetch_all(state.params["vqgan"]))
        if jax.process_index() != 0:
            return
        ImageTokenizer(model_config, params).save(workdir / "vqgan", dtype="float16")

    evaluate = None
    train = construct(TrainConfig, config.train, "train")
    if train.eval_every:
        # Images without a text are evaluated, too.
        judged = [
            resize_image(image, model_config.image_size)
            for document in heldout.take(corpus, train.eval_documents)
            for image in document.images
        ]
        evaluate = heldout.judge_vqgan(
            config, mesh, loss_fn, model_config, judged, workdir
        )
    return make_job(
        config,
        mesh,
        lambda key: vqgan_objective.init_vqgan(model_config, loss_config, key),
        loss_fn,
        make,
        export,
        params=params,
        evaluate=evaluate,
        assigned=vqgan_objective.ASSIGNED if loss_config.codebook_decay else (),
    )


def build_clip_job(config: Any, workdir: Path) -> Job:
    """Trains the text tokenizer, unless `config.text_tokenizer.path` is set, and CLIP.

    Exports `workdir/text` and `workdir/clip`.
    """
    mesh = build_mesh(config)
    rows = local_rows(mesh, config.batch_size)
    corpus, augmentation = build_corpus(config), build_augmentation(config)
    rename_key, scale = config.get("rename_key", ""), config.get("aligned_scale", 1.0)
    clip_model.check_scale(scale, config.clip.get("aligned_dims", 0))
    pairs = read_pairs(corpus, config.clip.image_size, config.seed, rename_key)
    num_groups = len(np.unique(pairs.groups))
    if config.batch_size > num_groups:
        raise ValueError(
            f"config.batch_size is {config.batch_size}, but the training documents form "
            f"{num_groups} groups: give at most --config.batch_size={num_groups}"
        )
    text_tokenizer = _build_text_tokenizer(config, pairs.texts)
    tokenizer = clip_model.CLIPTokenizer(text_tokenizer, config.clip.context_length)
    model_config = construct(
        clip_model.CLIPConfig, config.clip, "clip", vocab_size=tokenizer.vocab_size
    )
    loss_config = construct(
        clip_objective.CLIPLossConfig, config.clip_loss, "clip_loss"
    )
    loss_fn = clip_objective.clip_loss(model_config.for_training(), loss_config)
    measured = read_heldout(corpus, _NUM_MEASURED, one_per_group=True)
    tokens = tokenizer.encode_batch(pairs.texts)

    def make(start_step: int) -> Iterator[Any]:
        batches = clip_objective.make_pair_batches(
            pairs.images,
            tokens,
            pairs.groups,
            num_pairs=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            augmentation=augmentation,
            rename=build_rename(pairs, tokenizer) if rename_key else None,
        )
        return take_rows(batches, rows)

    def export(state: TrainState) -> None:
        params = clip_model.scale_aligned(fetch_all(state.params), model_config, scale)
        params = checkpoints.round_to_half(params)
        if jax.process_index() != 0:
            return
        embedder = DocumentEmbedder(model_config, params, text_tokenizer)
        if len(measured) > 1:
            found = embedder.measure(measured)
            logging.info("alignment of texts and images: %s", found)
        embedder.save(workdir / "clip", dtype="float16")

    evaluate = None
    train = construct(TrainConfig, config.train, "train")
    if train.eval_every:
        judged = read_heldout(corpus, train.eval_documents)
        evaluate = heldout.judge_clip(config, mesh, loss_fn, tokenizer, corpus, judged)
    # After all checks: a refused training leaves its folder empty.
    with leader_first():
        if jax.process_index() == 0:
            text_tokenizer.save(workdir / "text" / "tokenizer.json")
            checkpoints.write_manifest(workdir / "text", {"kind": "text tokenizer"})
    return make_job(
        config,
        mesh,
        lambda key: clip_model.init_params(model_config, key),
        loss_fn,
        make,
        export,
        evaluate=evaluate,
    )


def build_rename(
    pairs: Pairs, tokenizer: clip_model.CLIPTokenizer
) -> clip_objective.Rename:
    """Invents one name for each pair of a batch, and writes it into both texts.

    A text without the name of its document is unchanged.
    """

    def rename(
        rows: Int[np.ndarray, "pairs 2"], rng: np.random.Generator
    ) -> Int32[np.ndarray, "pairs 2 context_length"]:
        texts = []
        for both in rows.tolist():
            invented = make_name(rng)
            for row in both:
                name = pairs.names[row]
                text = pairs.texts[row]
                texts.append(text.replace(name, invented) if name else text)
        return tokenizer.encode_batch(texts).reshape(*rows.shape, -1)

    return rename


def _build_text_tokenizer(config: Any, texts: Sequence[str]) -> TextTokenizer:
    """Trains a text tokenizer, or loads one to keep the vocabulary of generators."""
    if path := config.text_tokenizer.get("path", ""):
        return TextTokenizer.load(resolve(path) / "tokenizer.json")
    return TextTokenizer.train(texts, config.text_tokenizer.vocab_size)
