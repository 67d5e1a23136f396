"""Which function runs a command of `python -m prunelit`; LightningCLI for `fit` and `validate`.

The only place that knows both callbacks and recovery.
"""

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from prunelit import commands, compare
from prunelit.console import one_line_errors, speak_by_rule
from prunelit.data import TextDataModule
from prunelit.recovery import RecoveryModule
from prunelit.report.run import RunReport


def run(command: str, arguments: list[str]) -> int:
    """Run a command of `prunelit.__main__.COMMANDS`; the exit code.

    Raises:
        PrunelitError: bad input, in one line.
    """
    runs = {
        "fit": _lightning,
        "validate": _lightning,
        "prune": commands.run_prune,
        "evaluate": commands.run_evaluate,
        "compare": compare.run_compare,
    }
    speak_by_rule()
    with one_line_errors(command):
        return runs[command](command, arguments)


class SaveRunConfig(SaveConfigCallback):
    """config.yaml in the run's own folder: what was really run."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "overwrite": True, "save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "config.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=False)


class PrunelitCLI(LightningCLI):
    """LightningCLI over RecoveryModule and TextDataModule; any method is a callback in the Trainer's section."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            name: {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule"}
            for name in ("fit", "validate")
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.model", "data.tokenizer")
        parser.add_lightning_class_args(RunReport, "report")

    def before_fit(self) -> None:
        """The report measures the dense model, so it comes before whatever cuts it."""
        self.trainer.callbacks.sort(key=lambda callback: not isinstance(callback, RunReport))  # type: ignore[attr-defined]


def _lightning(command: str, arguments: list[str]) -> int:
    quiet = {"exit_on_error": False}
    given = [command, *arguments]
    PrunelitCLI(
        RecoveryModule,
        TextDataModule,
        args=None if sys.argv[1:] == given else given,  # further ranks are started again with this command line
        seed_everything_default=0,
        trainer_defaults={"default_root_dir": "runs/fit"},
        save_config_callback=SaveRunConfig,
        parser_kwargs={**quiet, "fit": quiet, "validate": quiet},
    )
    return 0
