"""Checkpoints that a run can go on from, whatever ended it: never half a file, one on SIGTERM, the newest whole one.

    Trainer(plugins=[AtomicCheckpointIO()], callbacks=[SaveOnSigterm()])

`python -m prunelit fit` does this by itself. Sharded checkpoints (folders) are written by their strategy, not here.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from prunelit.pruning.job import is_local_path
from prunelit.runtime.messages import log_on_rank_zero
from prunelit.runtime.torch_files import check_torch_file, find_file_damage, write_torch_file
from prunelit.strategies.sharding import is_sharded_strategy

_SHARDED_END = "meta.pt"  # what Lightning writes last into a sharded checkpoint
_SIGTERM_EXIT = 143  # 128 + 15, what a shell says of a process that SIGTERM ended


class AtomicCheckpointIO(TorchCheckpointIO):
    """One-file checkpoints that are whole or not there, and are checked before they are loaded.

    Written straight to the side, onto the disk and into place: the earlier file of this name stays until then, and no
    copy of it is made in memory. Remote paths are Lightning's own business.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            OutputNotWritable: the disk refused; the earlier checkpoint of this name is as it was.
        """
        if storage_options is not None or not is_local_path(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_torch_file(Path(path), checkpoint)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, location: storage,  # on the CPU, as in the base class
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            SourceNotFound: missing, cut short or damaged; names the newest whole one beside it.
        """
        if is_local_path(path):
            check_torch_file(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


class SaveOnSigterm(Callback):
    """On SIGTERM save `last.ckpt` and exit with 143; a run that goes on from it ends in the weights of one that ran on.

    Lightning notes the signal and ends the run after the batch at hand. The file goes where the first `ModelCheckpoint`
    writes, else to `checkpoints` in `default_root_dir`. Between two steps of gradient accumulation the gradients are
    saved too, in any checkpoint; over several processes, their mean; where parameters are sharded, they are not.

    A SIGTERM before training ends the process at once, as it does any other: there is nothing yet but what is kept. One
    after it is not heeded: the run is about to end.
    """

    def __init__(self) -> None:
        self._accumulating = False
        self._gradients: dict[str, Tensor] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note whether the optimiser has stepped; Lightning steps on the last batch of an epoch in any case."""
        stepped = (
            batch_idx + 1
        ) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 == trainer.num_training_batches
        self._accumulating = not stepped

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gradients of an unfinished step."""
        if self._accumulating and not is_sharded_strategy(trainer.strategy):
            found = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            checkpoint["gradients"] = {name: _average_over_ranks(gradient) for name, gradient in found.items()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take them until the optimiser is there."""
        self._gradients = checkpoint.get("gradients")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put them back."""
        for name, parameter in pl_module.named_parameters() if self._gradients else ():
            if name in (self._gradients or {}):
                parameter.grad = (self._gradients or {})[name].to(parameter.device, copy=True)
        self._accumulating, self._gradients = self._gradients is not None, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, on SIGTERM only: after any other exception the state may be that of half a step.

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


def _average_over_ranks(gradient: Tensor) -> Tensor:
    """Of this process's gradients and the others', which a wrapped model adds up only when it steps."""
    found = gradient.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(found)
        found /= dist.get_world_size()
    return found


def configure_checkpoints(trainer: Trainer) -> None:
    """Give a Trainer whole checkpoints in a folder that the next run finds.

    Where Lightning would write its plain one-file checkpoints, `AtomicCheckpointIO` does; a `ModelCheckpoint` without
    `dirpath` writes to `checkpoints` in `default_root_dir`, not to a folder that a logger numbers anew for every run.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    for writer in _list_model_checkpoints(trainer):
        if writer.dirpath is None:
            writer.dirpath = str(_get_checkpoint_folder(trainer))


def find_newest_checkpoint(trainer: Trainer) -> Path | None:
    """The newest checkpoint that training can go on from, of all in the folders where this Trainer writes; says what it
    leaves out, and why. None where there is none."""
    folders = dict.fromkeys(
        [*(Path(c.dirpath) for c in _list_model_checkpoints(trainer) if c.dirpath), _get_checkpoint_folder(trainer)]
    )
    files = [path for folder in folders for path in folder.glob("*.ckpt") if path.exists()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        wrong = (
            find_file_damage(path / _SHARDED_END)
            if path.is_dir()
            else find_file_damage(path) or _describe_missing_state(path)
        )
        if wrong is None:
            return path
        log_on_rank_zero(f"checkpoint {path} is {wrong}: taking the one before it")
    log_on_rank_zero(f"no checkpoint in {', '.join(map(str, folders))}: starting from the beginning")
    return None


def _describe_missing_state(path: Path) -> str | None:
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:  # noqa: BLE001  (whole, and yet not of Lightning)
        return f"not readable ({type(error).__name__})"
    return None if isinstance(saved, dict) and "optimizer_states" in saved else "without an optimiser's state"


def _list_model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _get_checkpoint_folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"
