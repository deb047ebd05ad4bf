"""What the clients of a process remember, on disk: rows of files for which memory is only a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise

from torch import Tensor

from pisa_fl.clients.host import ClientState
from strategies.base.rows import Rows


class StatesOnDisk:
    """Two rows for every client that has something to remember: of what was accepted, and of what is pending.

    Args:
        sizes: Vectors that a client keeps -> their lengths.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._spans = dict(zip(sizes, pairwise(accumulate(sizes.values(), initial=0)), strict=True))
        self._rows = Rows(sum(sizes.values()), on_disk=True)
        self._first: dict[int, int] = {}

    def keep(self, client: int, state: ClientState) -> None:
        """Have a client's state lie here, if it does not yet.

        Raises:
            OSError: There is no room for it.
        """
        first = self._first.setdefault(client, 2 * len(self._first))
        self._rows.grow(first + 2)
        if state.accepted and not isinstance(state.accepted, _Row):
            taken = isinstance(state.pending, _Row) and state.pending.row == first
            state.accepted = self._written(state.accepted, first + taken)
        if state.pending and not isinstance(state.pending, _Row):
            taken = isinstance(state.accepted, _Row) and state.accepted.row == first
            state.pending = self._written(state.pending, first + taken)

    def _written(self, vectors: Mapping[str, Tensor], row: int) -> _Row:
        there = _Row(self._rows, row, {name: self._spans[name] for name in vectors})
        for name, held in there.items():
            held.copy_(vectors[name])
        return there


class _Row(Mapping[str, Tensor]):
    """Vectors that lie in one row; views of it are made when they are asked for."""

    __slots__ = ("_rows", "_spans", "row")

    def __init__(self, rows: Rows, row: int, spans: Mapping[str, tuple[int, int]]) -> None:
        self._rows, self.row, self._spans = rows, row, spans

    def __getitem__(self, name: str) -> Tensor:
        start, stop = self._spans[name]
        return self._rows[self.row][start:stop]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)
