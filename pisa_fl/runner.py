"""One run: a configuration becomes a federation and its rounds, and what watches them is told."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import nn

from pisa_fl.checkpoint import checkpoints, load_checkpoint
from pisa_fl.config import ConfigurationError, build, own_folders, own_modules, settle
from pisa_fl.config.allowed import check_targets
from pisa_fl.config.builder import makes
from pisa_fl.config.explain import explain
from pisa_fl.engines.base import Launcher
from pisa_fl.federation import Federation, RunError, StoppedError
from pisa_fl.from_config import Engine, deals, observers, prepare, trained
from pisa_fl.identity import run_id
from pisa_fl.metric import Metrics
from pisa_fl.results import claim, run_directory
from pisa_fl.results.observer import Observers, Run
from pisa_fl.results.result import Interrupted, Result
from pisa_fl.system.files import write
from pisa_fl.system.signals import stop_signals

log = logging.getLogger(__name__)


def run(config: DictConfig, directory: Path | str | None = None, engine: Engine | None = None) -> Result:
    """Run a federation from its configuration.

    Args:
        config: As `compose` gives it; it is resolved here.
        directory: Run directory, made if it is not there; None writes nothing.
        engine: In place of the configuration's.

    Raises:
        ConfigurationError: Before anything is written, if the configuration is impossible or the directory holds a run.
        OSError: Before anything is written, if there is no room for what clients are to remember.
        RunError: Too few clients of a round gave an acceptable reply (a checkpoint was written), the engine failed, or
            a file cannot be written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written if there is a directory.
    """
    path = None if directory is None else Path(directory)
    config = settle(config)
    if config.resume is not None:
        return resume(Path(str(config.resume)), engine, config.get("allow") or ())
    if engine is None and (launcher := _launcher(config)):
        return launcher.launch(config, path)
    return begin(config, path, engine)


def begin(
    config: DictConfig, path: Path | None, engine: Engine | None, beside: Collection[str] = ()
) -> Result:
    """Run a new federation; as `run`, in a directory that may hold the files `beside`."""
    with claim.claimed(path):
        if path is not None:
            claim.check_free(path, beside)
        watching = observers(config, path)
        federation = prepare(config, engine)
        with _begun(path, config):
            return _run(federation, config, path, [], watching)


def _launcher(config: DictConfig) -> Launcher | None:
    """Who runs the federation, if it is not this process."""
    launcher: Launcher | None = None
    try:
        if "_target_" in config.engine and makes(config.engine, Launcher):
            launcher = build(config.engine, Launcher)
    except ValueError as error:
        raise ConfigurationError(explain(error)) from error
    if not deals(config) and (launcher is None or not launcher.real_clients):
        raise ConfigurationError("partition=own needs real clients: engine=flower engine.connection=NAME")
    return launcher


def resume(
    directory: Path | str,
    engine: Engine | None = None,
    allow: Collection[str] = (),
    rounds: int | None = None,
) -> Result:
    """Go on with an interrupted run, or for more rounds with a finished one, in its directory and as it is configured.

    One that was interrupted before its first checkpoint begins again.

    Args:
        directory: The run directory.
        engine: In place of the configuration's.
        allow: Packages of which its configuration may have anything built, beside what
            `pisa_fl.config.allowed` lists and the modules of a `--config-dir`.
        rounds: That it is to have from now on; None: as many as before. What was planned over the rounds of before, a
            schedule of lr, ends where it did.

    Raises:
        ConfigurationError: It is no run directory, has something built that is not allowed, holds no whole checkpoint,
            or something is not as it was when the run began.
    """
    directory = Path(directory).absolute()
    config = stored(directory, "resume", allow)
    if rounds is not None and rounds != config.rounds:
        config.rounds = rounds
        config = settle(config)
        with claim.claimed(directory):
            _prolong(directory, rounds)
    if engine is None and (launcher := _launcher(config)):
        return launcher.launch(config, directory, resume=True)
    with claim.claimed(directory), _begun(directory, config):
        watching = observers(config, directory)
        federation = prepare(config, engine, directory)
        try:
            if not load_checkpoint(federation, directory / "checkpoint"):
                _check_begun_lately(federation, config, directory)
            if config.rounds < federation.round:
                raise ConfigurationError(
                    f"resume: rounds={config.rounds} in {directory}/config.yaml is less than the {federation.round}"
                    " rounds that are done: set it to these or more"
                )
            last = federation.round or -1  # the untrained model is measured again
            metrics = run_directory.rewind(directory, last, config.run_id)
            federation.of_clients = run_directory.of_clients(directory, federation.round)
            quality = federation.task.measures.quality
            run_directory.check_numbers(directory, metrics, quality)
            if config.rounds == federation.round and metrics and quality.key not in metrics[-1]:
                raise ConfigurationError(
                    f"resume: rounds={config.rounds} in {directory}/config.yaml ends with a round that was not"
                    f" evaluated (evaluate_every={config.evaluate_every}): set it to {config.rounds + 1} or more"
                )
        except BaseException:
            federation.grid.close()
            raise
        return _run(federation, config, directory, metrics, watching)


def load_model(
    directory: Path | str, round_number: int | None = None, allow: Collection[str] = (), *, best: bool = False
) -> nn.Module:
    """The trained module of a run directory, on the CPU, in evaluation mode.

    Weights are read from safetensors, and nothing is built that `resume` would not build. The run's data set is needed
    for the shapes of its inputs and outputs.

    Args:
        directory: The run directory.
        round_number: Of the checkpoint whose model it is; None: the end.
        allow: As `resume`.
        best: Whether it is that of the best round so far, which `checkpoint.best=true` keeps.

    Raises:
        ConfigurationError: It is no run directory, has something built that is not allowed, or has no such model.
    """
    path = Path(directory).absolute()
    if best:
        if round_number is not None:
            raise ConfigurationError("load_model: give round_number or best, not both")
        if not (path / run_directory.BEST).is_file():
            raise ConfigurationError(
                f"load_model: {path} has no {run_directory.BEST}: checkpoint.best=true keeps it"
            )
        return trained(stored(path, "load_model", allow), path / run_directory.BEST)
    config = stored(path, "load_model", allow)
    folders = {int(own.name.removeprefix("round-")): own for own in checkpoints(path / "checkpoint")}
    folder = path if round_number is None else folders.get(round_number)
    if folder is None or not (folder / "model.safetensors").is_file():
        kept = ", ".join(map(str, folders)) or "none"
        wanted = "at its end" if round_number is None else f"of round {round_number}"
        raise ConfigurationError(
            f"load_model: {path} has no model {wanted}; there are checkpoints of rounds: {kept} (checkpoint.every and"
            " checkpoint.keep say which are kept)"
        )
    return trained(config, folder / "model.safetensors")


def stored(directory: Path, what_for: str, allow: Collection[str]) -> DictConfig:
    """The configuration in a run directory.

    Args:
        directory: The run directory.
        what_for: What reads it, as errors say.
        allow: Packages of which it may have anything built.

    Raises:
        ConfigurationError: There is none, or one of another version, or that has something built that is not allowed.
    """
    if not (directory / "config.yaml").is_file():
        raise ConfigurationError(f"{what_for}: {directory} is not a run directory, it has no config.yaml")
    try:
        config = OmegaConf.load(directory / "config.yaml")
    except Exception as error:  # whatever the file makes the YAML parser raise
        raise ConfigurationError(f"{what_for}: {directory}/config.yaml cannot be read") from error
    if not isinstance(config, DictConfig):
        raise ConfigurationError(f"{what_for}: {directory}/config.yaml cannot be read as a configuration")
    if "run_id" not in config:
        raise ConfigurationError(
            f"{what_for}: {directory} was written by another version of pisa-fl, which gave runs no run_id: go on with"
            " that version, or begin a run anew in another directory"
        )
    config.allow = sorted({*allow, *own_modules()})  # of this command, and not of the file
    try:
        check_targets(config, config.allow)
    except ConfigurationError as error:
        folders = "".join(
            f", or give --config-dir {folder} if you trust that" for folder in own_folders(config)
        )
        raise ConfigurationError(f"{what_for}: {directory}/config.yaml: {error}{folders}") from error
    try:
        return settle(config)
    except ConfigurationError as error:
        raise ConfigurationError(f"{what_for}: {directory}/config.yaml: {error}") from error


def _check_begun_lately(federation: Federation, config: DictConfig, directory: Path) -> None:
    """Check that a run without any checkpoint need not have one yet, and is to begin as it did.

    Raises:
        ConfigurationError: It has lost them, or something is not as it was.
    """
    metrics = directory / "metrics.jsonl"
    rounds = [line["round"] for line in run_directory.read_lines(metrics)] if metrics.exists() else []
    if (directory / "summary.json").exists() or max(rounds, default=0) > config.checkpoint.every:
        raise ConfigurationError(f"resume: {directory}/checkpoint holds no checkpoint that is whole")
    if run_id(federation.identity) != config.run_id:
        raise ConfigurationError(
            f"resume: data, deal, model or settings are not those that {directory} began with, and it has no checkpoint"
            " to tell which: put them back as they were, or begin a run anew in another directory"
        )


def _prolong(directory: Path, rounds: int) -> None:
    """Write into a run's configuration that it is to have other rounds, and warn of what was planned over the old ones.

    Raises:
        ConfigurationError: It has more already.
    """
    done = max((line["round"] for line in run_directory.read_metrics(directory)), default=0)
    if rounds < done:
        raise ConfigurationError(
            f"resume: rounds={rounds} is less than the {done} rounds that are done: set it to these or more"
        )
    config = OmegaConf.load(directory / "config.yaml")
    config.rounds = rounds
    write(directory / "config.yaml", OmegaConf.to_yaml(config))
    horizon = OmegaConf.select(config, "strategy.horizon")
    if (
        horizon is not None
        and horizon < rounds
        and OmegaConf.select(config, "strategy.schedule") != "constant"
    ):
        log.warning(
            "lr was planned to fall until round %d and stays as small as it is then: a run that has %d rounds from its"
            " start ends otherwise",
            *(horizon, rounds),
        )


@contextmanager
def _begun(path: Path | None, config: DictConfig) -> Iterator[None]:
    """An error of the system in a run that has begun, for which the configuration is not to blame, as one of the run.

    Raises:
        RunError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        begun = path is not None and (path / "config.yaml").is_file()
        raise RunError(f"{explain(error)}{_go_on(path, config) if begun else ''}") from error


