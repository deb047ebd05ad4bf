"""DP-SGD: each client noises the gradients that it computes with, so that nothing tells of a single example."""

from __future__ import annotations

import math
from typing import Literal

from pisa_fl.models.examination import Findings
from pisa_fl.privacy.accounting import Adjacency, Release
from pisa_fl.privacy.base import Privacy, only_array
from strategies import DittoClient, FedPmClient, FedRepClient, LocalSgd, MoonClient, PisaClient
from strategies.base import checks
from strategies.base.client import ClientHalf
from strategies.label_loss import LabelLoss
from strategies.optimizers import Sam

CURIOUS = (DittoClient, FedPmClient, FedRepClient, LabelLoss, MoonClient)
"""Client halves that ask for outputs, labels or layers, or take further epochs."""


class Examples(Privacy):
    """Gradients of single examples are clipped; their sum is noised, by each client for itself (Abadi et al. 2016).

    In a local step each example is drawn by itself with the chance q = `rate`, and the step's gradient is

        (sum over those drawn of clip(gradient of the example) + N(0, (z C)^2 I)) / (q n_i)

    with ceil(1/q) steps a pass; `batch_size` has no say. PISA's gradient is that of all examples, q = 1, once a round.
    How many examples a client has is taken as known to all.

    Args:
        rate: q, in (0, 1].
    """

    protects = "one example of a client, from the server and everybody else"

    def __init__(
        self,
        clip: float,
        noise: float,
        rate: float,
        delta: float,
        adjacency: Adjacency,
        randomness: Literal["seed", "system"],
        seed: int = 0,
    ) -> None:
        super().__init__(clip, noise, delta, adjacency, randomness, seed)
        checks.share("rate", rate)
        self.rate = rate

    def check(self, half: ClientHalf, model: Findings) -> None:
        """Clients take from their examples gradients alone, each once, and each of one example."""
        super().check(half, model)
        if model.mixes:
            raise ValueError(
                "model mixes the examples of a batch (BatchNorm), so that no gradient is of one alone, as"
                " privacy=examples has it: use one that does not, such as simple_cnn, or privacy=local"
            )
        if isinstance(half, PisaClient):
            only_array(half, "examples")
            if half.gradient != "mean":
                raise ValueError(f"strategy.gradient must be mean with privacy=examples, got {half.gradient}")
        elif not isinstance(half, LocalSgd) or isinstance(half, CURIOUS):
            raise ValueError(
                "privacy=examples noises gradients of local steps and PISA's gradient, and"
                f" {type(half).__name__} takes more of the examples: use strategy=fedavg or pisa, or privacy=local"
            )
        elif isinstance(half.optimizer, Sam):
            raise ValueError(
                "optimizer=sam takes two gradients of a batch, which privacy=examples does not account for:"
                " use strategy/optimizer=sgd, adamw or muon"
            )

    def release(self, half: ClientHalf, participation: float) -> tuple[Release, int]:
        """PISA's one gradient of all examples, or that of each local step."""
        rate = self.rate if isinstance(half, LocalSgd) else 1.0
        return Release(self.noise, float(rate), self.adjacency), self.allowed(half)

    def allowed(self, half: ClientHalf) -> int:
        """How many noised gradients a client may take in a round."""
        return half.local_epochs * self.steps if isinstance(half, LocalSgd) else 1

    @property
    def steps(self) -> int:
        """Local steps in a pass."""
        return math.ceil(1 / self.rate)
