"""Checks that training loops of others share before a model is cut in them."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from prunelit.pruning.live_references import list_optimizers_of
from prunelit.pruning.method import PruningMethod
from prunelit.pruning.method_options import build_method_by_name
from prunelit.runtime.errors import BadOption, StaleReference


def choose_method(
    method: str | type[PruningMethod] | PruningMethod,
    options: Mapping[str, Any],
    plan: Any,
    own_options: Collection[str],
) -> PruningMethod | None:
    """Build the method that scores; None beside a plan, where nothing is scored.

    Args:
        method: see `prunelit.pruning.method_options.build_method_by_name`.
        options: of the method.
        plan: a saved plan, its file, or None.
        own_options: names of the caller's own options, for the message about a misspelt one.

    Raises:
        BadOption: no such method or option, or options beside a plan.

    Example:
        >>> choose_method("llm_bip", {}, "plan.json", ()) is None
        True
    """
    if plan is None:
        return build_method_by_name(method, options, own_options)
    if options:
        raise BadOption(f"plan: expected no options of a method beside it, got {', '.join(options)}; leave one out")
    return None


def check_no_optimizer_yet(model: nn.Module, advice: str) -> None:
    """Check that no living optimiser holds a parameter of a model: the cut would leave it with dead ones.

    Args:
        model: that is to be cut.
        advice: end of the message.

    Raises:
        StaleReference: one does.

    Example: see `prunelit.prune_in_loop`.
    """
    for optimizer, name in list_optimizers_of(model):
        raise StaleReference(
            f"optimizer {type(optimizer).__name__}: expected one that is built after the cut, got one that holds "
            f"{name}; {advice}"
        )
