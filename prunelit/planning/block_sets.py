"""Sets of whole blocks: which blocks may be removed, how much they cost, and when a removal goal is met.

A block is the attention, the FFN or, in hybrid models, the mixer of one layer.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from prunelit.core.plan import LayerPlan, LayerShape, ModelShape
from prunelit.planning.targets import (
    TARGET_OPTIONS,
    Constraint,
    SizeTarget,
    list_constraints,
    make_target_record,
    make_unreachable_error,
)
from prunelit.runtime.errors import BadOption, InfeasibleBudget

if TYPE_CHECKING:
    from prunelit.core.scores import Cost

BlockKind = Literal["attention", "mlp", "mixer"]
BlockChoice = Literal["mix", "attention", "mlp"]
BlockBudget = Literal["parameters", "macs", "kv_bytes"]

IGNORED_OPTIONS = ("scope", "unit", "kinds", "min_kept", "uniform_heads", "rounding", "speedup")
"""Options about widths, and about a time measured over widths: they have no effect when whole blocks are removed.
`align` is not among them: a comparison table sets one `align` for all its rows, and widths that stay whole are not
rounded anyway."""


_LETTERS: dict[BlockKind, str] = {"attention": "A", "mlp": "M", "mixer": "X"}


class Block(NamedTuple):
    """The attention, the FFN or the mixer of one layer; written as A7, M7 or X7.

    Example:
        >>> str(Block(7, "attention"))
        'A7'
    """

    layer: int
    kind: BlockKind

    def __str__(self) -> str:
        return f"{_LETTERS[self.kind]}{self.layer}"

    @classmethod
    def parse(cls, name: str) -> "Block":
        """Read a block from its written form.

        Example:
            >>> Block.parse("M7")
            Block(layer=7, kind='mlp')
        """
        kinds = {letter: kind for kind, letter in _LETTERS.items()}
        return cls(int(name[1:]), kinds[name[0]])


BlockSet = frozenset[Block]


def list_blocks(shape: ModelShape, kinds: BlockChoice = "mix", protect: Collection[int] = ()) -> list[Block]:
    """List the blocks of a model: every attention by layer, then every mixer, then every FFN.

    Args:
        shape: the dense model.
        kinds: "mix" lists all kinds; "attention" lists attentions, and the mixers that stand in place of one; "mlp"
            lists FFNs.
        protect: layers whose blocks are left out; negative numbers count from the end.

    Raises:
        BadOption: a protected layer does not exist.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer, layer))
        >>> [str(block) for block in list_blocks(model)]
        ['A0', 'A1', 'M0', 'M1']
    """
    layers = len(shape.layers)
    for layer in protect:
        if not -layers <= layer < layers:
            raise BadOption(f"protect: expected layer numbers in [{-layers}, {layers}), got {layer}")
    unprotected = [(i, layer) for i, layer in enumerate(shape.layers) if i not in protect and i - layers not in protect]
    attention = [Block(i, "attention") for i, layer in unprotected if layer.kv_groups and kinds != "mlp"]
    mixers = [Block(i, "mixer") for i, layer in unprotected if layer.has_mixer and kinds != "mlp"]
    ffns = [Block(i, "mlp") for i, layer in unprotected if layer.has_ffn and kinds != "attention"]
    return attention + mixers + ffns


def can_remove_blocks(shape: ModelShape, removed: Collection[Block]) -> bool:
    """Whether a model still works without these blocks.

    One block stays, and one attention if there was any; a layer that is fixed keeps a block; where attention and mixer
    share a place in the cache, both stay or the whole layer goes.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer, layer))
        >>> can_remove_blocks(model, [Block(0, "attention")])
        True
        >>> can_remove_blocks(model, [Block(0, "attention"), Block(1, "attention")])
        False
    """
    removed = set(removed)
    attention = _list_needed_attention(shape)
    if len(removed) >= len(list_blocks(shape)) or (attention and attention <= removed):
        return False
    return all(
        _can_remove_layer_blocks(layer, {block.kind for block in removed if block.layer == index})
        for index, layer in enumerate(shape.layers)
        if layer.fixed or not layer.attention_removable
    )


def _list_needed_attention(shape: ModelShape) -> set[Block]:
    """List the attentions, one of which stays; where there is none, the mixers in their place."""
    mixing = set(list_blocks(shape, "attention"))
    return {block for block in mixing if block.kind == "attention"} or mixing


def _count_units(candidates: Collection[Block], removed: set[Block], whole_layers: bool) -> int:
    """Count the blocks that are removed, or the layers all of whose candidates are."""
    if not whole_layers:
        return len(removed)
    layers = {block.layer for block in candidates}
    return len(layers - {block.layer for block in set(candidates) - removed})


def _can_remove_layer_blocks(layer: LayerShape, removed: Collection[BlockKind]) -> bool:
    """Whether a layer with restrictions may lose these blocks."""
    present = (("attention", layer.kv_groups), ("mixer", layer.has_mixer), ("mlp", layer.has_ffn))
    if {kind for kind, is_present in present if is_present} <= set(removed):
        return not layer.fixed
    return layer.attention_removable or not {"attention", "mixer"} & set(removed)


def plan_without_blocks(shape: ModelShape, removed: Collection[Block]) -> list[LayerPlan]:
    """Build the plan of every layer for a model that loses these blocks and keeps all other units.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer, layer))
        >>> [plan.widths for plan in plan_without_blocks(model, [Block(1, "mlp")])]
        [(4, 2, 32), (4, 2, 0)]
    """
    plans = []
    for index, layer in enumerate(shape.layers):
        dense = LayerPlan.dense(layer)
        heads, groups = ((), ()) if (index, "attention") in removed else (dense.query_heads, dense.kv_groups)
        keeps_mixer = dense.mixer and (index, "mixer") not in removed
        ffn = ((), (), ()) if (index, "mlp") in removed else (dense.ffn_channels, dense.experts, dense.expert_channels)
        channels, experts, expert_channels = ffn
        plans.append(
            LayerPlan(*(heads, groups, channels), mixer=keeps_mixer, experts=experts, expert_channels=expert_channels)
        )
    return plans


def sum_block_costs(
    shape: ModelShape, removed: Collection[Block], budget: BlockBudget = "parameters", cost: "Cost | None" = None
) -> float:
    """Sum what a model saves without these blocks.

    Args:
        shape: the dense model.
        removed: the blocks.
        budget: what is counted: parameters, MACs per token, or elements of the KV cache per token ("kv_bytes").
        cost: of a layer, in place of the budget's own count.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer, layer))
        >>> sum_block_costs(model, [Block(0, "attention"), Block(1, "mlp")])
        3104
    """

    def count_cost(layer: LayerShape, attention: bool, mixer: bool, mlp: bool) -> float:
        groups = attention * layer.kv_groups
        widths = attention * layer.query_heads, groups, mlp * layer.ffn_channels, mixer, mlp * layer.experts
        if cost is not None:
            return cost(layer, *widths[:3], mixer=mixer, experts=widths[4])
        if budget == "kv_bytes":
            return layer.kv_elements_at(groups)
        if budget == "macs":
            return layer.macs_at(shape.hidden_size, *widths)
        return layer.parameters_at(*widths)

    total = 0.0 if cost is not None else 0
    for index, layer in enumerate(shape.layers):
        # The difference of whole layers, because the norm that both blocks share goes only with the second of them.
        total += count_cost(layer, True, True, True)
        total -= count_cost(layer, *((index, kind) not in removed for kind in ("attention", "mixer", "mlp")))
    return total


@dataclass(frozen=True)
class RemovalGoal:
    """How much to remove: a number of units (blocks or layers), or at least a share of the decoder layers' budget.

    Args:
        ratio: share to remove, in (0, 1).
        count: number of units to remove, at least 1. Give either `ratio` or `count`, or a target.
        budget: what `ratio` is a share of.
        target: what the whole model may be afterwards, beside or instead of `ratio`.

    Raises:
        BadOption: none of `ratio`, `count` and `target` is given, or `count` and another, or a value is out of range.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> model = ModelShape("llama", "tiny", 16, 10000, 0, 4, "", (layer, layer))
        >>> goal = RemovalGoal(ratio=0.25)
        >>> goal.compute_share(model, [Block(0, "mlp")])
        0.25
        >>> goal.is_met(model, [Block(0, "mlp")], units=1)
        True
    """

    ratio: float | None = None
    count: int | None = None
    budget: BlockBudget = "parameters"
    target: SizeTarget = field(default_factory=SizeTarget)

    def __post_init__(self) -> None:
        if self.count is not None and self.target.is_asked:
            raise BadOption("count: expected it alone, got parameters or memory beside it; leave one of them out")
        if (self.ratio is None) == (self.count is None) and not (self.ratio is None and self.target.is_asked):
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
        """Build the goal from the arguments of a method's constructor.

        Args:
            ratio: see the class.
            count: see the class.
            options: the arguments that the method passes on to `PruningCallback`; only "budget" and those of a target
                are read.

        Raises:
            BadOption: see the class.
        """
        target = SizeTarget.from_options(*(options.get(name) for name in TARGET_OPTIONS))
        return cls(ratio, count, options.get("budget", "parameters"), target)

    def list_constraints(self, shape: ModelShape) -> list[Constraint]:
        """List what has to be reached in a model; nothing where a count is."""
        if self.count is not None:
            return []
        return list_constraints(shape, self.target, self.ratio, self.budget)

    def _compute_saved_share(self, shape: ModelShape, removed: Collection[Block], constraint: Constraint) -> float:
        if constraint.cost is None or constraint.name == "ratio":
            return self.compute_share(shape, removed)
        return sum_block_costs(shape, removed, cost=constraint.cost) / constraint.of_layers

    def compute_share(self, shape: ModelShape, removed: Collection[Block]) -> float:
        """Compute the share of the decoder layers' budget that these blocks hold."""
        whole = sum_block_costs(shape, list_blocks(shape), self.budget)
        return sum_block_costs(shape, removed, self.budget) / max(1, whole)

    def is_met(self, shape: ModelShape, removed: Collection[Block], units: int) -> bool:
        """Whether the removed blocks, which count as `units`, are enough."""
        if self.count is not None:
            return units >= self.count
        constraints = self.list_constraints(shape)
        return all(self._compute_saved_share(shape, removed, each) >= each.ratio for each in constraints)

    def check_feasible(self, shape: ModelShape, candidates: Collection[Block], whole_layers: bool = False) -> None:
        """Check that the goal can be met.

        Args:
            shape: the dense model.
            candidates: the blocks that may be removed.
            whole_layers: `count` counts layers, which go with all their candidates; else it counts blocks.

        Raises:
            InfeasibleBudget: the candidates do not hold enough.
        """
        attention = _list_needed_attention(shape)
        removable_sets = [set(candidates) - {remaining} for remaining in attention] or [set(candidates)]
        if self.count is not None:
            most = max(_count_units(candidates, blocks, whole_layers) for blocks in removable_sets)
            if self.count > most:
                raise self.make_infeasible_error(str(most))
        largest_share = max(self.compute_share(shape, blocks) for blocks in removable_sets)
        if self.ratio is not None and self.ratio > largest_share:
            raise self.make_infeasible_error(f"{largest_share:.4f} of the {self.budget}")
        for constraint in self.list_constraints(shape):
            if constraint.name == "ratio":
                continue
            share = max(self._compute_saved_share(shape, blocks, constraint) for blocks in removable_sets)
            if constraint.ratio > share:
                raise make_unreachable_error(constraint, share)

    def make_record(self, shape: ModelShape) -> dict[str, Any]:
        """Make what a plan keeps of a target; {} where there is none.

        The tightest constraint is that of the largest share.
        """
        if not self.target.is_asked:
            return {}
        constraints = self.list_constraints(shape)
        tightest = max(constraints, key=lambda constraint: constraint.ratio)
        return {"target": make_target_record(self.target, tightest, constraints)}

    def make_infeasible_error(self, most: str) -> InfeasibleBudget:
        """Build the error for a goal that cannot be met.

        Args:
            most: the most that can be removed, as text.
        """
        goal = f"ratio {self.ratio}" if self.count is None else f"count {self.count}"
        if self.ratio is None and self.target.parameters is not None:
            goal = f"parameters {self.target.parameters:,}"
        elif self.ratio is None and self.target.memory is not None:
            goal = f"memory {self.target.memory:,} bytes"
        return InfeasibleBudget(
            f"{goal}: expected at most {most} in the blocks that may be removed, since one attention stays; lower it, "
            "protect fewer layers, or allow both kinds of block"
        )
