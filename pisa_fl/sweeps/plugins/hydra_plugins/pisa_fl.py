"""The launcher under the name by which Hydra finds it."""

from pisa_fl.sweeps import launcher


class ParallelLauncher(launcher.ParallelLauncher):
    """See there."""
