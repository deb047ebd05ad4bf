"""The measurements. Each yields its outcomes one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from experiments.benchmarks.measure import Rounds, Side, start, take_turns
from experiments.benchmarks.memory import Peak
from experiments.benchmarks.outcome import Figure, Outcome, ratio
from experiments.benchmarks.profile import shares
from experiments.benchmarks.task import LR, Task
from experiments.preconditioners import NAMES
from pisa_fl.engines.base import cores

FEDAVG = (
    "strategy=fedavg",
    f"strategy.lr={LR}",
    "strategy.momentum=0",
    "strategy.weight_decay=0",
    "strategy.local_epochs=1",
)
SISA = ("strategy=sisa",)
PISA = ("strategy=pisa",)

DEVICE = Task(200, 50, 10, drawn=50)
SILO = Task(10, 1_000, 64)
MANY = Task(1_000, 10, 10)
SMALL = Task(200, 10, 10)
STACK = Task(100, 50, 10)

OURS = "pisa-fl"
FLOWER = "Flower on Ray"
FLOOR_BATCHES = ("64", "125", "250", "500", "1000")
"""Batch sizes among which the floor chooses."""

PARAMETERS = 62_006
"""Of the model."""


@dataclass(frozen=True)
class Bench:
    """How to measure.

    Attributes:
        repeats: Turns of every side.
        peers: Python that has the other frameworks.
        sizes: Numbers of clients for `clients` and `memory`.
    """

    repeats: int = 7
    peers: str = sys.executable
    sizes: tuple[int, ...] = (100, 1_000, 10_000)


def device(bench: Bench, task: Task = DEVICE) -> Iterator[Outcome]:
    """FedAvg on many small clients."""
    sides = [ours(task, *FEDAVG), Side("plain loop", "plain", task), *peers(bench, task)]
    rounds = take_turns(sides, bench.repeats)
    yield Outcome(
        "device",
        f"FedAvg, {sizes(task)}, batch {task.batch}",
        [
            Figure(f"plain loop / {OURS}", ratio(rounds, "plain loop", OURS)),
            *against_peers(rounds, {"pfl": 3, "fluke": 3, FLOWER: 6}),
        ],
        rounds,
    )


def silo(bench: Bench, task: Task = SILO) -> Iterator[Outcome]:
    """FedAvg on few large clients."""
    sides = [ours(task, *FEDAVG), *floors(task), *peers(bench, task)]
    rounds = take_turns(sides, bench.repeats)
    figures = [against_floor(rounds, 1.3), *against_peers(rounds, {"pfl": 2})]
    yield Outcome("silo", f"FedAvg, {sizes(task)}, batch {task.batch}", figures, rounds)


def sisa(bench: Bench, tasks: Sequence[Task] = (SILO, Task(100, 100, 64))) -> Iterator[Outcome]:
    """What a SISA round costs beside one plain pass over the same images."""
    for task in tasks:
        rounds = take_turns([ours(task, *SISA), *floors(task)], bench.repeats)
        yield Outcome("sisa", f"SISA, {sizes(task)}", [against_floor(rounds, 1.2)], rounds)


def pisa(bench: Bench, tasks: Sequence[Task] = (SILO, Task(100, 100, 64), MANY)) -> Iterator[Outcome]:
    """What a PISA round, of which the server takes the steps, costs beside a SISA round."""
    for task in tasks:
        rounds = take_turns([ours(task, *PISA), ours(task, *SISA, name="SISA")], bench.repeats)
        figure = Figure(f"{OURS} / SISA", ratio(rounds, OURS, "SISA"), at_most=1.1)
        yield Outcome("pisa", f"PISA, {sizes(task)}", [figure], rounds)


def compiled(bench: Bench, tasks: Sequence[Task] = (DEVICE, MANY, SILO)) -> Iterator[Outcome]:
    """What compiling the gradients of a client alone gains on a CPU, and how far that is from others."""
    at_least, at_most, none = {DEVICE: (1.35, 1.4)}, {MANY: 0.25}, (None, None)
    for task in tasks:
        peer = distributed(bench, task)
        sides = [ours(task, *FEDAVG), ours(task, *FEDAVG, "engine.compiled=true", name="compiled"), peer]
        rounds = take_turns([*sides, *([gradients(task)] if task in at_most else [])], bench.repeats)
        figures = [
            Figure(f"{side} / compiled", ratio(rounds, side, "compiled"), least)
            for side, least in zip((OURS, peer.name), at_least.get(task, none), strict=True)
        ]
        if task in at_most:
            figures.append(beyond_gradients(rounds, "compiled", at_most[task]))
        yield Outcome("compiled", f"FedAvg, {sizes(task)}, batch {task.batch}", figures, rounds)


def preconditioners(bench: Bench, task: Task = SILO) -> Iterator[Outcome]:
    """What a round of PISA with each preconditioner costs beside a SISA round."""
    for name in NAMES:
        sides = [
            ours(task, *PISA, f"strategy/preconditioner={name}", name=name),
            ours(task, *SISA, name="SISA"),
        ]
        rounds = take_turns(sides, bench.repeats)
        figure = Figure(f"{name} / SISA", ratio(rounds, name, "SISA"))
        yield Outcome("preconditioners", f"{name}, {sizes(task)}", [figure], rounds)


def many(bench: Bench, task: Task = MANY) -> Iterator[Outcome]:
    """How much of a round with very many clients is not gradients; and the same round by Flower's simulation."""
    for name, strategy in (("SISA", SISA), ("FedAvg", FEDAVG)):
        rounds = take_turns([ours(task, *strategy), gradients(task)], bench.repeats)
        figure = beyond_gradients(rounds, OURS, 0.15)
        yield Outcome("many", f"{name}, {sizes(task)}, batch {task.batch}", [figure], rounds)
    rounds = take_turns([ours(task, *FEDAVG), flower(bench, task)], turns := min(2, bench.repeats))
    figures = against_peers(rounds, {FLOWER: 20})
    note = f"{FLOWER}: {turns} rounds, after a first one that is not counted"
    yield Outcome("many", f"FedAvg, {sizes(task)}, batch {task.batch}", figures, rounds, notes=[note])


