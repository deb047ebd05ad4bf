"""The sum over the clients of one host: of whole numbers, so that it is the same however clients are dealt to hosts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from pisa_fl.clients.executor import failure_reason
from pisa_fl.clients.host import CLIENT_FAILED
from pisa_fl.secure.limbs import whole
from pisa_fl.secure.summand import OPEN, summand
from strategies.base.client import ClientHalf
from strategies.base.messages import arrays_of, config_of, integer, metrics_of, payload


@dataclass
class HostSum:
    """The sum over some clients of a host, and what is said of each.

    Attributes:
        whole: Sums of the whole numbers of what they add (`pisa_fl.secure.limbs`), (2, L); (2, 0) of nobody.
        told: Client number -> the numbers of its reply that are told openly.
        errors: Client number -> code and reason of its error, for those that are not in the sum.
        answered: Ids of the messages that this answers.
        bytes: What the updates in it would have taken on their way.
    """

    whole: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, 0), np.int64))
    told: dict[int, dict[str, int]] = field(default_factory=dict)
    errors: dict[int, tuple[int, str]] = field(default_factory=dict)
    answered: list[str] = field(default_factory=list)
    bytes: int = 0

    def fail(self, reply: Message) -> None:
        """Note an error that a client answered with, or that was made in its place."""
        self.errors[reply.metadata.src_node_id] = reply.error.code, reply.error.reason or ""
        self.answered.append(reply.metadata.reply_to_message_id)

    def add(self, half: ClientHalf, instruction: Message, reply: Message) -> None:
        """Take in what a client answered; what does not fit is its error."""
        if reply.has_error():
            self.fail(reply)
            return
        client = instruction.metadata.dst_node_id
        self.answered.append(reply.metadata.reply_to_message_id)
        try:
            values = whole(summand(half, reply, config_of(instruction.content)))
            told = {name: integer(metrics_of(reply.content), name) for name in OPEN}
            if self.told and values.shape != self.whole.shape:
                raise ValueError(f"{values.shape[1]} values where others have {self.whole.shape[1]}")
        except Exception as error:  # whatever a client half of the user's makes the reading raise
            self.errors[client] = CLIENT_FAILED, failure_reason(error)
            return
        if self.told:
            self.whole += values
        else:
            self.whole = values
        self.told[client] = told
        self.bytes += payload(arrays_of(reply.content))
