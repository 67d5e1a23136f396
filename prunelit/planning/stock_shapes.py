"""Judges which stock class of transformers, if any, can have the widths that a plan leaves; from the plan alone.

The writers find it out by building the class (`prunelit.export.uniform`). Here there is no model to build, so the rules
are written down by family. A contract test compares the two over all families and kinds of cut (transformers 5.23).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from prunelit.core.architectures import ARCHITECTURES, PRUNED
from prunelit.core.declaration import Mixture
from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan

Answer = Literal["yes", "no", "?"]

# Configs without a head size of their own, which is then hidden size / heads.
_HEAD_SIZE_DERIVED = frozenset(
    {
        "biogpt",
        "ctrl",
        "falcon",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "helium",
        "modernbert-decoder",
        "opt",
        "persimmon",
        "stablelm",
        "xglm",
    }
)
# Of these, configs without a number of KV heads: it equals that of query heads, unless the dense model shares KV heads.
_KV_HEADS_DERIVED = _HEAD_SIZE_DERIVED - {"helium", "stablelm"}
# Configs that refuse a number of heads that does not divide the hidden size. A Llama can be written as a Mistral.
_HEADS_DIVIDE = frozenset(
    {"arcee", "cwm", "gemma2", "gemma3_text", "hyperclovax", "internlm3", "iquestcoder", "jais2", "llama", "vaultgemma"}
)
# Configs with one number of heads for attentions that are cut and for those that stay whole; and with an FFN width that
# some layers have twice.
_WHOLE_ATTENTIONS = frozenset({"gemma3n_text", "gemma4_text", "gemma4_unified_text"})
_FFN_DOUBLED = frozenset({"gemma4_text", "gemma4_unified_text"})
# Sets of blocks whose output projections a config can give biases.
_ATTENTION, _FFN = frozenset({"attention"}), frozenset({"mlp"})
_ANY_BLOCKS = (_ATTENTION, _FFN, _ATTENTION | _FFN)
_BIAS_SWITCHES: dict[str, tuple[frozenset[str], ...]] = {
    **dict.fromkeys(("arcee", "granite", "hyperclovax", "iquestcoder", "llama"), _ANY_BLOCKS),
    **dict.fromkeys(("bamba", "falcon_h1", "granite_swa", "modernbert-decoder"), _ANY_BLOCKS),
    **dict.fromkeys(("nemotron", "seed_oss", "smollm3"), _ANY_BLOCKS),
    **dict.fromkeys(("apertus", "cohere", "cohere2", "gemma", "gemma2", "gemma3_text"), (_ATTENTION,)),
    **dict.fromkeys(("hunyuan_v1_dense", "olmo", "qwen3", "vaultgemma"), (_ATTENTION,)),
    **dict.fromkeys(("cohere_compass_text", "granitemoehybrid", "lfm3", "nanochat"), (_ATTENTION,)),
    **dict.fromkeys(("qwen3_5_text", "qwen3_next", *_WHOLE_ATTENTIONS), (_ATTENTION,)),
    **dict.fromkeys(("dots1", "granitemoe", "granitemoeshared", "llama4_text", "mellum"), (_ATTENTION,)),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_moe"), (_ATTENTION,)),
    "hy_v3": _ANY_BLOCKS,
    **dict.fromkeys(("cwm", "deepseek_v2", "helium", "minicpm3", "nemotron_h"), (_FFN,)),
    "internlm3": (_ATTENTION | _FFN,),
}


class Verdict(NamedTuple):
    """Whether something can hold a pruned model: the answer, the reason, and the option that would change it.

    Example: see `prunelit.planning.serving`, which uses it.
    """

    answer: Answer
    why: str
    option: str = ""


@dataclass(frozen=True)
class PrunedShape:
    """The shape of a pruned model as its plan says, without the layers that are removed entirely.

    Example:
        >>> from prunelit.core.plan import ModelShape
        >>> layer = LayerShape(4, 2, 8, 64, 3, 512, 512, 96, 3104, 6176)
        >>> model = ModelShape("llama", "tiny", 32, 50000, 0, 4, "", (layer, layer))
        >>> plan = PruningPlan("made", model, (LayerPlan.dense(layer), LayerPlan((0, 1), (0,), (0, 1, 2, 3))))
        >>> sorted(PrunedShape(plan).channels)
        [4, 64]
        >>> judge_stock_class(PrunedShape(plan)).why
        'heads and FFN widths differ between layers'
        >>> compute_padded_widths(plan)
        (4, 2, 64)
    """

    plan: PruningPlan

    @property
    def family(self) -> str:
        """The `model_type` of the dense model."""
        return self.plan.model.model_type.removeprefix(PRUNED)

    @cached_property
    def layers(self) -> list[tuple[int, LayerPlan, LayerShape]]:
        """The remaining layers: number in the dense model, remaining units, dense shape."""
        pairs = enumerate(zip(self.plan.layers, self.plan.model.layers, strict=True))
        return [(index, remaining, shape) for index, (remaining, shape) in pairs if not remaining.removed]

    @property
    def attentions(self) -> list[tuple[int, LayerPlan, LayerShape]]:
        """The layers of `layers` that keep their attention."""
        return [item for item in self.layers if not item[1].attention_removed]

    @property
    def query_heads(self) -> set[int]:
        """The different numbers of query heads."""
        return {len(remaining.query_heads) for _, remaining, _ in self.attentions}

    @property
    def channels(self) -> set[int]:
        """The different widths of FFNs in layers without experts."""
        return {len(kept.ffn_channels) for _, kept, _ in self.layers if not kept.mlp_removed and not kept.experts}

    @property
    def mixtures(self) -> set[tuple[int, int, int]]:
        """The different mixtures: number of experts, channels of each, channels of the shared FFN beside them."""
        return {
            (len(kept.experts), len(kept.expert_channels), len(kept.ffn_channels))
            for _, kept, _ in self.layers
            if kept.experts
        }

    @property
    def half_layers(self) -> list[str]:
        """Blocks that are removed while their layer remains, as "A7", "X7" and "M7"."""
        return [
            f"{_LETTERS[block]}{index}"
            for index, remaining, shape in self.layers
            for block in _list_missing_blocks(remaining, shape)
        ]

    @property
    def biases(self) -> frozenset[str]:
        """Blocks ("attention", "mlp") whose output projection gets a bias in some layer."""
        added = [("attention", remaining.attention_bias) for _, remaining, _ in self.layers]
        added += [("mlp", remaining.mlp_bias) for _, remaining, _ in self.layers]
        return frozenset(name for name, has_bias in added if has_bias)

    @property
    def had_attention_bias(self) -> bool:
        """Whether the dense model's attention has biases: its heads cost more than their weights."""
        hidden = self.plan.model.hidden_size
        return any(shape.query_head_cost > 2 * hidden * shape.head_dim for _, _, shape in self.attentions)

    @property
    def had_mlp_bias(self) -> bool:
        """Whether the dense model's FFN has biases: its channels cost more than their weights."""
        hidden = self.plan.model.hidden_size
        return any(shape.channel_cost > shape.ffn_matrices * hidden for _, _, shape in self.layers)

    @property
    def has_config_head_size(self) -> bool:
        """Whether the head size is what a config without one derives: hidden size / heads."""
        return all(
            len(remaining.query_heads) * s.head_dim == self.plan.model.hidden_size
            for _, remaining, s in self.attentions
        )


