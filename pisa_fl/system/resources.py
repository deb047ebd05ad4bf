"""What the system grants a process: memory that it took, files that it may open."""

from __future__ import annotations

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


def open_as_many_as_allowed() -> None:
    """Let this process have as many files and connections open as the system lets it ask for."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
