"""Observers for tests; a configuration names them as `watchers.NAME`."""

import shutil
from pathlib import Path

from pisa_fl import Observer


class Failing(Observer):
    """Raises from a round on, in everything that it is told."""

    def __init__(self, first):
        self.first = first

    def round(self, line):
        if line["round"] >= self.first:
            raise ConnectionError("the server\nwent away")

    def finished(self, summary):
        raise AssertionError("it was left out")


class Copier(Observer):
    """Copies the run directory as it is after every round, beside it."""

    def started(self, run):
        self.directory = Path(run.directory)

    def round(self, line):
        shutil.copytree(self.directory, self.directory.with_name(f"after-{line['round']}"))
