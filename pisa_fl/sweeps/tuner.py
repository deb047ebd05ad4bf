"""Hydra's sweeper that looks for the best settings by Optuna: the same trials for every method, none on the test set.

Values in a plain list (`strategy=fedavg,pisa`) are not looked for: every combination of them has a study of its own,
with as many trials of as many rounds as any other. Ranges (`interval(a,b)`, `range(a,b)`, `choice(a,b)`) are what each
study looks in. A trial is a run as any of a sweep, measured on a share of the training examples (`data.validation`).

The studies lie in the sweep's folder, and the same command goes on with them there. What a trial tries follows from the
sampler's seed, its number and what the batches before its own were worth, so that an interruption changes nothing.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from pisa_fl.config import ConfigurationError, build, imported_folders
from pisa_fl.metric import Metric
from pisa_fl.sweeps.failure import FAILED, SweepError
from pisa_fl.sweeps.launcher import ParallelLauncher, Run
from pisa_fl.system.files import write
from pisa_fl.system.text import visible

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STORAGE = "optuna.db"
"""Name of the file in the sweep's folder that holds the studies, for Optuna's own tools too."""

BEST = "best.yaml"
"""Name of the file there with the best trial of each study."""


@dataclass
class Study:
    """The trials of one combination of what is listed.

    Attributes:
        name: What tells it from the others.
        fixed: Overrides of all its trials.
        own: Where Optuna keeps it.
        runs: Of its trials, in their order, as far as they are known here.
    """

    name: str
    fixed: Sequence[str]
    own: optuna.Study
    runs: list[Run] = field(default_factory=list)


class OptunaSweeper(Sweeper):
    """Looks for settings.

    Args:
        trials: Of each study.
        batch: Trials of a study that are drawn before any of them is known, and may go side by side.
        seed: Of the sampler.
        params: Key -> values, as on the command line, which comes first.
    """

    def __init__(
        self, trials: int, batch: int, seed: int = 0, params: Mapping[str, Any] | None = None
    ) -> None:
        self._trials, self._batch, self._seed, self._params = trials, batch, seed, params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """As Hydra calls it.

        Raises:
            ConfigurationError: A number is none, or the launcher is another.
        """
        numbers = {"trials": (self._trials, 1), "batch": (self._batch, 1), "seed": (self._seed, 0)}
        for name, (value, least) in numbers.items():
            if type(value) is not int or value < least:
                raise ConfigurationError(
                    f"hydra.sweeper.{name} must be a whole number of at least {least}, got {value}"
                )
        launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)
        if not isinstance(launcher, ParallelLauncher):
            raise ConfigurationError("hydra/sweeper=optuna goes with hydra/launcher=parallel alone")
        self._launcher, self._context = launcher, hydra_context
        self._folder = Path(config.hydra.sweep.dir).absolute()

    def sweep(self, arguments: list[str]) -> None:
        """Make all trials, and say which were best.

        Raises:
            ConfigurationError: There is nothing to look for, or to judge it by.
            SweepError: Some trials failed, as has been said, or another process makes them.
            SystemExit: It was asked to stop.
        """
        try:
            import optuna
        except ImportError:
            raise ConfigurationError(
                "hydra/sweeper=optuna needs Optuna: pip install 'pisa-fl[tune]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        given = [f"{key}={value}" for key, value in self._params.items()] + arguments
        listed, looked_for = read(OverridesParser.create(self._context.config_loader).parse_overrides(given))
        combinations = [list(combination) for combination in product(*listed.values())]
        quality = self._judge(combinations)
        self._folder.mkdir(parents=True, exist_ok=True)
        several = {text for texts in listed.values() if len(texts) > 1 for text in texts}
        studies = []
        for combination in combinations:
            name = " ".join(text for text in combination if text in several) or "best"
            studies.append(Study(name, combination, self._study(combination, looked_for, quality)))
        failures = self._make(studies, looked_for, quality)
        self._launcher.show()
        self._tell_best(studies, quality)
        if failures:
            raise SweepError(failures[0].status) from failures[0]

    def _judge(self, combinations: Iterable[Sequence[str]]) -> Metric:
        """By what all trials are judged.

        Raises:
            ConfigurationError: That would be the test set, budgets or metrics differ, or a configuration is wrong.
        """
        from pisa_fl.tasks import Task

        rounds: dict[int, str] = {}
        qualities: list[Metric] = []
        for overrides in combinations:
            run = self._launcher.compose(0, overrides)
            if run.config is None:
                raise ConfigurationError(run.failure.sentence if run.failure else run.entry.words)
            if not run.config.data.get("validation"):
                raise ConfigurationError(
                    "data.validation must be above 0 to tune, such as 0.1: the test set is not to be chosen by"
                )
            rounds.setdefault(run.config.rounds, run.entry.words)
            qualities.append(build(run.config.task, Task).measures.quality)
        if len(rounds) > 1:
            told = ", ".join(f"{count} with {words}" for count, words in rounds.items())
            raise ConfigurationError(f"rounds differ ({told}): give rounds=..., the same for all methods")
        if any(quality != qualities[0] for quality in qualities):
            raise ConfigurationError("tasks are judged by different metrics: tune each by itself")
        return qualities[0]

    def _study(
        self, fixed: Sequence[str], looked_for: Mapping[str, BaseDistribution], quality: Metric
    ) -> optuna.Study:
        """Optuna's study, begun or as it was left: of other fixed values, or other ranges, it is another one."""
        import optuna

        whole = repr(
            [sorted(fixed), sorted(f"{key}={values}" for key, values in looked_for.items()), self._seed]
        )
        return optuna.create_study(
            storage=f"sqlite:///{self._folder / STORAGE}",
            study_name=f"{' '.join(fixed)[:400]} {crc32(whole.encode()):08x}",
            direction="maximize" if quality.better == "higher" else "minimize",
            load_if_exists=True,
        )

    def _make(
        self, studies: Sequence[Study], looked_for: Mapping[str, BaseDistribution], quality: Metric
    ) -> list[SweepError]:
        """Make all trials; why some failed for another reason than that they diverged."""
        from optuna.trial import TrialState

        worst = -math.inf if quality.better == "higher" else math.inf
        while True:
            asked = []
            for number, study in enumerate(studies):
                for place, trial in enumerate(self._drawn(study, looked_for)):
                    if place >= len(study.runs):
                        chosen = [f"{key}={trial.params[key]}" for key in looked_for]
                        run = self._launcher.compose(number * self._trials + place, [*study.fixed, *chosen])
                        if trial.state == TrialState.COMPLETE and not math.isfinite(trial.value or 0.0):
                            run.failure = SweepError(FAILED, "it diverged", diverged=True)
                        study.runs.append(run)
                        asked.append((study, trial, run))
            if not asked:
                runs = [run for study in studies for run in study.runs]
                return [run.failure for run in runs if run.failure and not run.failure.diverged]
            self._launcher.make([run for _, _, run in asked], len(studies) * self._trials)
            for study, trial, run in asked:
                if run.failure is None and not run.done:
                    raise SweepError(
                        FAILED, f"{run.entry.directory} is written by another process: go on afterwards"
                    )
                # what failed for another reason is tried again by the next command
                if trial.state == TrialState.RUNNING and (run.failure is None or run.failure.diverged):
                    study.own.tell(trial.number, worst if run.worth is None else run.worth)

    def _drawn(self, study: Study, looked_for: Mapping[str, BaseDistribution]) -> list[FrozenTrial]:
        """The trials of a study in their order, with those of a next batch if all that were known have been made."""
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        def drawn() -> list[FrozenTrial]:
            return [trial for trial in study.own.trials if trial.state != TrialState.FAIL][: self._trials]

        for trial in drawn():
            if trial.params.keys() != looked_for.keys():  # it was killed while it drew
                study.own.tell(trial.number, state=TrialState.FAIL)
        made = len(study.runs)
        while (count := len(drawn())) < self._trials and (count % self._batch or count == made):
            study.own.sampler = TPESampler(
                seed=crc32(f"{study.own.study_name} {count}".encode()), constant_liar=True
            )
            study.own.ask(dict(looked_for))
        return drawn()

    def _tell_best(self, studies: Sequence[Study], quality: Metric) -> None:
        """Say of every study which trial was best, and how to measure it on the test set."""
        from pisa_fl.results.console import console

        best = {}
        flags = [flag for folder in imported_folders for flag in ("--config-dir", str(folder))]
        for study in studies:
            made = [run for run in study.runs if run.worth is not None]
            if not made:
                console.print(f"{visible(study.name)}: no trial came to its end with a finite {quality.name}")
                continue
            choose = max if quality.better == "higher" else min
            run = choose(made, key=lambda run: run.worth or 0.0)
            chosen = [text for text in run.overrides if text not in study.fixed]
            best[study.name] = {
                quality.name: run.worth,
                "overrides": chosen,
                "directory": run.entry.directory,
            }
            measured = [text for text in run.overrides if not text.startswith("data.validation=")]
            command = shlex.join(["pisa-fl", *flags, *measured, "data.validation=0"])
            told = f"{study.name}: {quality.name} {quality.shown(run.worth)} in validation with {' '.join(chosen)}"
            console.print(visible(f"{told}; on the test set: {command}"), soft_wrap=True)
        write(self._folder / BEST, yaml.safe_dump(best, sort_keys=False))


