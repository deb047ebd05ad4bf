"""Be one side of a comparison; see the package."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from importlib import import_module

from experiments.benchmarks.sides.pace import Finished
from experiments.benchmarks.task import Task

name, task, *options = sys.argv[1:]
# whatever a framework prints must not come between the lines
report = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
try:
    side = import_module(f"experiments.benchmarks.sides.{name}")
except ModuleNotFoundError as error:
    print(json.dumps({"missing": error.name}), file=report, flush=True)
else:
    with suppress(Finished):
        side.main(Task.loads(task), report, *options)
