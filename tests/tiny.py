"""Tiny random models of every declared family, and plans that cut them in every way: what the contracts run on."""

import copy
import functools
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig

from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan
from prunelit.model.decoder import Decoder

VOCABULARY = 96
# Separate and fused q/k/v in both layouts, Conv1D, tied heads, parallel blocks, norms after, no mlp module. Of tests
# that run on every family, the fast ones are those on these (conftest.py).
DIVERSE = ("llama", "phi3", "gpt2", "gpt_neox", "opt", "olmo2", "gemma2", "cohere")
KINDS = ("kv_group", "query_head", "channel", "attention", "mixer", "mlp", "layer")

# 9 query heads in 3 KV groups: groups of more than two heads, so a wrong order of rows shows.
_SIZES = {"hidden_size": 72, "num_hidden_layers": 3, "num_attention_heads": 9, "max_position_embeddings": 64}
_LLAMA = _SIZES | {"intermediate_size": 96, "num_key_value_heads": 3, "head_dim": 8}
_GPT = {"n_embd": 72, "n_layer": 3, "n_head": 9, "n_inner": 96, "n_positions": 64}
_FALCON = _SIZES | {"ffn_hidden_size": 96}
# A window shorter than the texts of the tests, and layers of both types.
_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}


class Row(NamedTuple):
    """A model to build: its `model_type`, config values beside the usual sizes, and the kinds of cut it lacks."""

    model_type: str
    config: Mapping[str, Any] = {}
    lacks: tuple[str, ...] = ("mixer",)
    sizes: Mapping[str, Any] = _LLAMA


