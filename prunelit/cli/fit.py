"""`python -m prunelit fit` and `validate`: LightningCLI over our module and data. It knows callbacks and recovery."""

import argparse
import errno
import pydoc
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from prunelit.cli import config_files, plan
from prunelit.cli.options import HELP_EPILOG, peek_option
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
from prunelit.runtime.torch_files import check_torch_file


class SaveRunConfig(SaveConfigCallback):
    """config.yaml in the run's own folder: what was really run."""

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
    """Lightning's bar in the style of `prunelit.runtime.progress`, and silent where nobody looks."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if progress.is_progress_shown() and sys.stdout.isatty() else 0)


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
        parser.add_argument("--plan", type=str | None, default=None, help="cut by this plan.json instead of scoring")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """An unknown name, at any level, is answered with the nearest one."""
        try:
            super().parse_arguments(parser, args)
        except (argparse.ArgumentError, KeyError) as error:
            given = list(sys.argv[1:] if args is None else args)
            command = next((name for name in self.subcommands() if given[:1] == [name]), None)
            actions = (self._parser(command) if command else parser)._actions
            known = {action.dest for action in actions if not action.dest.endswith(".help")}
            said = config_files.find_misspelling(given[1:] if command else given, known)
            if said is None:
                raise
            raise BadOption(said) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's refusal of an option is the user's to mend."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            said = str(error).strip().splitlines()[0].partition(". It must be")[0].rstrip(".")
            strategy = self._get(self.config_init, "trainer").strategy
            known = StrategyRegistry.available_strategies() if "strategy name" in said else ()
            raise BadOption(f"trainer: {said}{suggest_name(str(strategy), known)}") from error

    def before_instantiate_classes(self) -> None:
        """`--plan` goes to the callback that cuts, of which there is one."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        self._set_progress_defaults(config)
        cutting = [entry for entry in config.trainer.callbacks or () if _is_pruning_callback(entry.class_path)]
        check_single_pruner([entry.class_path.rpartition(".")[2] for entry in cutting], "plan" if config.plan else None)
        if config.plan:
            cutting[0].init_args.plan_file = config.plan
        sources.check_sequence_length(config.model.model, config.data.seqlen, "data.seqlen")

    def _set_progress_defaults(self, config: Any) -> None:
        """One style of bars, and no table of modules, unless another one is asked for."""
        kinds = [pydoc.locate(entry.class_path) for entry in config.trainer.callbacks or ()]
        asked = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, ProgressBar | ModelSummary)]
        if config.trainer.enable_model_summary is None and not any(issubclass(kind, ModelSummary) for kind in asked):
            config.trainer.enable_model_summary = progress.is_verbose()
        if config.trainer.enable_progress_bar is not False and not any(issubclass(k, ProgressBar) for k in asked):
            defaults = self.trainer_defaults.get("callbacks", [])
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": [*defaults, CommandProgressBar()]}

    def before_fit(self) -> None:
        """The report measures the dense model, so it comes before whatever cuts it. `last` is the newest whole one."""
        check_own_processes(self.trainer)
        self.trainer.callbacks.sort(key=lambda callback: not isinstance(callback, RunReport))  # type: ignore[attr-defined]
        checkpoints.configure_checkpoints(self.trainer)
        if self.config_init.fit.get("ckpt_path") == "last":
            found = checkpoints.find_newest_checkpoint(self.trainer)
            self.config_init.fit.ckpt_path = None if found is None else str(found)


def build_fit_job(arguments: list[str]) -> plan.FitJob:
    """What `fit` with these arguments runs, parsed and built as there, but not run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # the command line is `plan`'s
        made = PrunelitCLI(
            RecoveryModule,
            TextDataModule,
            args=_expand_model_option(arguments),
            run=False,
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": "runs/fit"},
            save_config_callback=None,
            parser_kwargs={"exit_on_error": False},
        )
    return plan.FitJob(made.trainer, made.model, made.datamodule)


def _is_pruning_callback(class_path: str) -> bool:
    kind = pydoc.locate(class_path)
    return isinstance(kind, type) and issubclass(kind, PruningCallback)


def _expand_model_option(arguments: list[str]) -> list[str]:
    """`--model SOURCE`, as the other commands have it, is `--model.model SOURCE`."""
    found = list(arguments)
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--model":
            value = value if equals else "".join(arguments[place + 1 : place + 2])
            if not value.startswith("{") and Path(value).suffix not in (".yaml", ".yml"):
                found[place] = f"--model.model{equals}{value if equals else ''}"
    return found


def _check_resume_checkpoint(given: str | None) -> None:
    """Check the checkpoint to go on from, before anything is built.

    Raises:
        SourceNotFound: it is missing, cut short or damaged.
    """
    if given is None or given in ("last", "best", "hpc") or not is_local_path(given) or Path(given).is_dir():
        return
    if not Path(given).is_file():
        raise SourceNotFound(f"ckpt_path {given!r}: no such file; 'last' is the newest whole one{suggest_file(given)}")
    check_torch_file(Path(given))


def run(command: str, arguments: list[str]) -> int:
    """`python -m prunelit fit` or `validate`."""
    quiet = {"exit_on_error": False, "epilog": HELP_EPILOG}
    _check_resume_checkpoint(peek_option("ckpt_path", arguments))
    if sys.argv[1:] == [command, *arguments]:  # where Lightning finds it when it starts further ranks
        sys.argv[2:] = _expand_model_option(arguments)
    arguments = _expand_model_option(arguments)
    given = [command, *arguments]
    try:
        PrunelitCLI(
            RecoveryModule,
            TextDataModule,
            args=None if sys.argv[1:] == given else given,  # further ranks are started again with this command line
            seed_everything_default=0,
            trainer_defaults={"default_root_dir": "runs/fit", "callbacks": [checkpoints.SaveOnSigterm()]},
            save_config_callback=SaveRunConfig,
            parser_kwargs={**quiet, "fit": quiet, "validate": quiet},
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise OutputNotWritable(
            f"output {str(error.filename or 'of this run')!r}: can not be written: {error.strerror}; make room, then "
            "--ckpt_path last goes on from the newest checkpoint"
        ) from error
    return 0
