"""Hooks that a caller has put on parameters: a cut puts new parameters in place, which have none."""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@contextmanager
def warn_of_lost_hooks(model: nn.Module) -> Iterator[None]:
    """Warn, when the model was cut, of hooks on parameters that are no longer part of it.

    They are not carried over: a hook may hold a mask or an optimiser of the old parameter.

    Args:
        model: about to be cut.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> handle = model.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
        >>> with warnings.catch_warnings(action="always", record=True) as caught, warn_of_lost_hooks(model):
        ...     model.weight = nn.Parameter(model.weight[:1])
        >>> str(caught[0].message)[:51]
        'the cut replaced 1 parameters that had hooks, such '
    """
    hooked = [
        (name, weakref.ref(parameter))
        for name, parameter in model.named_parameters()
        if any(getattr(parameter, hooks, None) for hooks in _HOOKS)
    ]
    yield
    live = {id(parameter) for parameter in model.parameters()}
    lost = [name for name, reference in hooked if id(reference()) not in live]
    if lost:
        warnings.warn(
            f"the cut replaced {len(lost)} parameters that had hooks, such as {lost[0]}, and the hooks are gone with "
            "them; register them after the cut",
            stacklevel=3,
        )
