"""MLflow: a run of its own for every run, with the configuration as parameters and a metric's steps the rounds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from pisa_fl.metric import Metrics
from pisa_fl.results.observer import Observer, Run
from pisa_fl.results.result import Interrupted
from pisa_fl.trackers.elsewhere import flat, need, note, recall
from pisa_fl.trackers.numbers import numbers

if TYPE_CHECKING:
    from mlflow import MlflowClient

LONGEST = 6000
"""Characters of a parameter's value, at most: MLflow's."""

TOGETHER = 100
"""Parameters that are sent at once, at most: MLflow's."""


class Mlflow(Observer):
    """A run that goes on has its old run go on, of which it asks what is there: no round is there twice.

    Args:
        tracking_uri: Of the server or store; None leaves that to MLflow.
        experiment: Its name.

    Raises:
        ConfigurationError: MLflow is not installed.
    """

    def __init__(self, tracking_uri: str | None, experiment: str) -> None:
        need("mlflow", "MLflow")
        self._uri, self._experiment = tracking_uri, experiment
        self._client: MlflowClient | None = None
        self._id = ""
        self._last: dict[str, int] = {}  # last step that is there, by metric

    def started(self, run: Run) -> None:
        """Make a run, or find the one that goes on, and send what it lacks."""
        from mlflow import MlflowClient

        self._client = MlflowClient(self._uri)
        self._id = recall(run, "mlflow").get("id", "")
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            for key in self._client.get_run(self._id).data.metrics:
                self._last[key] = max(m.step for m in self._client.get_metric_history(self._id, key))
        else:
            self._make(run)
        for line in run.metrics:
            self.round(line)

    def round(self, line: Metrics) -> None:
        """As `Observer.round`."""
        from mlflow.entities import Metric

        assert self._client is not None
        step, now = int(line["round"]), int(1000 * time.time())
        new = {key: value for key, value in numbers(line).items() if step > self._last.get(key, -1)}
        self._client.log_batch(self._id, [Metric(key, value, now, step) for key, value in new.items()])

    def finished(self, summary: Mapping[str, Any]) -> None:
        """As `Observer.finished`."""
        self._end("FINISHED")

    def stopped(self, reason: BaseException) -> None:
        """As `Observer.stopped`."""
        self._end("KILLED" if isinstance(reason, Interrupted | KeyboardInterrupt) else "FAILED")

    def _make(self, run: Run) -> None:
        from mlflow.entities import Param

        assert self._client is not None
        experiment = self._client.get_experiment_by_name(self._experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self._experiment)
        tags = {"run_id": run.id} | ({"directory": str(run.directory)} if run.directory else {})
        self._id = self._client.create_run(number, run_name=run.name, tags=tags).info.run_id
        note(run, "mlflow", id=self._id)
        config = OmegaConf.to_container(run.config, resolve=True)
        assert isinstance(config, dict)
        params = [Param(key, str(value)[:LONGEST]) for key, value in flat(config)]
        for first in range(0, len(params), TOGETHER):
            self._client.log_batch(self._id, params=params[first : first + TOGETHER])

    def _end(self, status: str) -> None:
        if self._client is not None and self._id:
            self._client.set_terminated(self._id, status)