_LETTERS = {"attention": "A", "mixer": "X", "mlp": "M"}


def _list_missing_blocks(remaining: LayerPlan, shape: LayerShape) -> list[str]:
    """List the blocks that a layer lacks: those that the plan removes, and those that an earlier cut removed."""
    removed = remaining.list_removed_blocks(shape)
    if not (shape.one_block or shape.kv_groups or shape.has_mixer):
        removed.append("attention")
    if not (shape.one_block or shape.has_ffn):
        removed.append("mlp")
    return removed


def judge_stock_class(pruned: PrunedShape) -> Verdict:
    """Judge whether a stock class can hold the pruned model as it is.

    Example: see `PrunedShape`.
    """
    if pruned.family not in ARCHITECTURES:
        return Verdict("?", f"{pruned.family}: not one of prunelit's families; the writer tries it")
    if not pruned.plan.is_uniform:
        return refuse_unequal_layers(pruned)
    if not fits_ffn_widths(pruned):
        return Verdict("no", "some FFNs of its config are twice as wide as the others", "a method that cuts heads")
    if pruned.mixtures and (misfit := find_mixture_misfit(pruned.family, pruned.channels, *pruned.mixtures)):
        return misfit
    _, remaining, shape = next(iter(pruned.attentions), pruned.layers[0])
    heads, hidden = len(remaining.query_heads), pruned.plan.model.hidden_size
    if _has_whole_attentions(pruned) and any(len(kept.query_heads) < s.query_heads for _, kept, s in pruned.attentions):
        return Verdict("no", "attentions that stay whole have all heads", "a method that cuts channels")
    if not _allows_heads(pruned, heads, shape.head_dim):
        if pruned.family in _HEAD_SIZE_DERIVED:
            return Verdict(
                "no",
                f"its config takes head size = {hidden} / heads, not {shape.head_dim}",
                suggest_keeping_heads(pruned),
            )
        return Verdict("no", f"its config refuses {heads} heads at hidden size {hidden}", "another ratio or unit")
    if not allows_added_biases(pruned):
        return refuse_added_biases(pruned)
    as_mistral = pruned.family == "llama" and hidden % heads
    return Verdict(
        "yes", "all layers alike" + (f"; as Mistral: {heads} heads do not divide {hidden}" if as_mistral else "")
    )


