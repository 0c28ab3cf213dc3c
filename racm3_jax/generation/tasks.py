"""`Generator`: the model, its tokenizer and its memory behind one object.

    prompts -> query embeddings -> retrieved documents -> prompts in ids -> sample -> out

The batched forms do each of these once for all prompts (and the decode in chunks of
`max_rows`); the single forms are batches of one, so both give the same samples.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float32, Int32, UInt8

from racm3_jax.documents.images import resize_image
from racm3_jax.generation.grammar import Grammar, image_grammar, text_grammar
from racm3_jax.generation.sample import Samples, SamplingConfig, sample
from racm3_jax.model.config import ModelConfig
from racm3_jax.model.transformer import Transformer, prepare_decoding
from racm3_jax.sequences.layout import caption_prompt, text_to_image_prompt
from racm3_jax.types import (
    Document,
    GenerationOutput,
    Retrieved,
    Segment,
    TokenizedDocument,
)

if TYPE_CHECKING:
    from racm3_jax.retrieval.embedder import DocumentEmbedder
    from racm3_jax.retrieval.retriever import Retriever
    from racm3_jax.tokenizers.mixed import MixedTokenizer

Image = UInt8[np.ndarray, "height width 3"]
Documents = Sequence[Document | TokenizedDocument]


class Generator:
    """Draws and captions, with or without retrieved documents.

    Common arguments of the tasks:
      num_samples: samples of each prompt or image, returned best first.
      num_retrieved: documents of the memory before the prompt (2 in the paper); 0 asks
        the model alone.
      seed: reproduces the samples. In a batch, item i has the seed `seed + i` (or the
        i-th of a list), and alone with that seed gives the same samples.
      documents: hand-picked documents instead of retrieved ones, shared by the batch;
        an empty list is the same as `num_retrieved=0`.
      temperature, top_p, top_k: see `SamplingConfig`.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        params: Any,
        tokenizer: MixedTokenizer,
        retriever: Retriever | None = None,
        embedder: DocumentEmbedder | None = None,
        *,
        max_rows: int = 64,
    ) -> None:
        """Puts the parts together; nothing is compiled yet.

        Args:
          model_config: the shape of the model.
          params: its parameters.
          tokenizer: the one that the model was trained with.
          retriever: finds documents; None leaves `num_retrieved=0` and `documents`.
          embedder: embeds queries and scores images; needed with a retriever.
          max_rows: samples decoded at once.
        """
        if model_config.vocab_size < tokenizer.vocab.size:
            raise ValueError(
                f"the model has {model_config.vocab_size} ids but the tokenizer "
                f"{tokenizer.vocab.size}: load the tokenizer that it was trained with"
            )
        if retriever is not None and embedder is None:
            raise ValueError(
                "a generator with a retriever needs the embedder of its memory too"
            )
        model_config, params = prepare_decoding(model_config, params)
        self.model = Transformer(model_config)
        self.params = jax.device_put(params)
        self.tokenizer = tokenizer
        self.retriever = retriever
        self.embedder = embedder
        self.max_rows = max_rows

    def with_retriever(self, retriever: Retriever | None) -> Generator:
        """The same model over another memory; shares parameters and compiled code."""
        other = copy.copy(self)
        other.retriever = retriever
        return other

    def text_to_image(
        self,
        prompt: str,
        num_samples: int = 1,
        num_retrieved: int = 2,
        seed: int = 0,
        documents: Documents | None = None,
        temperature: float = 1.0,
        top_p: float = 0.9,
        top_k: int = 0,
    ) -> GenerationOutput:
        """Draws what the prompt says (RA-CM3, section 4: the caption is the query)."""
        return self.text_to_image_batch(
            [prompt],
            num_samples=num_samples,
            num_retrieved=num_retrieved,
            seed=[seed],
            documents=documents,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )[0]

    def text_to_image_batch(
        self,
        prompts: Sequence[str],
        *,
        num_samples: int = 1,
        num_retrieved: int = 2,
        seed: int | Sequence[int] = 0,
        documents: Documents | None = None,
        temperature: float = 1.0,
        top_p: float = 0.9,
        top_k: int = 0,
    ) -> list[GenerationOutput]:
        """Draws every prompt; scores are CLIP similarities of prompt and image.

        Without an embedder the score is the mean log-likelihood of the image's ids.

        Raises:
          ValueError: on an empty prompt, a bad setting, more documents than the memory
            holds, or a row that is longer than the model reads.
        """
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError(
                    f"the prompt is empty ({prompt!r}): say what to draw, for example "
                    "'the flag of Velmoria on the moon'"
                )
        if not prompts:
            return []
        vocab = self.tokenizer.vocab
        config = SamplingConfig(
            temperature, top_p, top_k, vocab.image_length, fixed_length=True
        )
        seeds = _row_seeds(seed, len(prompts))
        self._check_counts(num_samples, num_retrieved, documents)
        queries = None
        if self.embedder is not None:
            queries = self.embedder.embed_texts(list(prompts))
        retrieved = self._retrieve(queries, len(prompts), num_retrieved, documents)
        rows = [
            text_to_image_prompt(r.documents, self.tokenizer.encode_text(p), vocab)
            for r, p in zip(retrieved, prompts, strict=True)
        ]
        samples = self._sample(rows, image_grammar(vocab), config, num_samples, seeds)
        codes = vocab.image_codes(samples.tokens)
        images = self.tokenizer.image.decode(codes.reshape(-1, vocab.image_length))
        images = images.reshape(len(prompts), num_samples, *images.shape[1:])
        scores = _mean_log_probs(samples)
        if self.embedder is not None and queries is not None:
            flat = images.reshape(-1, *images.shape[2:])
            embeddings = self.embedder.embed_images(flat)
            embeddings = embeddings.reshape(len(prompts), num_samples, -1)
            scores = np.einsum("nd,nsd->ns", queries, embeddings)
        return [
            self._output(
                "text_to_image",
                [(Segment(text=prompts[i]), Segment(image=x)) for x in images[i]],
                scores[i],
                retrieved[i],
                prompts[i],
                seeds[i],
            )
            for i in range(len(prompts))
        ]

    def caption(
        self,
        image: Image,
        num_samples: int = 1,
        num_retrieved: int = 2,
        seed: int = 0,
        documents: Documents | None = None,
        temperature: float = 1.0,
        top_p: float = 0.9,
        top_k: int = 0,
        max_caption_length: int = 64,
        prefix: str = "",
    ) -> GenerationOutput:
        """Describes an image (RA-CM3, section 4: the image is the query)."""
        return self.caption_batch(
            [image],
            num_samples=num_samples,
            num_retrieved=num_retrieved,
            seed=[seed],
            documents=documents,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_caption_length=max_caption_length,
            prefix=prefix,
        )[0]

    def caption_batch(
        self,
        images: Sequence[Image],
        *,
        num_samples: int = 1,
        num_retrieved: int = 2,
        seed: int | Sequence[int] = 0,
        documents: Documents | None = None,
        temperature: float = 1.0,
        top_p: float = 0.9,
        top_k: int = 0,
        max_caption_length: int = 64,
        prefix: str = "",
    ) -> list[GenerationOutput]:
        """Describes every image; scores are mean log-likelihoods in nats.

        `prefix` begins every caption (the paper's "Photo of") and is not generated.
        `max_caption_length` counts text ids; the model's max_length may leave fewer.

        Raises:
          ValueError: as in `text_to_image_batch`.
        """
        if not len(images):
            return []
        vocab, size = self.tokenizer.vocab, self.tokenizer.image.image_size
        config = SamplingConfig(temperature, top_p, top_k, max_caption_length + 1)
        grammar = text_grammar(vocab, max_caption_length)
        seeds = _row_seeds(seed, len(images))
        self._check_counts(num_samples, num_retrieved, documents)
        pixels = np.stack([resize_image(_rgb(image), size) for image in images])
        queries = None
        if documents is None and num_retrieved and self.embedder is not None:
            queries = self.embedder.embed_images(pixels)
        retrieved = self._retrieve(queries, len(images), num_retrieved, documents)
        tokens = vocab.image_tokens(self.tokenizer.image.encode(pixels))
        start = self.tokenizer.encode_text(prefix) if prefix else np.zeros(0, np.int32)
        rows = [
            caption_prompt(r.documents, t, vocab, start)
            for r, t in zip(retrieved, tokens, strict=True)
        ]
        samples = self._sample(rows, grammar, config, num_samples, seeds)
        scores = _mean_log_probs(samples)
        outputs = []
        for i, image in enumerate(images):
            texts = (self._text(start, drawn) for drawn in samples.tokens[i])
            segments = [(Segment(text=t), Segment(image=_rgb(image))) for t in texts]
            outputs.append(
                self._output(
                    "caption", segments, scores[i], retrieved[i], prefix, seeds[i]
                )
            )
        return outputs

    def _check_counts(
        self, num_samples: int, num_retrieved: int, documents: Documents | None
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be >= 1; got {num_samples}")
        if num_retrieved < 0:
            raise ValueError(
                f"num_retrieved must be >= 0 (0 is without retrieval); got "
                f"{num_retrieved}"
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
                f"num_retrieved is {num_retrieved} but the memory holds only {held} "
                "documents: ask for at most that many"
            )

    def _retrieve(
        self,
        queries: Float32[np.ndarray, "n d_embed"] | None,
        num_rows: int,
        num_retrieved: int,
        documents: Documents | None,
    ) -> list[Retrieved]:
        """The documents of each row: hand-picked, none, or one batched search."""
        if documents is not None:
            picked = self._tokenized(documents)
            no_id = np.full(len(picked), -1, np.int64)
            no_score = np.full(len(picked), np.nan, np.float32)
            return [Retrieved(no_id, no_score, picked)] * num_rows
        if not num_retrieved or self.retriever is None or queries is None:
            none = Retrieved(np.zeros(0, np.int64), np.zeros(0, np.float32), ())
            return [none] * num_rows
        return self.retriever.retrieve(
            queries, np.full(num_rows, num_retrieved), [None] * num_rows
        )

    def _tokenized(self, documents: Documents) -> tuple[TokenizedDocument, ...]:
        plain = [d for d in documents if isinstance(d, Document)]
        found = iter(self.tokenizer.tokenize(plain))
        return tuple(next(found) if isinstance(d, Document) else d for d in documents)

    def _sample(
        self,
        prompts: Sequence[Int32[np.ndarray, " length"]],
        grammar: Grammar,
        config: SamplingConfig,
        num_samples: int,
        seeds: Sequence[int],
    ) -> Samples:
        """All prompts in equal chunks, so that one compiled program serves them."""
        lengths = np.array([len(p) for p in prompts], np.int32)
        tokens = np.zeros((len(prompts), lengths.max()), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        chunk = max(1, self.max_rows // num_samples)
        whole = -(-len(prompts) // chunk) * chunk if len(prompts) > chunk else 0
        # The last chunk is filled up with the last prompt.
        order = np.minimum(np.arange(max(whole, len(prompts))), len(prompts) - 1)
        seed_array = np.asarray(seeds, np.uint32)
        parts = [
            sample(
                self.model,
                self.params,
                tokens[rows],
                lengths[rows],
                grammar,
                config,
                jax.random.key(0),
                num_samples=num_samples,
                row_seeds=seed_array[rows],
            )
            for rows in (order[i : i + chunk] for i in range(0, len(order), chunk))
        ]
        return Samples(
            *(np.concatenate(x)[: len(prompts)] for x in zip(*parts, strict=True))
        )

    def _text(
        self, prefix: Int32[np.ndarray, " a"], drawn: Int32[np.ndarray, " new"]
    ) -> str:
        kept = drawn[self.tokenizer.vocab.is_text(drawn)]
        return self.tokenizer.text.decode(np.concatenate([prefix, kept]))

    def _output(
        self,
        task: str,
        segments: Iterable[tuple[Segment, ...]],
        scores: Float32[np.ndarray, " samples"],
        retrieved: Retrieved,
        prompt: str,
        seed: int,
    ) -> GenerationOutput:
        """Best first; every document names the documents that the model was given."""
        given = [d.id for d in retrieved.documents]
        documents = [
            Document(
                id=f"{task}-{seed}-{j}",
                segments=parts,
                metadata={"task": task, "seed": seed, "sample": j, "retrieved": given},
            )
            for j, parts in enumerate(segments)
        ]
        order = np.argsort(-scores, kind="stable")
        return GenerationOutput(
            [documents[j] for j in order], scores[order], retrieved, prompt, seed
        )


def _row_seeds(seed: int | Sequence[int], num_rows: int) -> list[int]:
    if isinstance(seed, int | np.integer):
        seeds = [int(seed) + i for i in range(num_rows)]
    else:
        seeds = [int(value) for value in seed]
    if len(seeds) != num_rows:
        raise ValueError(f"{num_rows} prompts need as many seeds; got {len(seeds)}")
    for value in seeds:
        if not 0 <= value < 2**32:
            raise ValueError(f"a seed is a whole number from 0 to 2^32-1; got {value}")
    return seeds


def _rgb(image: Image) -> Image:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            "an image is uint8[height, width, 3]; got "
            f"{image.dtype}{list(image.shape)}: read files with "
            "racm3_jax.documents.images.read_image"
        )
    return image


def _mean_log_probs(samples: Samples) -> Float32[np.ndarray, "batch samples"]:
    lengths = np.maximum(samples.lengths, 1).astype(np.float32)
    return samples.log_probs.sum(-1) / lengths
