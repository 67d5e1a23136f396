"""Why a model is not cut: what it is, from the facts in its config.json, before any weight is read.

A declared family is never described by the first function, so `prunelit.register` wins over every kind below.
"""

import difflib
import re
from collections.abc import Collection
from typing import Any

FAMILIES_COMMAND = "`python -m prunelit methods --families`"
"""The command that lists the declared families."""
_DECLARATIONS = "prunelit/core/architectures.py"
# Beside configs with is_encoder_decoder.
_ENCODER_DECODERS = frozenset(
    {"bart", "encoder-decoder", "fsmt", "led", "m2m_100", "marian", "mbart", "moonshine", "mt5", "nllb-moe", "pegasus"}
    | {"pix2struct", "plbart", "prophetnet", "seamless_m4t", "speech-encoder-decoder", "speech_to_text", "t5"}
    | {"switch_transformers", "t5gemma", "t5gemma2", "udop", "umt5", "vision-encoder-decoder", "whisper"}
)
_ENCODERS = frozenset(
    {"albert", "bert", "big_bird", "camembert", "canine", "convbert", "deberta", "deberta-v2", "distilbert", "electra"}
    | {"ernie", "esm", "eurobert", "layoutlm", "layoutlmv3", "longformer", "modernbert", "mpnet", "nomic_bert"}
    | {"rembert", "roberta", "roberta-prelayernorm", "roformer", "squeezebert", "xlm-roberta", "xlm-roberta-xl", "xmod"}
    | {
        "data2vec-text",
        "esmc",
        "flaubert",
        "fnet",
        "funnel",
        "gte",
        "ibert",
        "jina_embeddings_v3",
        "luke",
        "mobilebert",
    }
    | {"megatron-bert", "mra", "nystromformer", "roc_bert", "tapas", "yoso"}
    | {"clip", "clip_text_model", "dinov2", "hubert", "siglip", "siglip_text_model", "vit", "wav2vec2"}
)
_DIFFUSION_LMS = frozenset({"dream", "llada", "llada_moe", "mdlm", "sdar", "sdar_moe"})
_STATE_SPACES = frozenset({"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"})
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_MIXTURES = frozenset({"dbrx", "gpt_oss", "mixtral"})  # beside names with "moe"; their configs may leave the count out
_OTHER_HEAD = re.compile(
    r"(For(\w*Classification|\w*QuestionAnswering|MultipleChoice|MaskedLM|NextSentencePrediction|RewardModel(ing)?|CTC"
    r"|ObjectDetection|\w*Segmentation|DepthEstimation|\w*Retrieval)|RewardModel)$"
)
_NESTED_DECODERS = ("llm_config", "language_config", "thinker_config", "text_model_config")
# How the weights of a folder become plain ones again: by a method of the model, or while transformers loads it.
_MODEL_DEQUANTIZES = frozenset({"bitsandbytes", "higgs"})
_CONFIG_DEQUANTIZES = {
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "metal": "MetalConfig",
    "mxfp4": "Mxfp4Config",
}


def describe_unsupported_config(config: Any, decoder_config: Any, declared: Collection[str] = ()) -> str:
    """Describe a model whose family is not declared: what it is, what of it is cut, and where a declaration would go.

    Args:
        config: a transformers config, or the content of config.json with attributes for names.
        decoder_config: of its decoder, see `get_decoder_config`; `config` itself where it is no multimodal model.
        declared: names of the declared families, of which the nearest is suggested.

    Returns:
        One line for an error message.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(model_type="jetmoe", num_local_experts=8)
        >>> describe_unsupported_config(config, config).partition("; ")[0]
        "model_type 'jetmoe': expected a declared decoder, got a mixture of 8 experts that no declaration names"
    """
    family = str(getattr(decoder_config, "model_type", None))
    subject = f"model_type {family!r}"
    if decoder_config is not config:
        subject = f"model_type {str(getattr(config, 'model_type', None))!r} with text_config of type {family!r}"
    kind = describe_model_kind(decoder_config) or ("" if decoder_config is config else describe_model_kind(config))
    if kind:
        return (
            f"{subject}: expected a declared decoder, got {kind}; take a family of {FAMILIES_COMMAND}; a declaration "
            f"would go to {_DECLARATIONS}"
        )
    nearest = difflib.get_close_matches(family, declared, n=1)
    hint = f" (nearest: {nearest[0]!r})" if nearest else ""
    return (
        f"{subject}: expected a declared family, got none of that name{hint}; add {family!r} to ARCHITECTURES in "
        f"{_DECLARATIONS}, or call prunelit.register({family!r}, Architecture(...)) first; {FAMILIES_COMMAND} lists all"
    )


