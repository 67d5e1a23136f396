"""`python -m prunelit fit` and `validate`: LightningCLI with RecoveryModule, TextDataModule and pruning callbacks."""

import argparse
import errno
import pydoc
import sys
import warnings
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from prunelit.cli import config_files, plan
from prunelit.cli.console import report_result
from prunelit.cli.parsing.fit_options import expand_fit_options
from prunelit.cli.parsing.options import HELP_EPILOG, peek_option
from prunelit.data import sources
from prunelit.monitoring import checkpoints
from prunelit.monitoring.run_report import RunReport
from prunelit.pruning.callback import PruningCallback
from prunelit.pruning.job import check_own_processes, check_single_pruner, is_local_path
from prunelit.recovery.datamodule import TextDataModule
from prunelit.recovery.module import RecoveryModule
from prunelit.runtime import progress
from prunelit.runtime.atomic_files import replace_file
from prunelit.runtime.errors import BadOption, OutputNotWritable, SourceNotFound, suggest_file, suggest_name
from prunelit.runtime.torch_files import check_torch_file, read_lightning_file


class SaveRunConfig(SaveConfigCallback):
    """Saves config.yaml, the complete config of the run, in the run's own folder.

    Example: see `run`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "overwrite": True, "save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "config.yaml"
            settings = {"skip_none": False, "overwrite": True, "multifile": False}
            replace_file(path, lambda temporary: self.parser.save(self.config, str(temporary), **settings))
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RunReport):
                    callback.record.facts["config"] = path.read_text(encoding="utf-8")


class CommandProgressBar(TQDMProgressBar):
    """Lightning's progress bar in the style of `prunelit.runtime.progress`; silent where stdout is not a terminal.

    Example: see `PrunelitCLI`.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if progress.is_progress_shown() and sys.stdout.isatty() else 0)


class PrunelitCLI(LightningCLI):
    """LightningCLI with RecoveryModule and TextDataModule; any pruning method is a callback in the Trainer's section.

    Example:
        python -m prunelit fit --config configs/quickstart.yaml
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            name: {"model", "dataloaders", "train_dataloaders", "val_dataloaders", "datamodule"}
            for name in ("fit", "validate")
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.model", "data.tokenizer")
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_argument("--plan", type=str | None, default=None, help="cut by this plan.json instead of scoring")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; answer an unknown name, at any level, with the nearest known one."""
        try:
            super().parse_arguments(parser, args)
        except (argparse.ArgumentError, KeyError) as error:
            words = list(sys.argv[1:] if args is None else args)
            command = next((name for name in self.subcommands() if words[:1] == [name]), None)
            actions = (self._parser(command) if command else parser)._actions
            known = {action.dest for action in actions if not action.dest.endswith(".help")}
            message = config_files.find_misspelling(words[1:] if command else words, known)
            if message is None:
                raise
            raise BadOption(message) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer; turn an option that Lightning refuses into an error of one line."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            message = str(error).strip().splitlines()[0].partition(". It must be")[0].rstrip(".")
            strategy = self._get(self.config_init, "trainer").strategy
            known_strategies = StrategyRegistry.available_strategies() if "strategy name" in message else ()
            raise BadOption(f"trainer: {message}{suggest_name(str(strategy), known_strategies)}") from error

    def before_instantiate_classes(self) -> None:
        """Pass `--plan` to the one pruning callback; check the model for it, and the text length against the model."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        self._set_progress_defaults(config)
        pruners = [entry for entry in config.trainer.callbacks or () if _is_pruning_callback(entry.class_path)]
        check_single_pruner([entry.class_path.rpartition(".")[2] for entry in pruners], "plan" if config.plan else None)
        if config.plan:
            pruners[0].init_args.plan_file = config.plan
        sources.check_prunable_source(config.model.model)
        if pruners:
            _check_model_kind(pruners[0], config.model.model)
        sources.check_sequence_length(config.model.model, config.data.seqlen, "data.seqlen")

    def _set_progress_defaults(self, config: Namespace) -> None:
        """Use prunelit's progress bar and no table of modules, unless the config asks for others."""
        callback_classes = [pydoc.locate(entry.class_path) for entry in config.trainer.callbacks or ()]
        display_classes = [
            kind for kind in callback_classes if isinstance(kind, type) and issubclass(kind, ProgressBar | ModelSummary)
        ]
        if config.trainer.enable_model_summary is None and not any(
            issubclass(kind, ModelSummary) for kind in display_classes
        ):
            config.trainer.enable_model_summary = progress.is_verbose()
        if config.trainer.enable_progress_bar is not False and not any(
            issubclass(kind, ProgressBar) for kind in display_classes
        ):
            defaults = self.trainer_defaults.get("callbacks", [])
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": [*defaults, CommandProgressBar()]}

    def before_fit(self) -> None:
        """Put the report before the pruning callback, because it measures the dense model; resolve `--ckpt_path last`.

        Raises:
            BadOption: the strategy spawns processes.
        """
        check_own_processes(self.trainer)
        self.trainer.callbacks.sort(key=lambda callback: not isinstance(callback, RunReport))  # type: ignore[attr-defined]
        checkpoints.configure_checkpoints(self.trainer)
        if self.config_init.fit.get("ckpt_path") == "last":
            newest = checkpoints.find_newest_checkpoint(self.trainer)
            self.config_init.fit.ckpt_path = None if newest is None else str(newest)


