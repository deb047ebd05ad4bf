"""A client's policy: what its owner allows a run beyond what any configuration may name (`pisa_fl.config.allowed`).

It is a file of the owner's, `policy.toml` beside the client's `start.sh`, or what `$PISA_FL_POLICY` names. Every key is
optional, and says for its part what a run must be; `TEMPLATE` explains them. A client reads it with every message,
and before anything of the message's configuration is built; without a policy that it can read, it takes part in
nothing. What a server says of itself cannot be checked from here: it may claim more clients than there are. What the
client itself does (passes, noise, the files it reads, the model it builds) it also does in no other way.

`pisa-fl-policy CONFIG.yaml [POLICY.toml]` prints the fingerprint of a configuration, and why the policy refuses it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pisa_fl.config import PATHS, ConfigurationError
from pisa_fl.config.allowed import CLIENT, check_targets, nodes, parsed
from pisa_fl.config.explain import first_line
from pisa_fl.config.root_keys import problem

VARIABLE = "PISA_FL_POLICY"
"""Environment variable with the path of the policy; where there is none, there is no policy."""

TEMPLATE = """\
# What this client takes part in, by its owner's word, if this is policy.toml; the server is told why it is turned away.
# Take the # away from what shall hold. It is read with every message. To try it: pisa-fl-policy CONFIG.yaml policy.toml

# experiments = ["0123456789abcdef0123456789abcdef"]  # fingerprints of configurations, as pisa-fl-policy prints them
# data = ["/srv/images"]   # folders, files and sets of the hub (owner/name) that a run may read here; [] for none
# clients = 5              # a federation has so many clients, and begins with no fewer
# passes_per_round = 5     # passes over this client's examples in a round, at most
# passes = 500             # and in all runs together, counted in state/passes-client-*.json
# batch_size = 512         # examples of a mini-batch, at most
# parameters = 10_000_000  # of the model, at most

