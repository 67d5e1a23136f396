"""A model whose layers compute the same as Llama's, whatever its class: its projections by role, rope and context.

Formats outside transformers (`gguf`, `deci`) have a few graphs only, and read from a file what transformers keeps in
its code. A model that they cannot express is refused here, in one line, before anything is written.

Legend: H hidden size, Q query heads, G KV groups, D head size, F FFN channels.
"""

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from prunelit.core.architectures import PRUNED
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.per_layer import find
from prunelit.planning.serving import LLAMA_LIKE_FAMILIES
from prunelit.runtime.errors import DoesNotFit

_ROPE_TYPES = ("default", "linear", "llama3")


def get_model_family(decoder: Decoder) -> str:
    """Return the `model_type` of the dense model.

    Example: see `prunelit.export.gguf.layout`, which uses it.
    """
    return str(decoder.config.model_type).removeprefix(PRUNED)


def collect_projections(layer: Layer) -> dict[str, Any]:
    """Collect the linears of a layer by role.

    Returns:
        Linears with weights q [Q * D, H], k and v [G * D, H], o [H, Q * D], gate and up [F, H], down [H, F]. The
        linears of a removed block are missing. Of a fused linear, the views of its rows stand for the linears.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        >>> decoder = Decoder(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)))
        >>> {role: list(linear.weight.shape) for role, linear in collect_projections(decoder.layers[0]).items()}["down"]
        [16, 24]
    """
    linears: dict[str, Any] = {}
    if layer.has_attention:
        shape = layer.shape
        rows = [heads * shape.head_dim for heads in (shape.query_heads, shape.kv_groups, shape.kv_groups)]
        linears |= dict(zip("qkv", _split_rows(layer.qkv, rows), strict=True)) | {"o": layer.output}
    if layer.has_mlp:
        rows = [layer.shape.ffn_channels] * 2
        linears |= dict(zip(("gate", "up"), _split_rows(layer.ffn_in, rows), strict=True)) | {"down": layer.down}
    return linears


def _split_rows(linears: Sequence[Any], rows: Sequence[int]) -> Sequence[Any]:
    """Split a fused linear, where there is one, into views of the linears in it: (weight, bias) with these rows."""
    if len(linears) == len(rows):
        return linears
    weights = linears[0].weight.split(list(rows))
    biases = [None] * len(rows) if linears[0].bias is None else linears[0].bias.split(list(rows))
    return [SimpleNamespace(weight=weight, bias=bias) for weight, bias in zip(weights, biases, strict=True)]


def compute_rope_factors(decoder: Decoder, format: str) -> Tensor | None:
    """Compute the factors by which a scaled rope divides the frequencies of plain rope.

    Args:
        decoder: model of a family whose rotary module is at `model.rotary_emb`.
        format: name of the format, for the message.

    Returns:
        [D / 2] in float32; None where rope is not scaled.

    Raises:
        DoesNotFit: a rope that changes with the length of the text, scales attention, or covers part of the head only.

    Example: see `tests/export/gguf/test_writer.py`.
    """
    rotary, rope = find(decoder.model, "model.rotary_emb"), decoder.config.rope_parameters
    kind = str(rope.get("rope_type", "default"))
    frequencies = rotary.inv_freq.detach().float().cpu()
    dim = get_head_dim(decoder)
    if kind not in _ROPE_TYPES or float(getattr(rotary, "attention_scaling", 1.0)) != 1.0:
        raise DoesNotFit(
            f"format {format!r}: expected rope_type {', '.join(_ROPE_TYPES)}, got {kind!r}; use format 'hetero'"
        )
    if 2 * len(frequencies) != dim:
        raise DoesNotFit(
            f"format {format!r}: expected rope over all {dim} dimensions of a head, got {2 * len(frequencies)}; "
            "use format 'hetero'"
        )
    if kind == "default":
        return None
    # In float64, so that powers and quotient add no rounding error to that of the model's float32 frequencies.
    plain = float(rope["rope_theta"]) ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return (plain / frequencies.double()).float()


def get_head_dim(decoder: Decoder) -> int:
    """Return the head size D, which is the same in all layers that have attention.

    Raises:
        DoesNotFit: no layer has attention.

    Example: see `prunelit.export.deci.writer`, which uses it.
    """
    head_dims = {layer.shape.head_dim for layer in decoder if layer.has_attention}
    if len(head_dims) != 1:
        raise DoesNotFit("output: expected a model with attention in at least one layer, got none; use 'hetero'")
    return head_dims.pop()


def compute_context_limit(decoder: Decoder) -> int:
    """Compute the number of tokens up to which full attention equals the model's own.

    This is the model's context length, or its sliding window if that is smaller: the written graphs have no window.

    Example: see `prunelit.export.deci.writer`, which uses it.
    """
    config = decoder.config
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    limit = int(config.max_position_embeddings)
    return min(limit, int(window)) if window and "sliding_attention" in types else limit


def check_llama_layers(
    decoder: Decoder,
    format: str,
    families: Collection[str] = LLAMA_LIKE_FAMILIES,
    activations: Sequence[str] = ("silu", "swish"),
) -> None:
    """Check the family of a model, and the options of its config that change the computation.

    Args:
        decoder: the model.
        format: name of the format, for the message.
        families: families that the format knows.
        activations: names of the activation that the format computes, the usual one first.

    Raises:
        DoesNotFit: the format cannot express the model; the message names a format that can.

    Example: see `prunelit.export.deci.writer`, which uses it.
    """
    family, config = get_model_family(decoder), decoder.config
    if family not in families:
        raise DoesNotFit(
            f"format {format!r}: expected a model of {', '.join(sorted(families))}, got {family!r}; use 'hetero'"
        )
    activation = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu"))
    if activation not in activations:
        raise DoesNotFit(
            f"format {format!r}: expected hidden_act {activations[0]!r}, got {activation!r}; use format 'hetero'"
        )
    head = cast(Any, decoder.model).get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise DoesNotFit(f"format {format!r}: expected an output head without bias, got one with; use format 'hetero'")


def has_tied_embeddings(model: Any) -> bool:
    """Tell whether the output head shares the tensor of the token table.

    Example: see `prunelit.export.deci.writer`, which uses it.
    """
    return bool(model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr())
