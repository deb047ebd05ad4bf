"""What clients remember on disk is what they would remember in memory, whatever the server accepts of it."""

import copy
import random

import torch

from pisa_fl.clients.host import ClientState
from pisa_fl.engines.on_disk import StatesOnDisk

SIZES = {"dual": 3, "moments": 2}


def held(state):
    return {
        part: {name: vector.tolist() for name, vector in getattr(state, part).items()}
        for part in ("accepted", "pending")
    }


def test_rows_hold_what_memory_would():
    """Rounds are accepted, forgotten and begun anew, states restored, for more clients than a block has."""
    draw = random.Random(0)
    disk = StatesOnDisk(SIZES)
    there = {client: ClientState() for client in range(70)}
    plain = copy.deepcopy(there)
    number = dict.fromkeys(there, 0)  # round that the server accepted last
    for at in range(1, 13):
        for client in draw.sample(sorted(there), 50):
            for states in (there, plain):
                assert states[client].settle(number[client])
            if draw.random() < 0.1:  # as a checkpoint has it
                there[client] = plain[client].to("cpu", alone=True)
                disk.keep(client, there[client])
            names = list(SIZES) if draw.random() < 0.8 else ["dual"]
            new = {name: torch.full((SIZES[name],), 100.0 * at + client) for name in names}
            for states in (there, plain):
                states[client].pending_round, states[client].pending = (
                    at,
                    {n: v.clone() for n, v in new.items()},
                )
            disk.keep(client, there[client])
            number[client] = draw.choice([at, number[client], 0])
        assert {c: held(state) for c, state in there.items()} == {c: held(s) for c, s in plain.items()}
    kept = there[0].to("cpu", alone=True)
    assert all(
        v.untyped_storage().nbytes() == v.nbytes for v in (*kept.accepted.values(), *kept.pending.values())
    )
