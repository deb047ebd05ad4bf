"""From a configuration to objects: a whole federation, one client of a real one, or what watches a run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf, open_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import partitioners
from partitioners import Partition
from pisa_fl.checkpoint import known_identity
from pisa_fl.clients.host import Clients
from pisa_fl.config import ConfigurationError, blaming, build, resolve, settle
from pisa_fl.config.explain import explain
from pisa_fl.data.data_set import DataSet
from pisa_fl.data.hold_out import hold_out
from pisa_fl.data.validation import Fraction, Validation
from pisa_fl.engines.base import ClientGrid, is_child
from pisa_fl.federation import Federation, seeded
from pisa_fl.identity import Identity, expected, of_deal, of_settings, of_tensors, of_weights
from pisa_fl.models.limit import at_most
from pisa_fl.privacy import Privacy
from pisa_fl.results.console import Display
from pisa_fl.results.observer import Observer, Observers
from pisa_fl.results.pictures import Curves, PartitionPicture
from pisa_fl.results.recorder import Recorder
from pisa_fl.secure.summing import SecAgg
from pisa_fl.system.surroundings import own_surroundings
from pisa_fl.tasks import Task
from strategies import ClientHalf, Layout
from strategies.base import checks

log = logging.getLogger(__name__)

Engine = Callable[[Clients], ClientGrid]
"""Makes the grid that reaches the clients from what they are made of."""


@runtime_checkable
class Partitioner(Protocol):
    """What deals examples: anything like `flwr_datasets`' class of this name, whose import takes a second."""

    def load_partition(self, partition_id: int) -> Any:
        """The examples of a client."""


class Kept(Protocol):
    """Where a client keeps which part of a data set it has, as `flower.state_file.StateFile` does."""

    def rows(self, source: str, deal: Callable[[], NDArray[np.integer]]) -> NDArray[np.integer]:
        """Positions of the client's examples in what `source` tells of, dealt once."""


@own_surroundings()
def prepare(config: DictConfig, engine: Engine | None = None, run: Path | None = None) -> Federation:
    """Build everything a configuration names, without writing anything.

    Args:
        config: As `compose` gives it; it is resolved here.
        engine: In place of the configuration's.
        run: Directory of the run to go on with: deal and initial weights are those that it holds.

    Raises:
        ConfigurationError: Something in it is impossible or missing, or not as it was when the run began.
    """
    config = settle(config)
    if is_child():
        torch.set_num_threads(1)  # building a model may not use several
    try:
        known = None if run is None else known_identity(run / "checkpoint", config.run_id)
        own = engine or (lambda clients: build(config.engine, ClientGrid, clients=clients))
        return _prepare(config, own, Identity(known), run)
    except (ValueError, OSError) as error:
        raise ConfigurationError(explain(error)) from error


def _prepare(config: DictConfig, engine: Engine, identity: Identity, run: Path | None) -> Federation:
    identity.note(of_settings(config))
    data = _data(config)
    identity.note({"data": data.digest})
    partition: Partition = []
    noise_std = None
    if deals(config):
        partitioner = build(config.partition, Partitioner)
        if run is not None and (dealt := run / "partition.json").is_file():
            with expected("deal"):
                partition = partitioners.load(dealt)
        else:
            partition = _deal(config, partitioner, data)
        if len(partition) != config.clients:
            raise ConfigurationError(
                f"partition deals to {len(partition)} clients but clients={config.clients}:"
                f" set clients={len(partition)}"
            )
        noise_std = getattr(partitioner, "noise_std", None)
    elif config.data.get("validation"):
        raise ConfigurationError(
            f"data.validation={config.data.validation:g} does not go with partition=own: what clients bring is theirs"
        )
    elif data.fitted:
        raise ConfigurationError(
            "partition=own does not go with these data: every client would fill and scale them by its own rows, and"
            " have columns of its own; deal one table, or give a data set of yours that is scaled alike everywhere"
        )
    noise = {client: noise_std(client) for client in range(len(partition))} if noise_std else {}
    identity.note(of_deal(partition, noise))
    task = build(config.task, Task)
    _check_targets(config, task)
    model, layout = _model(config, data)
    identity.note(of_tensors(model))
    if run is not None and (initial := run / "initial.safetensors").is_file():
        with expected("weights"):
            _initialise(model, initial)
    elif config.init is not None:
        _initialise(model, Path(config.init))
    identity.note(of_weights(model))
    device = _device(str(config.device))
    server = build(config.strategy.server, Strategy, layout=layout, seed=config.seed, device=device)
    with blaming(config.strategy.server):
        checks.flowers_own(server)
    half = build(config.strategy.client, ClientHalf, layout=layout, seed=config.seed)
    if half.personal and config.evaluate_clients_every is None:
        log.warning(
            "clients have weights of their own, of which only evaluate_clients_every=N says something: what is said of"
            " the test set is of the weights that the server has"
        )
    privacy = _privacy(config)
    federation = Federation(
        data,
        partition,
        model,
        server,
        half,
        engine,
        seed=config.seed,
        batch_size=config.batch_size,
        participation=config.participation,
        device=device,
        noise_std=noise_std,
        clients=config.clients,
        min_clients=config.min_clients,
        round_timeout=config.round_timeout,
        patience=config.patience,
        accept_failures=config.accept_failures,
        max_update=config.max_update,
        task=task,
        client_test=config.data.get("client_test", 0),
        evaluate_every=config.evaluate_every,
        evaluate_clients_every=config.evaluate_clients_every,
        privacy=privacy,
        secure=None if (secure := config.get("secure")) is None else SecAgg(secure.threshold, secure.shares),
    )
    federation.identity = identity.parts
    return federation


