"""Low-rank adapters (LoRA) on a pruned model, plain or quantised, and merging them into its weights.

On plain and NF4 linears the adapters are PEFT's, so they are saved in PEFT's format. On INT4 linears they are
`int4.GroupLora`. The experts of a mixture are one tensor [experts, ...] for each linear; PEFT gives every expert its
own pair of matrices, and adds their products to the whole tensor before the experts run.

Source: Hu et al., "LoRA", arXiv 2106.09685; the placement on every prunable linear is that of LLM-Pruner's recovery.
"""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

from torch import nn

from prunelit.core.architectures import get_architecture
from prunelit.core.plan import PruningPlan
from prunelit.model.decoder import Decoder, find_architecture, is_conv1d
from prunelit.model.per_layer import find, replace_module
from prunelit.quantization.int4 import GroupLora, Int4Linear
from prunelit.quantization.linears import (
    get_quantization,
    has_adapters,
    list_decoder_linears,
    list_decoder_mixtures,
)
from prunelit.runtime.errors import BadOption, BadQuantisation

BLOCK_KINDS = ("attention", "ffn")
PATTERN_WARNING = "The following (rank|alpha)_pattern keys did not match"
"""Start of a warning of PEFT about ranks of parameters, which it uses but looks for among modules."""
RanksByBlock = Mapping[str, int] | Sequence[Mapping[str, int]]
"""Ranks by kind of block: one mapping for all layers, or one mapping per layer."""


class AdapterTarget(NamedTuple):
    """A weight that gets an adapter.

    Attributes:
        layer: number of its layer.
        kind: its block; the router of a mixture is none.
        path: path below the layer: of a linear, or of a parameter.
        name: path below the model.
        is_parameter: whether PEFT is given the parameter instead of its module.

    Example: see `list_adapter_targets`.
    """

    layer: int
    kind: Literal["attention", "ffn", "router"]
    path: str
    name: str
    is_parameter: bool


def list_adapter_targets(model: nn.Module, experts: bool = True, router: bool = False) -> list[AdapterTarget]:
    """List the weights that adapters sit on, layer by layer.

    In families with mixtures of experts the linears of FFNs are given as parameters, too: PEFT takes the names of these
    linears for the experts of older checkpoints, and would leave the linears out without a word.

    Args:
        model: transformers model, plain or quantised, without adapters.
        experts: list the weights of experts as well.
        router: list the weights of the routers as well.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, **sizes))
        >>> [target.path for target in list_adapter_targets(model, router=True)][-3:]
        ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj', 'mlp.gate.weight']
    """
    by_parameter = find_architecture(model).mixture is not None
    targets = []
    for linear in list_decoder_linears(model):
        suffix = ".weight" if by_parameter and linear.kind == "ffn" else ""
        targets.append(
            AdapterTarget(linear.layer, linear.kind, linear.path + suffix, linear.name + suffix, bool(suffix))
        )
    for mixture in list_decoder_mixtures(model):
        paths = [(f"{mixture.experts}.{name}", "ffn") for name in mixture.tensors] if experts else []
        paths += [(f"{mixture.router}.weight", "router")] if router else []
        targets += [AdapterTarget(mixture.layer, kind, path, f"{mixture.prefix}.{path}", True) for path, kind in paths]  # type: ignore[arg-type]
    return sorted(targets, key=lambda target: target.layer)


def check_ranks(ranks: RanksByBlock | None) -> None:
    """Check ranks by kind of block; no model is needed.

    Args:
        ranks: {"attention": r, "ffn": r} for all layers, or a sequence with one such mapping per layer.

    Raises:
        BadOption: a kind that is neither "attention" nor "ffn", or a rank below 1.

    Example:
        >>> check_ranks({"attention": 8, "ffn": 16})
        >>> check_ranks([{"mlp": 4}])
        Traceback (most recent call last):
        prunelit.runtime.errors.BadOption: ranks: expected attention and ffn with ranks of at least 1, got 'mlp': 4
    """
    for layer_ranks in [ranks] if isinstance(ranks, Mapping) else ranks or ():
        for kind, rank in layer_ranks.items():
            if kind not in BLOCK_KINDS or type(rank) is not int or rank < 1:
                raise BadOption(f"ranks: expected attention and ffn with ranks of at least 1, got {kind!r}: {rank!r}")


