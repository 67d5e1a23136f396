"""The tensors of a GGUF file: the llama.cpp graph that computes the same as the model, and the tensors it reads.

The graph is the family's own where all layers have the same shape. Where the layers of a Llama-like family differ, it
is `deci`, which reads head counts and FFN widths per layer. In that graph

  a removed attention   has 0 heads, except in layer 0: llama.cpp takes the head size from there, so it gets one head of
                        zeros;
  a removed FFN         has 32 channels of zeros: with 0 channels the graph silently drops the layer's attention too.

The graphs of mixtures of experts read one number of experts and one width of them, for all layers. An FFN beside them
has a width of its own.

The graphs `llama` and `deci` rotate neighbouring dimensions where transformers rotates the halves of a head. The rows
of q and k are therefore reordered, in each layer by its own number of heads.

Legend: H hidden size, Q query heads, G KV groups, D head size, F FFN channels, E experts, C channels of an expert.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunelit.export.gguf.quantize import BLOCK_SIZE, ROUNDED_TYPES
from prunelit.export.gguf.settings import GELU, GraphSettings, check_graph_settings
from prunelit.export.llama_layers import (
    check_llama_layers,
    collect_projections,
    compute_rope_factors,
    get_head_dim,
    get_model_family,
    has_tied_embeddings,
)
from prunelit.export.uniform import LayerWidths
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.experts import Experts
from prunelit.model.per_layer import find
from prunelit.planning.serving import LLAMA_LIKE_FAMILIES
from prunelit.runtime.errors import DoesNotFit

FLOAT16_MAX = 65504.0
"""Largest number of float16."""


class LlamaCppGraph(NamedTuple):
    """Properties of one of llama.cpp's graphs.

    Attributes:
        rotates_neighbours: rope rotates neighbouring dimensions, not the halves of a head.
        biases: roles of the projections that may have a bias.
        rope_factors: it reads a factor per rope frequency.
        per_layer: it reads head counts and FFN widths per layer.
        qk_norm: it has norms on queries and keys.
        square_attention: Q * D must be H.
        equal_heads: there must be as many KV heads as query heads.
        needs_experts: every layer must be a mixture of experts.
        normalizes_chosen: whether it divides the weights of the chosen experts by their sum.
        settings: what else it computes, and reads from the config, see `prunelit.export.gguf.settings`.

    Example: `LlamaCppGraph` is used further down in this module.
    """

    rotates_neighbours: bool
    biases: frozenset[str]
    rope_factors: bool = False
    per_layer: bool = False
    qk_norm: bool = False
    square_attention: bool = False
    equal_heads: bool = False
    needs_experts: bool = False
    normalizes_chosen: bool = True
    settings: GraphSettings = GraphSettings()


_TENSOR_NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_FFN_ROLES = ("gate", "up", "down")
GRAPHS = {
    "llama": LlamaCppGraph(rotates_neighbours=True, biases=frozenset(_TENSOR_NAMES), rope_factors=True),
    "deci": LlamaCppGraph(rotates_neighbours=True, biases=frozenset(_TENSOR_NAMES), rope_factors=True, per_layer=True),
    "qwen2": LlamaCppGraph(rotates_neighbours=False, biases=frozenset("qkv"), square_attention=True),
    "qwen3": LlamaCppGraph(rotates_neighbours=False, biases=frozenset(), qk_norm=True),
    "qwen2moe": LlamaCppGraph(
        rotates_neighbours=False,
        biases=frozenset("qkv"),
        square_attention=True,
        needs_experts=True,
        normalizes_chosen=False,
    ),
    "qwen3moe": LlamaCppGraph(rotates_neighbours=False, biases=frozenset(), qk_norm=True, needs_experts=True),
    "olmoe": LlamaCppGraph(
        rotates_neighbours=False,
        biases=frozenset(),
        qk_norm=True,
        square_attention=True,
        equal_heads=True,
        needs_experts=True,
        normalizes_chosen=False,
    ),
    "granite": LlamaCppGraph(
        rotates_neighbours=True, biases=frozenset(_TENSOR_NAMES), settings=GraphSettings(multipliers=True)
    ),
    "smollm3": LlamaCppGraph(rotates_neighbours=True, biases=frozenset(), settings=GraphSettings(no_rope_interval=4)),
    "phi3": LlamaCppGraph(
        rotates_neighbours=False, biases=frozenset(), square_attention=True, settings=GraphSettings(joins_inputs=True)
    ),
    "gemma": LlamaCppGraph(
        rotates_neighbours=False, biases=frozenset(), settings=GraphSettings(activation=GELU, needs_tied=True)
    ),
    "gemma2": LlamaCppGraph(
        rotates_neighbours=False,
        biases=frozenset(),
        settings=GraphSettings(
            activation=GELU, needs_tied=True, post_norms=True, softcaps=True, window_interval=2, scaled_by_heads=46
        ),
    ),
    "gemma3": LlamaCppGraph(
        rotates_neighbours=False,
        biases=frozenset(),
        qk_norm=True,
        settings=GraphSettings(activation=GELU, post_norms=True, window_interval=6, two_ropes=True, scaled_by_heads=62),
    ),
}
GRAPHS_OF_FAMILY: dict[str, tuple[str, ...]] = dict.fromkeys(LLAMA_LIKE_FAMILIES, ("llama", "deci")) | {
    "qwen2": ("qwen2", "llama", "deci"),
    "qwen3": ("qwen3",),
    "mixtral": ("llama",),
    "qwen2_moe": ("qwen2moe",),
    "qwen3_moe": ("qwen3moe",),
    "olmoe": ("olmoe",),
    "granite": ("granite",),
    "smollm3": ("smollm3",),
    "phi3": ("phi3",),
    "gemma": ("gemma",),
    "gemma2": ("gemma2",),
    "gemma3_text": ("gemma3",),
}
"""Graphs that suit a family, in the order in which they are tried."""


class LayerSizes(NamedTuple):
    """Sizes of one layer in the file; they include heads and channels of zeros that were added.

    In a mixture of experts, `channels` are those of every expert.

    Example: see `prunelit.export.gguf.writer`, which uses it.
    """

    query_heads: int
    kv_groups: int
    head_dim: int
    channels: int
    experts: int = 0
    shared_channels: int = 0


class TensorEntry(NamedTuple):
    """A tensor of the file: its name, its shape [out, in] or [size], and a function that returns its values.

    The values are made when they are written, so that one tensor is copied at a time.

    Example: see `prunelit.export.gguf.writer`, which uses it.
    """

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Tensor]


def choose_graph(decoder: Decoder) -> str:
    """Choose the graph that computes the same as the model.

    Args:
        decoder: the model.

    Returns:
        Its name, a key of `GRAPHS`.

    Raises:
        DoesNotFit: there is no such graph; the message names the formats that remain.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        >>> choose_graph(Decoder(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))))
        'llama'
    """
    family = get_model_family(decoder)
    settings = GRAPHS[GRAPHS_OF_FAMILY[family][0]].settings if family in GRAPHS_OF_FAMILY else GraphSettings()
    check_llama_layers(decoder, "gguf", GRAPHS_OF_FAMILY, settings.activation)
    check_graph_settings(decoder, settings)
    _check_mixtures(decoder)
    widths = {LayerWidths.from_shape(layer.shape) for layer in decoder}
    one_width = next(iter(widths))
    is_uniform = len(widths) == 1 and 0 not in (one_width.query_heads, one_width.ffn_channels or one_width.experts)
    is_square = {w.query_heads * get_head_dim(decoder) for w in widths} == {int(decoder.config.hidden_size)}
    is_equal = all(w.query_heads == w.kv_groups for w in widths)
    biased = {
        role for layer in decoder for role, linear in collect_projections(layer).items() if linear.bias is not None
    }
    is_scaled = not settings.two_ropes and compute_rope_factors(decoder, "gguf") is not None
    for name in GRAPHS_OF_FAMILY[family]:
        graph = GRAPHS[name]
        reads_shapes = graph.per_layer or (
            is_uniform and (is_square or not graph.square_attention) and (is_equal or not graph.equal_heads)
        )
        if reads_shapes and biased <= graph.biases and (graph.rope_factors or not is_scaled):
            return name
    if not is_uniform:
        raise DoesNotFit(
            f"format 'gguf': expected layers of one shape, which llama.cpp's {family} graph needs, got layers that "
            "differ; export format 'padded' and then that folder to gguf, or prune with --scope layer"
        )
    if is_scaled:
        unread = "a scaled rope"
    elif biased - graph.biases:
        unread = f"biases on {', '.join(sorted(biased))}"
    else:
        heads = (
            f"{one_width.query_heads} query heads in {one_width.kv_groups} KV groups of size {get_head_dim(decoder)}"
        )
        unread = f"{heads} at hidden size {decoder.config.hidden_size}"
    raise DoesNotFit(f"format 'gguf': llama.cpp's {family} graph does not read {unread}; use format 'hetero'")


def _check_mixtures(decoder: Decoder) -> None:
    """Check that the mixtures of a family of mixtures are those of its graph; nothing to check in another family.

    Raises:
        DoesNotFit: a layer has no experts, mixtures differ, or the router computes its weights in another way.
    """
    family, config = get_model_family(decoder), decoder.config
    graph = GRAPHS[GRAPHS_OF_FAMILY[family][0]]
    if decoder.architecture.mixture is None:
        return
    first = decoder.layers[0].shape
    for layer in decoder:
        shape = layer.shape
        if not shape.experts:
            raise DoesNotFit(
                f"format 'gguf': expected experts in every layer, which llama.cpp's {family} graph needs, got none in "
                f"layer {layer.index}; use format 'uniform' or 'hetero'"
            )
        if (shape.experts, shape.expert_channels) != (first.experts, first.expert_channels):
            raise DoesNotFit(
                f"format 'gguf': expected one number of experts of one width, got {first.experts} experts of "
                f"{first.expert_channels} channels in layer 0, {shape.experts} of {shape.expert_channels} in layer "
                f"{layer.index}; prune with --scope layer, or use format 'hetero'"
            )
    normalizes = getattr(config, "norm_topk_prob", graph.normalizes_chosen)
    if bool(normalizes) != graph.normalizes_chosen:
        raise DoesNotFit(
            f"format 'gguf': expected norm_topk_prob = {graph.normalizes_chosen}, which llama.cpp's {family} graph "
            f"computes, got {normalizes}; use format 'uniform' or 'hetero'"
        )
    if getattr(config, "clip_qkv", None) is not None:
        raise DoesNotFit(
            f"format 'gguf': expected clip_qkv = None, got {config.clip_qkv}, which no {family} graph of llama.cpp "
            "reads; use format 'uniform' or 'hetero'"
        )


def compute_layer_sizes(decoder: Decoder, kind: str) -> list[LayerSizes]:
    """Compute the sizes of the layers in a file.

    Args:
        decoder: the model.
        kind: type of the matrices; those of few bits ("q8_0", "q4_k_m", ...) get whole blocks of 32 channels.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        >>> compute_layer_sizes(Decoder(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))), "q8_0")
        [LayerSizes(query_heads=2, kv_groups=2, head_dim=8, channels=32, experts=0, shared_channels=0)]
    """
    dim, layers = get_head_dim(decoder), []
    for layer in decoder:
        shape = layer.shape
        heads, groups, channels = shape.query_heads, shape.kv_groups, shape.expert_channels or shape.ffn_channels
        if layer.index == 0 and not heads:  # llama.cpp takes the head size from layer 0
            heads = groups = 1
        # A removed FFN has a block of zeros in any type.
        unit = BLOCK_SIZE if kind in ROUNDED_TYPES or not channels else 1
        channels = -(-max(channels, 1) // unit) * unit
        shared_channels = -(-shape.ffn_channels // unit) * unit if shape.experts else 0
        layers.append(LayerSizes(heads, groups, dim, channels, shape.experts, shared_channels))
    return layers


def list_tensor_entries(decoder: Decoder, graph: LlamaCppGraph, layers: list[LayerSizes]) -> Iterator[TensorEntry]:
    """List all tensors of the file, in its order.

    Args:
        decoder: the model.
        graph: the graph that reads the file.
        layers: sizes of the layers, see `compute_layer_sizes`.

    Example: see `prunelit.export.gguf.writer.write_gguf_file`.
    """
    model: Any = decoder.model
    table, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    hidden = table.shape[1]
    yield TensorEntry("token_embd.weight", tuple(table.shape), lambda: table)
    factors = compute_rope_factors(decoder, "gguf") if graph.rope_factors else None
    if factors is not None:
        yield TensorEntry("rope_freqs.weight", tuple(factors.shape), lambda: factors)
    for layer, sizes in zip(decoder, layers, strict=True):
        yield from _list_layer_entries(layer, graph, sizes, hidden)
    final_norm = find(model, decoder.architecture.layers.rpartition(".")[0] + ".norm")
    yield _make_norm_entry("output_norm.weight", final_norm, hidden, decoder.architecture.norm_offset)
    if not has_tied_embeddings(model):
        yield TensorEntry("output.weight", tuple(head.shape), lambda: head)


def _list_layer_entries(layer: Layer, graph: LlamaCppGraph, sizes: LayerSizes, hidden: int) -> Iterator[TensorEntry]:
    """List the tensors of one layer.

    Where the file needs a block that was removed, its matrices are zeros and its norm is ones.
    """
    block, dim, offset = f"blk.{layer.index}.", sizes.head_dim, layer.architecture.norm_offset
    channels, ffn_suffix = (sizes.shared_channels, "_shexp") if sizes.experts else (sizes.channels, "")
    shapes = {"gate": (channels, hidden), "up": (channels, hidden), "down": (hidden, channels)} if channels else {}
    if sizes.query_heads:
        queries, keys = sizes.query_heads * dim, sizes.kv_groups * dim
        shapes |= {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        yield _make_norm_entry(f"{block}attn_norm.weight", layer.get_norm("attention_norm"), hidden, offset)
    yield _make_norm_entry(f"{block}ffn_norm.weight", layer.get_norm("mlp_norm"), hidden, offset)
    if graph.settings.post_norms:
        for name, role in (("post_attention_norm", "attention_post_norm"), ("post_ffw_norm", "mlp_post_norm")):
            yield _make_norm_entry(f"{block}{name}.weight", layer.get_norm(role), hidden, offset)
    linears = collect_projections(layer)
    joined = (("attn_qkv", ("q", "k", "v")), ("ffn_up", ("gate", "up"))) if graph.settings.joins_inputs else ()
    for name, roles in joined:
        parts = [(find(linears.get(role), "weight"), shapes.pop(role)) for role in roles if role in shapes]
        if parts:
            rows = sum(shape[0] for _, shape in parts)
            yield TensorEntry(f"{block}{name}.weight", (rows, hidden), partial(_join_rows, parts))
    for role, shape in shapes.items():
        linear, name = linears.get(role), f"{block}{_TENSOR_NAMES[role]}{ffn_suffix if role in _FFN_ROLES else ''}"
        heads = {"q": sizes.query_heads, "k": sizes.kv_groups}.get(role, 0) if graph.rotates_neighbours else 0
        yield TensorEntry(f"{name}.weight", shape, partial(_arrange_rows, find(linear, "weight"), shape, heads))
        if find(linear, "bias") is not None:
            yield TensorEntry(f"{name}.bias", shape[:1], partial(_arrange_rows, find(linear, "bias"), shape[:1], heads))
    if graph.qk_norm:  # of every head, or of all heads together
        for name in ("q", "k"):
            norm = find(layer.attention, f"{name}_norm")
            yield _make_norm_entry(f"{block}attn_{name}_norm.weight", norm, len(norm.weight), offset)
    if layer.experts is not None:
        yield from _list_mixture_entries(layer.experts, block, sizes, hidden)


def _list_mixture_entries(experts: Experts, block: str, sizes: LayerSizes, hidden: int) -> Iterator[TensorEntry]:
    """List the tensors of router and experts; gate and up, which are one tensor in the model, are two in the file."""
    before, after = (sizes.experts, sizes.channels, hidden), (sizes.experts, hidden, sizes.channels)
    gates, ups = experts.gate_up.detach().split(experts.channels, dim=1)
    router = experts.router.weight.detach()
    yield TensorEntry(f"{block}ffn_gate_inp.weight", tuple(router.shape), lambda: router)
    for name, x, shape in (("gate", gates, before), ("up", ups, before), ("down", experts.down, after)):
        yield TensorEntry(f"{block}ffn_{name}_exps.weight", shape, partial(_arrange_rows, x, shape, 0))
    shared_gate = find(experts.block, "shared_expert_gate.weight")
    if shared_gate is not None:
        yield TensorEntry(f"{block}ffn_gate_inp_shexp.weight", (hidden,), lambda: shared_gate.detach().flatten())


def _make_norm_entry(name: str, norm: Any, size: int, offset: float) -> TensorEntry:
    """Make the entry of a norm; graphs multiply by the weight as it is, some families add `offset` to it first."""
    return TensorEntry(
        name, (size,), lambda: torch.ones(size) if norm is None else norm.weight.detach().float() + offset
    )


def _join_rows(parts: Sequence[tuple[Tensor | None, tuple[int, ...]]]) -> Tensor:
    """Join weights, each brought into its shape first."""
    return torch.cat([_arrange_rows(weight, shape, 0) for weight, shape in parts])


def _arrange_rows(x: Tensor | None, shape: tuple[int, ...], heads: int) -> Tensor:
    """Bring a weight or bias into the file's shape, and its rows into the graph's order.

    Args:
        x: the parameter; None: zeros.
        shape: its shape in the file; added rows and columns are zeros.
        heads: number of heads whose rows are interleaved; 0: the rows keep their order.
    """
    if x is None:
        return torch.zeros(shape)
    values = x.detach()
    if values.shape != shape:
        values = values.new_zeros(shape)
        values[tuple(slice(count) for count in x.shape)] = x.detach()
    return _interleave_rotary_rows(values, heads) if heads else values


def _interleave_rotary_rows(x: Tensor, heads: int) -> Tensor:
    """Make dimensions i and i + D / 2 of every head, which rope rotates together, neighbours.

    Args:
        x: [heads * D, ...].
        heads: number of heads.

    Example:
        >>> _interleave_rotary_rows(torch.arange(8), heads=2)
        tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    return x.reshape(heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
