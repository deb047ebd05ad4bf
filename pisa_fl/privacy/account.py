"""The account of a run: how often something was released, and what that has cost so far."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pisa_fl.config import ConfigurationError
from pisa_fl.privacy.accounting import Spent
from pisa_fl.privacy.base import Privacy
from pisa_fl.system.files import write
from strategies.base.client import ClientHalf


class Account:
    """Counts releases.

    With a chance to take part below 1, epsilon supposes that nobody knows who did. Once a reply is lost, whoever lost
    it may have known, and all rounds count as if everybody had been in them: that holds whoever chose what was lost.

    Args:
        privacy: The promise.
        half: The client half.
        participation: Chance, or share, of a client to take part in a round.
        clients: How many there are.

    Raises:
        ConfigurationError: The accountant is not installed.
    """

    def __init__(self, privacy: Privacy, half: ClientHalf, participation: float, clients: int) -> None:
        self._privacy, self._clients = privacy, clients
        self._release, self._each = privacy.release(half, participation)
        self._release.spent(1, privacy.delta)  # refused before anything begins
        self.asked: Counter[int] = Counter()
        self.rounds, self.repeated, self.lost = 0, 0, False
        self._kept: Path | None = None

    def keep_in(self, path: Path) -> None:
        """Keep who was asked in a file, if each answer is drawn anew: what a round that failed drew counts for ever.

        Args:
            path: The file, which may be there from before an interruption; then it counts, and no checkpoint.

        Raises:
            ConfigurationError: It is damaged.
        """
        if self._privacy.poisson or self._privacy.random.kind != "system":
            return
        self._kept = path
        if path.is_file():
            try:
                said = {int(client): int(count) for client, count in json.loads(path.read_text()).items()}
            except (ValueError, AttributeError, TypeError) as error:
                raise ConfigurationError(
                    f"{path} is damaged, and nothing else tells what was spent"
                ) from error
            self.asked, self.repeated = Counter(said), 0

    def ask(self, clients: Iterable[int]) -> None:
        """Some clients are asked for an update; who is asked again may answer again."""
        self.asked.update(clients)
        if self._kept is not None:
            write(self._kept, json.dumps(dict(self.asked)) + "\n")

    def round(self, failed: int) -> None:
        """A round's sum is made public, and replies of so many were lost or refused."""
        self.rounds += 1
        self.lost |= failed > 0 and self._privacy.poisson and self._release.rate < 1

    @property
    def times(self) -> int:
        """Releases so far, of the client that was asked most where each makes its own."""
        most = max(self.asked.values(), default=0)
        return self._each * (self.repeated + (self.rounds if self._privacy.poisson else most))

    @property
    def spent(self) -> Spent:
        """What they have cost."""
        release = replace(self._release, rate=1.0) if self.lost else self._release
        return release.spent(self.times, self._privacy.delta)

    def line(self) -> dict[str, float]:
        """What a round's line of metrics.jsonl tells; epsilon is null where there is none."""
        spent = self.spent
        return {"epsilon": spent.epsilon, "advantage": spent.advantage}

    def summary(self) -> dict[str, Any]:
        """What summary.json tells."""
        privacy, spent, floor = self._privacy, self.spent, self._release.floor
        told = {
            "protects": privacy.protects,
            "adjacency": privacy.adjacency,
            "epsilon": spent.epsilon if math.isfinite(spent.epsilon) else None,
            "delta": privacy.delta,
            "advantage": spent.advantage,
            "advantage_at_least": spent.at_least,
            "noise": privacy.noise,
            "noise_floor": floor,
            "releases": self.times,
            "sampling": "none"
            if self.lost or self._release.rate == 1
            else f"poisson, {self._release.rate:g}",
            "randomness": privacy.random.kind,
        }
        return told | ({"note": note} if (note := self._note()) else {})

    def _note(self) -> str:
        """What else has to be known."""
        notes = []
        if not self._privacy.noise:
            notes.append("without noise nothing is promised")
        if self.lost:
            notes.append(
                "replies were lost, so that sampling counts for nothing: epsilon holds whoever chose them"
            )
        if self._privacy.random.kind == "seed":
            notes.append(
                "it holds against those who do not know the seed (privacy.randomness=system for the rest)"
            )
        if self._privacy.poisson and self._privacy.delta * self._clients > 1:
            notes.append(f"delta is more than 1 in {self._clients}, the clients")
        return "; ".join(notes)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "asked": dict(self.asked),
            "rounds": self.rounds,
            "repeated": self.repeated,
            "lost": self.lost,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on; the round that was interrupted counts twice if the operating system draws it anew."""
        self.asked = Counter({int(client): int(count) for client, count in state["asked"].items()})
        self.rounds, self.lost = int(state["rounds"]), bool(state["lost"])
        self.repeated = int(state["repeated"]) + (self._privacy.random.kind == "system")