def clients(bench: Bench) -> Iterator[Outcome]:
    """Whether a client costs the same whatever their number."""
    tasks = {f"{count:,} clients": Task(count, 10, 10) for count in bench.sizes}
    rounds = take_turns([ours(task, *SISA, name=name) for name, task in tasks.items()], bench.repeats)
    each = {name: [r["seconds"] / task.clients for r in rounds[name]] for name, task in tasks.items()}
    first, *others = each
    figures = [
        Figure(
            f"a client of {name} / of {first}", [a / b for a, b in zip(each[name], each[first], strict=True)]
        )
        for name in others
    ]
    spread = [max(turn) / min(turn) for turn in zip(*each.values(), strict=True)]
    figures.append(Figure("dearest / cheapest client", spread, at_most=1.2))
    yield Outcome("clients", "SISA, 10 images a client, full participation", figures, rounds)


def memory(bench: Bench) -> Iterator[Outcome]:
    """How much memory a federation takes beside what its clients and its ledger must remember."""
    task = Task(bench.sizes[-1], 10, 10)
    with start(ours(task, *SISA)) as side, Peak(side.pid) as peak:
        # from the second round on, clients hold an accepted and a pending dual
        rounds = [side.round() for _ in range(3)]
    # the ledger's primal and dual, the clients' accepted and pending dual
    state = 4 * task.clients * PARAMETERS * 4
    figure = Figure("peak / (1.3 x state + 2 GB)", [peak.bytes / (1.3 * state + 2e9)], at_most=1)
    note = f"peak {peak.bytes / 1e9:.2f} GB, state {state / 1e9:.2f} GB"
    yield Outcome("memory", f"SISA, {sizes(task)}", [figure], {OURS: rounds}, notes=[note])


def workers(bench: Bench, tasks: Sequence[Task] = (DEVICE, SILO)) -> Iterator[Outcome]:
    """What a second worker process is worth."""
    for name, strategy, task in zip(("FedAvg", "SISA"), (FEDAVG, SISA), tasks, strict=True):
        one, two = (f"{count} worker{'s' * (count > 1)}" for count in (1, 2))
        sides = [ours(task, *strategy, f"engine.workers={side[0]}", name=side) for side in (one, two)]
        rounds = take_turns(sides, bench.repeats)
        figure = Figure(f"{one} / {two}", ratio(rounds, one, two), at_least=1.8)
        yield Outcome("workers", f"{name}, {sizes(task)}", [figure], rounds)


