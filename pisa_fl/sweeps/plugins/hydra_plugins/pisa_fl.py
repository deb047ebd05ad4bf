"""The launcher and the sweeper under the names by which Hydra finds them."""

from pisa_fl.sweeps import launcher, tuner


class ParallelLauncher(launcher.ParallelLauncher):
    """See there."""


class OptunaSweeper(tuner.OptunaSweeper):
    """See there."""