@own_surroundings()
def one_client(
    config: DictConfig, number: int, folder: str | None, file: Kept, largest: int | None = None
) -> Clients:
    """What one client of a real federation is made of, on its own machine.

    Args:
        config: Configuration of the run.
        number: Client number.
        folder: The client's own data folder; None takes its part of the configuration's data set.
        file: Where it keeps which part that is, so that it is dealt only once.
        largest: Numbers of the model, at most; None: any number.

    Raises:
        ConfigurationError: Something is impossible or missing here.
    """
    config = resolve(config)
    try:
        own = not deals(config)
        if own != (folder is not None):
            raise ConfigurationError(
                "partition=own and `data` in the node-config go together: one is there without the other"
            )
        if folder is not None:
            config.data[_folder_key(config)] = folder
        data = _data(config)
        noise: dict[int, float] = {}
        rows: NDArray[np.integer]
        if own:
            rows = np.arange(len(data.groups))
        else:
            partitioner = build(config.partition, Partitioner)
            labels = hashlib.sha256(data.groups.tobytes()).hexdigest()
            source = OmegaConf.to_yaml(config.data) + OmegaConf.to_yaml(config.partition) + labels
            rows = file.rows(source, lambda: _share(_deal(config, partitioner, data), number))
            if hasattr(partitioner, "noise_std"):
                noise = {number: partitioner.noise_std(number)}
        with at_most(largest):
            model, layout = _model(config, data)
        half = build(config.strategy.client, ClientHalf, layout=layout, seed=config.seed)
        device = _device(str(config.device))
        task = build(config.task, Task)
        rows, tests = hold_out(rows, data.groups, config.data.get("client_test", 0), config.seed, number)
        return Clients(
            *(data, {number: rows}, model, half, config.seed, config.batch_size, device, noise, task),
            {number: tests},
            privacy=_privacy(config),
            secure=config.get("secure") is not None,
        )
    except (ValueError, OSError) as error:
        raise ConfigurationError(f"client {number}: {explain(error)}") from error


@own_surroundings()
def trained(config: DictConfig, weights: Path) -> nn.Module:
    """The configuration's model with the weights of a file, on the CPU, in evaluation mode.

    Raises:
        ConfigurationError: The data set or the model cannot be built, or the weights are of another model.
    """
    try:
        model, _ = _model(config, _data(config))
        _load(model, weights, str(weights))
        return model.eval()
    except (ValueError, OSError) as error:
        raise ConfigurationError(explain(error)) from error


def _data(config: DictConfig) -> DataSet:
    """The data set, as it is trained and measured on; what is said of that is not for its loader."""
    node = config.data.copy()
    with open_dict(node):
        node.pop("client_test", None)
        validation, fraction = node.pop("validation", 0), node.pop("fraction", 1)
    data: DataSet = build(node, DataSet)
    with blaming(config.data):
        if fraction < 1:
            data = Fraction(data, fraction, config.seed)
        if validation:
            data = Validation(data, validation, config.seed)
    return data


def observers(config: DictConfig, directory: Path | None) -> Observers:
    """What watches a run.

    Args:
        config: Settled.
        directory: Run directory; None writes none.

    Raises:
        ConfigurationError: A tracker is impossible, or needs a package that is not installed.
    """
    display, chosen = Display(config.progress), trackers(config)
    if directory is None:
        return Observers([display, *chosen])
    kept = config.checkpoint
    recorder = Recorder(directory, kept.every, kept.keep, kept.get("best", False))
    curves = Curves(directory / "curves.png", config.redraw)
    return Observers([recorder, display, PartitionPicture(directory / "partition.png"), curves, *chosen])


