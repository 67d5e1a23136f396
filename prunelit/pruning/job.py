"""What a Lightning job offers to a callback: its model, its batches, and the checkpoint that it is about to restore."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from prunelit.calibration.batches import Batch, convert_batches, select_tower_inputs
from prunelit.runtime.errors import BadOption, BadPlan, NoModel
from prunelit.runtime.events import EventListener
from prunelit.runtime.fingerprints import fingerprint_tokenizer, fingerprint_weights
from prunelit.runtime.torch_files import check_torch_file


def find_model(pl_module: LightningModule) -> nn.Module:
    """Find the transformers model inside a LightningModule.

    A module that loads its model late may offer `load_model()`; it is called here, before the search.

    Raises:
        NoModel: there is none yet.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    from transformers import PreTrainedModel

    if callable(load := getattr(pl_module, "load_model", None)):
        load()
    for module in pl_module.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise NoModel(
        f"{type(pl_module).__name__}: expected a transformers model as an attribute when callbacks are set up, "
        "got none; build it in __init__ (not in setup or configure_model), or give the module a load_model() method"
    )


def check_single_pruner(cutting: Sequence[str], wanted_by: str | None = None) -> None:
    """Check that a job has at most one pruning callback: two would cut twice, and a report describes one.

    Args:
        cutting: class names of the job's pruning callbacks.
        wanted_by: the option or command that needs one; None: there may be none.

    Raises:
        BadOption: there are several, or none where one is needed.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    if len(cutting) > 1:
        raise BadOption(
            f"trainer.callbacks: expected one pruning callback, got {' and '.join(cutting)}; keep one of them (a "
            "callbacks/*.yaml as a further --config adds its own to what is there)"
        )
    if wanted_by and not cutting:
        raise BadOption(
            f"{wanted_by}: expected one pruning callback in trainer.callbacks, got 0; add one of callbacks/*.yaml as a "
            "second --config"
        )


def check_own_processes(trainer: Trainer) -> None:
    """Refuse strategies of spawned or forked processes.

    Raises:
        BadOption: such a process would cut a copy of the model and lose it.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    if getattr(trainer.strategy, "_start_method", "popen") != "popen":
        raise BadOption(
            "trainer.strategy: expected processes of their own, as 'ddp' has, got 'ddp_spawn' or a fork, which would "
            "cut a copy of the model and lose it; use strategy='ddp'"
        )


def find_resume_path(trainer: Trainer) -> Path | None:
    """Find the checkpoint that `trainer.fit` is about to restore.

    Lightning resolves it before the callbacks' setup but keeps it in a local variable of `Trainer._run` until after
    (2.6), and shapes must be right before the restore; so it is read from that frame.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    if trainer.ckpt_path:
        return Path(trainer.ckpt_path)
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            path = frame.f_locals.get("ckpt_path")
            return Path(path) if path else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def read_callback_states(checkpoint: Path) -> dict[str, Any]:
    """Read the states of the callbacks from a checkpoint file; a sharded checkpoint, which is a folder, has none.

    Raises:
        SourceNotFound: the file is missing, cut short or damaged.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    if checkpoint.is_dir() or not is_local_path(checkpoint):
        return {}
    check_torch_file(checkpoint)
    # The caller is about to load this same file through Lightning; mmap reads only the few bytes asked for.
    saved = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=False)
    states: dict[str, Any] = saved.get("callbacks", {})
    return states


def is_local_path(path: str | Path) -> bool:
    """Whether a path is on a file system, not behind a protocol.

    Example:
        >>> is_local_path("runs/a"), is_local_path("s3://bucket/a")
        (True, False)
    """
    return ":/" not in str(path)


def find_cache_folder(trainer: Trainer) -> Path | None:
    """The folder in which a run caches scores, plan and repaired weights.

    None where the job has no folder of its own, or where its folder is not on this machine.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    root = trainer.default_root_dir
    return Path(root) / "kept" if is_local_path(root) and Path(root).resolve() != Path.cwd() else None


def collect_listeners(trainer: Trainer) -> list[EventListener]:
    """Collect the callbacks of a job that want to be told of events: those with a method `on_event`.

    Their `attach(trainer)`, where they have one, is called first.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    listeners = [callback for callback in trainer.callbacks if callable(getattr(callback, "on_event", None))]  # type: ignore[attr-defined]
    for callback in listeners:
        if callable(attach := getattr(callback, "attach", None)):
            attach(trainer)
    return listeners


def find_tokenizer(trainer: Trainer, pl_module: LightningModule) -> Any:
    """Find the `tokenizer` of the datamodule or the module; None where neither has one.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    owners = (getattr(trainer, "datamodule", None), pl_module)
    return next((t for t in (getattr(owner, "tokenizer", None) for owner in owners) if callable(t)), None)


def fingerprint_job(model: nn.Module, trainer: Trainer, pl_module: LightningModule) -> dict[str, str | None]:
    """Compute the fingerprints of a job's model as it is now, and of its tokenizer, for `check_same_job`.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    tokenizer = fingerprint_tokenizer(find_tokenizer(trainer, pl_module))
    return {"model": fingerprint_weights(model), "tokenizer": tokenizer}


def check_same_job(saved: Mapping[str, Any], current: Mapping[str, str | None] | None) -> None:
    """Compare the fingerprints in a checkpoint with those of this job; one that is missing on either side may differ.

    Raises:
        BadPlan: another one.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    what = {"model": "model (or the same in another dtype)", "tokenizer": "tokenizer"}
    for name, value in (current or {}).items():
        if saved.get(name) and value and saved[name] != value:
            raise BadPlan(
                f"checkpoint: it was made with another {what[name]}: expected {saved[name]}, got {value}; "
                "resume with the configuration of that run"
            )


def check_same_on_ranks(what: str, value: str) -> None:
    """Check that a value is the same in all processes; every rank calls it.

    Raises:
        BadOption: they do.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    if dist.is_initialized():
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        if len(set(values)) > 1:
            raise BadOption(f"{what}: expected the same on every rank, got {values}; give every machine the same files")


def take_batches(loader: Any, sequences: int) -> list[Batch]:
    """Take the first batches that hold `input_ids`, up to a number of sequences.

    Args:
        loader: yields batches; the first one that holds no token ids ends the search. None: there are none.
        sequences: most rows over all batches; the last batch is cut, unless it holds pictures.

    Example:
        >>> loader = [{"input_ids": torch.zeros(4, 8, dtype=torch.long)}] * 3
        >>> [len(batch["input_ids"]) for batch in take_batches(loader, sequences=6)]
        [4, 2]
        >>> take_batches([torch.ones(1, 3, dtype=torch.long), "no ids"], sequences=6)
        [{'input_ids': tensor([[1, 1, 1]])}]
    """
    batches: list[Batch] = []
    for batch in loader if loader is not None else ():
        if not isinstance(batch, Mapping):
            try:
                (batch,) = convert_batches([batch])
            except BadOption:  # a job of another kind
                break
        if "input_ids" not in batch:
            break
        room = sequences - sum(len(b["input_ids"]) for b in batches)
        if room <= 0:
            break
        names = [name for name in ("input_ids", "attention_mask") if isinstance(batch.get(name), Tensor)]
        if pictures := select_tower_inputs(batch):  # they cannot be told apart, so the batch is taken whole
            taken = {name: batch[name] for name in names} | pictures
        else:
            taken = {name: batch[name][:room] for name in names}
        batches.append({name: values.detach().cpu() for name, values in taken.items()})
    return batches
