"""What a Lightning job offers to a callback: its model, its batches, and the checkpoint that it is about to restore."""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from prunelit.calibration.batches import Batch, convert_batches, select_tower_inputs
from prunelit.core.architectures import get_architecture
from prunelit.pruning.method import PruningMethod
from prunelit.runtime.errors import BadOption, BadPlan, NoModel, SourceNotFound, UnknownArchitecture
from prunelit.runtime.events import EventListener
from prunelit.runtime.fingerprints import fingerprint_tokenizer, fingerprint_weights
from prunelit.runtime.messages import log_on_rank_zero
from prunelit.runtime.torch_files import find_file_damage, is_pickle_allowed, read_lightning_file


def find_model(pl_module: LightningModule, target: str | None = None) -> nn.Module:
    """Find the transformers model inside a LightningModule.

    A module that loads its model late may offer `load_model()`; it is called here, before the search. Of several models
    the one is taken whose family can be pruned, where there is but one.

    Args:
        pl_module: of the job.
        target: path of the model in it, such as "student"; None: that of the job's pruning callback, if it has one.

    Raises:
        NoModel: there is none yet, or none at `target`.
        BadOption: there are several, and no `target`; or it is a part of a model.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    from transformers import PreTrainedModel

    if callable(load := getattr(pl_module, "load_model", None)):
        load()
    pruners = [c for c in getattr(pl_module._trainer, "callbacks", ()) if isinstance(c, PruningMethod)]
    target = target or next((getattr(pruner, "target", None) for pruner in pruners), None)
    all_models = {path: module for path, module in pl_module.named_modules() if isinstance(module, PreTrainedModel)}
    parts = {id(part) for model in all_models.values() for part in model.modules() if part is not model}
    models = {path: model for path, model in all_models.items() if id(model) not in parts}
    if target is not None:
        owner = _find_module(pl_module, target)
        for path, model in models.items():
            if owner is not model and _has_architecture(model) and any(part is owner for part in model.modules()):
                raise BadOption(
                    f"target {target!r}: expected a whole transformers model, got a part of {path!r}, which would not "
                    f"fit its config after the cut; give target: {path!r}"
                )
        of_target = [model for path, model in models.items() if f"{path}.".startswith(f"{target}.")]
        if isinstance(owner, PreTrainedModel) or len(of_target) == 1:
            return owner if isinstance(owner, PreTrainedModel) else of_target[0]
        raise NoModel(
            f"target {target!r}: expected the path of a transformers model in {type(pl_module).__name__}, got "
            f"{'several' if of_target else 'none'}; there {_describe_models(models)}"
        )
    prunable = {path: model for path, model in models.items() if _has_architecture(model)}
    for candidates in (models, prunable):
        if len(candidates) == 1:
            return next(iter(candidates.values()))
    if not models:
        raise NoModel(
            f"{type(pl_module).__name__}: expected a transformers model as an attribute when callbacks are set up, "
            "got none; build it in __init__ (not in setup or configure_model), or give the module a load_model() method"
        )
    raise BadOption(
        f"{type(pl_module).__name__}: expected one transformers model, got {len(models)}; give the pruning callback "
        f"target: {' or '.join(repr(path) for path in models)}"
    )


def _find_module(pl_module: LightningModule, path: str) -> nn.Module | None:
    """A module by any of its names; `named_modules` has one name of each."""
    try:
        return pl_module.get_submodule(path)
    except AttributeError:
        return None


def _has_architecture(model: Any) -> bool:
    try:
        get_architecture(model.config)
    except UnknownArchitecture:
        return False
    return True


def _describe_models(models: Mapping[str, Any]) -> str:
    if not models:
        return "is none at all; build it in __init__, or give the module a load_model() method"
    return "are " + ", ".join(f"{path!r} ({type(model).__name__})" for path, model in models.items())


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


def check_no_adapters(model: nn.Module) -> None:
    """Check that a model is cut before adapters sit on its linears.

    Raises:
        BadOption: it holds adapters of PEFT.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    for module in model.modules():
        if type(module).__module__.startswith("peft."):
            raise BadOption(
                f"{type(model).__name__}: expected a model without adapters, got one with {type(module).__name__}; "
                "merge them before another cut, or build the module anew"
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
    """Find the checkpoint that the Trainer is about to restore, in any of its stages.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    path = _find_run_locals(trainer).get("ckpt_path", trainer.ckpt_path)
    return Path(path) if path else None


def _find_run_locals(trainer: Trainer) -> dict[str, Any]:
    """Find the local variables of `Trainer._run`; empty outside of it.

    Lightning resolves the checkpoint before the callbacks' setup but keeps it there until after (2.6), and shapes must
    be right before the restore. `trainer.ckpt_path` is that of the run before.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return dict(frame.f_locals)
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def read_checkpoint(trainer: Trainer, checkpoint: Path) -> dict[str, Any]:
    """Read the checkpoint that the Trainer is about to restore; nothing in it is run, whatever the caller allows.

    Returns:
        Its content, without objects that torch does not load by itself; empty for a sharded checkpoint, which is a
        folder, and for one that is not on this machine.

    Raises:
        SourceNotFound: it is missing, damaged or no checkpoint, or it holds objects that the caller does not allow.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    if checkpoint.is_dir() or not is_local_path(checkpoint):
        return {}
    allow_unknown = is_pickle_allowed(_find_run_locals(trainer).get("weights_only"))
    try:
        return read_lightning_file(checkpoint, allow_unknown)
    except SourceNotFound:
        if allow_unknown and find_file_damage(checkpoint) is None:
            return {}  # Lightning may read it all the same; the plan is beside it
        raise


def read_callback_states(trainer: Trainer, checkpoint: Path) -> dict[str, Any]:
    """Read the states of the callbacks from the checkpoint that the Trainer is about to restore.

    Raises:
        SourceNotFound: see `read_checkpoint`.

    Example:
        See `prunelit.monitoring.dashboard`, which calls it.
    """
    states: dict[str, Any] = read_checkpoint(trainer, checkpoint).get("callbacks", {})
    return states


def is_local_path(path: str | Path) -> bool:
    """Whether a path is on a file system, not behind a protocol.

    Example:
        >>> is_local_path("runs/a"), is_local_path("s3://bucket/a")
        (True, False)
    """
    return ":/" not in str(path)


def log_in_job(message: str) -> None:
    """Log a line as Lightning's own callbacks do, where prunelit's logger is not shown; never in both ways.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    logger = logging.getLogger("prunelit")
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():  # our command line, or a job that shows the line
        log_on_rank_zero(message)
    else:
        rank_zero_info(message)


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
        >>> import torch
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
