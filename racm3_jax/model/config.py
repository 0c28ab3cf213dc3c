"""Transformer configs: sizes, style and computation; and named presets.

Two styles share the code. CM3 style (arXiv 2201.07520 and its public code): learned
positions, pre-LayerNorm, ReLU or GELU, biases, tied embeddings. Chameleon style (arXiv
2405.09818, section 2.3): rotary positions, RMSNorm, SwiGLU, QK-norm, no biases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

from racm3_jax.limits import check_choices, check_range
from racm3_jax.sharding import multiplies_bfloat16

Position = Literal["learned", "rope"]
NormKind = Literal["layernorm", "rmsnorm"]
Activation = Literal["relu", "gelu", "swiglu"]
AttentionKind = Literal["auto", "plain", "blocked", "cudnn", "splash"]
RematKind = Literal["none", "full", "dots"]
ComputeDtype = Literal["float32", "bfloat16", "auto"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "position": get_args(Position),
    "norm": get_args(NormKind),
    "activation": get_args(Activation),
    "attention": get_args(AttentionKind),
    "remat": get_args(RematKind),
    "compute_dtype": get_args(ComputeDtype),
}
CHAMELEON_STYLE: dict[str, Any] = {
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "qk_norm": True,
    "use_bias": False,
    "tie_embeddings": False,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes, style and computation of one Transformer.

    Attributes:
      vocab_size: rows of the embedding; `Vocab.size`, or more to divide evenly.
      d_model: width of the residual stream.
      num_layers: blocks of attention and feed-forward.
      num_heads: query heads.
      num_kv_heads: key and value heads (grouped-query attention); 0 means `num_heads`.
      head_dim: width of one head. 128 is the fast size on a GPU.
      d_ff: hidden width of the feed-forward part.
      max_length: longest sequence; the number of learned positions.
      position: "learned" table added to the embedding, or "rope" in every layer.
      norm: pre-normalisation of every sublayer, and of the output.
      activation: "swiglu" has a third matrix.
      qk_norm: LayerNorm of each head's queries and keys (Chameleon).
      use_bias: biases of the linear layers.
      tie_embeddings: the head reuses the embedding.
      dropout: fraction of residual updates dropped, if `apply` gets a "dropout" rng.
      norm_epsilon: added to the variance.
      rope_base: longest wavelength of the rotary positions, over 2 pi.
      compute_dtype: of the matmuls; parameters, norms, softmax and sums are float32.
        "auto" is bfloat16, except on a CPU without instructions for it, where float32
        is 1.45 times as fast.
      attention: "auto" chooses by platform, see `attention.choose_implementation`.
      max_segments: maximum segments per row: examples, and the padding after them. It
        limits packing; with "cudnn" attention a row with more is NaN.
      scan_layers: one compiled block and stacked parameters, instead of one per layer.
      remat: what the backward pass recomputes: nothing, all of each block, or all
        except the matmuls.
      image_positions: also add a learned position within the image to every code, so that
        the same place of two images is one comparison, however long their texts are.
        Counted from the last token that is no code: after a mask within an image from
        0, as when the masked part is generated.
      image_length, first_code, num_codes: for `image_positions`: codes of an image, the
        token of code 0, and number of codes. A training takes them from its tokenizer.
      outputs_first: kernels are stored in panels of 16 outputs, as by
        `prepare_decoding` on a CPU, which makes matmuls of few rows contiguous.
    """

    vocab_size: int
    d_model: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 0
    head_dim: int = 64
    d_ff: int = 1024
    max_length: int = 512
    position: Position = "learned"
    norm: NormKind = "layernorm"
    activation: Activation = "gelu"
    qk_norm: bool = False
    use_bias: bool = True
    tie_embeddings: bool = True
    dropout: float = 0.0
    norm_epsilon: float = 1e-5
    rope_base: float = 10_000.0
    compute_dtype: ComputeDtype = "float32"
    attention: AttentionKind = "auto"
    max_segments: int = 16
    scan_layers: bool = False
    remat: RematKind = "none"
    image_positions: bool = False
    image_length: int = 0
    first_code: int = 0
    num_codes: int = 0
    outputs_first: bool = False

    def __post_init__(self) -> None:
        """Refuses invalid sizes and names."""
        check_choices(self, "model", **_CHOICES)
        sizes = "vocab_size d_model num_layers num_heads head_dim d_ff max_length"
        check_range(self, "model", *sizes.split(), low=1)
        if self.max_segments < 2:
            raise ValueError(
                f"model.max_segments is {self.max_segments}; use >= 2: an example and "
                "the padding after it"
            )
        if self.num_kv_heads < 0 or self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_kv_heads is {self.num_kv_heads}; use a divisor of "
                f"num_heads={self.num_heads}, or 0 for as many"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; use 0 <= dropout < 1")
        if self.image_positions:
            check_range(self, "model", "image_length", "num_codes", low=1)
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; rope needs it even")

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """`compute_dtype` with "auto" resolved for the current platform."""
        if self.compute_dtype != "auto":
            return self.compute_dtype
        return "bfloat16" if multiplies_bfloat16() else "float32"


def racm3_2b7(**changes: Any) -> ModelConfig:
    """The paper's 2.7B generator, with heads of 128 (25-30% faster attention).

    32 layers, width 2560, FFN 10240, learned positions, pre-LN, ReLU: the authors' code
    base, not printed in the paper. Vocabulary 65,536 with 8,192 image codes.
    """
    sizes: dict[str, Any] = {
        "vocab_size": 65_536,
        "d_model": 2560,
        "num_layers": 32,
        "num_heads": 20,
        "head_dim": 128,
        "d_ff": 10_240,
        "max_length": 4096,
        "activation": "relu",
        "compute_dtype": "bfloat16",
        "scan_layers": True,
    }
    return ModelConfig(**(sizes | changes))


def racm3_2b7_fidelity(**changes: Any) -> ModelConfig:
    """`racm3_2b7` with the authors' 32 heads of 80; as many parameters."""
    return racm3_2b7(**({"num_heads": 32, "head_dim": 80} | changes))


def chameleon_7b(**changes: Any) -> ModelConfig:
    """The shape of Chameleon-7B, whose weights are public (arXiv 2405.09818)."""
    sizes: dict[str, Any] = {
        "vocab_size": 65_536,
        "d_model": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "head_dim": 128,
        "d_ff": 11_008,
        "max_length": 4096,
        "compute_dtype": "bfloat16",
        "scan_layers": True,
    }
    return ModelConfig(**(CHAMELEON_STYLE | sizes | changes))


def tiny(**changes: Any) -> ModelConfig:
    """CM3 style, small enough for a unit test."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 16,
        "d_ff": 64,
        "max_length": 64,
    }
    return ModelConfig(**(sizes | changes))


def tiny_chameleon(**changes: Any) -> ModelConfig:
    """Chameleon style with grouped queries, small enough for a unit test."""
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    return tiny(**(CHAMELEON_STYLE | heads | changes))


PRESETS: dict[str, Callable[..., ModelConfig]] = {
    "racm3_2b7": racm3_2b7,
    "racm3_2b7_fidelity": racm3_2b7_fidelity,
    "chameleon_7b": chameleon_7b,
    "tiny": tiny,
    "tiny_chameleon": tiny_chameleon,
}
