"""The safety study tells runs that learn from those that do not."""

import pytest

from experiments import safety


@pytest.mark.parametrize(("lr", "collapsed"), [("0.02", 0), ("1e-9", 1)])
def test_runs_that_do_not_learn_are_counted(lr, collapsed, monkeypatch, capsys):
    monkeypatch.setattr(safety, "DEALS", {"iid": safety.DEALS["iid"]})
    study = ["--models", "mlp", "--seeds", "1", "--rounds", "8", "--horizon", "8", "--every", "20", "--lrs"]
    assert safety.main([*study, lr]) == collapsed
    assert capsys.readouterr().out.splitlines()[2].startswith("| mlp | iid | ")
