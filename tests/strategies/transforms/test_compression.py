"""Smaller uploads: what is sent, what it stands for, what is kept, and that nothing is lost on the way."""

import math
import pickle

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from quadratics import EXAMPLES, LAYOUT, Quadratics, pisa_bench, solving

from strategies.base.messages import ARRAYS, TensorArray, arrays_of, payload, problem, sendable, tensor
from strategies.transforms.compression import ErrorFeedback, compression

D, T = LAYOUT.size, len(LAYOUT.shapes)
KEEP = 0.3
K = math.ceil(KEEP * D)
CLIENTS = range(len(EXAMPLES))
NAMES = ("bfloat16", "int8", "topk")
BYTES = {"bfloat16": 128 + 2 * D, "int8": 128 + D + 128 + 4 * T, "topk": 2 * (128 + 4 * K)}
"""Of a reply: NumPy's header of every array, and the values."""


def scheme(name):
    return compression(name, KEEP, LAYOUT, by_gradient=True)[0].scheme


def samples():
    """Vectors of all sizes, some with zeros, ties and values between two that can be sent, (7, d)."""
    draw = np.random.default_rng(4)
    rows = [draw.normal(size=D) * scale for scale in (1, 1e-4, 3e4)]
    rows += [draw.integers(-2, 3, D), np.zeros(D), np.ones(D)]
    rows.append(1 + np.arange(D) * 2.0**-8)  # every other one exactly between two of bfloat16
    return torch.tensor(np.array(rows), dtype=torch.float32)


def bench_of(name, **options):
    return pisa_bench("kronecker", wire="gradient", compression=name, keep=KEEP, **options)


def arrays_in(reply):
    return {name: tensor(array) for name, array in arrays_of(reply.content).items()}


# --- the schemes, one by one


def test_bfloat16_is_the_upper_half_rounded_to_even():
    bits = samples().numpy().view(np.uint32).astype(np.uint64)
    upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    sent = scheme("bfloat16").encode(samples())
    assert np.array_equal(sent["gradient"].numpy().view(np.uint16), upper)
    back = (upper.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(scheme("bfloat16").decode(sent).numpy(), back)
    assert (np.abs(back - samples().numpy()) <= 2.0**-8 * np.abs(samples().numpy())).all()
    assert (back[6] != samples().numpy()[6]).any()


def test_int8_has_127_steps_in_every_tensor():
    sent = scheme("int8").encode(samples())
    back = scheme("int8").decode(sent).numpy()
    for row, x in enumerate(samples().numpy()):
        for number, span in enumerate(LAYOUT.spans.values()):
            scale = np.abs(x[span]).max() / np.float32(127)
            steps = np.rint(x[span] / scale) if scale else np.zeros_like(x[span])
            assert sent["scale"][row, number] == scale
            assert np.array_equal(sent["gradient"][row, span].numpy(), steps)
            assert np.array_equal(back[row, span], steps.astype(np.float32) * scale)
            assert (np.abs(back[row, span] - x[span]) <= scale * 0.50001).all()
    assert sent["gradient"].dtype == torch.int8
    assert sent["gradient"].abs().max() == 127


def test_topk_sends_the_largest_and_of_equal_ones_the_first():
    sent = scheme("topk").encode(samples())
    back = scheme("topk").decode(sent).numpy()
    for row, x in enumerate(samples().numpy()):
        index = sorted(sorted(range(D), key=lambda i: (-abs(x[i]), i))[:K])
        assert sent["index"][row].tolist() == index
        assert np.array_equal(sent["gradient"][row].numpy(), x[index])
        rest = x.copy()
        rest[index] = 0
        assert np.array_equal(back[row], x - rest)
        assert (rest**2).sum() <= (1 - KEEP) * (x**2).sum() * 1.00001


@pytest.mark.parametrize("name", NAMES)
def test_what_is_sent_is_what_was_agreed_however_it_travels(name):
    made = scheme(name)
    sent = {key: sendable(stack) for key, stack in made.encode(samples()).items()}
    for row, x in enumerate(samples()):
        arrays = ArrayRecord({key: TensorArray(stack[row]) for key, stack in sent.items()})
        far = recorddict_from_proto(recorddict_to_proto(RecordDict({ARRAYS: arrays})))[ARRAYS]
        for record in (arrays, far, pickle.loads(pickle.dumps(arrays))):
            assert problem(record, made.fields()) is None
            assert payload(record) == sum(len(a.data) for a in record.values()) == BYTES[name]
            assert torch.equal(
                made.decode({key: tensor(a) for key, a in record.items()}),
                made.decode(made.encode(x)),
            )


# --- error feedback


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stack", [1, 4])
def test_what_was_sent_and_what_is_kept_are_all_the_gradients(name, stack):
    problem, bench = Quadratics.draw(), bench_of(name, stack=stack)
    gradients, sent = torch.zeros(2, len(EXAMPLES), D, dtype=torch.float64)
    with solving(problem):
        for _ in range(30):
            gradients += problem.gradients(bench.consensus.double())
            for client, reply in enumerate(bench.round()):
                sent[client] += arrays_in(reply)["gradient"]
    kept = torch.stack([bench.host.states[client].pending["error"] for client in CLIENTS])
    assert kept.abs().max() > 1e-3
    torch.testing.assert_close(sent + kept, gradients, rtol=0, atol=1e-5 * gradients.abs().max().item())
    traffic = bench.gateway.traffic
    assert traffic.bytes_up == 30 * len(EXAMPLES) * BYTES[name]
    assert traffic.bytes_down == 30 * len(EXAMPLES) * (4 * D + 128)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_follows_what_the_server_accepted(name):
    """A reply that is lost was never sent, and a client that forgets goes on from zero."""
    problem, bench = Quadratics.draw(), bench_of(name, stack=1)
    made, errors = scheme(name), torch.zeros(len(EXAMPLES), D)
    events = {
        2: {"lost": {0, 3}},
        4: {"lost": {0}, "forgetful": {1}},
        5: {"lost": {0}},
        6: {"drawn": {1, 2}, "lost": {2}, "forgetful": {2}},
        8: {"forgetful": {0, 1}},
    }
    with solving(problem):
        for number in range(1, 11):
            event = events.get(number, {})
            errors[list(event.get("forgetful", ()))] = 0
            gradients = (torch.einsum("nij,j->ni", problem.a.float(), bench.consensus)) - problem.b.float()
            replies = bench.round(**event)
            expected = set(event.get("drawn", CLIENTS)) - event.get("lost", set())
            assert {reply.metadata.src_node_id for reply in replies if not reply.has_error()} == expected
            for reply in replies:
                client = reply.metadata.src_node_id
                whole = gradients[client] + errors[client]
                torch.testing.assert_close(arrays_in(reply)["gradient"], made.decode(made.encode(whole)))
                errors[client] = whole - arrays_in(reply)["gradient"]
                kept = bench.host.states[client].pending["error"]
                torch.testing.assert_close(kept, errors[client], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "near", "far"), [("bfloat16", 1e-4, 1e-3), ("int8", 2e-4, 2e-3), ("topk", 0.02, 0.2)]
)
@pytest.mark.parametrize("feedback", [True, False], ids=["with", "without"])
def test_the_optimum_is_reached_as_steps_shrink_and_only_with_feedback(
    name, near, far, feedback, monkeypatch
):
    """Clients' own gradients do not vanish there: without feedback, what is left out of them never comes."""
    if not feedback:
        send = ErrorFeedback.send
        monkeypatch.setattr(
            *(ErrorFeedback, "send"), lambda own, arrays, state: (send(own, arrays, state)[0], dict(state))
        )
    problem, bench = Quadratics.draw(), bench_of(name, gamma=0.9)
    with solving(problem):
        for _ in range(400 if feedback else 150):
            bench.round()
    away = (bench.consensus - problem.optimum()).norm() / problem.optimum().norm()
    assert away < near if feedback else away > far


