"""The orthogonal polar factor U V^T of a matrix U diag(s) V^T, three ways.

`newton_schulz` repeats one polynomial, X <- a X + (b A + c A^2) X with A = X X^T, from X = M/|M|_F, with Muon's
coefficients (Jordan et al. 2024). After five steps, singular values of a hundredth of the norm or more are between
0.68 and 1.21, smaller ones below; they never converge.

`polar_express` (Amsel, Persson, Musco and Gower 2025, arXiv 2505.16932, Algorithm 1) takes another polynomial in
every step: the best there is for where the steps before have brought singular values of a thousandth of the norm or
more. They are within 0.13 of one after five steps, within 0.0012 after six, and converge.

`eigh` decomposes the Gram matrix of the smaller side, in double precision: exact, and on a CPU the quickest. Singular
values that are rounding count as zero.

The factor of zero is zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice, repeat
from typing import Literal

import torch
from torch import Tensor

from strategies.base import checks

Method = Literal["newton_schulz", "polar_express", "eigh"]

Quintic = tuple[float, float, float]

COEFFICIENTS: Quintic = (3.4445, -4.7750, 2.0315)
"""Muon's, steepest at zero, as NSISA's authors use it."""

EXPRESS: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
"""Polar Express's, as its paper prints them; a test derives them anew. Its factor of 1.01 is for bfloat16, and left
out."""

LIMIT: Quintic = (1.875, -1.25, 0.375)
"""What they tend to, Newton and Schulz's own."""


@checks.literals
def polar(matrices: Tensor, method: Method, steps: int) -> Tensor:
    """Orthogonal polar factor of each matrix, (..., m, n) -> (..., m, n); `eigh` takes no steps."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    if method == "eigh":
        factor = _exact(wide)
    elif method == "polar_express":
        factor = _iterated(wide, islice((*EXPRESS, *repeat(LIMIT, steps)), steps))
    else:
        factor = _iterated(wide, repeat(COEFFICIENTS, steps))
    return factor.mT if tall else factor


def unit(matrices: Tensor) -> Tensor:
    """Each matrix divided by its Frobenius norm; zero stays zero."""
    largest = matrices.abs().amax(dim=(-2, -1), keepdim=True)
    # squares of elements as small as that are nothing in single precision
    faint = largest < 1e-18
    matrices = torch.where(faint, matrices / largest.clamp(min=torch.finfo(matrices.dtype).tiny), matrices)
    return matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)


def _iterated(wide: Tensor, quintics: Iterable[Quintic]) -> Tensor:
    """An odd polynomial of the singular values after the other, of those as shares of the norm."""
    x = unit(wide)
    for a, b, c in quintics:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _exact(wide: Tensor) -> Tensor:
    """(M M^T)^(-1/2) M on the space where that is defined."""
    double = wide.double()
    values, vectors = torch.linalg.eigh(double @ double.mT)
    roots = values.clamp(min=0).sqrt()
    # what is rounding: of the matrix, or of its Gram matrix
    longer, (own, grams) = (
        max(wide.shape[-2:]),
        (torch.finfo(kind).eps for kind in (wide.dtype, double.dtype)),
    )
    least = roots[..., -1:] * max(longer * own, (longer * grams) ** 0.5)
    inverse = torch.where(roots > least, 1 / roots, 0.0)
    return (vectors * inverse.unsqueeze(-2) @ (vectors.mT @ double)).to(wide.dtype)
