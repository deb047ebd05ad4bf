"""PolarGrad: orthogonalised momentum that keeps the gradient's scale.

PolarGrad (Lau, Long and Su 2025, arXiv 2505.21799; momentum first). For a matrix W (m x n; convolutions as out x
in*kh*kw), h the federation's gradient and M its momentum,

    M = mu M + (1-mu) h
    U = polar(M)
    D = <M, U> U

<M, U> is the sum of M's singular values: P(c h) = c P(h), so that steps shrink with the gradient and end by
themselves. D is longer than M, by the root of the rank up to the rank, for which `rate` makes up.

How P acts on clients whose data differ, and what its fixed points are, is in `strategies.preconditioners.direction`.
"""

from __future__ import annotations

from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.polar import Method, polar
from strategies.preconditioners.direction import MomentumDirection


@checks.literals
class PolarGrad(MomentumDirection):
    """Steps along the polar factor of the momentum, as long as its singular values say.

    Args:
        layout: Layout of the model's parameters.
        mu: Decay of the momentum; the paper: 0.95, of mini-batches' gradients.
        method: How the polar factor is found; the paper: QDWH, which is exact as `eigh` is.
        steps: Steps of the other two methods.
        beta: Decay of the moving averages of squares, from which the penalty follows.
        eps: Added to their roots.

    Raises:
        ValueError: A value is outside its range.
    """

    rate = 0.1
    spread = 1.0  # D is long enough by itself

    def __init__(
        self, layout: Layout, mu: float, method: Method, steps: int, beta: float, eps: float
    ) -> None:
        super().__init__(layout, mu, False, beta, eps)
        checks.whole("steps", steps, 1)
        self._method, self._steps = method, steps

    def point(self, matrix: Tensor, size: Tensor) -> Tensor:
        """The polar factor, times the momentum's part along it."""
        factor = polar(matrix, self._method, self._steps)
        return factor * (matrix * factor).sum(dim=(-2, -1), keepdim=True)
