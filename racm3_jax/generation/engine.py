"""What all tasks share: the model, its memory, and the documents of each prompt."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int32, UInt8

from racm3_jax import sharding
from racm3_jax.generation import placement
from racm3_jax.generation.draft_choice import DraftChoice
from racm3_jax.generation.requests import Documents, Image
from racm3_jax.model.config import ModelConfig
from racm3_jax.model.quantization import quantize_weights
from racm3_jax.model.transformer import Transformer, prepare_decoding
from racm3_jax.types import Document, Retrieved, TokenizedDocument

if TYPE_CHECKING:
    from racm3_jax.retrieval.embedder import DocumentEmbedder
    from racm3_jax.retrieval.retriever import Retriever
    from racm3_jax.tokenizers.mixed import MixedTokenizer


class Engine:
    """A model with its tokenizer, its memory and its embedder.

    Attributes:
      model: the form that decodes fastest.
      params: its parameters, on the devices that decode.
      tokenizer: of the model's training.
      retriever: finds documents, or None.
      embedder: embeds queries and scores images, or None.
      max_rows: rows decoded at once by each copy of the model.
      mesh: the devices that decode; None is JAX's default device.
      draft_choice: how codes are guessed, over which memory.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        params: Any,
        tokenizer: MixedTokenizer,
        retriever: Retriever | None = None,
        embedder: DocumentEmbedder | None = None,
        *,
        max_rows: int | None = None,
        mesh: Mesh | None = None,
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Puts the parts together; nothing is compiled yet.

        Args:
          model_config: the shape of the model.
          params: its parameters.
          tokenizer: the one that the model was trained with.
          retriever: finds documents; None leaves `num_retrieved=0` and `documents`.
          embedder: embeds queries and scores images; needed with a retriever.
          max_rows: rows decoded at once by each copy of the model: samples, twice as
            many with guidance; by default as many as fit, 64 at most.
          defaults: by task, the settings measured as the best for these weights, used by
            calls that do not give them (see `CaptionDefaults`, `ImageDefaults`).
          mesh: of devices that decode, from `sharding.make_mesh`. By default all devices
            of this process, with a copy of the model on each, or on each group that is
            large enough.
        """
        if model_config.vocab_size < tokenizer.vocab.size:
            raise ValueError(
                f"the model has {model_config.vocab_size} tokens but the tokenizer "
                f"{tokenizer.vocab.size}: load the tokenizer of its training"
            )
        if retriever is not None and embedder is None:
            raise ValueError(
                "a generator with a retriever needs the embedder of its memory too"
            )
        if mesh is None:
            mesh = placement.choose_local_mesh(model_config)
        with sharding.current_mesh(mesh):
            model_config, params = prepare_decoding(model_config, params)
        self.model = Transformer(model_config)
        self.mesh = mesh
        self.params = placement.place_params(model_config, params, mesh)
        self.tokenizer = tokenizer
        self.retriever = retriever
        self.embedder = embedder
        self.max_rows = max_rows or placement.choose_max_rows(model_config, self.params)
        self.draft_choice = DraftChoice()
        self.defaults = dict(defaults or {})

    def on_mesh(self, mesh: Mesh) -> Self:
        """The same model on other devices."""
        other = copy.copy(self)
        other.mesh = mesh
        other.params = placement.place_params(self.model.config, self.params, mesh)
        return other

    def devices_with_a_copy(self) -> list[Any]:
        """The devices that can decode alone; none where the model is split."""
        if self.mesh is None:
            return list(jax.tree.leaves(self.params)[0].devices())
        split = self.mesh.shape["fsdp"] * self.mesh.shape["tensor"] > 1
        return [] if split else list(self.mesh.devices.flat)

    def with_retriever(self, retriever: Retriever | None) -> Self:
        """The same model with another memory; shares parameters and compiled code."""
        other = copy.copy(self)
        other.retriever = retriever
        return other

    def quantized(self) -> Self:
        """The same model with 8-bit weights; needs about half the memory of bf16."""
        other = copy.copy(self)
        turned = self.model.config.outputs_first
        other.params = quantize_weights(self.params, outputs_first=turned)
        return other

    def check_counts(
        self,
        num_samples: int,
        num_retrieved: int,
        documents: Documents | None,
        count_name: str = "num_retrieved",
    ) -> None:
        """Refuses invalid counts, before anything is computed.

        `count_name` is what errors call `num_retrieved`.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be >= 1; got {num_samples}")
        if num_retrieved < 0:
            raise ValueError(
                f"{count_name} must be >= 0 (0 is without retrieval); got {num_retrieved}"
            )
        if documents is not None or not num_retrieved:
            return
        if self.retriever is None:
            raise ValueError(
                f"num_retrieved is {num_retrieved} but this generator has no memory: "
                "load it with one, pass documents=[...], or num_retrieved=0"
            )
        held = self.retriever.memory.num_allowed
        if num_retrieved > held:
            raise ValueError(
                f"{count_name} is {num_retrieved} but the memory holds only {held} "
                "documents: ask for at most that many"
            )

    def retrieve_for(
        self,
        queries: Sequence[str | Image],
        num_retrieved: int,
        documents: Documents | None,
    ) -> list[Retrieved]:
        """The documents of each row: hand-picked, none, or one search for all queries.

        Args:
          queries: a text or an image per row.
          num_retrieved: documents per row.
          documents: hand-picked ones, which all rows share, or None.
        """
        if documents is not None:
            return [self.pick(documents)] * len(queries)
        if not num_retrieved or self.retriever is None:
            return [self.pick([])] * len(queries)
        found = self.retriever.retrieve(
            self._embed(queries),
            np.full(len(queries), num_retrieved),
            [None] * len(queries),
        )
        usual = self.retriever.usual_score
        return [
            retrieved._replace(
                usual_score=usual("text" if isinstance(query, str) else "image")
            )
            for query, retrieved in zip(queries, found, strict=True)
        ]

    def _embed(
        self, queries: Sequence[str | Image]
    ) -> Float32[np.ndarray, "queries d_embed"]:
        assert self.embedder is not None  # required with a retriever
        texts = {i: q for i, q in enumerate(queries) if isinstance(q, str)}
        images = {i: q for i, q in enumerate(queries) if not isinstance(q, str)}
        rows: dict[int, np.ndarray] = {}
        if texts:
            found = self.embedder.embed_texts(list(texts.values()))
            rows |= dict(zip(texts, found, strict=True))
        if images:
            found = self.embedder.embed_images(list(images.values()))
            rows |= dict(zip(images, found, strict=True))
        return np.stack([rows[i] for i in range(len(queries))])

    def pick(self, documents: Documents) -> Retrieved:
        """Hand-picked documents, without rows in the memory and without scores."""
        picked = self.tokenized(documents)
        return Retrieved(
            np.full(len(picked), -1, np.int64),
            np.full(len(picked), np.nan, np.float32),
            picked,
        )

    def pick_each(
        self,
        documents: Sequence[Documents],
        num_rows: int,
        noun: str,
        num_neighbours: int = 0,
    ) -> list[Retrieved]:
        """Hand-picked documents of each row, at least one.

        Args:
          documents: of each row.
          num_rows: how many there must be.
          noun: what errors call a document.
          num_neighbours: documents of the memory added after those of each row:
            what the strategy retrieves for the mean of their embeddings.

        Raises:
          ValueError: a row without documents, or another number of rows.
        """
        if len(documents) != num_rows:
            raise ValueError(
                f"{num_rows} items need as many lists of {noun}s; got {len(documents)}"
            )
        if not all(len(chosen) for chosen in documents):
            raise ValueError(
                f"this task needs at least one {noun}, a caption with an image; got none"
            )
        picked = [self.pick(chosen) for chosen in documents]
        if not num_neighbours:
            return picked
        return self._add_neighbours(documents, picked, num_neighbours)

    def _add_neighbours(
        self,
        documents: Sequence[Documents],
        picked: Sequence[Retrieved],
        num_neighbours: int,
    ) -> list[Retrieved]:
        assert self.retriever is not None and self.embedder is not None  # was checked
        owners = np.repeat(np.arange(len(picked)), [len(p.ids) for p in picked])
        whole = [
            d if isinstance(d, Document) else self.tokenizer.decode(d)
            for chosen in documents
            for d in chosen
        ]
        embedded = self.embedder.embed_documents(whole).document
        queries = np.zeros((len(picked), embedded.shape[1]), np.float32)
        np.add.at(queries, owners, embedded)
        queries /= np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-9)
        # Of several chosen documents, the search excludes only the first.
        nums = num_neighbours + np.array([len(p.ids) - 1 for p in picked])
        nums = np.minimum(nums, self.retriever.memory.num_allowed)
        found = self.retriever.retrieve(queries, nums, [p.documents[0] for p in picked])
        rows = []
        for own, near in zip(picked, found, strict=True):
            names = {d.id for d in own.documents}
            new = [i for i, d in enumerate(near.documents) if d.id not in names]
            new = new[:num_neighbours]
            rows.append(
                Retrieved(
                    np.concatenate([own.ids, near.ids[new]]),
                    np.concatenate([own.scores, near.scores[new]]),
                    (*own.documents, *(near.documents[i] for i in new)),
                )
            )
        return rows

    def tokenized(self, documents: Documents) -> tuple[TokenizedDocument, ...]:
        """Tokenizes documents that are not tokenized yet."""
        plain = [d for d in documents if isinstance(d, Document)]
        found = iter(self.tokenizer.tokenize(plain))
        return tuple(next(found) if isinstance(d, Document) else d for d in documents)

    def decode_images(
        self, tokens: Int32[np.ndarray, "prompts samples codes"]
    ) -> UInt8[np.ndarray, "prompts samples height width 3"]:
        """Tokens of images -> pixels."""
        codes = self.tokenizer.vocab.image_codes(tokens)
        images = self.tokenizer.image.decode(codes.reshape(-1, codes.shape[-1]))
        return images.reshape(*tokens.shape[:2], *images.shape[1:])
