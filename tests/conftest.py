"""How several processes (`pytest --numprocesses 2`) share the tests: file by file, those that take long first.

So whatever a file starts for its tests (hosts, Ray, runs) is started once, and nobody waits for a long file at the end.
Those of Ray begin when Flower's simulation, which starts Ray as well, is nearly done.
"""

import pytest

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
