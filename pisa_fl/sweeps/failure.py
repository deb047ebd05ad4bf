"""How a run of a sweep ends that does not come to its end."""

from __future__ import annotations

FAILED, WRONG, INTERRUPTED = 1, 2, 130
"""Exit statuses: the run failed, the configuration is wrong, it was asked to stop."""


class SweepError(Exception):
    """A run of a sweep failed.

    Args:
        status: The exit status with which the sweep is to end.
        sentence: Why; empty if that has been said.
        diverged: Whether a round gave nothing that could be kept, as what is not finite cannot be: a result as well, of
            a setting that is no good.
    """

    def __init__(self, status: int, sentence: str = "", diverged: bool = False) -> None:
        super().__init__(status, sentence, diverged)
        self.status, self.sentence, self.diverged = status, sentence, diverged
