"""Logging beyond plain numbers: points with their own x axis, figures, tables and artifacts.

Weights & Biases shows all of it. MLflow and Trackio get numbers, figures, tables and the files of artifacts.
TensorBoard shows numbers, figures, and tables as text. The CSV logger stores numbers, and the rest as files beside its
metrics.csv. Any other Lightning logger gets the numbers. Call these functions on rank zero.
"""

import csv
import io
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from prunelit.monitoring import scrub
from prunelit.monitoring.trackio_logger import TrackioLogger
from prunelit.runtime.text_files import write_text
from prunelit.runtime.wandb_settings import WANDB_QUIET

if TYPE_CHECKING:
    from PIL.Image import Image


def set_quiet_wandb_defaults() -> None:
    """Put `WANDB_QUIET` into the environment of later runs; variables that are set already stay.

    Example: see `prunelit.monitoring.dashboard.Dashboard`, which calls it before W&B starts.
    """
    for name, value in WANDB_QUIET.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        os.environ.setdefault("WANDB_" + name.removeprefix("x").upper(), text)


def log_numbers(loggers: Iterable[Logger], values: Mapping[str, float], step: int) -> None:
    """Log numbers at a training step.

    Args:
        loggers: of the Trainer.
        values: {name: number}.
        step: of the training.

    Example: see `log_points`.
    """
    for logger in loggers:
        logger.log_metrics(dict(values), step)


def define_axes(loggers: Iterable[Logger], axis_by_name: Mapping[str, str]) -> None:
    """Tell W&B the x axis of numbers that `log_points` logs; call it once.

    Args:
        loggers: of the Trainer.
        axis_by_name: {name of the number: name of its axis}.

    Example: see `prunelit.monitoring.dashboard.Dashboard`.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            for name, axis in axis_by_name.items():
                logger.experiment.define_metric(name, step_metric=axis)


def list_logger_runs(loggers: Iterable[Logger]) -> list[str]:
    """List the runs to which loggers write. A resumed job that continues the same runs gets the same list.

    Args:
        loggers: of the Trainer.

    Example:
        >>> list_logger_runs([CSVLogger("logs", name="tiny", version=3)])
        ['CSVLogger tiny 3']
    """
    return [f"{type(logger).__name__} {logger.name} {logger.version}" for logger in loggers]


def guard_hyperparameters(loggers: Iterable[Logger]) -> None:
    """Let only numbers, switches and short plain words of the hyperparameters reach a tracker, whoever logs them.

    Trackers are W&B, MLflow and Trackio, which may send them on; TensorBoard and CSV files stay on this machine.

    Args:
        loggers: changed in place.

    Example: see `prunelit.monitoring.scrub.keep_plain_values`.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger | MLFlowLogger | TrackioLogger) and "log_hyperparams" not in vars(logger):
            logger.log_hyperparams = partial(_log_plain_hyperparameters, logger.log_hyperparams)  # type: ignore[method-assign]


def _log_plain_hyperparameters(
    log: Callable[[dict[str, object]], object], hyperparameters: Mapping[str, object] | Namespace
) -> None:
    log(scrub.keep_plain_values(hyperparameters if isinstance(hyperparameters, Mapping) else vars(hyperparameters)))


def log_points(loggers: Iterable[Logger], values: Mapping[str, float], axis: str, position: int) -> None:
    """Log numbers with an x axis of their own.

    Args:
        loggers: of the Trainer.
        values: {name: number}.
        axis: name of the axis, as "search/evaluation".
        position: 1, 2, ... on that axis.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     logger = CSVLogger(folder)
        ...     log_points([logger], {"search/perplexity": 12.5}, "search/evaluation", 1)
        ...     logger.experiment.metrics
        [{'search/evaluation': 1, 'search/perplexity': 12.5, 'step': 1}]
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.log({axis: position, **values})
        elif isinstance(logger, CSVLogger | TrackioLogger):
            logger.log_metrics({axis: position, **values}, position)
        else:
            logger.log_metrics(dict(values), position)


def log_summary(loggers: Iterable[Logger], values: Mapping[str, float]) -> None:
    """Log single numbers of the whole run, where the logger has a place for them.

    Args:
        loggers: of the Trainer.
        values: {name: number}.

    Example: see `prunelit.monitoring.dashboard.Dashboard`.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(dict(values))
        elif isinstance(logger, MLFlowLogger):
            logger.log_metrics(dict(values))