def _go_on(path: Path | None, config: DictConfig) -> str:
    return "" if path is None else f"; go on with: {claim.resume_command(path, own_folders(config))}"


def _interrupted(federation: Federation, config: DictConfig, path: Path | None) -> Interrupted:
    return Interrupted(f"stopped after round {federation.round} of {config.rounds}{_go_on(path, config)}")


def _rounds(federation: Federation, config: DictConfig, path: Path | None) -> Iterator[Metrics]:
    """The federation's rounds.

    Raises:
        Interrupted: It was asked to stop while a round waited for clients.
    """
    try:
        yield from federation.rounds(config.rounds)
    except StoppedError as error:
        raise _interrupted(federation, config, path) from error


def _run(
    federation: Federation,
    config: DictConfig,
    path: Path | None,
    metrics: list[Metrics],
    watching: Observers,
) -> Result:
    run = Run(run_id(federation.identity), config, path, metrics, federation)
    with closing(federation.grid), stop_signals() as stop, watching.of(run):

        def asked() -> bool:
            return bool(stop) or watching.ask_to_stop()

        if federation.grid.elsewhere and federation.round < config.rounds:
            _gather(federation, watching, asked)
        federation.stopping = asked
        if federation.account is not None and path is not None:
            federation.account.keep_in(path / run_directory.ASKED)
        for measured in _rounds(federation, config, path):
            line = measured | {"run_id": run.id}
            metrics.append(line)
            watching.round(line)
            if federation.round == config.rounds:
                break
            if hopeless := _hopeless(run):
                log.warning("ended after round %d of %d: %s", federation.round, config.rounds, hopeless)
                break
            if asked():
                raise _interrupted(federation, config, path)
        federation.load_weights()
        turned_away = [str(one) for one in federation.gateway.turned_away]
        summary = run_directory.summarise(
            metrics, config.targets, config.seed, run.measures, federation.chance
        )
        summary |= run_directory.summarise_clients(metrics, turned_away)
        if validation := config.data.get("validation"):
            summary["validation"] = validation
        if path is not None and config.checkpoint.get("best") and (path / run_directory.BEST).is_file():
            by = f"{'validation' if validation else 'test'} {run.measures.quality.name}"
            summary["best_weights"] = {"file": run_directory.BEST, "chosen_by": by}
        if federation.account is not None:
            summary["privacy"] = federation.account.summary()
        if federation.of_clients:
            summary["clients"] = run_directory.summarise_own(federation.of_clients, run.measures)
        watching.finished(summary)
    return Result(metrics, summary, federation.model.module, path)


