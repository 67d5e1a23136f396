"""Checkpoints to resume from: written atomically, saved on SIGTERM, and the newest whole one is found.

    Trainer(plugins=[AtomicCheckpointIO()], callbacks=[SaveOnSigterm()])

`python -m prunelit fit` does this by itself. Sharded checkpoints (folders) are written by their strategy, not here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from prunelit.pruning.job import is_local_path
from prunelit.runtime.errors import SourceNotFound
from prunelit.runtime.messages import log_on_rank_zero
from prunelit.runtime.torch_files import (
    check_torch_file,
    find_file_damage,
    is_pickle_allowed,
    read_checkpoint_file,
    write_torch_file,
)
from prunelit.strategies.sharding import is_sharded_strategy

_SHARDED_END = "meta.pt"  # the last file that Lightning writes into a sharded checkpoint
_IS_DUE = "validation_due"  # entry of a checkpoint
_SIGTERM_EXIT = 143  # 128 + 15, a shell's exit code of a process that SIGTERM ended


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes one-file checkpoints atomically, and checks them before they are loaded.

    The checkpoint is streamed to a temporary file, synced to disk and renamed. The earlier file of this name stays
    until the new one is complete, and no copy is held in memory. Remote paths are left to Lightning.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     AtomicCheckpointIO().save_checkpoint({"step": 1}, f"{folder}/a.ckpt")
        ...     AtomicCheckpointIO().load_checkpoint(f"{folder}/a.ckpt")
        {'step': 1}
    """

    def save_checkpoint(self, checkpoint: dict[str, object], path: str | Path, storage_options: object = None) -> None:
        """Write a checkpoint.

        Raises:
            OutputNotWritable: the disk refused; the earlier checkpoint of this name is unchanged.
        """
        if storage_options is not None or not is_local_path(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_torch_file(Path(path), checkpoint)

    def load_checkpoint(
        self,
        path: str | Path,
        # On the CPU, as in the base class.
        map_location: Callable[..., object] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        """Read a checkpoint.

        Raises:
            SourceNotFound: the file is missing, truncated or damaged, and the message names the newest whole one beside
                it; or it is no checkpoint, or holds objects that loading would run and `weights_only` is not False.
        """
        if is_local_path(path):
            check_torch_file(Path(path))
            if not is_pickle_allowed(weights_only):
                read_checkpoint_file(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


class SaveOnSigterm(Callback):
    """Saves `last.ckpt` on SIGTERM and exits with 143; a run resumed from it ends with the weights of an unbroken run.

    Lightning notes the signal and ends the run after the current batch. The file goes to the folder of the first
    `ModelCheckpoint`, else to `checkpoints` in `default_root_dir`. Between two steps of gradient accumulation the
    gradients are saved too, in any checkpoint; with several processes, their mean. Sharded gradients are not saved.
    A checkpoint may come before a validation of the same step, or in the middle of it; Lightning would go on without
    it. A run resumed from such a checkpoint validates first, if steps are left to train.

    A SIGTERM before training ends the process at once: all results so far are cached. A SIGTERM after training is
    ignored, because the run is about to end.

    Example:
        Trainer(callbacks=[SaveOnSigterm()])
    """

    def __init__(self) -> None:
        self._accumulating = False
        self._gradients: dict[str, Tensor] | None = None
        self._validated_batches = 0  # training batches before the last whole validation, or before this start
        self._is_validation_due = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Note whether the optimiser has stepped; Lightning always steps on the last batch of an epoch."""
        stepped = (
            batch_idx + 1
        ) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 == trainer.num_training_batches
        self._accumulating = not stepped

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        """Save the gradients of an unfinished accumulation step, and whether a validation is yet to come."""
        training = trainer.fit_loop.epoch_loop
        if self._validated_batches <= training.total_batch_idx:
            fetcher = trainer.fit_loop._data_fetcher
            checkpoint[_IS_DUE] = fetcher is not None and training._should_check_val_fx(fetcher)
        if self._accumulating and not is_sharded_strategy(trainer.strategy):
            gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            checkpoint["gradients"] = {name: _average_over_ranks(gradient) for name, gradient in gradients.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Hold the gradients until the optimiser exists."""
        self._gradients = checkpoint.get("gradients")
        self._is_validation_due = bool(checkpoint.get(_IS_DUE))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the gradients, and validate where the earlier run did not come to it."""
        is_due, self._is_validation_due = self._is_validation_due, False
        if is_due:
            _run_validation(trainer)
        else:
            self._note_validation(trainer)
        for name, parameter in pl_module.named_parameters() if self._gradients else ():
            if name in (self._gradients or {}):
                parameter.grad = (self._gradients or {})[name].to(parameter.device)
        self._accumulating, self._gradients = self._gradients is not None, None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note after which training batch a validation ended."""
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._note_validation(trainer)

    def _note_validation(self, trainer: Trainer) -> None:
        self._validated_batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save on SIGTERM only: after any other exception the state may be that of half a step.

        Raises:
            OutputNotWritable: the disk refused.
        """
        if not isinstance(exception, SIGTERMException):
            return
        exception.code = _SIGTERM_EXIT
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        writer = next((c for c in _list_model_checkpoints(trainer) if c.dirpath), None)
        path = Path(writer.dirpath if writer and writer.dirpath else _get_checkpoint_folder(trainer)) / "last.ckpt"
        if writer is not None and writer.save_last:
            writer.last_model_path = str(path)
        trainer.save_checkpoint(path)
        log_on_rank_zero(f"SIGTERM: saved step {trainer.global_step} in {path}; --ckpt_path last goes on from it")


def _run_validation(trainer: Trainer) -> None:
    """Run the validation of a fit from its first batch, between training batches."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    validation.restarting = False
    trainer.validating = True
    validation.run()
    validation._has_run = False  # else the loop of a run that is resumed at the end of an epoch takes it for its own
    trainer.training = True


def _average_over_ranks(gradient: Tensor) -> Tensor:
    """Average a gradient over the ranks. DDP itself synchronises gradients only on the batch that steps."""
    mean = gradient.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean


def configure_checkpoints(trainer: Trainer) -> None:
    """Make a Trainer write whole checkpoints into a folder that the next run finds.

    Plain one-file checkpoints are written by `AtomicCheckpointIO`. A `ModelCheckpoint` without `dirpath` writes to
    `checkpoints` in `default_root_dir`, instead of a folder that a logger numbers anew for every run.

    Args:
        trainer: changed in place.

    Example: see `prunelit.cli.fit.PrunelitCLI`.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    for writer in _list_model_checkpoints(trainer):
        if writer.dirpath is None:
            writer.dirpath = str(_get_checkpoint_folder(trainer))


def find_newest_checkpoint(trainer: Trainer) -> Path | None:
    """Find the newest checkpoint from which training can go on, in all folders where a Trainer writes checkpoints.

    The log names the newer ones that cannot be used, and why.

    Args:
        trainer: its `ModelCheckpoint` callbacks and `default_root_dir` name the folders.

    Returns:
        Path of the checkpoint; None where there is none.

    Example: see `prunelit.cli.fit.PrunelitCLI`.
    """
    named_folders = [Path(c.dirpath) for c in _list_model_checkpoints(trainer) if c.dirpath]
    # Lightning makes `dirpath` absolute; the same folder under two names would be read, and reported, twice.
    folders = {folder.resolve(): folder for folder in [*named_folders, _get_checkpoint_folder(trainer)]}.values()
    files = [path for folder in folders for path in folder.glob("*.ckpt") if path.exists()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        problem = (
            find_file_damage(path / _SHARDED_END)
            if path.is_dir()
            else find_file_damage(path) or _describe_missing_state(path)
        )
        if problem is None:
            return path
        log_on_rank_zero(f"checkpoint {path} is {problem}: taking the one before it")
    log_on_rank_zero(f"no checkpoint in {', '.join(map(str, folders))}: starting from the beginning")
    return None


def _describe_missing_state(path: Path) -> str | None:
    """Say why a whole file is no checkpoint to resume from; None where it is one. Nothing in it is run."""
    try:
        checkpoint = read_checkpoint_file(path)
    except SourceNotFound as error:
        return f"not to be read ({error})"
    return None if "optimizer_states" in checkpoint else "without an optimiser's state"


def _list_model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _get_checkpoint_folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"
