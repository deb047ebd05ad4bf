"""Regression: a number for each example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pisa_fl.metric import Metric
from pisa_fl.tasks.base import DRAWS, TARGETS, Batch, Task


class Regression(Task):
    """Squared error of one number an example, (B,) or (B, 1), and what share of the targets' variance is explained.

    Targets are standardised by their training mean and deviation (`pisa_fl.data.table`), and so are loss and
    root-mean-square error: one standard deviation of the target is 1.
    """

    metrics = (Metric("r2", "higher", most=1), Metric("rmse", "lower", "standard deviations"))
    loss_unit = "squared standard deviations"

    def losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Squared errors, (B,)."""
        return (output.float().reshape(len(output)) - batch[TARGETS]).square()

    def drawn(self, output: Tensor, batch: Batch) -> Batch:
        """Normal targets of variance 1/2 around the output: of such, the squared error is the density's logarithm."""
        draws = batch[DRAWS].clamp(1e-7, 1 - 1e-7)
        return {**batch, TARGETS: output.detach().float().reshape(len(output)) + torch.erfinv(2 * draws - 1)}

    def totals(self, output: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Sums of targets and of their squares."""
        targets = batch[TARGETS].double()
        return {"sum": targets.sum(), "squares": targets.square().sum()}

    def measure(self, totals: Mapping[str, float], examples: int, loss: float) -> dict[str, float]:
        """Coefficient of determination, 0 where all targets are equal, and root of the mean squared error."""
        variance = totals["squares"] / examples - (totals["sum"] / examples) ** 2
        return {"r2": 1 - loss / variance if variance > 0 else 0.0, "rmse": loss**0.5}

    def chance(self, targets: Tensor) -> float:
        """Zero: what the targets' mean explains of their variance."""
        return 0.0

    def objection(self, output: Any, batch: Batch) -> str | None:
        """It must be one number an example."""
        examples = len(batch[TARGETS])
        must = "must give one number an example, a float tensor of (examples,) or (examples, 1), and gives"
        if not isinstance(output, Tensor):
            return f"{must} a {type(output).__name__}"
        if tuple(output.shape) not in ((examples,), (examples, 1)) or not output.is_floating_point():
            return f"{must} {output.dtype} of shape {tuple(output.shape)} for {examples} examples"
        return None if output.isfinite().all() else f"{must} numbers that are not finite"
