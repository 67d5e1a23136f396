"""Low-rank adapters on a cut model, plain or quantised, and merging them back.

On plain and NF4 linears the adapters are PEFT's, so they save in PEFT's format; on INT4 they are `int4.GroupLora`.
"""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from torch import nn

from prunelit.core.architectures import get_architecture
from prunelit.core.plan import PruningPlan
from prunelit.model.decoder import Decoder, is_conv1d
from prunelit.model.per_layer import replace_module
from prunelit.quantization.int4 import GroupLora, Int4Linear
from prunelit.quantization.linears import (
    DecoderLinear,
    get_linear_widths,
    get_quantization,
    has_adapters,
    list_decoder_linears,
)
from prunelit.runtime.errors import BadOption, BadQuantisation
from prunelit.runtime.progress import show_stage

BLOCK_KINDS = ("attention", "ffn")
RanksByBlock = Mapping[str, int] | Sequence[Mapping[str, int]]


def check_ranks(ranks: RanksByBlock | None) -> None:
    """Check per-kind ranks, of all layers or of each, before a model is there.

    Raises:
        BadOption: a kind that is neither "attention" nor "ffn", or a rank below 1.
    """
    for of_layer in [ranks] if isinstance(ranks, Mapping) else ranks or ():
        for kind, rank in of_layer.items():
            if kind not in BLOCK_KINDS or type(rank) is not int or rank < 1:
                raise BadOption(f"ranks: expected attention and ffn with ranks of at least 1, got {kind!r}: {rank!r}")


def add_lora(model: Any, rank: int, alpha: int, dropout: float, ranks: RanksByBlock | None = None) -> Any:
    """Put an adapter on every prunable linear (Hu et al. 2021; placement of LLM-Pruner's recovery).

    Args:
        model: the cut model, plain or out of `quantize`; its own weights are frozen.
        rank: rank of the adapters that `ranks` does not name.
        alpha: adapters are scaled by alpha / rank; where `ranks` gives another rank the scale stays.
        dropout: on the adapters' input.
        ranks: {"attention": r, "ffn": r} for all layers, or one of these per layer (see `allocate_ranks_by_cut`).

    Returns:
        The PEFT model; for an int4 base the model itself, changed in place. Adapters are float32 on any base.

    Raises:
        BadOption: unknown kinds, ranks below 1, or not as many entries as the model has layers.
        BadQuantisation: the model has adapters already.
        DeclarationMismatch, UnknownArchitecture: the model is not as declared.
    """
    check_ranks(ranks)
    if has_adapters(model):
        raise BadQuantisation("add_lora: expected a model without adapters, got some; merge them first")
    base = get_quantization(model)
    if base is None:
        Decoder(model)  # checks the declaration
    linears = list_decoder_linears(model)
    chosen = _list_linear_ranks(linears, rank, ranks)
    if base == "int4":
        model.requires_grad_(False)
        for linear, own in zip(linears, chosen, strict=True):
            adapter = GroupLora(cast(Int4Linear, linear.module), own, alpha * own / rank, dropout)
            replace_module(model, linear.name, adapter)
        return model

    from peft import get_peft_model

    return get_peft_model(model, build_peft_config(model, chosen, rank, alpha, dropout))


def build_peft_config(model: Any, ranks: Sequence[int], rank: int, alpha: float, dropout: float = 0.0) -> Any:
    """PEFT's configuration of adapters on every prunable linear.

    Args:
        model: transformers model, plain or quantised.
        ranks: of the linears, in the order of `list_decoder_linears`.
        rank: that of most.
        alpha: adapters are scaled by alpha / rank, whatever their own rank.
        dropout: on the adapters' input.
    """
    from peft import LoraConfig

    linears, architecture = list_decoder_linears(model), get_architecture(model.config)
    patterns = _build_rank_patterns(linears, ranks, rank, architecture.layers)
    known = {linear.name for linear in linears}
    # Where FFN linears sit in the layer itself, a removed block leaves their names behind, on modules without weights.
    strays = [
        name for name, _ in model.named_modules() if name.split(".")[-1] in architecture.linears and name not in known
    ]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(architecture.linears),
        exclude_modules=strays or None,
        rank_pattern=patterns,
        alpha_pattern={pattern: alpha * own / rank for pattern, own in patterns.items()},
        fan_in_fan_out=any(is_conv1d(linear.module) for linear in linears),
        task_type="CAUSAL_LM",
    )


