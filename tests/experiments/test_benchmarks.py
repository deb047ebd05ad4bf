"""The benchmarks measure what they say; how fast anything is, is not tested."""

import io
import json
import mmap
import multiprocessing
import os
import sys

import pytest
import torch

from experiments.benchmarks import __main__ as command
from experiments.benchmarks import memory, profile, works
from experiments.benchmarks.measure import Side, SideError, start, take_turns
from experiments.benchmarks.outcome import Figure, Outcome, load, ratio, save
from experiments.benchmarks.report import draw, markdown
from experiments.benchmarks.sides import plain
from experiments.benchmarks.sides.pace import Finished, Pace
from experiments.benchmarks.task import LR, Task

WHOLE = Task(clients=4, images=20, batch=20)
"""A round of it is one step down the gradient over all images, whoever does it and in whatever order."""


def lines(side, monkeypatch, asked, *arguments):
    """What a side says in this process."""
    report = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n" * asked))
    with pytest.raises(Finished):
        side(*arguments[:1], report, *arguments[1:])
    return [json.loads(line) for line in report.getvalue().splitlines()]


@pytest.fixture(scope="module")
def moved():
    """How far plain gradient descent is from the start after each of some rounds."""
    model, (images, labels) = WHOLE.model(), WHOLE.tensors()
    start_ = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    distances = [0.0]
    for _ in range(8):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.grad
        now = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        distances.append(float((now - start_).norm()))
    return distances


def check(said, moved):
    assert said
    for line in said:
        assert line["examples"] == WHOLE.examples
        assert line["parameters"] == works.PARAMETERS
        assert line["moved"] == pytest.approx(moved[line["round"]], rel=1e-3)


def test_the_plain_loop_does_the_work(monkeypatch, moved):
    check(lines(plain.main, monkeypatch, 2, WHOLE), moved)


@pytest.mark.parametrize("name", ["pfl", "fluke"])
def test_another_framework_does_the_work(name, moved):
    pytest.importorskip(name, reason=f"{name} is not installed")
    with start(Side(name, name, WHOLE)) as side:
        check([side.round(), side.round()], moved)


def test_flowers_clients_do_the_work(moved):
    pytest.importorskip("ray", reason="Flower's simulation needs Ray")
    from flwr.app import ArrayRecord, Context, Message, RecordDict

    from experiments.benchmarks.sides import flower
    from pisa_fl.engines.base import identify

    identify()
    model, replies = WHOLE.model(), []
    for client in range(WHOLE.clients):
        content = RecordDict({"arrays": ArrayRecord(model.state_dict())})
        message = Message(content, client, "train")
        context = Context(0, client, {"partition-id": client}, RecordDict(), {})
        replies.append(flower.train(WHOLE, message, context).content)
    assert [reply["metrics"]["num-examples"] for reply in replies] == [WHOLE.images] * WHOLE.clients
    states = [reply["arrays"].to_torch_state_dict() for reply in replies]
    change = [sum(s[k] for s in states) / len(states) - v for k, v in model.state_dict().items()]
    assert float(torch.cat([c.flatten() for c in change]).norm()) == pytest.approx(moved[1], rel=1e-3)


def test_a_work_from_the_command_to_the_table(monkeypatch, tmp_path, capsys, moved):
    """pisa-fl does the work as well, and the floor sees every image once."""
    monkeypatch.setattr(works, "peers", lambda bench, task: [])
    monkeypatch.setattr(works, "FLOOR_BATCHES", ("20",))
    monkeypatch.setattr(command, "WORKS", {"silo": lambda bench: works.silo(bench, WHOLE)})
    command.main(["--repeats", "2", "--out", str(tmp_path)])
    (outcome,) = load(tmp_path / "silo.json")
    ours = outcome.rounds.pop("pisa-fl")
    assert [line["round"] for line in ours] == [2, 3]
    check(ours, moved)
    assert outcome.rounds
    assert all(r["examples"] == WHOLE.examples for rounds in outcome.rounds.values() for r in rounds)
    (figure,) = outcome.figures
    floor = outcome.rounds[figure.name.removeprefix("pisa-fl / ")]
    assert figure.values == [a["seconds"] / b["seconds"] for a, b in zip(ours, floor, strict=True)]
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_a_framework_that_is_missing_is_no_error():
    rounds = take_turns([Side("pfl", "a_framework_that_nobody_has", WHOLE)], 3)
    assert rounds == {"pfl": []}
    (figure,) = works.against_peers(rounds | {works.OURS: [{"seconds": 1.0}]}, {"pfl": 3})
    table = markdown([Outcome("device", "title", [figure], rounds)])
    assert "| pfl / pisa-fl | not installed |  |  | at least 3 |  |" in table


def test_a_side_that_fails_says_why():
    with pytest.raises(SideError, match="takes 2 positional"):
        take_turns([Side("plain loop", "plain", WHOLE, ("unexpected",))], 1)


