"""What a forked process has to make anew, since it has none of the threads of the one it was forked from."""

from __future__ import annotations

import os
from collections.abc import Callable


def after_fork(renew: Callable[[], None]) -> None:
    """Have a function called in every process that is forked from this one; nothing where none can be."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)
