"""The check of a model that a caller passes as an object."""

from typing import Any

from torch import nn

from prunelit.runtime.errors import BadOption


def check_transformers_model(model: Any) -> None:
    """Check that an object is a transformers model, and not wrapped.

    Raises:
        BadOption: it is not.

    Example:
        >>> check_transformers_model(nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        prunelit.runtime.errors.BadOption: model: expected a transformers model or a model source, got a Linear
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return
    inner = model.modules() if isinstance(model, nn.Module) else ()
    if any(isinstance(module, PreTrainedModel) for module in inner):
        raise BadOption(
            f"model: expected a transformers model, got a {type(model).__name__} around one; use it before it is "
            "wrapped, prepared or set up"
        )
    raise BadOption(f"model: expected a transformers model or a model source, got a {type(model).__name__}")
