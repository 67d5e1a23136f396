"""How much more a plan removes than its ratio asks for, and which option would bring it nearer.

Units are removed in steps, so small models, wide steps (`align`) and whole KV groups overshoot the ratio.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunelit.core.plan import PruningPlan
from prunelit.planning.layer_costs import get_budget_cost
from prunelit.planning.targets import describe_target, score_alike, sum_layer_costs
from prunelit.runtime.errors import PrunelitError

if TYPE_CHECKING:
    from prunelit.core.scores import ScoreKind

LARGEST_OVERSHOOT = 0.01
"""An overshoot up to this share is no reason for a warning."""
_OPTIONS = ("scope", "unit", "align", "protect", "budget", "min_kept", "uniform_heads")


@dataclass(frozen=True)
class Overshoot:
    """What a plan removes beside what was asked for.

    Attributes:
        ratio: share that was asked for.
        achieved: share that the plan removes of the same budget.
        budget: what both are shares of.

    Example:
        >>> Overshoot(0.25, 0.375, "parameters").excess
        0.125
    """

    ratio: float
    achieved: float
    budget: str

    @property
    def excess(self) -> float:
        """Share removed beyond the ratio; negative where less was removed."""
        return self.achieved - self.ratio


def measure_overshoot(plan: PruningPlan) -> Overshoot | None:
    """Measure how much more a plan removes of its own budget than its ratio asks for.

    Args:
        plan: the plan, with the options of its method.

    Returns:
        None where the plan names no ratio, or has a target besides, or its budget is measured in seconds.

    Example: see `describe_overshoot`.
    """
    ratio, budget = plan.options.get("ratio"), str(plan.options.get("budget", "parameters"))
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or describe_target(plan):
        return None
    if budget == "parameters":
        return Overshoot(ratio, float(plan.predicted["ratio_of_block_parameters"]), budget)
    cost = get_budget_cost(budget, plan.model.hidden_size)
    if cost is None:
        return None
    dense, kept = (sum_layer_costs(plan.model, cost, layers) for layers in (None, plan.layers))
    return Overshoot(ratio, 1 - kept / dense, budget) if dense else None


def format_asked_share(plan: PruningPlan) -> str:
    """Write what share of the parameters a plan was to remove, to stand behind the share that it does remove.

    Args:
        plan: the plan, with the options of its method.

    Returns:
        "" where the budget of the plan is not a ratio of parameters.

    Example:
        >>> from prunelit.core.plan import LayerPlan, LayerShape, ModelShape
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer,))
        >>> format_asked_share(PruningPlan("random", model, (LayerPlan.dense(layer),), {"ratio": 0.2}))
        ' (asked: 20.00%)'
    """
    if target := describe_target(plan):
        return f" (asked: {target})"
    overshoot = measure_overshoot(plan)
    if overshoot is None or overshoot.budget != "parameters":
        return ""
    return f" (asked: {'at most ' if plan.options.get('rounding') == 'below' else ''}{overshoot.ratio:.2%})"


def describe_overshoot(plan: PruningPlan) -> str:
    """Describe an overshoot of more than one point, and the option that removes nearly what was asked for.

    Args:
        plan: the plan, with the options of its method.

    Returns:
        One sentence for a warning; "" where the plan is near its ratio.

    Example:
        >>> from prunelit.core.plan import LayerPlan, LayerShape, ModelShape
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer, layer))
        >>> kept = LayerPlan((0, 1, 2, 3), (0, 1), tuple(range(16)))
        >>> plan = PruningPlan("random", model, (kept, kept), {"ratio": 0.2, "align": 16})
        >>> removed, finer = describe_overshoot(plan).split("; ")
        >>> removed.partition(", since")[0]
        'ratio 0.2: 24.7% of parameters are removed, 4.7 points more'
        >>> finer
        '--align 1 would remove about 20.1%'
    """
    overshoot = measure_overshoot(plan)
    if overshoot is None or overshoot.excess <= LARGEST_OVERSHOOT:
        return ""
    head = (
        f"ratio {overshoot.ratio:g}: {overshoot.achieved:.1%} of {overshoot.budget.replace('_', ' ')} are removed, "
        f"{100 * overshoot.excess:.1f} points more, since "
    )
    shapes = plan.model.layers
    if any(kept.list_removed_blocks(shape) for kept, shape in zip(plan.layers, shapes, strict=True)):
        return f"{head}whole blocks are removed, and the last one was larger than what was missing"
    nearest: tuple[float, str] | None = None
    for name, value in _list_alternatives(plan):
        share = _share_of_alternative(plan, {name: value})
        if share is not None and share < overshoot.achieved and (nearest is None or share < nearest[0]):
            nearest = share, f"--{name} {value}"
        if nearest is not None and nearest[0] - overshoot.ratio <= LARGEST_OVERSHOOT:
            break
    reason = f"it is cut in steps of {_describe_steps(plan)}"
    finer = f"{nearest[1]} would remove about {nearest[0]:.1%}" if nearest else "no option makes finer ones"
    below = _share_of_alternative(plan, {"rounding": "below"})
    return f"{head}{reason}; {finer}" + (f"; --rounding below would remove about {below:.1%}" if below else "")


def _describe_steps(plan: PruningPlan) -> str:
    """The steps in which the kinds of units of a plan are removed."""
    align, removed = plan.options.get("align"), _find_removed_kinds(plan)
    steps = {
        "heads": str(plan.options.get("unit", "kv_group")),
        "channels": f"FFN widths in multiples of align {align}",
        "experts": "whole experts",
        "expert_channels": f"widths of experts in multiples of align {align}",
    }
    alike = ", in every layer alike" if plan.options.get("scope") == "layer" else ""
    return " and ".join(text for kind, text in steps.items() if kind in removed) + alike


def _list_alternatives(plan: PruningPlan) -> Iterator[tuple[str, Any]]:
    """List options with finer steps, the next finer one first."""
    align, options = plan.options.get("align"), plan.options
    while isinstance(align, int) and align > 1:
        align //= 2
        yield "align", align
    if options.get("unit") == "kv_group" and options.get("budget") != "kv_bytes":
        yield "unit", "query_head"
    if options.get("scope") == "layer":
        yield "scope", "global"


def _share_of_alternative(plan: PruningPlan, changes: dict[str, Any]) -> float | None:
    """Share that the plan's method would remove with other options; None where it cannot. All units score alike."""
    from prunelit.planning.budget import prepare_removal  # loads torch, which `plan show` does without

    # An option that the method chooses itself, as `best` its min_kept, is None there.
    options = {name: plan.options[name] for name in _OPTIONS if plan.options.get(name) is not None} | changes
    rounding = options.pop("rounding", plan.options.get("rounding", "above"))
    cost = get_budget_cost(options.get("budget", "parameters"), plan.model.hidden_size)
    try:
        scores = score_alike(plan.model, _find_removed_kinds(plan))
        removal = prepare_removal(plan.model.layers, scores, cost=cost, **options)
        return removal.compute_share(removal.choose_steps(float(plan.options["ratio"]), rounding))
    except PrunelitError:
        return None


def _find_removed_kinds(plan: PruningPlan) -> "set[ScoreKind]":
    """Kinds of units of which a plan removes some."""
    kinds: set[ScoreKind] = set()
    for shape, kept in zip(plan.model.layers, plan.layers, strict=True):
        counts: dict[ScoreKind, tuple[int, int]] = {
            "heads": (len(kept.query_heads), shape.query_heads),
            "channels": (len(kept.ffn_channels), shape.ffn_channels),
            "experts": (len(kept.experts), shape.experts),
            "expert_channels": (len(kept.expert_channels), shape.expert_channels),
        }
        kinds |= {kind for kind, (remaining, dense) in counts.items() if remaining < dense}
    return kinds
