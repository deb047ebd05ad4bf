"""Every preconditioner of PISA's on three federations: a table for docs/preconditioners.md.

    python -m experiments.preconditioners
    python -m experiments.preconditioners seed=1 --only kronecker shampoo

All of `conf/strategy/preconditioner/`, in `strategy=pisa` with its defaults but for the learning rates in `LR`:
accuracy at rounds 10, 25, 50 and 100 of 100, the median seconds of a round, the size of what Q remembers, and bytes
to and from a client in a round. Further arguments are overrides, given to all.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from itertools import pairwise
from statistics import median

import pisa_fl
from pisa_fl.config import CONF, build
from pisa_fl.federation import RunError
from strategies.preconditioners import Preconditioner

FEDERATIONS = {
    "iid": ["partition=iid"],
    "one class": ["partition.classes_per_client=1"],
    "Dirichlet .1, 10 % of 100": [
        *("partition=dirichlet", "partition.alpha=0.1", "clients=100", "participation=0.1")
    ],
}
LR = {"identity": 1.0}
"""Learning rates of those whose steps are not of the size of lr."""
ROUNDS = (10, 25, 50, 100)
NAMES = sorted(path.stem for path in (CONF / "strategy" / "preconditioner").glob("*.yaml"))
"""All preconditioners."""


def main(arguments: list[str] | None = None) -> None:
    """Run all and print a row for each as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    chosen, overrides = parser.parse_known_args(arguments)
    heads = ["preconditioner", "federation", *(f"round {number}" for number in ROUNDS)]
    heads += ["seconds a round", "state, MB", "MB a client and round"]
    print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")
    for name in chosen.only:
        for federation, own in FEDERATIONS.items():
            try:
                numbers = row(name, [*own, *overrides])
            except RunError as error:
                numbers = [str(error)]
            print(f"| {name} | {federation} | {' | '.join(numbers)} |", flush=True)


def row(name: str, overrides: list[str]) -> list[str]:
    """The numbers of one run."""
    config = pisa_fl.compose(
        *("strategy=pisa", f"strategy/preconditioner={name}", f"strategy.lr={LR.get(name, 0.02)}"),
        *(f"rounds={ROUNDS[-1]}", *overrides),
    )
    federation = pisa_fl.prepare(config)
    with closing(federation.grid):
        metrics = list(federation.rounds(ROUNDS[-1]))
    accuracies = [100 * line["test_accuracy"] for line in metrics]
    last = metrics[-1]
    sent = (last["bytes_up"] + last["bytes_down"]) / sum(line["clients_ok"] for line in metrics[1:])
    seconds = [line["seconds"] for line in metrics]
    round_seconds = median(after - before for before, after in pairwise(seconds))
    made: Preconditioner = build(
        config.strategy.preconditioner, Preconditioner, layout=federation.model.layout
    )
    nothing = made.nothing()
    held = sum(nothing[name].nbytes for name in made.memory_fields())
    return [
        *(f"{accuracies[number]:.1f}" for number in ROUNDS),
        *(f"{round_seconds:.2f}", f"{held / 1e6:.3f}", f"{sent / 1e6:.2f}"),
    ]


if __name__ == "__main__":
    main()
