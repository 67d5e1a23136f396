"""What a Lightning job offers to a pruning callback: its model, its batches, the checkpoint it is about to restore."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from prunelit.calibrate import TOKENS_PER_BATCH, Batch
from prunelit.errors import NoModel


def batched(windows: Tensor) -> list[Batch]:
    """Windows [N, S] as batches of about 2,048 tokens."""
    return [{"input_ids": part} for part in windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))]


def find_model(pl_module: LightningModule) -> nn.Module:
    """The transformers model inside a LightningModule.

    A module that loads its model late may offer `load_model()`; it is called here, before the search.

    Raises:
        NoModel: there is none yet.
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


def resume_path(trainer: Trainer) -> Path | None:
    """The checkpoint that `trainer.fit` is about to restore.

    Lightning resolves it before the callbacks' setup but keeps it in a local variable of `Trainer._run` until after
    (2.6), and shapes must be right before the restore; so it is read from that frame.
    """
    if trainer.ckpt_path:
        return Path(trainer.ckpt_path)
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            found = frame.f_locals.get("ckpt_path")
            return Path(found) if found else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def take(loader: Any, sequences: int) -> list[Batch]:
    """The first batches that hold input_ids, up to a number of sequences."""
    taken: list[Batch] = []
    for batch in loader if loader is not None else ():
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            break
        room = sequences - sum(len(b["input_ids"]) for b in taken)
        if room <= 0:
            break
        names = [name for name in ("input_ids", "attention_mask") if isinstance(batch.get(name), Tensor)]
        taken.append({name: batch[name][:room].detach().cpu() for name in names})
    return taken


def share(batches: list[Batch]) -> list[Batch]:
    """Rank zero's batches on every rank: shuffled loaders differ between ranks."""
    if dist.is_initialized():
        box = [batches]
        dist.broadcast_object_list(box, src=0)
        return box[0]
    return batches
