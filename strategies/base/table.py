"""A table on the server: the vector that every client gave last, and the average of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.base.rows import Rows


@dataclass(frozen=True)
class _Begun:
    """What is to be written."""

    rows: Mapping[int, Tensor]
    weights: dict[int, float]
    total: Tensor
    average: Tensor


class Table:
    """One vector (d,) of every client that has answered; those of all others are zero.

    A round costs what its participants cost: the weighted sum is kept in double precision, and only the rows of those
    who answered are taken out of it and put in again. It is put together afresh when all who are known answer.

    The average is over all N clients: (k/N) sum a_i row_i / sum a_i, both sums over the k clients known so far. With
    equal weights, and whenever everybody is known, that is the average with zeros for those who are not.

    Args:
        size: d.
        clients: N.
        on_disk: Keep the rows in files for which memory is only a cache (`strategies.base.rows.zeros`).
    """

    def __init__(self, size: int, clients: int, on_disk: bool = False) -> None:
        self._size, self._clients, self._on_disk = size, clients, on_disk
        self._rows = Rows(size, on_disk)
        self._places: dict[int, int] = {}
        self._weights: dict[int, float] = {}
        self._total = torch.zeros(size, dtype=torch.float64)
        self._begun: _Begun | None = None
        self.average = torch.zeros(size)

    def __contains__(self, client: int) -> bool:
        return client in self._places

    def __getitem__(self, client: int) -> Tensor:
        """The client's row, (d,), not to be written to; zeros for one that is not known."""
        return self._rows[self._places[client]] if client in self else torch.zeros(self._size)

    def begin(self, rows: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
        """The average with other rows of some clients; nothing is kept of them until `commit`."""
        known = self._weights | {client: weights[client] for client in rows}
        afresh = known.keys() == rows.keys()
        total = torch.zeros_like(self._total) if afresh else self._total.clone()
        for client, row in rows.items():
            if client in self and not afresh:
                total.add_(self[client], alpha=-self._weights[client])
            total.add_(row, alpha=weights[client])
        average = total * (len(known) / self._clients / sum(known.values()))
        self._begun = _Begun(rows, known, total, average.float())
        return self._begun.average

    @property
    def begun(self) -> Tensor:
        """The average with what was begun."""
        return self.average if self._begun is None else self._begun.average

    def commit(self) -> None:
        """Keep what was begun."""
        if self._begun is None:
            return
        begun, self._begun = self._begun, None
        for client in begun.rows:
            self._places.setdefault(client, len(self._places))
        self._rows.grow(len(self._places))
        for client, row in begun.rows.items():
            self._rows[self._places[client]].copy_(row)
        self._weights, self._total, self.average = begun.weights, begun.total, begun.average

    def state_dict(self) -> dict[str, Tensor]:
        """Everything it holds; its rows as they lie, block by block."""
        blocks = self._rows.blocks(len(self._places))
        return {f"rows.{i}": block for i, block in enumerate(blocks)} | {
            "clients": torch.tensor(list(self._places), dtype=torch.int64),
            "weights": torch.tensor([self._weights[c] for c in self._places], dtype=torch.float64),
            "total": self._total,
            "average": self.average,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        clients = state["clients"].tolist()
        self._places = {client: row for row, client in enumerate(clients)}
        self._weights = dict(zip(clients, state["weights"].tolist(), strict=True))
        self._total, self.average = state["total"].clone(), state["average"].clone()
        self._rows, self._begun = Rows(self._size, self._on_disk), None
        self._rows.grow(len(clients))
        for i, block in enumerate(self._rows.blocks(len(clients))):
            block.copy_(state[f"rows.{i}"])
