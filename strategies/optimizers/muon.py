"""Muon: steps along the orthogonal polar factor of the momentum.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), scaled as Moonlight (Liu et al. 2025, arXiv 2502.16982). For a
matrix W (m x n; convolutions as out x in*kh*kw), g its gradient and what the method adds to it,

    M  = momentum M + (1 - momentum) g
    W -= lr (0.2 sqrt(max(m, n)) polar(momentum M + (1 - momentum) g) + weight_decay W)

An element of the polar factor has the size 1/sqrt(max(m, n)), and one of AdamW's steps about 0.2: scaled so, lr is
AdamW's for every matrix. Tensors of fewer than two dimensions follow AdamW with the same lr. Muon as published leaves
the first and last layers to AdamW too, and has lr sqrt(max(1, m/n)) in the place of 0.2 lr sqrt(max(m, n)).

A mean of orthogonal steps is not the step of the mean: where clients differ, local Muon drifts more than SGD, and stops
where no client does (arXiv 2509.26337 shows it). Steps do not shrink with the gradient: let lr fall (`lr_decay`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field
from strategies.base.polar import Method, polar
from strategies.optimizers.adamw import AdamW
from strategies.optimizers.base import Memory, Optimizer

MOMENTUM = "momentum"
"""M of all matrices, one after the other."""

SIZE = 0.2
"""Root mean square of a step's elements, AdamW's as Moonlight finds it."""


@checks.literals
class Muon(Optimizer):
    """Orthogonal steps of matrices, and AdamW's of the rest.

    Args:
        layout: Layout of the model's parameters.
        momentum: Decay of the momentum; Muon: 0.95. AdamW's first moment has it too.
        weight_decay: Share of the weights in a step; Moonlight: 0.1.
        nesterov: Whether to look ahead; Muon: yes.
        method: How the polar factor is found; Muon: `newton_schulz`.
        steps: Steps of the first two methods; Muon: 5.
        beta_2: Decay of AdamW's second moment.
        eps: Added to its root.

    Raises:
        ValueError: A value is outside its range.
    """

    def __init__(
        self,
        layout: Layout,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
        method: Method,
        steps: int,
        beta_2: float,
        eps: float,
    ) -> None:
        super().__init__(layout, momentum, weight_decay)
        checks.whole("steps", steps, 1)
        self._nesterov, self._method, self._steps = nesterov, method, steps
        self._matrices, rest = (
            Layout(
                {name: shape for name, shape in layout.shapes.items() if (name in layout.matrices) is wanted}
            )
            for wanted in (True, False)
        )
        self._others = AdamW(rest, momentum, weight_decay, beta_2, eps)

    def memory_fields(self) -> dict[str, Field]:
        """The momentum of the matrices, and AdamW's of the rest."""
        return {MOMENTUM: Field(self._matrices.size)} | self._others.memory_fields()

    def direction(self, memory: Memory, gradient: Tensor, weights: Tensor) -> Tensor:
        """Scaled polar factors, AdamW's steps, and the decay of both."""
        direction = torch.empty_like(gradient)
        own = self._part(self._matrices, gradient)
        ahead = memory[MOMENTUM].lerp_(own, 1 - self.momentum)
        if self._nesterov:
            ahead = torch.lerp(own, ahead, self.momentum)
        targets = dict(self.layout.each_matrix(direction))
        for name, matrix in self._matrices.each_matrix(ahead):
            factor = polar(matrix, self._method, self._steps)
            targets[name].copy_(factor * (SIZE * max(matrix.shape[-2:]) ** 0.5))
        direction.add_(weights, alpha=self.weight_decay)
        rest = self._others.layout
        others = self._others.direction(memory, self._part(rest, gradient), self._part(rest, weights))
        for name, span in rest.spans.items():
            direction[:, self.layout.spans[name]] = others[:, span]
        return direction

    def _part(self, layout: Layout, flat: Tensor) -> Tensor:
        """The tensors of one of the two layouts, one after the other."""
        return torch.cat([flat[:, :0], *(flat[:, self.layout.spans[name]] for name in layout.shapes)], dim=1)
