"""A Lightning logger for Trackio, which keeps runs in files of this machine: Lightning has none of its own.

    --trainer.logger prunelit.monitoring.trackio_logger.TrackioLogger --trainer.logger.project NAME
    trackio show --project NAME     shows the runs

Trackio writes to the folder that the environment variable TRACKIO_DIR names, and nothing leaves the machine unless you
ask Trackio for it by its own variables.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from prunelit.runtime.errors import BadOption


class TrackioLogger(Logger):
    """Logs a job to Trackio. The run starts with the first thing that is logged.

    Args:
        project: name of the project, under which Trackio shows the run.
        name: of the run; None: Trackio makes one up.

    Raises:
        BadOption: the project has no name.

    Example:
        >>> TrackioLogger(project="tiny", name="first").version
        'first'
    """

    def __init__(self, project: str = "prunelit", name: str | None = None):
        super().__init__()
        if not project.strip():
            raise BadOption(f"project: expected a name, got {project!r}")
        self._project, self._run_name = project, name
        self._run: Any = None  # trackio's Run, which is imported late

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        return self._run_name or (self._run.name if self._run is not None else "")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run."""
        if self._run is None:
            import trackio

            self._run = trackio.init(project=self._project, name=self._run_name, resume="allow", embed=False)
        return self._run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at a training step."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep the hyperparameters with the run; Trackio takes them until the first number is logged."""
        values = params if isinstance(params, Mapping) else vars(params)
        # Names that begin with an underscore are Trackio's own.
        self.experiment.config.update({str(key).lstrip("_"): value for key, value in values.items()})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish()
