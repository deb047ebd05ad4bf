"""SWAN: the gradient of this round, normalised and whitened, without memory.

SWAN (Ma, Gong, Scetbon and Meeds 2024, arXiv 2412.13148, Algorithms 1 to 3). For a matrix W (m x n; convolutions as
out x in*kh*kw) and h the federation's gradient,

    X = (h - mean of its row) / standard deviation of its row               GradNorm
    Y = (X X^T)^(-1/2) X                                                    GradWhitening
    D = q |X|_F / |Y|_F Y

For m <= n, Y is the orthogonal polar factor of X; for m > n, where X X^T has no inverse, the smaller side is
whitened, as the paper does by transposing, and the polar factor it is again. The paper finds it in 10 of Newton and
Schulz's cubic steps; here it is one of the shared methods. Rows of one element are not centred, for nothing would be
left.

What GradNorm takes away is never followed: at a fixed point the rows of h are constant, which is the problem's
solution but for the m means. Nothing is remembered of matrices, so that an aligned state is as good as new after any
pause.

How P acts on clients whose data differ is in `strategies.preconditioners.direction`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.polar import Method, polar
from strategies.preconditioners.direction import MomentumDirection


@checks.literals
class Swan(MomentumDirection):
    """Steps along the whitened gradient.

    Args:
        layout: Layout of the model's parameters.
        method: How the polar factor is found; the paper: Newton and Schulz's cubic.
        steps: Steps of the first two methods; the paper: 10, of a cubic.
        beta: Decay of the moving averages of squares, from which the penalty follows.
        eps: Added to their roots.

    Raises:
        ValueError: A value is outside its range.
    """

    def __init__(self, layout: Layout, method: Method, steps: int, beta: float, eps: float) -> None:
        super().__init__(layout, 0.0, False, beta, eps)
        checks.whole("steps", steps, 1)
        self._method, self._steps = method, steps

    def point(self, matrix: Tensor, size: Tensor) -> Tensor:
        """The whitened gradient, as long as the normalised one."""
        normal = normalised(matrix)
        white = polar(normal, self._method, self._steps)
        lengths = [x.norm(dim=(-2, -1), keepdim=True) for x in (normal, white)]
        return white * (size * lengths[0] / lengths[1].clamp(min=torch.finfo(white.dtype).tiny))


def normalised(matrix: Tensor) -> Tensor:
    """Rows of mean 0 and standard deviation 1; those of equal elements are zero."""
    if matrix.shape[-1] == 1:
        return matrix.sign()
    centred = matrix - matrix.mean(dim=-1, keepdim=True)
    # once more: whitening would make a direction of what rounding left of a mean
    centred = centred - centred.mean(dim=-1, keepdim=True)
    deviation = centred.square().mean(dim=-1, keepdim=True).sqrt()
    # of equal elements, rounding is all that is left
    least = matrix.abs().amax(dim=-1, keepdim=True) * torch.finfo(matrix.dtype).eps
    return torch.where(deviation > least, centred / deviation, 0.0)