def allocate_ranks_by_cut(plan: PruningPlan, rank: int, group_size: int = 1) -> list[dict[str, int]]:
    """Ranks for `add_lora`: more where more was cut, at no more adapter parameters than `rank` everywhere (ours).

    A block that lost the share c of its heads' or channels' weights gets

        rank (1 + c) sum(w) / sum(w (1 + c)),   w: adapter parameters of the block per rank

    rounded down, at least 1; what rounding leaves of the budget goes, rank by rank, to the largest remainders.

    Args:
        plan: what was cut.
        rank: the even rank.
        group_size: of an int4 base, whose adapters see one number per group; 1 for other bases.

    Returns:
        One mapping per layer that is left, of the blocks that are left.

    Raises:
        BadOption: a rank below 1.
        UnknownArchitecture: no declaration for the plan's model.
    """
    check_ranks({"attention": rank})
    names = get_architecture(SimpleNamespace(model_type=plan.model.model_type))
    hidden, blocks = plan.model.hidden_size, []
    kept_layers = [
        (kept, shape) for kept, shape in zip(plan.layers, plan.model.layers, strict=True) if not kept.removed
    ]
    for index, (kept, shape) in enumerate(kept_layers):
        heads, groups, channels = kept.widths
        inner, rows = heads * shape.head_dim, (heads + 2 * groups) * shape.head_dim
        inputs, width = math.ceil(hidden / group_size), math.ceil(inner / group_size)
        if heads:
            share = 1 - (heads + groups) / (shape.query_heads + shape.kv_groups)
            weight = inputs * (1 if names.fused_qkv else 3) + rows + width + hidden
            blocks.append((index, "attention", share, weight))
        if channels:
            share = 1 - channels / shape.ffn_channels
            count, width = shape.ffn_matrices - 1, math.ceil(channels / group_size)
            weight = inputs * (1 if names.fused_gate_up else count) + count * channels + width + hidden
            blocks.append((index, "ffn", share, weight))
    scale = sum(weight for *_, weight in blocks) / sum(weight * (1 + share) for *_, share, weight in blocks)
    wanted = [rank * (1 + share) * scale for *_, share, _ in blocks]
    ranks = [max(1, math.floor(value + 1e-9)) for value in wanted]  # 1e-9: equal shares give `rank`, not one less
    left = sum((rank - own) * weight for own, (*_, weight) in zip(ranks, blocks, strict=True))
    for block in sorted(range(len(blocks)), key=lambda block: ranks[block] - wanted[block]):
        weight = blocks[block][-1]
        if ranks[block] < wanted[block] - 1e-9 and weight <= left:
            ranks[block] += 1
            left -= weight
    found: list[dict[str, int]] = [{} for _ in kept_layers]
    for (index, kind, *_), own in zip(blocks, ranks, strict=True):
        found[index][kind] = own
    return found


