"""A model in float32 for a while: what another program's numbers are compared with."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prunelit.model.modes import use_eval_mode
from prunelit.model.per_layer import find


@contextmanager
def use_float32_model(model: nn.Module) -> Iterator[Any]:
    """The model in float32 and eval mode; a copy where it is in another dtype."""
    if next(model.parameters()).dtype != torch.float32:
        model = copy.deepcopy(model).float()
        restore_rope(model)
    with use_eval_mode(model):
        yield model


def restore_rope(model: Any) -> None:
    """Compute the rotary frequencies at `model.rotary_emb` again: they were rounded along if the model was cast."""
    rotary = find(model, "model.rotary_emb")
    fresh = type(rotary)(config=model.config).to(rotary.inv_freq.device)
    if fresh.inv_freq.shape == rotary.inv_freq.shape:
        model.model.rotary_emb = fresh
