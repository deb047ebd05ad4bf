"""Each client noises what it sends: nobody, the server included, need be trusted with an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pisa_fl.models.examination import Findings
from pisa_fl.privacy.accounting import Release
from pisa_fl.privacy.base import Privacy, only_array
from pisa_fl.privacy.clipping import clipped
from strategies.base.client import ClientHalf, Update
from strategies.base.messages import WEIGHTS


class Local(Privacy):
    """A client sends w + clip(w_i - w) + N(0, (z C)^2 I), or clip(g_i) + N(0, (z C)^2 I) if it sends gradients.

    Whatever a server half makes of these, tables and ledgers of clients' own rows included, follows from them. The
    server knows who took part, so that drawing few clients a round hides nobody: a client pays for every round in
    which it is asked.
    """

    protects = "all examples of a client, from the server and everybody else"

    def check(self, half: ClientHalf, model: Findings) -> None:
        """One vector a client is all that leaves it."""
        super().check(half, model)
        only_array(half, "local")

    def release(self, half: ClientHalf, participation: float) -> tuple[Release, int]:
        """One vector each time that a client is asked."""
        return Release(self.noise, 1.0, self.adjacency), 1

    def sent(self, update: Update, clients: Sequence[int], round_number: int, weights: Tensor) -> Update:
        """Clip and noise; what is within the bound keeps its bits if there is no noise."""
        [(name, rows)] = update.arrays.items()
        centre = weights if name == WEIGHTS else torch.zeros_like(weights)
        moved = rows - centre
        short = clipped(moved, self.clip)
        if not self.noise:
            same = (short == moved).all(dim=1, keepdim=True)
            return replace(update, arrays={name: torch.where(same, rows, centre + short)})
        drawn = [self.random.at("local noise", round_number, client) for client in clients]
        noise = torch.stack([draws.normal(len(centre)) for draws in drawn]).to(rows.device)
        return replace(update, arrays={name: centre + (short + self.deviation * noise)})
