"""What is done to an update on its way from a client to the server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from strategies.base.messages import Field


class Transform(ABC):
    """Done to every client's update when it is sent, and undone, as far as it can be, when it is received.

    Arrays have leading axes, those of the clients that are computed together: (..., length).
    """

    def state_sizes(self) -> dict[str, int]:
        """Vectors that a client keeps for it between rounds -> their lengths. They start as zeros."""
        return {}

    @abstractmethod
    def fields(self, fields: Mapping[str, Field]) -> dict[str, Field]:
        """The arrays that are sent in place of an update's; whatever passes their checks can be received."""

    @abstractmethod
    def send(
        self, arrays: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is sent in place of an update's arrays, and what the clients keep if the server accepts it."""

    @abstractmethod
    def receive(self, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The update's arrays, as the server half reads them."""
