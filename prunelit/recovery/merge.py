"""Merging adapters into the weights below them: trained ones, and those of a saved folder.

Plain linears take the adapter in their weights, INT4 linears in the zeros of their groups, without loss. NF4 linears
cannot take one without rounding again; their adapters go into the pruned weights in full precision.
"""

import copy
import os
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn

from prunelit.model.decoder import is_conv1d
from prunelit.model.per_layer import find, replace_module
from prunelit.model.quiet import silence_transformers
from prunelit.quantization.int4 import GroupLora, Int4Linear
from prunelit.quantization.linears import (
    clear_adapter_mark,
    get_linear_widths,
    get_quantization,
    has_adapters,
    list_decoder_linears,
    list_decoder_mixtures,
)
from prunelit.recovery.adapter_files import (
    KEY_PREFIX,
    WEIGHTS,
    check_shapes_match,
    read_adapter_settings,
    read_adapter_shapes,
)
from prunelit.recovery.lora import PATTERN_WARNING
from prunelit.runtime.errors import BadAdapter, BadQuantisation
from prunelit.runtime.progress import show_stage


@torch.no_grad()
def merge_adapter_folder(model: Any, folder: str | os.PathLike[str]) -> Any:
    """Merge a saved adapter into the weights of its base, in place.

    Args:
        model: the base, plain, or int4, where the adapter goes into the zeros.
        folder: of the adapter.

    Raises:
        BadAdapter: see `check_adapter`; or an adapter that tells the inputs of an INT4 group apart.

    Example: see `tests/recovery/test_adapter_files.py`.
    """
    path = Path(folder).expanduser()
    settings = read_adapter_settings(path)
    check_shapes_match(
        folder,
        read_adapter_shapes(path),
        _list_target_shapes(model),
        "the model",
    )
    if get_quantization(model) == "int4":
        return _merge_into_zeros(model, path, settings)
    from peft import PeftModel

    try:
        with show_stage("merging the adapter"), silence_transformers(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", PATTERN_WARNING)
            warnings.filterwarnings("error", "Found missing adapter keys")  # PEFT would go on with random adapters
            return clear_adapter_mark(PeftModel.from_pretrained(model, str(path)).merge_and_unload())
    except Exception as error:  # PEFT takes a stranger's settings for granted and fails in many ways
        reason = " ".join(str(error).split())
        if "size mismatch" in reason:  # of experts, whose number the shapes do not tell
            reason = f"{reason[reason.index('size mismatch') :]:.160}; it was made for another cut"
        reason = reason[:200]
        raise BadAdapter(f"adapter {str(folder)!r}: cannot be loaded onto the model: {reason}") from error


def _list_target_shapes(model: Any) -> dict[str, tuple[int, int]]:
    """List [O, I] of what adapters can sit on, by PEFT's names: of experts, that of the weights of one expert.

    PEFT wraps a module once for each of its parameters, so the first of two is the `base_layer` of the second.
    """
    shapes = {x.name: get_linear_widths(x.module) for x in list_decoder_linears(model)}
    for mixture in list_decoder_mixtures(model):
        experts, router = find(mixture.module, mixture.experts), find(mixture.module, mixture.router)
        names = [name for name, _ in experts.named_parameters(recurse=False) if name in mixture.tensors]
        for depth, name in enumerate(reversed(names)):
            _, rows, columns = getattr(experts, name).shape
            shapes[f"{mixture.prefix}.{mixture.experts}{'.base_layer' * depth}"] = rows, columns
        shapes[f"{mixture.prefix}.{mixture.router}"] = tuple(router.weight.shape)
    return shapes


def _merge_into_zeros(model: Any, folder: Path, settings: Any) -> Any:
    """Add s B A of every group to its zero."""
    tensors = load_file(folder / WEIGHTS)
    for linear in list_decoder_linears(model):
        key = f"{KEY_PREFIX}{linear.name}.lora_%s.weight"
        if key % "A" not in tensors:
            continue
        module = cast(Int4Linear, linear.module)
        a, b = tensors[key % "A"].float(), tensors[key % "B"].float()
        size = module.group_size
        # The last column again in a narrower last group: it is no other input.
        grouped = torch.cat([a, a[:, -1:].expand(-1, -a.shape[1] % size)], 1).unflatten(1, (-1, size))
        if not torch.equal(grouped, grouped[..., :1].expand_as(grouped)):
            raise BadAdapter(
                f"adapter {str(folder)!r}: {linear.name}: expected one value for all inputs of an INT4 group of "
                f"{size}, got several, which zeros cannot take; use format uniform or hetero, or train with base int4"
            )
        module.add_to_zeros(_get_adapter_scaling(settings, linear.name) * (b @ grouped[..., 0]))
    return model


def _get_adapter_scaling(settings: Any, name: str) -> float:
    """alpha / r of a module, or alpha / sqrt(r): PEFT's, by its own patterns."""
    from peft.utils.other import get_pattern_key

    rank = settings.rank_pattern.get(get_pattern_key(settings.rank_pattern, name), settings.r)
    alpha = settings.alpha_pattern.get(get_pattern_key(settings.alpha_pattern, name), settings.lora_alpha)
    return float(alpha / (rank**0.5 if settings.use_rslora else rank))


def merge_adapters(model: Any) -> nn.Module:
    """Merge a model's adapters into its weights, in place.

    On int4 the adapters go into the zeros of the groups: the model stays in 4 bits and gives the same outputs.

    Args:
        model: a PEFT model, an int4 model with adapters, or a model without adapters.

    Returns:
        The transformers model; `model` itself where it has no adapters.

    Raises:
        BadQuantisation: adapters on nf4. Merging there rounds again, which loses much of the adapter. After an
            evaluation on a CPU, bitsandbytes also holds the weights in another order, and the result is garbage.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from prunelit.recovery.lora import add_lora
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        >>> adapted = add_lora(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), rank=4, alpha=8, dropout=0.0)
        >>> type(merge_adapters(adapted)).__name__
        'LlamaForCausalLM'
    """
    if not has_adapters(model):
        return cast(nn.Module, model)
    if get_quantization(model) == "nf4":
        raise BadQuantisation(
            "merge_adapters: expected adapters on a base in full precision or int4, got nf4, which cannot take them "
            "without loss; give prunelit.recovery.merge.merge_into_full_precision the pruned model in full precision"
        )
    if hasattr(model, "merge_and_unload"):
        with show_stage("merging the adapters"):
            return clear_adapter_mark(cast(nn.Module, model.merge_and_unload()))
    for linear in list_decoder_linears(model):
        if isinstance(linear.module, GroupLora):
            replace_module(model, linear.name, linear.module.merge())
    return cast(nn.Module, model)


def merge_into_full_precision(full_base: Any, adapted: Any) -> nn.Module:
    """Merge PEFT adapters into another copy of their base in full precision; this is the way out of nf4.

    The result differs from the nf4 model by the rounding error of the nf4 weights, which the adapters had learnt to
    undo.

    Args:
        full_base: the pruned model in full precision, without adapters; changed in place.
        adapted: the PEFT model with the adapters; it is not changed.

    Returns:
        `full_base` with the adapters in its weights.

    Raises:
        BadQuantisation: `full_base` is quantised or has adapters, `adapted` has no PEFT adapters, or their shapes
            differ.

    Example: see `RecoveryModule.merge_model`.
    """
    if has_adapters(full_base) or get_quantization(full_base) is not None:
        raise BadQuantisation(
            "merge_into_full_precision: full_base: expected a plain model, got adapters or 4-bit linears; "
            "load the pruned model again"
        )
    if not hasattr(adapted, "peft_config"):
        raise BadQuantisation(
            "merge_into_full_precision: adapted: expected a PEFT model, got none; "
            "merge int4 with prunelit.recovery.merge.merge_adapters"
        )
    base_widths, adapted_widths = (
        {x.name: get_linear_widths(x.module) for x in list_decoder_linears(model)} for model in (full_base, adapted)
    )
    for name in sorted(base_widths.keys() | adapted_widths.keys()):
        if base_widths.get(name) != adapted_widths.get(name):
            raise BadQuantisation(
                f"merge_into_full_precision: {name}: expected [out, in] {adapted_widths.get(name)} as under the "
                f"adapters, got {base_widths.get(name)}; prune full_base with the same plan"
            )
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(adapted.peft_config["default"])
    config.fan_in_fan_out = any(is_conv1d(linear.module) for linear in list_decoder_linears(full_base))
    # Only the adapters: collecting the whole state dict makes bitsandbytes put the nf4 weights into another order.
    adapters = {name: parameter for name, parameter in adapted.named_parameters() if "lora_" in name}
    adapter_state = get_peft_model_state_dict(adapted, adapters, save_embedding_layers=False)
    with show_stage("merging the adapters"):
        peft_model: Any = get_peft_model(full_base, config)
        set_peft_model_state_dict(peft_model, adapter_state)
        return clear_adapter_mark(cast(nn.Module, peft_model.merge_and_unload()))