def add_lora(
    model: Any,
    rank: int,
    alpha: int,
    dropout: float,
    ranks: RanksByBlock | None = None,
    *,
    experts: bool = True,
    router: bool = False,
) -> Any:
    """Put a LoRA adapter on every prunable linear and every expert, and freeze the model's own weights.

    Args:
        model: the pruned model, plain or quantised by `quantize_model`.
        rank: rank of the adapters that `ranks` does not name.
        alpha: every adapter is scaled by alpha / rank, also where `ranks` gives it another rank.
        dropout: dropout probability on the adapters' input. In families with mixtures of experts, adapters in FFN
            blocks have none: PEFT adds the product of their matrices to a weight, so they see no input.
        ranks: {"attention": r, "ffn": r} for all layers, or one such mapping per layer (see `allocate_ranks_by_cut`).
            The experts of a mixture have the rank of its FFN block, each; a router has `rank`.
        experts: put adapters on the experts of mixtures as well.
        router: put adapters on the routers of mixtures as well.

    Returns:
        The PEFT model; for an int4 base the model itself, changed in place. Adapters are float32 on any base.

    Raises:
        BadOption: unknown kinds, ranks below 1, or a number of entries other than the number of layers.
        BadQuantisation: the model has adapters already; or an nf4 base in a family with mixtures of experts.
        DeclarationMismatch: the model's modules are not as declared.
        UnknownArchitecture: no declaration for the model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> adapted = add_lora(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), rank=4, alpha=8, dropout=0.0)
        >>> len([name for name, parameter in adapted.named_parameters() if parameter.requires_grad])  # 2 * 7 * (A, B)
        28
    """
    check_ranks(ranks)
    if has_adapters(model):
        raise BadQuantisation("add_lora: expected a model without adapters, got some; merge them first")
    base = get_quantization(model)
    if base is None:
        Decoder(model)  # raises where the model is not as declared
    if base == "int4":
        linears = list_decoder_linears(model)
        model.requires_grad_(False)
        for linear, linear_rank in zip(linears, _list_target_ranks(linears, rank, ranks), strict=True):
            # GroupLora scales by alpha / rank itself, so alpha grows with the rank to keep one scale everywhere.
            adapter = GroupLora(cast(Int4Linear, linear.module), linear_rank, alpha * linear_rank / rank, dropout)
            replace_module(model, linear.name, adapter)
        return model

    from peft import get_peft_model

    targets = list_adapter_targets(model, experts, router)
    has_parameters = any(target.is_parameter for target in targets)
    if base == "nf4" and has_parameters:
        raise BadQuantisation(
            f"base: expected none or int4 for {model.config.model_type}, got nf4; PEFT has no adapters for the FFNs of "
            "a family with mixtures of experts in 4 bits"
        )
    target_ranks = _list_target_ranks(targets, rank, ranks)
    config = build_peft_config(model, targets, target_ranks, rank, alpha, 0.0 if has_parameters else dropout)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", PATTERN_WARNING)
        adapted = get_peft_model(model, config)
    if dropout and has_parameters:
        # PEFT has one probability for all adapters, and refuses one that is not 0 where a parameter has an adapter.
        for linear in list_decoder_linears(adapted):
            if linear.kind == "attention":
                cast(Any, linear.module).lora_dropout["default"] = nn.Dropout(dropout)
    return adapted


def build_peft_config(
    model: Any,
    targets: Sequence[AdapterTarget],
    ranks: Sequence[int],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
) -> Any:
    """Build PEFT's configuration of adapters.

    Args:
        model: transformers model, plain or quantised.
        targets: what gets adapters, see `list_adapter_targets`.
        ranks: rank of each of them.
        rank: the default rank; targets with another one get a pattern.
        alpha: adapters are scaled by alpha / rank, whatever their own rank is.
        dropout: dropout probability on the adapters' input.

    Returns:
        A `peft.LoraConfig`.

    Example: see `add_lora`.
    """
    from peft import LoraConfig

    patterns = _build_rank_patterns(targets, ranks, rank, find_architecture(model).layers)
    linear_names = {target.name for target in targets if not target.is_parameter}
    last_names = {name.split(".")[-1] for name in linear_names}
    # PEFT selects modules by the last part of their name. Where FFN linears sit in the layer itself (OPT), a removed
    # block leaves these names behind on modules without weights, and PEFT would raise on them.
    removed_names = [
        name for name, _ in model.named_modules() if name.split(".")[-1] in last_names and name not in linear_names
    ]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=sorted(last_names),
        # By their whole names, which no module of another part of the model shares.
        target_parameters=[target.name for target in targets if target.is_parameter] or None,
        exclude_modules=removed_names or None,
        rank_pattern=patterns,
        alpha_pattern={pattern: alpha * pattern_rank / rank for pattern, pattern_rank in patterns.items()},
        fan_in_fan_out=any(is_conv1d(linear.module) for linear in list_decoder_linears(model)),
        task_type="CAUSAL_LM",
    )


