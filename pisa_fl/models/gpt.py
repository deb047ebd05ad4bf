"""A small GPT for sequences of characters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pisa_fl.models.widths import check_widths


class GPT(nn.Module):
    """Decoder-only transformer (Radford et al. 2019, GPT-2): layer norm first, causal attention, learnt positions.

    Weights are drawn as GPT-2's: normal with deviation .02, those of residual branches divided by sqrt(2 layers),
    biases zero.

    Args:
        shape: (T,), the length of the sequences.
        classes: Number of different characters.
        layers: Number of blocks.
        heads: Attention heads of a block.
        width: Of the residual stream; a multiple of `heads`.

    Raises:
        ValueError: if a number is impossible.
    """

    def __init__(self, shape: tuple[int], classes: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        for key, value in (("layers", layers), ("heads", heads), ("width", width)):
            check_widths(key, [value])
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}")
        self.embedding = nn.Embedding(classes, width)
        self.position = nn.Parameter(torch.empty(shape[0], width))
        self.blocks = nn.Sequential(*(_Block(heads, width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, classes, bias=False)
        nn.init.normal_(self.position, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last = name.endswith("project")
                nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if last else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, characters: Tensor) -> Tensor:
        """Map character numbers (B, T) to logits (B, T, classes)."""
        stream = self.embedding(characters) + self.position[: characters.shape[1]]
        return self.out(self.norm(self.blocks(stream)))


class _Block(nn.Module):
    """Attention and a two-layer perceptron, each added to the stream."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.attention_project = nn.Linear(width, width)
        self.mlp = nn.Linear(width, 4 * width)
        self.mlp_project = nn.Linear(4 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        split = self.attention(self.attention_norm(stream)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (B, heads, T, width / heads)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.attention_project(seen.transpose(1, 2).flatten(2))
        return stream + self.mlp_project(F.gelu(self.mlp(self.mlp_norm(stream))))
