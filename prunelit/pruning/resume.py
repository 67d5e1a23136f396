"""The plan by which a resumed run cuts: that of its checkpoint, if the run asks for the same."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.core.saved_plans import is_pruner_state, list_saved_plans
from prunelit.pruning.method import PruningMethod
from prunelit.runtime.errors import BadPlan

_FREE_OPTIONS = ("calibration", "plan_file", "journal", "cache_gib")  # options that may differ when a run goes on


def find_resumed_plan(
    method: PruningMethod,
    checkpoint: Path,
    content: Mapping[str, Any],
    saved: Mapping[str, Any],
    has_weights: bool,
) -> PruningPlan | None:
    """Find the plan of a checkpoint's last cut, in the file or beside it (a sharded one is a folder).

    Args:
        method: of the run that goes on.
        checkpoint: its path.
        content: of the checkpoint; empty for a sharded one.
        saved: what the method's callback has stored in it.
        has_weights: whether it holds weights of the decoder itself, and not only adapters.

    Returns:
        The plan; None where there is none, which is said.

    Raises:
        BadPlan: another method or other options than now, or weights of a model that was not cut.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    states: dict[str, Any] = content.get("callbacks", {})
    plan = PruningPlan.from_json(saved["plan"]) if saved.get("plan") else None
    if plan is None and not states:
        plan = next(reversed(list_saved_plans(content)), None) or find_plan_beside(method, checkpoint)
    if plan is None:
        others = [name for name, state in states.items() if is_pruner_state(state)]
        if others:
            raise BadPlan(
                f"checkpoint {checkpoint.name}: its model was cut by {', '.join(others)}, this run cuts by "
                f"{type(method).__name__}; resume with the configuration of that run"
            )
        if has_weights:
            raise BadPlan(
                f"checkpoint {checkpoint.name}: expected one of a run that cut its model, got the weights of a model "
                "without a plan, which do not fit after the cut; load them into the module and fit without ckpt_path"
            )
        method.say(f"checkpoint {checkpoint.name} holds no plan of {method.name}: scoring again")
        return None
    _check_resumed_options(method, plan, checkpoint)
    return plan


def get_plan_file_name(method: PruningMethod) -> str:
    """Get the name of the file beside the checkpoints that holds the plan.

    Example:
        See `PruningCallback.on_fit_start`, which calls it.
    """
    return f"plan.{method.name}.json"


def find_plan_beside(method: PruningMethod, checkpoint: Path) -> PruningPlan | None:
    """Find the plan in a file in or beside a checkpoint.

    Example:
        See `PruningCallback.setup`, which calls it.
    """
    beside = [folder / get_plan_file_name(method) for folder in (checkpoint, checkpoint.parent)]
    return next((PruningPlan.load(path) for path in beside if path.is_file()), None)


def _check_resumed_options(method: PruningMethod, plan: PruningPlan, checkpoint: Path) -> None:
    """Check that a run which resumes with a plan has the options that made this plan."""
    if method.given_plan is not None:
        if _list_remaining_units(method.given_plan) != _list_remaining_units(plan):
            raise BadPlan(
                f"checkpoint {checkpoint.name}: its plan is {plan.digest}, that of plan_file is "
                f"{method.given_plan.digest}; resume with the configuration of that run"
            )
        return
    asked = json.loads(json.dumps(method.options, default=str))
    recorded = json.loads(json.dumps(dict(plan.options), default=str))
    for name in sorted(asked.keys() & recorded.keys() - set(_FREE_OPTIONS)):
        if asked[name] != recorded[name]:
            raise BadPlan(
                f"checkpoint {checkpoint.name}: its plan was made with {name} {recorded[name]!r}, this run asks "
                f"for {asked[name]!r}; resume with the configuration of that run, or start another one"
            )


def _list_remaining_units(plan: PruningPlan) -> list[LayerPlan]:
    """The remaining units; biases are not compared, because they are declared when a plan is carried out."""
    return [replace(kept, attention_bias=False, mlp_bias=False) for kept in plan.layers]
