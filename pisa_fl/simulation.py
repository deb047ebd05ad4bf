"""One run: a configuration becomes a federation, its rounds, and a run directory."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import partitioners
from pisa_fl import rundir
from pisa_fl.checkpoint import load_checkpoint, save_checkpoint
from pisa_fl.config import ConfigurationError, build, check, explain
from pisa_fl.federation import Federation, TooFewClientsError, seeded
from pisa_fl.plots import draw_curves
from pisa_fl.progress import Display, show_summary
from pisa_fl.rundir import Metrics
from strategies import Layout


@dataclass(frozen=True)
class Result:
    """What a run gives back.

    Attributes:
        metrics: The lines of metrics.jsonl.
        summary: The contents of summary.json.
        model: The trained model.
        directory: The run directory, or None if nothing was written.
    """

    metrics: list[Metrics]
    summary: dict[str, Any]
    model: nn.Module
    directory: Path | None


class Interrupted(Exception):
    """The run was asked to stop, by Ctrl-C or SIGTERM, and has left a checkpoint."""


def prepare(config: DictConfig) -> Federation:
    """Build everything a configuration names, without writing anything.

    Raises:
        ConfigurationError: Something in it is impossible or missing.
    """
    try:
        check(config)
        return _prepare(config)
    except (ValueError, OSError) as error:
        raise ConfigurationError(explain(error)) from error


def _prepare(config: DictConfig) -> Federation:
    device = _device(str(config.device))
    data = build(config.data)
    partitioner = build(config.partition)
    partition = partitioners.deal(partitioner, data.train_labels)
    model = seeded(config.seed, lambda: build(config.model, shape=data.shape, classes=len(data.classes)))
    if config.init is not None:
        _initialise(model, Path(config.init))
    layout = Layout.of_parameters(model)
    return Federation(
        data,
        partition,
        model,
        build(config.strategy.server, layout=layout, seed=config.seed),
        build(config.strategy.client, layout=layout, seed=config.seed),
        lambda clients: build(config.engine, clients=clients),
        seed=config.seed,
        batch_size=config.batch_size,
        participation=config.participation,
        device=device,
        noise_std=getattr(partitioner, "noise_std", None),
        min_clients=config.min_clients,
        round_timeout=config.round_timeout,
        patience=config.patience,
        accept_failures=config.accept_failures,
    )


def run(config: DictConfig, directory: Path | str | None = None) -> Result:
    """Run a federation from its configuration.

    Args:
        config: Resolved configuration, as `compose` gives it.
        directory: Run directory, made if it is not there; None writes nothing.

    Raises:
        ConfigurationError: Before anything is written, if the configuration is impossible.
        OSError: A file cannot be written.
        TooFewClientsError: Too few clients of a round gave an acceptable reply; a checkpoint was written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written if there is a directory.
    """
    if config.resume is not None:
        return resume(Path(str(config.resume)))
    federation = prepare(config)
    path = None if directory is None else Path(directory)
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        _write_start(federation, config, path)
    return _run(federation, config, path, [])


def resume(directory: Path) -> Result:
    """Go on with an interrupted run, in its directory and with its configuration.

    Raises:
        ConfigurationError: It is no run directory, or holds no whole checkpoint.
    """
    if not (directory / "config.yaml").is_file():
        raise ConfigurationError(f"resume: {directory} is not a run directory, it has no config.yaml")
    try:
        config = OmegaConf.load(directory / "config.yaml")
    except Exception as error:  # whatever the file makes the YAML parser raise
        raise ConfigurationError(f"resume: {directory}/config.yaml cannot be read") from error
    if not isinstance(config, DictConfig):
        raise ConfigurationError(f"resume: {directory}/config.yaml cannot be read as a configuration")
    federation = prepare(config)
    load_checkpoint(federation, directory / "checkpoint")
    rundir.rewind(directory, federation.round or -1)  # the untrained model is measured again
    metrics = rundir.read_metrics(directory)
    return _run(federation, config, directory, metrics)


def _run(federation: Federation, config: DictConfig, path: Path | None, metrics: list[Metrics]) -> Result:
    with (
        closing(federation.grid),
        Display(config.name, config.rounds, federation.round, config.progress) as display,
        _stop_signals() as stop,
        _last_failures(federation, config, path),
    ):
        for line in federation.rounds(config.rounds):
            metrics.append(line)
            display.show(line)
            if path is not None:
                _write_round(federation, line, path)
            finished = federation.round == config.rounds
            if path is not None and (stop or finished or federation.round % config.checkpoint.every == 0):
                save_checkpoint(federation, path / "checkpoint", config.checkpoint.keep)
            if stop and not finished:
                where = f"; go on with: pisa-fl resume={path}" if path is not None else ""
                raise Interrupted(f"stopped after round {federation.round} of {config.rounds}{where}")
    federation.load_weights()
    summary = rundir.summarise(metrics, config.targets, config.seed)
    if path is not None:
        _write_end(federation, config, metrics, summary, path)
        show_summary(summary, str(path))
    return Result(metrics, summary, federation.model.module, path)


def _write_start(federation: Federation, config: DictConfig, path: Path) -> None:
    rundir.write_config(path / "config.yaml", config)
    partitioners.save(federation.partition, path / "partition.json")
    data = federation.data
    partitioners.draw(federation.partition, data.train_labels, data.classes, path / "partition.png")
    rundir.write_weights(path / "initial.safetensors", federation.model.state_dict())


def _write_round(federation: Federation, line: Metrics, path: Path) -> None:
    rundir.append_line(path / "metrics.jsonl", line)
    _write_failures(federation, federation.round, path)


def _write_failures(federation: Federation, round_number: int, path: Path) -> None:
    for failure in federation.gateway.failures:
        line = {"round": round_number} | {key: value for key, value in asdict(failure).items() if value != ""}
        rundir.append_line(path / "failures.jsonl", line)


@contextmanager
def _last_failures(federation: Federation, config: DictConfig, path: Path | None) -> Iterator[None]:
    """A round that ends the run for want of replies has no metrics, but leaves its failures and a checkpoint."""
    try:
        yield
    except TooFewClientsError:
        if path is not None:
            _write_failures(federation, federation.round + 1, path)
            save_checkpoint(federation, path / "checkpoint", config.checkpoint.keep)
        raise


def _write_end(
    federation: Federation, config: DictConfig, metrics: list[Metrics], summary: dict[str, Any], path: Path
) -> None:
    rundir.write_weights(path / "model.safetensors", federation.model.state_dict())
    rundir.write_summary(path / "summary.json", summary)
    rundir.write_events(path, metrics)
    draw_curves(metrics, config.name, path / "curves.png")


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
        ConfigurationError: There is no such file, or it is of another model.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"init={path} cannot be read as safetensors: {error}") from error
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise ConfigurationError(
                f"init={path} is of another model: {name} is {found} there and {tuple(tensor.shape)} in the model"
            )
    if extra := sorted(tensors.keys() - own.keys()):
        raise ConfigurationError(
            f"init={path} is of another model: it holds {extra[0]}, which the model lacks"
        )
    model.load_state_dict(tensors)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """While it lasts, Ctrl-C and SIGTERM are noted in the list, and a second one ends the process at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, as in some notebooks: signals stay as they are
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
