"""The server's side of secure aggregation: SecAgg+ (Bell et al. 2020) as Flower's `SecAggPlusWorkflow` drives it.

Flower's workflow is for strategies and clients of its former interface, and ends the round if a client is missing in
one of the first two exchanges; so its four exchanges are driven here, over whatever carries our messages. Keys, shares,
encryption, masks and quantisation are Flower's functions, and so is the clients' side (`pisa_fl.secure.masking`).

1. Every client tells two public keys.
2. Every client deals shares of its mask's seed and of a secret key to its neighbours, encrypted: the server passes on
   what it cannot read.
3. Every client sends its update under a mask of its own, and one for each neighbour that dealt shares, with opposite
   signs at the two.
4. Every client gives its shares of the seeds of those whose update came, and of the secret keys of those whose did not:
   the sum's masks follow from them, and no update's.

A client that is missing in 1 or 2 is not in the sum and leaves no mask; one missing in 3 leaves masks, which 4 takes
away; one missing in 4 is in the sum, as long as the shares of others are enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ConfigRecord
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
from numpy.typing import NDArray

from pisa_fl.secure.limbs import LEVELS, MODULUS, REACH, joined
from strategies.base import checks
from strategies.base.messages import read

LEAST = 3
"""Clients that a sum takes: of two, each could tell the other's."""

Fault = Callable[[int, ConfigRecord], str | None]
"""Why a client's answer to an exchange cannot be used, or None."""

Ask = Callable[[str, Mapping[int, ConfigRecord], Fault], Mapping[int, ConfigRecord]]
"""Has clients asked in a stage, each something of its own; the answers of those who gave one without fault."""


class SumError(Exception):
    """There is no sum; one line."""


@dataclass(frozen=True)
class SecAgg:
    """How sums are taken.

    Attributes:
        threshold: Share of those who hold shares of a client's keys that it takes to take its masks away: above a half,
            so that nobody is asked for both keys of a client in vain.
        shares: How many hold shares of a client's keys, itself and its neighbours: an odd number; None: all clients
            of a round.

    Raises:
        ValueError: A number is outside its range.
    """

    threshold: float = 0.6
    shares: int | None = None

    def __post_init__(self) -> None:
        checks.share("threshold", self.threshold)
        if self.threshold <= 0.5:
            raise ValueError(f"threshold must be above 0.5 and at most 1, got {self.threshold}")
        if self.shares is not None:
            checks.whole("shares", self.shares, LEAST)
            if self.shares % 2 == 0:
                raise ValueError(
                    f"secure.shares must be odd, a client and as many on either side, got {self.shares}"
                )

    def holders(self, count: int) -> int:
        """How many hold shares of a client's keys among so many."""
        return count if self.shares is None else min(self.shares, count)

    def least(self, count: int) -> int:
        """How many of them it takes."""
        return max(2, math.ceil(self.threshold * self.holders(count) - 1e-9))


@dataclass(frozen=True)
class Summed:
    """A sum.

    Attributes:
        values: (L,).
        members: The clients that are in it.
    """

    values: NDArray[np.float64]
    members: Sequence[int]


def summed(settings: SecAgg, nodes: Sequence[int], length: int, ask: Ask) -> Summed:
    """The sum of what clients hold, from messages none of which tells what one of them holds.

    Args:
        settings: How.
        nodes: The clients, in an order that makes neighbours.
        length: Values that each has, L.
        ask: Carries the messages.

    Raises:
        SumError: Too few stayed, or something does not fit together.
    """
    _check_enough(len(nodes))
    return _Summation(settings, nodes, length, ask).run()


def _check_enough(clients: int) -> None:
    if clients < LEAST:
        raise SumError(f"{clients} clients are too few for a sum that hides what each has: it takes {LEAST}")


