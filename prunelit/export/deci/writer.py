"""deci: a folder for vLLM's DeciLM ("nemotron-nas"), whose layers differ in KV heads, FFN width and blocks.

That model has one number of query heads for all layers and FFN widths in steps of 256, so heads and channels of zeros
fill up what a layer lacks; they add exactly nothing. Attention in layer 0 is not optional: where it was removed, it is
one KV head of zeros. Everything else that was cut is gone.

Source of the layout: vllm/model_executor/models/nemotron_nas.py. vLLM itself has not been run on such a folder; the
proof is `deci_reader`, which reads it as that file does.

Legend: H hidden size, Q query heads, G KV groups, S query heads in a group, D head size, F FFN channels.
"""

import copy
import io
import json
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from prunelit.calibration import metrics
from prunelit.export.deci import reader
from prunelit.export.formats import ExportJob, Format
from prunelit.export.llama_layers import (
    check_llama_layers,
    collect_projections,
    compute_context_limit,
    compute_rope_factors,
    get_head_dim,
    has_tied_embeddings,
)
from prunelit.export.proof import new_process
from prunelit.export.proof.compare import compare_logits
from prunelit.export.proof.float32 import use_float32_model
from prunelit.model.decoder import Decoder, Layer
from prunelit.planning.serving import DECI_FFN_MULTIPLE, compute_deci_widths
from prunelit.runtime.errors import DoesNotFit
from prunelit.runtime.versions import collect_versions

_CONFIG_MODULE = "configuration_decilm"
_CONFIG_SOURCE = '''\
"""DeciLM's config: `block_configs` with attributes, as vLLM reads them. Written by prunelit for this folder."""

from transformers import PretrainedConfig


class Block(dict):
    """A dictionary whose entries are attributes too."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig(PretrainedConfig):
    """What differs between layers is in `block_configs`; the rest is Llama's."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), rope_parameters=None, rope_theta=None, rope_scaling=None, **settings):
        super().__init__(**settings)
        self.rope_parameters = rope_parameters
        if not hasattr(PretrainedConfig, "rope_scaling"):  # transformers 4, which has them apart
            self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.block_configs = [Block({name: Block(part) for name, part in block.items()}) for block in block_configs]
'''


class _LayerSizes(NamedTuple):
    """Sizes of one layer in the folder; 0: a no-op."""

    query_heads: int
    kv_groups: int
    channels: int

    @property
    def group_size(self) -> int:
        return self.query_heads // self.kv_groups if self.kv_groups else 0


def write_deci(job: ExportJob) -> dict[str, Any]:
    """Write config, weights and the configuration file that `auto_map` points to.

    Returns:
        {"note", "size": of what is written, "zeros": parameters that only fill up}.

    Raises:
        DoesNotFit: not a family whose layers are Llama's, or a rope that is not in the layout.
    """
    check_deci(job.model, job.tokenizer)
    decoder = Decoder(job.model)
    layers, biased = _list_layer_sizes(decoder), _find_biased_roles(decoder)
    weights = _build_deci_weights(decoder, layers, biased)
    save_torch_state_dict(weights, job.path, max_shard_size=job.max_shard_size, metadata={"format": "pt"})
    config = json.dumps(_build_deci_config(decoder, layers, biased), indent=2) + "\n"
    (job.path / "config.json").write_text(config, encoding="utf-8")
    (job.path / f"{_CONFIG_MODULE}.py").write_text(_CONFIG_SOURCE, encoding="utf-8")
    copy.deepcopy(job.model.generation_config).save_pretrained(job.path)
    size = _count_written_size(decoder, layers, weights)
    zeros = size["parameters"] - sum(parameter.numel() for parameter in job.model.parameters())
    heads = max(layer.query_heads for layer in layers)
    note = (
        f"deci: {heads} query heads in every attention, FFN widths in steps of {DECI_FFN_MULTIPLE}: {zeros:,} of "
        f"{size['parameters']:,} parameters are zeros that fill up; vLLM itself was not run"
    )
    return {"note": note, "size": size, "zeros": zeros}


def check_deci(model: nn.Module, tokenizer: Any) -> None:
    """As `write_deci`, without writing."""
    decoder = Decoder(model)
    check_llama_layers(decoder, "deci")
    compute_rope_factors(decoder, "deci")
    get_head_dim(decoder)
    for size in _list_layer_sizes(decoder):
        if size.channels:
            compute_ffn_multiplier(size.channels, int(decoder.config.hidden_size))


