"""Fully connected networks: logistic regression, and McMahan's 2NN."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from pisa_fl.models.widths import check_widths


def mlp(shape: tuple[int, ...], classes: int, hidden: Sequence[int]) -> nn.Sequential:
    """Return linear layers with ReLU between them; without hidden layers it is logistic regression.

    Two hidden layers of 200 are the 2NN of McMahan et al. 2017 (arXiv 1602.05629): 199,210 parameters on
    MNIST.

    Args:
        shape: of one example's input.
        classes: how many numbers are given.
        hidden: widths of the hidden layers.

    Raises:
        ValueError: if a width is impossible.
    """
    check_widths("hidden", hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise([math.prod(shape), *hidden, classes]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
