"""A model whose layers compute what Llama's do, whatever its class: its projections by role, its rope, its context.

Formats outside transformers (`gguf`, `deci`) know a few graphs only, and read from a file what transformers keeps in
code; what they can not express is refused here, in one line, before anything is written.

Legend: H hidden size, Q query heads, G KV groups, D head size, F FFN channels.
"""

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunelit.core.architectures import PRUNED
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.per_layer import find
from prunelit.planning.serving import LLAMA_LIKE_FAMILIES
from prunelit.runtime.errors import DoesNotFit

_ROPE_TYPES = ("default", "linear", "llama3")


def get_model_family(decoder: Decoder) -> str:
    """The `model_type` of the dense model."""
    return str(decoder.config.model_type).removeprefix(PRUNED)


def collect_projections(layer: Layer) -> dict[str, nn.Module]:
    """Linears by role: q [Q * D, H], k and v [G * D, H], o [H, Q * D], gate and up [F, H], down [H, F].

    Those of a removed block are missing.
    """
    found: dict[str, nn.Module] = {}
    if layer.has_attention:
        found |= dict(zip("qkv", layer.qkv, strict=True)) | {"o": layer.output}
    if layer.has_mlp:
        found |= dict(zip(("gate", "up"), layer.ffn_in, strict=True)) | {"down": layer.down}
    return found


def compute_rope_factors(decoder: Decoder, format: str) -> Tensor | None:
    """What each rope frequency is divided by, [D / 2] float32; None where rope is not scaled.

    Args:
        decoder: of a family whose rotary module is at `model.rotary_emb`.
        format: name of the format, for the message.

    Raises:
        DoesNotFit: a rope that changes with the length of the text, scales attention, or covers part of the head.
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
    plain = float(rope["rope_theta"]) ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return (plain / frequencies.double()).float()


def get_head_dim(decoder: Decoder) -> int:
    """D, the same in all layers that have attention.

    Raises:
        DoesNotFit: no layer has attention.
    """
    found = {layer.shape.head_dim for layer in decoder if layer.has_attention}
    if len(found) != 1:
        raise DoesNotFit("output: expected a model with attention in at least one layer, got none; use 'hetero'")
    return found.pop()


def compute_context_limit(decoder: Decoder) -> int:
    """Tokens up to which the file computes what the model does: its own limit, or its sliding window if smaller."""
    config = decoder.config
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    limit = int(config.max_position_embeddings)
    return min(limit, int(window)) if window and "sliding_attention" in types else limit


def check_llama_layers(decoder: Decoder, format: str, families: Collection[str] = LLAMA_LIKE_FAMILIES) -> None:
    """Check the family and what its config may change about the computation.

    Raises:
        DoesNotFit: in one line, with what can be written instead.
    """
    family, config = get_model_family(decoder), decoder.config
    if family not in families:
        raise DoesNotFit(
            f"format {format!r}: expected a model of {', '.join(sorted(families))}, got {family!r}; use 'hetero'"
        )
    activation = str(getattr(config, "hidden_act", "silu"))
    if activation not in ("silu", "swish"):
        raise DoesNotFit(f"format {format!r}: expected hidden_act 'silu', got {activation!r}; use format 'hetero'")
    head = cast(Any, decoder.model).get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise DoesNotFit(f"format {format!r}: expected an output head without bias, got one with; use format 'hetero'")


def has_tied_embeddings(model: Any) -> bool:
    """Whether the output head is the token table."""
    return bool(model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr())
