"""Format deci: a folder for vLLM's DeciLM ("nemotron-nas"), whose layers may differ in KV heads, FFN width and blocks.

DeciLM has one number of query heads for all layers. Heads of zeros fill up what a layer lacks; they contribute exactly
zero. Layer 0 must have attention: where it was removed, it has one KV head of zeros. All other pruned units and blocks
stay removed. With `--type ffn_mult` FFN widths are in steps of 256, for readers that do not take exact ones.

Source of the layout: vllm/model_executor/models/nemotron_nas.py. The proof is `prunelit.export.deci.reader`, which
reads a folder as that file does; vLLM 0.32 ran such folders in benchmarks/served_folders.py.

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

FFN_MULTIPLIERS = "ffn_mult"
"""The kind of folder whose FFN widths are multipliers, which lead to multiples of 256 only."""
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
    """Sizes of one layer in the folder, with the zeros that were added; 0: the block is a no-op."""

    query_heads: int
    kv_groups: int
    channels: int

    @property
    def group_size(self) -> int:
        return self.query_heads // self.kv_groups if self.kv_groups else 0


def write_deci(job: ExportJob) -> dict[str, Any]:
    """Write config, weights and the configuration class that `auto_map` names.

    Returns:
        {"note", "size": as of `measure_model_size`, "zeros": number of added parameters that are zero}.

    Raises:
        DoesNotFit: the layers do not compute what Llama's do, or the layout has no such rope.

    Example: `prunelit.export.write_model(model, "folder", tokenizer, format="deci")` calls it.
    """
    check_deci(job.model, job.tokenizer)
    decoder = job.get_decoder()
    layers, biased = _list_layer_sizes(decoder, job.kind), _find_biased_roles(decoder)
    config = json.dumps(_build_deci_config(decoder, layers, biased, job.kind), indent=2) + "\n"
    weights = _build_deci_weights(decoder, layers, biased)
    save_torch_state_dict(weights, job.path, max_shard_size=job.max_shard_size, metadata={"format": "pt"})
    (job.path / "config.json").write_text(config, encoding="utf-8")
    (job.path / f"{_CONFIG_MODULE}.py").write_text(_CONFIG_SOURCE, encoding="utf-8")
    copy.deepcopy(job.model.generation_config).save_pretrained(job.path)
    size = _count_written_size(decoder, layers, weights)
    zeros = size["parameters"] - sum(parameter.numel() for parameter in job.model.parameters())
    heads = max(layer.query_heads for layer in layers)
    steps = f", FFN widths in steps of {DECI_FFN_MULTIPLE}" if job.kind == FFN_MULTIPLIERS else ""
    note = (
        f"deci: {heads} query heads in every attention{steps}: {zeros:,} of {size['parameters']:,} parameters are "
        "zeros that fill up"
    )
    return {"note": note, "size": size, "zeros": zeros}


def check_deci(model: nn.Module, tokenizer: Any) -> None:
    """Check that `write_deci` can write a model, from shapes and configs.

    Raises:
        DoesNotFit: see `write_deci`.

    Example: `check_deci` is used further down in this module.
    """
    decoder = Decoder(model)
    check_llama_layers(decoder, "deci")
    compute_rope_factors(decoder, "deci")
    get_head_dim(decoder)


def _count_written_size(decoder: Decoder, layers: list[_LayerSizes], weights: dict[str, Tensor]) -> dict[str, int]:
    """Count the content of the folder as `measure_model_size` counts a model."""
    layer_weights = {name: x for name, x in weights.items() if name.startswith("model.layers.")}
    matrix_parameters = sum(x.numel() for x in layer_weights.values() if x.dim() == 2)
    table = weights["model.embed_tokens.weight"]
    kv_elements = 2 * get_head_dim(decoder) * sum(layer.kv_groups for layer in layers)
    return {
        "parameters": sum(x.numel() for x in weights.values()),
        "block_parameters": sum(x.numel() for x in layer_weights.values()),
        "macs_per_token": matrix_parameters + table.numel(),
        "kv_bytes_per_token": kv_elements * table.element_size(),
    }


def _list_layer_sizes(decoder: Decoder, kind: str) -> list[_LayerSizes]:
    """List the sizes of the layers in the folder; `kind` says how FFN widths are written."""
    shapes = (layer.shape for layer in decoder)
    widths = [(shape.query_heads, shape.kv_groups, shape.ffn_channels) for shape in shapes]
    multiple = DECI_FFN_MULTIPLE if kind == FFN_MULTIPLIERS else 1
    return [_LayerSizes(*sizes) for sizes in compute_deci_widths(widths, multiple)]


def _find_biased_roles(decoder: Decoder) -> set[str]:
    """Find which of "qkv", "o" and "mlp" have a bias in some layer; the config then declares it for all layers."""
    roles = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "mlp", "up": "mlp", "down": "mlp"}
    linears = (pair for layer in decoder for pair in collect_projections(layer).items())
    return {roles[role] for role, linear in linears if linear.bias is not None}


def _build_deci_config(decoder: Decoder, layers: list[_LayerSizes], biased: set[str], kind: str) -> dict[str, Any]:
    """Build config.json; it holds rope twice, as transformers 5 writes it and as transformers 4 did."""
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
                **_declare_ffn_width(size.channels, hidden, kind),
                "no_op": not size.channels,
                "replace_with_linear": False,
            },
        }
        for size in layers
    ]
    is_scaled = rope.get("rope_type", "default") != "default"
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
        "rope_scaling": {name: value for name, value in rope.items() if name != "rope_theta"} if is_scaled else None,
        "attention_bias": "o" in biased,
        "qkv_bias": "qkv" in biased,
        "mlp_bias": "mlp" in biased,
        "tie_word_embeddings": has_tied_embeddings(model),
        **{name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _declare_ffn_width(channels: int, hidden: int, kind: str) -> dict[str, Any]:
    """Declare the width of an FFN; vLLM reads `intermediate_size` where there is no `ffn_mult`."""
    if kind == FFN_MULTIPLIERS:
        return {"ffn_mult": compute_ffn_multiplier(channels, hidden) if channels else None}
    return {"intermediate_size": channels} if channels else {}


def compute_ffn_multiplier(channels: int, hidden: int) -> float:
    """Compute the multiplier that DeciLM turns into a given width.

    Args:
        channels: FFN channels, a multiple of 256.
        hidden: hidden size H.

    Raises:
        DoesNotFit: rounding leads to another width.

    Example:
        >>> compute_ffn_multiplier(512, hidden=576)
        1.0
    """
    # DeciLM rounds a width up to a multiple of 256, so the middle of the interval before `channels` is the safest.
    multiplier = round(1.5 * (channels - DECI_FFN_MULTIPLE / 2) / hidden, 6)
    if reader.compute_ffn_width(multiplier, hidden) != channels:
        raise DoesNotFit(f"format 'deci': no ffn_mult gives {channels} channels at hidden size {hidden}; use 'hetero'")
    return multiplier


def _build_deci_weights(decoder: Decoder, layers: list[_LayerSizes], biased: set[str]) -> dict[str, Tensor]:
    """Build all tensors of the folder, by DeciLM's names, which are Llama's."""
    model: Any = decoder.model
    table, dim = model.get_input_embeddings().weight.detach(), get_head_dim(decoder)
    weights = {"model.embed_tokens.weight": table, "model.norm.weight": model.model.norm.weight.detach()}
    if not has_tied_embeddings(model):
        weights["lm_head.weight"] = model.get_output_embeddings().weight.detach()
    for layer, size in zip(decoder, layers, strict=True):
        layer_weights = _build_layer_weights(layer, size, biased, dim, table)
        weights |= {f"model.layers.{layer.index}.{name}": x.contiguous() for name, x in layer_weights.items()}
    return weights


def _build_layer_weights(
    layer: Layer, size: _LayerSizes, biased: set[str], dim: int, like: Tensor
) -> dict[str, Tensor]:
    """Build the tensors of one layer, by their names below the layer.

    Args:
        layer: the layer in memory.
        size: its sizes in the folder.
        biased: roles that have a bias in every layer, see `_find_biased_roles`.
        dim: head size D.
        like: a tensor [V, H] that gives hidden size, dtype and device.
    """
    shape, linears, weights = layer.shape, collect_projections(layer), {}
    # By role: how the rows (or columns) are made up in the model, and in the folder.
    queries = (shape.kv_groups, shape.group_size, dim), (size.kv_groups, size.group_size, dim)
    keys = (shape.kv_groups, dim), (size.kv_groups, dim)
    channels = (shape.ffn_channels,), (size.channels,)
    layouts = {"q": queries, "k": keys, "v": keys, "o": queries, "gate": channels, "up": channels, "down": channels}
    if size.query_heads:
        weights["input_layernorm.weight"] = _get_norm_gain(layer.get_norm("attention_norm"), like)
    if size.channels:
        weights["post_attention_layernorm.weight"] = _get_norm_gain(layer.get_norm("mlp_norm"), like)
    for role, (old, new) in layouts.items():
        is_attention = role in "qkvo"
        if not (size.query_heads if is_attention else size.channels):
            continue
        units_are_columns = role in ("o", "down")
        linear = linears.get(role)
        weight = like.new_zeros((like.shape[1], 0) if units_are_columns else (0, like.shape[1]))
        weight = weight if linear is None else cast(Tensor, linear.weight).detach()
        name = f"{'self_attn' if is_attention else 'mlp'}.{role}_proj"
        scattered = _scatter_rows(weight.T, old, new).T if units_are_columns else _scatter_rows(weight, old, new)
        weights[f"{name}.weight"] = scattered
        if ("mlp" if not is_attention else "o" if role == "o" else "qkv") in biased:
            bias = None if linear is None else cast("Tensor | None", linear.bias)
            bias = like.new_zeros(len(weight)) if bias is None else bias.detach()
            weights[f"{name}.bias"] = bias if units_are_columns else _scatter_rows(bias, old, new)
    return weights


def _get_norm_gain(norm: Any, like: Tensor) -> Tensor:
    """Return the gain [H] of a norm; ones where the norm was removed with its block."""
    return like.new_ones(like.shape[1]) if norm is None else cast(Tensor, norm.weight).detach()


def _scatter_rows(x: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Put rows into a larger layout, with zeros in the other places.

    Args:
        x: rows [prod(old), ...].
        old: what the rows are made up of, as (groups, heads in a group, D) or (channels,).
        new: the same of the result, at least as large in every part.

    Example:
        >>> _scatter_rows(torch.arange(1, 5), (2, 2), (2, 3))
        tensor([1, 2, 0, 3, 4, 0])
    """
    scattered = x.new_zeros((*new, *x.shape[1:]))
    scattered[tuple(slice(count) for count in old)] = x.reshape(*old, *x.shape[1:])
    return scattered.flatten(0, len(new) - 1)


