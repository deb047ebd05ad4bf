"""NSISA's preconditioners: steps orthogonalised by Newton-Schulz, and the same idea as a true Q.

`NewtonSchulz` is the authors' form (NSISA, arXiv 2502.10784; code of its authors), for matrices W (m x n;
convolutions as out x in*kh*kw), a direction followed by a soft sign:

    b   = mu b + g
    o   = NS5(g + mu b) sqrt(max(1, m/n))
    u   = o + pi
    w_i = w - u / (sigma + rho (|u| + eps))

NS5 is five steps of Newton and Schulz's iteration with Muon's coefficients (`strategies.base.polar`).
Since a sum of orthogonalised gradients may vanish where the sum of gradients does not, its fixed points under skew
are not those of the problem.

`Spectral` repairs that: Q is positive semi-definite and the residual stays linear in the gradient,

    S = beta S + (1-beta) R R^T / n,     Q = (S / (1-beta^t))^(1/2)

on the smaller side of the matrix, R the gradient or residual, and (sigma I + rho Q)^-1 is applied exactly by an
eigendecomposition. At sigma = 0, beta = 0 and rho = 1 the step along R is sqrt(n) times R's orthogonal polar
factor, whose elements have the size of one: `lr` means what it means for SISA.

Tensors of fewer than two dimensions follow SISA in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field, squared
from strategies.base.polar import polar
from strategies.preconditioners.base import Preconditioner, State
from strategies.preconditioners.second_moment import SecondMoment


class NewtonSchulz(Preconditioner):
    """The authors' NSISA; see the module's first equations.

    Args:
        layout: Layout of the model's parameters.
        mu: Momentum of the orthogonalised gradient; the authors: 0.95.
        steps: Newton-Schulz steps; the authors: 5.
        eps: Added to |u|; the authors: 1e-8.
        others: Preconditioner of tensors with fewer than two dimensions, given its layout.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self, layout: Layout, mu: float, steps: int, eps: float, others: Callable[[Layout], SecondMoment]
    ) -> None:
        checks.decay("mu", mu)
        checks.whole("steps", steps, 1)
        checks.not_negative("eps", eps)
        self.layout = layout
        self.mu, self.steps, self.eps = mu, steps, eps
        self._others = others(layout)

    def state_fields(self) -> dict[str, Field]:
        """SISA's moments, and `momentum` b (d,)."""
        return self._others.state_fields() | {"momentum": Field(self.layout.size)}

    def statistic_fields(self) -> dict[str, Field]:
        """SISA's, and `gradient` (d,)."""
        return self._others.statistic_fields() | {"gradient": squared(self.layout.size)}

    def statistic(self, gradient: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """SISA's, and the gradient itself."""
        return self._others.statistic(gradient, residual) | {"gradient": gradient}

    def accumulate(self, state: State, statistic: State) -> dict[str, Tensor]:
        """One step of the moments and of the momentum."""
        return self._others.accumulate(state, statistic) | {
            "momentum": state["momentum"] * self.mu + statistic["gradient"]
        }

    def direction(self, state: State, gradient: Tensor) -> Tensor:
        """o for matrices, g for the rest."""
        direction = gradient.clone()
        targets = dict(self.layout.each_matrix(direction))
        for name, matrix in self.layout.each_matrix(gradient + self.mu * state["momentum"]):
            rows, columns = self.layout.matrices[name]
            factor = polar(matrix, "newton_schulz", self.steps)
            targets[name].copy_(factor * max(1.0, rows / columns) ** 0.5)
        return direction

    def scale(self, state: State) -> Tensor | None:
        """1/sqrt(n) for an m x n matrix, the size of an element of its orthogonal factor; SISA's for the rest."""
        scale = self._others.scale(state)
        if scale is None:
            return None
        for name, matrix in self.layout.each_matrix(scale.unsqueeze(0)):
            matrix.fill_(self.layout.matrices[name][1] ** -0.5)
        return scale

    def solve(self, state: State, residual: Tensor, sigma: Tensor, rho: float) -> Tensor:
        """Soft sign of u for matrices, SISA's step for the rest."""
        soft = residual / (sigma + rho * (residual.abs() + self.eps))
        step = self._others.solve(state, residual, sigma, rho)
        soft_parts = dict(self.layout.each_matrix(soft))
        for name, matrix in self.layout.each_matrix(step):
            matrix.copy_(soft_parts[name])
        return step


@checks.literals
class Spectral(Preconditioner):
    """NSISA as a curvature preconditioner; see the module's second equations.

    Args:
        layout: Layout of the model's parameters.
        beta: Decay of the moving average of the Gram matrices.
        moment_of: `residual` (g + pi) or `gradient` (g): whose Gram matrices.
        others: Preconditioner of tensors with fewer than two dimensions, given its layout.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self,
        layout: Layout,
        beta: float,
        moment_of: Literal["residual", "gradient"],
        others: Callable[[Layout], SecondMoment],
    ) -> None:
        checks.decay("beta", beta)
        self.layout, self.beta = layout, beta
        self._of_gradient = moment_of == "gradient"
        self.gradient_field = "factor" if self._of_gradient else None
        self._others = others(layout)
        self._sides = {name: min(shape) for name, shape in layout.matrices.items()}

    def state_fields(self) -> dict[str, Field]:
        """SISA's moments; `gram` and `gram-mass`: the Gram matrices of all tensors, one after the other."""
        size = sum(side**2 for side in self._sides.values())
        return self._others.state_fields() | {"gram": Field(size), "gram-mass": Field(1, minimum=0.0)}

    def statistic_fields(self) -> dict[str, Field]:
        """SISA's, and `factor` R (d,)."""
        return self._others.statistic_fields() | {"factor": squared(self.layout.size)}

    def statistic(self, gradient: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """SISA's, and the gradient or residual itself."""
        factor = gradient if self._of_gradient else residual
        return self._others.statistic(gradient, residual) | {"factor": factor}

    def accumulate(self, state: State, statistic: State) -> dict[str, Tensor]:
        """One step of the moving averages."""
        grams = []
        for _, matrix in self.layout.each_matrix(statistic["factor"]):
            wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
            grams.append((wide @ wide.mT / wide.shape[-1]).flatten(start_dim=1))
        gram = torch.cat(grams, dim=1) if grams else state["gram"]
        return self._others.accumulate(state, statistic) | {
            "gram": state["gram"] * self.beta + gram * (1 - self.beta),
            "gram-mass": state["gram-mass"] * self.beta + (1 - self.beta),
        }

    def scale(self, state: State) -> Tensor | None:
        """Mean eigenvalue of Q for each matrix, SISA's for the rest."""
        scale = self._others.scale(state)
        if scale is None:
            return None
        spectra = dict(self._spectra(state))
        for name, part in self.layout.each_matrix(scale.unsqueeze(0)):
            part.fill_(float(spectra[name][0].mean()))
        return scale

    def solve(self, state: State, residual: Tensor, sigma: Tensor, rho: float) -> Tensor:
        """V diag(1/(sigma + rho s)) V^T R for matrices, on their smaller side; SISA's step for the rest."""
        step = self._others.solve(state, residual, sigma, rho)
        targets = dict(self.layout.each_matrix(step))
        matrices = dict(self.layout.each_matrix(residual))
        for name, vectors, inverse in self.factored(
            state, sigma, rho, lambda: list(self._inverses(state, sigma, rho))
        ):
            matrix = matrices[name]
            tall = matrix.shape[-2] > matrix.shape[-1]
            wide = matrix.mT if tall else matrix
            solved = vectors @ (inverse * (vectors.mT @ wide))
            targets[name].copy_(solved.mT if tall else solved)
        return step

    def _inverses(self, state: State, sigma: Tensor, rho: float) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Eigenvectors of each Q, and 1/(sigma + rho s) of their eigenvalues s, (C, side, 1)."""
        sigmas = dict(self.layout.each_matrix(sigma.expand(1, self.layout.size)))
        for name, (roots, vectors) in self._spectra(state):
            # sigma is one number a tensor, so any of its elements will do
            yield name, vectors, 1 / (sigmas[name][:, 0, 0, None] + rho * roots).unsqueeze(-1)

    def _spectra(self, state: State) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Eigenvalues (C, side) and eigenvectors (C, side, side) of each Q."""
        start = 0
        for name, side in self._sides.items():
            gram = state["gram"][:, start : start + side**2].unflatten(-1, (side, side))
            start += side**2
            values, vectors = torch.linalg.eigh(gram / state["gram-mass"].unsqueeze(-1))
            yield name, (values.clamp(min=0).sqrt(), vectors)
