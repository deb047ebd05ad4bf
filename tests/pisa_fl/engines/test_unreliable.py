"""Replies that get lost and clients that are too slow, simulated by the local engine."""

import json

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

import pisa_fl
from pisa_fl.engines.unreliable import Unreliable
from pisa_fl.randomness import numpy_generator
from strategies.base.messages import CONFIG, ROUND

QUICK = ("model=logistic", "rounds=4", "engine.threads=1", "progress=false", "tracker=none", "seed=3")


@pytest.mark.parametrize(("strategy", "workers"), [("pisa", 0), ("sisa", 1)])
def test_what_is_lost_is_drawn_by_round_and_client(strategy, workers, tmp_path):
    chosen = (*QUICK, f"strategy={strategy}", f"engine.workers={workers}", "engine.lost=0.4")
    result = pisa_fl.run(pisa_fl.compose(*chosen), tmp_path)
    expected = [
        (number, client)
        for number in range(1, 5)
        for client in range(10)
        if numpy_generator(3, "lost", number, client).random() < 0.4
    ]
    lines = map(json.loads, (tmp_path / "failures.jsonl").read_text().splitlines())
    assert sorted((line["round"], line["client"]) for line in lines) == expected
    assert 8 < len(expected) < 24
    assert [line["clients_ok"] + line["clients_failed"] for line in result.metrics[1:]] == [10] * 4
    assert result.metrics[-1]["test_loss"] < result.metrics[0]["test_loss"]


def sent(round_number, kind=MessageType.TRAIN):
    content = RecordDict({CONFIG: ConfigRecord({ROUND: round_number})})
    messages = [Message(content, client, kind) for client in range(10)]
    for number, message in enumerate(messages):
        message.metadata.__dict__["_message_id"] = f"{round_number}-{number}"
    return messages, [Message(RecordDict(), reply_to=message) for message in messages]


def test_stragglers_are_always_the_same():
    network = Unreliable(range(10), seed=0, lost=0.0, stragglers=0.3)
    arrived = dict.fromkeys(range(10), 0)
    for number in range(1, 1001):
        for reply in network.arriving(*sent(number)):
            arrived[reply.metadata.src_node_id] += 1
    assert len(network.stragglers) == 3
    for client, count in arrived.items():
        assert count == 1000 if client not in network.stragglers else 70 < count < 130


def test_what_is_asked_in_an_evaluation_arrives():
    messages, replies = sent(1, MessageType.EVALUATE)
    assert Unreliable(range(10), seed=0, lost=0.99, stragglers=0.9).arriving(messages, replies) == replies
