"""Low-rank adapters (PEFT) on a cut model, and merging them back."""

from typing import Any, cast

from torch import nn

from prunelit.decoder import Decoder, is_conv1d


def add_lora(model: nn.Module, rank: int, alpha: int, dropout: float) -> Any:
    """Wrap a causal LM with LoRA on every prunable linear (Hu et al. 2021; placement of LLM-Pruner's recovery).

    Args:
        model: the cut model; its own weights are frozen.
        rank: rank of every adapter.
        alpha: adapters are scaled by alpha / rank.
        dropout: on the adapters' input.

    Returns:
        The PEFT model; adapters are float32 also on a half-precision base.
    """
    from peft import LoraConfig, get_peft_model

    decoder = Decoder(model)
    conv1d = any(is_conv1d(layer.down) for layer in decoder if layer.has_mlp)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(decoder.architecture.linears),
        fan_in_fan_out=conv1d,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(cast(Any, model), config)


def merged(model: Any) -> nn.Module:
    """The transformers model with its adapters added into the weights (in place); itself where it has none."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
