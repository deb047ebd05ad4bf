"""The bound on what a round may change."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies import Layout
from strategies.pisa.bound import SMALLEST_ELEMENT, SMALLEST_MATRIX, bounded

SHAPES = {"wide": (3, 4), "vector": (5,), "zero": (4, 2), "kernels": (2, 2, 3, 3), "number": ()}
LAYOUT = Layout(SHAPES)


def lengths(flat):
    """Spectral norms of the matrices, by NumPy's way of singular values, and lengths of the vectors."""
    return {
        name: float(torch.linalg.svdvals(part.double().flatten(1))[0] if part.dim() > 1 else part.norm())
        for name, part in LAYOUT.views(flat).items()
    }


@given(
    seed=st.integers(0, 1000),
    bound=st.sampled_from([1e-3, 0.1, 0.5, 2.0]),
    sizes=st.lists(st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 1e6]), min_size=len(SHAPES), max_size=len(SHAPES)),
)
def test_shares_of_matrices_add_up_to_the_bound_and_all_keep_their_direction(seed, bound, sizes):
    draw = torch.Generator().manual_seed(seed)
    before = torch.randn(LAYOUT.size, generator=draw)
    before[LAYOUT.spans["zero"]] = 0.0
    wanted = torch.randn(LAYOUT.size, generator=draw) * LAYOUT.expand(torch.tensor(sizes))
    asked = before + wanted - before
    step = bounded(before + wanted, before, bound, LAYOUT) - before
    size, least = lengths(before), {}
    for name, shape in SHAPES.items():
        least[name] = SMALLEST_MATRIX if len(shape) > 1 else SMALLEST_ELEMENT * math.sqrt(math.prod(shape))
    share_asked, share = (
        {name: length / max(size[name], least[name]) for name, length in lengths(flat).items()}
        for flat in (asked, step)
    )
    matrices = [name for name, shape in SHAPES.items() if len(shape) > 1]
    if sum(share_asked[name] for name in matrices) > bound:
        assert sum(share[name] for name in matrices) == pytest.approx(bound, rel=1e-3, abs=1e-5)
        largest = max(share[name] for name in matrices)
        limits = dict.fromkeys(matrices, largest)
    else:
        limits = dict.fromkeys(matrices, math.inf)
    for name, span in LAYOUT.spans.items():
        limit = limits.get(name, bound)
        assert share[name] == pytest.approx(min(limit, share_asked[name]), rel=1e-3, abs=1e-5), name
        if share_asked[name] > 1e-4 and share[name] > 1e-4:
            direction = torch.nn.functional.cosine_similarity(step[span], asked[span], dim=0)
            assert float(direction) == pytest.approx(1.0, abs=1e-3), name


def test_a_coherent_step_counts_by_what_it_does_and_not_by_its_elements():
    layout = Layout({"matrix": (100, 100)})
    before = torch.eye(100).flatten()  # spectral norm 1
    spread = (
        0.4 * torch.linalg.qr(torch.randn(100, 100, generator=torch.Generator().manual_seed(0)))[0].flatten()
    )
    coherent = torch.full((100, 100), 0.04).flatten()  # as long as the other, of rank one: spectral norm 4
    assert float(coherent.norm()) == pytest.approx(float(spread.norm()), rel=1e-4)
    torch.testing.assert_close(bounded(before + spread, before, 0.5, layout), before + spread)
    moved = bounded(before + coherent, before, 0.5, layout) - before
    torch.testing.assert_close(moved, coherent / 8, rtol=1e-4, atol=1e-6)


def test_the_longest_weights_that_there_may_be_are_measured():
    layout = Layout({"matrix": (2, 3)})
    before, step = torch.full((6,), 1e30), torch.full((6,), 1e31)
    torch.testing.assert_close(bounded(before + step, before, 0.5, layout), before * 1.5)
