"""The text side of a multimodal model: the causal LM inside it, and what of the whole model is not part of that."""

import copy
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from prunelit.core.architectures import get_architecture, get_decoder_config
from prunelit.model.copies import copy_sharing_tensors
from prunelit.runtime.errors import DoesNotFit


def is_multimodal(model: Any) -> bool:
    """Whether a model holds its decoder beside other parts, such as a tower for images.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> is_multimodal(LlamaForCausalLM(LlamaConfig(**sizes)))
        False
    """
    config = getattr(model, "config", None)
    return config is not None and get_decoder_config(config) is not config


def list_picture_tokens(config: Any) -> list[int]:
    """List the token ids that stand for pictures, videos or sound in a text, and those around them.

    Args:
        config: of a multimodal model; that of a causal LM has none.

    Example:
        >>> from transformers import LlavaConfig
        >>> list_picture_tokens(LlavaConfig())
        [32000]
    """
    if get_decoder_config(config) is config:
        return []
    text_tokens = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    names = [name for name in vars(config) if name.endswith(("_token_id", "_token_index")) and name not in text_tokens]
    return sorted({value for name in names if isinstance(value := getattr(config, name), int)})


def list_tower_parameters(model: Any) -> list[nn.Parameter]:
    """List the parameters of a multimodal model outside its decoder, embedding and output projection.

    Text gives them no gradient, and recovery leaves them as they are.

    Args:
        model: a transformers model; a causal LM has none.

    Example: see `prunelit.recovery.module`, which freezes them.
    """
    if not is_multimodal(model):
        return []
    text_parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    of_text = {id(parameter) for part in text_parts if part is not None for parameter in part.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in of_text]


def count_tower_parameters(model: Any) -> int:
    """Count the parameters of a multimodal model's towers and projectors; 0 for a causal LM.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> count_tower_parameters(LlamaForCausalLM(LlamaConfig(**sizes)))
        0
    """
    return sum(parameter.numel() for parameter in list_tower_parameters(model))


def _derive_text_config(decoder_config: Any) -> Any:
    """Derive the config of the causal LM that computes what a decoder computes on text."""
    from transformers import CONFIG_MAPPING

    architecture = get_architecture(decoder_config)
    if architecture.text_family is None:
        return copy.deepcopy(decoder_config)
    config_class = CONFIG_MAPPING[architecture.text_family]
    names = {item.name for item in fields(config_class)} - {"model_type", "architectures"}
    settings = {name: value for name, value in decoder_config.to_dict().items() if name in names}
    if "head_dim" in names and not settings.get("head_dim"):  # families differ in what it is without a value
        settings["head_dim"] = decoder_config.hidden_size // decoder_config.num_attention_heads
    for name, value in architecture.text_settings.items():
        settings[name] = getattr(decoder_config, value) if isinstance(value, str) else value
    # Positions of text are the same in time, height and width, so the sections of the rotary table say nothing.
    rope = {name: value for name, value in settings["rope_parameters"].items() if name != "mrope_section"}
    return config_class.from_dict(settings | {"rope_parameters": rope})


def _scales_some_layers(decoder_config: Any) -> bool:
    """Whether positions are scaled in some layers and not in others (molmo2)."""
    scaled = getattr(decoder_config, "rope_scaling_layers", None)
    is_plain = (getattr(decoder_config, "rope_parameters", None) or {}).get("rope_type", "default") == "default"
    return scaled is not None and not is_plain and len(scaled) < decoder_config.num_hidden_layers


def extract_text_model(model: Any) -> Any:
    """Extract the causal LM inside a multimodal model; it shares its weights, and may be pruned.

    Args:
        model: a transformers model; a causal LM is returned as it is.

    Raises:
        DoesNotFit: transformers has no causal LM for this kind of decoder.

    Example: see `prunelit.export.write_model`, which calls it for formats that hold text models only.
    """
    from transformers import AutoModelForCausalLM

    if not is_multimodal(model):
        return model
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if getattr(decoder, "lm_head", None) is not None:  # a causal LM as it is
        return decoder
    config = _derive_text_config(decoder.config)
    if _scales_some_layers(decoder.config):
        raise DoesNotFit(
            f"text_only: expected one rotary table for all layers, got a scaled one for {decoder.config.model_type!r} "
            f"layers {decoder.config.rope_scaling_layers} only, which no causal LM has; write the whole model"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise DoesNotFit(
            f"text_only: expected a decoder that transformers has a causal LM for, got {config.model_type!r}, which is "
            f"there only inside {type(model).__name__}; write the whole model"
        )
    config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
    with torch.device("meta"):
        text_model: Any = AutoModelForCausalLM.from_config(config)
    embeddings = model.get_input_embeddings().weight
    if len(embeddings) > len(head.weight):  # those of further tokens, which stand for pictures and are never predicted
        decoder = copy_sharing_tensors(decoder)
        kept_rows = nn.Parameter(embeddings.detach()[: len(head.weight)], requires_grad=embeddings.requires_grad)
        decoder.get_input_embeddings().weight = kept_rows
        decoder.get_input_embeddings().num_embeddings = len(kept_rows)
    setattr(text_model, text_model.base_model_prefix, decoder)
    text_model.set_output_embeddings(head)
    text_model.config.name_or_path = text_model.name_or_path = str(model.config.name_or_path)
    text_model.generation_config = copy.deepcopy(model.generation_config)
    return text_model.train(model.training)
