"""Tiny random models of every declared family, and plans that cut them in every way: what the contracts run on."""

import copy
import functools
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan
from prunelit.model.decoder import Decoder

VOCABULARY = 96
# Separate and fused q/k/v in both layouts, Conv1D, tied heads, parallel blocks, norms after, no mlp module. Of tests
# that run on every family, the fast ones are those on these (conftest.py).
DIVERSE = ("llama", "phi3", "gpt2", "gpt_neox", "opt", "olmo2", "gemma2", "cohere")
KINDS = ("kv_group", "query_head", "channel", "attention", "mlp", "layer")

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
    lacks: tuple[str, ...] = ()
    sizes: Mapping[str, Any] = _LLAMA


_MHA, _TIED_HEADS = ("query_head",), ("kv_group", "query_head")

FAMILIES: dict[str, Row] = {
    "apertus": Row("apertus", {"max_position_embeddings": 65536}),
    "arcee": Row("arcee"),
    "biogpt": Row("biogpt", {"intermediate_size": 96}, _MHA, _SIZES),
    "cohere": Row("cohere"),
    "cohere-qk_norm": Row("cohere", {"use_qk_norm": True}),
    "cohere2": Row("cohere2", _SLIDING),
    "cwm": Row("cwm", {"max_position_embeddings": 131072}),
    "ernie4_5": Row("ernie4_5"),
    "exaone4": Row("exaone4", _SLIDING),
    "falcon": Row("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}, sizes=_FALCON),
    "falcon-one_norm": Row(
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1, "bias": True},
        sizes=_FALCON,
    ),
    "falcon-multi_query": Row("falcon", {"multi_query": True}, ("kv_group",), _FALCON),
    "falcon-sequential": Row("falcon", {"multi_query": False, "parallel_attn": False}, _MHA, _FALCON),
    "gemma": Row("gemma"),
    "gemma2": Row("gemma2", _SLIDING),
    "gemma3_text": Row("gemma3_text", _SLIDING),
    "glm": Row("glm"),
    "glm4": Row("glm4"),
    "gpt2": Row("gpt2", lacks=_MHA, sizes=_GPT),
    "gpt_neox": Row("gpt_neox", {"intermediate_size": 96}, _MHA, _SIZES),
    "gpt_neox-sequential": Row("gpt_neox", {"intermediate_size": 96, "use_parallel_residual": False}, _MHA, _SIZES),
    "gptj": Row("gptj", {"rotary_dim": 4}, _MHA, _GPT),
    "granite": Row("granite", {"residual_multiplier": 0.5}),
    "helium": Row("helium"),
    "hunyuan_v1_dense": Row("hunyuan_v1_dense"),
    "hyperclovax": Row("hyperclovax"),
    "hyperclovax-post_norm": Row("hyperclovax", {"use_post_norm": True, "residual_multiplier": 0.5}),
    "internlm3": Row("internlm3"),
    "iquestcoder": Row("iquestcoder"),
    "jais2": Row("jais2"),
    "llama": Row("llama"),
    "llama-biases": Row("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": Row("llama", {"num_key_value_heads": 9}, _MHA),
    "ministral": Row("ministral"),
    "ministral3": Row("ministral3", {"max_position_embeddings": 262144}),
    "mistral": Row("mistral"),
    "mistral-sliding": Row("mistral", {"sliding_window": 4}),
    "nemotron": Row("nemotron"),
    "olmo": Row("olmo"),
    "olmo2": Row("olmo2", lacks=_TIED_HEADS),
    "olmo3": Row("olmo3", _SLIDING, _TIED_HEADS),
    "opt": Row("opt", {"ffn_dim": 96, "word_embed_proj_dim": 72}, _MHA, _SIZES),
    "persimmon": Row("persimmon", {"intermediate_size": 96}, _MHA, _SIZES),
    "phi": Row("phi"),
    "phi3": Row("phi3"),
    "qwen2": Row("qwen2"),
    "qwen3": Row("qwen3"),
    "qwen3-wide_heads": Row("qwen3", {"head_dim": 16}),
    "seed_oss": Row("seed_oss"),
    "smollm3": Row("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "stablelm": Row("stablelm"),
    "stablelm-parallel": Row("stablelm", {"use_parallel_residual": True}),
    "stablelm-qk_layernorm": Row("stablelm", {"qk_layernorm": True}),
    "starcoder2": Row("starcoder2"),
    "vaultgemma": Row("vaultgemma", _SLIDING),
}
SLIDING = tuple(name for name, row in FAMILIES.items() if "layer_types" in row.config)


def tiny(family: str, **overrides: Any) -> Any:
    """A random float32 causal LM in eval mode, always the same; `overrides` are config values."""
    return _build(family, **overrides) if overrides else copy.deepcopy(_built(family))


@functools.cache
def _built(family: str) -> Any:
    return _build(family)


def _build(family: str, **overrides: Any) -> Any:
    row = FAMILIES[family]
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(row.model_type, **{**row.sizes, **tokens, **row.config, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases are ones and zeros otherwise
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.generation_config = GenerationConfig(pad_token_id=0)  # no end of text: as many tokens as asked for
    return model.eval()


def tokens(rows: int = 2, length: int = 10) -> torch.Tensor:
    """Token ids [rows, length], none of them special; always the same."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def keep(
    shape: LayerShape,
    groups: tuple[int, ...] | None = None,
    heads_in_group: tuple[int, ...] | None = None,
    channels: tuple[int, ...] | None = None,
) -> LayerPlan:
    """What a layer keeps: KV groups, the given query heads of each, channels; None keeps all, () removes the block."""
    size = shape.group_size
    groups = tuple(range(shape.kv_groups)) if groups is None else groups
    heads_in_group = tuple(range(size)) if heads_in_group is None else heads_in_group
    heads = tuple(group * size + head for group in groups for head in heads_in_group)
    return LayerPlan(heads, groups, tuple(range(shape.ffn_channels)) if channels is None else channels)


def cut(model: Any, kind: str) -> PruningPlan:
    """A plan that cuts one of KINDS, or several ("mixed"), so that layers come to differ; what a model lacks stays."""
    model_shape, chance = Decoder(model).shape, random.Random(0)

    def some(size: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(chance.sample(range(size), max(1, count))))

    def layer(kind: str, index: int, shape: LayerShape) -> LayerPlan:
        match kind:
            case "kv_group" if shape.heads_prunable:
                return keep(shape, groups=some(shape.kv_groups, shape.kv_groups - 1 - index % 2))
            case "query_head" if shape.heads_prunable:  # other heads in every group
                size, groups = shape.group_size, tuple(range(shape.kv_groups))
                heads = (group * size + head for group in groups for head in some(size, size - 1))
                return LayerPlan(tuple(heads), groups, tuple(range(shape.ffn_channels)))
            case "channel":
                return keep(shape, channels=some(shape.ffn_channels, 40 + 8 * index))
            case "attention" if index != 1:
                return keep(shape, groups=())
            case "mlp" if index != 1:
                return keep(shape, channels=())
            case "layer" if index == 1:
                return keep(shape, groups=(), channels=())
            case "mixed":
                attention = layer(("attention", "kv_group", "query_head")[index], index, shape)
                ffn = layer(("channel", "channel", "mlp")[index], index, shape)
                return replace(attention, ffn_channels=ffn.ffn_channels)
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
