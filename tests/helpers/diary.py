"""A stateful algorithm that only remembers what the server took from it, and engines that trouble its messages."""

import copy
import random
from functools import partial

import numpy as np
import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn

from pisa_fl.clients.host import ClientState
from pisa_fl.data import ImageData
from pisa_fl.engines.local import LocalGrid, local_engine
from pisa_fl.federation import Federation
from strategies import ClientHalf, Layout, Update
from strategies.base.messages import ROUND, WEIGHTS, record, vectors
from strategies.base.transform import Transform

SIZES = (9, 14, 5, 12, 7, 3, 21)
CLIENTS = range(len(SIZES))


class Eighths(Transform):
    """Sends weights as whole numbers of eighths, and remembers how often it did."""

    def state_sizes(self):
        return {"times": 1}

    def fields(self, fields):
        return dict(fields)

    def send(self, arrays, state):
        return {WEIGHTS: (8 * arrays[WEIGHTS]).round()}, {"times": state["times"] + 1}

    def receive(self, arrays):
        return {WEIGHTS: arrays[WEIGHTS] / 8}


class Diary(ClientHalf):
    """Keeps the number of its updates that counted, and their sum as the server read them; says the former."""

    transforms = (Eighths(),)

    def __init__(self, layout):
        self.layout = layout

    def state_sizes(self):
        return {"count": 1, "told": self.layout.size}

    def reply_numbers(self, config):
        return ["count"]

    def prepare(self, arrays, config):
        return arrays[WEIGHTS] + config[ROUND] / 7

    def solve(self, stack, instruction, state):
        own = torch.tensor(stack.clients, dtype=torch.float32)[:, None] / 3
        weights, count = instruction.common + own, state["count"] + 1

        def following(sent):
            return {"count": count, "told": state["told"] + sent[WEIGHTS]}

        return Update({WEIGHTS: weights}, torch.zeros(len(own)), following, {"count": count[:, 0]})


class Trouble:
    """Mixed into a grid: loses, doubles, delays, repeats and poisons replies with NaN; clients lose their state.

    `heard` has what a client told with the reply that came first and in time, `forgot` who lost its state.
    """

    forgetful, late = True, ()

    def begin(self, number):
        """A new round, with troubles of its own."""
        self.rng, self.number, self.heard, self.forgot = random.Random(number), number, {}, set()

    def deliver(self, messages, timeout):
        rng, again = self.rng, bool(self.heard or self.forgot)
        messages = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        for message in messages if self.forgetful and not again else ():
            if rng.random() < 0.1:
                self.forgot.add(message.metadata.dst_node_id)
                self.host.states[message.metadata.dst_node_id] = ClientState()
        replies, late = [*self.late], []
        self.late = late
        for reply in sorted(super().deliver(messages, timeout), key=lambda r: r.metadata.src_node_id):
            fate, client = rng.random(), reply.metadata.src_node_id
            fate = fate if self.heard else 0.5  # somebody is always heard
            if fate < 0.1:
                continue
            if fate < 0.2:
                late.append(reply)
            elif fate < 0.3 and reply.has_content():
                ill = vectors(reply.content["arrays"])[WEIGHTS].clone()
                ill[1] = float("nan")
                reply.content["arrays"] = record({WEIGHTS: ill})
                replies.append(reply)
            else:
                replies += [reply, copy.deepcopy(reply)] if fate > 0.8 else [reply]
                if reply.has_content():
                    self.heard[client] = vectors(reply.content["arrays"])[WEIGHTS].clone() / 8
        rng.shuffle(replies)
        return replies


class TroubledGrid(Trouble, LocalGrid):
    """The local engine in trouble, without or with workers."""


def troubled(clients, workers, stack=1):
    return TroubledGrid(clients.host(clients.rows, stack), workers)


IN_PROCESS = partial(local_engine, workers=0)


def federate(engine=IN_PROCESS, participation=1.0):
    """Flower's FedAvg with clients that keep a diary."""
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 3, sum(SIZES))
    images = draw.integers(0, 255, (sum(SIZES), 1, 2, 2)).astype(np.uint8)
    data = ImageData(images, labels, images[:9], labels[:9], ("a", "b", "c"), (0.4,), (0.2,))
    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    server = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    partition = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    options = {"participation": participation, "max_update": None}
    return Federation(data, partition, model, server, Diary(Layout.of_parameters(model)), engine, **options)


def remembered(state, round_number):
    """What counts of a client's state after a round: the pending one if the round's reply was accepted."""
    return state.pending if state.pending_round == round_number else state.accepted
