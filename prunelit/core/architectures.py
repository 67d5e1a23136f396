"""Declarations of model families: the names of a decoder layer's modules, one entry per family.

What an entry can say is in `prunelit.core.declaration`.

A model of text and images holds a decoder of one of these families; its config holds that of the decoder as
`text_config`, and the family of the decoder is all that has to be declared.

To add a family, add one line to `ARCHITECTURES`: its `model_type` and whatever differs from the Llama layout. No other
code in prunelit knows a family by name. `prunelit.model.decoder` checks a declaration against the loaded model, and the
contract tests in `tests/core/test_architectures.py` run on every entry.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from prunelit.core.declaration import Architecture, Mixture
from prunelit.core.unsupported import count_experts, describe_unsupported_config, describe_unsupported_setting
from prunelit.runtime.errors import UnknownArchitecture

PRUNED = "pruned_"
"""Prefix of `model_type` in the config of folders that are saved with per-layer shapes."""


_LLAMA = Architecture()
# Norms before and after each block (Gemma 2 and later).
_SANDWICH = replace(
    _LLAMA,
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    norm_offset=1.0,
)
_WHOLE_ATTENTION: dict[str, Any] = {"attention": None, "mixer": "self_attn", "mixer_is_attention": True}
# Layers know their number: by it they share keys and values, and get inputs of their own. The cache follows the config,
# which has no place for other holes in it than the layers that use the keys and values of others.
_GEMMA4 = replace(
    _SANDWICH,
    norm_offset=0.0,
    layer_parts=("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm"),
    attention_removable=False,
    fixed_layers="num_hidden_layers",
    layer_variants=(
        ("self_attn.use_alternative_attention", _WHOLE_ATTENTION),  # its keys are its values
        ("self_attn.store_full_length_kv", _WHOLE_ATTENTION),  # others use them
        ("self_attn.is_kv_shared_layer", {**_WHOLE_ATTENTION, "attention_removable": True}),
    ),
)
# Norms only after each block; q_norm and k_norm run over all heads together, so no head can be removed exactly.
_POST_NORM = replace(
    _LLAMA,
    attention_norm=None,
    mlp_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
# One norm feeds attention and FFN, whose outputs are added to the residual together.
_PARALLEL = replace(
    _LLAMA, parallel=True, attention_norm=None, mlp_norm=None, shared_norm="input_layernorm", norm="layer"
)
_PLAIN_FFN = replace(_LLAMA, gate=None)
_FC = replace(_PLAIN_FFN, up="fc1", down="fc2", activation="activation_fn")
# Norms before and after each block, and gate and up in one linear.
_GLM4 = replace(
    _LLAMA,
    fused_gate_up="gate_up_proj",
    activation="activation_fn",
    attention_post_norm="post_self_attn_layernorm",
    mlp_post_norm="post_mlp_layernorm",
)
# Layers of convolutions and of attentions.
_LFM = replace(
    _LLAMA,
    mixer="conv",
    mlp="feed_forward",
    gate="w1",
    up="w3",
    down="w2",
    functional_activation="SiLU",
    attention_norm="operator_norm",
    mlp_norm="ffn_norm",
)
# Attentions that cannot be cut by heads, such as those on latent keys and values.
_ATTENTION_WHOLE = replace(_LLAMA, **_WHOLE_ATTENTION)
# A mixture whose router corrects its choice by a number per expert, and an FFN beside the experts.
_CORRECTED_MIXTURE = Mixture(
    shared="mlp.shared_experts",
    per_expert=("gate.e_score_correction_bias",),
    config_experts="n_routed_experts",
    config_shared_count="n_shared_experts",
)
_CORRECTED_SHARED_EXPERTS = replace(
    _CORRECTED_MIXTURE, config_experts="num_experts", config_shared_count="num_shared_experts"
)
_SHARED_EXPERT = Mixture(shared="mlp.shared_expert", config_shared="shared_expert_intermediate_size")
_LOCAL_EXPERTS = Mixture(config_experts="num_local_experts", config_channels="intermediate_size")
_QWEN3_NEXT = replace(_LLAMA, mixer="linear_attn", gated_query=True, norm_offset=1.0, mixture=_SHARED_EXPERT)
_GRANITE_SHARED = replace(
    _LLAMA,
    mlp="shared_mlp",
    fused_gate_up="input_linear",
    down="output_linear",
    activation="activation",
    residual_scale="residual_multiplier",
    config_ffn="shared_intermediate_size",
    mixture=replace(
        _LOCAL_EXPERTS,
        block="block_sparse_moe",
        router="router",
        shared="shared_mlp",
        config_shared="shared_intermediate_size",
    ),
)
_GPT = Architecture(
    layers="transformer.h",
    attention="attn",
    output="c_proj",
    gate=None,
    up="c_fc",
    down="c_proj",
    activation="act",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    norm="layer",
    position_table=True,
    config_ffn="n_inner",
)
_OPT = Architecture(
    layers="model.decoder.layers",
    output="out_proj",
    mlp="",
    gate=None,
    up="fc1",
    down="fc2",
    activation="activation_fn",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    norm="layer",
    position_table=True,
    config_ffn="ffn_dim",
)

ARCHITECTURES: dict[str, Architecture] = {
    "apertus": replace(_PLAIN_FFN, attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm"),
    "arcee": _PLAIN_FFN,
    "bamba": replace(_LLAMA, mixer="mamba", mlp="feed_forward", mlp_norm="pre_ff_layernorm"),
    "biogpt": replace(_OPT, layers="biogpt.layers", config_ffn="intermediate_size"),
    "cohere": replace(_PARALLEL, per_head={"q_norm.weight": "query", "k_norm.weight": "kv"}),
    "cohere2": _PARALLEL,
    "cohere_compass_text": _PARALLEL,
    "ctrl": Architecture(
        layers="transformer.h",
        attention="multi_head_attention",
        query="Wq",
        key="Wk",
        value="Wv",
        output="dense",
        mlp="ffn",  # a torch.nn.Sequential
        gate=None,
        up="0",
        activation="1",
        down="2",
        attention_norm="layernorm1",
        mlp_norm="layernorm2",
        norm="layer",
        position_table=True,
        config_ffn="dff",
    ),
    "cosmos3_edge_text": _FC,
    "cwm": _LLAMA,
    "deepseek_v2": replace(
        _ATTENTION_WHOLE,
        mixture=replace(_CORRECTED_MIXTURE, per_expert=()),
    ),
    "deepseek_v3": replace(_ATTENTION_WHOLE, mixture=_CORRECTED_MIXTURE),
    "dots1": replace(_LLAMA, mixture=_CORRECTED_MIXTURE),
    "diffllama": replace(
        _ATTENTION_WHOLE, fixed_layers="num_hidden_layers"
    ),  # a constant of each depends on its number
    "ernie4_5": _LLAMA,
    "exaone4": _POST_NORM,
    "exaone_moe": replace(_LLAMA, mixture=_CORRECTED_SHARED_EXPERTS),
    "falcon": Architecture(
        layers="transformer.h",
        attention="self_attention",
        fused_qkv="query_key_value",
        output="dense",
        gate=None,
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="act",
        parallel=True,
        attention_norm=None,
        mlp_norm=None,
        shared_norm="input_layernorm",
        norm="layer",
        config_kv_heads="num_kv_heads",
        config_ffn="ffn_hidden_size",
        requires={"alibi": False},  # its positional bias is built for the global number of heads
        variants=(
            (
                {"parallel_attn": False, "new_decoder_architecture": False},
                {
                    "parallel": False,
                    "shared_norm": None,
                    "attention_norm": "input_layernorm",
                    "mlp_norm": "post_attention_layernorm",
                },
            ),
            ({"multi_query": False}, {"qkv_layout": "grouped"}),
            ({"new_decoder_architecture": True}, {"qkv_layout": "grouped"}),
            (
                {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
                {"shared_norm": None, "attention_norm": "ln_attn", "mlp_norm": "ln_mlp"},
            ),
        ),
    ),
    "falcon_h1": replace(
        _LLAMA,
        mixer="mamba",  # beside the attention, which it shares its norm with
        mlp="feed_forward",
        mlp_norm="pre_ff_layernorm",
        block_scales={"attention": "attn_out_multiplier", "mlp": "feed_forward.down_multiplier"},
    ),
    "flex_olmo": replace(_POST_NORM, heads_prunable=False, mixture=Mixture(config_channels="intermediate_size")),
    "gemma": replace(_LLAMA, norm_offset=1.0),
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "gemma3n_text": replace(
        _GEMMA4,
        attention_norm=None,
        shared_norm="input_layernorm",  # it feeds the attention and `laurel`
        layer_parts=(*_GEMMA4.layer_parts, "altup", "laurel"),
        # Sparse FFNs cut channels off below a quantile over all of them.
        layer_variants=(*_GEMMA4.layer_variants, ("mlp.activation_sparsity", {"mlp": None})),
    ),
    "gemma4_text": replace(_GEMMA4, requires={"enable_moe_block": False}),
    "gemma4_unified_text": _GEMMA4,
    "glm": replace(_LLAMA, fused_gate_up="gate_up_proj", activation="activation_fn"),
    "glm4": _GLM4,
    "glm4_moe": replace(_LLAMA, mixture=_CORRECTED_MIXTURE),
    "glm4_moe_lite": replace(_ATTENTION_WHOLE, mixture=_CORRECTED_MIXTURE),
    # Their configs have `attention_bias` too, which neither reads.
    "glm4v_text": replace(_GLM4, text_family="glm4", text_settings={"attention_bias": True}),
    "glm_ocr_text": replace(_GLM4, text_family="glm4", text_settings={"attention_bias": False}),
    "gpt2": replace(
        _GPT, fused_qkv="c_attn", requires={"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False}
    ),
    "gpt_bigcode": replace(
        _GPT,
        fused_qkv="c_attn",
        requires={"add_cross_attention": False},
        variants=(({"multi_query": False}, {"qkv_layout": "grouped"}),),
    ),
    "gpt_oss": replace(
        _LLAMA,
        per_head={"sinks": "query"},
        mixture=replace(_LOCAL_EXPERTS, router="router", transposed=True, interleaved=True, returns_pair=True),
    ),
    "gpt_neo": replace(_GPT, attention="attn.attention", output="out_proj", config_ffn="intermediate_size"),
    "gptj": replace(
        _GPT,
        output="out_proj",
        up="fc_in",
        down="fc_out",
        parallel=True,
        attention_norm=None,
        mlp_norm=None,
        shared_norm="ln_1",
    ),
    "gpt_neox": Architecture(
        layers="gpt_neox.layers",
        attention="attention",
        fused_qkv="query_key_value",
        qkv_layout="grouped",
        output="dense",
        gate=None,
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="act",
        norm="layer",
        head_dim="head_size",
        parallel=True,
        variants=(({"use_parallel_residual": False}, {"parallel": False}),),
    ),
    "granitemoe": replace(
        _LLAMA,
        residual_scale="residual_multiplier",
        mixture=replace(_LOCAL_EXPERTS, block="block_sparse_moe", router="router"),
    ),
    "granitemoehybrid": replace(_GRANITE_SHARED, mixer="mamba"),
    "granitemoeshared": _GRANITE_SHARED,
    "granite": replace(_LLAMA, residual_scale="residual_multiplier"),
    # Features of pictures are added between layers by their number.
    "granite4_vision_text": replace(
        _LLAMA, residual_scale="residual_multiplier", fixed_layers="num_hidden_layers", text_family="granite"
    ),
    "granite_docling_text": replace(
        _LLAMA,
        residual_scale="residual_multiplier",
        fixed_layers="vision_config.deepstack_visual_indexes",
        text_family="granite",
    ),
    "granite_swa": replace(_LLAMA, residual_scale="residual_multiplier", per_head={"sinks": "query"}),
    "helium": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "hunyuan_vl_text": replace(_LLAMA, text_family="hunyuan_v1_dense"),
    "hy_v3": replace(_LLAMA, mixture=replace(_CORRECTED_SHARED_EXPERTS, per_expert=("e_score_correction_bias",))),
    "hyperclovax": replace(
        _LLAMA,
        attention_post_norm="post_norm1",
        mlp_post_norm="post_norm2",
        residual_scale="residual_multiplier",
    ),
    "internlm3": _LLAMA,
    "iquestcoder": _LLAMA,
    "jamba": replace(
        _LLAMA,
        mixer="mamba",
        mlp="feed_forward",
        mlp_norm="pre_ff_layernorm",
        fixed_layers="num_hidden_layers",  # what a layer is, its number decides
        mixture=Mixture(block="feed_forward", router="router", config_channels="intermediate_size"),
    ),
    "jais2": replace(_PLAIN_FFN, norm="layer"),
    "kolibri1": replace(
        _LLAMA,
        attention_post_norm="post_self_attn_layernorm",
        mlp_post_norm="post_mlp_layernorm",
        mixture=Mixture(
            shared="mlp.shared_experts",
            per_expert=("gate.e_score_correction_bias",),
            config_shared="shared_expert_intermediate_size",
        ),
    ),
    "lfm2": replace(_LFM, output="out_proj", config_exact_widths={"block_auto_adjust_ff_dim": False}),
    "lfm2_moe": replace(_LFM, output="out_proj", mixture=Mixture(block="feed_forward", per_expert=("expert_bias",))),
    "lfm3": replace(
        _LFM,
        attention_post_norm="post_operator_norm",
        mlp_post_norm="post_ffn_norm",
        per_head={"g_proj.weight": "query"},
    ),
    "llama": _LLAMA,
    "llama4_text": replace(
        _LLAMA,
        mlp="feed_forward",
        activation="activation_fn",
        config_ffn="intermediate_size_mlp",
        mixture=replace(
            _LOCAL_EXPERTS,
            block="feed_forward",
            router="router",
            transposed=True,
            scales_input=True,
            returns_pair=True,
            shared="feed_forward.shared_expert",
            config_shared="intermediate_size",
        ),
    ),
    "mellum": replace(_LLAMA, mixture=Mixture()),
    "minicpm3": replace(
        _ATTENTION_WHOLE,
        block_scales={"attention": "residual_scale", "mlp": "residual_scale"},
    ),
    "minimax_m2": replace(
        _LLAMA, heads_prunable=False, mixture=replace(_LOCAL_EXPERTS, per_expert=("e_score_correction_bias",))
    ),
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": replace(_LLAMA, mixture=_LOCAL_EXPERTS),
    "modernbert-decoder": replace(
        _LLAMA,
        attention="attn",
        output="Wo",
        fused_gate_up="Wi",
        down="Wo",
        activation="act",
        attention_norm="attn_norm",
        mlp_norm="mlp_norm",
        norm="layer",
    ),
    "molmo2_text": replace(
        _LLAMA,
        variants=(
            (
                {"norm_after": True},
                {
                    "attention_norm": None,
                    "mlp_norm": None,
                    "attention_post_norm": "input_layernorm",
                    "mlp_post_norm": "post_attention_layernorm",
                },
            ),
            ({"qk_norm_type": "olmo"}, {"heads_prunable": False}),
            ({"qk_norm_type": "qwen3", "norm_after": False, "attention_bias": False}, {"text_family": "qwen3"}),
        ),
    ),
    # The gate on the attention's output is a linear of its own.
    "muse_glimmer_text": replace(_SANDWICH, **_WHOLE_ATTENTION),
    "nanochat": _FC,
    "nemotron": replace(_PLAIN_FFN, norm="layer", norm_offset=1.0),
    "nemotron_h": replace(
        _PLAIN_FFN,
        mixer="mixer",  # one block a layer; experts stay whole like a mixer
        attention_norm="norm",
        mlp_norm=None,
        layer_variants=(
            ("mixer.q_proj", {"attention": "mixer", "mixer": None}),
            ("mixer.up_proj", {"mlp": "mixer", "mixer": None, "attention_norm": None, "mlp_norm": "norm"}),
        ),
    ),
    "olmo": replace(_LLAMA, norm="layer"),
    "olmoe": replace(_LLAMA, heads_prunable=False, mixture=Mixture(config_channels="intermediate_size")),
    "olmo2": replace(_POST_NORM, heads_prunable=False),
    "olmo3": replace(_POST_NORM, heads_prunable=False),
    "olmo_hybrid": replace(
        _POST_NORM,
        mixer="linear_attn",
        heads_prunable=False,
        layer_variants=(
            (
                "linear_attn",
                {
                    "attention_norm": "input_layernorm",
                    "mlp_norm": "post_attention_layernorm",
                    "attention_post_norm": None,
                    "mlp_post_norm": None,
                },
            ),
        ),
    ),
    "opt": replace(_OPT, requires={"do_layer_norm_before": True}),
    "persimmon": replace(
        _PLAIN_FFN,
        fused_qkv="query_key_value",
        qkv_layout="grouped",
        output="dense",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="act",
        norm="layer",
    ),
    "paddleocr_vl_text": replace(
        _LLAMA, text_family="llama", text_settings={"attention_bias": "use_bias", "mlp_bias": "use_bias"}
    ),
    "phi": replace(_PARALLEL, output="dense", gate=None, up="fc1", down="fc2", activation="activation_fn"),
    "phimoe": replace(_LLAMA, norm="layer", mixture=replace(_LOCAL_EXPERTS, router="router")),
    "phi3": replace(
        _LLAMA,
        fused_qkv="qkv_proj",
        fused_gate_up="gate_up_proj",
        activation="activation_fn",
        layer_config=True,  # it splits the fused rows at config.num_attention_heads * head_dim
    ),
    "phi4_multimodal": replace(
        _LLAMA,
        fused_qkv="qkv_proj",
        fused_gate_up="gate_up_proj",
        activation="activation_fn",
        layer_config=True,
    ),
    "qwen2": _LLAMA,
    "qwen2_moe": replace(_LLAMA, mixture=_SHARED_EXPERT),
    "qwen2_5_omni_text": replace(_LLAMA, text_family="qwen2"),
    "qwen2_5_vl_text": replace(_LLAMA, text_family="qwen2"),
    "qwen2_vl_text": replace(_LLAMA, text_family="qwen2"),
    "qwen3": _LLAMA,
    "qwen3_5_text": replace(_LLAMA, mixer="linear_attn", gated_query=True, norm_offset=1.0),
    "qwen3_5_moe_text": _QWEN3_NEXT,
    "qwen3_moe": replace(_LLAMA, mixture=Mixture()),
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_vl_text": replace(_LLAMA, fixed_layers="vision_config.deepstack_visual_indexes", text_family="qwen3"),
    "seed_oss": replace(_LLAMA, config_attention_bias="attention_out_bias"),
    "smollm3": _LLAMA,
    "solar_open": replace(_LLAMA, mixture=_CORRECTED_MIXTURE),
    "stablelm": replace(
        _LLAMA,
        norm="layer",
        per_head={"q_layernorm.norms": "query", "k_layernorm.norms": "kv"},
        variants=(
            (
                {"use_parallel_residual": True},
                {"parallel": True, "attention_norm": None, "mlp_norm": None, "shared_norm": "input_layernorm"},
            ),
        ),
    ),
    "starcoder2": replace(_PLAIN_FFN, up="c_fc", down="c_proj", activation="act", norm="layer"),
    "vaultgemma": replace(_LLAMA, mlp_norm="pre_feedforward_layernorm", norm_offset=1.0),
    "xglm": replace(_OPT, layers="model.layers", position_table=False, requires={"add_cross_attention": False}),
    "youtu": _ATTENTION_WHOLE,
}


def get_decoder_config(config: Any) -> Any:
    """Get the config of the decoder: the `text_config` of a multimodal model's config, or the config itself.

    Args:
        config: a transformers config, or the content of config.json with attributes for names.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(model_type="llava", text_config={"model_type": "llama"})
        >>> get_decoder_config(config).model_type
        'llama'
    """
    inner = getattr(config, "text_config", None)
    return SimpleNamespace(**inner) if isinstance(inner, dict) else inner or config


def get_architecture(config: Any) -> Architecture:
    """Get the declaration for a transformers config, with the variants that the config's values select.

    Args:
        config: only its attributes are read; of a multimodal model those of its decoder. The prefix `PRUNED` of
            `model_type` is ignored.

    Raises:
        UnknownArchitecture: no entry for `config.model_type`, or the config has a value that the entry does not cover.

    Example:
        >>> from types import SimpleNamespace
        >>> get_architecture(SimpleNamespace(model_type="llama")).linears
        ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')
    """
    decoder_config = get_decoder_config(config)
    model_type = str(getattr(decoder_config, "model_type", None)).removeprefix(PRUNED)
    if model_type not in ARCHITECTURES:
        raise UnknownArchitecture(describe_unsupported_config(config, decoder_config, ARCHITECTURES))
    architecture = ARCHITECTURES[model_type]
    for name, required in architecture.requires.items():
        if getattr(decoder_config, name, required) != required:
            raise UnknownArchitecture(describe_unsupported_setting(decoder_config, name, required))
    for condition, overrides in architecture.variants:
        if all(getattr(decoder_config, name, None) == value for name, value in condition.items()):
            architecture = replace(architecture, **overrides)
    return architecture


def has_experts(config: Any) -> bool:
    """Whether a model has a mixture of experts in one layer at least, from its config.

    Args:
        config: of a model of a declared family, or of its decoder.

    Example:
        >>> from types import SimpleNamespace
        >>> has_experts(SimpleNamespace(model_type="mixtral", num_local_experts=8))
        True
        >>> has_experts(SimpleNamespace(model_type="llama"))
        False
    """
    decoder_config = get_decoder_config(config)
    if get_architecture(decoder_config).mixture is None or count_experts(decoder_config) == 0:
        return False
    dense_layers = getattr(decoder_config, "mlp_only_layers", None) or ()
    return len(set(dense_layers)) < getattr(decoder_config, "num_hidden_layers", 1)


def register(model_type: str, architecture: Architecture) -> None:
    """Declare a family from outside the package; the same as an entry in `ARCHITECTURES`.

    Args:
        model_type: as in the config of the family's models.
        architecture: names of the family's modules.

    Example:
        >>> register("my_llama", Architecture(mlp="feed_forward"))
        >>> ARCHITECTURES.pop("my_llama").mlp
        'feed_forward'
    """
    ARCHITECTURES[model_type] = architecture
