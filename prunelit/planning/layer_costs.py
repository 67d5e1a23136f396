"""What a decoder layer costs in the measure of each budget, from its shape alone."""

from functools import partial
from typing import TYPE_CHECKING, Any

from prunelit.core.shapes import LayerShape

if TYPE_CHECKING:
    from prunelit.core.scores import Cost


def get_budget_cost(budget: str, hidden_size: int = 1) -> "Cost | None":
    """Get the cost function of a layer in a budget.

    Args:
        budget: one of `prunelit.planning.budget.Budget`.
        hidden_size: of the model, by which MACs of attention and FFN are multiplied, and those of a mixer are not; 1:
            MACs per unit of it, whose ratio is that of the whole where no layer has a mixer.

    Returns:
        A function of a layer's shape and remaining widths; None for a budget that is measured. KV cache is counted in
        elements, a factor that all layers share.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> get_budget_cost("kv_bytes")(layer, 4, 2, 32)
        32
    """
    costs: dict[str, Cost] = {
        "parameters": LayerShape.parameters_at,
        "active_parameters": partial(LayerShape.parameters_at, active=True),
        "macs": partial(_count_macs, hidden_size),
        "kv_bytes": _count_kv_elements,
    }
    return costs.get(budget)


def _count_macs(hidden_size: int, shape: LayerShape, *widths: Any, **mixture: Any) -> float:
    return shape.macs_at(hidden_size, *widths, **mixture)


def _count_kv_elements(shape: LayerShape, heads: int, groups: int, channels: int, **mixture: Any) -> float:
    return shape.kv_elements_at(groups)
