"""Without what only POSIX systems have: all of the package is imported, and a run is made and reported on."""

import json
import subprocess
import sys

BLOCKED = """
import importlib, os, signal, sys

for theirs in (  # libraries, which ask what system it is
    "filelock flwr.serverapp flwr.clientapp flwr.server.superlink.linkstate flwr_datasets hydra matplotlib.pyplot"
    " multiprocessing.pool pandas rich.console tensorboard torch torchvision"
).split():
    importlib.import_module(theirs)
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # importing it raises
gone = {
    os: "fork forkpty register_at_fork killpg fchmod posix_fallocate sched_getaffinity O_DIRECTORY O_NOFOLLOW",
    signal: "SIGKILL SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGSTOP SIGCONT SIGPIPE",
}
for module, names in gone.items():
    for name in names.split():
        delattr(module, name)
"""

PROGRAM = """
import pkgutil
import partitioners, pisa_fl, strategies

for package in (partitioners, strategies, pisa_fl):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name not in ("pisa_fl.__main__", "pisa_fl.engines.ray_actors"):  # the second needs Ray
            importlib.import_module(module.name)

from pisa_fl.cli import main as run
from pisa_fl.results import report

options = ["model=logistic", "clients=5", "rounds=1", "engine.threads=1", "engine.workers=0"]
sys.argv = ["pisa-fl", *options, "hydra.run.dir=runs/a"]
run.main()
sys.argv = ["pisa-fl-report", "runs"]
report.main()
"""


def test_all_modules_a_run_and_its_report(tmp_path):
    line = [sys.executable, "-c", BLOCKED + PROGRAM]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "runs/a/.lock").exists()
    summary = json.loads((tmp_path / "runs/a/summary.json").read_text())
    assert summary["rounds"] == 1
    assert summary["peak_memory_bytes"] is None
    assert any(tmp_path.rglob("*.md"))
