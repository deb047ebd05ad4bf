"""A federation: data dealt to clients, a model, the two halves of an algorithm, and the rounds.

for metrics in Federation(...).rounds(50):
    print(metrics["round"], metrics["test_accuracy"])
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, NoReturn, cast

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import nn

from partitioners import Partition
from pisa_fl.clients.executor import TEST_PART, tensors
from pisa_fl.clients.flat_model import FlatModel
from pisa_fl.clients.host import Clients
from pisa_fl.config import ConfigurationError
from pisa_fl.data.data_set import DataSet
from pisa_fl.data.hold_out import hold_out
from pisa_fl.engines.base import ClientGrid
from pisa_fl.engines.local import local_engine
from pisa_fl.metric import TRAIN_LOSS, Metrics
from pisa_fl.privacy import Account, Privacy
from pisa_fl.randomness import global_generators, numpy_generator
from pisa_fl.secure.summing import SecAgg
from pisa_fl.server.flowers_own import server_half
from pisa_fl.server.gateway import Gateway
from pisa_fl.server.sums import HOSTS, SECAGG, check_sums
from pisa_fl.system.surroundings import own_surroundings
from pisa_fl.system.text import listed
from pisa_fl.tasks import Task
from pisa_fl.tasks.base import LOSS, TARGETS
from strategies import ClientHalf
from strategies.base.messages import (
    ARRAYS,
    BUFFERS,
    CONFIG,
    DIFFERENTIATED,
    EXAMPLES,
    LARGEST,
    ROUND,
    WEIGHTS,
    RoundError,
    integer,
    metrics_of,
    out_of_range,
    real,
    record,
    vectors,
)
from strategies.base.messages import LOSS as CLIENTS_LOSS

# Flower's strategies report every round on their own; the run directory and the display do that here
logging.getLogger("flwr").setLevel(logging.ERROR)
log = logging.getLogger(__name__)


WAIT = 1.0
"""Seconds between looks for clients while there are too few."""

TELL = 30.0
"""Seconds between words about who is missing."""


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that lies outside its configuration."""


class TooFewClientsError(RunError):
    """Fewer clients than `min_clients` gave a reply that could be accepted, or one failed that must not."""


class StoppedError(RunError):
    """It was asked to stop while a round waited for clients; nothing of the round was kept."""


class DivergedError(RunError):
    """A round gave values that must not be kept; nothing of it was."""


class _NodesAlone:
    """What a private run shows of its grid to a strategy that is to say whom it asks: it may not ask on its own."""

    def __init__(self, grid: Grid) -> None:
        self.get_node_ids = grid.get_node_ids

    def send_and_receive(self, *_: Any, **__: Any) -> NoReturn:
        raise RunError("the strategy asks clients twice in a round, which privacy does not account for")


def _attributes(strategy: Strategy) -> dict[str, Any]:
    """What a strategy remembers that it replaces from round to round, as Flower's do."""
    return {name: dict(v) if isinstance(v, dict) else v for name, v in vars(strategy).items()}


def _check_evaluation(strategy: Strategy, evaluate_clients_every: int | None) -> None:
    """Check that no client is asked for what passes by the noise.

    Raises:
        ValueError: One would be.
    """
    if evaluate_clients_every is not None or vars(strategy).get("fraction_evaluate"):
        raise ValueError(
            "evaluate_clients_every has clients tell exact metrics of their examples, and privacy promises that they do"
            " not: set evaluate_clients_every=null"
        )


def _check_draws(
    privacy: Privacy, max_update: float | None, min_clients: int | None, participation: float
) -> None:
    """Check that who is in a noised sum depends on chance alone.

    Raises:
        ValueError: It depends on what clients sent, or on how many there are.
    """
    if privacy.poisson and max_update is not None:
        raise ValueError(
            f"max_update={max_update:g} refuses an update by how long the others' are, so that one client decides over"
            " others: set max_update=null, for privacy=central clips every update"
        )
    if privacy.poisson and participation < 1 and min_clients is not None:
        raise ValueError(
            f"min_clients={min_clients} does not go with privacy=central and participation={participation:g}: chance"
            " may draw any number of clients, so set min_clients=null"
        )