def _count_written_size(decoder: Decoder, layers: list[_LayerSizes], weights: dict[str, Tensor]) -> dict[str, int]:
    """What is in the folder, as `measure.size` counts it."""
    blocks = {name: x for name, x in weights.items() if name.startswith("model.layers.")}
    matrices, table = sum(x.numel() for x in blocks.values() if x.dim() == 2), weights["model.embed_tokens.weight"]
    return {
        "parameters": sum(x.numel() for x in weights.values()),
        "block_parameters": sum(x.numel() for x in blocks.values()),
        "macs_per_token": matrices + table.numel(),
        "kv_bytes_per_token": 2
        * get_head_dim(decoder)
        * sum(layer.kv_groups for layer in layers)
        * table.element_size(),
    }


def _list_layer_sizes(decoder: Decoder) -> list[_LayerSizes]:
    shapes = (layer.shape for layer in decoder)
    return [
        _LayerSizes(*size)
        for size in compute_deci_widths([(s.query_heads, s.kv_groups, s.ffn_channels) for s in shapes])
    ]


def _find_biased_roles(decoder: Decoder) -> set[str]:
    """Which of "qkv", "o" and "mlp" have a bias somewhere; then all layers get them."""
    roles = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "mlp", "up": "mlp", "down": "mlp"}
    linears = (pair for layer in decoder for pair in collect_projections(layer).items())
    return {roles[role] for role, linear in linears if linear.bias is not None}


