"""Differences between two plans for the same dense model, layer by layer."""

from typing import NamedTuple

from prunelit.core.plan import PruningPlan
from prunelit.runtime.errors import BadPlan


class PlanDifference(NamedTuple):
    """A difference in the units of one kind in one layer.

    Attributes:
        layer: number of the layer.
        kind: "kv_groups", "query_heads", "ffn_channels", "experts", "expert_channels", "attention_bias" or "mlp_bias".
        only_first: units that remain in the first plan only.
        only_second: units that remain in the second plan only.
        widths: number of remaining units in each plan; for a bias, whether each plan adds one.

    Example: see `prunelit.report.plan_card`, which uses it.
    """

    layer: int
    kind: str
    only_first: tuple[int, ...]
    only_second: tuple[int, ...]
    widths: tuple[int, int]


def find_plan_differences(first: PruningPlan, second: PruningPlan) -> list[PlanDifference]:
    """Find every kind of unit and added bias, in every layer, in which two plans differ.

    Returns:
        The differences by layer; empty if the plans remove the same.

    Raises:
        BadPlan: the plans are for different dense models.

    Example:
        >>> from prunelit.core.plan import LayerPlan, LayerShape, ModelShape
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer,))
        >>> plans = [PruningPlan("made", model, (LayerPlan((0, 1), (0,), channels),)) for channels in ((0, 1), (1, 2))]
        >>> find_plan_differences(*plans)
        [PlanDifference(layer=0, kind='ffn_channels', only_first=(0,), only_second=(2,), widths=(2, 2))]
    """
    _check_same_model(first, second)
    differences = []
    for index, (layer_a, layer_b) in enumerate(zip(first.layers, second.layers, strict=True)):
        for kind in ("kv_groups", "query_heads", "ffn_channels", "experts", "expert_channels"):
            units_a, units_b = getattr(layer_a, kind), getattr(layer_b, kind)
            if units_a != units_b:
                only_a, only_b = tuple(sorted({*units_a} - {*units_b})), tuple(sorted({*units_b} - {*units_a}))
                differences.append(PlanDifference(index, kind, only_a, only_b, (len(units_a), len(units_b))))
        for kind in ("attention_bias", "mlp_bias"):
            bias_a, bias_b = getattr(layer_a, kind), getattr(layer_b, kind)
            if bias_a != bias_b:
                differences.append(PlanDifference(index, kind, (), (), (bias_a, bias_b)))
    return differences


def _check_same_model(first: PruningPlan, second: PruningPlan) -> None:
    model_a, model_b = first.model, second.model
    pairs = [(name, getattr(model_a, name), getattr(model_b, name)) for name in ("model_type", "hidden_size")]
    pairs.append(("parameters", model_a.parameters, model_b.parameters))
    pairs.append(("layers", len(model_a.layers), len(model_b.layers)))
    layer_pairs = zip(model_a.layers, model_b.layers, strict=False)
    pairs += [(f"layer {index}", *shapes) for index, shapes in enumerate(layer_pairs)]
    pairs.append(("weights", model_a.weights, model_b.weights))
    for name, value_a, value_b in pairs:
        if value_a != value_b:
            # Two layer shapes would fill several lines.
            values = "" if name.startswith("layer ") else f" {value_a!r} and {value_b!r}"
            raise BadPlan(
                f"plan diff: the plans are for different dense models ({model_a.name}, {model_b.name}): {name}{values}"
            )
