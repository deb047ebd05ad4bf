"""Does any untuned run of PISA collapse? Many seeds, deals, models and step lengths, on few images and for few rounds.

    python -m experiments.safety
    python -m experiments.safety strategy/preconditioner=muon --models mlp --lrs 0.02 --seeds 5

The first rounds are the dangerous ones: little is known of Q, and a leap silences units for good. Each run is
`strategy=pisa` with its schedule for `--horizon` rounds, of which the first `--rounds` are run; half of ten clients
answer in each. A run has collapsed if its training loss is not finite, or at the end not below nine tenths of a
guesser's, ln 10. Prints a table of the final training losses and the number of collapsed runs. Further arguments are
overrides, given to all; they come first.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from statistics import median

from pisa_fl import ImageData, compose, prepare
from pisa_fl.data.mnist import mnist_mini

DEALS = {
    "iid": ["partition=iid"],
    "one class": ["partition.classes_per_client=1"],
    "Dirichlet .1": ["partition=dirichlet", "partition.alpha=0.1", "partition.min_examples=1"],
}
MODELS = ("mlp", "simple_cnn", "vgg9", "resnet18")
GUESS = math.log(10)


def few_images(every: int) -> ImageData:
    """Of mnist_mini's images one in `every`."""
    data = mnist_mini(cache=None, mean=0.1307, std=0.3081)
    parts = ("train_images", "train_labels", "test_images", "test_labels")
    return replace(data, **{part: getattr(data, part)[::every] for part in parts})


def train_losses(overrides: Sequence[str], every: int, rounds: int) -> list[float]:
    """Training loss of every round."""
    config = compose("strategy=pisa", "clients=10", "participation=0.5", "engine.workers=0", *overrides)
    config.data = {"_target_": "experiments.safety.few_images", "every": every}
    return [float(line["train_loss"]) for line in prepare(config).rounds(rounds)][1:]


def main(arguments: list[str] | None = None) -> int:
    """Run all, print a line for each setting; returns the number of collapsed runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.005, 0.02, 0.03])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--every", type=int, default=10, help="one image in so many of 10,000")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--horizon", type=int, default=50)
    chosen, more = parser.parse_known_args(arguments)
    collapsed = 0
    print("| model | deal | lr | seeds | training loss, median | worst | collapsed |\n" + "| --- " * 7 + "|")
    for model, lr, (deal, own) in product(chosen.models, chosen.lrs, DEALS.items()):
        ends, fallen = [], 0
        for seed in range(chosen.seeds):
            overrides = [
                *own,
                f"model={model}",
                f"strategy.lr={lr}",
                f"rounds={chosen.horizon}",
                f"seed={seed}",
                *more,
            ]
            losses = train_losses(overrides, chosen.every, chosen.rounds)
            ends.append(losses[-1])
            fallen += not all(map(math.isfinite, losses)) or not losses[-1] < 0.9 * GUESS
        collapsed += fallen
        print(
            f"| {model} | {deal} | {lr:g} | {chosen.seeds} | {median(ends):.3f} | {max(ends):.3f} | {fallen} |",
            flush=True,
        )
    return collapsed


if __name__ == "__main__":
    raise SystemExit(1 if main() else 0)
