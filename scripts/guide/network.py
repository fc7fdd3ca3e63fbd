"""The network: a small Llama in PyTorch, computed just as llama.cpp computes the exported file.

Rotary positions turn neighbouring pairs (2i, 2i + 1), which is how llama.cpp's `llama` architecture stores heads, so
that no weight has to be permuted on export. RMSNorm, SwiGLU, grouped-query attention, tied embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-5
ROPE_BASE = 10_000.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions; about 4.8 million parameters by default, most of them the tokens' own."""

    vocabulary: int
    width: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 64
    feed_forward: int = 768
    context: int = 4_096


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q = nn.Linear(shape.width, shape.heads * shape.head_width, bias=False)
        self.k = nn.Linear(shape.width, shape.kv_heads * shape.head_width, bias=False)
        self.v = nn.Linear(shape.width, shape.kv_heads * shape.head_width, bias=False)
        self.output = nn.Linear(shape.heads * shape.head_width, shape.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor, later: Tensor) -> Tensor:
        """`x` (batch, length, width), `turn` (length, head_width / 2) complex, `later` (length, length): what a place
        must not see. Written out: for rows as short as ours, the fused attention of a CPU is slower."""
        batch, length, _ = x.shape
        q = rotated(self.q(x).view(batch, length, self.shape.heads, self.shape.head_width), turn)
        k = rotated(self.k(x).view(batch, length, self.shape.kv_heads, self.shape.head_width), turn)
        v = self.v(x).view(batch, length, self.shape.kv_heads, self.shape.head_width)
        copies = self.shape.heads // self.shape.kv_heads
        k, v = (every.repeat_interleave(copies, dim=2).transpose(1, 2) for every in (k, v))
        scores = torch.matmul(q.transpose(1, 2), k.transpose(2, 3)).float() * self.shape.head_width**-0.5
        shares = scores.masked_fill(later, float("-inf")).softmax(-1).to(v.dtype)
        mixed = torch.matmul(shares, v).transpose(1, 2)
        attended: Tensor = self.output(mixed.reshape(batch, length, -1))
        return attended


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """`x` (batch, length, heads, head_width) with every pair of neighbours turned by its position's angle."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn[:, None, :]).flatten(-2).to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.feed_forward, bias=False)
        self.up = nn.Linear(shape.width, shape.feed_forward, bias=False)
        self.down = nn.Linear(shape.feed_forward, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return down


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(shape.width, eps=EPSILON)
        self.attn = Attention(shape)
        self.ffn_norm = nn.RMSNorm(shape.width, eps=EPSILON)
        self.ffn = FeedForward(shape)

    def forward(self, x: Tensor, turn: Tensor, later: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), turn, later)
        return x + self.ffn(self.ffn_norm(x))


class Network(nn.Module):
    """Token ids (batch, length) to what is said next, at chosen places."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=EPSILON)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                deep = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * shape.layers) if deep else 1.0))

    @property
    def parameters_in_all(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """States (wanted, width) at the places where `wanted` (batch, length) is true."""
        length = tokens.shape[1]
        x = self.dropout(self.embedding(tokens))
        turn = turns(length, self.shape.head_width).to(tokens.device)
        later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        for layer in self.layers:
            x = layer(x, turn, later)
        states: Tensor = self.norm(x[wanted])  # the output matrix is the largest: no row that nobody looks at
        return states

    def logits(self, states: Tensor) -> Tensor:
        """(wanted, vocabulary)."""
        return F.linear(states, self.embedding.weight)


def turns(length: int, head_width: int) -> Tensor:
    """Unit complex numbers (length, head_width / 2)."""
    frequencies = ROPE_BASE ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.polar(torch.ones_like(angles), angles)
