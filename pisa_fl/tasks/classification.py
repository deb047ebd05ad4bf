"""Classification: one of K classes for each example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pisa_fl.metric import Metric
from pisa_fl.tasks.base import DRAWS, TARGETS, Batch, Task


class Classification(Task):
    """Cross-entropy of logits (B, K) with class numbers (B,), and the share whose largest logit is right."""

    metrics = (Metric("accuracy", "higher", "%", 100, 2, most=1),)
    loss_unit = "nats"
    classes = True

    def losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropies, (B,)."""
        return F.cross_entropy(output.float(), batch[TARGETS], reduction="none")

    def drawn(self, output: Tensor, batch: Batch) -> Batch:
        """Classes by the probabilities that the logits stand for."""
        return {**batch, TARGETS: drawn_classes(output, batch[DRAWS])}

    def totals(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """How many are right."""
        return {"correct": (output.argmax(dim=1) == batch[TARGETS]).sum()}

    def measure(self, totals: Mapping[str, float], examples: int, loss: float) -> dict[str, float]:
        """The share of them, 0..1."""
        return {"accuracy": totals["correct"] / examples}

    def chance(self, targets: Tensor) -> float:
        """The share of the most frequent class."""
        return most_frequent(targets)

    def objection(self, output: Any, batch: Batch) -> str | None:
        """It must be logits, one row an example and as many columns as there are classes, or more."""
        examples, classes = len(batch[TARGETS]), int(batch[TARGETS].max()) + 1
        must = "must give logits, one float tensor of (examples, classes), and gives"
        if not isinstance(output, Tensor):
            return f"{must} a {type(output).__name__}"
        if output.dim() != 2 or len(output) != examples or not output.is_floating_point():
            return f"{must} {output.dtype} of shape {tuple(output.shape)} for {examples} examples"
        if output.shape[1] < classes:
            return f"{must} {output.shape[1]} numbers an example for {classes} classes"
        return None if output.isfinite().all() else f"{must} numbers that are not finite"


def drawn_classes(logits: Tensor, draws: Tensor) -> Tensor:
    """Class numbers (...) by the probabilities of logits (..., K), where numbers from [0, 1) fall among their sums."""
    sums = logits.detach().float().softmax(dim=-1).cumsum(dim=-1)
    return (sums <= draws.unsqueeze(-1)).sum(dim=-1).clamp(max=logits.shape[-1] - 1)


def most_frequent(targets: Tensor) -> float:
    """The share of the most frequent number."""
    return float(targets.flatten().bincount().max()) / targets.numel()