class _Summation:
    """One run of the protocol."""

    def __init__(self, settings: SecAgg, nodes: Sequence[int], length: int, ask: Ask) -> None:
        self._ask, self._shapes = ask, [(1,), (length,), (length,)]
        count = len(nodes)
        self._holders, self._least = settings.holders(count), settings.least(count)
        reach = range(-(self._holders // 2), self._holders // 2 + 1)
        near = {node: {nodes[(i + k) % count] for k in reach} for i, node in enumerate(nodes)}
        self._near = {node: sorted(others) for node, others in near.items()}

    def run(self) -> Summed:
        """All four exchanges."""
        keys = self._keys()
        sealed = self._sealed(keys)
        masked = self._masked(sealed)
        lost = [node for node in sealed if node not in masked]
        shares = self._shares(masked, lost)
        total = [np.zeros(shape, np.int64) for shape in self._shapes]
        for vectors in masked.values():
            _add(total, vectors)
        try:
            for node in masked:
                _add(total, self._mask(combine_shares(shares[node])), -1)
            for node in lost:
                if not (neighbours := self._among(node, masked)):
                    continue
                secret = bytes_to_private_key(combine_shares(shares[node]))
                for other in neighbours:
                    mask = self._mask(generate_shared_key(secret, bytes_to_public_key(keys[other][0])))
                    _add(total, mask, 1 if node > other else -1)  # as the other did not
        except ValueError as error:
            raise SumError(f"the shares of keys do not fit together: {error}") from error
        factor, *limbs = (part & (MODULUS - 1) for part in total)
        most = len(masked) * LEVELS
        if int(factor[0]) != most or any(part.size and int(part.max()) > most for part in limbs):
            raise SumError(
                "the masks do not cancel: some client's numbers or shares are not what they should be"
            )
        return Summed(joined(limbs, len(masked)), sorted(masked))

    def _keys(self) -> dict[int, list[bytes]]:
        """Public keys, two of each client."""
        said = {
            Key.SAMPLE_NUMBER: len(self._near),
            Key.SHARE_NUMBER: self._holders,
            Key.THRESHOLD: self._least,
            Key.CLIPPING_RANGE: REACH,
            Key.TARGET_RANGE: LEVELS,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: 1.0,
        }

        def fault(_: int, answer: ConfigRecord) -> str | None:
            own = [answer.get(Key.PUBLIC_KEY_1), answer.get(Key.PUBLIC_KEY_2)]
            try:
                curves = {bytes_to_public_key(key).curve.name for key in own if isinstance(key, bytes)}
            except Exception:  # whatever a stranger's bytes make the parser raise
                curves = set()
            usable = curves == {"secp384r1"} and own[0] != own[1] and all(isinstance(k, bytes) for k in own)
            return None if usable else "its keys are none"

        answers = self._asked(Stage.SETUP, {node: ConfigRecord(dict(said)) for node in self._near}, fault)
        return {
            node: [_bytes(a[Key.PUBLIC_KEY_1]), _bytes(a[Key.PUBLIC_KEY_2])] for node, a in answers.items()
        }

    def _sealed(self, keys: Mapping[int, list[bytes]]) -> dict[int, dict[int, bytes]]:
        """What every client has dealt to each of its neighbours."""

        def fault(node: int, answer: ConfigRecord) -> str | None:
            others, texts = _list(answer[Key.DESTINATION_LIST]), _list(answer[Key.CIPHERTEXT_LIST])
            due = [other for other in self._among(node, keys) if other != node]
            fits = sorted(others) == due and len(texts) == len(due)
            fits = fits and all(isinstance(text, bytes) for text in texts)
            return None if fits else "its shares are not one for each neighbour"

        said = {
            node: ConfigRecord({str(other): keys[other] for other in self._among(node, keys)})
            for node in keys
        }
        answers = self._asked(Stage.SHARE_KEYS, said, fault)
        return {
            node: dict(zip(_list(a[Key.DESTINATION_LIST]), _list(a[Key.CIPHERTEXT_LIST]), strict=True))
            for node, a in answers.items()
        }

    def _masked(self, sealed: Mapping[int, Mapping[int, bytes]]) -> dict[int, list[NDArray[np.int64]]]:
        """Masked updates: a factor and two vectors of each client."""
        vectors: dict[int, list[NDArray[np.int64]]] = {}

        def fault(node: int, answer: ConfigRecord) -> str | None:
            parts = answer.get(Key.MASKED_PARAMETERS)
            if not isinstance(parts, list) or len(parts) != len(self._shapes):
                return "its masked update has not the vectors that it should have"
            found = [_whole(part, shape) for part, shape in zip(parts, self._shapes, strict=True)]
            vectors[node] = [part for part in found if part is not None]
            return None if len(vectors[node]) == len(found) else "its masked update cannot be read"

        said = {}
        for node in sealed:
            others = [other for other in self._among(node, sealed) if other != node]
            texts = [sealed[other][node] for other in others]
            said[node] = ConfigRecord({Key.CIPHERTEXT_LIST: texts, Key.SOURCE_LIST: others})
        answers = self._asked(Stage.COLLECT_MASKED_VECTORS, said, fault)
        return {node: vectors[node] for node in answers}

    def _shares(self, masked: Mapping[int, object], lost: Sequence[int]) -> dict[int, list[bytes]]:
        """Shares of the seeds of those whose update came, and of the secret keys of those whose did not."""
        asked = {node: (self._among(node, masked), self._among(node, lost)) for node in masked}

        def fault(node: int, answer: ConfigRecord) -> str | None:
            owners, parts = _list(answer[Key.NODE_ID_LIST]), _list(answer[Key.SHARE_LIST])
            fits = owners == [*asked[node][0], *asked[node][1]] and len(parts) == len(owners)
            fits = fits and all(isinstance(part, bytes) for part in parts)
            return None if fits else "it gives other shares than those asked for"

        said = {
            node: ConfigRecord({Key.ACTIVE_NODE_ID_LIST: there, Key.DEAD_NODE_ID_LIST: gone})
            for node, (there, gone) in asked.items()
        }
        answers = self._asked(Stage.UNMASK, said, fault)
        found: dict[int, list[bytes]] = {node: [] for node in (*masked, *lost)}
        for answer in answers.values():
            for owner, part in zip(
                _list(answer[Key.NODE_ID_LIST]), _list(answer[Key.SHARE_LIST]), strict=True
            ):
                found[owner].append(part)
        for owner, parts in found.items():
            if len(parts) < self._least and (owner in masked or self._among(owner, masked)):
                raise SumError(
                    f"{len(parts)} clients gave their shares of client {owner}'s keys, {self._need}"
                )
            del parts[self._least :]
        return found

    def _asked(
        self, stage: str, said: Mapping[int, ConfigRecord], fault: Fault
    ) -> Mapping[int, ConfigRecord]:
        """Answers to one exchange, if they are enough for those that follow."""
        for one in said.values():
            one[Key.STAGE] = stage
        answers = self._ask(stage, said, fault)
        if stage != Stage.UNMASK:
            left = min((len(self._among(node, answers)) for node in answers), default=0)
            if left < self._least:
                raise SumError(f"too few clients stayed for a sum: {left} of {self._holders}, {self._need}")
            _check_enough(len(answers))
        return answers

    @property
    def _need(self) -> str:
        return f"it takes {self._least} (secure.threshold)"

    def _among(self, node: int, others: Any) -> list[int]:
        """Those of the others who are the node's neighbours, or itself."""
        return [other for other in self._near[node] if other in others]

    def _mask(self, seed: bytes) -> list[NDArray[np.int64]]:
        return pseudo_rand_gen(seed, MODULUS, list(self._shapes))


def _add(total: list[NDArray[np.int64]], vectors: Sequence[NDArray[np.int64]], sign: int = 1) -> None:
    """Add to, or subtract from a total; whole numbers that overflow do so modulo 2^64."""
    for part, vector in zip(total, vectors, strict=True):
        part += vector if sign > 0 else -vector


def _whole(data: Any, shape: tuple[int, ...]) -> NDArray[np.int64] | None:
    """A stranger's vector, or None if it is none of these."""
    try:
        vector = read(Array("int64", shape, "numpy.ndarray", data))
    except Exception:  # whatever the bytes make the parser raise
        return None
    fits = vector.dtype == np.int64 and vector.shape == shape
    return vector if fits and vector.min(initial=0) >= 0 and vector.max(initial=0) < MODULUS else None


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


def _bytes(value: Any) -> bytes:
    assert isinstance(value, bytes)
    return value