def describe_unsupported_setting(config: Any, name: str, required: Any) -> str:
    """Describe a model of a declared family with a setting that the declaration does not cover.

    Args:
        config: of the decoder.
        name: of the setting.
        required: the value that is covered.

    Returns:
        One line for an error message.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(model_type="opt", do_layer_norm_before=False)
        >>> describe_unsupported_setting(config, "do_layer_norm_before", True).partition("; ")[0]
        "model_type 'opt': expected do_layer_norm_before = True in its config, got False"
    """
    kind = describe_model_kind(config)
    return (
        f"model_type {str(config.model_type)!r}: expected {name} = {required!r} in its config, got "
        f"{getattr(config, name)!r}{f', {kind}' if kind else ''}; with {required!r} this family is cut, as "
        f"{_DECLARATIONS} declares"
    )


def describe_model_kind(config: Any) -> str:
    """Describe a kind of model that prunelit does not cut, and what of it is cut.

    Args:
        config: of a decoder, or of a model of another kind.

    Returns:
        "a mixture of 8 experts; ..."; "" for a config without the marks of such a kind.

    Example:
        >>> from types import SimpleNamespace
        >>> describe_model_kind(SimpleNamespace(model_type="bloom")).partition("; ")[0]
        "a decoder with ALiBi, a bias built for all of the config's heads"
    """
    model_type = str(getattr(config, "model_type", None)).lower()
    experts = count_experts(config)
    if getattr(config, "is_encoder_decoder", False) is True or model_type in _ENCODER_DECODERS:
        return "an encoder-decoder; nothing of it is cut, its decoder neither"
    if model_type in _ENCODERS and getattr(config, "is_decoder", False) is not True:
        return "an encoder, which predicts no next token; nothing of it is cut"
    if model_type in _DIFFUSION_LMS or "diffusion" in model_type:
        return "a diffusion LM, which fills in masks; scores need the loss of next tokens, so nothing of it is cut"
    if model_type in _STATE_SPACES or (
        re.search("mamba|rwkv", model_type) and not getattr(config, "num_attention_heads", None)
    ):
        return "a state-space model or RNN; nothing of it is cut, but attention and FFNs of hybrids are"
    if _has_alibi(config, model_type):
        return "a decoder with ALiBi, a bias built for all of the config's heads; nothing of it is cut"
    if experts > 1 or ((model_type in _MIXTURES or "moe" in model_type) and experts < 0):
        count = f"{experts} " if experts > 1 else ""
        return f"a mixture of {count}experts that no declaration names; nothing of it is cut"
    if getattr(config, "kv_lora_rank", None):
        return "latent attention (kv_lora_rank), whose heads share one projection; nothing of it is cut undeclared"
    if key := next((key for key in _NESTED_DECODERS if getattr(config, key, None)), None):
        return f"one in {key}, where text_config is read; convert it to transformers' own layout"
    if head := find_other_head(config):
        return f"{head}, which is no language model; nothing of it is cut"
    return ""


def count_experts(config: Any) -> int:
    """Count the experts of an FFN that a config names.

    Returns:
        The largest count, 0 where the config turns them off, -1 where it names none.

    Example:
        >>> from types import SimpleNamespace
        >>> count_experts(SimpleNamespace(n_routed_experts=64)), count_experts(SimpleNamespace())
        (64, -1)
    """
    if getattr(config, "is_moe", None) is False or getattr(config, "enable_moe_block", None) is False:
        return 0
    counts = [-1]
    for place in (config, getattr(config, "ffn_config", None)):
        for name in _EXPERT_COUNTS:
            value = _get_setting(place, name)
            counts += [count for count in (value if isinstance(value, list) else [value]) if type(count) is int]
    return max(counts)


