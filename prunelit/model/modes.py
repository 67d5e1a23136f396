"""Modes of a model that last for a block of code: evaluation, generation settings, another device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def use_eval_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` inside; every submodule back in its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def use_generation_config(model: Any, **settings: Any) -> Iterator[None]:
    """`model.generate()` by these settings of a GenerationConfig alone; the model's own are back after.

    generate() takes what it is not told from the model's own, where chat models keep penalties and ends of a turn.
    """
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig(**settings)
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def move_to_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move the model to `device` inside; back to where it was after."""
    home = next(model.parameters()).device
    if home == device:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