def build_fit_job(arguments: list[str]) -> plan.FitJob:
    """Build the job that `fit` would run with these arguments, without running it.

    Args:
        arguments: command line after `fit`.

    Returns:
        Trainer, module and data.

    Example: see `prunelit.cli.plan.run`.
    """
    with warnings.catch_warnings():
        # Lightning warns that it does not use sys.argv, which here is the command line of `plan`.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        cli = PrunelitCLI(
            RecoveryModule,
            TextDataModule,
            args=expand_fit_options(arguments),
            run=False,
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": "runs/fit"},
            save_config_callback=None,
            parser_kwargs={"exit_on_error": False},
        )
    return plan.FitJob(cli.trainer, cli.model, cli.datamodule)


def _is_pruning_callback(class_path: str) -> bool:
    """Return whether a class path names a pruning callback."""
    cls = pydoc.locate(class_path)
    return isinstance(cls, type) and issubclass(cls, PruningCallback)


def _check_model_kind(entry: Namespace, source: str) -> None:
    """Check that a pruning callback says something of the model's kind of layers, before either is built."""
    kind, options = pydoc.locate(entry.class_path), entry.get("init_args") or Namespace()
    facts = sources.read_decoder_facts(source)
    if facts is not None and not options.get("plan_file"):
        cast("type[PruningCallback]", kind).check_options_for_kind(
            *facts, options.get("kinds"), options.get("budget", "parameters")
        )


def _check_resume_checkpoint(path: str | None, runs_pickles: bool) -> None:
    """Check the checkpoint to resume from, before anything is built.

    Raises:
        SourceNotFound: it is missing, truncated, damaged or no checkpoint, or holds objects that loading would run.
    """
    if path is None or path in ("last", "best", "hpc") or not is_local_path(path) or Path(path).is_dir():
        return
    if not Path(path).is_file():
        raise SourceNotFound(f"ckpt_path {path!r}: no such file; 'last' is the newest whole one{suggest_file(path)}")
    if runs_pickles:
        check_torch_file(Path(path))
    else:
        read_lightning_file(Path(path))


def run(command: str, arguments: list[str]) -> int:
    """Run `python -m prunelit fit` or `validate`.

    Args:
        command: "fit" or "validate".
        arguments: command line after it, as `expand_fit_options` writes it.

    Returns:
        The exit code.

    Raises:
        PrunelitError: bad input, or the disk is full.

    Example: see `tests/cli/test_fit.py`.
    """
    parser_options = {"exit_on_error": False, "epilog": HELP_EPILOG}
    runs_pickles = str(peek_option("weights_only", arguments)).lower() == "false"
    _check_resume_checkpoint(peek_option("ckpt_path", arguments), runs_pickles)
    words = [command, *arguments]
    try:
        cli = PrunelitCLI(
            RecoveryModule,
            TextDataModule,
            # None lets Lightning read sys.argv, with which it also starts further ranks.
            args=None if sys.argv[1:] == words else words,
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": "runs/fit", "callbacks": [checkpoints.SaveOnSigterm()]},
            save_config_callback=SaveRunConfig,
            parser_kwargs={**parser_options, "fit": parser_options, "validate": parser_options},
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise OutputNotWritable(
            f"output {str(error.filename or 'of this run')!r}: cannot be written: {error.strerror}; make room, then "
            "--ckpt_path last goes on from the newest checkpoint"
        ) from error
    measured = [callback.report for callback in cli.trainer.callbacks if isinstance(callback, RunReport)]  # type: ignore[attr-defined]
    report_result(command, out=str(cli.trainer.default_root_dir), **(measured[0] if measured else {}))
    return 0
