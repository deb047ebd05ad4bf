"""Muon: orthogonalised momentum.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon). For a matrix W (m x n; convolutions as out x in*kh*kw),
h the federation's gradient and M its momentum,

    M = mu M + (1-mu) h
    D = q sqrt(max(m, n)) polar(mu M + (1-mu) h)

an element of the polar factor being of the size 1/sqrt(max(m, n)). Scaled so, lr means for every matrix what it means
for others, as in Moonlight (arXiv 2502.16982); Muon's own factor, sqrt(max(1, m/n)), is lost in sigma = q/lr. The
first and last layers, which Muon leaves to Adam, are orthogonalised too.

How P acts on clients whose data differ, and what its fixed points are, is in `strategies.preconditioners.direction`.
"""

from __future__ import annotations

from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.polar import Method, polar
from strategies.preconditioners.direction import MomentumDirection


@checks.literals
class Muon(MomentumDirection):
    """Steps along the orthogonal polar factor of the momentum.

    Args:
        layout: Layout of the model's parameters.
        mu: Decay of the momentum; Muon: 0.95, of mini-batches' gradients.
        nesterov: Whether to look ahead; Muon: yes.
        method: How the polar factor is found; Muon: `newton_schulz`.
        steps: Steps of the first two methods; Muon: 5.
        beta: Decay of the moving averages of squares.
        eps: Added to their roots.

    Raises:
        ValueError: A value is outside its range.
    """

    def __init__(
        self, layout: Layout, mu: float, nesterov: bool, method: Method, steps: int, beta: float, eps: float
    ) -> None:
        super().__init__(layout, mu, nesterov, beta, eps)
        checks.whole("steps", steps, 1)
        self._method, self._steps = method, steps

    def point(self, matrix: Tensor, size: Tensor) -> Tensor:
        """Q sqrt(max(m, n)) times the polar factor."""
        return polar(matrix, self._method, self._steps) * (size * max(matrix.shape[-2:]) ** 0.5)
