"""The second moment in Kronecker eigenbases, the preconditioner of PISA's default.

SOAP (Vyas et al. 2025, arXiv 2409.11321, Algorithm 3) turned into a curvature preconditioner. For a matrix W (m x n;
convolutions as out x in*kh*kw) and G its gradient in a round,

    L  = beta L + (1-beta) G G^T          R  = beta R + (1-beta) G^T G
    U  = eigenvectors of L,               Z  = eigenvectors of R            every `refresh` rounds
    a  = eigenvalues of L,                b  = eigenvalues of R
    v  = beta v + (1-beta) (U^T G Z)^2
    s  = [ (1-factored) v + factored a b^T / sum(a) ] / (1-beta^t)
    Q  = (U x Z) diag(sqrt(s) + eps) (U x Z)^T

so that (sigma I + rho Q)^-1 R = U [ U^T R Z / (sigma + rho (sqrt(s) + eps)) ] Z^T exactly. Tensors of fewer than two
dimensions have s = v / (1-beta^t); they, and sides longer than `max_side`, keep the basis that they have, in which a
and b are moving averages of rows' and columns' squared norms. With both sides so, and `factored` 0, Q is SISA's.

a b^T / sum(a) is the matrix of rank one that has v's sums of rows and columns, as long as the bases stay: what v would
be if rows and columns of the gradient were independent. It is Adafactor's estimate (arXiv 1804.04235) in these bases,
and alone it makes Q Shampoo's without its square root (Morwani et al. 2025, arXiv 2406.17748). Where few clients
answer, a and b are known much better than each element of v. `factored` 0 is SOAP's moment.

When the eigenvectors change, v is carried over as the expectation over uncorrelated coordinates has it,
v'_kl = sum_ij (u_i^T u'_k)^2 v_ij (z_j^T z'_l)^2, which is continuous in the eigenvectors.

What is not SOAP's either: L and R are kept and decomposed in double precision. A gradient in single precision tells
singular values of a millionth of the largest, but their squares would be lost.

Everything follows from the averaged gradient: aligned, it takes no more on the wire than SISA.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field, squared
from strategies.preconditioners.base import Preconditioner, State
from strategies.preconditioners.eigenbases import Eigenbases, Side, turned


class Kronecker(Preconditioner):
    """Adaptive steps in the eigenbases of each matrix's rows and columns.

    Args:
        layout: Layout of the model's parameters.
        beta: Decay of all moving averages; SOAP: 0.95 for mini-batches, 0.99 for the full gradients here.
        eps: Added to the root; SOAP: 1e-8.
        max_side: Sides longer than that keep their basis; SOAP: 10,000.
        refresh: Rounds between decompositions; SOAP: 10.
        factored: Share of the moment that is taken from the eigenvalues alone, in [0, 1]; SOAP: 0.

    Raises:
        ValueError: A number is outside its range.
    """

    gradient_field = "observed"

    def __init__(
        self, layout: Layout, beta: float, eps: float, max_side: int, refresh: int, factored: float
    ) -> None:
        checks.decay("beta", beta)
        checks.not_negative("eps", eps)
        checks.whole("max_side", max_side, 1)
        checks.whole("refresh", refresh, 1)
        checks.fraction("factored", factored)
        self.layout, self.beta, self.eps, self.refresh, self._share = layout, beta, eps, refresh, factored
        self._eigen = Eigenbases(layout.matrices, max_side)

    def state_fields(self) -> dict[str, Field]:
        """`moment` v (d,), `mass` 1-beta^t and `age` t (1,); `spectra` a and b, `bases` and `grams` of all sides."""
        return {
            "moment": Field(self.layout.size, minimum=0.0),
            "mass": Field(1, minimum=0.0),
            "spectra": Field(self._eigen.spectra, minimum=0.0),
            "bases": Field(self._eigen.bases),
            "age": Field(1, minimum=0.0),
            "grams": Field(self._eigen.bases, types=("float64",)),
        }

    def solver_fields(self) -> dict[str, Field]:
        """All but the Gram matrices."""
        fields = self.state_fields()
        return {name: fields[name] for name in ("moment", "mass", "spectra", "bases")}

    def statistic_fields(self) -> dict[str, Field]:
        """`observed`: the gradient, (d,)."""
        return {"observed": squared(self.layout.size)}

    def statistic(self, gradient: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """The gradient itself."""
        return {"observed": gradient}

    def accumulate(self, state: State, statistic: State) -> dict[str, Tensor]:
        """One step of the moving averages, and every `refresh` rounds of the bases."""
        observed, due = statistic["observed"], state["age"] % self.refresh == 0
        grams = self._grams(state["grams"], observed)
        moment, spectra, bases = state["moment"], state["spectra"], state["bases"]
        if due.any():
            fresh, values = self._eigen.decomposed(grams)
            fresh = fresh.to(observed.dtype)
            moment = torch.where(due, self._carried(moment, bases, fresh), moment)
            bases = torch.where(due, fresh, bases)
        square = self._turn(observed, bases).square()
        spectra = spectra * self.beta + self._sums(square) * (1 - self.beta)
        if due.any():
            spectra = torch.where(due & self._eigen.turned.to(due.device), values.to(observed.dtype), spectra)
        return {
            "moment": moment * self.beta + square * (1 - self.beta),
            "mass": state["mass"] * self.beta + (1 - self.beta),
            "spectra": spectra,
            "bases": bases,
            "age": state["age"] + 1,
            "grams": grams,
        }

    def scale(self, state: State) -> Tensor | None:
        """Mean of sqrt(s) + eps over each tensor, (d,)."""
        if not state["mass"].any():
            return None
        return self.layout.expand(self.layout.mean(self._root(state)))[0]

    def solve(self, state: State, residual: Tensor, sigma: Tensor, rho: float) -> Tensor:
        """Turned into the eigenbases, divided by sigma + rho (sqrt(s) + eps), turned back."""
        inverse = self.factored(state, sigma, rho, lambda: 1 / (sigma + rho * self._root(state)))
        inside = self._turn(residual, state["bases"]).mul_(inverse)
        return self._turn(inside, state["bases"], back=True)

    def _root(self, state: State) -> Tensor:
        """sqrt(s) + eps, (C, d)."""
        moment = state["moment"]
        if self._share:
            moment = moment.clone()
            for matrix, left, right in self._matrices(moment):
                rows, columns = (state["spectra"][:, side.spectrum] for side in (left, right))
                rows = rows / rows.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
                matrix.lerp_(rows.unsqueeze(-1) * columns.unsqueeze(-2), self._share)
        return (moment / state["mass"]).sqrt_().add_(self.eps)

    def _matrices(self, flat: Tensor) -> Iterator[tuple[Tensor, Side, Side]]:
        """Each matrix of (C, d) as a view (C, m, n), and its sides."""
        for name, matrix in self.layout.each_matrix(flat):
            yield matrix, *self._eigen.sides[name]

    def _turn(self, flat: Tensor, bases: Tensor, back: bool = False) -> Tensor:
        """U^T G Z of every matrix, or U G Z^T, as new vectors (C, d)."""
        result = flat.clone()
        for matrix, left, right in self._matrices(result):
            matrix.copy_(turned(matrix, left, right, bases, back))
        return result

    def _grams(self, grams: Tensor, observed: Tensor) -> Tensor:
        """One step of the moving averages of G G^T and G^T G."""
        grams = grams * self.beta
        for matrix, left, right in self._matrices(observed.to(grams.dtype)):
            if left.span is not None:
                left.of(grams).add_(matrix @ matrix.mT, alpha=1 - self.beta)
            if right.span is not None:
                right.of(grams).add_(matrix.mT @ matrix, alpha=1 - self.beta)
        return grams

    def _sums(self, square: Tensor) -> Tensor:
        """Sums of every matrix's rows, and of its columns."""
        sums = square.new_empty(len(square), self._eigen.spectra)
        for matrix, left, right in self._matrices(square):
            sums[:, left.spectrum], sums[:, right.spectrum] = matrix.sum(dim=-1), matrix.sum(dim=-2)
        return sums

    def _carried(self, moment: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """v in new bases; see the module's rule. There is none yet before the first."""
        carried = moment.clone()
        for matrix, left, right in self._matrices(carried):
            result = matrix
            if left.span is not None:
                result = (left.of(old).mT @ left.of(new)).square().mT @ result
            if right.span is not None:
                result = result @ (right.of(old).mT @ right.of(new)).square()
            matrix.copy_(result)
        return carried
