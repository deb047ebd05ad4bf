"""The second moment in Kronecker eigenbases, the preconditioner of PISA's default.

SOAP (Vyas et al. 2025, arXiv 2409.11321, Algorithm 3) turned into a curvature preconditioner. For a matrix W (m x n;
convolutions as out x in*kh*kw) and G its gradient in a round,

    L  = beta L + (1-beta) G G^T          R  = beta R + (1-beta) G^T G
    U  = eigenvectors of L,               Z  = eigenvectors of R            every `refresh` rounds
    v  = beta v + (1-beta) (U^T G Z)^2,   v^ = v / (1-beta^t)
    Q  = (U x Z) diag(sqrt(v^) + eps) (U x Z)^T

so that (sigma I + rho Q)^-1 R = U [ U^T R Z / (sigma + rho (sqrt(v^) + eps)) ] Z^T exactly. Tensors of fewer than two
dimensions, and sides longer than `max_side`, keep the basis that they have: with both sides Q is SISA's.

When the eigenvectors change, v is carried over: each new one takes the place of the old one that it is closest to, of
those along which anything was seen; where nothing was seen yet, v stays zero, in whatever basis. (The expectation over
uncorrelated coordinates, the sum of (u^T u')^2 v (z^T z')^2, evens v out round by round and costs rounds; the order of
the eigenvalues changes where few clients answer.)

What is not SOAP's: L and R are kept and decomposed in double precision. A gradient in single precision tells singular
values of a millionth of the largest, but their squares would be lost.

Everything follows from the averaged gradient: aligned, it takes no more on the wire than SISA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies import checks
from strategies.layout import Layout
from strategies.messages import Field, squared
from strategies.preconditioners.base import Preconditioner, State
from strategies.threads import in_threads

NOTHING = 1e-10
"""Share of the largest second moment along one eigenvector that rounding gives to those that nothing was seen along."""


@dataclass(frozen=True)
class _Side:
    """One side of a matrix that has a basis of its own: where its Gram matrix lies among those of all sides."""

    size: int
    span: slice

    def of(self, flat: Tensor) -> Tensor:
        """Its matrices in vectors of all sides, (C, k) -> (C, size, size), as a view."""
        return flat[:, self.span].unflatten(-1, (self.size, self.size))


class Kronecker(Preconditioner):
    """Adaptive steps in the eigenbases of each matrix's rows and columns.

    Args:
        layout: Layout of the model's parameters.
        beta: Decay of all moving averages; SOAP: 0.95 for mini-batches, 0.99 for the full gradients here.
        eps: Added to the root; SOAP: 1e-8.
        max_side: Sides longer than that keep their basis; SOAP: 10,000.
        refresh: Rounds between decompositions; SOAP: 10.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, layout: Layout, beta: float, eps: float, max_side: int, refresh: int) -> None:
        checks.decay("preconditioner.beta", beta)
        checks.not_negative("preconditioner.eps", eps)
        checks.whole("preconditioner.max_side", max_side, 1)
        checks.whole("preconditioner.refresh", refresh, 1)
        self.layout, self.beta, self.eps, self.refresh = layout, beta, eps, refresh
        self._sides: dict[str, tuple[_Side | None, _Side | None]] = {}
        start = 0
        for name, shape in layout.matrices.items():
            sides: list[_Side | None] = []
            for size in shape:
                own = 1 < size <= max_side
                sides.append(_Side(size, slice(start, start + size**2)) if own else None)
                start += size**2 if own else 0
            self._sides[name] = sides[0], sides[1]
        self._size = start

    def state_fields(self) -> dict[str, Field]:
        """`moment` v (d,), `mass` 1-beta^t and `age` t (1,); `bases` and `grams` of all sides, one after the other."""
        return {
            "moment": Field(self.layout.size, minimum=0.0),
            "mass": Field(1, minimum=0.0),
            "bases": Field(self._size),
            "age": Field(1, minimum=0.0),
            "grams": Field(self._size, types=("float64",)),
        }

    def solver_fields(self) -> dict[str, Field]:
        """All but the Gram matrices."""
        fields = self.state_fields()
        return {name: fields[name] for name in ("moment", "mass", "bases")}

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
        moment, bases = state["moment"], state["bases"]
        if due.any():
            fresh, seen = self._eigenvectors(grams)
            fresh = fresh.to(observed.dtype)
            moment = torch.where(due, self._carried(moment, bases, fresh, seen), moment)
            bases = torch.where(due, fresh, bases)
        square = self._turn(observed, bases).square()
        return {
            "moment": moment * self.beta + square * (1 - self.beta),
            "mass": state["mass"] * self.beta + (1 - self.beta),
            "bases": bases,
            "age": state["age"] + 1,
            "grams": grams,
        }

    def scale(self, state: State) -> Tensor | None:
        """Mean of sqrt(v^) + eps over each tensor, (d,)."""
        if not state["mass"].any():
            return None
        return self.layout.expand(self.layout.mean(self._root(state)))[0]

    def solve(self, state: State, residual: Tensor, sigma: Tensor, rho: float) -> Tensor:
        """Turned into the eigenbases, divided by sigma + rho (sqrt(v^) + eps), turned back."""
        inverse = self.factored(state, sigma, rho, lambda: 1 / (sigma + rho * self._root(state)))
        turned = self._turn(residual, state["bases"]).mul_(inverse)
        return self._turn(turned, state["bases"], back=True)

    def _root(self, state: State) -> Tensor:
        """sqrt(v^) + eps, (C, d)."""
        return (state["moment"] / state["mass"]).sqrt_().add_(self.eps)

    def _matrices(self, flat: Tensor) -> Iterator[tuple[Tensor, _Side | None, _Side | None]]:
        """Each matrix of (C, d) as a view (C, m, n), and its sides."""
        for name, shape in self.layout.matrices.items():
            yield flat[:, self.layout.spans[name]].unflatten(-1, shape), *self._sides[name]

    def _turn(self, flat: Tensor, bases: Tensor, back: bool = False) -> Tensor:
        """U^T G Z of every matrix, or U G Z^T, as new vectors (C, d)."""
        turned = flat.clone()
        for matrix, left, right in self._matrices(turned):
            result = matrix
            if left is not None:
                basis = left.of(bases)
                result = (basis if back else basis.mT) @ result
            if right is not None:
                basis = right.of(bases)
                result = result @ (basis.mT if back else basis)
            matrix.copy_(result)
        return turned

    def _grams(self, grams: Tensor, observed: Tensor) -> Tensor:
        """One step of the moving averages of G G^T and G^T G."""
        grams = grams * self.beta
        for matrix, left, right in self._matrices(observed.to(grams.dtype)):
            if left is not None:
                left.of(grams).add_(matrix @ matrix.mT, alpha=1 - self.beta)
            if right is not None:
                right.of(grams).add_(matrix.mT @ matrix, alpha=1 - self.beta)
        return grams

    def _eigenvectors(self, grams: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Of every side, by ascending eigenvalue, and along which of them anything was seen, (C, n), by its side."""
        bases, seen = torch.empty_like(grams), {}

        def decompose(side: _Side) -> None:
            values, vectors = torch.linalg.eigh(side.of(grams))
            side.of(bases).copy_(vectors)
            seen[side.span.start] = values > NOTHING * values[..., -1:]

        # the largest first, so that no thread is left with it at the end
        list(in_threads(decompose, sorted(self._own_sides(), key=lambda side: -side.size)))
        return bases, seen

    def _carried(self, moment: Tensor, old: Tensor, new: Tensor, seen: Mapping[int, Tensor]) -> Tensor:
        """v in new bases; see the module's rule."""
        carried = moment.clone()
        for matrix, left, right in self._matrices(carried):
            result = matrix
            if left is not None:
                closest = _closest(left.of(old), left.of(new), matrix.sum(dim=-1))
                result = torch.take_along_dim(result, closest.unsqueeze(-1), dim=-2)
                result = result * seen[left.span.start].unsqueeze(-1)
            if right is not None:
                closest = _closest(right.of(old), right.of(new), matrix.sum(dim=-2))
                result = torch.take_along_dim(result, closest.unsqueeze(-2), dim=-1)
                result = result * seen[right.span.start].unsqueeze(-2)
            matrix.copy_(result)
        return carried

    def _own_sides(self) -> Iterator[_Side]:
        for sides in self._sides.values():
            yield from (side for side in sides if side is not None)


def _closest(old: Tensor, new: Tensor, seen: Tensor) -> Tensor:
    """For each new eigenvector the closest old one of those that anything was seen along, (C, n)."""
    overlap = (old.mT @ new).abs_()
    overlap *= (seen > NOTHING * seen.amax(dim=-1, keepdim=True)).unsqueeze(-1)
    return overlap.argmax(dim=-2)
