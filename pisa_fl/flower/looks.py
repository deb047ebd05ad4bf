"""How often to look for news where Flower has nobody told of it."""

from __future__ import annotations

from functools import partial
from types import ModuleType

SHORTEST = 0.05
"""Seconds between the first looks."""


def pause(waited: float, longest: float) -> float:
    """Seconds until the next look: an eighth of those waited already, so that nobody is asked often for long."""
    return min(max(SHORTEST, waited / 8), longest)


def look_soon(module: ModuleType, name: str) -> None:
    """Have a function of Flower's look again soon, not after a second, for what of a message comes after its head."""
    setattr(module, name, partial(getattr(module, name), initial_backoff=SHORTEST))
