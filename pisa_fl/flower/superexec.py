"""`pisa-fl-superexec`: Flower's SuperExec for a client, whose processes start with everything imported.

Flower starts a process for every message that a client gets, and most of its time goes into imports of Flower and
PyTorch. Here each is a fork of one process that has done nothing but these imports: what a message leaves behind is
gone with its process, as ever. Flower's looks for work once a second, this one oftener.

Arguments are those of `flower-superexec`.
"""

from __future__ import annotations

import multiprocessing
import os
from importlib import import_module
from typing import Any, Literal

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.tls import validate_and_resolve_root_certificates

from pisa_fl.flower.looks import look_soon

METHOD: Literal["forkserver"] = "forkserver"
"""Python's way of starting processes that suits; Windows has it not, and there Flower starts them as ever."""

NEEDED = ["pisa_fl.flower.superexec", "flwr.supernode.runtime.run_clientapp", "pisa_fl.flower.app"]
"""What the process imports that the others are forks of."""

LOOK = 0.05
"""Seconds between looks for work at the SuperNode, on this host."""


class ForkingExecutor(SubprocessExecutor):
    """Flower's executor, but for the processes of clients' apps."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context(METHOD)
        self._context.set_forkserver_preload(NEEDED)
        self._started: list[multiprocessing.process.BaseProcess] = []

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process of a task."""
        if spec.task_type != TaskType.CLIENT_APP:
            return super().launch(spec)
        process = self._context.Process(target=run_client, args=(spec,), name="flwr-clientapp")
        process.start()
        self._started.append(process)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Let go of the processes that have ended."""
        self._started = [process for process in self._started if process.is_alive()]

    def close(self) -> None:
        """End the processes that have not, for Python waits for them."""
        for process in self._started:
            process.terminate()


def run_client(spec: ExecutionSpec) -> None:
    """What `flwr-clientapp` does."""
    from flwr.supernode.runtime import run_clientapp

    look_soon(run_clientapp, "pull_and_inflate_object_from_tree")
    run_clientapp.run_clientapp(
        runtime_api_address=spec.runtime_api_address,
        token=spec.token,
        insecure=spec.insecure,
        certificates=validate_and_resolve_root_certificates(spec.root_certificates_path, spec.insecure),
        parent_pid=spec.parent_pid,
    )


def main() -> None:
    """Entry point of `pisa-fl-superexec`."""
    os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", str(LOOK))
    if METHOD in multiprocessing.get_all_start_methods():
        superexec: Any = import_module("flwr.supercore.superexec.run_superexec")
        superexec.get_executor = lambda *_, **__: ForkingExecutor()
    flower_superexec()


if __name__ == "__main__":
    main()
