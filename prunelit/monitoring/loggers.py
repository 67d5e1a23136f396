"""What a job's loggers can take beside numbers: points on an axis of their own, pictures, tables, artifacts.

Weights & Biases takes all of it; TensorBoard takes numbers, pictures and tables as text; the CSV logger numbers, and
files beside its metrics.csv. Any other Lightning logger takes the numbers. Call on rank zero.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from prunelit.monitoring import scrub
from prunelit.runtime.errors import BadOption
from prunelit.runtime.text_files import write_text

WANDB_QUIET: dict[str, Any] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
    "host": "-",
}
"""Settings without which W&B also sends the command line, the host's name, the packages and what is printed."""


def check_wandb_installed(asked: str) -> None:
    """Raise before any work is done.

    Args:
        asked: the option that needs wandb.

    Raises:
        BadOption: it is not installed.
    """
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise BadOption(f"{asked}: expected wandb to be installed: pip install 'prunelit[wandb]'") from error


def set_quiet_wandb_defaults() -> None:
    """`WANDB_QUIET` as the environment of runs to come, where the environment says nothing else."""
    for name, value in WANDB_QUIET.items():
        said = str(value).lower() if isinstance(value, bool) else value
        os.environ.setdefault("WANDB_" + name.removeprefix("x").upper(), said)


def log_numbers(loggers: Iterable[Logger], values: Mapping[str, float], step: int) -> None:
    """Numbers at a step of the training."""
    for logger in loggers:
        logger.log_metrics(dict(values), step)


def define_axes(loggers: Iterable[Logger], of: Mapping[str, str]) -> None:
    """Say once on which axis numbers stand that are logged by `log_points`: {name: axis}."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            for name, axis in of.items():
                logger.experiment.define_metric(name, step_metric=axis)


def list_logger_runs(loggers: Iterable[Logger]) -> list[str]:
    """The runs that loggers write to: the same again where a resumed job goes on with them."""
    return [f"{type(logger).__name__} {logger.name} {logger.version}" for logger in loggers]


def guard_hyperparameters(loggers: Iterable[Logger]) -> None:
    """Let W&B see of hyperparameters, whoever logs them, only numbers, switches and short plain words."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and "log_hyperparams" not in vars(logger):
            logger.log_hyperparams = partial(_log_plain_hyperparameters, logger.log_hyperparams)  # type: ignore[method-assign]


def _log_plain_hyperparameters(log: Any, given: Any) -> None:
    log(scrub.keep_plain_values(given if isinstance(given, Mapping) else vars(given)))


def log_points(loggers: Iterable[Logger], values: Mapping[str, float], axis: str, place: int) -> None:
    """Numbers on an axis of their own, as `place` = 1, 2, ...; "search/evaluation" for instance."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.log({axis: place, **values})
        elif isinstance(logger, CSVLogger):
            logger.log_metrics({axis: place, **values}, place)
        else:
            logger.log_metrics(dict(values), place)


def log_summary(loggers: Iterable[Logger], values: Mapping[str, Any]) -> None:
    """Single numbers of the whole run, where a logger keeps such."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(dict(values))


def log_picture(loggers: Iterable[Logger], name: str, png: bytes, caption: str, step: int) -> None:
    """A picture; `name` as "prune/kept"."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            logger.experiment.log({name: wandb.Image(_decode_png(png), caption=caption), "trainer/global_step": step})
        elif isinstance(logger, TensorBoardLogger):
            import numpy

            logger.experiment.add_image(name, numpy.asarray(_decode_png(png)), step, dataformats="HWC")
        elif isinstance(logger, CSVLogger):
            path = Path(logger.log_dir) / "pictures" / f"{name.replace('/', '_')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)


def log_table(
    loggers: Iterable[Logger], name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """A table; `name` as "prune/layers"."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            made = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            logger.experiment.log({name: made, "trainer/global_step": step})
        elif isinstance(logger, TensorBoardLogger):
            lines = [columns, ["---"] * len(columns), *rows]
            text = "\n".join("| " + " | ".join(_escape_table_cell(value) for value in line) + " |" for line in lines)
            logger.experiment.add_text(name, text, step)
        elif isinstance(logger, CSVLogger):
            written = io.StringIO()
            csv.writer(written).writerows([columns, *rows])
            write_text(Path(logger.log_dir) / "tables" / f"{name.replace('/', '_')}.csv", written.getvalue())


def log_used_artifact(loggers: Iterable[Logger], name: str, kind: str, metadata: Mapping[str, Any]) -> None:
    """Say what a run starts from: an artifact that holds its description, and no file of it.

    W&B links artifacts on its server only; offline, what a run has made says in its metadata what it is of.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger) and not logger.experiment.offline:
            import wandb

            made = wandb.Artifact(name, kind, metadata=dict(metadata))
            with made.new_file("description.json") as file:
                file.write(json.dumps(dict(metadata), indent=2))
            logger.experiment.use_artifact(made)


def log_artifact(
    loggers: Iterable[Logger], name: str, kind: str, metadata: Mapping[str, Any], content: Mapping[str, Path | str]
) -> None:
    """Log what a run has made, as {name: file, or text}."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            made = wandb.Artifact(name, kind, metadata=dict(metadata))
            with TemporaryDirectory() as scratch:
                for file, source in content.items():
                    if isinstance(source, Path):
                        made.add_file(str(source), file)
                    else:
                        (Path(scratch) / file).write_text(source, encoding="utf-8")
                        made.add_file(str(Path(scratch) / file), file, policy="mutable")  # W&B copies it
                logger.experiment.log_artifact(made)


def _decode_png(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB")


def _escape_table_cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
