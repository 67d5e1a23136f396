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
from prunelit.export.formats import Format, Job
from prunelit.export.llama_layers import (
    check_llama_layers,
    context_length,
    head_dim,
    is_tied,
    projections,
    rope_factors,
)
from prunelit.export.proof import new_process
from prunelit.export.proof.compare import compared
from prunelit.export.proof.float32 import as_float32
from prunelit.model.decoder import Decoder, Layer
from prunelit.planning.serving import DECI_STEP, deci_widths
from prunelit.runtime.errors import DoesNotFit
from prunelit.runtime.versions import versions

_FILE = "configuration_decilm"
_CONFIGURATION = '''\
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


class _Sizes(NamedTuple):
    """Sizes of one layer in the folder; 0: a no-op."""

    query_heads: int
    kv_groups: int
    channels: int

    @property
    def group_size(self) -> int:
        return self.query_heads // self.kv_groups if self.kv_groups else 0


def write(job: Job) -> dict[str, Any]:
    """Write config, weights and the configuration file that `auto_map` points to.

    Returns:
        {"note", "size": of what is written, "zeros": parameters that only fill up}.

    Raises:
        DoesNotFit: not a family whose layers are Llama's, or a rope that is not in the layout.
    """
    check(job.model, job.tokenizer)
    decoder = Decoder(job.model)
    layers, biased = _sizes(decoder), _biased(decoder)
    weights = _weights(decoder, layers, biased)
    save_torch_state_dict(weights, job.place, max_shard_size=job.max_shard_size, metadata={"format": "pt"})
    config = json.dumps(_config(decoder, layers, biased), indent=2) + "\n"
    (job.place / "config.json").write_text(config, encoding="utf-8")
    (job.place / f"{_FILE}.py").write_text(_CONFIGURATION, encoding="utf-8")
    copy.deepcopy(job.model.generation_config).save_pretrained(job.place)
    size = _size(decoder, layers, weights)
    zeros = size["parameters"] - sum(parameter.numel() for parameter in job.model.parameters())
    heads = max(layer.query_heads for layer in layers)
    note = (
        f"deci: {heads} query heads in every attention, FFN widths in steps of {DECI_STEP}: {zeros:,} of "
        f"{size['parameters']:,} parameters are zeros that fill up; vLLM itself was not run"
    )
    return {"note": note, "size": size, "zeros": zeros}


def check(model: nn.Module, tokenizer: Any) -> None:
    """As `write`, without writing."""
    decoder = Decoder(model)
    check_llama_layers(decoder, "deci")
    rope_factors(decoder, "deci")
    head_dim(decoder)
    for size in _sizes(decoder):
        if size.channels:
            ffn_mult(size.channels, int(decoder.config.hidden_size))


def _size(decoder: Decoder, layers: list[_Sizes], weights: dict[str, Tensor]) -> dict[str, int]:
    """What is in the folder, as `measure.size` counts it."""
    blocks = {name: x for name, x in weights.items() if name.startswith("model.layers.")}
    matrices, table = sum(x.numel() for x in blocks.values() if x.dim() == 2), weights["model.embed_tokens.weight"]
    return {
        "parameters": sum(x.numel() for x in weights.values()),
        "block_parameters": sum(x.numel() for x in blocks.values()),
        "macs_per_token": matrices + table.numel(),
        "kv_bytes_per_token": 2 * head_dim(decoder) * sum(layer.kv_groups for layer in layers) * table.element_size(),
    }


def _sizes(decoder: Decoder) -> list[_Sizes]:
    shapes = (layer.shape for layer in decoder)
    return [_Sizes(*size) for size in deci_widths([(s.query_heads, s.kv_groups, s.ffn_channels) for s in shapes])]


def _biased(decoder: Decoder) -> set[str]:
    """Which of "qkv", "o" and "mlp" have a bias somewhere; then all layers get them."""
    roles = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "mlp", "up": "mlp", "down": "mlp"}
    linears = (pair for layer in decoder for pair in projections(layer).items())
    return {roles[role] for role, linear in linears if linear.bias is not None}


def _config(decoder: Decoder, layers: list[_Sizes], biased: set[str]) -> dict[str, Any]:
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
                "ffn_mult": ffn_mult(size.channels, hidden) if size.channels else None,
                "no_op": not size.channels,
                "replace_with_linear": False,
            },
        }
        for size in layers
    ]
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{_FILE}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "block_configs": blocks,
        "hidden_size": hidden,
        "hidden_act": "silu",
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(size.query_heads for size in layers),
        "num_key_value_heads": None,
        "head_dim": head_dim(decoder),
        "intermediate_size": max(size.channels for size in layers) or None,
        "vocab_size": int(model.get_input_embeddings().weight.shape[0]),  # type: ignore[operator]
        "max_position_embeddings": context_length(decoder),
        "rms_norm_eps": float(config.rms_norm_eps),
        "rope_parameters": {"rope_type": "default"} | rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {name: value for name, value in rope.items() if name != "rope_theta"} if scaled else None,
        "attention_bias": "o" in biased,
        "qkv_bias": "qkv" in biased,
        "mlp_bias": "mlp" in biased,
        "tie_word_embeddings": is_tied(model),
        **{name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def ffn_mult(channels: int, hidden: int) -> float:
    """The multiplier that DeciLM turns into a width that is a multiple of 256.

    Raises:
        DoesNotFit: rounding takes it elsewhere.
    """
    found = round(1.5 * (channels - DECI_STEP / 2) / hidden, 6)  # the middle of what is rounded up to it
    if reader.width(found, hidden) != channels:
        raise DoesNotFit(f"format 'deci': no ffn_mult gives {channels} channels at hidden size {hidden}; use 'hetero'")
    return found


def _weights(decoder: Decoder, layers: list[_Sizes], biased: set[str]) -> dict[str, Tensor]:
    """All tensors of the folder, by DeciLM's names, which are Llama's."""
    model: Any = decoder.model
    table, dim = model.get_input_embeddings().weight.detach(), head_dim(decoder)
    found = {"model.embed_tokens.weight": table, "model.norm.weight": model.model.norm.weight.detach()}
    if not is_tied(model):
        found["lm_head.weight"] = model.get_output_embeddings().weight.detach()
    for layer, size in zip(decoder, layers, strict=True):
        prefix = f"model.layers.{layer.index}."
        found |= {f"{prefix}{name}": x.contiguous() for name, x in _layer(layer, size, biased, dim, table).items()}
    return found


def _layer(layer: Layer, size: _Sizes, biased: set[str], dim: int, like: Tensor) -> dict[str, Tensor]:
    """Tensors of one layer in the given sizes, by their names below the layer."""
    shape, linears, found = layer.shape, projections(layer), {}
    queries = (shape.kv_groups, shape.group_size, dim), (size.kv_groups, size.group_size, dim)
    keys = (shape.kv_groups, dim), (size.kv_groups, dim)
    channels = (shape.ffn_channels,), (size.channels,)
    spreads = {"q": queries, "k": keys, "v": keys, "o": queries, "gate": channels, "up": channels, "down": channels}
    if size.query_heads:
        found["input_layernorm.weight"] = _gain(layer.norm("attention_norm"), like)
    if size.channels:
        found["post_attention_layernorm.weight"] = _gain(layer.norm("mlp_norm"), like)
    for role, (old, new) in spreads.items():
        attention = role in "qkvo"
        if not (size.query_heads if attention else size.channels):
            continue
        reads = role in ("o", "down")  # it is the columns that are heads or channels
        linear = linears.get(role)
        weight = like.new_zeros((like.shape[1], 0) if reads else (0, like.shape[1]))
        weight = weight if linear is None else cast(Tensor, linear.weight).detach()
        name = f"{'self_attn' if attention else 'mlp'}.{role}_proj"
        wide = _spread(weight.T, old, new).T if reads else _spread(weight, old, new)
        found[f"{name}.weight"] = wide
        if ("mlp" if not attention else "o" if role == "o" else "qkv") in biased:
            bias = None if linear is None else cast("Tensor | None", linear.bias)
            bias = like.new_zeros(len(weight)) if bias is None else bias.detach()
            found[f"{name}.bias"] = bias if reads else _spread(bias, old, new)
    return found


def _gain(norm: Any, like: Tensor) -> Tensor:
    return like.new_ones(like.shape[1]) if norm is None else cast(Tensor, norm.weight).detach()


def _spread(x: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Rows that make up `old` (groups, heads in a group, D) in the first places of `new`, zeros in the others."""
    whole = x.new_zeros((*new, *x.shape[1:]))
    whole[tuple(slice(count) for count in old)] = x.reshape(*old, *x.shape[1:])
    return whole.flatten(0, len(new) - 1)


def prove(job: Job) -> dict[str, Any]:
    """Read the folder as DeciLM does, in a new process, and compare logits on fixed tokens in float32.

    Raises:
        NotProved: it can not be read so.
    """
    ids = metrics.fixed_tokens(job.model)
    question = {"folder": str(job.place), "tokens": ids.tolist(), "threads": torch.get_num_threads()}
    answer = new_process.ask(
        reader.__file__, question, job.place, "format 'deci': the folder can not be read as a DeciLM"
    )
    with as_float32(job.model) as model:
        expected = metrics.logits(model, ids)
    numbers = compared(expected, torch.load(io.BytesIO(answer), weights_only=True))
    difference, limit = numbers["largest_difference"], numbers["limit"]
    why = f"largest logit difference {difference:.2e}, expected at most {limit:.2e}"
    return {
        "passed": difference <= limit,
        "why": None if difference <= limit else f"the folder does not read back equal: {why}",
        "loader": "prunelit's own reading of vLLM's DeciLM, in a new process; vLLM itself was not run",
        "dtype": "float32",
        **numbers,
        "versions": versions(),
    }


_LOADS = """\
from vllm import LLM  # not run by prunelit: see the proof below

llm = LLM("PATH", trust_remote_code=True)"""

FORMAT = Format("deci", _LOADS, write, prove, library="vllm", check=check)
