"""Held-out evaluation of each training, with a sheet of samples.

vqgan      loss, PSNR, codebook usage      image | reconstructed
clip       loss, accuracies                no sheet
generator  nats per token, bits per image  prompt | retrieved | generated | original
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from racm3_jax.documents.images import resize_image
from racm3_jax.documents.sources import Corpus
from racm3_jax.evaluation.perplexity import prepare_documents, score_documents
from racm3_jax.evaluation.pictures import Panel, Row, retrieved_panels, save_sheet
from racm3_jax.generation.tasks import Generator
from racm3_jax.metrics import MetricSums
from racm3_jax.model.config import ModelConfig
from racm3_jax.retrieval import clip_loss as clip_objective
from racm3_jax.retrieval.clip import CLIPTokenizer
from racm3_jax.retrieval.embedder import DocumentEmbedder
from racm3_jax.retrieval.retriever import OwnExcluded, Retriever, as_main
from racm3_jax.sharding import count_row_shards, local_rows
from racm3_jax.tokenizers.mixed import MixedTokenizer
from racm3_jax.tokenizers.vqgan import VQGAN, VQGANConfig
from racm3_jax.tokenizers.vqgan_loss import normalize_images
from racm3_jax.training.heldout import Evaluate
from racm3_jax.training.processes import fetch_all
from racm3_jax.training.step import LossFn, TrainState, make_eval_step
from racm3_jax.types import Document
from racm3_jax.wiring.sections import TrainConfig, construct

SHEETS_DIRECTORY = "samples"


def take(corpus: Corpus, limit: int) -> list[Document]:
    """The first held-out documents, of any content."""
    return list(itertools.islice(corpus.heldout(), limit))


def judge_vqgan(
    config: Any,
    mesh: Mesh,
    loss_fn: LossFn,
    model_config: VQGANConfig,
    images: Sequence[UInt8[np.ndarray, "size size 3"]],
    workdir: Path,
) -> Evaluate:
    """Mean loss terms over held-out images; a sheet of images and reconstructions.

    Raises:
      ValueError: no images are held out.
    """
    _check(len(images), 1, "images")
    train = construct(TrainConfig, config.train, "train")
    step = make_eval_step(loss_fn, mesh, seed=config.seed)
    stacked = np.stack(images)
    # Full batches: the last one is filled up with the first images.
    shards = count_row_shards(mesh)
    size = max(min(config.batch_size, len(images)) // shards, 1) * shards
    places = np.arange(-(-len(images) // size) * size) % len(images)
    rows = local_rows(mesh, size)
    model: Any = VQGAN(model_config)

    @jax.jit
    def reconstruct(params: Any, images: Any) -> Any:
        pixels, _, _ = model.apply({"params": params}, normalize_images(images))
        return pixels

    def evaluate(state: TrainState) -> dict[str, float]:
        sums = MetricSums()
        for start in range(0, len(places), size):
            batch = {"images": stacked[places[start : start + size]][rows]}
            sums.add(jax.device_get(step(state.params, batch)))
        if train.sheet_rows and jax.process_count() == 1:
            shown = stacked[: train.sheet_rows]
            decoded = np.asarray(reconstruct(state.params["vqgan"], shown))
            pixels = np.round((decoded.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
            panels = [
                Row("", ([Panel(before)], [Panel(after)]))
                for before, after in zip(shown, pixels, strict=True)
            ]
            headings = (f"step {int(state.step)}", "image", "reconstructed")
            save_sheet(_sheet(workdir, state), headings, panels)
        return sums.compute()

    return evaluate


def judge_clip(
    config: Any,
    mesh: Mesh,
    loss_fn: LossFn,
    tokenizer: CLIPTokenizer,
    corpus: Corpus,
    documents: Sequence[Document],
) -> Evaluate:
    """The loss of all held-out pairs as one batch.

    Raises:
      ValueError: fewer than two groups are held out.
    """
    names = [corpus.group(document) for document in documents]
    groups = np.unique(names, return_inverse=True)[1]
    num_groups, shards = len(set(names)), count_row_shards(mesh)
    _check(num_groups, max(2, shards), "groups")
    size = config.clip.image_size
    batch = next(
        clip_objective.make_pair_batches(
            np.stack([resize_image(d.images[0], size) for d in documents]),
            tokenizer.encode_batch([d.text for d in documents]),
            groups,
            num_pairs=num_groups // shards * shards,
            seed=config.seed,
        )
    )
    rows = local_rows(mesh, len(batch["tokens_a"]))
    held: Any = {name: values[rows] for name, values in batch.items()}  # type: ignore[index]
    step = make_eval_step(loss_fn, mesh, seed=config.seed)

    def evaluate(state: TrainState) -> dict[str, float]:
        sums = MetricSums()
        sums.add(jax.device_get(step(state.params, held)))
        return sums.compute()

    return evaluate


def judge_generator(
    config: Any,
    model_config: ModelConfig,
    tokenizer: MixedTokenizer,
    embedder: DocumentEmbedder,
    retriever: Retriever | None,
    documents: Sequence[Document],
    workdir: Path,
) -> Evaluate:
    """Likelihoods of held-out documents given what their texts retrieve.

    "loss" is nats per token over texts and images.

    Raises:
      ValueError: no documents are held out.
    """
    _check(len(documents), 1, "documents with a text and an image")
    train = construct(TrainConfig, config.train, "train")
    num_retrieved = config.pipeline.max_documents if retriever is not None else 0
    prepared = None

    def evaluate(state: TrainState) -> dict[str, float]:
        nonlocal prepared
        params = fetch_all(state.params)
        generator = Generator(model_config, params, tokenizer, retriever, embedder)
        if prepared is None:  # retrieval does not depend on the generator's weights
            prepared = prepare_documents(
                generator, documents, num_retrieved=num_retrieved
            )
        found = score_documents(generator, prepared)
        sums = found.sums
        nats = sums.text_nats.sum() + sums.image_nats.sum()
        values = {"loss": float(nats / (sums.text_tokens + sums.image_tokens).sum())}
        if train.sheet_rows and jax.process_index() == 0:
            shown = documents[: train.sheet_rows]
            path, title = _sheet(workdir, state), f"step {int(state.step)}"
            generate_heldout(generator, shown, num_retrieved, config.seed, path, title)
        return values | found.means()

    return evaluate


def generate_heldout(
    generator: Generator,
    documents: Sequence[Document],
    num_retrieved: int,
    seed: int,
    path: Path,
    title: str,
) -> None:
    """A sheet: caption | retrieved documents | generated | original image.

    The memory may contain the documents themselves: they are not retrieved.
    """
    if generator.retriever is not None:
        mains = [as_main(document) for document in documents]
        excluding: Any = OwnExcluded(generator.retriever, mains)
        generator = generator.with_retriever(excluding)
    generated = generator.text_to_image_batch(
        [document.text for document in documents],
        num_retrieved=num_retrieved,
        seed=seed,
    )
    size = generator.tokenizer.image.image_size
    rows = [
        Row(
            output.prompt,
            (
                retrieved_panels(generator, output),
                [Panel(output.images[0])],
                [Panel(resize_image(document.images[0], size))],
            ),
        )
        for output, document in zip(generated, documents, strict=True)
    ]
    headings = (title, "retrieved documents", "generated", "held out")
    save_sheet(path, headings, rows)


def _sheet(workdir: Path, state: TrainState) -> Path:
    return workdir / SHEETS_DIRECTORY / f"step-{int(state.step):06d}.png"


def _check(found: int, needed: int, what: str) -> None:
    if found < needed:
        raise ValueError(
            f"train.eval_every needs held-out {what}, config.holdout gives {found}; "
            f"at least {needed} are needed: hold out more (--config.holdout=0.1) or set "
            "train.eval_every=0"
        )
