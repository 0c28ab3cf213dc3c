"""The same Transformer in idiomatic torch: part of experiments/bench_train.py.

Pre-LayerNorm, learned positions, ReLU, tied embeddings, biases; scaled dot-product
attention (flash if the GPU supports it), AdamW, clipping by global norm. Each row is
one causal sequence without segment masks, which is slightly less work for torch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from racm3_jax.model.config import ModelConfig


class TorchBlock(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        self.heads = config.num_heads
        self.first_norm = nn.LayerNorm(config.d_model)
        self.qkv = nn.Linear(config.d_model, 3 * width)
        self.out = nn.Linear(width, config.d_model)
        self.second_norm = nn.LayerNorm(config.d_model)
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        qkv = self.qkv(self.first_norm(x)).view(rows, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, length, -1))
        return x + self.down(F.relu(self.up(self.second_norm(x))))


class TorchModel(nn.Module):
    """Tokens and targets in, mean cross-entropy out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_length, config.d_model)
        self.blocks = nn.ModuleList(
            TorchBlock(config) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        index = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.embedding(inputs) + self.positions(index)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def make_torch_step(
    config: ModelConfig,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    half: bool,
    compiled: bool,
    device: str,
) -> Callable[[], float]:
    """A call that does one training step and returns its seconds.

    Args:
      config: sizes.
      inputs: tokens, [rows, length].
      targets: tokens, [rows, length].
      half: autocast to bfloat16; the weights stay float32.
      compiled: by torch.compile.
      device: "cpu" or "cuda".
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = TorchModel(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    call: Any = torch.compile(model) if compiled else model
    ids = [torch.from_numpy(x).long().to(device) for x in (inputs, targets)]

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        cast: Any = contextlib.nullcontext()
        if half:
            cast = torch.autocast(device, dtype=torch.bfloat16)
        with cast:
            loss = call(*ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        return time.perf_counter() - start

    return step


def peak_memory(device: str) -> float:
    """Peak bytes of a GPU; 0 on a CPU."""
    return float(torch.cuda.max_memory_allocated()) if device == "cuda" else 0.0
