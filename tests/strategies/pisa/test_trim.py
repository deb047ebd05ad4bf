"""Outliers among the gradients: SciPy's Winsorized rows, the median, and a client that lies to quadratics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from quadratics import Quadratics, pisa_bench, solving
from scipy.stats.mstats import winsorize

from strategies.pisa import trim as module
from strategies.pisa.trim import trimmed

LIAR = 1


@pytest.mark.parametrize("count", [1, 2, 5, 10])
@pytest.mark.parametrize("trim", [0.1, 0.2, 0.49])
def test_scipys_winsorized_rows(count, trim, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3 * count)  # three columns at a time
    rows = torch.randn(count, 7, generator=torch.Generator().manual_seed(count))
    moved = torch.stack(list(trimmed(dict(enumerate(rows)), trim).values()))
    expected = winsorize(rows.numpy().copy(), limits=(trim, trim), axis=0)
    np.testing.assert_array_equal(moved.numpy(), np.asarray(expected))


@pytest.mark.parametrize("count", [4, 5])
def test_a_half_leaves_the_median(count):
    rows = torch.randn(count, 7, generator=torch.Generator().manual_seed(count))
    moved = torch.stack(list(trimmed(dict(enumerate(rows)), 0.5).values()))
    np.testing.assert_allclose(moved.mean(dim=0), np.median(rows.numpy(), axis=0), rtol=1e-6)


@pytest.mark.parametrize("consensus", ["all", "fresh"])
def test_one_liar_of_four_changes_nothing(consensus):
    """The others are alike, so that what is left of its gradients is theirs."""
    honest = Quadratics.draw(alike=True)
    lying = replace(honest, b=honest.b.clone())
    lying.b[LIAR] = -20 * honest.b[LIAR] + 7

    def path(problem, trim):
        settings = {"wire": "gradient", "lag": 0, "consensus": consensus, "sigma": None, "rho": None}
        bench = pisa_bench("kronecker", trim=trim, **settings)
        with solving(problem):
            for _ in range(60):
                bench.round()
        return bench.consensus

    expected = path(honest, 0.0)
    assert torch.equal(path(lying, 0.25), expected)
    assert (path(lying, 0.0) - expected).norm() > expected.norm()


def test_the_primal_wire_and_more_than_a_half_are_refused():
    with pytest.raises(ValueError, match="trim looks at gradients"):
        pisa_bench("identity", trim=0.1, wire="primal")
    with pytest.raises(ValueError, match=r"trim must be 0\.5"):
        pisa_bench("identity", trim=0.6, wire="gradient")
