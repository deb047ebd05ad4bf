"""SAM: steps against the gradient at the worst point nearby, so that they end where the loss is flat.

Foret et al. 2021, arXiv 2010.01412. For every mini-batch,

    h  = grad F_i(w_i; batch)
    g  = grad F_i(w_i + radius h / |h|; the same batch) + weight_decay w_i, and what the method adds

and the step is SGD's. Symbols: radius the paper's rho, |h| over all tensors of a client. A step differentiates its
mini-batch twice and counts so among the passes. The loss that is reported is that at w_i. In a model with running
statistics both passes move them, as in most code. As the local step of FedAvg it is FedSAM (Qu et al. 2022,
arXiv 2206.02618), of FedCM MoFedSAM (ibid.).

On stability: as SGD's with the same lr. A radius that is large beside |w_i| makes the two gradients unlike each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.optimizers.base import Differentiate, Memory
from strategies.optimizers.sgd import Sgd

TINY = 1e-12
"""Added to |h|, as the authors do it."""


def ascent(gradient: Tensor, radius: float) -> Tensor:
    """Steps of one length along the gradients, (C, d)."""
    return gradient * (radius / (torch.linalg.vector_norm(gradient, dim=1, keepdim=True) + TINY))


class Sam(Sgd):
    """SGD with the gradients of points nearby.

    Args:
        layout: Layout of the model's parameters.
        momentum: Decay of the sum of gradients.
        weight_decay: Added to the gradient as weight_decay * w_i.
        radius: How far away they are; the paper: 0.05.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, layout: Layout, momentum: float, weight_decay: float, radius: float) -> None:
        super().__init__(layout, momentum, weight_decay)
        checks.not_negative("radius", radius)
        self.radius = radius

    def of_loss(self, memory: Memory, differentiate: Differentiate, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of points nearby, and the losses where the weights are."""
        slope, loss = differentiate(weights)
        return differentiate(weights + ascent(slope, self.radius))[0], loss