# [privacy]                # what this client sends goes through this class, with numbers that are no smaller, and words
# target = "pisa_fl.privacy.Local"
# noise = 1.0
# randomness = "system"
"""
"""A policy that allows everything, and says what else it might say."""

FINGERPRINTED = (
    *("seed", "clients", "min_clients", "rounds", "participation", "batch_size"),
    *("data", "partition", "model", "strategy", "task", "privacy", "secure"),
)
"""Keys that what a client does, and what becomes of it, follow from; where files lie is no part of it."""

EPOCHS = ("local_epochs", "head_epochs", "personal_epochs", "local_steps")
"""Keys of client halves that make passes: an epoch is one, and a step at most one."""

SENDING = ("privacy", "strategy.client")
"""Parts that what a client sends goes through."""

SOURCES = ("path", "root", "test", "name")
"""Last parts of keys of data, however deep, of which a client would read files, or a set from a hub or folder."""

TWICE = "strategies.optimizers.Sam"
"""The optimiser that differentiates every example twice."""


@dataclass(frozen=True)
class Policy:
    """What an owner allows; None leaves it open.

    Attributes:
        experiments: Fingerprints of the configurations that are allowed.
        data: Folders, files and sets of the hub that a configuration may have read.
        clients: Clients that a federation must have and begin with, at least.
        passes_per_round: Passes over the client's examples in a round, at most.
        passes: Passes in all, at most.
        batch_size: Examples of a mini-batch, at most.
        parameters: Numbers of the model, at most.
        privacy: `target`, the full name of a class that the client must build, and the least of its numbers, or words.
    """

    experiments: tuple[str, ...] | None = None
    data: tuple[str, ...] | None = None
    clients: int | None = None
    passes_per_round: float | None = None
    passes: float | None = None
    batch_size: int | None = None
    parameters: int | None = None
    privacy: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_owner(cls) -> Policy:
        """The policy of this host's owner.

        Raises:
            ConfigurationError: It cannot be read, or says something that is no policy.
        """
        path = os.environ.get(VARIABLE)
        return cls() if path is None else cls.read(Path(path))

    @classmethod
    def read(cls, path: Path) -> Policy:
        """A policy's file.

        Raises:
            ConfigurationError: It cannot be read, or says something that is no policy.
        """
        try:
            said = tomllib.loads(path.read_text())
            for key, value in said.items():
                if key not in KINDS:
                    raise ValueError(f"there is no key {key}: there are {', '.join(KINDS)}")
                if (words := _objection(key, value)) is not None:
                    raise ValueError(f"{key} must be {words}, got {value}")
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}
            return cls(**values)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"its owner's policy, {path.name}, cannot be read ({first_line(error)})"
            ) from error

    def check(self, config: DictConfig, own_data: bool = False, made: float = 0.0) -> None:
        """Check a configuration, of which nothing is built.

        Args:
            config: As it was sent, without interpolations.
            own_data: Whether the client has data of its own, which are read in place of the configuration's.
            made: Passes that the client has made for other experiments.

        Raises:
            ConfigurationError: It is not allowed.
        """
        for why in (
            self._of_experiment(config),
            self._of_data(config, own_data),
            self._of_clients(config),
            self._of_passes(config, made),
            self._of_batches(config),
            self._of_privacy(config),
        ):
            if why is not None:
                raise ConfigurationError(f"its owner allows {why}")

    def left(self, made: float) -> float | None:
        """Passes that a round may have.

        Args:
            made: Passes that were made so far.
        """
        limits = [self.passes_per_round, None if self.passes is None else max(0.0, self.passes - made)]
        return min((limit for limit in limits if limit is not None), default=None)

    def _of_experiment(self, config: DictConfig) -> str | None:
        if self.experiments is None or (this := fingerprint(config)) in self.experiments:
            return None
        return (
            f"the experiments {', '.join(self.experiments) or 'of an empty list'} alone, and this is {this}"
        )

    def _of_data(self, config: DictConfig, own_data: bool) -> str | None:
        if self.data is None:
            return None
        places = [Path(os.path.realpath(Path(folder).expanduser())) for folder in self.data]
        own = ("data.path" if "path" in config.data else "data.root") if own_data else None
        for key, value in _paths(config):
            if key != own and value not in self.data and not any(_lies_in(value, p) for p in places):
                return (
                    f"nothing to be read outside {', '.join(self.data) or 'its own data'}, and {key}={value}"
                )
        return None

    def _of_clients(self, config: DictConfig) -> str | None:
        if self.clients is None:
            return None
        for key in ("clients", "min_clients"):
            if config[key] is not None and config[key] < self.clients:
                return f"federations of at least {self.clients} clients, and {key}={config[key]}"
        return None

    def _of_passes(self, config: DictConfig, made: float) -> str | None:
        if self.passes_per_round is None and self.passes is None:
            return None
        each = passes(config)
        if self.passes_per_round is not None and each > self.passes_per_round:
            return f"{self.passes_per_round:g} passes a round, and this makes {each:g}"
        if self.passes is not None and made + config.rounds * each > self.passes:
            before = f" after {made:g} for others" if made else ""
            return f"{self.passes:g} passes in all, and this makes {config.rounds * each:g}{before}"
        return None

    def _of_batches(self, config: DictConfig) -> str | None:
        if self.batch_size is None or config.batch_size <= self.batch_size:
            return None
        return f"mini-batches of {self.batch_size} examples, and batch_size={config.batch_size}"

    def _of_privacy(self, config: DictConfig) -> str | None:
        if not self.privacy:
            return None
        for part in SENDING:
            for _, node in nodes(part, _plain(OmegaConf.select(config, part))):
                if isinstance(node, Mapping) and self._is_private(node):
                    return None
        asked = [f"{key} {value}" for key, value in self.privacy.items() if key != "target"]
        return f"nothing to be sent but through {self.privacy['target']} with {', '.join(asked) or 'any numbers'}"

    def _is_private(self, node: Mapping[Any, Any]) -> bool:
        """Whether a node names the owner's class, with numbers no smaller than the owner's, and the same words."""
        for key, value in self.privacy.items():
            there = node.get("_target_" if key == "target" else key)
            if not (_number(there) and there >= value if _number(value) else there == value):
                return False
        return True


def fingerprint(config: DictConfig) -> str:
    """What an experiment is known by: 32 hexadecimal digits of the SHA-256 of what clients do and why.

    Args:
        config: A configuration without interpolations, as it is sent, printed (`--cfg job --resolve`) and written to
            a run directory.
    """
    parts = {key: _plain(OmegaConf.select(config, key)) for key in FINGERPRINTED}
    for path in PATHS:
        group, _, key = path.partition(".")
        if isinstance(part := parts.get(group), dict) and isinstance(part.get(key), str):
            del part[key]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def passes(config: DictConfig) -> float:
    """Passes over a client's examples that a configuration speaks of, a round; at least one.

    Raises:
        ConfigurationError: It speaks of something else.
    """
    epochs, times = 0.0, 1
    for key, value in nodes("", OmegaConf.to_container(config.strategy.client)):
        name = key.rpartition(".")[2]
        if name in EPOCHS:
            if not _number(value) or value < 0:
                raise ConfigurationError(f"strategy.client.{key}={value} is no number of passes")
            epochs += value
        if name == "_target_" and value == TWICE:
            times = 2
    return max(1.0, epochs) * times


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _paths(config: DictConfig) -> Iterator[tuple[str, str]]:
    """Keys and values of what a client would take for a file or folder, or might."""
    for part in CLIENT:
        for key, value in nodes(part, _plain(OmegaConf.select(config, part))):
            if not isinstance(value, str | bytes | os.PathLike) or key.endswith("._target_"):
                continue
            if key == "data.cache":  # which is where the owner says
                continue
            value = os.fsdecode(value)
            leads = os.path.isabs(value) or value.startswith("~") or ".." in Path(value).parts
            source = part == "data" and key.rpartition(".")[2] in SOURCES
            if key in PATHS or leads or source:
                yield key, value


def _lies_in(value: str, place: Path) -> bool:
    """Whether a path, with all links followed, leads to a place or below it."""
    try:
        return Path(os.path.realpath(Path(value).expanduser())).is_relative_to(place)
    except (ValueError, RuntimeError, OSError):  # a null character, an unknown user
        return False


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


# --- the file


def _objection(key: str, value: Any) -> str | None:
    """What a key's value must be if it is not that."""
    if key == "privacy":
        fits = isinstance(value, dict) and isinstance(value.get("target"), str)
        fits = fits and all(_number(one) or isinstance(one, str) for one in value.values())
        return None if fits else "a table with target, the full name of a class, and numbers or words"
    if key in ("experiments", "data"):
        fits = isinstance(value, list) and all(isinstance(one, str) and one for one in value)
        return None if fits else "texts in a list"
    if key in ("passes_per_round", "passes"):
        return None if _number(value) and value >= 0 else "a number of at least 0"
    return None if type(value) is int and value >= 1 else "a whole number of at least 1"


