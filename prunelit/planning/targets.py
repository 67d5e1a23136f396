"""Sizes that people ask for, such as 6B parameters, 12GiB or 1.5 times the speed, as shares of the decoder layers.

A target is of the whole model, embeddings and towers included; a cut takes from the decoder layers alone. So each
target becomes a share of what the layers cost in its own measure: parameters, bytes of weights and KV cache, seconds.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from prunelit.core.plan import LayerPlan, PruningPlan
from prunelit.core.shapes import LayerShape, ModelShape
from prunelit.planning.amounts import (
    Amount,
    format_memory_size,
    format_parameter_count,
    parse_memory_size,
    parse_parameter_count,
)
from prunelit.planning.layer_costs import get_budget_cost
from prunelit.runtime.errors import BadOption, InfeasibleBudget

if TYPE_CHECKING:
    from prunelit.core.scores import Cost, LayerScores, ScoreKind

TARGET_OPTIONS = ("parameters", "memory", "speedup", "context", "batch")
"""Names of the options that make a `SizeTarget`."""
DEFAULT_CONTEXT, DEFAULT_BATCH = 4096, 1


@dataclass(frozen=True)
class SizeTarget:
    """What the whole model may be after the cut; None where nothing is asked.

    Attributes:
        parameters: at most, tied weights once.
        memory: bytes at most, of all weights and the KV cache of `batch` sequences of `context` tokens, both in the
            model's dtype. Every attention is taken to hold the whole context.
        speedup: prefill at least this many times as fast as before, measured on the machine at hand.
        context: tokens per sequence in the KV cache.
        batch: sequences in the KV cache.

    Example:
        >>> SizeTarget.from_options("6B", None, None, None, None).parameters
        6000000000
    """

    parameters: int | None = None
    memory: int | None = None
    speedup: float | None = None
    context: int = DEFAULT_CONTEXT
    batch: int = DEFAULT_BATCH

    @classmethod
    def from_options(
        cls,
        parameters: Amount | None,
        memory: Amount | None,
        speedup: float | None,
        context: int | None,
        batch: int | None,
    ) -> "SizeTarget":
        """Read the options of a method or a command.

        Args:
            parameters: see `parse_parameter_count`.
            memory: see `parse_memory_size`.
            speedup: above 1.
            context, batch: at least 1; they belong to `memory`.

        Raises:
            BadOption: names the option, what was expected and what it got.
        """
        if speedup is not None and (isinstance(speedup, bool) or not 1 < float(speedup) < math.inf):
            raise BadOption(f"speedup: expected a number above 1, such as 1.5, got {speedup!r:.40}")
        for name, value in (("context", context), ("batch", batch)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadOption(f"{name}: expected at least 1, got {value!r:.40}")
            if memory is None:
                raise BadOption(
                    f"{name}: sizes the KV cache that memory counts; expected memory beside it, got none: give "
                    "memory too, or leave it out"
                )
        return cls(
            None if parameters is None else parse_parameter_count(parameters),
            None if memory is None else parse_memory_size(memory),
            None if speedup is None else float(speedup),
            DEFAULT_CONTEXT if context is None else context,
            DEFAULT_BATCH if batch is None else batch,
        )

    @property
    def is_asked(self) -> bool:
        """Whether anything is asked."""
        return any(value is not None for value in (self.parameters, self.memory, self.speedup))


def check_ratio_or_target(ratio: float | None, budget: str, rounding: str, target: SizeTarget) -> None:
    """Check that a ratio or a target says how much is cut, and that other options go with it.

    Args:
        ratio: share of the layers' budget, if any.
        budget: what it counts.
        rounding: of the ratio.
        target: of the whole model.

    Raises:
        BadOption: nothing says how much, or an option belongs to a ratio that is not there.

    Example:
        >>> check_ratio_or_target(None, "parameters", "above", SizeTarget(parameters=1000))
        >>> check_ratio_or_target(None, "macs", "above", SizeTarget(parameters=1000))
        Traceback (most recent call last):
        prunelit.runtime.errors.BadOption: budget: says what ratio counts; expected ratio beside it, got 'macs' alone
    """
    if ratio is None and not target.is_asked:
        raise BadOption(
            "ratio: expected it, or parameters, memory or speedup, got none of them; give how much is to go, such as "
            "ratio 0.2 or parameters 6B"
        )
    if ratio is None and budget != "parameters":
        raise BadOption(f"budget: says what ratio counts; expected ratio beside it, got {budget!r} alone")
    if rounding == "below" and target.is_asked:
        raise BadOption(
            "rounding: expected 'above' with parameters, memory or speedup, which are limits, got 'below'; leave it out"
        )


class LayerTimes(NamedTuple):
    """Measured time of a model, for `SizeTarget.speedup`.

    Attributes:
        cost: seconds of a layer at given widths.
        outside: seconds outside the decoder layers.

    Example: see `list_constraints`.
    """

    cost: "Cost"
    outside: float


class Constraint(NamedTuple):
    """One thing that a cut has to reach, as a share of what the decoder layers cost.

    Attributes:
        name: of the option: "ratio", "parameters", "memory" or "speedup".
        ratio: share of the layers' cost to remove; not above 0 where the dense model reaches it already.
        budget: what is counted, for messages.
        cost: of a layer; None for a budget that is measured, before it is.
        dense: of the whole model, in the same measure.
        of_layers: of the decoder layers, in the same measure; 0 for "ratio", which needs neither.
        unit_format: writes such a number for people.

    Example: see `list_constraints`.
    """

    name: str
    ratio: float
    budget: str
    cost: "Cost | None" = None
    dense: float = 0.0
    of_layers: float = 0.0
    unit_format: Callable[[float], str] = str

    def describe(self) -> str:
        """What is asked, in the terms of the decoder layers."""
        if self.name == "ratio":
            return f"ratio {self.ratio:g} of the layers' {self.budget.replace('_', ' ')}"
        return (
            f"{self.name}: {self.unit_format(self.dense - self.ratio * self.of_layers)} of "
            f"{self.unit_format(self.dense)}{_NOUNS[self.name]}: {self.ratio:.1%} of the layers' go"
        )


_NOUNS = {"parameters": " parameters", "memory": " of weights and KV cache", "speedup": " of prefill"}


def list_constraints(
    shape: ModelShape,
    target: SizeTarget,
    ratio: float | None = None,
    budget: str = "parameters",
    budget_cost: "Cost | None" = None,
    parameter_cost: "Cost" = LayerShape.parameters_at,
    times: LayerTimes | None = None,
) -> list[Constraint]:
    """List what a cut has to reach; what the dense model reaches already is left out.

    Args:
        shape: of the dense model.
        target: what is asked of the whole model.
        ratio: share of the layers' `budget` that has to go besides; None: no such share.
        budget: what `ratio` counts.
        budget_cost: cost of a layer in that budget, where it is measured or a repair adds to it; None: the budget's
            own count.
        parameter_cost: counts parameters of a layer; a repair may add some.
        times: measured; None: a speedup is left out.

    Raises:
        BadOption: the dense model reaches all of it already.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer, layer))
        >>> [each.describe() for each in list_constraints(model, SizeTarget(parameters=8758))]
        ["parameters: 8,758 of 10,000 parameters: 20.0% of the layers' go"]
    """
    memory_cost = make_memory_cost(shape, target, parameter_cost)
    measures: list[tuple[str, float | None, float, Cost, Callable[[float], str]]] = [
        ("parameters", target.parameters, shape.parameters, parameter_cost, format_parameter_count),
        ("memory", target.memory, count_memory(shape, target), memory_cost, format_memory_size),
    ]
    if times is not None and target.speedup is not None:
        seconds = sum_layer_costs(shape, times.cost) + times.outside
        measures.append(("speedup", seconds / target.speedup, seconds, times.cost, lambda x: f"{1e3 * x:.1f} ms"))
    constraints = []
    if ratio is not None:
        budget_cost = budget_cost or get_budget_cost(budget, shape.hidden_size)
        constraints.append(Constraint("ratio", ratio, budget, budget_cost))
    reached = []
    for name, most, dense, cost, unit_format in measures:
        if most is None:
            continue
        of_layers = sum_layer_costs(shape, cost)
        constraint = Constraint(name, (dense - most) / of_layers, name, cost, dense, of_layers, unit_format)
        if constraint.ratio > 0:
            constraints.append(constraint)
        else:
            reached.append(f"{name}: expected less than the model's {unit_format(dense)}, got {unit_format(most)}")
    if reached and not constraints and (times is not None or target.speedup is None):
        raise BadOption(f"{'; '.join(reached)}: nothing has to go")
    return constraints


def make_memory_cost(
    shape: ModelShape, target: SizeTarget, parameter_cost: "Cost" = LayerShape.parameters_at
) -> "Cost":
    """Make the cost function of a layer's weights and KV cache, in bytes.

    Args:
        shape: of the model, for the bytes of one element.
        target: with context and batch.
        parameter_cost: counts parameters of a layer.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer,))
        >>> make_memory_cost(model, SizeTarget(context=10))(layer, 4, 2, 32)
        13696
    """
    size, tokens = shape.bytes_per_element, target.context * target.batch

    def count_bytes(layer: LayerShape, heads: int, groups: int, channels: int, **rest: Any) -> float:
        return size * (parameter_cost(layer, heads, groups, channels, **rest) + tokens * layer.kv_elements_at(groups))

    return count_bytes


def count_memory(shape: ModelShape, target: SizeTarget, plan: PruningPlan | None = None) -> int:
    """Count the bytes of all weights and of the KV cache.

    Args:
        shape: of the dense model.
        target: with context and batch.
        plan: of a cut; None: nothing is cut.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> count_memory(ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer,)), SizeTarget(context=10))
        41280
    """
    if plan is not None:
        predicted = plan.predicted
        cache = int(predicted["kv_bytes_per_token"]) * target.context * target.batch
        return int(predicted["parameters"]) * shape.bytes_per_element + cache
    elements = sum(layer.kv_elements_at(layer.kv_groups) for layer in shape.layers) * target.context * target.batch
    return shape.bytes_per_element * (shape.parameters + elements)


def sum_layer_costs(shape: ModelShape, cost: "Cost", layers: Sequence[LayerPlan] | None = None) -> float:
    """Sum what the decoder layers cost.

    Args:
        shape: of the dense model.
        cost: of one layer.
        layers: what remains; None: everything.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> sum_layer_costs(ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer, layer)), LayerShape.parameters_at)
        6208
    """
    if layers is None:
        return sum(cost(each, each.query_heads, each.kv_groups, each.ffn_channels) for each in shape.layers)
    pairs = zip(shape.layers, layers, strict=True)
    return sum(_count_kept(cost, each, kept) for each, kept in pairs)


def _count_kept(cost: "Cost", shape: LayerShape, kept: LayerPlan) -> float:
    mixture = {"experts": len(kept.experts), "expert_channels": len(kept.expert_channels)} if shape.experts else {}
    mixer = {} if kept.mixer or not shape.has_mixer else {"mixer": False}
    return cost(shape, *kept.widths, **mixture, **mixer)


def select_tightest(
    shape: ModelShape, constraints: Sequence[Constraint], select: Callable[..., tuple[LayerPlan, ...]]
) -> tuple[tuple[LayerPlan, ...], Constraint]:
    """Select the units that remain under several constraints.

    Each constraint alone leads to a choice. Of those that reach the others too, the one that leaves least is taken.
    Where none does, for instance because of the last step, which its budget has given back, the one that leaves least
    removes a little more until all are reached.

    Args:
        shape: of the dense model.
        constraints: at least one.
        select: takes `ratio`, `budget` and `cost` of `prunelit.planning.budget.select_units`.

    Returns:
        What remains in each layer, and the tightest constraint.

    Raises:
        InfeasibleBudget: a constraint cannot be reached; says how small the model can be.

    Example: see `prunelit.pruning.method.PruningMethod.make_selector`, which uses it.
    """
    choices = [(_select_one(constraint, constraint.ratio, select), constraint) for constraint in constraints]
    if len(choices) == 1:
        return choices[0]
    reaching = [choice for choice in choices if all(is_reached(shape, choice[0], each) for each in constraints)]
    layers, tightest = min(
        reaching or choices, key=lambda choice: sum_layer_costs(shape, LayerShape.parameters_at, choice[0])
    )
    ratio = tightest.ratio
    while not all(is_reached(shape, layers, constraint) for constraint in constraints):
        ratio += 0.001
        layers = _select_one(tightest, ratio, select)
    return layers, tightest


def is_reached(shape: ModelShape, layers: Sequence[LayerPlan], constraint: Constraint) -> bool:
    """Whether what remains in the layers reaches a constraint.

    Example: see `select_tightest`.
    """
    assert constraint.cost is not None, f"{constraint.budget} was not measured"
    dense = sum_layer_costs(shape, constraint.cost)
    return sum_layer_costs(shape, constraint.cost, layers) <= dense * (1 - constraint.ratio) * (1 + 1e-9)


def _select_one(
    constraint: Constraint, ratio: float, select: Callable[..., tuple[LayerPlan, ...]]
) -> tuple[LayerPlan, ...]:
    cost, budget = constraint.cost, constraint.budget if constraint.name == "ratio" else "parameters"
    if constraint.name == "ratio":
        return select(ratio=ratio, budget=budget, cost=cost)
    try:
        if ratio >= 1:
            select(ratio=1 - 1e-9, budget=budget, cost=cost)  # says what the largest share is
        return select(ratio=ratio, budget=budget, cost=cost)
    except InfeasibleBudget as error:
        if error.largest_share is None:
            raise
        raise make_unreachable_error(constraint, error.largest_share) from error


def make_unreachable_error(constraint: Constraint, largest_share: float) -> InfeasibleBudget:
    """Make the error for a target that is smaller than any cut.

    Args:
        constraint: that cannot be reached; not a ratio.
        largest_share: of the layers' cost that can go at most.

    Example: see `select_tightest`.
    """
    asked, least = (constraint.dense - share * constraint.of_layers for share in (constraint.ratio, largest_share))
    if constraint.name == "speedup":
        speedups = f"{constraint.dense / least:.2f} times the speed", f"{constraint.dense / max(asked, 1e-9):.2f}"
        return InfeasibleBudget(
            f"speedup: expected at most {speedups[0]}, got {speedups[1]}; the rest of the time is outside of what "
            "these options may cut",
            largest_share,
        )
    # Rounded up, so that what is named can be asked for.
    least_text, asked_text = constraint.unit_format(least * 1.005), constraint.unit_format(max(0.0, asked))
    return InfeasibleBudget(
        f"{constraint.name}: the smallest that these options reach is {least_text} (of "
        f"{constraint.unit_format(constraint.dense)}), got {asked_text}; ask for more, lower align or min_kept, or "
        "protect fewer layers",
        largest_share,
    )


def make_target_record(target: SizeTarget, tightest: Constraint, constraints: Sequence[Constraint]) -> dict[str, Any]:
    """Make what a plan keeps of its target, as plain data.

    Args:
        target: that was asked for.
        tightest: the constraint that decided.
        constraints: all of them.

    Example: see `describe_target`.
    """
    asked = {name: getattr(target, name) for name in TARGET_OPTIONS[:3] if getattr(target, name) is not None}
    cache = {"context": target.context, "batch": target.batch} if target.memory is not None else {}
    return {
        **asked,
        **cache,
        "tightest": tightest.name,
        "ratios": {constraint.name: round(constraint.ratio, 6) for constraint in constraints},
        "said": describe_constraints(tightest, constraints),
    }


def describe_constraints(tightest: Constraint, constraints: Collection[Constraint]) -> str:
    """Say what is asked of the layers, the tightest first.

    Example:
        >>> describe_constraints(Constraint("ratio", 0.2, "macs"), [Constraint("ratio", 0.2, "macs")])
        "ratio 0.2 of the layers' macs"
    """
    others = [constraint.describe() for constraint in constraints if constraint.name != tightest.name]
    return tightest.describe() + (f" (the tightest; also {'; '.join(others)})" if others else "")


def describe_target(plan: PruningPlan) -> str:
    """Say what a plan was asked for in terms of the whole model; "" where that was a ratio alone.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer,))
        >>> describe_target(PruningPlan("random", model, (LayerPlan.dense(layer),)))
        ''
    """
    record = plan.calibration.get("target")
    return str(record.get("said", "")) if isinstance(record, Mapping) else ""


def score_alike(shape: ModelShape, kinds: Collection["ScoreKind"]) -> "list[LayerScores]":
    """Make equal scores for the units of a model, to see what a budget leads to before anything is scored.

    Layers of one shape share one object, which `prunelit.planning.budget` works out once.

    Args:
        shape: of the dense model.
        kinds: of units that may go.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer, layer))
        >>> first, second = score_alike(model, ["heads"])
        >>> first is second, len(first.heads), first.channels is None
        (True, 4, True)
    """
    import torch  # `plan show` reads this module without

    from prunelit.core.scores import LayerScores

    sizes = {"heads": "query_heads", "channels": "ffn_channels"}
    made: dict[LayerShape, LayerScores] = {}
    for layer in dict.fromkeys(shape.layers):
        made[layer] = LayerScores(**{kind: torch.zeros(getattr(layer, sizes.get(kind, kind))) for kind in kinds})
    return [made[layer] for layer in shape.layers]


def plan_alike(
    shape: ModelShape, kinds: Collection["ScoreKind"], constraints: Sequence[Constraint], **options: Any
) -> tuple[tuple[LayerPlan, ...], Constraint]:
    """Select units as if all of them scored alike: how many go of each kind, before anything is scored.

    Args:
        shape: of the dense model.
        kinds: of units that may go.
        constraints: at least one.
        options: of `prunelit.planning.budget.select_units`.

    Raises:
        InfeasibleBudget: a constraint cannot be reached.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer, layer))
        >>> constraints = list_constraints(model, SizeTarget(parameters=8758))
        >>> layers, tightest = plan_alike(model, ["channels"], constraints, align=8)
        >>> layers[0].widths, tightest.name
        ((4, 2, 16), 'parameters')
    """
    from prunelit.planning.budget import select_units

    return select_tightest(
        shape, constraints, partial(select_units, shape.layers, score_alike(shape, kinds), **options)
    )
