"""Sets of whole blocks: which may go, what a model without them costs, when a goal is met.

A block is the attention or the FFN of one layer.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from prunelit.core.plan import LayerPlan, LayerShape, ModelShape
from prunelit.runtime.errors import BadOption, InfeasibleBudget

BlockKind = Literal["attention", "mlp"]
BlockChoice = Literal["mix", "attention", "mlp"]
BlockBudget = Literal["parameters", "macs", "kv_bytes"]

IGNORED_OPTIONS = ("scope", "unit", "min_kept", "uniform_heads")
"""Options about widths, which mean nothing where whole blocks go. `align` is not among them: widths that stay whole are
not rounded, and a table's common `align` is kept by all its rows."""


class Block(NamedTuple):
    """The attention or the FFN of one layer; written A7 or M7."""

    layer: int
    kind: BlockKind

    def __str__(self) -> str:
        return f"{self.kind[0].upper()}{self.layer}"

    @classmethod
    def parse(cls, name: str) -> "Block":
        """The block that is written so."""
        kinds: dict[str, BlockKind] = {"A": "attention", "M": "mlp"}
        return cls(int(name[1:]), kinds[name[0]])


BlockSet = frozenset[Block]


def list_blocks(shape: ModelShape, kinds: BlockChoice = "mix", protect: Collection[int] = ()) -> list[Block]:
    """The blocks a model has, all attention by layer, then all FFNs; those of one kind, outside protected layers.

    Raises:
        BadOption: a protected layer that the model does not have.
    """
    layers = len(shape.layers)
    for layer in protect:
        if not -layers <= layer < layers:
            raise BadOption(f"protect: expected layer numbers in [{-layers}, {layers}), got {layer}")
    free = [(i, layer) for i, layer in enumerate(shape.layers) if i not in protect and i - layers not in protect]
    attention = [Block(i, "attention") for i, layer in free if layer.kv_groups and kinds != "mlp"]
    return attention + [Block(i, "mlp") for i, layer in free if layer.ffn_channels and kinds != "attention"]


def can_remove_blocks(shape: ModelShape, removed: Collection[Block]) -> bool:
    """Whether a model is left without these blocks: one attention (if it has any), and one block."""
    attention = list_blocks(shape, "attention")
    return len(removed) < len(list_blocks(shape)) and (not attention or not set(attention) <= set(removed))


def plan_without_blocks(shape: ModelShape, removed: Collection[Block]) -> list[LayerPlan]:
    """What every layer keeps when these blocks go."""
    kept = []
    for index, layer in enumerate(shape.layers):
        dense = LayerPlan.dense(layer)
        heads, groups = ((), ()) if (index, "attention") in removed else (dense.query_heads, dense.kv_groups)
        kept.append(LayerPlan(heads, groups, () if (index, "mlp") in removed else dense.ffn_channels))
    return kept


def sum_block_costs(shape: ModelShape, removed: Collection[Block], budget: BlockBudget = "parameters") -> int:
    """Parameters, MACs per token or KV-cache elements per token that go with these blocks."""

    def at(layer: LayerShape, heads: int, groups: int, channels: int) -> int:
        if budget == "kv_bytes":
            return layer.kv_elements_at(groups)
        if budget == "macs":
            return layer.macs_at(shape.hidden_size, heads, groups, channels)
        return layer.parameters_at(heads, groups, channels)

    total = 0
    for index, layer in enumerate(shape.layers):
        attention, mlp = (index, "attention") not in removed, (index, "mlp") not in removed
        total += at(layer, layer.query_heads, layer.kv_groups, layer.ffn_channels)
        total -= at(layer, attention * layer.query_heads, attention * layer.kv_groups, mlp * layer.ffn_channels)
    return total


@dataclass(frozen=True)
class RemovalGoal:
    """How much goes: a number of units (blocks, or whole layers), or at least a share of the decoder layers' budget.

    Raises:
        BadOption: not exactly one of them, or one out of its range.
    """

    ratio: float | None = None
    count: int | None = None
    budget: BlockBudget = "parameters"

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.count is None):
            got = "neither" if self.ratio is None else "both"
            raise BadOption(f"ratio, count: expected exactly one of them, got {got}; give ratio=0.2, or count=5")
        ratio, count = (0.5 if self.ratio is None else self.ratio), (1 if self.count is None else self.count)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
            raise BadOption(f"ratio: expected a number between 0 and 1 (both excluded), got {ratio!r}")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise BadOption(f"count: expected a number of at least 1, got {count!r}")
        if self.budget not in (allowed := get_args(BlockBudget)):
            raise BadOption(f"budget: expected one of {', '.join(allowed)} for whole blocks, got {self.budget!r}")

    @classmethod
    def from_options(cls, ratio: float | None, count: int | None, options: Mapping[str, Any]) -> "RemovalGoal":
        """From a method's constructor: `options` are the arguments that go to `PruningCallback`.

        Raises:
            BadOption: as above.
        """
        return cls(ratio, count, options.get("budget", "parameters"))

    def compute_share(self, shape: ModelShape, removed: Collection[Block]) -> float:
        """Of the decoder layers' budget that goes with these blocks."""
        return sum_block_costs(shape, removed, self.budget) / max(
            1, sum_block_costs(shape, list_blocks(shape), self.budget)
        )

    def is_met(self, shape: ModelShape, removed: Collection[Block], units: int) -> bool:
        """Whether enough is gone: these blocks, which count as `units`."""
        return (
            units >= self.count if self.count is not None else self.compute_share(shape, removed) >= (self.ratio or 0.0)
        )

    def check_feasible(self, shape: ModelShape, candidates: Collection[Block], units: int) -> None:
        """Raise unless the goal can be met.

        Args:
            shape: of the model.
            candidates: the blocks that may go.
            units: how many can go at most, where a number is the goal.

        Raises:
            InfeasibleBudget: it can not.
        """
        if self.count is not None and self.count > units:
            raise self.make_infeasible_error(str(units))
        attention = list_blocks(shape, "attention")
        allowed = [set(candidates) - {stays} for stays in attention] or [set(candidates)]
        most = max(self.compute_share(shape, some) for some in allowed)
        if self.ratio is not None and self.ratio > most:
            raise self.make_infeasible_error(f"{most:.4f} of the {self.budget}")

    def make_infeasible_error(self, most: str) -> InfeasibleBudget:
        """The error that says how much can go."""
        asked = f"ratio {self.ratio}" if self.count is None else f"count {self.count}"
        return InfeasibleBudget(
            f"{asked}: expected at most {most} in the blocks that may go, since one attention stays; ask for less, "
            "protect fewer layers, or let both kinds of block go"
        )
