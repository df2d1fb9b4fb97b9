"""Pre-norm transformers with plain softmax attention: fused attention has no second derivative."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a GELU layer of four times the width, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Of x (N, T, width); ``padding`` (N, T) is true where nothing is to be seen."""
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        if self.causal:
            future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None, :], -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, width)
        x = x + self.out(mixed)
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class CharGPT(nn.Module):
    """Next-character logits (N, V, T) of ids (N, T): torch's cross-entropy wants the classes second.

    Linear weights start with deviation .08 and embeddings with .3: the network of the curvature measurements.
    """

    def __init__(self, symbols: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.08)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (N, V, T)."""
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits.transpose(1, 2)


class SentenceTransformer(nn.Module):
    """Class logits (N, C) of word numbers (N, T), 0 for padding: the mean over words in front of a linear layer."""

    def __init__(self, words: int, length: int, width: int, layers: int, heads: int, classes: int) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        for embedding in (self.word, self.position):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (N, C)."""
        padding = ids == 0
        x = self.word(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, padding)
        there = (~padding).unsqueeze(-1).to(x.dtype)
        logits: Tensor = self.head((self.norm(x) * there).sum(1) / there.sum(1))
        return logits