def allocate_ranks_by_cut(
    plan: PruningPlan, rank: int, group_size: int = 1, *, experts: bool = True
) -> list[dict[str, int]]:
    """Allocate ranks for `add_lora`: a block that lost more units gets a higher rank.

    The adapters have at most as many parameters as with `rank` in every block. The rule is ours: a block that lost the
    share c of its heads', channels' or experts' weights gets

        rank (1 + c) sum(w) / sum(w (1 + c)),   w: adapter parameters of the block per rank

    rounded down, at least 1. All experts of a layer have the rank of its FFN block. The rest of the parameter budget
    goes, rank by rank, to the largest remainders.

    Args:
        plan: the pruning plan that was applied.
        rank: rank of the even allocation, which sets the budget.
        group_size: inputs per group of an int4 base, whose adapters see one number per group; 1 for other bases.
        experts: whether experts have adapters.

    Returns:
        For each remaining layer the ranks {"attention": r, "ffn": r} of its remaining blocks.

    Raises:
        BadOption: a rank below 1.
        UnknownArchitecture: no declaration for the plan's model.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from prunelit.core.plan import LayerPlan
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = Decoder(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))).shape
        >>> dense = LayerPlan.dense(model.layers[0])
        >>> halved = LayerPlan(dense.query_heads, dense.kv_groups, ffn_channels=tuple(range(16)))
        >>> allocate_ranks_by_cut(PruningPlan("example", model, (dense, halved)), rank=8)
        [{'attention': 7, 'ffn': 7}, {'attention': 7, 'ffn': 11}]
    """
    check_ranks({"attention": rank})
    architecture = get_architecture(SimpleNamespace(model_type=plan.model.model_type))
    hidden, blocks = plan.model.hidden_size, []
    remaining_layers = [
        (kept, shape) for kept, shape in zip(plan.layers, plan.model.layers, strict=True) if not kept.removed
    ]
    for index, (kept, shape) in enumerate(remaining_layers):
        heads, groups, channels = kept.widths
        # Per rank, an adapter has one parameter for each of its inputs (A) and one for each of its outputs (B).
        hidden_inputs, head_inputs = math.ceil(hidden / group_size), math.ceil(heads * shape.head_dim / group_size)
        if heads:
            share = 1 - (heads + groups) / (shape.query_heads + shape.kv_groups)
            qkv_inputs, qkv_outputs = (1 if architecture.fused_qkv else 3), (heads + 2 * groups) * shape.head_dim
            weight = hidden_inputs * qkv_inputs + qkv_outputs + head_inputs + hidden
            blocks.append((index, "attention", share, weight))
        weight = kept_cost = dense_cost = 0
        if channels:
            kept_cost, dense_cost = channels * shape.channel_cost, shape.ffn_channels * shape.channel_cost
            count, channel_inputs = shape.ffn_matrices - 1, math.ceil(channels / group_size)
            weight = hidden_inputs * (1 if architecture.fused_gate_up else count)
            weight += count * channels + channel_inputs + hidden
        if experts and kept.experts:
            width = len(kept.expert_channels)
            kept_cost += len(kept.experts) * width * shape.expert_channel_cost
            dense_cost += shape.experts * shape.expert_channels * shape.expert_channel_cost
            rows = 2 if architecture.mixture and architecture.mixture.gated else 1
            weight += len(kept.experts) * (2 * hidden + (rows + 1) * width)
        if weight:
            blocks.append((index, "ffn", 1 - kept_cost / dense_cost, weight))
    scale = sum(weight for *_, weight in blocks) / sum(weight * (1 + share) for *_, share, weight in blocks)
    exact_ranks = [rank * (1 + share) * scale for *_, share, _ in blocks]
    # 1e-9: with equal shares the exact rank is `rank` up to rounding, and must not be rounded down to one less.
    ranks = [max(1, math.floor(exact_rank + 1e-9)) for exact_rank in exact_ranks]
    budget = sum((rank - block_rank) * weight for block_rank, (*_, weight) in zip(ranks, blocks, strict=True))
    for block in sorted(range(len(blocks)), key=lambda block: ranks[block] - exact_ranks[block]):
        weight = blocks[block][-1]
        if ranks[block] < exact_ranks[block] - 1e-9 and weight <= budget:
            ranks[block] += 1
            budget -= weight
    layer_ranks: list[dict[str, int]] = [{} for _ in remaining_layers]
    for (index, kind, *_), block_rank in zip(blocks, ranks, strict=True):
        layer_ranks[index][kind] = block_rank
    return layer_ranks


