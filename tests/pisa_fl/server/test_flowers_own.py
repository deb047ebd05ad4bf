"""What a strategy written for Flower alone keeps: read from its attributes, and set again as it was."""

import numpy as np
from flwr.serverapp.strategy import FedAdam, FedAvgM

from pisa_fl.server.flowers_own import FlowersOwn, server_half
from strategies import ServerHalf


def test_numbers_arrays_and_tables_come_back_as_what_they_were():
    kept, fresh = FedAdam(), FedAdam()
    kept.m_t, kept.alone, kept.count, kept.eta = {"w": np.arange(3.0)}, np.array(2.5), 7, 0.25
    FlowersOwn(fresh).load_state_dict(FlowersOwn(kept).state_dict())
    assert isinstance(fresh.alone, np.ndarray)
    assert (fresh.alone.shape, fresh.alone.dtype, float(fresh.alone)) == ((), np.float64, 2.5)
    assert (type(fresh.count), fresh.count, type(fresh.eta), fresh.eta) == (int, 7, float, 0.25)
    assert fresh.m_t["w"].tolist() == [0, 1, 2]


def test_the_momentum_of_flowers_fedavgm_comes_back():
    """A list of as many arrays as the model has: more than nine, in their order."""
    kept, fresh = FedAvgM(server_momentum=0.9), FedAvgM(server_momentum=0.9)
    kept.momentum_vector = [np.full(2, float(place)) for place in range(12)]
    FlowersOwn(fresh).load_state_dict(FlowersOwn(kept).state_dict())
    assert [float(array[0]) for array in fresh.momentum_vector] == list(range(12))


def test_only_what_says_what_it_keeps_is_taken_as_it_is():
    strategy = FedAdam()
    assert isinstance(server_half(strategy), FlowersOwn)
    half: ServerHalf = FlowersOwn(strategy)
    assert server_half(half) is half
