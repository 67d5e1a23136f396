"""What a cut would take and leave, as text, before anything is loaded or scored."""

from collections.abc import Callable
from typing import NamedTuple

from prunelit.core.plan import PruningPlan
from prunelit.planning.amounts import format_memory_size
from prunelit.planning.targets import SizeTarget, count_memory, describe_target
from prunelit.report.format_numbers import format_count, format_duration
from prunelit.report.plan_card import make_dense_plan, render_layer_table, render_plan_totals

_PASSES = {"no text": 0, "forward": 1, "backward": 3}
_SHARES: dict[str, Callable[[PruningPlan], float]] = {
    "parameters": lambda plan: plan.predicted["block_parameters"],
    "macs": lambda plan: plan.predicted["macs_per_token"] - plan.model.head_macs,
    "kv_bytes": lambda plan: plan.predicted["kv_bytes_per_token"],
}


class ScoringWork(NamedTuple):
    """The work of a method before the cut.

    Attributes:
        needs: key of `prunelit.cli.method_cards.NEEDS`; None where it is not known.
        tokens: of calibration text.
        is_streamed: layers stay on disk.
        rate: multiply-accumulates a second of the device, measured.

    Example:
        >>> ScoringWork("backward", 1000).passes
        3
    """

    needs: str | None
    tokens: int
    is_streamed: bool = False
    rate: float | None = None

    @property
    def passes(self) -> int | None:
        """The text through the model so many times, a backward pass counted twice; None where it is not known."""
        return _PASSES.get(self.needs or "")


def render_estimate(plan: PruningPlan, target: SizeTarget, scoring: ScoringWork) -> str:
    """Write what a cut would take and leave: shares, sizes, memory in use, and the work of scoring.

    Args:
        plan: in which all units scored alike; a method will choose others, and as many.
        target: what was asked; its context and batch size the KV cache.
        scoring: the work before the cut.

    Returns:
        Text of several lines.

    Example:
        >>> from prunelit.core.plan import LayerPlan, LayerShape, ModelShape
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer,))
        >>> plan = PruningPlan("flap", model, (LayerPlan((0, 1), (0,), tuple(range(16))),), {"ratio": 0.5})
        >>> print(render_estimate(plan, SizeTarget(context=10), ScoringWork("forward", 512)).splitlines()[-1])
        scoring: 512 tokens in forward passes, 1.57 M multiply-accumulates with weights; weights 39.1 KiB
    """
    model, dense = plan.model, make_dense_plan(plan)
    asked = describe_target(plan) or f"ratio {plan.options.get('ratio')}"
    shares = {name: 1 - count(plan) / max(1, count(dense)) for name, count in _SHARES.items()}
    needed = ", ".join(f"{name.replace('_', ' ')} {share:.3f}" for name, share in shares.items())
    memory = [
        (name, each.predicted["parameters"] * model.bytes_per_element, count_memory(model, target, each))
        for name, each in (("dense", dense), ("planned", plan))
    ]
    memory_lines = [
        f"memory, {name}: weights {format_memory_size(weights)} + KV cache {format_memory_size(total - weights)} "
        f"= {format_memory_size(total)}"
        for name, weights, total in memory
    ]
    cache = f"({8 * model.bytes_per_element} bits; KV cache of {target.batch} x {target.context:,} tokens)"
    return "\n".join(
        [
            f"{model.name} ({model.model_type}, {len(model.layers)} layers), from its config alone: nothing was loaded",
            "",
            f"asked: {asked}",
            f"share of the layers that goes: {needed}; --ratio {_round_share(shares['parameters'])} asks for as much",
            "",
            render_plan_totals({"dense": dense, "planned": plan}),
            "",
            *memory_lines,
            cache,
            "",
            "as if all units scored alike:",
            render_layer_table(plan),
            "",
            _describe_scoring(plan, scoring),
        ]
    )


def _round_share(share: float) -> str:
    return f"{share:.4f}".rstrip("0")


def _describe_scoring(plan: PruningPlan, scoring: ScoringWork) -> str:
    """The work of scoring, its time at the measured rate, and the weights that it holds."""
    model, dense = plan.model, make_dense_plan(plan)
    if scoring.needs == "no text":
        return f"scoring: reads no text; weights {format_memory_size(model.parameters * model.bytes_per_element)}"
    if scoring.passes is None:
        return f"scoring: {plan.method} runs the text many times or trains; how long that takes is not known"
    macs = int((dense.predicted["macs_per_token"] - model.head_macs) * scoring.tokens * scoring.passes)
    kind = "forward passes" if scoring.needs == "forward" else "forward and backward passes"
    weights = model.parameters * model.bytes_per_element
    line = f"scoring: {scoring.tokens:,} tokens in {kind}, {format_count(macs)} multiply-accumulates with weights"
    if scoring.rate is not None:
        line += (
            f", {format_duration(macs / scoring.rate)} at the {format_count(scoring.rate)} a second that one matrix "
            "product reaches here"
        )
    if scoring.is_streamed:
        largest = max(layer.parameters for layer in model.layers)
        held = (model.parameters - model.block_parameters + largest) * model.bytes_per_element
        return f"{line}; weights {format_memory_size(held)} at once, layer by layer from disk"
    return f"{line}; weights {format_memory_size(weights)}"
