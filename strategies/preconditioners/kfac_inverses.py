"""Inverses of damped Kronecker products, s C x A + e I, in eigenbases or by Cholesky factors.

    eigen       s C x A + e I                                           itself
                = (U x Z) (s c a^T + e) (U x Z)^T                       C = U diag(c) U^T, A = Z diag(a) Z^T
    cholesky    (sqrt(s) C + sqrt(e)/p I) x (sqrt(s) A + p sqrt(e) I)   p^2 = mean eigenvalue of A / that of C
                = s C x A + e I + sqrt(s e) (C x p I + (1/p) I x A)

The second is the factored damping of Martens & Grosse (2015, arXiv 1503.05671, section 6.3), a Kronecker product
itself, whose factors are inverted one by one. It is the larger matrix of the two, the same where s or e is zero. In
single precision C and A may have eigenvalues below zero; a side's damping is at least what it was rounded by.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from strategies.preconditioners.base import State
from strategies.preconditioners.eigenbases import Eigenbases, Side, turned


class Inverse(ABC):
    """The inverse of one layer's s C x A + e I, for each of C clients."""

    @abstractmethod
    def __call__(self, matrix: Tensor) -> Tensor:
        """Its product with matrices (C, *axes, m, n)."""

    @abstractmethod
    def typical(self) -> Tensor:
        """Geometric mean of what is inverted's eigenvalues, (C, 1)."""


class Form(ABC):
    """What is kept of C and A in `sides` and `spectra` of a state, and how it is solved with.

    Args:
        eigen: The sides of all layers.
    """

    def __init__(self, eigen: Eigenbases) -> None:
        self._eigen = eigen

    @abstractmethod
    def prepared(self, grams: Tensor) -> tuple[Tensor, Tensor]:
        """`sides` and `spectra` of those sides that have a basis of their own."""

    @abstractmethod
    def inverse(self, state: State, layer: str, s: Tensor, e: Tensor) -> Inverse:
        """Of s C x A + e I of a layer, for s and e (C, 1)."""


class EigenForm(Form):
    """U and Z, c and a: s C x A + e I is solved exactly."""

    def prepared(self, grams: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvectors and eigenvalues."""
        return self._eigen.decomposed(grams)

    def inverse(self, state: State, layer: str, s: Tensor, e: Tensor) -> Inverse:
        """By division in the eigenbases."""
        left, right = self._eigen.sides[layer]
        spectrum = left.values(state["spectra"]).unsqueeze(-1) * right.values(state["spectra"]).unsqueeze(-2)
        values = _over(s, spectrum) * spectrum + _over(e, spectrum)
        return _InEigenbases(left, right, state["sides"], values)


class CholeskyForm(Form):
    """C and A themselves, and their diagonals: both are damped, and inverted one by one."""

    def prepared(self, grams: Tensor) -> tuple[Tensor, Tensor]:
        """C and A, and their diagonals."""
        spectra = grams.new_zeros(len(grams), self._eigen.spectra)
        for side in self._eigen.own_sides():
            side.values(spectra).copy_(side.of(grams).diagonal(dim1=-2, dim2=-1))
        return grams, spectra

    def inverse(self, state: State, layer: str, s: Tensor, e: Tensor) -> Inverse:
        """From the Cholesky factors of both."""
        left, right = self._eigen.sides[layer]
        c, a = (side.values(state["spectra"]).double() for side in (left, right))
        means = c.mean(dim=-1, keepdim=True), a.mean(dim=-1, keepdim=True)
        known = (means[0] > 0) & (means[1] > 0)
        p = torch.where(known, means[1] / means[0], 1.0).sqrt()
        scale, damping = _over(s.double().sqrt(), c), _over(e.double().sqrt(), c)
        return _OfEachSide(
            _factor(left, state["sides"], c, scale, damping / p),
            _factor(right, state["sides"], a, scale, damping * p),
            state["spectra"].dtype,
        )


class _InEigenbases(Inverse):
    def __init__(self, left: Side, right: Side, bases: Tensor, values: Tensor) -> None:
        self._left, self._right, self._bases, self._values = left, right, bases, values

    def __call__(self, matrix: Tensor) -> Tensor:
        inside = turned(matrix, self._left, self._right, self._bases) / self._values
        return turned(inside, self._left, self._right, self._bases, back=True)

    def typical(self) -> Tensor:
        return self._values.log().flatten(1).mean(dim=-1, keepdim=True).exp()


class _OfEachSide(Inverse):
    def __init__(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
        """Of sides that have a basis of their own there are Cholesky factors, of others a column of roots."""
        self._roots, self._dtype = (left, right), dtype

    @cached_property
    def _inverses(self) -> tuple[Tensor, Tensor]:
        left, right = (_inverse(roots).to(self._dtype) for roots in self._roots)
        return left, right

    def __call__(self, matrix: Tensor) -> Tensor:
        left, right = self._inverses
        return _times(right, _times(left, matrix).mT).mT

    def typical(self) -> Tensor:
        return torch.stack([_mean_log(roots) for roots in self._roots]).sum(dim=0).exp().to(self._dtype)


def _factor(side: Side, sides: Tensor, values: Tensor, scale: Tensor, damping: Tensor) -> Tensor:
    """The Cholesky factor of scale times a side's matrices with damping added, or the roots of that of a diagonal."""
    if side.span is None:
        return (scale * values + damping).sqrt().unsqueeze(-1)
    rounded = torch.finfo(torch.float32).eps * values.sum(dim=-1, keepdim=True)
    matrix = scale.unsqueeze(-1) * side.of(sides).double()
    matrix.diagonal(dim1=-2, dim2=-1).add_(torch.maximum(damping, scale * rounded))
    return torch.linalg.cholesky(matrix)


def _inverse(factor: Tensor) -> Tensor:
    """(L L^T)^-1; a column stays one."""
    return factor.square().reciprocal() if factor.shape[-1] == 1 else torch.cholesky_inverse(factor)


def _times(inverse: Tensor, matrix: Tensor) -> Tensor:
    """The product, a column being a diagonal."""
    return inverse * matrix if inverse.shape[-1] == 1 else inverse @ matrix


def _mean_log(factor: Tensor) -> Tensor:
    """Mean logarithm of the eigenvalues of L L^T, (C, 1)."""
    roots = factor if factor.shape[-1] == 1 else factor.diagonal(dim1=-2, dim2=-1)
    return 2 * roots.log().flatten(1).mean(dim=-1, keepdim=True)


def _over(number: Tensor, like: Tensor) -> Tensor:
    """(C, 1) with the axes of another tensor."""
    return number.reshape(-1, *(1,) * (like.dim() - 1))
