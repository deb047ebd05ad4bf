"""A bound on what a round may change: the shares by which the matrices move add up to `bound` at the most.

What ADMM asks for is a direction and, far from where it was measured, little more. A matrix W that moves by S changes
what comes out of its layer by up to the share |S|/|W|, in spectral norms, and what layers behind each other change is
passed on: up to the product of all 1 + |S|/|W|, which is no more than exp(bound). A step that is small beside the
weights element by element is not always small in this norm: gradients of few examples are of low rank, and in a matrix
with n columns a step of rank one counts for about sqrt(n) times what its elements say.

Where the shares add up to more, the largest are cut to one size. A vector (a bias, a norm's gain) moves by the share
`bound` of its own length at most. All keep their direction. Where steps are short nothing is changed, and at a fixed
point no step is longer than zero: the bound does not move the solution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.base.layout import Layout

SMALLEST_MATRIX = 0.3
"""Spectral norm that a matrix counts as having at least, so that one which begins at zero may grow: a quarter of what
PyTorch gives a square linear layer."""

SMALLEST_ELEMENT = 0.1
"""Root mean square that a vector counts as having at least, likewise."""


def bounded(consensus: Tensor, before: Tensor, bound: float, layout: Layout) -> Tensor:
    """The consensus (d,), or as far towards it from before, (d,), as the bound lets each tensor go."""
    step = consensus - before
    least = [
        SMALLEST_MATRIX if name in layout.matrices else SMALLEST_ELEMENT * size**0.5
        for name, size in zip(layout.shapes, layout.sizes, strict=True)
    ]
    shares = _lengths(step, layout) / torch.maximum(_lengths(before, layout), torch.tensor(least))
    matrices = torch.tensor([name in layout.matrices for name in layout.shapes])
    allowed = torch.full_like(shares, bound)
    if matrices.any():
        allowed[matrices] = _cut(shares[matrices], bound)
    if (shares <= allowed).all():
        return consensus
    return before + step * layout.expand((allowed / shares).clamp(max=1.0))


def _lengths(flat: Tensor, layout: Layout) -> Tensor:
    """Spectral norms of the matrices in (d,), and Euclidean norms of the vectors, (T,)."""
    lengths = layout.norms(flat[None])[0]
    matrices = dict(layout.each_matrix(flat[None]))
    for place, name in enumerate(layout.shapes):
        if name in matrices:
            lengths[place] = _spectral(matrices[name][0])
    return lengths


def _spectral(matrix: Tensor) -> Tensor:
    """Greatest singular value, (), from the smaller Gram matrix."""
    largest = matrix.abs().max()
    if not largest:
        return largest
    scaled = matrix / largest  # squares of the largest numbers that are allowed would overflow
    gram = scaled @ scaled.mT if len(scaled) <= scaled.shape[1] else scaled.mT @ scaled
    return torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt() * largest


def _cut(shares: Tensor, bound: float) -> Tensor:
    """The share to which the largest must be cut, so that all add up to no more than the bound, ()."""
    ascending = shares.sort().values
    left = bound - torch.cat([ascending.new_zeros(1), ascending[:-1].cumsum(0)])  # by the smaller ones
    return (left / torch.arange(len(shares), 0, -1)).max()
