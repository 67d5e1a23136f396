"""The shapes of a model that was cut before, brought back from the plans of its cuts; its weights come afterwards."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from prunelit.core.plan import PruningPlan, get_applied_plans
from prunelit.model import surgery
from prunelit.model.decoder import as_decoder
from prunelit.model.per_layer import add_zero_bias
from prunelit.runtime.errors import BadPlan


@torch.no_grad()
def rebuild_shapes(model: nn.Module, plans: Sequence[PruningPlan]) -> None:
    """Cut a model by those of the plans that it has not been cut by; the weights come from a checkpoint afterwards.

    Args:
        model: dense, or cut by the first of the plans.
        plans: the first cut first.

    Raises:
        BadPlan: the model was cut in another way, or is another model.

    Example: see `prunelit.pruning.restore`.
    """
    marks = get_applied_plans(model)
    count = count_applied_plans(model, plans)
    for plan in plans[count:]:
        decoder = as_decoder(model)
        biased = [
            linear
            for layer, kept in zip(decoder, plan.layers, strict=False)
            for linear in (
                *([layer.output] if layer.has_attention and kept.attention_bias else []),
                *([layer.down] if layer.has_mlp and kept.mlp_bias else []),
            )
        ]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the plan was made for weights")  # these are replaced
            surgery.apply(decoder, plan)
        for linear in biased:
            add_zero_bias(linear)
        marks[f"{plan.method}, restored {len(marks)}"] = plan


def count_applied_plans(model: nn.Module, plans: Sequence[PruningPlan]) -> int:
    """Count the plans by which a live model has been cut already; they have to be the first of `plans`.

    Raises:
        BadPlan: it was cut in another way.

    Example: see `prunelit.pruning.restore`.
    """
    applied = [plan.digest for plan in get_applied_plans(model).values()]
    saved = [plan.digest for plan in plans]
    if applied != saved[: len(applied)]:
        raise BadPlan(
            f"checkpoint: its model was cut by {_describe_plans(plans)}, this one by "
            f"{_describe_plans(list(get_applied_plans(model).values()))}; build the module anew, then load it"
        )
    return len(applied)


def _describe_plans(plans: Sequence[PruningPlan]) -> str:
    return ", then ".join(f"{plan.digest} ({plan.method})" for plan in plans)