def prove_deci(job: ExportJob) -> dict[str, Any]:
    """Read the folder as DeciLM does, in a new process, and compare logits on fixed tokens in float32.

    Returns:
        The verdict: {"passed", "why" (the reason if it failed, or None), "loader", "dtype", ...}.

    Raises:
        NotProved: the folder cannot be read as a DeciLM.

    Example: see `write_deci`.
    """
    ids = metrics.make_fixed_tokens(job.model)
    question = {"folder": str(job.path), "tokens": ids.tolist(), "threads": torch.get_num_threads()}
    answer = new_process.run_proof_script(
        reader.__file__, question, job.path, "format 'deci': the folder cannot be read as a DeciLM"
    )
    with use_float32_model(job.model) as model:
        expected = metrics.compute_logits(model, ids)
    numbers = compare_logits(expected, torch.load(io.BytesIO(answer), weights_only=True))
    difference, limit = numbers["largest_difference"], numbers["limit"]
    why = f"largest logit difference {difference:.2e}, expected at most {limit:.2e}"
    return {
        "passed": difference <= limit,
        "why": None if difference <= limit else f"the folder does not read back equal: {why}",
        "loader": "prunelit's own reading of vLLM's DeciLM, in a new process",
        "dtype": "float32",
        **numbers,
        "versions": collect_versions(),
    }


_LOAD_SNIPPET = """\
from vllm import LLM

llm = LLM("PATH", trust_remote_code=True)"""

FORMAT = Format(
    *("deci", _LOAD_SNIPPET, write_deci, prove_deci),
    kinds=("exact", FFN_MULTIPLIERS),
    library="vllm",
    check=check_deci,
    text_only=True,
)
