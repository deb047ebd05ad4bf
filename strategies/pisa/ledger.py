"""The server's ledger: what it last accepted from every client, and the consensus that follows from it.

Two consensuses, the same with everybody present:

    w = sum_i alpha_i (sigma w_i + pi_i) / (sigma + lambda)          `all`: over every client known, the paper's
    w = (sigma sum_present alpha_i w_i + sum_i alpha_i pi_i) / (sigma + lambda)           `fresh`

`fresh` takes the primals of those who answered, by their alpha_i among themselves, and the duals of all: the primal
of a client that is absent is as old as its last answer and holds the rest back, while its dual still says what its
data want. In place of primals it keeps a table of the statistics that clients sent last, whose average over all
clients is what a common Q is built from: that of those who happen to be present is another one every round.

With friction f, every round takes a share f of the duals' average away, from each of them alike,

    pi_i -= f sum_j alpha_j pi_j                                   for all i

so that what is left is what clients want more or less than the others. The average alone is the velocity of the
consensus (`strategies.pisa.penalty`). What was taken away in all is one vector, the offset, and a row holds
pi_i - offset: a round still costs what its participants cost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from strategies.base.layout import Layout
from strategies.base.messages import out_of_range, squared
from strategies.base.rows import ROWS, Rows
from strategies.base.threads import in_threads


@dataclass
class _Sums:
    """Sums over some clients, of vectors in single precision."""

    primal: Tensor
    dual: Tensor
    spread: float = 0.0

    def add(self, share: float, gap: Tensor, dual: Tensor) -> None:
        """Add share times (w_i - c), pi_i and |w_i - c|^2."""
        self.primal.add_(gap, alpha=share)
        self.dual.add_(dual, alpha=share)
        self.spread += share * float(gap @ gap)

    def __iadd__(self, other: _Sums) -> _Sums:
        self.primal += other.primal
        self.dual += other.dual
        self.spread += other.spread
        return self


@dataclass(frozen=True)
class _Before:
    """What a ledger knew, but for its rows."""

    rows: dict[int, int]
    rounds: dict[int, int]
    shares: dict[int, float]
    present: float
    tabled: dict[int, float]
    table: Tensor
    centre: Tensor
    sums: _Sums
    largest_dual: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Observed:
    """Statistics of a round that are not kept yet.

    Attributes:
        average: What Q follows, (k,): of those who sent one or, for a fresh consensus, of all.
        statistics: Client number -> s_i, (k,); empty where there is no table.
        shares: Their weights.
        total: The table's sum with them.
    """

    average: Tensor
    statistics: Mapping[int, Tensor]
    shares: dict[int, float]
    total: Tensor


@dataclass(frozen=True)
class _Begun:
    """What was begun: what to go back to, and what to write; without the former the rows are written already."""

    before: _Before | None
    order: Sequence[int]
    statistics: Mapping[int, Tensor]
    weights: Mapping[int, Tensor]
    consensus: Tensor
    step: Tensor | None
    gone: Sequence[int]


class Ledger:
    """Dual of every client that has ever answered, and its primal or its last statistic: two rows a client.

    A client enters with its first accepted reply; from then on its row stays in every sum, whether it takes part in a
    round or not, until it is forgotten. What a round costs depends on who takes part, not on N: the sums over all
    clients

        P = sum n_i (w_i - c),     R = sum n_i |w_i - c|^2,     D = sum n_i pi_i,     S = sum n_i s_i

    are kept in double precision, c being the consensus of the round last accepted and s_i the statistics, and only the
    rows of those who answered are taken out and put in again. They are put together afresh when everybody answers. P
    and R of a fresh consensus are only over those who answered last.

    Memory is what limits all this, not arithmetic: a client's rows are worked on one after the other while they are in
    a core's cache, by one thread a core. Clients are summed in blocks, and blocks in their order, so that the sums do
    not depend on the number of threads.

    Args:
        layout: Layout of the model's parameters.
        uniform: Weigh clients equally (alpha_i = 1/N) instead of by examples (alpha_i = n_i/n).
        on_disk: Keep the rows in files for which memory is only a cache (`strategies.base.rows.zeros`).
        table: Length of a client's statistic, for the fresh consensus; None for the one of all.
        friction: Share of the duals' average that a round takes away, f.

    Attributes:
        offset: What it has taken away so far, with its sign, (d,).
    """

    def __init__(
        self,
        layout: Layout,
        uniform: bool,
        on_disk: bool = False,
        table: int | None = None,
        friction: float = 0.0,
    ) -> None:
        self._layout, self._uniform, self._fresh = layout, uniform, table is not None
        self._empty = {
            "duals": partial(Rows, layout.size, on_disk),
            "statistics" if self._fresh else "weights": partial(
                Rows, layout.size if table is None else table, on_disk
            ),
        }
        self._kept = {name: empty() for name, empty in self._empty.items()}
        self._tabled: dict[int, float] = {}
        self._table = torch.zeros(table or 0, dtype=torch.float64)
        self._present = 0.0
        self._rows: dict[int, int] = {}
        self._rounds: dict[int, int] = {}
        self._shares: dict[int, float] = {}
        self._centre = torch.zeros(layout.size)
        self._sums = self._nothing(torch.float64)
        self._begun: _Begun | None = None
        self.largest_dual = torch.zeros(())
        self._friction, self.offset = friction, torch.zeros(layout.size)

    @property
    def clients(self) -> list[int]:
        """Numbers of the clients that it knows, in the order in which they came."""
        return list(self._rows)

    def observe(
        self, statistics: Mapping[int, Tensor], examples: Mapping[int, int], gone: Collection[int] = ()
    ) -> Observed:
        """The average statistic: of those who sent one now or, for a fresh consensus, of all, with these in place of
        what they sent before. Nothing is kept of it unless it is given to `begin`.

        Args:
            statistics: Client number -> s_i, (k,).
            examples: Client number -> n_i.
            gone: Clients that are none of those, and are to be forgotten.
        """
        if not self._fresh:
            return Observed(self.average(statistics, examples), {}, {}, self._table)
        shares: dict[int, float] = {client: self._share(examples[client]) for client in statistics}
        staying = self._tabled.keys() - gone
        everybody = staying <= shares.keys()

        def add(clients: Sequence[int]) -> Tensor:
            # in double precision: rows are taken out again when they have become far greater than what is left
            total = torch.zeros_like(self._table)
            for client in clients:
                if client in staying and not everybody:
                    total.add_(self.statistic(client), alpha=-self._tabled[client])
                total.add_(statistics[client], alpha=shares[client])
            return total

        total = torch.zeros_like(self._table) if everybody else self._table.clone()
        for client in gone:
            if client in self._tabled and not everybody:
                total.add_(self.statistic(client), alpha=-self._tabled[client])
        for part in in_threads(add, _blocks(statistics)):
            total += part
        weights = self._tabled | shares
        weight = sum(weights[client] for client in sorted(staying | shares.keys()))
        return Observed((total / weight).float(), statistics, shares, total)

    def begin(
        self,
        round_number: int,
        weights: Mapping[int, Tensor],
        examples: Mapping[int, int],
        consensus: Tensor,
        sigma: Tensor | None,
        following: Tensor | None,
        gone: Sequence[int] = (),
        observed: Observed | None = None,
    ) -> None:
        """Take over the primal w_i of clients and apply their dual step, pi_i += sigma (w_i - w).

        `undo` can take it back until `commit`, if it could lead beyond what messages may hold. Where that is out of the
        question, as in all rounds of ordinary runs, the rows are written in the same pass.

        Args:
            round_number: The round.
            weights: Client number -> w_i, (d,).
            examples: Client number -> n_i.
            consensus: w that they were sent, (d,).
            sigma: Penalty, () or (d,); None in a round that only measures, which leaves the duals as they are.
            following: Penalty of the next round, of which the consensus is made.
            gone: Clients that are none of those, and are forgotten with it.
            observed: What `observe` gave in this round, to be kept in the table; of those who did not answer with w_i
                after all, what they sent before stays there.
        """
        if observed is not None and not observed.statistics.keys() <= weights.keys():
            answered = {client: s for client, s in observed.statistics.items() if client in weights}
            observed = self.observe(answered, examples, gone) if answered else None
        at_once = self._stays_in_range(consensus, sigma, following)
        before = None if at_once else self._now()
        self._admit(weights)
        self._shift(consensus)
        self._leave(gone)
        order = sorted(weights, key=self._rows.__getitem__)
        everybody = len(order) == len(self._rows) - len(gone)
        statistics: Mapping[int, Tensor] = {}
        if observed is not None:
            statistics, self._table = observed.statistics, observed.total
            self._tabled = self._tabled | observed.shares
        shares = {client: self._share(examples[client]) for client in order}
        step = None if sigma is None else sigma.expand_as(consensus)

        def add(clients: Sequence[int]) -> tuple[_Sums, Tensor]:
            sums, gap, move = self._nothing(), torch.empty_like(consensus), torch.empty_like(consensus)
            largest, whole = torch.zeros(()), torch.empty_like(consensus)
            for client in clients:
                row = self.row(client)
                dual = torch.add(row, self.offset, out=whole) if self._friction else row
                if not everybody and self._fresh:
                    sums.dual.sub_(dual, alpha=self._shares[client])
                elif not everybody:
                    torch.sub(self.primal(client), consensus, out=gap)
                    sums.add(-self._shares[client], gap, dual)
                torch.sub(weights[client], consensus, out=gap)
                if step is not None:
                    torch.mul(gap, step, out=move)
                    row = torch.add(row, move, out=row if at_once else move)
                    dual = torch.add(row, self.offset, out=whole) if self._friction else row
                if at_once:
                    self._keep(client, weights, statistics)
                sums.add(shares[client], gap, dual)
                largest = torch.maximum(largest, dual @ dual)
            return sums, largest

        if everybody:
            self._sums = self._nothing(torch.float64)
        elif self._fresh:
            self._sums = replace(self._nothing(torch.float64), dual=self._sums.dual)
        for sums, largest in in_threads(add, _blocks(order)):
            self._sums += sums
            self.largest_dual = torch.maximum(self.largest_dual, largest.sqrt())
        self._shares |= shares
        self._present = sum(shares.values())
        if self._friction:
            self._slow_down()
        self._rounds |= dict.fromkeys(order, round_number)
        self._begun = _Begun(before, order, statistics, weights, consensus, step, gone)

    def commit(self) -> None:
        """Keep what was begun."""
        assert self._begun is not None
        weights, consensus, step = self._begun.weights, self._begun.consensus, self._begun.step
        statistics = self._begun.statistics

        def write(clients: Sequence[int]) -> None:
            gap = torch.empty_like(consensus)
            for client in clients:
                self._keep(client, weights, statistics)
                if step is not None:
                    torch.sub(weights[client], consensus, out=gap)
                    self.row(client).add_(gap.mul_(step))

        if self._begun.before is not None:
            list(in_threads(write, _blocks(self._begun.order)))
        self._remove(self._begun.gone)
        self._begun = None

    def undo(self) -> None:
        """Take back what was begun and may lead out of range."""
        assert self._begun is not None
        before = self._begun.before
        assert before is not None
        self._rows, self._rounds, self._shares = before.rows, before.rounds, before.shares
        self._present, self._tabled, self._table = before.present, before.tabled, before.table
        self._centre, self._sums, self.largest_dual = before.centre, before.sums, before.largest_dual
        self.offset = before.offset
        self._begun = None

    def _now(self) -> _Before:
        """What is known now, but for the rows."""
        sums = replace(self._sums, primal=self._sums.primal.clone(), dual=self._sums.dual.clone())
        rows, rounds, shares = dict(self._rows), dict(self._rounds), dict(self._shares)
        return _Before(
            *(rows, rounds, shares, self._present, self._tabled, self._table),
            *(self._centre, sums, self.largest_dual, self.offset),
        )

    def _keep(self, client: int, weights: Mapping[int, Tensor], statistics: Mapping[int, Tensor]) -> None:
        """Write the row beside the dual."""
        if not self._fresh:
            self.primal(client).copy_(weights[client])
        elif client in statistics:
            self.statistic(client).copy_(statistics[client])

    def _stays_in_range(self, consensus: Tensor, sigma: Tensor | None, following: Tensor | None) -> bool:
        """Whether no answer that messages may hold could take a dual or the next consensus out of their range.

        |pi_i'| <= (1 + f) (|pi_i| + sigma (|w_i| + |w|)) and
        |w'| <= max |w_i| + max |pi_i'| / sigma', element by element.
        """
        reach = squared(1).largest
        step = torch.zeros(()) if sigma is None else sigma * (reach + float(consensus.abs().max()))
        dual = (self.largest_dual + step) * (1 + self._friction)
        next_consensus = reach + dual / following if following is not None else consensus
        return out_of_range({"dual": dual, "weights": next_consensus}) is None

    def _share(self, examples: int) -> float:
        """Weight of a client with so many examples, before it is divided by everybody's."""
        return 1.0 if self._uniform else float(examples)

    def _leave(self, clients: Iterable[int]) -> None:
        """Take clients out of the sums."""
        for client in clients:
            share = self._shares.pop(client)
            if self._fresh:
                self._sums.dual.sub_(self.dual(client), alpha=share)
                if client in self._tabled:  # as a new tensor, for `undo`
                    self._table = torch.sub(self._table, self.statistic(client), alpha=self._tabled[client])
            else:
                self._sums.add(-share, self.primal(client) - self._centre, self.dual(client))

    def _remove(self, clients: Iterable[int]) -> None:
        """Take out the rows of clients that have left the sums; the last row fills the place of each."""
        for client in clients:
            last = next(reversed(self._rows))
            self._tabled = {other: share for other, share in self._tabled.items() if other != client}
            for rows in self._kept.values():
                rows[self._rows[client]].copy_(rows[self._rows[last]])
                rows[self._rows[last]].zero_()
            self._rows[last] = self._rows[client]
            del self._rows[client], self._rounds[client]
            self._rows = dict(sorted(self._rows.items(), key=lambda item: item[1]))

    def accepted_round(self, client: int) -> int:
        """Round of the client's last accepted reply; 0 if there is none."""
        return self._rounds.get(client, 0)

    def primal(self, client: int) -> Tensor:
        """The client's primal w_i, (d,)."""
        return self._kept["weights"][self._rows[client]]

    def statistic(self, client: int) -> Tensor:
        """What the client last sent of Q's statistic, for a fresh consensus, (k,)."""
        return self._kept["statistics"][self._rows[client]]

    def dual(self, client: int) -> Tensor:
        """The client's dual pi_i, (d,)."""
        return self.row(client) + self.offset if self._friction else self.row(client)

    def row(self, client: int) -> Tensor:
        """The client's dual without the offset, as it is kept, (d,)."""
        return self._kept["duals"][self._rows[client]]

    def average(self, vectors: Mapping[int, Tensor], examples: Mapping[int, int]) -> Tensor:
        """Average of one vector (k,) of each of some clients with n_i examples, by their alpha_i among themselves."""
        shares = {client: self._share(examples[client]) for client in vectors}

        def add(clients: Sequence[int]) -> Tensor:
            total = torch.zeros_like(vectors[clients[0]])
            for client in clients:
                total.add_(vectors[client], alpha=shares[client])
            return total

        total = torch.stack(list(in_threads(add, _blocks(vectors)))).sum(dim=0, dtype=torch.float64)
        return (total / sum(shares.values())).float()

    def consensus(self, sigma: Tensor, lambda_: float | Tensor) -> Tensor:
        """w of the next round; see the module's equations, (d,)."""
        primal, sigma = self._centre + self._sums.primal / self._weighed, sigma.double()
        return ((sigma * primal + self._sums.dual / self._total) / (sigma + lambda_)).float()

    def primal_residual(self, consensus: Tensor) -> float:
        """sqrt(sum alpha_i |w_i - w|^2) over those whose primals the consensus holds."""
        shift = self._centre.double() - consensus
        squares = self._sums.spread + float(
            2 * shift @ self._sums.primal + self._weighed * shift.square().sum()
        )
        return math.sqrt(max(0.0, squares) / self._weighed)

    def dual_residual(self, consensus: Tensor, lambda_: float | Tensor) -> float:
        """|sum alpha_i pi_i - lambda w|."""
        return float((self._sums.dual / self._total - lambda_ * consensus).norm())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the ledger holds; its rows as they lie, block by block."""
        known = len(self._rows)
        rows = {name: kept.blocks(known) for name, kept in self._kept.items()}
        return {f"{name}.{i}": block for name, blocks in rows.items() for i, block in enumerate(blocks)} | {
            "clients": torch.tensor(list(self._rows), dtype=torch.int64),
            "rounds": torch.tensor([self._rounds[client] for client in self._rows], dtype=torch.int64),
            "shares": torch.tensor([self._shares[client] for client in self._rows], dtype=torch.float64),
            "centre": self._centre,
            "primal": self._sums.primal,
            "dual": self._sums.dual,
            "spread": torch.tensor(self._sums.spread, dtype=torch.float64),
            "present": torch.tensor(self._present, dtype=torch.float64),
            "table": self._table,
            "offset": self.offset,
            "tabled": torch.tensor([self._tabled.get(c, -1.0) for c in self._rows], dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        clients = state["clients"].tolist()
        self._rows = {client: row for row, client in enumerate(clients)}
        self._rounds = dict(zip(clients, state["rounds"].tolist(), strict=True))
        self._shares = dict(zip(clients, state["shares"].tolist(), strict=True))
        self._centre = state["centre"].clone()
        self._sums = _Sums(state["primal"].clone(), state["dual"].clone(), float(state["spread"]))
        self._present, self._table = float(state["present"]), state["table"].clone()
        tabled = zip(clients, state["tabled"].tolist(), strict=True)
        self._tabled = {client: share for client, share in tabled if share >= 0}
        self._kept = {name: empty() for name, empty in self._empty.items()}
        for name, rows in self._kept.items():
            rows.grow(len(self._rows))
            for i, block in enumerate(rows.blocks(len(self._rows))):
                block.copy_(state[f"{name}.{i}"])
        duals = self._kept["duals"].blocks(len(self._rows))
        norms = [torch.linalg.vector_norm(block, dim=1).max() for block in duals]
        self.offset = state["offset"].clone()
        self.largest_dual = torch.stack([torch.zeros(()), *norms]).max() + self.offset.norm()

    @property
    def _total(self) -> float:
        return sum(self._shares.values())

    @property
    def _weighed(self) -> float:
        """Weight of those over whom the primals are summed."""
        return self._present if self._fresh else self._total

    def _nothing(self, dtype: torch.dtype = torch.float32) -> _Sums:
        size = self._layout.size
        return _Sums(torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype))

    def _admit(self, clients: Iterable[int]) -> None:
        """Make room for clients that the ledger does not know yet; their duals are zero."""
        new = [client for client in clients if client not in self._rows]
        for client in new:
            self._rows[client], self._shares[client] = len(self._rows), 0.0
        for rows in self._kept.values():
            rows.grow(len(self._rows))
        if self._friction:
            for client in new:
                torch.neg(self.offset, out=self.row(client))

    def _slow_down(self) -> None:
        """Take the friction's share of the average dual away; the sum follows what was really taken."""
        taken = (self._sums.dual * (self._friction / self._total)).float()
        before, self.offset = self.offset, self.offset - taken
        self._sums.dual -= self._total * (before.double() - self.offset)
        self.largest_dual = self.largest_dual + taken.norm()

    def _shift(self, centre: Tensor) -> None:
        """Take the sums relative to another c."""
        shift = self._centre.double() - centre
        self._sums.spread += float(2 * shift @ self._sums.primal + self._weighed * shift.square().sum())
        self._sums.primal += self._weighed * shift
        self._centre = centre


def _blocks(clients: Iterable[int]) -> Iterator[Sequence[int]]:
    """Clients in parts of as many as a block has rows."""
    rest = list(clients)
    for start in range(0, len(rest), ROWS):
        yield rest[start : start + ROWS]
