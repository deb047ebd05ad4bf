"""Eigenbases of the two sides of matrices, for preconditioners that are diagonal in their products U x Z."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from strategies.base.threads import in_threads


@dataclass(frozen=True)
class Side:
    """One side of a matrix, or of each matrix of several that are alike.

    Attributes:
        size: Its length.
        spectrum: Where its eigenvalues lie among those of all sides.
        span: Where its basis and its Gram matrix lie among those of all sides; None if it keeps the basis it has.
        axes: The axis of several matrices, (groups,), or none.
    """

    size: int
    spectrum: slice
    span: slice | None
    axes: tuple[int, ...] = ()

    def of(self, flat: Tensor) -> Tensor:
        """Its matrices in vectors of all sides with a basis of their own, (C, k) -> (C, *axes, size, size), a view."""
        assert self.span is not None
        return flat[:, self.span].unflatten(-1, (*self.axes, self.size, self.size))

    def values(self, flat: Tensor) -> Tensor:
        """Its eigenvalues in vectors of those of all sides, (C, k) -> (C, *axes, size), a view."""
        return flat[:, self.spectrum].unflatten(-1, (*self.axes, self.size))

    @property
    def packed(self) -> int:
        """Length of its matrices as they are sent: upper triangles, or diagonals if it keeps the basis it has."""
        return prod(self.axes) * (self.size if self.span is None else self.size * (self.size + 1) // 2)

    def pack(self, matrices: Tensor) -> Tensor:
        """Its matrices (..., *axes, size, size), or diagonals (..., *axes, size), as they are sent, (..., packed)."""
        own = matrices if self.span is None else matrices[..., *self._triangle(matrices.device)]
        return own.flatten(-1 - len(self.axes))

    def unpack(self, packed: Tensor) -> Tensor:
        """What `pack` was given; of a matrix, its upper triangle on both sides."""
        packed = packed.unflatten(-1, (*self.axes, -1))
        if self.span is None:
            return packed
        rows, columns = self._triangle(packed.device)
        matrix = packed.new_empty(*packed.shape[:-1], self.size, self.size)
        matrix[..., rows, columns] = matrix[..., columns, rows] = packed
        return matrix

    def _triangle(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and columns of an upper triangle's elements."""
        rows, columns = torch.triu_indices(self.size, self.size, device=device)
        return rows, columns


class Eigenbases:
    """The sides of some matrices, and where they lie in vectors of all of them.

    Args:
        shapes: Name of each matrix -> its rows and columns, behind an axis of groups if it is several matrices.
        max_side: Sides longer than that keep the basis that they have, and so do those of length one.
        keeping: Names of matrices whose right side keeps it, however long.

    Attributes:
        sides: Name of each matrix -> its left side (rows) and its right one (columns).
        bases: Length of a vector of all bases.
        spectra: Length of a vector of all eigenvalues.
        turned: Which eigenvalues are of sides with a basis of their own, (spectra,).
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], max_side: int, keeping: Collection[str] = ()
    ) -> None:
        self.sides: dict[str, tuple[Side, Side]] = {}
        self.bases = self.spectra = 0
        for name, (*axes, rows, columns) in shapes.items():
            left = self._side(tuple(axes), rows, max_side)
            self.sides[name] = left, self._side(tuple(axes), columns, 0 if name in keeping else max_side)
        self.turned = torch.zeros(self.spectra, dtype=torch.bool)
        for side in self.own_sides():
            self.turned[side.spectrum] = True

    def _side(self, axes: tuple[int, ...], size: int, max_side: int) -> Side:
        count = prod(axes)
        own = count * size**2 if 1 < size <= max_side else 0
        span = slice(self.bases, self.bases + own) if own else None
        side = Side(size, slice(self.spectra, self.spectra + count * size), span, axes)
        self.bases, self.spectra = self.bases + own, self.spectra + count * size
        return side

    def own_sides(self) -> Iterator[Side]:
        """All sides that have a basis of their own."""
        for sides in self.sides.values():
            yield from (side for side in sides if side.span is not None)

    def decomposed(self, grams: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvectors of every side that has a basis of its own, by ascending eigenvalue, and eigenvalues."""
        bases, spectra = torch.empty_like(grams), grams.new_zeros(len(grams), self.spectra)

        def decompose(side: Side) -> None:
            values, vectors = torch.linalg.eigh(side.of(grams))
            side.of(bases).copy_(vectors)
            side.values(spectra).copy_(values.clamp(min=0))

        # the largest first, so that no thread is left with it at the end
        list(in_threads(decompose, sorted(self.own_sides(), key=lambda side: -side.size)))
        return bases, spectra


def turned(matrix: Tensor, left: Side, right: Side, bases: Tensor, back: bool = False) -> Tensor:
    """U^T G Z of matrices (C, *axes, m, n), or U G Z^T; a side that keeps its basis is left as it is."""
    if left.span is not None:
        basis = left.of(bases)
        matrix = (basis if back else basis.mT) @ matrix
    if right.span is not None:
        basis = right.of(bases)
        matrix = matrix @ (basis.mT if back else basis)
    return matrix
