"""The safety study tells runs that learn from those that do not."""

import pytest

from experiments import safety


@pytest.mark.parametrize(("overrides", "collapsed"), [([], 0), (["strategy.bound=1e-9"], 1)])
def test_runs_that_do_not_learn_are_counted(overrides, collapsed, monkeypatch, capsys):
    monkeypatch.setattr(safety, "DEALS", {"iid": safety.DEALS["iid"]})
    study = ["--models", "mlp", "--lrs", "0.02", "--seeds", "1", "--every", "20"]
    assert safety.main([*overrides, *study, "--rounds", "8", "--horizon", "8"]) == collapsed
    assert capsys.readouterr().out.splitlines()[2].startswith("| mlp | iid | ")
