"""What the tests of the framework share: the command in this process, and pictures that nobody looks at."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from pictures import pictures

from pisa_fl.cli.main import main


@pytest.fixture(scope="module", autouse=True)
def blank_pictures() -> Iterator[None]:
    """Pictures are blank, but where a test asks for them by `pictures`."""
    with pictures(drawn=False):
        yield


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys) -> Iterator[Command]:
    """`pisa-fl` in this process, called with its arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pisa-fl", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        GlobalHydra.instance().clear()
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        return Outcome(status, *capsys.readouterr())

    yield run
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