def compute_padded_widths(plan: PruningPlan) -> tuple[int, int, int]:
    """Compute the widths of all layers of a padded model: for each kind of unit, the largest number in any layer.

    Returns:
        Query heads, KV groups and channels. If the family's config does not take that number of heads, the next that it
        takes.

    Example: see `PrunedShape`.
    """
    pruned = PrunedShape(plan)
    groups = max((len(remaining.kv_groups) for _, remaining, _ in pruned.attentions), default=0)
    in_group = max(
        (len(remaining.query_heads) // len(remaining.kv_groups) for _, remaining, _ in pruned.attentions), default=0
    )
    if _has_whole_attentions(pruned):
        groups = max(shape.kv_groups for shape in plan.model.layers)
        in_group = max(shape.group_size for shape in plan.model.layers)
    heads, hidden = groups * in_group, plan.model.hidden_size
    dim = max((shape.head_dim for _, _, shape in pruned.attentions), default=1)
    if heads and not _allows_heads(pruned, heads, dim):
        heads = hidden // dim
        equal_groups = pruned.family in _KV_HEADS_DERIVED and all(
            shape.group_size == 1 for _, _, shape in pruned.attentions
        )
        fitting = (count for count in range(groups, heads + 1) if heads % count == 0 and heads // count >= in_group)
        groups = heads if equal_groups else next(fitting, groups)
    no_channels = 0 if all(shape.one_block for _, _, shape in pruned.layers) else 1
    channels = max(pruned.channels, default=no_channels)
    mixture = _get_mixture(pruned)
    if mixture is not None and mixture.config_channels == ARCHITECTURES[pruned.family].config_ffn:
        channels = max(channels, compute_padded_mixture(plan)[1])
    return heads, groups, channels


def compute_padded_mixture(plan: PruningPlan) -> tuple[int, int, int]:
    """Compute the widths of all mixtures of a padded model: those that remain, which are alike.

    The shared FFN is as wide as the widest; in families that derive its width from that of the experts, a multiple.

    Returns:
        Experts, channels of each, and channels of the shared FFN; zeros where no mixture remains.

    Example:
        >>> from prunelit.core.plan import ModelShape
        >>> layer = LayerShape(4, 2, 8, 0, 3, 512, 512, 0, 3104, 32, experts=4, experts_per_token=2, expert_channels=8,
        ...     expert_channel_cost=96, expert_cost=800, router_row_cost=32, mixture_cost=3200)
        >>> model = ModelShape("mixtral", "tiny", 32, 50000, 0, 4, "", (layer,))
        >>> compute_padded_mixture(PruningPlan("made", model, (LayerPlan.dense(layer),)))
        (4, 8, 0)
    """
    pruned = PrunedShape(plan)
    experts, channels, shared = (max(column) for column in zip(*(pruned.mixtures or {(0, 0, 0)}), strict=True))
    mixture = _get_mixture(pruned)
    if mixture is not None and (mixture.config_shared_count or mixture.config_shared == mixture.config_channels):
        shared = -(-shared // channels) * channels
    return experts, channels, shared


def _get_mixture(pruned: PrunedShape) -> Mixture | None:
    """Get the declaration of the family's mixture; None where no mixture remains."""
    return ARCHITECTURES[pruned.family].mixture if pruned.mixtures and pruned.family in ARCHITECTURES else None


def find_mixture_misfit(family: str, dense_widths: set[int], widths: tuple[int, int, int]) -> Verdict | None:
    """Find what of a mixture a family's config cannot say; None where it can say all of it.

    Some configs hold one number for the width of the experts and that of another FFN, or derive one from the other.

    Args:
        family: of the model.
        dense_widths: widths of FFNs in layers without experts.
        widths: experts, channels of each, channels of the shared FFN.

    Example:
        >>> find_mixture_misfit("jamba", {96}, (4, 64, 0)).why
        'its config has one width for experts, 64, and dense FFNs, 96'
    """
    architecture, (_, channels, shared) = ARCHITECTURES[family], widths
    mixture, option = architecture.mixture, "the same ratio for the channels of all FFNs"
    if mixture is None or not channels:
        return None
    if mixture.config_shared_count and shared % channels:
        return Verdict(
            "no", f"its config makes the shared FFN a multiple of {channels}, the width of an expert", option
        )
    if mixture.config_shared == mixture.config_channels and shared and shared != channels:
        return Verdict("no", f"its config has one width for experts, {channels}, and shared FFNs, {shared}", option)
    other = max(dense_widths - {channels}, default=0)
    if mixture.config_channels == architecture.config_ffn and other:
        return Verdict("no", f"its config has one width for experts, {channels}, and dense FFNs, {other}", option)
    return None


def fits_ffn_widths(pruned: PrunedShape) -> bool:
    """Whether the family's config can give all FFNs one width.

    Example: see `PrunedShape`.
    """
    widths = {shape.ffn_channels for shape in pruned.plan.model.layers if shape.ffn_channels and not shape.experts}
    return pruned.family not in _FFN_DOUBLED or len(widths) <= 1


def _has_whole_attentions(pruned: PrunedShape) -> bool:
    return pruned.family in _WHOLE_ATTENTIONS and any(shape.has_mixer for shape in pruned.plan.model.layers)


def _allows_heads(pruned: PrunedShape, heads: int, dim: int) -> bool:
    """Whether the family's stock config can have this number of heads of this size."""
    hidden = pruned.plan.model.hidden_size
    if not heads:
        return True
    if pruned.family in _HEAD_SIZE_DERIVED:
        return heads * dim == hidden
    return pruned.family not in _HEADS_DIVIDE or hidden % heads == 0 or _fits_mistral(pruned)


def _fits_mistral(pruned: PrunedShape) -> bool:
    """Whether the model can be written as a Mistral: a Llama without biases computes the same."""
    return pruned.family == "llama" and not (pruned.biases or pruned.had_attention_bias or pruned.had_mlp_bias)


def allows_added_biases(pruned: PrunedShape) -> bool:
    """Whether the family's config can have the biases that the plan adds.

    Example: see `PrunedShape`.
    """
    return not pruned.biases or pruned.biases in _BIAS_SWITCHES.get(pruned.family, ())


def refuse_added_biases(pruned: PrunedShape) -> Verdict:
    """Build the verdict for biases that the config cannot have.

    Example: see `PrunedShape`.
    """
    return Verdict("no", f"no config of {pruned.family} has the added biases", "repair: none")


def refuse_unequal_layers(pruned: PrunedShape) -> Verdict:
    """Build the verdict for layers that differ: what differs, and the option that makes them alike.

    Example: see `PrunedShape`.
    """
    if pruned.half_layers:
        return Verdict(
            "no",
            f"blocks went without their layer: {format_first_items(pruned.half_layers)}",
            "a method that cuts widths",
        )
    heads = {remaining.widths[:2] for _, remaining, _ in pruned.layers}
    kinds = [("heads", len(heads) > 1), ("FFN widths", len(pruned.channels) > 1)]
    names = ("numbers of experts", "widths of experts", "shared FFNs")
    columns = zip(*(pruned.mixtures or {(0, 0, 0)}), strict=True)
    kinds += [(name, len(set(column)) > 1) for name, column in zip(names, columns, strict=True)]
    differing = " and ".join(name for name, differ in kinds if differ) or "head sizes"
    return Verdict("no", f"{differing} differ between layers", "scope: layer, protect: []")


def suggest_keeping_heads(pruned: PrunedShape) -> str:
    """Suggest options that remove no heads: scope "layer" removes floor(ratio * groups) KV groups.

    Example: see `PrunedShape`.
    """
    most = max((shape.kv_groups for _, _, shape in pruned.attentions), default=1)
    return f"scope: layer, ratio below {1 / most:.3g}: no heads go"


def format_plural_count(number: int, thing: str) -> str:
    """Format a count with its noun.

    Example:
        >>> format_plural_count(1, "layer"), format_plural_count(2, "layer")
        ('1 layer', '2 layers')
    """
    return f"{number} {thing}{'' if number == 1 else 's'}"


def format_first_items(items: list[int] | list[str]) -> str:
    """Format the first six items for a message.

    Example:
        >>> format_first_items(list(range(9)))
        '0, 1, 2, 3, 4, 5, ...'
    """
    text = ", ".join(map(str, items[:6]))
    return text if len(items) <= 6 else f"{text}, ..."