def group_parameters(
    model: nn.Module, learning_rate: float, ffn_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """What is trainable, as optimiser groups.

    Args:
        model: with adapters, or not frozen.
        learning_rate: of everything that `ffn_learning_rate` does not name.
        ffn_learning_rate: of the FFN blocks' linears and adapters; None: one group for all.

    Returns:
        Groups {"params", "lr"}, with two rates also {"name": "other" | "ffn"}, in this order; none is empty.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if ffn_learning_rate is None:
        return [{"params": trainable, "lr": learning_rate}]
    modules = [linear.module for linear in list_decoder_linears(model) if linear.kind == "ffn"]
    ffn = {id(parameter) for module in modules for parameter in module.parameters()}
    groups = [
        {"name": "other", "params": [p for p in trainable if id(p) not in ffn], "lr": learning_rate},
        {"name": "ffn", "params": [p for p in trainable if id(p) in ffn], "lr": ffn_learning_rate},
    ]
    return [group for group in groups if group["params"]]


def merge_adapters(model: Any) -> nn.Module:
    """The transformers model with its adapters in its weights (in place); itself where it has none.

    On int4 the adapters go into the zeros: the model stays 4-bit and gives the same outputs.

    Raises:
        BadQuantisation: adapters on nf4. Merging there rounds again, which loses much of the adapter, and after an
            evaluation on a CPU it merges into weights in another order, which leaves garbage.
    """
    if not has_adapters(model):
        return cast(nn.Module, model)
    if get_quantization(model) == "nf4":
        raise BadQuantisation(
            "merged: expected adapters on a base in full precision or int4, got nf4, which can not take them without "
            "loss; give prunelit.recovery.lora.merge_into_full_precision the cut model in full precision"
        )
    if hasattr(model, "merge_and_unload"):
        with show_stage("merging the adapters"):
            return cast(nn.Module, model.merge_and_unload())
    for linear in list_decoder_linears(model):
        if isinstance(linear.module, GroupLora):
            replace_module(model, linear.name, linear.module.merge())
    return cast(nn.Module, model)


def merge_into_full_precision(full_base: Any, adapted: Any) -> nn.Module:
    """Merge PEFT adapters into another copy of their base: the way out of nf4.

    The result differs from the nf4 model by what rounding did to its weights; the adapters had learnt to undo that.

    Args:
        full_base: the cut model in full precision, without adapters; changed in place.
        adapted: the PEFT model whose adapters are taken; it stays as it is.

    Returns:
        `full_base` with the adapters in its weights.

    Raises:
        BadQuantisation: `full_base` is quantised or has adapters, `adapted` has none of PEFT's, or their shapes differ.
    """
    if has_adapters(full_base) or get_quantization(full_base) is not None:
        raise BadQuantisation("merge_into: full_base: expected a plain model, got adapters or 4-bit linears")
    if not hasattr(adapted, "peft_config"):
        raise BadQuantisation(
            "merge_into: adapted: expected a PEFT model, got none; merge int4 with prunelit.recovery.lora.merge_adapters"
        )
    mine, theirs = (
        {x.name: get_linear_widths(x.module) for x in list_decoder_linears(model)} for model in (full_base, adapted)
    )
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise BadQuantisation(
                f"merge_into: {name}: expected [out, in] {theirs.get(name)} as under the adapters, got "
                f"{mine.get(name)}; cut full_base with the same plan"
            )
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(adapted.peft_config["default"])
    config.fan_in_fan_out = any(is_conv1d(linear.module) for linear in list_decoder_linears(full_base))
    # The whole state would put nf4 weights into another order on the way.
    adapters = {name: parameter for name, parameter in adapted.named_parameters() if "lora_" in name}
    taken = get_peft_model_state_dict(adapted, adapters, save_embedding_layers=False)
    with show_stage("merging the adapters"):
        wrapped: Any = get_peft_model(full_base, config)
        set_peft_model_state_dict(wrapped, taken)
        return cast(nn.Module, wrapped.merge_and_unload())


def _list_linear_ranks(linears: Sequence[DecoderLinear], rank: int, ranks: RanksByBlock | None) -> list[int]:
    """The rank of every linear."""
    layers = linears[-1].layer + 1 if linears else 0
    if not isinstance(ranks, Mapping) and ranks is not None and len(ranks) != layers:
        raise BadOption(f"ranks: expected one entry per layer, {layers}, got {len(ranks)}; use those of this plan")
    of_layer = [ranks or {}] * layers if ranks is None or isinstance(ranks, Mapping) else ranks
    return [of_layer[linear.layer].get(linear.kind, rank) for linear in linears]


def _build_rank_patterns(
    linears: Sequence[DecoderLinear], chosen: Sequence[int], rank: int, layers: str
) -> dict[str, int]:
    """PEFT's `rank_pattern`, regular expressions of module names: one per block and rank that is not the default.

    PEFT tries every pattern on every linear, so a pattern per linear would take minutes on a large model.
    """
    where: dict[tuple[str, int], tuple[dict[str, None], dict[str, None]]] = {}
    for linear, own in zip(linears, chosen, strict=True):
        if own != rank:
            indices, paths = where.setdefault((linear.kind, own), ({}, {}))
            indices[str(linear.layer)] = None
            paths[re.escape(linear.path)] = None
    return {
        rf"{re.escape(layers)}\.({'|'.join(indices)})\.({'|'.join(paths)})": own
        for (_, own), (indices, paths) in where.items()
    }
