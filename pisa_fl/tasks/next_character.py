"""Next-character prediction: the one after each of a sequence of T characters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pisa_fl.metric import Metric
from pisa_fl.tasks.base import DRAWS, TARGETS, Batch, Task
from pisa_fl.tasks.classification import drawn_classes, most_frequent


class NextCharacter(Task):
    """Cross-entropy of logits (B, T, K) with character numbers (B, T), averaged over a sequence's T positions.

    Accuracy is the share of characters whose largest logit is right; perplexity e to the mean loss.
    """

    metrics = (Metric("accuracy", "higher", "%", 100, 2, most=1), Metric("perplexity", "lower", "", 1, 3))
    loss_unit = "nats a character"
    classes = True

    def losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropies of the sequences, (B,)."""
        return F.cross_entropy(output.float().transpose(1, 2), batch[TARGETS], reduction="none").mean(dim=1)

    def drawn(self, output: Tensor, batch: Batch) -> Batch:
        """Characters by the probabilities that the logits stand for."""
        return {**batch, TARGETS: drawn_classes(output, batch[DRAWS])}

    def totals(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """What share of each sequence is right, summed."""
        right = (output.argmax(dim=2) == batch[TARGETS]).double()
        return {"correct": right.mean(dim=1).sum()}

    def measure(self, totals: Mapping[str, float], examples: int, loss: float) -> dict[str, float]:
        """Accuracy, 0..1, and perplexity."""
        return {
            "accuracy": totals["correct"] / examples,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
        }

    def chance(self, targets: Tensor) -> float:
        """The share of the most frequent character."""
        return most_frequent(targets)

    def objection(self, output: Any, batch: Batch) -> str | None:
        """It must be logits for every position."""
        shape, classes = tuple(batch[TARGETS].shape), int(batch[TARGETS].max()) + 1
        must = "must give logits, one float tensor of (examples, length, characters), and gives"
        if not isinstance(output, Tensor):
            return f"{must} a {type(output).__name__}"
        if output.dim() != 3 or tuple(output.shape[:2]) != shape or not output.is_floating_point():
            return f"{must} {output.dtype} of shape {tuple(output.shape)} for sequences {shape}"
        if output.shape[2] < classes:
            return f"{must} {output.shape[2]} numbers a position for {classes} characters"
        return None if output.isfinite().all() else f"{must} numbers that are not finite"
