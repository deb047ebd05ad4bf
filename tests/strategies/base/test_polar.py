"""The orthogonal polar factor against the singular value decomposition, and its polynomials against their promise."""

import numpy as np
import pytest
import torch

from strategies.base.polar import EXPRESS, polar

SHAPES = [(3, 7), (7, 3), (5, 5)]


def draw(*shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("method", "quintics"),
    [
        ("newton_schulz", [(3.4445, -4.7750, 2.0315)] * 9),
        ("polar_express", [*EXPRESS, *[(1.875, -1.25, 0.375)] * 2]),
    ],
)
@pytest.mark.parametrize("steps", [5, 9])
def test_the_iterations_are_quintics_of_the_singular_values(shape, method, quintics, steps):
    matrix = draw(*shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for a, b, c in quintics[:steps]:
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(
        polar(matrix, method, steps), u @ torch.diag_embed(s) @ vh, rtol=1e-9, atol=1e-9
    )
    assert 0.3 < s.min() <= s.max() < 1.3


def test_polar_express_is_the_best_for_where_the_steps_before_have_brought_the_values():
    """Chebyshev: of all odd quintics, the one nearest to a constant on an interval alternates about it four times."""
    low, high = 1e-3, 1.0
    for a, b, c in EXPRESS:

        def value(x, a=a, b=b, c=c):
            return a * x + b * x**3 + c * x**5

        squares = np.sort(np.roots([5 * c, 3 * b, a]).real)
        below, above = value(np.sqrt(squares[::-1]))  # its minimum and maximum inside
        left = max(low, 0.02407327424182761 * high)  # the paper's cushion, for slopes that rounding survives
        assert value(left) == pytest.approx(below, abs=1e-8)
        assert value(high) == pytest.approx(above, abs=1e-8)
        assert value(low) + value(high) == pytest.approx(2, abs=1e-8)
        low, high = value(low), value(high)
    assert high - low < 1e-8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigh_is_exact_on_the_space_where_there_is_a_factor(shape, dtype):
    u, s, vh = torch.linalg.svd(draw(*shape), full_matrices=False)
    s[:, 1] = 1e-3
    s[:, 2:] = 0
    s[0] *= 1e-6  # nothing depends on the scale
    factor = polar((u @ torch.diag_embed(s) @ vh).to(dtype), "eigh", 1).double()
    tolerance = 1e-3 if dtype is torch.float32 else 1e-8
    torch.testing.assert_close(factor, u[..., :2] @ vh[..., :2, :], rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
def test_newton_schulz_is_muons(shape):
    muon = pytest.importorskip("torch.optim._muon")
    orthogonalise = getattr(muon, "_zeropower_via_newtonschulz", None)
    if orthogonalise is None:
        pytest.skip("this PyTorch's Muon has no such function")
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    theirs = orthogonalise(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    # theirs computes in bfloat16, of which an ulp is 2^-8, and five steps magnify it
    assert (polar(matrix, "newton_schulz", 5) - theirs).norm() <= 0.05 * theirs.norm()


@pytest.mark.parametrize("method", ["newton_schulz", "polar_express", "eigh"])
def test_the_factor_of_zero_is_zero(method):
    assert not polar(torch.zeros(2, 3, 4), method, 5).any()


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method must be newton_schulz, polar_express or eigh, got svd"):
        polar(torch.zeros(2, 3, 4), "svd", 5)
