"""What a Gaussian mechanism that is used many times is worth, by Google's dp-accounting (`pisa-fl[privacy]`).

A release is a sum of vectors, each of length C at most, and Gaussian noise of standard deviation z C on every element.
Each vector is in it with a chance q that depends on nothing else (Poisson sampling; q = 1: all are). k releases, each
of which may depend on those before, are

* (epsilon, delta)-private, by privacy loss distributions (q < 1) or in closed form (q = 1);
* such that who sees them all and tells by any test whether one's data were there has a rate of hits above that of
  false alarms by no more than `advantage`, the total variation, which is delta at epsilon 0;
* and in the worst case by no less than `at_least`. That is the limit of DP-SGD (Ertan and van Dijk 2026, arXiv
  2601.10237) with its own test, "some release was beyond h", for Poisson sampling: hits less alarms are

      Phi(h/z)^k - ((1 - q) Phi(h/z) + q Phi((h - 1)/z))^k                                  at the best h.

  Their theorem, for one pass in k shuffled batches: if z is less than 1/sqrt(2 ln k), the advantage is at least
  (1 - 1/sqrt(4 pi ln k))/2, sqrt(2) times the separation kappa that they speak of. `floor` is that z for k = 1/q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from pisa_fl.config import ConfigurationError

Adjacency = Literal["zero_out", "replace_one"]

INTERVAL = 1e-4
"""Of the values at which privacy losses are kept, as a share of the greatest of one release; they are rounded such that
epsilon is never too small."""

POINTS = 4001
"""Thresholds h that are tried."""


@dataclass(frozen=True)
class Spent:
    """What some releases have cost.

    Attributes:
        epsilon: At the delta that was asked for; infinite without noise.
        advantage: What a test for one's data gains at most, in [0, 1].
        at_least: What one test gains in the worst case.
    """

    epsilon: float
    advantage: float
    at_least: float


@dataclass(frozen=True)
class Release:
    """One use of the mechanism.

    Attributes:
        noise: z, standard deviation of the noise over the bound C.
        rate: q, chance of each vector to be in the sum, in (0, 1].
        adjacency: Which data are to look alike: with one vector and with zeros in its place (`zero_out`), or with any
            other in its place (`replace_one`).
    """

    noise: float
    rate: float
    adjacency: Adjacency

    def spent(self, times: int, delta: float) -> Spent:
        """What so many uses cost.

        Raises:
            ConfigurationError: dp-accounting is not installed.
        """
        if not times:
            return Spent(0.0, 0.0, 0.0)
        if not self.noise:
            return Spent(math.inf, 1.0, 1.0)
        if self.rate == 1:
            apart = (1 if self.adjacency == "zero_out" else 2) * math.sqrt(times) / self.noise
            advantage = math.erf(apart / math.sqrt(8))
            return Spent(_library().get_epsilon_gaussian(1 / apart, delta), advantage, advantage)
        losses = _losses(self.noise, self.rate, self.adjacency).self_compose(times)
        advantage = min(1.0, float(losses.get_delta_for_epsilon(0.0)))
        return Spent(float(losses.get_epsilon_for_delta(delta)), advantage, self.at_least(times))

    def at_least(self, times: int) -> float:
        """What the test of the module's text gains."""
        beyond = torch.linspace(0, 1 + 10 * self.noise, POINTS, dtype=torch.float64)

        def below(mean: float) -> torch.Tensor:
            return torch.special.ndtr((beyond - mean) / self.noise)

        mixed = (1 - self.rate) * below(0)
        there = mixed + self.rate * below(1)
        otherwise = below(0) if self.adjacency == "zero_out" else mixed + self.rate * below(-1)
        return max(0.0, float((otherwise**times - there**times).max()))

    @property
    def floor(self) -> float | None:
        """The noise 1/sqrt(2 ln(1/q)) below which the limit of DP-SGD holds; None if all are in every sum."""
        return None if self.rate == 1 else 1 / math.sqrt(-2 * math.log(self.rate))


@lru_cache
def _losses(noise: float, rate: float, adjacency: Adjacency) -> Any:
    """The distribution of the privacy loss of one use."""
    from dp_accounting.pld import privacy_loss_distribution

    relations = _library().NeighboringRelation
    interval = INTERVAL * (1 / (2 * noise**2) + 8 / noise)  # a mean of 1 eight standard deviations away
    relation = relations.REPLACE_SPECIAL if adjacency == "zero_out" else relations.REPLACE_ONE
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, value_discretization_interval=interval, sampling_prob=rate, neighboring_relation=relation
    )


def _library() -> Any:
    """dp-accounting.

    Raises:
        ConfigurationError: It is not installed.
    """
    try:
        import dp_accounting
    except ImportError as error:
        raise ConfigurationError(
            "privacy needs dp-accounting to tell what it is worth: pip install 'pisa-fl[privacy]', or leave privacy out"
        ) from error
    return dp_accounting