def _hopeless(run: Run) -> str | None:
    """Why a run that trains is not worth going on with, by what its configuration says of that; None if it is."""
    quality, last = run.measures.quality, run.metrics[-1]
    if quality.key not in last or last["round"] == 0:
        return None
    values = [last[metric.key] for metric in run.measures.all]
    if run.config.get("stop_at_nan") and not all(map(math.isfinite, values)):
        return "its test metrics are not finite (stop_at_nan)"
    if not (count := run.config.get("stop_at_chance")):
        return None
    tested = [line[quality.key] for line in run.metrics if quality.key in line and line["round"] > 0][-count:]
    if len(tested) == count and all(quality.at_chance(value, run.federation.chance) for value in tested):
        guess = quality.shown(run.federation.chance)
        return f"{quality.name} was no better than a guess, {guess}, {count} times in a row (stop_at_chance)"
    return None


def _gather(federation: Federation, watching: Observers, asked: Callable[[], bool]) -> None:
    """Wait until the clients are there.

    Raises:
        TooFewClientsError: They do not come.
        Interrupted: The run was asked to stop meanwhile.
    """
    federation.gather(watching.waiting, asked)
    watching.waiting(None)
    if federation.round and asked():
        raise Interrupted(f"stopped after round {federation.round}, while clients were waited for")
