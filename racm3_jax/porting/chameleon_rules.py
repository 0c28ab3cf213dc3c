"""Rules for Chameleon's four checkpoint layouts, one per parameter.

    layout   names         norm of q, k         rotary pairs of q and k
    native   layers.0...   (head_dim,)          adjacent: rows are reordered here
    anole    model....     (head_dim,)          adjacent: rows are reordered here
    lumina   model....     (1, head_dim)        halves, like ours
    hf       model....     (heads, head_dim)    halves, like ours

Anole, Lumina and Hugging Face have the same names, and the wrong layout loads without
an error and samples badly: the rank of the norm decides.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from racm3_jax.model.config import ModelConfig
from racm3_jax.porting.rules import LINEAR, SAME, Form, Rule
from racm3_jax.porting.tensors import PortingError, TensorSource
from racm3_jax.porting.vocabulary import Vocabulary

Layout = Literal["native", "anole", "lumina", "hf"]
LAYOUT_NAMES = {
    "native": "native Chameleon",
    "anole": "Anole",
    "lumina": "Lumina-mGPT",
    "hf": "Hugging Face Chameleon",
}
_QK_NORM = {
    "native": "layers.0.attention.q_normalization.weight",
    "hf": "model.layers.0.self_attn.q_norm.weight",
}


def detect_layout(source: TensorSource, num_heads: int) -> Layout:
    """Detects which of the four layouts it is.

    Raises:
      PortingError: none of them.
    """
    tensors = source.tensors
    if _QK_NORM["native"] in tensors:
        return "native"
    if _QK_NORM["hf"] not in tensors:
        raise PortingError(
            f"{source.where} is not a Chameleon: it has neither {_QK_NORM['hf']} nor "
            f"{_QK_NORM['native']}, but {', '.join(sorted(tensors)[:3])}"
        )
    shape = tensors[_QK_NORM["hf"]].shape
    if len(shape) == 1:
        return "anole"
    return "hf" if shape[0] == num_heads else "lumina"


@dataclasses.dataclass(frozen=True)
class _Names:
    """A layout's names of the parameters of layer `{i}`, and of the others."""

    layer: str
    query: str
    key: str
    value: str
    out: str
    query_norm: str
    key_norm: str
    gate: str
    up: str
    down: str
    attention_norm: str
    feed_forward_norm: str
    embedding: str
    output_norm: str
    head: str


_NATIVE = _Names(
    layer="layers.{i}",
    query="attention.wq",
    key="attention.wk",
    value="attention.wv",
    out="attention.wo",
    query_norm="attention.q_normalization",
    key_norm="attention.k_normalization",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
    attention_norm="attention_norm",
    feed_forward_norm="ffn_norm",
    embedding="tok_embeddings",
    output_norm="norm",
    head="output",
)
_HUGGING_FACE = _Names(
    layer="model.layers.{i}",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.o_proj",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    attention_norm="input_layernorm",
    feed_forward_norm="post_attention_layernorm",
    embedding="model.embed_tokens",
    output_norm="model.norm",
    head="lm_head",
)


