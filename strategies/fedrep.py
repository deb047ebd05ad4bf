"""FedRep: first a head of the client's own, then the shared representation below it.

Collins et al. 2021, arXiv 2102.07078, Algorithm 1. As FedPer (`strategies.fedper`: symbols, what is sent, what is
measured), but that a client trains its personal weights and the shared ones in turn:

    p_i = local SGD from p_i with b fixed, `head_epochs` passes                  (client)
    b_i = local SGD from b with p_i fixed, `local_epochs` passes
    b   = mean of those present of b_i                                           (server)

The optimizer of either remembers nothing of the other. What is fixed stays as it is, whatever the weight decay, and in
SAM's points nearby. Both go through the mini-batches in the same order, from the round's first pass on. A pass over the
examples is counted as one though a part of the gradient is not used, and a round has `head_epochs` + `local_epochs` of
them. The loss that is reported is the mean over all.

The paper's head is the last layer. Its algorithm has one step of the representation a round.

On stability: as FedAvg's; many epochs of a head alone over-fit it to few examples. What was seen once, in the setting
that `strategies.moon` tells of, with 5 epochs of the head and 1 of the representation: 87.9 % on the clients' own test
examples (FedAvg 86.8 %).
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from strategies.base import checks
from strategies.base.client import Stack
from strategies.base.layout import Layout
from strategies.fedper import FedPerClient
from strategies.local_sgd import Local


class FedRepClient(FedPerClient):
    """Client half; the server half is FedPer's.

    Args:
        layout: Layout of the model's parameters.
        personal_layers: How many of the last layers are the head, 1 or more; the server's.
        head_epochs: Passes over the client's examples for the head.
        local: As `LocalSgd`'s; `local_epochs` are those of the representation.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self, layout: Layout, personal_layers: int, head_epochs: int, **local: Unpack[Local]
    ) -> None:
        checks.whole("personal_layers", personal_layers, 1)
        checks.whole("head_epochs", head_epochs, 1)
        super().__init__(layout, personal_layers, **local)
        self.head_epochs = head_epochs

    def train(self, stack: Stack, start: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """The head, then the representation; see the module's equations."""
        head = self.places.to(start.device)
        first = self.descend(stack, start, lr, 0.0, epochs=self.head_epochs, fixed=~head)
        then = self.descend(stack, first.weights, lr, 0.0, fixed=head)
        loss = self.head_epochs * first.loss + self.local_epochs * then.loss
        return then.weights, loss / (self.head_epochs + self.local_epochs)
