"""Vectors made no longer than a bound."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped(vectors: Tensor, bound: float) -> Tensor:
    """Vectors (..., d) in their direction, but no longer than a bound; zeros for those that are not finite.

    Those within the bound keep their bits.
    """
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=torch.float64)
    shorter = vectors * (bound / lengths).to(vectors.dtype)
    within = torch.where(lengths > bound, shorter, vectors)
    return torch.where(lengths.isfinite(), within, torch.zeros_like(vectors))
