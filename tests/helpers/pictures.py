"""Pictures: drawing them takes longer than a small run, so that they are blank wherever they are not what is tested."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import partitioners
from pisa_fl.results import pictures as drawn_while_running

DRAWING = ((drawn_while_running, "draw_curves"), (partitioners, "draw"))
DRAWN = [getattr(module, name) for module, name in DRAWING]


def blank(*given: object) -> None:
    """An empty file in place of a picture."""
    next(path for path in given if isinstance(path, Path)).touch()


@contextmanager
def pictures(drawn: bool) -> Iterator[None]:
    """Pictures of runs are drawn, or blank."""
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), draw in zip(DRAWING, DRAWN, strict=True):
            patch.setattr(module, name, draw if drawn else blank)
        yield