def list_installed(rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows of families that the installed transformers has; with an older one the rest are not tested."""
    return {name: row for name, row in rows.items() if row.model_type in CONFIG_MAPPING}


_MHA, _TIED_HEADS = ("query_head", "mixer"), ("kv_group", "query_head", "mixer")
# The attention is a mixer, which stays whole or goes; in some families no layer can go.
_WHOLE_ATTENTION_ONLY = ("kv_group", "query_head", "attention")
_WHOLE_ATTENTION = (*_WHOLE_ATTENTION_ONLY, "layer")
_LATENT = {
    "num_key_value_heads": 9,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
_SLIDING_4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 4,
}
# The last two layers use the keys and values of the two before them.
SHARED_KV = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 4,
    "num_kv_shared_layers": 2,
}
_SHARED_LACKS = ("attention", "layer")  # only attentions that use others' keys can be removed, which are mixers
PER_LAYER_INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
_GEMMA3N = {**PER_LAYER_INPUTS, "laurel_rank": 8, "altup_num_inputs": 2}
_YOUTU = {**_LATENT, "intermediate_size": 96, "pad_token_id": None}  # it zeroes the row of padding when it loads
_ROPE_BY_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 500.0},
}
_TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "crop_size": 16,
    "image_size": 16,
    "patch_size": 4,
}
_TINY_AUDIO = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_blocks": 1,
    "num_attention_heads": 2,
    "ext_pw_out_channel": 16,
    "depthwise_separable_out_channel": 16,
    "nemo_conv_channels": 16,
    "input_size": 16,
}

_MAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 36,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_DELTA_NET = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# Every second layer has an attention, and the others a mixer in its place.
_HYBRID = {"num_hidden_layers": 4}
_LINEAR = {**_HYBRID, "layer_types": ["linear_attention", "full_attention"] * 2}

_FAMILIES: dict[str, Row] = {
    "apertus": Row("apertus", {"max_position_embeddings": 65536}),
    "arcee": Row("arcee"),
    "bamba": Row("bamba", {**_HYBRID, **_MAMBA, "attn_layer_indices": [1, 3]}, ()),
    "biogpt": Row("biogpt", {"intermediate_size": 96}, _MHA, _SIZES),
    "cohere": Row("cohere"),
    "cohere-qk_norm": Row("cohere", {"use_qk_norm": True}),
    "cohere2": Row("cohere2", _SLIDING),
    "cohere_compass_text": Row("cohere_compass_text", {**_SLIDING, "rope_parameters": _ROPE_BY_TYPE}),
    "ctrl": Row("ctrl", {"dff": 96}, _MHA, {key: size for key, size in _GPT.items() if key != "n_inner"}),
    "cwm": Row("cwm", {"max_position_embeddings": 131072}),
    "diffllama": Row("diffllama", {"num_attention_heads": 8, "num_key_value_heads": 4}, _WHOLE_ATTENTION),
    "ernie4_5": Row("ernie4_5"),
    "exaone4": Row("exaone4", _SLIDING),
    "falcon": Row("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}, sizes=_FALCON),
    "falcon-one_norm": Row(
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1, "bias": True},
        sizes=_FALCON,
    ),
    "falcon-multi_query": Row("falcon", {"multi_query": True}, ("kv_group", "mixer"), _FALCON),
    "falcon-sequential": Row("falcon", {"multi_query": False, "parallel_attn": False}, _MHA, _FALCON),
    "falcon_h1": Row(
        "falcon_h1",
        {
            **_MAMBA,
            "mamba_d_ssm": 144,
            "attention_out_multiplier": 0.7,
            "mlp_multipliers": [1.0, 0.6],
            "key_multiplier": 0.5,
        },
        ("attention", "mixer"),  # they share a place in the cache
    ),
    "gemma": Row("gemma"),
    "gemma2": Row("gemma2", _SLIDING),
    "gemma3_text": Row("gemma3_text", _SLIDING),
    "gemma3n_text": Row("gemma3n_text", {**SHARED_KV, **_GEMMA3N}, _SHARED_LACKS),
    "gemma3n_text-sparse": Row(
        "gemma3n_text",
        {**SHARED_KV, **_GEMMA3N, "activation_sparsity_pattern": [0.5, *[0.0] * 5]},
        _SHARED_LACKS,
    ),
    "gemma4_text": Row("gemma4_text", {**SHARED_KV, **PER_LAYER_INPUTS, "global_head_dim": 8}, ("attention", "layer")),
    "gemma4_text-no_sharing": Row(
        "gemma4_text",
        {**_SLIDING_4, "hidden_size_per_layer_input": 0, "global_head_dim": 16},
        ("attention", "mixer", "layer"),
    ),
    "gemma4_text-keys_as_values": Row(
        "gemma4_text",
        {
            **_SLIDING_4,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "global_head_dim": 16,
        },
        ("attention", "mixer", "layer"),
    ),
    "gemma4_text-double_ffn": Row(
        "gemma4_text",
        {**SHARED_KV, **PER_LAYER_INPUTS, "use_double_wide_mlp": True, "global_head_dim": 16},
        _SHARED_LACKS,
    ),
    "gemma4_unified_text": Row("gemma4_unified_text", {**SHARED_KV, "global_head_dim": 16}, _SHARED_LACKS),
    "glm": Row("glm"),
    "glm4": Row("glm4"),
    "gpt2": Row("gpt2", lacks=_MHA, sizes=_GPT),
    "gpt_bigcode": Row("gpt_bigcode", {"multi_query": True}, ("kv_group", "mixer"), _GPT),
    "gpt_bigcode-mha": Row("gpt_bigcode", {"multi_query": False}, _MHA, _GPT),
    "gpt_neo": Row(
        "gpt_neo",
        {
            "intermediate_size": 96,
            "window_size": 4,
            "attention_types": [[["local"], 1], [["global"], 1], [["local"], 1]],
            "num_layers": 3,
            "num_heads": 9,
        },
        _MHA,
        {"hidden_size": 72, "max_position_embeddings": 64},
    ),
    "gpt_neox": Row("gpt_neox", {"intermediate_size": 96}, _MHA, _SIZES),
    "gpt_neox-sequential": Row("gpt_neox", {"intermediate_size": 96, "use_parallel_residual": False}, _MHA, _SIZES),
    "gptj": Row("gptj", {"rotary_dim": 4}, _MHA, _GPT),
    "granite": Row("granite", {"residual_multiplier": 0.5}),
    "granite_swa": Row(
        "granite_swa", {**_SLIDING, "residual_multiplier": 0.5, "layer_rope_theta": [10000.0, 0, 500.0]}
    ),
    "granitemoehybrid": Row(
        "granitemoehybrid",
        {
            **_MAMBA,
            **_LINEAR,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 96,
            "residual_multiplier": 0.5,
        },
        (),
    ),
    "helium": Row("helium"),
    "hunyuan_v1_dense": Row("hunyuan_v1_dense"),
    "hyperclovax": Row("hyperclovax"),
    "hyperclovax-post_norm": Row("hyperclovax", {"use_post_norm": True, "residual_multiplier": 0.5}),
    "internlm3": Row("internlm3"),
    "iquestcoder": Row("iquestcoder"),
    "jais2": Row("jais2"),
    "lfm2": Row(
        "lfm2", {**_HYBRID, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}, ()
    ),
    "lfm3": Row(
        "lfm3",
        {
            "num_hidden_layers": 6,
            "layer_types": ["conv", "full_attention", "sliding_attention"] * 2,
            "sliding_window": 4,
        },
        (),
    ),
    "lfm3-no_gate": Row(
        "lfm3",
        {
            **_HYBRID,
            "layer_types": ["conv", "full_attention"] * 2,
            "use_attention_gate": False,
            "use_sandwich_norm": False,
        },
        (),
    ),
    "llama": Row("llama"),
    "llama-biases": Row("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": Row("llama", {"num_key_value_heads": 9}, _MHA),
    "minicpm3": Row("minicpm3", {**_LATENT, "scale_depth": 1.4, "dim_model_base": 36}, _WHOLE_ATTENTION_ONLY),
    "ministral": Row("ministral"),
    "ministral3": Row("ministral3", {"max_position_embeddings": 262144}),
    "mistral": Row("mistral"),
    "mistral-sliding": Row("mistral", {"sliding_window": 4}),
    "modernbert-decoder": Row(
        "modernbert-decoder",
        {"intermediate_size": 96, "layer_types": _SLIDING["layer_types"], "local_attention": 8},
        _MHA,
        _SIZES,
    ),
    "nanochat": Row("nanochat"),
    "nemotron": Row("nemotron"),
    "olmo": Row("olmo"),
    "nemotron_h": Row(
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention", "linear_attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "intermediate_size": 96,
        },
        (),
    ),
    "olmo2": Row("olmo2", lacks=_TIED_HEADS),
    "olmo3": Row("olmo3", _SLIDING, _TIED_HEADS),
    "olmo_hybrid": Row("olmo_hybrid", {**_LINEAR, **_DELTA_NET}, ("kv_group", "query_head")),
    "opt": Row("opt", {"ffn_dim": 96, "word_embed_proj_dim": 72}, _MHA, _SIZES),
    "persimmon": Row("persimmon", {"intermediate_size": 96}, _MHA, _SIZES),
    "phi": Row("phi"),
    "phi3": Row("phi3"),
    "phi4_multimodal": Row("phi4_multimodal", {"vision_config": _TINY_VISION, "audio_config": _TINY_AUDIO}),
    "qwen2": Row("qwen2"),
    "qwen3": Row("qwen3"),
    "qwen3_5_text": Row("qwen3_5_text", {**_LINEAR, **_DELTA_NET}, ()),
    "qwen3_next": Row("qwen3_next", {**_LINEAR, **_DELTA_NET, "mlp_only_layers": [0, 1, 2, 3]}, ()),
    "qwen3-wide_heads": Row("qwen3", {"head_dim": 16}),
    "seed_oss": Row("seed_oss"),
    "smollm3": Row("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "stablelm": Row("stablelm"),
    "stablelm-parallel": Row("stablelm", {"use_parallel_residual": True}),
    "stablelm-qk_layernorm": Row("stablelm", {"qk_layernorm": True}),
    "starcoder2": Row("starcoder2"),
    "vaultgemma": Row("vaultgemma", _SLIDING),
    "xglm": Row(
        "xglm",
        {"d_model": 72, "num_layers": 3, "attention_heads": 9, "ffn_dim": 96, "max_position_embeddings": 64},
        _MHA,
        {},
    ),
    "youtu": Row("youtu", _YOUTU, _WHOLE_ATTENTION_ONLY, _SIZES),
    "youtu-q_proj": Row("youtu", {**_YOUTU, "q_lora_rank": None}, _WHOLE_ATTENTION_ONLY, _SIZES),
}
FAMILIES = list_installed(_FAMILIES)
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_LOCAL_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
_SHARED_EXPERT = {**_EXPERTS, "shared_expert_intermediate_size": 48}
# The router first chooses one of two groups of four experts; the first layer has a dense FFN.
_GROUPED_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
# Plain; transposed with biases; groups of experts beside a shared FFN, after a dense layer.
DIVERSE_MIXTURES = ("mixtral", "gpt_oss", "deepseek_v3")
EXPERT_KINDS = ("expert", "expert_channel")
_MIXTURES: dict[str, Row] = {
    "deepseek_v2": Row(
        "deepseek_v2", {**_LATENT, **_GROUPED_EXPERTS, "topk_method": "greedy", "head_dim": 4}, _WHOLE_ATTENTION_ONLY
    ),
    "deepseek_v3": Row("deepseek_v3", {**_LATENT, **_GROUPED_EXPERTS, "head_dim": 4}, _WHOLE_ATTENTION_ONLY),
    "dots1": Row("dots1", {**_GROUPED_EXPERTS, **_SLIDING}),
    "exaone_moe": Row(
        "exaone_moe",
        {
            **_GROUPED_EXPERTS,
            **_SLIDING,
            "num_experts": 8,
            "num_shared_experts": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "flex_olmo": Row("flex_olmo", _EXPERTS, (*_TIED_HEADS, "channel")),
    "glm4_moe_lite": Row("glm4_moe_lite", {**_LATENT, **_GROUPED_EXPERTS, "head_dim": 4}, _WHOLE_ATTENTION_ONLY),
    "glm4_moe": Row("glm4_moe", {**_GROUPED_EXPERTS, "use_qk_norm": True}),
    "gpt_oss": Row(
        "gpt_oss",
        {**_LOCAL_EXPERTS, **_SLIDING, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        ("mixer", "channel"),
    ),
    "granitemoe": Row("granitemoe", {**_LOCAL_EXPERTS, "residual_multiplier": 0.5}, ("mixer", "channel")),
    "granitemoehybrid-experts": Row(
        "granitemoehybrid",
        {
            **_MAMBA,
            **_LINEAR,
            **_LOCAL_EXPERTS,
            "intermediate_size": 40,
            "shared_intermediate_size": 96,
            "residual_multiplier": 0.5,
        },
        (),
    ),
    "granitemoeshared": Row(
        "granitemoeshared",
        {**_LOCAL_EXPERTS, "intermediate_size": 40, "shared_intermediate_size": 96, "residual_multiplier": 0.5},
    ),
    "hy_v3": Row("hy_v3", {**_EXPERTS, "num_shared_experts": 2, "moe_intermediate_size": 24}),
    "jamba": Row(
        "jamba",
        {
            **_LOCAL_EXPERTS,
            "num_hidden_layers": 4,
            "num_experts": 6,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
        },
        ("layer",),
    ),
    "kolibri1": Row("kolibri1", {**_SHARED_EXPERT, **_SLIDING}),
    "lfm2_moe": Row(
        "lfm2_moe",
        {**_HYBRID, **_EXPERTS, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
        (),
    ),
    "llama4_text": Row(
        "llama4_text",
        {
            **_LOCAL_EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size": 40,
            "intermediate_size_mlp": 96,
            "moe_layers": [1, 2],
            "no_rope_layers": [1, 0, 1],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "attention_chunk_size": 8,
        },
    ),
    "mellum": Row("mellum", {**_EXPERTS, **_SLIDING, "mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "minimax_m2": Row("minimax_m2", _LOCAL_EXPERTS, (*_TIED_HEADS, "channel")),
    "mixtral": Row("mixtral", _LOCAL_EXPERTS, ("mixer", "channel")),
    "olmoe": Row("olmoe", _EXPERTS, (*_TIED_HEADS, "channel")),
    "phimoe": Row(
        "phimoe", {**_LOCAL_EXPERTS, "attention_bias": True, "router_jitter_noise": 0.5}, ("mixer", "channel")
    ),
    "qwen2_moe": Row("qwen2_moe", {**_SHARED_EXPERT, "mlp_only_layers": [0]}),
    "qwen3_5_moe_text": Row("qwen3_5_moe_text", {**_LINEAR, **_DELTA_NET, **_SHARED_EXPERT}, ()),
    "qwen3_moe": Row("qwen3_moe", {**_EXPERTS, "mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen3_next-experts": Row("qwen3_next", {**_LINEAR, **_DELTA_NET, **_SHARED_EXPERT}, ()),
    "solar_open": Row("solar_open", {**_GROUPED_EXPERTS, "first_k_dense_replace": 0}),
}
MIXTURES = list_installed(_MIXTURES)
"""Models with mixtures of experts; `cut` also takes EXPERT_KINDS for them."""
DECLARED = _FAMILIES | _MIXTURES
"""All rows, also those of families that the installed transformers lacks."""
EXPERT_METHODS = ("ean", "expert_frequency", "reap")
"""Methods that score nothing but experts: other models are refused."""
# Heads of one size in layers with a window and of another in the rest: no stock class holds what is cut.
NEVER_STOCK = ("gemma4_text-no_sharing", "gemma4_text-double_ffn", "gemma4_unified_text")
# Of layers of several types, some with a window, whose attentions can be removed.
SLIDING = tuple(
    name
    for name, row in FAMILIES.items()
    if "sliding_attention" in row.config.get("layer_types", ()) and "attention" not in row.lacks
)


def family_for(method: str) -> str:
    """A row that a method can cut: a mixture of experts for those that score nothing else."""
    return "qwen2_moe" if method in EXPERT_METHODS else "llama"


def tiny(family: str, **overrides: Any) -> Any:
    """A random float32 causal LM in eval mode, always the same; `overrides` are config values."""
    return _build(family, **overrides) if overrides else copy.deepcopy(_built(family))


@functools.cache
def _built(family: str) -> Any:
    return _build(family)


def _build(family: str, **overrides: Any) -> Any:
    row = find_row(family)
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(row.model_type, **{**row.sizes, **tokens, **row.config, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        perturb(model)
    if hasattr(model.base_model, "embed_tokens_extend"):  # towers, which text does not reach
        model.base_model.embed_tokens_extend.requires_grad_(False)
    model.generation_config = GenerationConfig(pad_token_id=0)  # no end of text: as many tokens as asked for
    return model.eval()


def find_row(family: str) -> Row:
    """The row of a family; a test that names one which the installed transformers lacks is skipped."""
    row = DECLARED[family]
    if row.model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {row.model_type}")
    return row


@torch.no_grad()
def perturb(model: Any) -> None:
    """Move every parameter of a fresh model a little: norms and biases are ones and zeros otherwise.

    The corrections of a router's choice move far: with small ones a wrong mask would pass.
    """
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    for name, buffer in model.named_buffers():
        if name.endswith(("correction_bias", "expert_bias")):
            buffer.add_(torch.randn_like(buffer), alpha=0.5)


def tokens(rows: int = 2, length: int = 10) -> torch.Tensor:
    """Token ids [rows, length], none of them special; always the same."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def keep(
    shape: LayerShape,
    groups: tuple[int, ...] | None = None,
    heads_in_group: tuple[int, ...] | None = None,
    channels: tuple[int, ...] | None = None,
    mixer: bool | None = None,
) -> LayerPlan:
    """What a layer keeps: KV groups, the given query heads of each, channels; None keeps all, () removes the block."""
    size = shape.group_size
    groups = tuple(range(shape.kv_groups)) if groups is None else groups
    heads_in_group = tuple(range(size)) if heads_in_group is None else heads_in_group
    heads = tuple(group * size + head for group in groups for head in heads_in_group)
    dense = LayerPlan.dense(shape)
    own = dense.ffn_channels if channels is None else channels
    mixture = () if channels == () else (dense.experts, dense.expert_channels)
    return LayerPlan(heads, groups, own, False, False, shape.has_mixer if mixer is None else mixer, *mixture)


