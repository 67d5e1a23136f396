"""Which stock class of transformers, if any, can have the widths that a plan leaves: foretold from the plan alone.

The writers find it out by building the class (`prunelit.export.uniform`). Here there is no model to build, so it is
written down by family; a contract test holds the two together over all families and kinds of cut (transformers 5.23).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from prunelit.core.architectures import ARCHITECTURES, PRUNED
from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan

Answer = Literal["yes", "no", "?"]

# Configs without a head size of their own, which is then hidden size / heads.
_HEAD_SIZE_DERIVED = frozenset(
    {"biogpt", "falcon", "gpt2", "gpt_neox", "gptj", "helium", "opt", "persimmon", "stablelm"}
)
# Of these, configs without a number of KV heads: there are as many as query heads, unless the dense model shares them.
_KV_HEADS_DERIVED = _HEAD_SIZE_DERIVED - {"helium", "stablelm"}
# Configs that refuse heads which do not divide the hidden size. A Llama can be written as a Mistral.
_HEADS_DIVIDE = frozenset(
    {"arcee", "cwm", "gemma2", "gemma3_text", "hyperclovax", "internlm3", "iquestcoder", "jais2", "llama", "vaultgemma"}
)
# Sets of blocks whose output projections a config can give biases.
_ATTENTION, _FFN = frozenset({"attention"}), frozenset({"mlp"})
_ANY_BLOCKS = (_ATTENTION, _FFN, _ATTENTION | _FFN)
_BIAS_SWITCHES: dict[str, tuple[frozenset[str], ...]] = {
    **dict.fromkeys(("arcee", "granite", "hyperclovax", "iquestcoder", "llama"), _ANY_BLOCKS),
    **dict.fromkeys(("nemotron", "seed_oss", "smollm3"), _ANY_BLOCKS),
    **dict.fromkeys(("apertus", "cohere", "cohere2", "gemma", "gemma2", "gemma3_text"), (_ATTENTION,)),
    **dict.fromkeys(("hunyuan_v1_dense", "olmo", "qwen3", "vaultgemma"), (_ATTENTION,)),
    **dict.fromkeys(("cwm", "helium"), (_FFN,)),
    "internlm3": (_ATTENTION | _FFN,),
}


class Verdict(NamedTuple):
    """Yes, no or unknown; why; the option that would change it."""

    answer: Answer
    why: str
    option: str = ""


@dataclass(frozen=True)
class PrunedShape:
    """What a plan leaves, without the layers that go altogether."""

    plan: PruningPlan

    @property
    def family(self) -> str:
        """The `model_type` of the dense model."""
        return self.plan.model.model_type.removeprefix(PRUNED)

    @cached_property
    def layers(self) -> list[tuple[int, LayerPlan, LayerShape]]:
        """The layers that stay: number in the dense model, what is kept, dense shape."""
        pairs = enumerate(zip(self.plan.layers, self.plan.model.layers, strict=True))
        return [(index, kept, shape) for index, (kept, shape) in pairs if not kept.removed]

    @property
    def attentions(self) -> list[tuple[int, LayerPlan, LayerShape]]:
        """Those of `layers` that keep their attention."""
        return [item for item in self.layers if not item[1].attention_removed]

    @property
    def query_heads(self) -> set[int]:
        """Numbers of query heads that occur."""
        return {len(kept.query_heads) for _, kept, _ in self.attentions}

    @property
    def channels(self) -> set[int]:
        """FFN widths that occur."""
        return {len(kept.ffn_channels) for _, kept, _ in self.layers if not kept.mlp_removed}

    @property
    def half_layers(self) -> list[str]:
        """Blocks that went without their layer, as "A7" and "M7"."""
        return [
            f"{'A' if kept.attention_removed else 'M'}{index}"
            for index, kept, _ in self.layers
            if kept.attention_removed != kept.mlp_removed
        ]

    @property
    def biases(self) -> frozenset[str]:
        """Blocks whose output projection is given a bias somewhere."""
        added = [("attention", kept.attention_bias) for _, kept, _ in self.layers]
        return frozenset(name for name, there in added + [("mlp", k.mlp_bias) for _, k, _ in self.layers] if there)

    @property
    def had_attention_bias(self) -> bool:
        """Whether the dense model's heads cost more than their weights."""
        hidden = self.plan.model.hidden_size
        return any(shape.query_head_cost > 2 * hidden * shape.head_dim for _, _, shape in self.attentions)

    @property
    def had_mlp_bias(self) -> bool:
        """Whether the dense model's channels cost more than their weights."""
        hidden = self.plan.model.hidden_size
        return any(shape.channel_cost > shape.ffn_matrices * hidden for _, _, shape in self.layers)

    @property
    def has_config_head_size(self) -> bool:
        """The head size is what a config without one would say: hidden size / heads."""
        return all(len(kept.query_heads) * s.head_dim == self.plan.model.hidden_size for _, kept, s in self.attentions)


