"""A network that loses replies, and clients that are too slow: what a federation of real hosts meets, simulated.

The clients have done their work, and keep what they remember of it; the server hears nothing of them in that round.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from flwr.app import Message, MessageType

from pisa_fl.randomness import numpy_generator
from strategies.base import checks
from strategies.base.messages import ROUND, config_of, integer

IN_TIME = 0.1
"""Share of a straggler's replies that are in time."""


class Unreliable:
    """Decides which replies never arrive, by the seed, the round and the client.

    Args:
        clients: The clients' numbers.
        seed: Every draw follows from it.
        lost: Share of all replies that get lost, each by itself.
        stragglers: Share of the clients that are in time in a tenth of their rounds only.

    Raises:
        ValueError: A share is not in [0, 1).
    """

    def __init__(self, clients: Collection[int], seed: int, lost: float, stragglers: float) -> None:
        checks.decay("lost", lost)
        checks.decay("stragglers", stragglers)
        self._seed, self._lost = seed, lost
        drawn = numpy_generator(seed, "stragglers").permutation(sorted(clients))
        self.stragglers = frozenset(int(client) for client in drawn[: round(stragglers * len(drawn))])

    def arriving(self, messages: Sequence[Message], replies: Iterable[Message]) -> list[Message]:
        """Those of the replies that arrive; replies to anything but training always do."""
        if not self._lost and not self.stragglers:
            return list(replies)
        rounds = {
            message.metadata.message_id: integer(config_of(message.content), ROUND)
            for message in messages
            if message.metadata.message_type == MessageType.TRAIN
        }
        return [
            reply
            for reply in replies
            if (number := rounds.get(reply.metadata.reply_to_message_id)) is None
            or self._arrives(reply.metadata.src_node_id, number)
        ]

    def _arrives(self, client: int, round_number: int) -> bool:
        lucky, quick = numpy_generator(self._seed, "lost", round_number, client).random(2)
        return bool(lucky >= self._lost and (client not in self.stragglers or quick < IN_TIME))