def test_the_fastest_setting_is_chosen(monkeypatch):
    report = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    pace = Pace(WHOLE, report, "threads", (1, 2))
    tried = []
    for seconds in (0.1, 3.0, 2.5, 4.0, 2.0):  # the first does not count
        tried.append(pace.wait())
        pace.done(10, seconds=seconds)
    assert tried == [1, 1, 2, 1, 2]
    assert pace.wait() == 2
    pace.done(10, seconds=2.5)
    assert [json.loads(line)["seconds"] for line in report.getvalue().splitlines()] == [2.0, 2.5]


def test_figures_by_hand(tmp_path):
    ours = [{"seconds": s} for s in (1.0, 2.0, 4.0)]
    theirs = [{"seconds": s} for s in (4.0, 6.0, 4.0)]
    rounds = {"pisa-fl": ours, "floor, 1 process": theirs, "floor, 2 processes": ours[::-1]}
    assert ratio(rounds, "floor, 1 process", "pisa-fl") == [4.0, 3.0, 1.0]
    assert works.against_floor(rounds, 1.2).values == [0.25, 1.0, 4.0]  # the faster floor, by medians
    low, high = Figure("a / b", [4.0, 3.0, 1.0], at_least=3.5), Figure("b / a", [0.25, 1.0, 4.0], at_most=1.2)
    free = Figure("c", [2.0])
    assert (low.median, low.met) == (3.0, False)
    assert (high.median, high.met) == (1.0, True)
    outcome = Outcome("work", "title", [low, high, free], {"pisa-fl": ours}, {"gradients": 0.875}, ["a note"])
    table = markdown([outcome])
    assert "| **work** title | a / b | 3.00 | 1.00 .. 4.00 | 3 | at least 3.5 | no |" in table
    assert "|  | b / a | 1.00 | 0.25 .. 4.00 | 3 | at most 1.2 | yes |" in table
    assert "|  | c | 2.00 | 2.00 .. 2.00 | 1 |  |  |" in table
    assert "| **work** title | pisa-fl | 2,000 |  |" in table
    assert "| gradients | 87.5% |" in table
    assert "a note" in table
    save([outcome], tmp_path / "work.json")
    assert markdown(load(tmp_path / "work.json")) == table
    draw([outcome], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_share_of_the_round(monkeypatch):
    def turns(sides, repeats):
        return {
            side.name: [{"seconds": 10.0 if side.name == works.OURS else 8.0}] * repeats for side in sides
        }

    monkeypatch.setattr(works, "take_turns", turns)
    first, second, last = works.many(works.Bench(repeats=5), WHOLE)
    assert first.figures[0].values == pytest.approx([0.2] * 5)
    assert second.figures[0].median == pytest.approx(0.2)
    assert last.figures[0].values == [0.8] * 2


def test_the_cost_of_a_client(monkeypatch):
    def turns(sides, repeats):
        return {side.name: [{"seconds": seconds}] for side, seconds in zip(sides, (1.0, 12.0), strict=True)}

    monkeypatch.setattr(works, "take_turns", turns)
    (outcome,) = works.clients(works.Bench(sizes=(10, 100)))
    assert [figure.values for figure in outcome.figures] == [[1.2], [pytest.approx(1.2)]]


def test_the_cost_of_a_preconditioner(monkeypatch):
    def turns(sides, repeats):
        assert "strategy=pisa" in sides[0].options
        return {side.name: [{"seconds": 1.0 if side.name == "SISA" else 3.0}] for side in sides}

    monkeypatch.setattr(works, "take_turns", turns)
    outcomes = list(works.preconditioners(works.Bench()))
    assert {"kronecker", "kfac", "muon"} <= {outcome.figures[0].name.split()[0] for outcome in outcomes}
    assert all(outcome.figures[0].values == [3.0] for outcome in outcomes)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="memory is read from Linux's /proc")
def test_shared_memory_is_counted_once():
    fork = multiprocessing.get_context("fork")
    before = memory.used(os.getpid())
    block = mmap.mmap(-1, 2**26, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # of none that was freed before
    block.write(os.urandom(len(block)))
    over = fork.Event()
    child = fork.Process(target=over.wait)
    child.start()
    try:
        assert child.pid in memory.family(os.getpid())
        with memory.Peak(os.getpid()) as peak:
            over.wait(2 * memory.EVERY)
    finally:
        over.set()
        child.join()
    assert 0.9 * len(block) < peak.bytes - before < 1.7 * len(block)


def test_the_profile_is_of_the_whole_round():
    parts = profile.shares(Task(3, 10, 10), *works.SISA, "engine.workers=0", "engine.threads=1")
    assert sum(parts.values()) == pytest.approx(1)
    assert 0 < parts["gradients"] < 1
    assert all(share >= 0 for share in parts.values())
    assert (
        profile.place(str(profile.ROOT / "strategies" / "pisa" / "ledger.py")) == "strategies/pisa/ledger.py"
    )
    assert profile.place(torch.nn.functional.__file__) == "gradients"
    assert profile.place(torch.__file__) == "torch"
    assert profile.place(json.__file__) == "Python"
