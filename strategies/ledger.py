"""The server's ledger: what it last accepted from every client, and the consensus that follows from it."""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.layout import Layout


class Ledger:
    """Primal and dual of every client that has ever answered, N rows of length d.

    A client enters with its first accepted reply; from then on its row stays in every sum, whether it takes
    part in a round or not. Rows are ordered by client number, so that sums do not depend on who answered first.

    Args:
        layout: Layout of the model's parameters.
        uniform: Weigh clients equally (alpha_i = 1/N) instead of by examples (alpha_i = n_i/n).
    """

    def __init__(self, layout: Layout, uniform: bool) -> None:
        self._layout, self._uniform = layout, uniform
        self.clients: list[int] = []
        self.weights = torch.empty(0, layout.size)
        self.duals = torch.empty(0, layout.size)
        self.examples = torch.empty(0, dtype=torch.float64)
        self.rounds = torch.empty(0, dtype=torch.int64)
        self._rows: dict[int, int] = {}

    def admit(self, clients: list[int]) -> None:
        """Make room for clients that the ledger does not know yet."""
        new = sorted(set(clients) - set(self.clients))
        if not new:
            return
        order = sorted(self.clients + new)
        rows = torch.tensor([order.index(c) for c in self.clients], dtype=torch.int64)
        for name in ("weights", "duals", "examples", "rounds"):
            old = getattr(self, name)
            grown = old.new_zeros(len(order), *old.shape[1:])
            grown[rows] = old
            setattr(self, name, grown)
        self.clients = order
        self._rows = {client: row for row, client in enumerate(order)}

    def accept(
        self,
        client: int,
        round_number: int,
        weights: Tensor,
        consensus: Tensor,
        sigma: Tensor | None,
        examples: int,
    ) -> None:
        """Take over a client's primal w_i and apply its dual step, pi_i += sigma (w_i - w).

        Without a sigma (a round that only measures) the dual stays as it is.
        """
        row = self._rows[client]
        self.weights[row] = weights
        if sigma is not None:
            self.duals[row] += sigma * (weights - consensus)
        self.examples[row], self.rounds[row] = examples, round_number

    def accepted_round(self, client: int) -> int:
        """Round of the client's last accepted reply; 0 if there is none."""
        row = self._rows.get(client)
        return 0 if row is None else int(self.rounds[row])

    def dual(self, client: int) -> Tensor:
        """The client's dual pi_i, (d,)."""
        return self.duals[self._rows[client]]

    @property
    def alpha(self) -> Tensor:
        """Weights of the clients, summing to one, (N,)."""
        share = torch.ones_like(self.examples) if self._uniform else self.examples
        return (share / share.sum()).to(self.weights.dtype)

    def consensus(self, sigma: Tensor, lambda_: float) -> Tensor:
        """w = sum alpha_i (sigma w_i + pi_i) / (sigma + lambda), (d,)."""
        alpha = self.alpha
        return (sigma * (alpha @ self.weights) + alpha @ self.duals) / (sigma + lambda_)

    def primal_residual(self, consensus: Tensor) -> float:
        """sqrt(sum alpha_i |w_i - w|^2)."""
        return float((self.alpha @ (self.weights - consensus).square().sum(dim=1)).sqrt())

    def dual_residual(self, consensus: Tensor, lambda_: float) -> float:
        """|sum alpha_i pi_i - lambda w|."""
        return float((self.alpha @ self.duals - lambda_ * consensus).norm())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the ledger holds."""
        return {
            "clients": torch.tensor(self.clients, dtype=torch.int64),
            "weights": self.weights,
            "duals": self.duals,
            "examples": self.examples,
            "rounds": self.rounds,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.clients = state["clients"].tolist()
        self._rows = {client: row for row, client in enumerate(self.clients)}
        for name in ("weights", "duals", "examples", "rounds"):
            setattr(self, name, state[name].clone())
