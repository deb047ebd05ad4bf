"""The server's threads: one a core, each with one thread of PyTorch's, so that results do not depend on how many."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from strategies.base.forking import after_fork

Item = TypeVar("Item")
Result = TypeVar("Result")

NAME = "pisa-fl-server"


def _new_threads() -> None:
    """Make the threads; a forked process has none of those that were there."""
    global _threads
    _threads = ThreadPoolExecutor(os.cpu_count(), NAME, initializer=torch.set_num_threads, initargs=(1,))


_threads: ThreadPoolExecutor
_new_threads()
after_fork(_new_threads)


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """A function of each item, in their order; one of these threads does its own work alone, for it may not wait.

    Each result is let go when the next is asked for: there may be more of them than memory holds.
    """
    if threading.current_thread().name.startswith(NAME):
        yield from map(function, items)
        return
    with one_thread():  # in every library: some have a number for the process, others one for each thread
        yield from _threads.map(function, items)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch without threads of its own: the bits of a decomposition depend on them, and small ones gain nothing."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
