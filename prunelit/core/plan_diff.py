"""What differs between two plans for one dense model, layer by layer."""

from typing import NamedTuple

from prunelit.core.plan import PruningPlan
from prunelit.runtime.errors import BadPlan


class PlanDifference(NamedTuple):
    """Units of one kind in one layer: kept by the first plan only, by the second only; and how many each keeps."""

    layer: int
    kind: str
    only_first: tuple[int, ...]
    only_second: tuple[int, ...]
    widths: tuple[int, int]


def find_plan_differences(first: PruningPlan, second: PruningPlan) -> list[PlanDifference]:
    """Every kind in every layer in which the plans keep other units, or add other biases; none where they cut alike.

    Raises:
        BadPlan: they are for different dense models.
    """
    _check_same_model(first, second)
    found = []
    for index, (a, b) in enumerate(zip(first.layers, second.layers, strict=True)):
        for kind in ("kv_groups", "query_heads", "ffn_channels"):
            left, right = getattr(a, kind), getattr(b, kind)
            if left != right:
                ours, theirs = (tuple(sorted({*x} - {*y})) for x, y in ((left, right), (right, left)))
                found.append(PlanDifference(index, kind, ours, theirs, (len(left), len(right))))
        for kind in ("attention_bias", "mlp_bias"):
            if getattr(a, kind) != getattr(b, kind):
                found.append(PlanDifference(index, kind, (), (), (getattr(a, kind), getattr(b, kind))))
    return found


def _check_same_model(first: PruningPlan, second: PruningPlan) -> None:
    a, b = first.model, second.model
    pairs = [(name, getattr(a, name), getattr(b, name)) for name in ("model_type", "hidden_size", "parameters")]
    pairs.append(("layers", len(a.layers), len(b.layers)))
    pairs += [(f"layer {index}", *shapes) for index, shapes in enumerate(zip(a.layers, b.layers, strict=False))]
    pairs.append(("weights", a.weights, b.weights))
    for name, one, other in pairs:
        if one != other:
            said = "" if name.startswith("layer ") else f" {one!r} and {other!r}"
            raise BadPlan(f"plan diff: the plans are for different dense models ({a.name}, {b.name}): {name}{said}")