def find_other_head(config: Any) -> str:
    """Find the class of a model with another head than that of a language model, such as a classifier.

    Args:
        config: of the whole model.

    Returns:
        The name of the class; "" for a language model, or where the config names no class.

    Example:
        >>> from types import SimpleNamespace
        >>> find_other_head(SimpleNamespace(architectures=["LlamaForSequenceClassification"]))
        'LlamaForSequenceClassification'
    """
    names = getattr(config, "architectures", None) or []
    return next((str(name) for name in names if _OTHER_HEAD.search(str(name))), "") if isinstance(names, list) else ""


def describe_other_head(config: Any) -> str:
    """Describe a folder of a declared family whose head is not that of a language model.

    Args:
        config: of the whole model.

    Returns:
        One line for an error message; "" for a language model.

    Example:
        >>> from types import SimpleNamespace
        >>> describe_other_head(SimpleNamespace(architectures=["LlamaForCausalLM"]))
        ''
    """
    if not (head := find_other_head(config)):
        return ""
    return (
        f"architectures: expected a causal LM, got {head}; pass the causal LM that it was made from, or cut it inside "
        "the job that trains it: its decoder is supported, with a pruning callback in Trainer(callbacks=[...])"
    )


def describe_quantized_weights(config: Any) -> str:
    """Describe the weights of a folder that are stored in few bits, and how they become plain ones.

    Args:
        config: content of config.json with attributes for names.

    Returns:
        One line for an error message; "" where weights are plain, or are dequantised while they are loaded.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(quantization_config={"quant_method": "gptq", "bits": 4})
        >>> describe_quantized_weights(config).partition("; ")[0]
        'quantization_config: expected plain weights, got gptq in 4 bits'
    """
    settings = get_quantization_settings(config)
    if not settings or settings.get("dequantize") is True:
        return ""
    is_4_bit, is_8_bit = settings.get("load_in_4bit"), settings.get("load_in_8bit")
    method = str(settings.get("quant_method") or ("bitsandbytes" if is_4_bit or is_8_bit else "another format"))
    bits = settings.get("bits") or (4 if is_4_bit else 8 if is_8_bit else None)
    if method in _MODEL_DEQUANTIZES:
        advice = "load it with transformers, call model.dequantize() and model.save_pretrained(DIR), and pass DIR"
    elif method in _CONFIG_DEQUANTIZES:
        advice = (
            f"load it with transformers and quantization_config={_CONFIG_DEQUANTIZES[method]}(dequantize=True), call "
            "model.save_pretrained(DIR), and pass DIR"
        )
    else:
        advice = "pass the model that it was made from; transformers does not dequantise it"
    return f"quantization_config: expected plain weights, got {method}{f' in {bits} bits' if bits else ''}; {advice}"


def get_quantization_settings(config: Any) -> dict[str, Any]:
    """Get `quantization_config` of a model, or of its decoder; nothing where weights are plain.

    Example:
        >>> from types import SimpleNamespace
        >>> get_quantization_settings(SimpleNamespace(text_config={"quantization_config": {"quant_method": "fp8"}}))
        {'quant_method': 'fp8'}
    """
    for place in (config, getattr(config, "text_config", None)):
        for name in ("quantization_config", "compression_config"):
            if isinstance(settings := _get_setting(place, name), dict) and settings:
                return settings
    return {}


def _has_alibi(config: Any, model_type: str) -> bool:
    """Whether positions are a bias for each head (bloom, mpt, falcon-rw and others)."""
    attention = getattr(config, "attn_config", None)
    alibi = _get_setting(attention, "alibi")
    if model_type == "mpt" and alibi is None:
        return True  # the default
    is_set = any(value is True for value in (alibi, getattr(config, "alibi", None), getattr(config, "use_alibi", None)))
    return model_type == "bloom" or is_set or getattr(config, "position_embedding_type", None) == "alibi"


def _get_setting(place: Any, name: str) -> Any:
    """A setting of a config or of a part of it, which is an object or a mapping."""
    return place.get(name) if isinstance(place, dict) else getattr(place, name, None)
