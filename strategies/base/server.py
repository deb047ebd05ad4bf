"""What a server half is: a Flower strategy that says what it keeps.

The framework draws the clients of a round, checks, counts and orders their replies, decides which are accepted and
tells every client that remembers something which of its replies that was; it writes checkpoints and supplies clients
that lost their state. An algorithm only says what there is to write and to supply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor


class ServerHalf(Strategy):
    """A server half; what it need not say has a default: it keeps nothing, and supplies nothing.

    Attributes:
        takes_sums: Whether a round's replies may come as one, of all those who answered: the mean of their arrays by
            examples, all their examples, and under `CONFIG` who they are, `clients`, with their `examples`.
        needs_sums: Whether they must.
    """

    takes_sums: bool = False
    needs_sums: bool = False

    def state_dict(self) -> dict[str, Tensor]:
        """All that it keeps from round to round, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""

    def supply(self, client: int) -> ArrayRecord | None:
        """The state of a client that lost it, as far as it is known here; None: it begins anew, from zeros."""
        return None

    def begins_anew(self, client: int) -> bool:
        """Whether what the client remembers is void, and it is to begin from zeros."""
        return False

    def lost(self, client: int) -> None:
        """A client has lost what it remembered, which nobody can supply, and begins anew from zeros."""

    def length(self, client: int, arrays: ArrayRecord) -> float | None:
        """How long a client's update is, to be compared with the others'; None: as |w_i - w| of its weights."""
        return None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nothing of the clients: the model is evaluated on the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked."""
        return None

    def summary(self) -> None:
        """Say nothing: the run directory holds the configuration."""