def log_picture(loggers: Iterable[Logger], name: str, png: bytes, caption: str, step: int) -> None:
    """Log a figure.

    Args:
        loggers: of the Trainer.
        name: as "prune/kept".
        png: the image file's bytes.
        caption: how to read it.
        step: of the training.

    Example: see `prunelit.monitoring.dashboard.Dashboard`.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            logger.experiment.log({name: wandb.Image(_decode_png(png), caption=caption), "trainer/global_step": step})
        elif isinstance(logger, TrackioLogger):
            import trackio

            logger.experiment.log({name: trackio.Image(_decode_png(png), caption=caption)}, step=step)
        elif isinstance(logger, MLFlowLogger):
            path_in_run = f"pictures/{_make_file_name(name)}.png"
            logger.experiment.log_image(logger.run_id, _decode_png(png), path_in_run)
        elif isinstance(logger, TensorBoardLogger):
            import numpy

            logger.experiment.add_image(name, numpy.asarray(_decode_png(png)), step, dataformats="HWC")
        elif isinstance(logger, CSVLogger):
            path = Path(logger.log_dir) / "pictures" / f"{_make_file_name(name)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)


def log_table(
    loggers: Iterable[Logger], name: str, columns: Sequence[str], rows: Sequence[Sequence[object]], step: int
) -> None:
    """Log a table.

    Args:
        loggers: of the Trainer.
        name: as "prune/layers".
        columns: names of the columns.
        rows: cells.
        step: of the training.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     logger = CSVLogger(folder)
        ...     log_table([logger], "prune/layers", ["layer"], [[0], [1]], step=0)
        ...     (Path(logger.log_dir) / "tables" / "prune_layers.csv").read_text().split()
        ['layer', '0', '1']
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            wandb_table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            logger.experiment.log({name: wandb_table, "trainer/global_step": step})
        elif isinstance(logger, TrackioLogger):
            import trackio

            trackio_table = trackio.Table(columns=list(columns), data=[list(row) for row in rows])
            logger.experiment.log({name: trackio_table}, step=step)
        elif isinstance(logger, MLFlowLogger):
            content = {column: [row[index] for row in rows] for index, column in enumerate(columns)}
            logger.experiment.log_table(logger.run_id, content, f"tables/{_make_file_name(name)}.json")
        elif isinstance(logger, TensorBoardLogger):
            lines = [columns, ["---"] * len(columns), *rows]
            text = "\n".join("| " + " | ".join(_escape_table_cell(value) for value in line) + " |" for line in lines)
            logger.experiment.add_text(name, text, step)
        elif isinstance(logger, CSVLogger):
            buffer = io.StringIO()
            csv.writer(buffer).writerows([columns, *rows])
            write_text(Path(logger.log_dir) / "tables" / f"{_make_file_name(name)}.csv", buffer.getvalue())


def log_used_artifact(loggers: Iterable[Logger], name: str, kind: str, metadata: Mapping[str, object]) -> None:
    """Tell W&B what a run starts from: an artifact that holds a description and no file.

    W&B links artifacts on its server only. Offline, the metadata of the run's own artifacts names what they come from.

    Args:
        loggers: of the Trainer.
        name: of the artifact.
        kind: its type, as "base-model".
        metadata: its description.

    Example: see `prunelit.monitoring.dashboard.Dashboard`.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger) and not logger.experiment.offline:
            import wandb

            used_artifact = wandb.Artifact(name, kind, metadata=dict(metadata))
            with used_artifact.new_file("description.json") as file:
                file.write(json.dumps(dict(metadata), indent=2))
            logger.experiment.use_artifact(used_artifact)


def log_artifact(
    loggers: Iterable[Logger], name: str, kind: str, metadata: Mapping[str, object], content: Mapping[str, Path | str]
) -> None:
    """Log files that a run has made.

    Args:
        loggers: of the Trainer.
        name: of the artifact.
        kind: its type, as "plan" or "model".
        metadata: its description.
        content: {file name: path of the file, or its text}.

    Example: see `prunelit.monitoring.dashboard.Dashboard`.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            new_artifact = wandb.Artifact(name, kind, metadata=dict(metadata))
            # "mutable" makes W&B copy the file, which is deleted with the folder.
            _log_files(logger, new_artifact, content, policy="mutable")
        elif isinstance(logger, TrackioLogger):
            import trackio

            _log_files(logger, trackio.Artifact(name, kind, metadata=dict(metadata)), content)
        elif isinstance(logger, MLFlowLogger):
            for file, source in content.items():
                if isinstance(source, Path):
                    logger.experiment.log_artifact(logger.run_id, str(source), str(PurePosixPath(name, file).parent))
                else:
                    logger.experiment.log_text(logger.run_id, source, f"{name}/{file}")
            logger.experiment.log_dict(logger.run_id, {"type": kind, **metadata}, f"{name}/metadata.json")


def _log_files(
    logger: WandbLogger | TrackioLogger, artifact: Any, content: Mapping[str, Path | str], **options: str
) -> None:
    """Add files and texts to an artifact of W&B or Trackio, and log it; `options` are those of adding a text."""
    with TemporaryDirectory() as scratch:
        for file, source in content.items():
            if isinstance(source, Path):
                artifact.add_file(str(source), file)
            else:
                copy = Path(scratch) / file
                copy.write_text(source, encoding="utf-8")
                artifact.add_file(str(copy), file, **options)
        logger.experiment.log_artifact(artifact)


def _make_file_name(name: str) -> str:
    return name.replace("/", "_")


def _decode_png(png: bytes) -> "Image":
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB")


def _escape_table_cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
