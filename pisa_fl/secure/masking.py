"""A client's side of secure aggregation: Flower's own `secaggplus_mod`, which makes its keys, shares and masks.

A round has four exchanges: keys are made and their public halves told; shares of the secret ones are dealt out, each
encrypted for the client that it is for; the update is sent, masked; and after it the shares that are needed to take the
masks out of the sum. What a client keeps from one to the next is the mod's own record.
"""

from __future__ import annotations

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.compat.common.recorddict_compat import fitres_to_recorddict

from pisa_fl.secure.limbs import split
from pisa_fl.secure.summand import OPEN, summand
from strategies.base.client import ClientHalf
from strategies.base.messages import METRICS, metrics_of


def stage_of(message: Message) -> str | None:
    """Which exchange of a round a message belongs to, or None."""
    content = message.content if message.has_content() else RecordDict()
    said = content.get(RECORD_KEY_CONFIGS)
    return str(said.get(Key.STAGE)) if isinstance(said, ConfigRecord) else None


class Masking:
    """What hides the updates of the clients that a host has.

    Args:
        half: The client half, which knows how the server would read an update.

    Attributes:
        kept: Client number -> what the mod keeps between exchanges: secret keys, and shares of others'.
    """

    def __init__(self, half: ClientHalf) -> None:
        self._half = half
        self.kept: dict[int, RecordDict] = {}

    def answer(self, client: int, message: Message, update: Message | None = None) -> Message:
        """What a client answers in an exchange.

        Args:
            client: Its number.
            message: What the server sent.
            update: What the client would have answered openly, where the update is asked for.

        Raises:
            ValueError: The message does not fit; whatever else the mod raises is raised here.
        """
        said = message.content.config_records[RECORD_KEY_CONFIGS]
        # one of its own: the mod takes things out, and knows clients by whom a message is for
        own = Message(RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(dict(said))}), reply_to=message)
        own.metadata.__dict__["_dst_node_id"] = client
        kept = self.kept.setdefault(client, RecordDict())
        before = np.random.get_state()  # noqa: NPY002, what the mod draws from, to round what needs no rounding
        try:
            answered = secaggplus_mod(
                *(own, Context(0, client, {}, kept, {})),
                lambda *_: Message(self._hidden(message, update), reply_to=own),
            )
        finally:
            np.random.set_state(before)  # noqa: NPY002
        content = RecordDict({RECORD_KEY_CONFIGS: answered.content.config_records[RECORD_KEY_CONFIGS]})
        if update is not None:
            metrics = metrics_of(update.content)
            content[METRICS] = MetricRecord({name: metrics[name] for name in OPEN})
        return Message(content, reply_to=message)

    def _hidden(self, message: Message, update: Message | None) -> RecordDict:
        """The update as the mod reads one: two vectors of multiples of its step, of weight 1."""
        if update is None:
            raise ValueError("there is no update to mask")
        config = message.content.config_records["config"]
        values = summand(self._half, update, config)
        fitted = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(split(values)), 1, {})
        return fitres_to_recorddict(fitted, keep_input=False)
