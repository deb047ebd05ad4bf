"""FISMO: momentum orthogonalised in the metric of two Kronecker factors of the Fisher matrix. Experimental.

FISMO (Xu, Yan and Zhang 2026, arXiv 2601.21750, Algorithm 1). For a matrix W (m x n; convolutions as out x in*kh*kw),
h the federation's gradient and G = h/q,

    L = G R^-1 G^T / n + mu I          P = m / tr(.) of gamma P + (1-gamma) L          P = I at first
    K = G^T P^-1 G / m + mu I          R = n / tr(.) of gamma R + (1-gamma) K          R = I at first
    M = b M + (1-b) P^(-1/2) G R^(-1/2)
    D = q sqrt(max(m, n)) P^(-1/2) polar(M) R^(-1/2)

(R is the paper's Q, and L's R the one of the round before.) With mu large P and R stay I, and D is Muon's without the
look ahead.

Two things are not the paper's. It has h in place of h/q, so that small gradients leave nothing but mu in the factors;
and here, sides longer than `max_side` have I for ever. The paper itself was not at hand: the equations are from two
independent summaries that agree, which do not say the authors' b, gamma and mu, nor how they read convolutions. The
factors are decomposed in double precision, for their condition reaches 1/mu. All this takes m^2 + n^2 numbers and m^3
+ n^3 work a matrix and round, as much as `kronecker`.

How P acts on clients whose data differ, and what its fixed points are, is in `strategies.preconditioners.direction`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field
from strategies.base.polar import Method, polar
from strategies.preconditioners.base import State
from strategies.preconditioners.direction import Direction


@checks.literals
class Fismo(Direction):
    """Steps along the polar factor of whitened momentum, seen through the same metric. Experimental.

    Args:
        layout: Layout of the model's parameters.
        momentum: Decay b of the whitened momentum.
        gamma: Decay of the two factors.
        damping: mu, what is added to them.
        max_side: Sides longer than that have no factor.
        method: How the polar factor is found; the paper: `newton_schulz`.
        steps: Steps of the first two methods.
        beta: Decay of the moving averages of squares.
        eps: Added to their roots.

    Raises:
        ValueError: A value is outside its range.
    """

    def __init__(
        self,
        layout: Layout,
        momentum: float,
        gamma: float,
        damping: float,
        max_side: int,
        method: Method,
        steps: int,
        beta: float,
        eps: float,
    ) -> None:
        super().__init__(layout, beta, eps)
        checks.decay("momentum", momentum)
        checks.decay("gamma", gamma)
        checks.positive("damping", damping)
        checks.whole("max_side", max_side, 1)
        checks.whole("steps", steps, 1)
        self._momentum, self._gamma, self._damping = momentum, gamma, damping
        self._method, self._steps = method, steps
        # per side, the layout of its factors
        self._sides = [
            Layout(
                {
                    name: (shape[side],) * 2
                    for name, shape in layout.matrices.items()
                    if shape[side] <= max_side
                }
            )
            for side in (0, 1)
        ]

    def own_fields(self) -> dict[str, Field]:
        """`momentum` M (d,); `left` P - I and `right` R - I of all matrices."""
        left, right = (Field(side.size) for side in self._sides)
        return {"momentum": Field(self.layout.size), "left": left, "right": right}

    def follow(
        self, state: State, observed: Tensor, sizes: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step of the factors, the momentum in their metric, and its polar factor seen through it."""
        memory = {name: state[name].clone() for name in self.own_fields()}
        momenta = dict(self.layout.each_matrix(memory["momentum"]))
        lefts, rights = (
            dict(side.each_matrix(memory[name]))
            for side, name in zip(self._sides, ("left", "right"), strict=True)
        )
        directions = {}
        for name, gradient in self.layout.each_matrix(observed):
            m, n = self.layout.matrices[name]
            tiny = torch.finfo(gradient.dtype).tiny
            seen = (gradient / sizes[name].clamp(min=tiny)).double()
            left, right = lefts.get(name), rights.get(name)
            half = _within(seen, None, _root(right))
            row = _root(self._learn(left, half @ half.mT / n))
            half = _within(seen, row, None)
            column = _root(self._learn(right, half.mT @ half / m))
            white = _within(half, None, column).to(gradient.dtype)
            momentum = momenta[name].lerp_(white, 1 - self._momentum)
            step = _within(polar(momentum, self._method, self._steps).double(), row, column)
            directions[name] = step.to(gradient.dtype) * (sizes[name] * max(m, n) ** 0.5)
        return memory, directions

    def _learn(self, factor: Tensor | None, gram: Tensor) -> Tensor | None:
        """One step of a factor less I, in place."""
        if factor is None:
            return None
        one = torch.eye(factor.shape[-1], dtype=gram.dtype, device=gram.device)
        mean = self._gamma * (factor + one) + (1 - self._gamma) * (gram + self._damping * one)
        trace = mean.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
        return factor.copy_(mean / trace - one)


def _root(factor: Tensor | None) -> Tensor | None:
    """The factor's inverse root, from what it is less I."""
    if factor is None:
        return None
    values, vectors = torch.linalg.eigh(factor.double())
    return vectors * (values + 1).clamp(min=1e-12).rsqrt().unsqueeze(-2) @ vectors.mT


def _within(matrix: Tensor, row: Tensor | None, column: Tensor | None) -> Tensor:
    """The matrix between two factors, where there are such."""
    matrix = matrix if row is None else row @ matrix
    return matrix if column is None else matrix @ column