def read(overrides: Iterable[Override]) -> tuple[dict[str, list[str]], dict[str, BaseDistribution]]:
    """What overrides list, and what they have looked for, by key; of one key the last counts.

    Raises:
        ConfigurationError: Nothing is looked for, or a range is impossible.
    """
    listed: dict[str, list[str]] = {}
    looked_for: dict[str, BaseDistribution] = {}
    for override in overrides:
        key, value = override.get_key_element(), override.value()
        listed.pop(key, None)
        looked_for.pop(key, None)
        if not override.is_sweep_override():
            listed[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif isinstance(value, ChoiceSweep) and value.simple_form:
            listed[key] = [f"{key}={text}" for text in override.sweep_string_iterator()]
        else:
            try:
                looked_for[key] = _distribution(override)
            except ValueError as error:
                raise ConfigurationError(f"{override.input_line} is no range: {error}") from error
    if not looked_for:
        raise ConfigurationError(
            "hydra/sweeper=optuna has nothing to look for: give a range, as in"
            " 'strategy.lr=tag(log,interval(0.001,0.1))'"
        )
    return listed, looked_for


def _distribution(override: Override) -> BaseDistribution:
    """Optuna's name for a range.

    Raises:
        ValueError: It is none.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        assert low is not None
        assert high is not None
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("its ends must be finite numbers")
        if type(low) is int and type(high) is int:
            return IntDistribution(low, high, log)
        return FloatDistribution(float(low), float(high), log)
    if isinstance(value, RangeSweep | ChoiceSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    raise ValueError("write interval(a,b), range(a,b) or choice(a,b)")
