"""A recurrent network for sequences of characters."""

from __future__ import annotations

from torch import Tensor, nn

from pisa_fl.models.widths import check_widths


class LSTM(nn.Module):
    """Embedding, LSTM layers, and a linear layer at every position.

    McMahan et al. 2017 (arXiv 1602.05629) use an embedding of 8 and two layers of 256 for Shakespeare.

    Args:
        shape: (T,), the length of the sequences.
        classes: Number of different characters.
        embedding: Width of the embedding.
        hidden: Width of the layers.
        layers: How many there are.

    Raises:
        ValueError: if a width is impossible.
    """

    def __init__(self, shape: tuple[int], classes: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        check_widths("embedding", [embedding])
        check_widths("hidden", [hidden])
        check_widths("layers", [layers])
        self.embedding = nn.Embedding(classes, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.out = nn.Linear(hidden, classes)

    def forward(self, characters: Tensor) -> Tensor:
        """Map character numbers (B, T) to logits (B, T, classes)."""
        return self.out(self.lstm(self.embedding(characters))[0])