def together(bench: Bench, task: Task = SMALL) -> Iterator[Outcome]:
    """Whether clients of a CPU should advance one by one, as they do, or together in chunks that fit its cache."""
    for name, strategy in (("SISA", SISA), ("FedAvg", FEDAVG)):
        one, chunk = "one by one", "25 together"
        sides = [
            ours(task, *strategy, f"engine.stack={stack}", name=side)
            for side, stack in ((one, 1), (chunk, 25))
        ]
        rounds = take_turns(sides, bench.repeats)
        figure = Figure(f"{chunk} / {one}", ratio(rounds, chunk, one))
        yield Outcome("together", f"{name}, {sizes(task)}, batch {task.batch}", [figure], rounds)


def gpu(bench: Bench, task: Task = STACK) -> Iterator[Outcome]:
    """What it is worth on a GPU that clients advance together."""
    title = f"FedAvg, {sizes(task)}, batch {task.batch}"
    if not torch.cuda.is_available():
        yield Outcome("gpu", title, notes=["no GPU: not run"])
        return
    one, all_ = "stacks of 1", f"stacks of {task.clients}"
    sides = [
        Side(name, "pisa", task, (*FEDAVG, "device=cuda", f"engine.stack={stack}"), gpu=True)
        for name, stack in ((one, 1), (all_, task.clients))
    ]
    rounds = take_turns(sides, bench.repeats)
    yield Outcome("gpu", title, [Figure(f"{one} / {all_}", ratio(rounds, one, all_))], rounds)


def profile(bench: Bench, task: Task = MANY) -> Iterator[Outcome]:
    """Where a round with very many clients goes, by the profiler, in this process and one thread."""
    for name, strategy in (("SISA", SISA), ("FedAvg", FEDAVG)):
        parts = shares(task, *strategy, "engine.workers=0", "engine.threads=1")
        yield Outcome("profile", f"{name}, {sizes(task)}, batch {task.batch}", parts=parts)


_ALL = (
    device,
    silo,
    sisa,
    pisa,
    compiled,
    preconditioners,
    many,
    clients,
    memory,
    workers,
    together,
    gpu,
    profile,
)
WORKS: dict[str, Callable[[Bench], Iterator[Outcome]]] = {work.__name__: work for work in _ALL}
"""All of them by name."""


def ours(task: Task, *overrides: str, name: str = OURS) -> Side:
    """pisa-fl."""
    return Side(name, "pisa", task, overrides)


def peers(bench: Bench, task: Task) -> list[Side]:
    """The other frameworks; pfl also in its distributed mode, a process on every core."""
    return [
        Side("pfl", "pfl", task, python=bench.peers),
        distributed(bench, task),
        Side("fluke", "fluke", task, python=bench.peers),
        flower(bench, task),
    ]


def distributed(bench: Bench, task: Task) -> Side:
    """pfl's distributed mode."""
    return Side(f"pfl, {cores()} processes", "pfl", task, python=bench.peers, processes=cores())


def flower(bench: Bench, task: Task) -> Side:
    """Flower's simulation."""
    return Side(FLOWER, "flower", task, python=bench.peers)


def gradients(task: Task) -> Side:
    """Plain passes over batches of the clients' size, in a process on every core."""
    return Side("gradients", "floor", task, (str(cores()), str(task.batch)))


def floors(task: Task) -> list[Side]:
    """One plain pass, in one process with all cores and in a process on every core."""
    return [
        Side(f"floor, {count} process{'es' * (count > 1)}", "floor", task, (str(count), *FLOOR_BATCHES))
        for count in sorted({1, cores()})
    ]


def against_floor(rounds: Rounds, at_most: float) -> Figure:
    """Our time by that of the faster floor."""
    names = [name for name in rounds if name.startswith("floor")]
    floor = min(names, key=lambda name: median(r["seconds"] for r in rounds[name]))
    return Figure(f"{OURS} / {floor}", ratio(rounds, OURS, floor), at_most=at_most)


def beyond_gradients(rounds: Rounds, name: str, at_most: float | None) -> Figure:
    """Which share of a side's time PyTorch's gradients would not take."""
    share = [1 - value for value in ratio(rounds, "gradients", name)]
    return Figure("share that is not gradients", share, at_most=at_most)


def against_peers(rounds: Rounds, at_least: dict[str, float]) -> list[Figure]:
    """The times of the other frameworks by ours."""
    names = [name for name in rounds if name.startswith(("pfl", "fluke", FLOWER))]
    return [Figure(f"{name} / {OURS}", ratio(rounds, name, OURS), at_least.get(name)) for name in names]


def sizes(task: Task) -> str:
    """A task in words."""
    drawn = f"{task.drawn} of " if task.drawn else ""
    return f"{drawn}{task.clients:,} clients x {task.images:,} images"
