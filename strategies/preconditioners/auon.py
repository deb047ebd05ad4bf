"""AuON: normalised momentum, without orthogonalisation.

AuON (Maity 2025, arXiv 2509.24320). For a matrix W (m x n; convolutions as out x in*kh*kw), h the federation's
gradient and M its momentum,

    M = mu M + (1-mu) h
    X = mu M + (1-mu) h, divided by its Frobenius norm
    D = q sqrt(m n) X / rms(cosh X)

cosh x is 1 + x^2/2 for elements that are small, as those of a large matrix of norm one are: rms(cosh X) is between 1
and 1 + 1/(m n), and D is normalised momentum to that precision. The paper's factor sqrt(max(1, m/n)) is lost in sigma
= q/lr. The code that its author published differs from the paper: there the momentum is not normalised, only divided
by rms(cosh(1.5 X)), which leaves SGD; this is the paper's. `hybrid` takes one step of Newton and Schulz's before.

How P acts on clients whose data differ, and what its fixed points are, is in `strategies.preconditioners.direction`.
"""

from __future__ import annotations

from torch import Tensor

from strategies.base.layout import Layout
from strategies.base.polar import polar, unit
from strategies.preconditioners.direction import MomentumDirection


class Auon(MomentumDirection):
    """Steps along the momentum, of a length of their own.

    Args:
        layout: Layout of the model's parameters.
        mu: Decay of the momentum; the author: 0.95, of mini-batches' gradients.
        nesterov: Whether to look ahead; the author's code: yes.
        hybrid: Whether one Newton-Schulz step is taken before, with Muon's coefficients.
        beta: Decay of the moving averages of squares, from which the penalty follows.
        eps: Added to their roots.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self, layout: Layout, mu: float, nesterov: bool, hybrid: bool, beta: float, eps: float
    ) -> None:
        super().__init__(layout, mu, nesterov, beta, eps)
        self._hybrid = hybrid

    def point(self, matrix: Tensor, size: Tensor) -> Tensor:
        """The momentum, or one step towards its polar factor, normalised and divided by rms(cosh)."""
        x = unit(polar(matrix, "newton_schulz", 1) if self._hybrid else matrix)
        brake = x.cosh().square().mean(dim=(-2, -1), keepdim=True).sqrt()
        return x * (size * (matrix.shape[-2] * matrix.shape[-1]) ** 0.5 / brake)
