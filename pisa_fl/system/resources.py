"""What the system grants a process: memory that it took, files that it may open."""

from __future__ import annotations

import os
import sys

try:
    import resource
except ImportError:  # Windows, which neither tells nor limits
    resource = None  # type: ignore[assignment]


def peak_memory() -> int | None:
    """Bytes of memory that this process had at most; None where the system does not tell."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory() -> int | None:
    """Bytes of memory that this machine has; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no such call
        return None


def open_as_many_as_allowed() -> None:
    """Let this process have as many files and connections open as the system lets it ask for."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