def halves_from_neighbours(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders the rows of each head: adjacent rotary pairs -> two halves.

    ```
    head_dim 6:  a0 b0 a1 b1 a2 b2  ->  a0 a1 a2 b0 b1 b2
    ```
    """
    paired = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def _projection(num_heads: int, head_dim: int, neighbours: bool) -> Form:
    """Linear [heads * head_dim, d] <-> kernel [d, heads, head_dim]."""

    def to_ours(x: np.ndarray) -> np.ndarray:
        if neighbours:
            x = halves_from_neighbours(x, head_dim)
        return x.T.reshape(-1, num_heads, head_dim)

    def to_theirs(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1).T

    return Form(to_ours, None if neighbours else to_theirs)


def _head_norm(num_heads: int, head_dim: int, neighbours: bool) -> Form:
    """The scale or bias of each head's norm; fewer rows are shared by heads."""

    def to_ours(x: np.ndarray) -> np.ndarray:
        if neighbours:
            x = halves_from_neighbours(x, head_dim)[None]
        return np.repeat(x, num_heads // len(x), axis=0)

    return Form(to_ours, None if neighbours else SAME.to_theirs)


def _rows(order: np.ndarray, *, transposed: bool) -> Form:
    """Rows of embedding or head in our token order."""
    back = np.empty_like(order)
    back[order] = np.arange(len(order))

    def to_ours(x: np.ndarray) -> np.ndarray:
        return x[order].T if transposed else x[order]

    def to_theirs(x: np.ndarray) -> np.ndarray:
        return x.T[back] if transposed else x[back]

    return Form(to_ours, to_theirs)


def chameleon_rules(
    config: ModelConfig,
    vocabulary: Vocabulary,
    layout: Layout,
    norm_rows: tuple[int, int] | None = None,
) -> list[Rule]:
    """A rule for every parameter of the unrolled Transformer.

    Args:
      config: its sizes.
      vocabulary: the token order.
      layout: from `detect_layout`.
      norm_rows: rows of the norms of q and k in the "lumina" layout.
    """
    c = config
    names = _NATIVE if layout == "native" else _HUGGING_FACE
    neighbours = layout in ("native", "anole")
    table = (c.vocab_size, c.d_model)
    rules = [
        Rule(
            "embedding",
            f"{names.embedding}.weight",
            table,
            _rows(vocabulary.inputs, transposed=False),
        ),
        Rule(
            "head",
            f"{names.head}.weight",
            table,
            _rows(vocabulary.outputs, transposed=True),
        ),
        Rule("output_norm/scale", f"{names.output_norm}.weight", (c.d_model,)),
    ]
    out = Form(
        lambda x: x.T.reshape(c.num_heads, c.head_dim, -1),
        lambda x: x.reshape(-1, x.shape[-1]).T,
    )
    rows = norm_rows or (c.num_heads, c.kv_heads)
    for i in range(c.num_layers):
        ours, theirs = f"layers_{i}", names.layer.format(i=i)
        for part, name, norm_name, heads, num_rows in (
            ("query", names.query, names.query_norm, c.num_heads, rows[0]),
            ("key", names.key, names.key_norm, c.kv_heads, rows[1]),
        ):
            rules.append(
                Rule(
                    f"{ours}/attention/{part}/kernel",
                    f"{theirs}.{name}.weight",
                    (heads * c.head_dim, c.d_model),
                    _projection(heads, c.head_dim, neighbours),
                )
            )
            shape = (c.head_dim,) if neighbours else (num_rows, c.head_dim)
            form = _head_norm(heads, c.head_dim, neighbours)
            for own, other in (("scale", "weight"), ("bias", "bias")):
                norm = f"{ours}/attention/{part}_norm/{own}"
                rules.append(Rule(norm, f"{theirs}.{norm_name}.{other}", shape, form))
        square = (c.d_model, c.num_heads * c.head_dim)
        wide, narrow = (c.d_ff, c.d_model), (c.d_model, c.d_ff)
        value = (c.kv_heads * c.head_dim, c.d_model)
        forms: list[tuple[str, str, tuple[int, ...], Any]] = [
            (
                "attention/value/kernel",
                names.value,
                value,
                _projection(c.kv_heads, c.head_dim, False),
            ),
            ("attention/out/kernel", names.out, square, out),
            ("feed_forward/gate/kernel", names.gate, wide, LINEAR),
            ("feed_forward/up/kernel", names.up, wide, LINEAR),
            ("feed_forward/down/kernel", names.down, narrow, LINEAR),
            ("attention_norm/scale", names.attention_norm, (c.d_model,), SAME),
            ("feed_forward_norm/scale", names.feed_forward_norm, (c.d_model,), SAME),
        ]
        rules += [
            Rule(f"{ours}/{own}", f"{theirs}.{other}.weight", shape, form)
            for own, other, shape, form in forms
        ]
    return rules
