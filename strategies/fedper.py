"""FedPer: the last layers are every client's own; the others are averaged.

Arivazhagan et al. 2019, arXiv 1912.00818, Algorithms 1 and 2. A round, for every client i that takes part:

    (b_i, p_i) = local SGD on all weights from (b, p_i), as FedAvg's         (client)
    b          = mean of those present of b_i                                (server)

Symbols: b the shared weights, p_i the personal ones of client i, which are those of the last `personal_layers` of the
model's modules that have weights (K_P of the paper). Means are weighted by `alpha`, the paper's by examples.

p_i is kept by the client and never sent: an update is b_i alone, and its bytes shrink by the personal weights. The
instruction is the whole vector still, whose personal part is the initial one: from there a client goes on that takes
part for the first time, or that lost p_i, which is said in the run's messages.

What is measured. A client's own metrics (`evaluate_clients_every`) are those of (b, p_i), with the server's present b
and its own p_i, which was learnt with an earlier b. The server's test set is given to b with the initial personal part,
where every p_i began and which nobody trains: that tells how b goes with it, and nothing of what the clients have.
Without personal layers, all of this is FedAvg.

On stability: as FedAvg's. What was seen once, in the setting that `strategies.moon` tells of: 94.5 % on the clients'
own test examples (FedAvg 86.8 %), 76.9 % on the server's (82.7 %).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from strategies.base import checks
from strategies.base.averaging import Answers, Averaging, mean
from strategies.base.client import Instruction, Stack, Update, remembered
from strategies.base.layout import Layout
from strategies.base.messages import WEIGHTS, Field, tensor
from strategies.local_sgd import Local, LocalSgd

SHARED, PERSONAL = "shared", "personal"
"""b_i in a reply, and p_i in what a client remembers."""


def personal_places(layout: Layout, personal_layers: int) -> Tensor:
    """Which of the weights are in the last so many modules, (d,).

    Raises:
        ValueError: There are not as many, or none would be left.
    """
    checks.whole("personal_layers", personal_layers, 0)
    shared = len(layout.modules) - personal_layers
    if shared < 1:
        raise ValueError(
            f"personal_layers must leave one of the model's {len(layout.modules)} layers to be shared,"
            f" got {personal_layers}"
        )
    own = layout.modules[shared:]
    places = torch.zeros(layout.size, dtype=torch.bool)
    for name, span in layout.spans.items():
        places[span] = name.rpartition(".")[0] in own
    return places


@checks.literals
class FedPer(Averaging):
    """Server half: the mean of the shared weights.

    Args:
        layout: Layout of the model's parameters.
        personal_layers: How many of the last layers are the clients' own; the clients'.
        alpha: Weights of the clients: `examples` (n_i/n, the paper) or `uniform`.

    Raises:
        ValueError: A value is outside its range.
    """

    def __init__(self, layout: Layout, personal_layers: int, alpha: Literal["examples", "uniform"]) -> None:
        self.shared_places = ~personal_places(layout, personal_layers)
        super().__init__(layout, alpha)

    def step(self, answers: Answers, weights: Mapping[int, float]) -> Tensor:
        """The mean of the shared weights; the others stay the initial ones."""
        following = self.consensus.clone()
        following[self.shared_places] = mean({n: said[SHARED] for n, said in answers.arrays.items()}, weights)
        return following

    def length(self, client: int, arrays: ArrayRecord) -> float:
        """|b_i - b|."""
        return float((tensor(arrays[SHARED]) - self.consensus[self.shared_places]).norm())


class FedPerClient(LocalSgd):
    """Client half: local SGD on the shared and its own weights.

    Args:
        layout: Layout of the model's parameters.
        personal_layers: How many of the last layers are the client's own; the server's.
        local: As `LocalSgd`'s.

    Raises:
        ValueError: A number is outside its range.
    """

    personal = True

    def __init__(self, layout: Layout, personal_layers: int, **local: Unpack[Local]) -> None:
        super().__init__(layout, **local)
        self.places = personal_places(layout, personal_layers)

    def state_sizes(self) -> dict[str, int]:
        """p_i, if there are such layers."""
        count = int(self.places.sum())
        return {PERSONAL: count} if count else {}

    def reply_fields(self, config: Mapping[str, Any]) -> dict[str, Field]:
        """b_i."""
        return {SHARED: Field(int((~self.places).sum()))}

    def own_weights(self, weights: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """(b, p_i)."""
        own = weights.clone()
        for held in state.values():
            own[:, self.places] = remembered(held, own[:, self.places])
        return own

    def solve(self, stack: Stack, instruction: Instruction, state: Mapping[str, Tensor]) -> Update:
        """The local epochs; see the module's equations."""
        start = instruction.arrays[WEIGHTS].expand(len(stack.clients), -1)
        weights, loss = self.train(stack, self.own_weights(start, state), self.lr_now(instruction))
        kept = dict.fromkeys(self.state_sizes(), weights[:, self.places])
        return Update({SHARED: weights[:, ~self.places]}, loss, lambda sent: kept)

    def train(self, stack: Stack, start: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Weights (C, d) and losses (C,) of a round, from each client's own start."""
        done = self.descend(stack, start, lr, 0.0)
        return done.weights, done.loss
