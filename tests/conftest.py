"""What all tests share: how they are dealt to processes, and what would take time and prove nothing.

Several processes (`pytest --numprocesses 2`) share the tests file by file, those that take long first.

So whatever a file starts for its tests (hosts, Ray, runs) is started once, and nobody waits for a long file at the end.
Those of Ray begin when Flower's simulation, which starts Ray as well, is nearly done.
"""

import os
from collections.abc import Iterator
from functools import cache

import pytest
from omegaconf import grammar_parser

LONG = (
    "test_federation.py",
    "test_flower_engine.py",
    "test_resume.py",
    "test_chaos.py",
    "test_ray_engine.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def in_this_process() -> Iterator[None]:
    """Runs that do not ask for workers compute here: the bits are the same, and to fork takes as long as a small run.

    Nor does anybody wait for the disk: who is killed leaves what it wrote, and no test cuts the power. And what
    OmegaConf has parsed it need not parse again, which is a third of what preparing a run takes.
    """
    parse = cache(grammar_parser.parse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pisa_fl.engines.local.cores", lambda: 0)
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr("omegaconf.base.parse", parse)
        patch.setattr("omegaconf._utils.parse", parse)
        yield


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that do not ask for workers have as many as on a machine with two cores."""
    monkeypatch.setattr("pisa_fl.engines.local.cores", lambda: 2)
