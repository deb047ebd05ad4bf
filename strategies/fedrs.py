"""FedRS: the logits of classes that a client does not have are scaled down, so that it hardly moves their weights.

Li and Zhan 2021 (KDD, doi 10.1145/3447548.3467254), equation 8. In the loss of `strategies.label_loss`,

    a_c = f_c           if the client has examples of class c
    a_c = alpha f_c     if it has none

Symbols: f the logits, alpha in [0, 1] `restriction`: with 1 it is FedAvg, with 0 absent classes are constants, to which
and from which nothing is learnt. Their gradients are scaled by alpha as well.

Authors' code, where it differs: the factor is alpha + (1 - alpha) n_c / (the greatest n), so that rare classes are
restricted too, and its last layer has no bias. Here the bias is a part of the logit, and scaled with it.

On stability: as FedAvg's. A logit far below zero is *raised* by alpha: where absent classes have such, the client's
loss is greater than FedAvg's. What was seen once, in the setting that `strategies.moon` tells of: 81.2 % (FedAvg
82.7 %).
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.label_loss import LabelLoss
from strategies.local_sgd import Local


class FedRsClient(LabelLoss):
    """Client half: local SGD with a restricted softmax; the server half is FedAvg's.

    Args:
        layout: Layout of the model's parameters.
        restriction: alpha; 1: none, which is FedAvg.
        local: As `LocalSgd`'s; the optimizer must be SGD or SAM.

    Raises:
        ValueError: A number is outside its range, or the optimizer another.
    """

    def __init__(self, layout: Layout, restriction: float, **local: Unpack[Local]) -> None:
        super().__init__(layout, **local)
        self.require_sgd("FedRS scales down gradients of absent classes, and others' steps do not follow")
        checks.fraction("restriction", restriction)
        self.restriction = restriction

    def adjusted(self, logits: Tensor, counts: Tensor) -> Tensor:
        """Those of absent classes scaled down."""
        return torch.where(counts > 0, logits, self.restriction * logits)
