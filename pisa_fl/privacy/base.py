"""What a promise of privacy is: what it does to a run, and what its accountant has to know."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from flwr.serverapp.strategy import Strategy
from torch import Tensor

from pisa_fl.models.examination import Findings
from pisa_fl.privacy.accounting import Adjacency, Release
from pisa_fl.privacy.draws import Randomness
from strategies import PisaClient
from strategies.base import checks
from strategies.base.client import ClientHalf, Update
from strategies.base.messages import GRADIENT, ROUND, WEIGHTS
from strategies.base.server import ServerHalf

LEAST = 1e-3
"""The least noise that is told from none: an epsilon of millions."""


@checks.literals
class Privacy(ABC):
    """A promise of differential privacy.

    Clients tell no losses, and nobody is asked for metrics on its own examples.

    Args:
        clip: C, the greatest length of what is noised; without noise it may be infinite.
        noise: z, standard deviation of the noise over C; 0: none, and no privacy.
        delta: At which epsilon is told; less than one over the number of whose data are protected.
        adjacency: Which data are to look alike: with one's and without (`zero_out`), or with any other in their place
            (`replace_one`), of which the second is worth more and costs more.
        randomness: `seed`: noise and draws follow from the run's seed, and whoever knows it can take them off;
            `system`: the operating system's, so that no run can be repeated.
        seed: The run's.

    Attributes:
        protects: Whose data, in words.
        poisson: Whether clients are drawn each by itself, with the chance `participation`.

    Raises:
        ValueError: A value is outside its range.
    """

    protects: ClassVar[str]
    poisson: ClassVar[bool] = False

    def __init__(
        self,
        clip: float,
        noise: float,
        delta: float,
        adjacency: Adjacency,
        randomness: Literal["seed", "system"],
        seed: int = 0,
    ) -> None:
        checks.not_negative("noise", noise)
        if 0 < noise < LEAST or noise > 1 / LEAST:
            raise ValueError(f"noise must be 0, or from {LEAST:g} to {1 / LEAST:g}, got {noise}")
        if noise or clip != math.inf:
            checks.positive("clip", clip)
        checks.share("delta", delta)
        if delta == 1:
            raise ValueError(f"delta must be below 1, got {delta}")
        self.clip, self.noise, self.delta, self.adjacency = clip, noise, delta, adjacency
        self.random = Randomness(randomness, seed)

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on each element of a sum."""
        return self.noise and self.noise * self.clip

    def check(self, half: ClientHalf, model: Findings) -> None:
        """See that clients tell nothing that is not noised: they look themselves, whatever the server did.

        Raises:
            ValueError: They would.
        """
        if model.statistics:
            raise ValueError(
                "model keeps running statistics of examples (BatchNorm), which leave clients without noise: use one"
                " without, such as simple_cnn"
            )

    def check_server(self, half: ClientHalf, strategy: Strategy) -> None:  # noqa: B027
        """See that the server half makes sense with the noise.

        Raises:
            ValueError: It does not.
        """

    @abstractmethod
    def release(self, half: ClientHalf, participation: float) -> tuple[Release, int]:
        """What is released, and how many times each time."""

    def sent(self, update: Update, clients: Sequence[int], round_number: int, weights: Tensor) -> Update:
        """What clients send in place of an update, in a round in which they were sent the weights (d,)."""
        return update

    def around(self, server: ServerHalf, expected: float) -> ServerHalf:
        """What stands in a server half's place, where so many clients are expected to answer in a round."""
        return server

    def chances(self, round_number: int, clients: int) -> Tensor:
        """A number from [0, 1) for each client: below `participation`, it takes part in the round."""
        return self.random.at("poisson participation", round_number).uniform(clients)


def only_array(half: ClientHalf, privacy: str) -> str:
    """The one array that a half's clients send.

    Raises:
        ValueError: They send others too, or numbers.
    """
    config: dict[str, Any] = {ROUND: 1}
    if isinstance(half, PisaClient) and not half.by_gradient:
        raise ValueError(
            f"privacy={privacy} needs PISA's clients to send gradients: set strategy.wire=gradient"
        )
    told = [*half.reply_fields(config), *half.reply_numbers(config)]
    if len(told) != 1 or told[0] not in (WEIGHTS, GRADIENT):
        raise ValueError(
            f"privacy={privacy} noises one vector of each client, and {type(half).__name__} sends {', '.join(told)}:"
            " use strategy=fedavg, or pisa with a preconditioner that takes gradients alone"
        )
    return told[0]