KINDS = tuple(one.name for one in fields(Policy))
"""Keys of a policy."""


def main() -> None:
    """Entry point of `pisa-fl-policy`."""
    parser = argparse.ArgumentParser(
        prog="pisa-fl-policy",
        description="Prints the fingerprint of an experiment, and says whether a client's policy allows it.",
    )
    parser.add_argument(
        "config", type=Path, help="of a run directory, or as `pisa-fl ... --cfg job --resolve` prints it"
    )
    parser.add_argument("policy", type=Path, nargs="?", help="policy.toml of a client")
    parser.add_argument(
        "--own-data", action="store_true", help="the client is started with a folder of its own"
    )
    parser.add_argument("--allow", nargs="*", default=[], help="packages that the client is started to allow")
    arguments = parser.parse_args()
    try:
        try:
            config = parsed(arguments.config.read_text())
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{arguments.config} cannot be read: {first_line(error)}") from error
        try:
            check_targets(config, arguments.allow, CLIENT)
            if (words := problem(config)) is not None:
                raise ConfigurationError(words)
            print(fingerprint(config))
            if arguments.policy is not None:
                Policy.read(arguments.policy).check(config, arguments.own_data)
        except ConfigurationError:
            raise
        except Exception as error:  # whatever a stranger's values make the checks raise
            raise ConfigurationError(
                f"{arguments.config} is no configuration of a run: {first_line(error)}"
            ) from error
    except ConfigurationError as error:
        print(f"pisa-fl-policy: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
