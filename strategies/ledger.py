"""The server's ledger: what it last accepted from every client, and the consensus that follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from strategies.layout import Layout
from strategies.memory import ROWS, Rows, stacked

_TILE = 2**15
"""Elements of a client-by-column tile: several of them fit into a core's cache."""


class Ledger:
    """Primal and dual of every client that has ever answered, N rows of length d.

    A client enters with its first accepted reply; from then on its row stays in every sum, whether it takes part in a
    round or not. What a round costs depends on who takes part, not on N: the sums over all clients

        P = sum n_i (w_i - c),     R = sum n_i |w_i - c|^2,     D = sum n_i pi_i

    are kept in double precision, c being the consensus of the round last accepted, and only the rows of those who
    answered are taken out and put in again. They are put together afresh when everybody answers.

    Args:
        layout: Layout of the model's parameters.
        uniform: Weigh clients equally (alpha_i = 1/N) instead of by examples (alpha_i = n_i/n).
        on_disk: Keep the rows in files for which memory is only a cache (`strategies.memory.zeros`).
    """

    def __init__(self, layout: Layout, uniform: bool, on_disk: bool = False) -> None:
        self._uniform = uniform
        self._empty = partial(Rows, layout.size, on_disk)
        self._weights, self._duals = self._empty(), self._empty()
        self._rows: dict[int, int] = {}
        self._rounds: list[int] = []
        self._shares = torch.empty(0)
        self._centre = torch.zeros(layout.size)
        self._primal = torch.zeros(layout.size, dtype=torch.float64)
        self._spread = torch.zeros((), dtype=torch.float64)
        self._dual = torch.zeros(layout.size, dtype=torch.float64)

    @property
    def clients(self) -> list[int]:
        """Numbers of the clients that it knows, in the order in which they came."""
        return list(self._rows)

    def accept(
        self,
        round_number: int,
        weights: Mapping[int, Tensor],
        examples: Mapping[int, int],
        consensus: Tensor,
        sigma: Tensor | None,
    ) -> None:
        """Take over the primal w_i of clients and apply their dual step, pi_i += sigma (w_i - w).

        Args:
            round_number: The round.
            weights: Client number -> w_i, (d,).
            examples: Client number -> n_i.
            consensus: w that they were sent, (d,).
            sigma: Penalty, () or (d,); None in a round that only measures, which leaves the duals as they are.
        """
        self._admit(weights)
        order = sorted(weights, key=self._rows.__getitem__)
        rows = [self._rows[client] for client in order]
        self._shift(consensus)
        if len(order) < len(self._rows):
            for start, stop in _runs(rows):
                self._count(slice(rows[start], rows[start] + stop - start), -1.0)
        else:
            for total in (self._primal, self._spread, self._dual):
                total.zero_()
        step = None if sigma is None else sigma.expand_as(consensus)
        for start, stop in _runs(rows):
            here = slice(rows[start], rows[start] + stop - start)
            incoming = stacked([weights[client] for client in order[start:stop]])
            self._shares[here] = torch.tensor(
                [1.0 if self._uniform else float(examples[client]) for client in order[start:stop]]
            )
            self._write(here, incoming, step)
            self._rounds[here] = [round_number] * (stop - start)

    def accepted_round(self, client: int) -> int:
        """Round of the client's last accepted reply; 0 if there is none."""
        return self._rounds[self._rows[client]] if client in self._rows else 0

    def primal(self, client: int) -> Tensor:
        """The client's primal w_i, (d,)."""
        return self._weights[self._rows[client]]

    def dual(self, client: int) -> Tensor:
        """The client's dual pi_i, (d,)."""
        return self._duals[self._rows[client]]

    def average(self, vectors: Mapping[int, Tensor]) -> Tensor:
        """Average of one vector (k,) of each of some clients, by their alpha_i among themselves."""
        clients = list(vectors)
        shares = self._shares[torch.tensor([self._rows[client] for client in clients])]
        total = torch.zeros_like(vectors[clients[0]], dtype=torch.float64)
        for start in range(0, len(clients), ROWS):
            part = slice(start, start + ROWS)
            total += shares[part] @ stacked([vectors[client] for client in clients[part]])
        return (total / shares.sum(dtype=torch.float64)).float()

    def consensus(self, sigma: Tensor, lambda_: float) -> Tensor:
        """w = sum alpha_i (sigma w_i + pi_i) / (sigma + lambda), (d,)."""
        total = self._total
        primal, sigma = self._centre + self._primal / total, sigma.double()
        return ((sigma * primal + self._dual / total) / (sigma + lambda_)).float()

    def primal_residual(self, consensus: Tensor) -> float:
        """sqrt(sum alpha_i |w_i - w|^2)."""
        shift = self._centre.double() - consensus
        squares = self._spread + 2 * (shift @ self._primal) + self._total * shift.square().sum()
        return float((squares / self._total).clamp(min=0).sqrt())

    def dual_residual(self, consensus: Tensor, lambda_: float) -> float:
        """|sum alpha_i pi_i - lambda w|."""
        return float((self._dual / self._total - lambda_ * consensus).norm())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the ledger holds; its rows as they lie, block by block."""
        known = len(self._rows)
        rows = {"weights": self._weights.blocks(known), "duals": self._duals.blocks(known)}
        return {f"{name}.{i}": block for name, blocks in rows.items() for i, block in enumerate(blocks)} | {
            "clients": torch.tensor(list(self._rows), dtype=torch.int64),
            "rounds": torch.tensor(self._rounds, dtype=torch.int64),
            "shares": self._shares,
            "centre": self._centre,
            "primal": self._primal,
            "spread": self._spread,
            "dual": self._dual,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self._rows = {client: row for row, client in enumerate(state["clients"].tolist())}
        self._rounds = state["rounds"].tolist()
        for name in ("shares", "centre", "primal", "spread", "dual"):
            setattr(self, f"_{name}", state[name].clone())
        self._weights, self._duals = self._empty(), self._empty()
        for name, rows in (("weights", self._weights), ("duals", self._duals)):
            rows.grow(len(self._rows))
            for i, block in enumerate(rows.blocks(len(self._rows))):
                block.copy_(state[f"{name}.{i}"])

    @property
    def _total(self) -> Tensor:
        return self._shares.sum(dtype=torch.float64)

    def _admit(self, clients: Mapping[int, Tensor]) -> None:
        """Make room for clients that the ledger does not know yet."""
        for client in clients:
            self._rows.setdefault(client, len(self._rows))
        new = len(self._rows) - len(self._rounds)
        self._rounds += [0] * new
        self._shares = torch.cat([self._shares, torch.zeros(new)])
        self._weights.grow(len(self._rows))
        self._duals.grow(len(self._rows))

    def _shift(self, centre: Tensor) -> None:
        """Take the sums relative to another c."""
        total, shift = self._total, self._centre.double() - centre
        self._spread += 2 * (shift @ self._primal) + total * shift.square().sum()
        self._primal += total * shift
        self._centre = centre

    def _count(self, rows: slice, sign: float) -> None:
        """Add what some rows hold to the sums, or take it out."""
        weights, duals = self._weights.run(rows.start, rows.stop), self._duals.run(rows.start, rows.stop)
        shares = self._shares[rows] * sign
        for columns in _tiles(*weights.shape):
            self._add(shares, columns, weights[:, columns] - self._centre[columns], duals[:, columns])

    def _write(self, rows: slice, incoming: Tensor, sigma: Tensor | None) -> None:
        """Write rows, and add them to the sums."""
        weights, duals = self._weights.run(rows.start, rows.stop), self._duals.run(rows.start, rows.stop)
        shares = self._shares[rows]
        for columns in _tiles(*weights.shape):
            weights[:, columns] = incoming[:, columns]
            gap = incoming[:, columns] - self._centre[columns]
            if sigma is not None:
                duals[:, columns] += gap * sigma[columns]
            self._add(shares, columns, gap, duals[:, columns])

    def _add(self, shares: Tensor, columns: slice, gaps: Tensor, duals: Tensor) -> None:
        self._primal[columns] += shares @ gaps
        self._dual[columns] += shares @ duals
        self._spread += shares.double() @ gaps.square().sum(dim=1).double()


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Positions, from and up to, of ascending row numbers that follow one another within a block."""
    start = 0
    for position in range(1, len(rows) + 1):
        whole = position < len(rows) and rows[position] == rows[position - 1] + 1 and rows[position] % ROWS
        if not whole:
            yield start, position
            start = position


def _tiles(rows: int, columns: int) -> Iterator[slice]:
    """Columns, cut so that some of them in all the rows make a tile."""
    width = max(1, _TILE // rows)
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))
