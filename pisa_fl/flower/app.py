"""The Flower app: `server`, a ServerApp around a run of this package, and `client`, a ClientApp around one client.

Both are made from one configuration, which the launcher sends as the run-config key `hydra`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import http_grid
from omegaconf import DictConfig, OmegaConf

from pisa_fl import runner
from pisa_fl.clients.executor import failure_reason
from pisa_fl.clients.host import CLIENT_FAILED, ClientHost, Clients
from pisa_fl.config import ConfigurationError
from pisa_fl.config.allowed import CLIENT, SIMULATION, check_targets, parsed
from pisa_fl.config.root_keys import problem
from pisa_fl.engines.base import set_threads
from pisa_fl.federation import RunError
from pisa_fl.flower.grid import NODES, FlowerGrid
from pisa_fl.flower.looks import look_soon
from pisa_fl.flower.passes import PassesMade
from pisa_fl.flower.policy import Policy
from pisa_fl.flower.state_file import StateFile, root_of
from pisa_fl.from_config import one_client
from pisa_fl.results import run_directory
from pisa_fl.results.result import Interrupted
from pisa_fl.system.files import cache_folder, write
from pisa_fl.system.resources import memory
from pisa_fl.system.text import visible
from strategies.base.messages import CONFIG

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation, and leave in the run directory how it ended."""
    config = configuration(context)
    set_threads(config.engine.threads)
    directory = Path(str(config.engine.directory))
    if not (directory / run_directory.FLOWER_LOG).is_file():
        raise ConfigurationError(f"{directory} is not to be seen here: start pisa-fl on the SuperLink's host")

    look_soon(http_grid, "pull_objects")
    nodes = os.environ.get(NODES)
    registered = None if nodes is None else Path(nodes)

    def engine(clients: Clients) -> FlowerGrid:
        return FlowerGrid(clients, grid, registered)

    try:
        if config.resume is None:
            runner.begin(_at_home(config, directory), directory, engine, {run_directory.FLOWER_LOG})
        else:
            runner.resume(directory, engine, config.get("allow") or ())
    except (ConfigurationError, RunError, OSError) as error:
        _leave(directory, error)
        raise
    except Interrupted as error:
        _leave(directory, error)


@client.query()
def introduce(message: Message, context: Context) -> Message:
    """Say who this client is."""
    try:
        config = client_configuration(context)
        number = client_number(context)
        host = hosted(OmegaConf.to_yaml(config), number, own_data(context), experiment(config, context))
        data = host.data
        said: dict[str, Any] = {
            "client": number,
            "examples": len(host.clients[number]),
            "version": version("pisa-fl"),
            "shape": list(data.shape),
            "classes": [visible(name) for name in data.output_names],
        }
        return Message(RecordDict({CONFIG: ConfigRecord(said)}), reply_to=message)
    except Exception as error:
        return Message(Error(CLIENT_FAILED, failure_reason(error)), reply_to=message)


@client.train()
@client.evaluate()
def answer(message: Message, context: Context) -> Message:
    """Have this client's host answer, between loading and saving what the client remembers."""
    try:
        config = client_configuration(context)
        number, name = client_number(context), experiment(config, context)
        host = hosted(OmegaConf.to_yaml(config), number, own_data(context), name)
        file = StateFile(config.engine.state, name, number)
        with file.locked():
            host.states[number] = file.load(host.executor.half.kept_sizes()).to(host.device)
            if host.masking is not None:
                host.masking.kept[number] = context.state  # a process may be for one message alone
            with counted(host, number, name):
                (reply,) = host.handle([(number, message)])
            file.save(host.states[number])
        return reply
    except Exception as error:
        return Message(Error(CLIENT_FAILED, failure_reason(error)), reply_to=message)


def configuration(context: Context) -> DictConfig:
    """The run's configuration.

    Raises:
        ConfigurationError: It is none.
    """
    try:
        return parsed(str(context.run_config.get("hydra", "")))
    except ValueError as error:
        raise ConfigurationError(f"the run-config key `hydra` cannot be read: {error}") from error


def client_configuration(context: Context) -> DictConfig:
    """The run's configuration as a client may use it: no more is built, read and written than its owner allows.

    The server's word for where the client keeps its state and its decoded data counts in Flower's simulation alone.

    Raises:
        ConfigurationError: It is not allowed, or is none.
    """
    config = configuration(context)
    if SIMULATION in os.environ:
        return config
    number = client_number(context)
    try:
        check_targets(config, str(context.node_config.get("allow", "")).split(), CLIENT)
        if (words := problem(config)) is not None:
            raise ConfigurationError(words)
        made = PassesMade(root_of(), number).read()
        others = sum(passes for name, passes in made.items() if name != experiment(config, context))
        Policy.of_owner().check(config, own_data(context) is not None, others)
    except ConfigurationError as error:
        raise ConfigurationError(f"client {number}: {error}") from error
    config.engine.state = None
    if config.data.get("cache") is not None:
        config.data.cache = str(cache_folder())
    return config


def _at_home(config: DictConfig, directory: Path) -> DictConfig:
    """The configuration without what the launcher added, for the directory may be moved."""
    config = config.copy()
    config.engine.directory = None
    if config.engine.state == str(directory / "clients"):
        config.engine.state = None
    return config


def client_number(context: Context) -> int:
    """This client's number.

    Raises:
        ConfigurationError: The node does not say.
    """
    number = context.node_config.get("partition-id")
    if type(number) is not int or number < 0:
        raise ConfigurationError(f"node-config needs partition-id, the client's number, and has {number}")
    return number


def own_data(context: Context) -> str | None:
    """The node's own data folder, or None."""
    folder = context.node_config.get("data")
    return None if folder is None else str(folder)


def experiment(config: DictConfig, context: Context) -> str:
    """What the clients' state files are filed under."""
    name = config.engine.experiment
    return f"flower-{context.run_id}" if name is None else str(name)


@contextmanager
def counted(host: ClientHost, number: int, name: str) -> Iterator[None]:
    """Count the passes that are made meanwhile, and have no more made than the client's owner allows.

    Raises:
        ConfigurationError: It is not known how many were made before.
    """
    if SIMULATION in os.environ:
        yield
        return
    made, executor = PassesMade(root_of(), number), host.executor
    executor.allowed, executor.made = Policy.of_owner().left(sum(made.read().values())), 0.0
    try:
        yield
    finally:
        made.add(name, executor.made)


@lru_cache(maxsize=4)
def hosted(text: str, number: int, folder: str | None, name: str) -> ClientHost:
    """A host of one client; in a process that lives on, as in Flower's runner, it is made once.

    Raises:
        ConfigurationError: The configuration is impossible on this machine.
    """
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    set_threads(config.engine.threads)
    largest = None if SIMULATION in os.environ else Policy.of_owner().parameters or affordable()
    clients = one_client(config, number, folder, StateFile(config.engine.state, name, number), largest)
    return clients.host([number], 1, config.engine.chunk)


def affordable() -> int | None:
    """Numbers of a model that this machine can train: weights, gradient, update and one vector of state, in float32."""
    there = memory()
    return None if there is None else there // 16


def _leave(directory: Path, error: Exception) -> None:
    """Tell the launcher why the run ended."""
    if directory.is_dir():
        write(
            directory / run_directory.OUTCOME,
            json.dumps({"kind": type(error).__name__, "reason": str(error)}),
        )
