"""What a SISA round costs beside one plain forward and backward pass over the same images.

    make bench
    make bench ARGS="--repeats 9 model=mlp"

Both sides run in turn in one process with the same threads: a round of the default federation (10 clients x 1,000
images), evaluation left out; and the floor, a plain PyTorch loop over the same 10,000 images, already normalised, at
the best of several batch sizes. Prints the median of each, and of the ratio pair by pair.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pisa_fl import Federation, compose, prepare

BATCHES = (125, 250, 500, 1000)
"""Batch sizes tried for the floor."""


def floor(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> float:
    """Seconds of one forward and backward pass over all images."""
    start = time.perf_counter()
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        F.cross_entropy(model(x), y).backward()
    return time.perf_counter() - start


def round_times(federation: Federation, rounds: int) -> Iterator[float]:
    """Training seconds of one round after the other."""
    before = 0.0
    for metrics in federation.rounds(rounds):
        if metrics["round"]:
            yield metrics["seconds"] - before
        before = float(metrics["seconds"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="pairs that count, after one that does not")
    parser.add_argument("overrides", nargs="*", help="as for pisa-fl")
    arguments = parser.parse_args()
    federation = prepare(compose(*arguments.overrides))
    model, data = federation.model.module, federation.data
    rows = torch.cat([torch.as_tensor(part) for part in federation.partition])
    images = data.normalise(torch.tensor(data.train_images))[rows]
    labels = torch.tensor(data.train_labels)[rows]
    plain, whole, ratios = [], [], []
    for repeat, seconds in enumerate(round_times(federation, arguments.repeats + 1)):
        model.train()
        best = min(floor(model, images, labels, batch) for batch in BATCHES)
        if repeat:
            plain.append(best)
            whole.append(seconds)
            ratios.append(seconds / best)
    per_image = 1e6 / len(labels)
    print(f"{len(labels)} images, {torch.get_num_threads()} threads, medians of {len(ratios)} pairs")
    print(f"plain pass   {median(plain) * 1000:7.0f} ms  {median(plain) * per_image:5.1f} us an image")
    print(f"SISA round   {median(whole) * 1000:7.0f} ms  {median(whole) * per_image:5.1f} us an image")
    print(f"ratio        {median(ratios):7.2f}  (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
