"""FedLC: cross-entropies with a margin that is wide for the classes of which a client has few examples.

Zhang et al. 2022, arXiv 2209.00189. In the loss of `strategies.label_loss`,

    a_c = f_c - tau n_c^(-1/4)

Symbols: f the logits, n_c the client's examples of class c, tau the width of the margins. Between y and any c the
margin is tau (n_y^(-1/4) - n_c^(-1/4)): a rare class must win by more. A class that the client does not have counts as
1e-8 examples, as in public code: its margin is 100 tau, so that with tau of about one it is all but left out, and what
the federation knows of it is left alone. With tau = 0 it is FedAvg.

What could not be established from public text: whether the paper's sum has class y in it. Here it has, as in a softmax
and in public code, among it fluke's. Public code has tau between 0.5 and 1, some of it with shares in the place of n_c.

On stability: as FedAvg's. A client of a single class has nothing to tell it apart from: its loss is zero from the
start, and it stays where it is. With one class for each client nothing is learnt at all. What was seen once, in the
setting that `strategies.moon` tells of: 79.9 % (FedAvg 82.7 %).
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.label_loss import LabelLoss
from strategies.local_sgd import Local

ABSENT = 1e-8
"""Examples that a class without any counts as."""


class FedLcClient(LabelLoss):
    """Client half: local SGD with margins; the server half is FedAvg's.

    Args:
        layout: Layout of the model's parameters.
        tau: Width of the margins; 0: none, which is FedAvg.
        local: As `LocalSgd`'s.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(self, layout: Layout, tau: float, **local: Unpack[Local]) -> None:
        super().__init__(layout, **local)
        checks.not_negative("tau", tau)
        self.tau = tau

    def adjusted(self, logits: Tensor, counts: Tensor) -> Tensor:
        """Less the margins."""
        return logits - self.tau * counts.clamp(min=ABSENT).pow(-0.25)
