"""A bound on what a round may change: no tensor moves by more than a share of its own size.

What ADMM asks for is a direction and, far from where it was measured, little more: a step as long as the weights
themselves silences units that no later gradient reaches (a ReLU whose inputs are all negative has none). The bound
keeps the direction. Where a tensor's step stays below it, nothing is changed, and at a fixed point no step is longer
than zero: it does not move the solution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.base.layout import Layout

SMALLEST = 0.1
"""Root mean square that a tensor has for the bound at least: those that start at zero, biases above all, may grow."""


def bounded(consensus: Tensor, before: Tensor, bound: float, layout: Layout) -> Tensor:
    """The consensus (d,), no tensor of it farther from before, (d,), than `bound` times its size there."""
    step = consensus - before
    sizes = torch.tensor([SMALLEST**2 * size for size in layout.sizes]).sqrt_()
    longest = bound * torch.maximum(layout.norms(before[None])[0], sizes)
    lengths = layout.norms(step[None])[0]
    if not (lengths > longest).any():
        return consensus
    return before + step * layout.expand((longest / lengths).clamp(max=1.0))
