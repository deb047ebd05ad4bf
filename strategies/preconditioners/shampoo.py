"""Shampoo as a curvature preconditioner: fourth roots of the moments of rows and columns.

Shampoo (Gupta et al. 2018, arXiv 1802.09568, Algorithm 1), with moving averages in place of sums. For a matrix W
(m x n; convolutions as out x in*kh*kw) and G its gradient in a round,

    L = beta L + (1-beta) G G^T / n          R = beta R + (1-beta) G^T G / m
    Q = (L/(1-beta^t))^(1/4) x (R/(1-beta^t))^(1/4) + eps

so that at sigma = 0 the step is L^(-1/4) G R^(-1/4). The paper does not divide by n and m; so, Q is of the size of the
gradient's elements, and `lr` means what it means for others. With L = U diag(a) U^T and R = Z diag(b) Z^T, Q is
diagonal in the bases U x Z, and (sigma I + rho Q)^-1 is applied there exactly. It is `kronecker` with
sqrt(a b^T / (m n)) in place of the moment v. Sides longer than `max_side` keep the basis that they have; tensors of
fewer than two dimensions follow the second moment.
"""

from __future__ import annotations

from torch import Tensor

from strategies.base.layout import Layout
from strategies.preconditioners.base import State
from strategies.preconditioners.kronecker import Kronecker


class Shampoo(Kronecker):
    """Steps by the fourth roots of two Gram matrices.

    Args:
        layout: Layout of the model's parameters.
        beta: Decay of the moving averages; the paper sums, the authors' later work: 0.999.
        eps: Added to Q's eigenvalues; the paper adds 1e-4 to L and R.
        max_side: Sides longer than that keep their basis.
        refresh: Rounds between decompositions.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, layout: Layout, beta: float, eps: float, max_side: int, refresh: int) -> None:
        super().__init__(layout, beta, eps, max_side, refresh, factored=0.0)

    def _root(self, state: State) -> Tensor:
        """(a b^T)^(1/4) + eps for matrices, the root of the moment for the rest, (C, d)."""
        moment = state["moment"].clone()
        for matrix, left, right in self._matrices(moment):
            rows, columns = (state["spectra"][:, side.spectrum] for side in (left, right))
            products = rows.unsqueeze(-1) * columns.unsqueeze(-2)
            matrix.copy_((products / (left.size * right.size)).sqrt())
        return (moment / state["mass"]).sqrt_().add_(self.eps)