# --- the server


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_no_client_sends_more_than_may_be_sent_without_being_refused(name, value):
    gradient = samples()[:1].clone()
    gradient[0, 4] = value
    arrays = {key: TensorArray(sendable(stack)[0]) for key, stack in scheme(name).encode(gradient).items()}
    assert "NaN or infinite values, or some beyond" in str(
        problem(ArrayRecord(arrays), scheme(name).fields())
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_refused_leaves_nothing(name):
    problem, bench = Quadratics.draw(), bench_of(name)
    ill = Quadratics(problem.a, problem.b.clone())
    ill.b[1, 2] = 1e7
    with solving(problem):
        bench.round()
    with solving(ill):
        bench.round()
    [failure] = bench.gateway.failures
    assert failure.client == 1
    assert "NaN or infinite" in failure.reason
    with solving(problem):
        bench.round()
    assert bench.gateway.traffic.clients_ok == len(EXAMPLES)
    assert all(state.pending["error"].abs().max() < 1e3 for state in bench.host.states.values())


@pytest.mark.parametrize("name", NAMES)
def test_an_update_is_as_long_as_what_it_stands_for(name):
    bench = bench_of(name)
    with solving(Quadratics.draw()):
        bench.round()
        bench.round()
        for client, reply in enumerate(bench.round()):
            residual = arrays_in(reply)["gradient"] + bench.strategy.ledger.dual(client)
            assert bench.strategy.length(client, arrays_of(reply.content)) == pytest.approx(
                float(residual.norm())
            )


@pytest.mark.parametrize("options", [{"wire": "primal"}, {"wire": "auto", "local_steps": 2}])
@pytest.mark.parametrize("name", NAMES)
def test_only_gradients_are_compressed(name, options):
    with pytest.raises(ValueError, match=rf"^compression={name} needs .* wire=gradient"):
        pisa_bench("kronecker", compression=name, **options)
    assert not pisa_bench("kronecker", compression="none", **options).half.transforms


@pytest.mark.parametrize(
    ("name", "keep", "sentence"),
    [
        ("topk", 0, "keep must be above 0 and at most 1, got 0"),
        ("none", 1.5, "keep must be above 0 and at most 1, got 1.5"),
    ],
)
def test_impossible_values_are_named(name, keep, sentence):
    with pytest.raises(ValueError, match=sentence):
        compression(name, keep, LAYOUT, by_gradient=True)