def _build_deci_config(decoder: Decoder, layers: list[_LayerSizes], biased: set[str]) -> dict[str, Any]:
    """config.json; rope is there twice, as transformers 5 writes it and as 4 did."""
    config, model = decoder.config, decoder.model
    hidden, rope = int(config.hidden_size), dict(config.rope_parameters)
    blocks = [
        {
            "attention": {
                "n_heads_in_group": size.group_size or None,
                "no_op": not size.query_heads,
                "replace_with_linear": False,
            },
            "ffn": {
                "ffn_mult": compute_ffn_multiplier(size.channels, hidden) if size.channels else None,
                "no_op": not size.channels,
                "replace_with_linear": False,
            },
        }
        for size in layers
    ]
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{_CONFIG_MODULE}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "block_configs": blocks,
        "hidden_size": hidden,
        "hidden_act": "silu",
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(size.query_heads for size in layers),
        "num_key_value_heads": None,
        "head_dim": get_head_dim(decoder),
        "intermediate_size": max(size.channels for size in layers) or None,
        "vocab_size": int(model.get_input_embeddings().weight.shape[0]),  # type: ignore[operator]
        "max_position_embeddings": compute_context_limit(decoder),
        "rms_norm_eps": float(config.rms_norm_eps),
        "rope_parameters": {"rope_type": "default"} | rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {name: value for name, value in rope.items() if name != "rope_theta"} if scaled else None,
        "attention_bias": "o" in biased,
        "qkv_bias": "qkv" in biased,
        "mlp_bias": "mlp" in biased,
        "tie_word_embeddings": has_tied_embeddings(model),
        **{name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def compute_ffn_multiplier(channels: int, hidden: int) -> float:
    """The multiplier that DeciLM turns into a width that is a multiple of 256.

    Raises:
        DoesNotFit: rounding takes it elsewhere.
    """
    found = round(1.5 * (channels - DECI_FFN_MULTIPLE / 2) / hidden, 6)  # the middle of what is rounded up to it
    if reader.compute_ffn_width(found, hidden) != channels:
        raise DoesNotFit(f"format 'deci': no ffn_mult gives {channels} channels at hidden size {hidden}; use 'hetero'")
    return found


def _build_deci_weights(decoder: Decoder, layers: list[_LayerSizes], biased: set[str]) -> dict[str, Tensor]:
    """All tensors of the folder, by DeciLM's names, which are Llama's."""
    model: Any = decoder.model
    table, dim = model.get_input_embeddings().weight.detach(), get_head_dim(decoder)
    found = {"model.embed_tokens.weight": table, "model.norm.weight": model.model.norm.weight.detach()}
    if not has_tied_embeddings(model):
        found["lm_head.weight"] = model.get_output_embeddings().weight.detach()
    for layer, size in zip(decoder, layers, strict=True):
        prefix = f"model.layers.{layer.index}."
        found |= {
            f"{prefix}{name}": x.contiguous()
            for name, x in _build_layer_weights(layer, size, biased, dim, table).items()
        }
    return found


def _build_layer_weights(
    layer: Layer, size: _LayerSizes, biased: set[str], dim: int, like: Tensor
) -> dict[str, Tensor]:
    """Tensors of one layer in the given sizes, by their names below the layer."""
    shape, linears, found = layer.shape, collect_projections(layer), {}
    queries = (shape.kv_groups, shape.group_size, dim), (size.kv_groups, size.group_size, dim)
    keys = (shape.kv_groups, dim), (size.kv_groups, dim)
    channels = (shape.ffn_channels,), (size.channels,)
    spreads = {"q": queries, "k": keys, "v": keys, "o": queries, "gate": channels, "up": channels, "down": channels}
    if size.query_heads:
        found["input_layernorm.weight"] = _get_norm_gain(layer.get_norm("attention_norm"), like)
    if size.channels:
        found["post_attention_layernorm.weight"] = _get_norm_gain(layer.get_norm("mlp_norm"), like)
    for role, (old, new) in spreads.items():
        attention = role in "qkvo"
        if not (size.query_heads if attention else size.channels):
            continue
        reads = role in ("o", "down")  # it is the columns that are heads or channels
        linear = linears.get(role)
        weight = like.new_zeros((like.shape[1], 0) if reads else (0, like.shape[1]))
        weight = weight if linear is None else cast(Tensor, linear.weight).detach()
        name = f"{'self_attn' if attention else 'mlp'}.{role}_proj"
        wide = _scatter_rows(weight.T, old, new).T if reads else _scatter_rows(weight, old, new)
        found[f"{name}.weight"] = wide
        if ("mlp" if not attention else "o" if role == "o" else "qkv") in biased:
            bias = None if linear is None else cast("Tensor | None", linear.bias)
            bias = like.new_zeros(len(weight)) if bias is None else bias.detach()
            found[f"{name}.bias"] = bias if reads else _scatter_rows(bias, old, new)
    return found


def _get_norm_gain(norm: Any, like: Tensor) -> Tensor:
    return like.new_ones(like.shape[1]) if norm is None else cast(Tensor, norm.weight).detach()


def _scatter_rows(x: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Rows that make up `old` (groups, heads in a group, D) in the first places of `new`, zeros in the others."""
    whole = x.new_zeros((*new, *x.shape[1:]))
    whole[tuple(slice(count) for count in old)] = x.reshape(*old, *x.shape[1:])
    return whole.flatten(0, len(new) - 1)


def prove_deci(job: ExportJob) -> dict[str, Any]:
    """Read the folder as DeciLM does, in a new process, and compare logits on fixed tokens in float32.

    Raises:
        NotProved: it can not be read so.
    """
    ids = metrics.make_fixed_tokens(job.model)
    question = {"folder": str(job.path), "tokens": ids.tolist(), "threads": torch.get_num_threads()}
    answer = new_process.run_proof_script(
        reader.__file__, question, job.path, "format 'deci': the folder can not be read as a DeciLM"
    )
    with use_float32_model(job.model) as model:
        expected = metrics.compute_logits(model, ids)
    numbers = compare_logits(expected, torch.load(io.BytesIO(answer), weights_only=True))
    difference, limit = numbers["largest_difference"], numbers["limit"]
    why = f"largest logit difference {difference:.2e}, expected at most {limit:.2e}"
    return {
        "passed": difference <= limit,
        "why": None if difference <= limit else f"the folder does not read back equal: {why}",
        "loader": "prunelit's own reading of vLLM's DeciLM, in a new process; vLLM itself was not run",
        "dtype": "float32",
        **numbers,
        "versions": collect_versions(),
    }


_LOAD_SNIPPET = """\
from vllm import LLM  # not run by prunelit: see the proof below

llm = LLM("PATH", trust_remote_code=True)"""

FORMAT = Format("deci", _LOAD_SNIPPET, write_deci, prove_deci, library="vllm", check=check_deci)