def _warn_of_krum(strategy: Strategy, drawn: int) -> None:
    """Say so if Krum is given too few clients for what its paper proves."""
    liars = getattr(strategy, "num_malicious_nodes", None)
    if liars is not None and drawn <= 2 * liars + 2:
        log.warning(
            "%s with malicious=%d is safe with more than %d clients a round, and clients and participation make %d",
            *(type(strategy).__name__, liars, 2 * liars + 2, drawn),
        )


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose random initial weights follow from the seed alone; global random state is untouched."""
    with global_generators(int(numpy_generator(seed, "initial weights").integers(2**63))):
        return make()


class Federation:
    """A federation of clients on an engine.

    Args:
        data: Training and test set.
        partition: Positions of each client's training examples, one array a client; empty where clients hold
            their own.
        model: The model; its present parameters are the initial weights.
        strategy: Server half, any Flower strategy.
        half: Client half.
        engine: Makes the grid that reaches the clients from what they are made of.
        seed: Every random draw of the rounds follows from it.
        batch_size: Examples of a mini-batch.
        participation: Share of the clients drawn for each round, in (0, 1].
        device: Where clients compute and the model is evaluated.
        noise_std: Standard deviation of the noise on a client's inputs by client number, as
            `partitioners.FeatureNoisePartitioner` gives it; None for none.
        clients: How many clients there are; None: those of the partition.
        min_clients: Clients that a run needs to begin, and accepted replies that a round needs; None: all, and one.
        round_timeout: Seconds that a round waits for replies; None: without end.
        patience: Seconds that a round with too few clients waits for others.
        accept_failures: Go on with those who answered if some clients failed.
        max_update: How many times as long as the greatest median of a round so far a client's update may be; None: as
            long as it likes.
        task: What is learnt; None: what usually is of such data.
        client_test: Share of every client's examples, in [0, 1), that it is tested on and does not train on.
        evaluate_every: Rounds between evaluations on the test set; round 0 and the last have one always.
        evaluate_clients_every: Rounds between evaluations on every client's own examples; None: never.
        privacy: What is done so that others learn little of clients' data; None: nothing.
        secure: How the server is given sums over clients in place of their updates; None: it is given those.

    Attributes:
        task: What is learnt.
        of_clients: Client number -> `examples`, `loss` and metrics of the present weights on its own examples, of those
            who answered; None in rounds without such an evaluation.
        server: The server half, in the form in which it says what it keeps.
        identity: What the run's bits follow from (`pisa_fl.identity`); empty for a federation from objects.
    """

    @own_surroundings()
    def __init__(
        self,
        data: DataSet,
        partition: Partition,
        model: nn.Module,
        strategy: Strategy,
        half: ClientHalf,
        engine: Callable[[Clients], ClientGrid] = local_engine,
        *,
        seed: int = 0,
        batch_size: int = 64,
        participation: float = 1.0,
        device: str | torch.device = "cpu",
        noise_std: Callable[[int], float] | None = None,
        clients: int | None = None,
        min_clients: int | None = None,
        round_timeout: float | None = None,
        patience: float = 0.0,
        accept_failures: bool = True,
        max_update: float | None = 20.0,
        task: Task | None = None,
        client_test: float = 0.0,
        evaluate_every: int = 1,
        evaluate_clients_every: int | None = None,
        privacy: Privacy | None = None,
        secure: SecAgg | None = None,
    ) -> None:
        if not data.tests:
            raise ValueError("data: there are no test examples, which the server needs")
        device = torch.device(device)
        self.strategy, self.data, self.partition = strategy, data, partition
        rows: dict[int, NDArray[np.integer]] = {}
        tests: dict[int, NDArray[np.integer]] = {}
        for client, dealt in enumerate(partition):
            rows[client], tests[client] = hold_out(dealt, data.groups, client_test, seed, client)
        noise = {client: noise_std(client) for client in rows} if noise_std else {}
        self.clients = len(partition) if clients is None else clients
        self.server = server_half(strategy)
        drawn = max(1, round(participation * self.clients))
        _warn_of_krum(strategy, drawn)
        asked = (self.server, type(strategy).__name__, drawn, max_update, privacy is not None)
        if secure is not None:
            check_sums(SECAGG, *asked)
        parts = Clients(
            *(data, rows, model, half, seed, batch_size, device, noise, task, tests),
            privacy=privacy,
            secure=secure is not None,
        )
        self.task, findings = parts.learnt, parts.findings
        self.stopping: Callable[[], bool] = lambda: False
        self.account: Account | None = None
        if privacy is not None:
            _check_evaluation(strategy, evaluate_clients_every)
            _check_draws(privacy, max_update, min_clients, participation)
            privacy.check_server(half, strategy)
            self.account = Account(privacy, half, participation, self.clients)
        self.grid = engine(parts)
        try:
            if secure is not None and self.grid.sums:
                raise ConfigurationError(f"{SECAGG} hides updates from hosts too: leave out {HOSTS}")
            if secure is None:
                check_sums(HOSTS if self.grid.sums else None, *asked)
        except ConfigurationError:
            self.grid.close()
            raise
        self.model = FlatModel(model, self.task, device, findings=findings)
        chances = None
        if privacy is not None:
            self.server = privacy.around(self.server, participation * self.clients)
            if privacy.poisson and participation < 1:
                chances = partial(privacy.chances, clients=self.clients)
        buffers = self.model.buffers.cpu()
        self.gateway = Gateway(
            *(self.grid, half, buffers, seed, participation, self.server, max_update, round_timeout, chances),
            secure=secure,
            measures=self.task.measures.all,
        )
        if not self.grid.elsewhere:  # else they are looked for
            self.gateway.traffic.clients_reachable = self.clients
        self.arrays = record({WEIGHTS: self.model.weights.clone()})
        self.identity: Mapping[str, str] = {}
        self.round = 0
        self.seconds = 0.0
        self.whole = True  # all of this as it was after the round; not while a round's replies are taken in
        self._needed_to_begin = self.clients if min_clients is None else min_clients
        self._min_clients, self._round_timeout = min_clients or 1, round_timeout
        self._patience, self._accept_failures = patience, accept_failures
        self._test = tensors(data.test, device)
        self._every, self._clients_every = evaluate_every, evaluate_clients_every
        self.of_clients: dict[int, dict[str, float]] | None = None

    def gather(self, tell: Callable[[str], None], stopped: Callable[[], bool]) -> None:
        """Wait for clients that are elsewhere until enough of them are there to begin, at most `patience` seconds.

        Args:
            tell: Called every now and then with a line about who is missing.
            stopped: Whether to give up.

        Raises:
            TooFewClientsError: Some are missing still.
        """
        start, told = time.monotonic(), -TELL
        while self.grid.elsewhere and not stopped():
            self.gateway.look()
            there, needed = self.gateway.traffic.clients_reachable, self._needed_to_begin
            if there >= needed:
                return
            waited = time.monotonic() - start
            so_far = f"{there} of {self.clients} clients are there"
            if waited >= self._patience:
                enough = "" if needed == self.clients else f", min_clients={needed} are needed"
                raise TooFewClientsError(
                    f"{so_far} after patience={self._patience:g} seconds{enough}: {self._missing()};"
                    f" min_clients={max(1, there)} would begin without them"
                )
            if waited >= told + TELL:
                tell(f"{so_far}, waiting for {self._patience - waited:.0f} seconds more: {self._missing()}")
                told = waited
            time.sleep(WAIT)

    def _missing(self) -> str:
        """Which clients are missing, and why."""
        away = self.grid.turned_away
        there = set(self.grid.get_node_ids()) | {one.client for one in away}
        numbers = [number for number in range(self.clients) if number not in there]
        absent = [f"not online: {listed(numbers)}"] if numbers else []
        return "; ".join([*absent, *(f"turned away: {one}" for one in away)])

    def rounds(self, count: int) -> Iterator[Metrics]:
        """Train up to round `count`, yielding the metrics of every round, of round 0 first.

        Raises:
            TooFewClientsError: Too few clients of a round gave an acceptable reply.
            DivergedError: A round gave values that are not finite.
        """
        if self.round == 0:
            yield self._metrics({}, count == 0)
        while self.round < count:
            reported = self._train()
            yield self._metrics(reported, self.round == count)

    @own_surroundings()
    def _train(self) -> Mapping[str, Any]:
        """One round of training; the metrics that the strategy made of it."""
        start = time.perf_counter()
        number = self.round + 1
        self.whole = False
        try:
            replies = self._replies(number)
        except Exception:
            self.gateway.undo()
            self.whole = True
            raise
        before = _attributes(self.strategy)
        try:
            arrays, metrics = self.server.aggregate_train(number, replies)
            # Flower's adaptive servers answer in float64
            kept = self.arrays if arrays is None else record(vectors(arrays))
            if wrong := out_of_range(vectors(kept) | {BUFFERS: self.gateway.buffers}):
                raise RoundError(f"{wrong} of the server")
        except RoundError as error:
            vars(self.strategy).update(before)
            self.gateway.undo()
            self.whole = True
            raise DivergedError(
                f"round {number} gave values that are not finite or beyond {LARGEST:g} ({error}) and was undone:"
                " lower strategy.lr, or raise sigma and rho where they are set by hand"
            ) from error
        self.gateway.commit()
        self.arrays = kept
        if self.account is not None:
            self.account.round(self.gateway.traffic.clients_failed)
        self._evaluate_on_clients(number)
        self.round, self.whole = number, True
        self.seconds += time.perf_counter() - start
        return metrics or {}

    def _replies(self, number: int) -> list[Message]:
        """Replies of enough clients; the round is begun again while clients are away, not for those that err."""
        gateway, deadline = self.gateway, time.monotonic() + self._patience
        gateway.begin(number)
        while True:
            replies: list[Message] = []
            reachable = len(gateway.get_node_ids())
            if reachable >= self._needed:
                asked = gateway if self.account is None else cast(Grid, _NodesAlone(gateway))
                messages = list(self.server.configure_train(number, self.arrays, ConfigRecord(), asked))
                if self.account is not None:
                    self.account.ask(message.metadata.dst_node_id for message in messages)
                replies = gateway.send_and_receive(messages, timeout=self._round_timeout)
            reason = self._shortage(reachable, number)
            if reason is None:
                return replies
            away = gateway.traffic.silent or reachable < self._needed
            if not away or time.monotonic() >= deadline:
                example = "".join(f"; {failure}" for failure in gateway.failures[:1])
                raise TooFewClientsError(f"{reason}{example}")
            if self.stopping():
                raise StoppedError(reason)
            time.sleep(WAIT)
            gateway.begin_again()

    @property
    def _needed(self) -> int:
        """Replies that the round needs: none if chance drew nobody of those who are there."""
        by_chance = self.gateway.draws_by_chance and self.gateway.traffic.clients_reachable
        return 0 if by_chance and not self.gateway.get_node_ids() else self._min_clients

    def _shortage(self, reachable: int, number: int) -> str | None:
        """Why the replies are not enough for a round, or None."""
        traffic, needed = self.gateway.traffic, self._needed
        if reachable < needed:
            return (
                f"clients that can be reached in round {number}: {reachable}, min_clients={needed} are needed"
            )
        if traffic.clients_failed and not self._accept_failures:
            return f"a client failed in round {number} and accept_failures=false"
        if traffic.clients_ok >= needed:
            return None
        count = f"{traffic.clients_ok} clients" if traffic.clients_ok else "no client"
        more = f", min_clients={needed} are needed" if needed > 1 else ""
        return f"{count} gave an acceptable reply in round {number}{more}"

    def _evaluate_on_clients(self, number: int) -> None:
        """Flower's own evaluation, for a strategy that asks for it."""
        messages = list(self.server.configure_evaluate(number, self.arrays, ConfigRecord(), self.gateway))
        if messages:
            self.server.aggregate_evaluate(number, self.gateway.send_and_receive(messages))

    @own_surroundings()
    def _metrics(self, reported: Mapping[str, Any], last: bool) -> Metrics:
        """This round's line of metrics.jsonl; what the strategy reports beside it is added."""
        found = self._evaluate() if last or self.round % self._every == 0 else {}
        due = self._clients_every is not None and (last or self.round % self._clients_every == 0)
        self.of_clients = self._evaluate_clients() if due else None
        traffic = self.gateway.traffic
        train_loss = traffic.loss_sum / traffic.examples if traffic.examples else found.get(LOSS, math.nan)
        metrics: Metrics = {
            "round": self.round,
            **{metric.key: found[metric.name] for metric in self.task.measures.all if metric.name in found},
            TRAIN_LOSS: train_loss if self.account is None else math.nan,  # of which clients tell nothing
            **({} if self.account is None else self.account.line()),
            "passes": traffic.differentiated / max(1, sum(self.grid.sizes.values())),
            "bytes_up": traffic.bytes_up,
            "bytes_down": traffic.bytes_down,
            "seconds": self.seconds,
            "clients_ok": traffic.clients_ok,
            "clients_failed": traffic.clients_failed,
            "clients_expected": self.clients,
            "clients_reachable": traffic.clients_reachable,
            "clients_turned_away": traffic.clients_turned_away,
        }
        # what Flower's strategies average of the clients' replies is here already
        added = {
            key: value for key, value in reported.items() if key not in (ROUND, CLIENTS_LOSS, DIFFERENTIATED)
        }
        named = {key.replace("-", "_"): value for key, value in added.items()}
        return {key: float(value) for key, value in named.items() if isinstance(value, int | float)} | metrics

    def _evaluate_clients(self) -> dict[int, dict[str, float]]:
        """Metrics of the present weights on every client's own examples; nobody is told, and no bytes are counted."""
        traffic = self.gateway.traffic
        before = traffic.bytes_down
        said = ConfigRecord({ROUND: self.round})
        content = RecordDict({ARRAYS: self.arrays, CONFIG: said})
        messages = [Message(content, node, MessageType.EVALUATE) for node in self.gateway.look()]
        replies = self.gateway.send_and_receive(messages)
        traffic.bytes_down = before
        names = [metric.name for metric in self.task.measures.all]
        found: dict[int, dict[str, float]] = {}
        for reply in replies:
            if reply.has_error():
                continue
            said_by = metrics_of(reply.content)
            if all(isinstance(said_by.get(name), int | float) for name in (EXAMPLES, *names)):
                own = {name: real(said_by, name) for name in names}
                found[reply.metadata.src_node_id] = {"examples": integer(said_by, EXAMPLES), **own}
        return found

    def _evaluate(self) -> dict[str, float]:
        """Mean `loss` and metrics of the server's present weights on the test set."""
        arrays = vectors(self.arrays)
        if len(self.gateway.buffers):
            arrays[BUFFERS] = self.gateway.buffers
        self.load_weights()
        if (found := self.grid.test(arrays, self._round_timeout)) is not None:
            return found
        return self.model.evaluate(self._test, torch.arange(self.data.tests), self.data, TEST_PART)

    @cached_property
    def chance(self) -> float | None:
        """The task's first metric on the test set of whoever always gives the same answer; None: not known."""
        return self.task.chance(self._test[TARGETS])

    @own_surroundings()
    def load_weights(self) -> None:
        """Put the server's present weights and running statistics into the model."""
        weights = vectors(self.arrays, self.model.device)[WEIGHTS]
        self.model.load(weights, self.gateway.buffers.to(self.model.device))