def _privacy(config: DictConfig) -> Privacy | None:
    """What is done so that others learn little of clients' data; None: nothing.

    Raises:
        ConfigurationError: It is impossible.
    """
    node = config.get("privacy")
    if node is None:
        return None
    if not isinstance(node, DictConfig):
        raise ConfigurationError(
            f"privacy must be a group of keys, got {node}: choose one by its name, as in privacy=central"
        )
    privacy: Privacy = build(node, Privacy, seed=config.seed)
    if privacy.random.kind == "system" and config.checkpoint.every != 1:
        raise ConfigurationError(
            "privacy.randomness=system draws anew what is done again after an interruption, and each time counts: set"
            " checkpoint.every=1"
        )
    return privacy


def trackers(config: DictConfig) -> list[Observer]:
    """The trackers of a configuration, which have done nothing yet.

    Raises:
        ConfigurationError: One is impossible, or needs a package that is not installed.
    """
    if "_target_" in config.tracker:
        raise ConfigurationError(
            f"tracker._target_={config.tracker._target_}: a tracker's file gives it a name, as in"
            f" `mine: {{_target_: {config.tracker._target_}}}`, so that there can be several"
        )
    for name, node in config.tracker.items():
        if not isinstance(node, DictConfig):
            raise ConfigurationError(f"tracker.{name} must be keys with a _target_, got {node}")
    return [build(node, Observer) for node in config.tracker.values()]


def _check_targets(config: DictConfig, task: Task) -> None:
    """Check that targets can be reached.

    Raises:
        ConfigurationError: One is more than the task's first metric can be.
    """
    quality = task.measures.quality
    if quality.most is not None and max(config.targets, default=0.0) > quality.most:
        raise ConfigurationError(
            f"targets must be values of {quality.name}, at most {quality.most:g}, in a list, such as"
            f" [{0.9 * quality.most:g}], got {list(config.targets)}"
        )


def deals(config: DictConfig) -> bool:
    """Whether the configuration deals examples to clients; with partition=own they bring theirs."""
    return "_target_" in config.partition


def _folder_key(config: DictConfig) -> str:
    """The key of the data set's folder.

    Raises:
        ConfigurationError: The data set has none.
    """
    for key in ("path", "root"):
        if key in config.data:
            return key
    raise ConfigurationError(
        "data has neither path nor root, so partition=own cannot put the node's folder there"
    )


def _deal(config: DictConfig, partitioner: Any, data: DataSet) -> Partition:
    with blaming(config.partition):
        partition = partitioners.deal(partitioner, data.groups)
    dealt, given = sum(map(len, partition)), len(data.groups)
    if dealt < given:
        log.warning("partition deals %d of %d training examples: the others are used by nobody", dealt, given)
    return partition


def _share(partition: Partition, number: int) -> NDArray[np.integer]:
    """One client's part.

    Raises:
        ConfigurationError: There is no such client.
    """
    if number >= len(partition):
        raise ConfigurationError(
            f"partition-id={number} in the node-config is none of 0 to {len(partition) - 1}"
        )
    return partition[number]


def _model(config: DictConfig, data: DataSet) -> tuple[nn.Module, Layout]:
    given = {"shape": data.shape, "classes": len(data.output_names)}
    model = seeded(config.seed, lambda: build(config.model, nn.Module, **given))
    return model, Layout.of_parameters(model)


def _device(name: str) -> torch.device:
    """The device by name.

    Raises:
        ConfigurationError: It does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigurationError(
                f"device={name} asks for a GPU and there are {torch.cuda.device_count()}:"
                " use device=auto or device=cpu"
            )
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise ConfigurationError(
            f"device={name} is no device that PyTorch can use here: use auto, cpu or cuda"
        ) from None
    return device


def _initialise(model: nn.Module, path: Path) -> None:
    """Load initial weights.

    Raises:
        ConfigurationError: There is no such file, or it is of another model, or holds what are no weights.
    """
    _load(model, path, f"init={path}")


def _load(model: nn.Module, path: Path, said: str) -> None:
    """Load weights.

    Args:
        model: Whose they become.
        path: A safetensors file.
        said: How errors name it.

    Raises:
        ConfigurationError: There is no such file, or it is of another model, or holds what are no weights.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ConfigurationError(f"{said} is no file: give the path of a .safetensors file")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"{said} cannot be read as safetensors: {error}") from error
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise ConfigurationError(
                f"{said} is of another model: {name} is {found} there and {tuple(tensor.shape)} in the model"
            )
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            raise ConfigurationError(
                f"{said} is of another model: {name} is {tensors[name].dtype} there and {tensor.dtype} in the"
                " model"
            )
        if not tensors[name].to(tensor.dtype).isfinite().all():
            raise ConfigurationError(f"{said} holds numbers in {name} that are not finite in {tensor.dtype}")
    if extra := sorted(tensors.keys() - own.keys()):
        raise ConfigurationError(f"{said} is of another model: it holds {extra[0]}, which the model lacks")
    model.load_state_dict(tensors)