def cut(model: Any, kind: str) -> PruningPlan:
    """A plan that cuts one of KINDS or EXPERT_KINDS, or several ("mixed"), so that layers come to differ.

    What a model lacks stays.
    """
    model_shape, chance = Decoder(model).shape, random.Random(0)

    def some(size: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(chance.sample(range(size), max(1, count))))

    def layer(kind: str, index: int, shape: LayerShape) -> LayerPlan:
        match kind:
            case "kv_group" if shape.heads_prunable and shape.kv_groups:
                return keep(shape, groups=some(shape.kv_groups, shape.kv_groups - 1 - index % 2))
            case "query_head" if shape.heads_prunable and shape.kv_groups:  # other heads in every group
                size, groups = shape.group_size, tuple(range(shape.kv_groups))
                heads = (group * size + head for group in groups for head in some(size, size - 1))
                return replace(LayerPlan.dense(shape), query_heads=tuple(heads), kv_groups=groups)
            case "channel" if shape.ffn_channels:
                return keep(shape, channels=some(shape.ffn_channels, min(40 + 8 * index, shape.ffn_channels * 3 // 4)))
            case "expert" if shape.experts:
                group = shape.experts // shape.expert_groups
                count = shape.least_experts // shape.expert_groups + index % 2
                experts = (g * group + expert for g in range(shape.expert_groups) for expert in some(group, count))
                return replace(LayerPlan.dense(shape), experts=tuple(experts))
            case "expert_channel" if shape.experts:
                # The kernels of experts need rows of a multiple of 16 bytes.
                channels = some(shape.expert_channels, shape.expert_channels // 2 // 8 * 8 + 8 * (index % 2))
                return replace(LayerPlan.dense(shape), expert_channels=channels)
            case "attention" if index != 1 and shape.attention_removable:
                return keep(shape, groups=())
            case "mixer" if index != 0 and shape.attention_removable:
                return keep(shape, mixer=False)
            case "mlp" if index != 1:
                return keep(shape, channels=())
            case "layer" if index == 1 and not shape.fixed:
                return keep(shape, groups=(), channels=(), mixer=False)
            case "mixed":
                attention = layer(("attention", "kv_group", "query_head")[index % 3], index, shape)
                first = "expert" if shape.experts else "channel"
                ffn = layer((first, "channel", "mlp")[index % 3], index, shape)
                own = {name: getattr(ffn, name) for name in ("ffn_channels", "experts", "expert_channels")}
                return replace(attention, **own)
        return LayerPlan.dense(shape)

    return PruningPlan("test", model_shape, tuple(layer(kind, i, shape) for i, shape in enumerate(model_shape.layers)))


def tiny_tokenizer() -> Any:
    """One token a character, capitals folded; fits the tiny models' vocabulary, and decodes to what it read."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [c for c in map(chr, range(32, 127)) if not c.isupper()] + ["\n"]
    entries = ["<pad>", "<s>", "</s>", "<unk>", *characters]
    core = Tokenizer(models.WordLevel({entry: number for number, entry in enumerate(entries)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special)


def tiny_byte_tokenizer() -> Any:
    """Byte-level BPE with one merge, of a kind that GGUF files hold; it is not trained, which would start threads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "w1"]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("w", "1")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