def group_parameters(
    model: nn.Module, learning_rate: float, ffn_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Group the trainable parameters for an optimiser.

    Args:
        model: a model with adapters, or one that is not frozen.
        learning_rate: learning rate of everything but FFN blocks, and of these too where `ffn_learning_rate` is None.
        ffn_learning_rate: learning rate of the FFN blocks' linears, experts and adapters, but not of routers; None: one
            group for all.

    Returns:
        Groups {"params", "lr"}; with two rates "other" and "ffn" in this order, each with its "name". Empty groups are
        left out.

    Example:
        >>> [(len(group["params"]), group["lr"]) for group in group_parameters(nn.Linear(2, 2), 1e-3)]
        [(2, 0.001)]
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if ffn_learning_rate is None:
        return [{"params": trainable, "lr": learning_rate}]
    modules = [linear.module for linear in list_decoder_linears(model) if linear.kind == "ffn"]
    modules += [find(mixture.module, mixture.experts) for mixture in list_decoder_mixtures(model)]
    ffn = {id(parameter) for module in modules for parameter in module.parameters()}
    groups = [
        {"name": "other", "params": [p for p in trainable if id(p) not in ffn], "lr": learning_rate},
        {"name": "ffn", "params": [p for p in trainable if id(p) in ffn], "lr": ffn_learning_rate},
    ]
    return [group for group in groups if group["params"]]


def _list_target_ranks(targets: Sequence[Any], rank: int, ranks: RanksByBlock | None) -> list[int]:
    """List the rank of every linear or parameter; `rank` is that of those which `ranks` does not name."""
    layers = targets[-1].layer + 1 if targets else 0
    if not isinstance(ranks, Mapping) and ranks is not None and len(ranks) != layers:
        raise BadOption(
            f"ranks: expected one entry per layer, {layers}, got {len(ranks)}; use the ranks of this model's plan"
        )
    ranks_by_layer = [ranks or {}] * layers if ranks is None or isinstance(ranks, Mapping) else ranks
    return [ranks_by_layer[target.layer].get(target.kind, rank) for target in targets]


def _build_rank_patterns(
    targets: Sequence[AdapterTarget], target_ranks: Sequence[int], rank: int, layers: str
) -> dict[str, int]:
    """Build PEFT's `rank_pattern`: a regular expression of names per kind of block and rank.

    PEFT tries every pattern on every target, so a pattern per target would take minutes on a large model.

    Args:
        targets: all that get adapters.
        target_ranks: rank of each.
        rank: the default rank, which needs no pattern.
        layers: path of the model's list of layers.
    """
    # The inner dicts are ordered sets: layer indices and module paths in the order of the model.
    places: dict[tuple[str, int], tuple[dict[str, None], dict[str, None]]] = {}
    for target, target_rank in zip(targets, target_ranks, strict=True):
        if target_rank != rank:
            indices, paths = places.setdefault((target.kind, target_rank), ({}, {}))
            indices[str(target.layer)] = None
            paths[re.escape(target.path)] = None
    return {
        rf"{re.escape(layers)}\.({'|'.join(indices)})\.({'|'.join(paths)})": target_rank
        for (_, target_rank), (indices, paths) in places.items()
    }