def judge_stock_class(cut: PrunedShape) -> Verdict:
    """Whether a stock class holds the result as it is."""
    if cut.family not in ARCHITECTURES:
        return Verdict("?", f"{cut.family}: not one of prunelit's families; the writer tries it")
    if not cut.plan.is_uniform:
        return refuse_unequal_layers(cut)
    _, kept, shape = cut.layers[0]
    heads, hidden = len(kept.query_heads), cut.plan.model.hidden_size
    if not _allows_heads(cut, heads, shape.head_dim):
        if cut.family in _HEAD_SIZE_DERIVED:
            return Verdict(
                "no", f"its config takes head size = {hidden} / heads, not {shape.head_dim}", suggest_keeping_heads(cut)
            )
        return Verdict("no", f"its config refuses {heads} heads at hidden size {hidden}", "another ratio or unit")
    if not allows_added_biases(cut):
        return refuse_added_biases(cut)
    as_mistral = cut.family == "llama" and hidden % heads
    return Verdict(
        "yes", "all layers alike" + (f"; as Mistral: {heads} heads do not divide {hidden}" if as_mistral else "")
    )


def compute_padded_widths(plan: PruningPlan) -> tuple[int, int, int]:
    """Query heads, KV groups and channels of every layer of a padded model: those of the largest, kind by kind."""
    cut = PrunedShape(plan)
    groups = max((len(kept.kv_groups) for _, kept, _ in cut.attentions), default=0)
    in_group = max((len(kept.query_heads) // len(kept.kv_groups) for _, kept, _ in cut.attentions), default=0)
    heads, hidden = groups * in_group, plan.model.hidden_size
    dim = max((shape.head_dim for _, _, shape in cut.attentions), default=1)
    if not _allows_heads(cut, heads, dim):  # up to a number of heads that the config takes
        heads = hidden // dim
        own = cut.family in _KV_HEADS_DERIVED and all(shape.group_size == 1 for _, _, shape in cut.attentions)
        fitting = (n for n in range(groups, heads + 1) if heads % n == 0 and heads // n >= in_group)
        groups = heads if own else next(fitting, groups)
    return heads, groups, max(cut.channels, default=1)


def _allows_heads(cut: PrunedShape, heads: int, dim: int) -> bool:
    """Whether the family's stock config can have so many heads of this size."""
    hidden = cut.plan.model.hidden_size
    if cut.family in _HEAD_SIZE_DERIVED:
        return heads * dim == hidden
    if not heads:
        return True
    return cut.family not in _HEADS_DIVIDE or hidden % heads == 0 or _fits_mistral(cut)


def _fits_mistral(cut: PrunedShape) -> bool:
    """A Llama without biases computes what a Mistral does."""
    return cut.family == "llama" and not (cut.biases or cut.had_attention_bias or cut.had_mlp_bias)


def allows_added_biases(cut: PrunedShape) -> bool:
    """Whether the family's config can have the biases that the plan adds."""
    return not cut.biases or cut.biases in _BIAS_SWITCHES.get(cut.family, ())


def refuse_added_biases(cut: PrunedShape) -> Verdict:
    """The verdict where it can not."""
    return Verdict("no", f"no config of {cut.family} has the added biases", "repair: none")


def refuse_unequal_layers(cut: PrunedShape) -> Verdict:
    """Why layers are not alike, and the option that would make them so."""
    if cut.half_layers:
        return Verdict(
            "no", f"blocks went without their layer: {format_first_items(cut.half_layers)}", "a method that cuts widths"
        )
    heads = {kept.widths[:2] for _, kept, _ in cut.layers}
    kinds = [("heads", len(heads) > 1), ("FFN widths", len(cut.channels) > 1)]
    what = " and ".join(name for name, differ in kinds if differ) or "head sizes"
    return Verdict("no", f"{what} differ between layers", "scope: layer, protect: []")


def suggest_keeping_heads(cut: PrunedShape) -> str:
    """The options under which no heads go: scope "layer" cuts floor(ratio * groups) KV groups."""
    most = max((shape.kv_groups for _, _, shape in cut.attentions), default=1)
    return f"scope: layer, ratio below {1 / most:.3g}: no heads go"


def format_plural_count(number: int, thing: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def format_first_items(items: list[int] | list[str]) -> str:
    """The first few, for a message."""
    said = ", ".join(map(str, items[:6]))
    return said if len(items) <= 6 else f"{said}, ..."
