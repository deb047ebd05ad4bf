"""What PISA's two halves must agree on: what travels, and in which rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from strategies.base import checks
from strategies.base.layout import Layout
from strategies.base.messages import Field
from strategies.pisa.penalty import Penalty
from strategies.preconditioners import Preconditioner
from strategies.preconditioners.base import LOSS, PROBED

OFFSET, KNOWN = "offset", "known"
"""Names of what friction has taken from all duals, and of a client's note, 1, that it has one at all."""

RESIDUAL, STEPPED = "residual", "stepped-round"
"""Names of g_i + pi_i, where it is summed, and of the round whose step a client's dual is still to take; 0: none."""

COMMON = "common"
"""Name of the federation's gradient h."""

Wire = Literal["auto", "primal", "gradient"]


def measures(preconditioner: Preconditioner, round_number: int, align_every: int) -> bool:
    """Whether a common Q learns from this round (counted from 1)."""
    return (
        align_every > 0 and (round_number - 1) % align_every == 0 and bool(preconditioner.statistic_fields())
    )


def suited(penalty: Penalty, preconditioner: Preconditioner) -> Penalty:
    """The penalty, its lr in the preconditioner's own units."""
    return replace(penalty, lr=penalty.lr * preconditioner.rate)


def difference_of(
    difference: float | None, penalty: Penalty, align_every: int, lag: int, preconditioner: Preconditioner
) -> float:
    """The weight of what a client's gradient differs by from the federation's; None finds it.

    Raises:
        ValueError: It is outside (0, 1], or below 1 where the federation's gradient is not known in every round.
    """
    known = align_every == 1 and lag == 0 and penalty.consensus == "fresh"
    known = known and preconditioner.gradient_field is not None
    if difference is None:
        return penalty.participation**0.5 if known else 1.0
    checks.share("difference", difference)
    if difference < 1 and not known:
        raise ValueError(
            f"difference={difference:g} needs the federation's gradient in every round: set align_every=1, lag=0,"
            " consensus=fresh and a preconditioner that learns from gradients, or difference=1"
        )
    return difference


def common_of(preconditioner: Preconditioner, average: Tensor) -> Tensor:
    """The federation's gradient h, (d,), in the average of the clients' statistics, (k,)."""
    fields = preconditioner.statistic_fields()
    parts = average.split([field.size for field in fields.values()])
    return dict(zip(fields, parts, strict=True))[str(preconditioner.gradient_field)]


def probed_fields(preconditioner: Preconditioner) -> dict[str, Field]:
    """What clients send of a statistic beside the gradient, from which the rest of it follows."""
    return {
        name: field for name, field in preconditioner.statistic_fields().items() if name in (PROBED, LOSS)
    }


def statistic_of(
    preconditioner: Preconditioner, gradient: Tensor, dual: Tensor, probed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The whole statistic; what is not told is zero, in rounds that nothing is observed in."""
    made = preconditioner.statistic(gradient, gradient + dual)
    for name, field in probed_fields(preconditioner).items():
        made[name] = probed.get(name, gradient.new_zeros(1)).expand(len(gradient), field.size)
    return made


def accumulated(
    preconditioner: Preconditioner, shared: Mapping[str, Tensor], average: Tensor, device: torch.device | str
) -> dict[str, Tensor]:
    """The common state, with the average of the clients' statistics, (k,), in it."""
    fields = preconditioner.statistic_fields()
    parts = average[None].split([field.size for field in fields.values()], dim=-1)
    # a sum with rows taken out may be less than it can be, by rounding
    least = [part.clamp(min=field.minimum) for part, field in zip(parts, fields.values(), strict=True)]
    statistic = {name: part.to(device) for name, part in zip(fields, least, strict=True)}
    return preconditioner.accumulate(shared, statistic)


def restored(
    row: Tensor, state: Mapping[str, Tensor], arrays: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Duals without and with what friction took from all, and the notes that there are some.

    Args:
        row: Duals without it, as they are kept, (C, d).
        state: What clients remember; of a new one nothing.
        arrays: What they were sent.
    """
    offset = arrays[OFFSET]
    row = torch.where(state[KNOWN] > 0, row, -offset)  # a new client's dual is zero
    return row, row + offset, {KNOWN: torch.ones_like(state[KNOWN])}


def limited(
    lambda_: float,
    share: float,
    largest: Tensor,
    scale: Tensor | None,
    penalty: Penalty,
    layout: Layout,
) -> tuple[float | Tensor, Tensor]:
    """lambda of a round, with an automatic penalty no more than a share of the greatest q so far, and that q, (T,).

    Args:
        lambda_: As it is set.
        share: Of the greatest q: `difference`, for where few take part it takes more rounds to learn anything.
        largest: The greatest q of the rounds before, (T,), of each tensor.
        scale: q of the round, (d,), or None.
        penalty: sigma and rho.
        layout: Of the model.
    """
    if penalty.sigma is not None:
        return lambda_, largest
    if scale is not None and lambda_:
        largest = torch.maximum(largest, layout.mean(scale.cpu()[None])[0])
    return layout.expand((largest * share).clamp(max=lambda_)), largest


def by_gradient(wire: Wire, align_every: int, local_steps: int, preconditioner: Preconditioner) -> bool:
    """Whether clients send gradients.

    Raises:
        ValueError: They are to, and that is impossible.
    """
    common = align_every > 0 or not preconditioner.state_fields()
    if wire == "gradient" and (local_steps > 1 or not common):
        raise ValueError(
            "wire=gradient needs one local step and a common Q: set wire=primal, or"
            f" {'local_steps=1' if local_steps > 1 else 'align_every=1'}"
        )
    return wire != "primal" and local_steps == 1 and common


def added(name: str) -> str:
    """Name of what a client's statistic has more than the one it last added to their sum."""
    return f"new-{name}"


def check_linear(preconditioner: Preconditioner, align_every: int) -> None:
    """Refuse a Q by which the sum of the clients' steps is not the step of their sum, or which gradients do not make.

    Raises:
        ValueError: It is one.
    """
    name = type(preconditioner).__name__
    if not align_every and preconditioner.state_fields():
        raise ValueError(
            "align_every=0 gives every client its own Q, so that steps do not add up: set align_every=1"
        )
    if type(preconditioner).direction is not Preconditioner.direction:
        raise ValueError(
            f"{name} maps gradients to directions, so that steps do not add up: use kronecker or second_moment"
        )
    if preconditioner.probe is not None:
        raise ValueError(
            f"{name} takes more than gradients, which is not summed: use kronecker or second_moment"
        )


def check_alignment(align_every: int, penalty: Penalty, preconditioner: Preconditioner) -> None:
    """Refuse an automatic penalty where every client has its own Q."""
    if not align_every and penalty.sigma is None and preconditioner.state_fields():
        raise ValueError(
            "align_every=0 gives every client its own Q, for which there is no common automatic penalty:"
            " set penalty.sigma and penalty.rho by hand, or align_every=1"
        )
