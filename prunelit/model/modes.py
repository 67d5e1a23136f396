"""How a model runs: context managers for eval mode, generation settings and device, and its name for the KV cache."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def use_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside the context; every submodule gets its own mode back after it.

    Example:
        >>> linear = nn.Linear(2, 2).train()
        >>> with use_eval_mode(linear):
        ...     linear.training
        False
        >>> linear.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def get_cache_name(model: nn.Module) -> str:
    """Get the name of the KV cache among a model's arguments and outputs; transformers 5.24 has changed it.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, input_ids, past_key_values=None): ...
        >>> get_cache_name(Model())
        'past_key_values'
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def use_generation_config(model: Any, **settings: Any) -> Iterator[None]:
    """Let `model.generate()` use only these settings inside the context; the model gets its own back after it.

    `generate()` fills in what it is not told from the model's generation config, where chat models have repetition
    penalties and end-of-turn tokens. A PEFT model's `generate()` also writes the config into the model inside it, so
    the config of every module is put back.

    Args:
        model: transformers model.
        settings: arguments of `transformers.GenerationConfig`.

    Example:
        >>> from types import SimpleNamespace
        >>> model = SimpleNamespace(generation_config=None)
        >>> with use_generation_config(model, max_new_tokens=3):
        ...     model.generation_config.max_new_tokens
        3
    """
    from transformers import GenerationConfig

    attributes = [vars(module) for module in (model.modules() if isinstance(model, nn.Module) else [model])]
    previous = [{name: own[name] for name in ("generation_config",) if name in own} for own in attributes]
    model.generation_config = GenerationConfig(**settings)
    try:
        yield
    finally:
        for own, settings_before in zip(attributes, previous, strict=True):
            own.pop("generation_config", None)
            own.update(settings_before)


@contextmanager
def move_to_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a model to `device` inside the context, and back to its previous device after it.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> with move_to_device(linear, torch.device("cpu")):
        ...     linear.weight.device
        device(type='cpu')
    """
    previous = next(model.parameters()).device
    if previous == device:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(previous)
