"""`pisa-fl-supernode`: Flower's SuperNode, which runs the pisa-fl installed here and no code of the server's.

With every run a SuperLink sends an app bundle, and names the module in it that is the client's app: Flower puts that
first on Python's path and runs it. Here the SuperNode takes a bundle of its own in its place, which holds nothing
but the name of the installed app. Of the server's it keeps the configuration, which
`pisa_fl.config.allowed` and its owner's policy look through.

Flower's own looks for messages every three seconds, which most of a round's seconds would be; this one oftener at
first. One that takes the place of a SuperNode that was killed makes up for it (former_life.py).
Arguments are those of `flower-supernode`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from flwr.cli.build import build_fab_from_files
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supercore.utils import get_flwr_home
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

from pisa_fl.config.allowed import SIMULATION
from pisa_fl.flower.bundle import BUNDLE
from pisa_fl.flower.former_life import Life, bury, make_up
from pisa_fl.flower.keeper import KEEPER
from pisa_fl.flower.looks import look_soon, pause

LONGEST_PAUSE = 3.0
"""Seconds between looks for messages at the SuperLink, at most: Flower's own."""


def own_bundle() -> Fab:
    """The bundle that names the installed app."""
    content, _ = build_fab_from_files({"pyproject.toml": BUNDLE.format(version=version("pisa-fl")).encode()})
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


def patient(receive: Callable[[], Any]) -> Callable[[], Any]:
    """A way to receive a message that waits until there is one."""

    def received() -> Any:
        began = time.monotonic()
        while (message := receive()) is None:
            time.sleep(pause(time.monotonic() - began, LONGEST_PAUSE))
        return message

    return received


def main() -> None:
    """Entry point of `pisa-fl-supernode`."""
    connect, fab = start_client_internal._init_connection, own_bundle()

    def own_run(run: Run) -> Run:
        return replace(
            run,
            fab_id="pisa-fl/pisa-fl",
            fab_version=version("pisa-fl"),
            fab_hash=fab.hash_str,
            primary_task_type=TaskType.SERVER_APP,  # of which a SuperNode runs the client's app, and no other
        )

    @contextmanager
    def connect_for_messages(**named: Any) -> Iterator[tuple[Any, ...]]:
        life = Life(get_flwr_home() / "life.json")
        bury(life, named)
        with connect(**named) as (node, receive, send, get_run, _, pull_object, push_object, confirm):
            life.begin(node)
            make_up(life, send, push_object)
            own = lambda run_id: own_run(get_run(run_id)), lambda *_: fab
            both = life.taking(patient(receive)), life.answering(send)
            yield node, *both, *own, pull_object, push_object, confirm

    flower: Any = start_client_internal
    look_soon(flower, "pull_objects")
    flower._init_connection = connect_for_messages
    os.environ.pop(SIMULATION, None)
    if keeper := os.environ.get(KEEPER):
        start_parent_process_monitor(int(keeper))
    flower_supernode()


if __name__ == "__main__":
    main()
