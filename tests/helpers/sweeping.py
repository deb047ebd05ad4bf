"""Sweeps in processes of their own, to be killed, and what they have left."""

import os
import sys
import time

from hydra.core.global_hydra import GlobalHydra

from pisa_fl.cli.main import main
from pisa_fl.results import claim


def started(folder, *arguments):
    """A process of its own that runs the command, what it prints in a file beside the folder."""
    if (number := os.fork()) == 0:
        status = 99
        try:
            printed = os.open(f"{folder}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w")
            sys.argv = ["pisa-fl", *arguments, f"hydra.sweep.dir={folder}"]
            os.environ["HYDRA_FULL_ERROR"] = "0"
            GlobalHydra.instance().clear()
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(status)
    return number


def ended(number):
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def until(happens, seconds=120):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def done(folder):
    return {path.parent.name for path in folder.glob("*/summary.json")}


def begun(folder):
    """Runs that have made a round and have not come to their end."""
    lines = {path.parent.name: path.read_text().count("\n") for path in folder.glob("*/metrics.jsonl")}
    return {name for name, count in lines.items() if count > 1} - done(folder)


def held(folder):
    return [path for path in folder.glob("*") if path.is_dir() and claim.is_held(path)]


def times(folder, names):
    return {name: (folder / name / "summary.json").stat().st_mtime_ns for name in names}
