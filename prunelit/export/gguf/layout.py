"""The tensors of a GGUF file: the llama.cpp graph that computes the same as the model, and the tensors it reads.

The graph is the family's own where all layers have the same shape. Where the layers of a Llama-like family differ, it
is `deci`, which reads head counts and FFN widths per layer. In that graph

  a removed attention   has 0 heads, except in layer 0: llama.cpp takes the head size from there, so it gets one head of
                        zeros;
  a removed FFN         has 32 channels of zeros: with 0 channels the graph silently drops the layer's attention too.

The graphs `llama` and `deci` rotate neighbouring dimensions where transformers rotates the halves of a head. The rows
of q and k are therefore reordered, in each layer by its own number of heads.

Legend: H hidden size, Q query heads, G KV groups, D head size, F FFN channels.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunelit.export.llama_layers import (
    check_llama_layers,
    collect_projections,
    compute_rope_factors,
    get_head_dim,
    get_model_family,
    has_tied_embeddings,
)
from prunelit.model.decoder import Decoder, Layer
from prunelit.model.per_layer import find
from prunelit.planning.serving import LLAMA_LIKE_FAMILIES
from prunelit.runtime.errors import DoesNotFit

Q8_BLOCK_SIZE = 32
"""Numbers in a block of Q8_0; also the channels of zeros in place of a removed FFN."""
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

    Example: `LlamaCppGraph` is used further down in this module.
    """

    rotates_neighbours: bool
    biases: frozenset[str]
    rope_factors: bool = False
    per_layer: bool = False
    qk_norm: bool = False
    square_attention: bool = False


_TENSOR_NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
GRAPHS = {
    "llama": LlamaCppGraph(rotates_neighbours=True, biases=frozenset(_TENSOR_NAMES), rope_factors=True),
    "deci": LlamaCppGraph(rotates_neighbours=True, biases=frozenset(_TENSOR_NAMES), rope_factors=True, per_layer=True),
    "qwen2": LlamaCppGraph(rotates_neighbours=False, biases=frozenset("qkv"), square_attention=True),
    "qwen3": LlamaCppGraph(rotates_neighbours=False, biases=frozenset(), qk_norm=True),
}
GRAPHS_OF_FAMILY = dict.fromkeys(LLAMA_LIKE_FAMILIES, ("llama", "deci")) | {
    "qwen2": ("qwen2", "llama", "deci"),
    "qwen3": ("qwen3",),
}
"""Graphs that suit a family, in the order in which they are tried."""


class LayerSizes(NamedTuple):
    """Sizes of one layer in the file; they include heads and channels of zeros that were added.

    Example: see `prunelit.export.gguf.writer`, which uses it.
    """

    query_heads: int
    kv_groups: int
    head_dim: int
    channels: int


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
    check_llama_layers(decoder, "gguf", GRAPHS_OF_FAMILY)
    widths = {(s.query_heads, s.kv_groups, s.ffn_channels) for s in (layer.shape for layer in decoder)}
    is_uniform = len(widths) == 1 and 0 not in next(iter(widths))
    is_square = {heads * get_head_dim(decoder) for heads, _, _ in widths} == {int(decoder.config.hidden_size)}
    biased = {
        role for layer in decoder for role, linear in collect_projections(layer).items() if linear.bias is not None
    }
    is_scaled = compute_rope_factors(decoder, "gguf") is not None
    for name in GRAPHS_OF_FAMILY[family]:
        graph = GRAPHS[name]
        reads_shapes = graph.per_layer or (is_uniform and (is_square or not graph.square_attention))
        if reads_shapes and biased <= graph.biases and (graph.rope_factors or not is_scaled):
            return name
    if not is_uniform:
        raise DoesNotFit(
            f"format 'gguf': expected layers of one shape, which llama.cpp's {family} graph needs, got layers that "
            "differ; export format 'padded' and then that folder to gguf, or prune with --scope layer"
        )
    unread = "a scaled rope" if is_scaled else f"biases on {', '.join(sorted(biased))}"
    raise DoesNotFit(f"format 'gguf': llama.cpp's {family} graph does not read {unread}; use format 'hetero'")


def compute_layer_sizes(decoder: Decoder, kind: str) -> list[LayerSizes]:
    """Compute the sizes of the layers in a file.

    Args:
        decoder: the model.
        kind: type of the matrices; "q8_0" needs whole blocks of 32 channels.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        >>> compute_layer_sizes(Decoder(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))), "q8_0")
        [LayerSizes(query_heads=2, kv_groups=2, head_dim=8, channels=32)]
    """
    dim, layers = get_head_dim(decoder), []
    for layer in decoder:
        heads, groups, channels = layer.shape.query_heads, layer.shape.kv_groups, layer.shape.ffn_channels
        if layer.index == 0 and not heads:  # llama.cpp takes the head size from layer 0
            heads = groups = 1
        unit = Q8_BLOCK_SIZE if kind == "q8_0" or not channels else 1
        layers.append(LayerSizes(heads, groups, dim, -(-max(channels, 1) // unit) * unit))
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
    factors = compute_rope_factors(decoder, "gguf")
    if factors is not None:
        yield TensorEntry("rope_freqs.weight", tuple(factors.shape), lambda: factors)
    for layer, sizes in zip(decoder, layers, strict=True):
        yield from _list_layer_entries(layer, graph, sizes, hidden)
    final_norm = find(model, decoder.architecture.layers.rpartition(".")[0] + ".norm")
    yield _make_norm_entry("output_norm.weight", final_norm, hidden)
    if not has_tied_embeddings(model):
        yield TensorEntry("output.weight", tuple(head.shape), lambda: head)


def _list_layer_entries(layer: Layer, graph: LlamaCppGraph, sizes: LayerSizes, hidden: int) -> Iterator[TensorEntry]:
    """List the tensors of one layer.

    Where the file needs a block that was removed, its matrices are zeros and its norm is ones.
    """
    block, dim = f"blk.{layer.index}.", sizes.head_dim
    shapes = {"gate": (sizes.channels, hidden), "up": (sizes.channels, hidden), "down": (hidden, sizes.channels)}
    if sizes.query_heads:
        queries, keys = sizes.query_heads * dim, sizes.kv_groups * dim
        shapes |= {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        yield _make_norm_entry(f"{block}attn_norm.weight", layer.get_norm("attention_norm"), hidden)
    yield _make_norm_entry(f"{block}ffn_norm.weight", layer.get_norm("mlp_norm"), hidden)
    linears = collect_projections(layer)
    for role, shape in shapes.items():
        linear, name = linears.get(role), f"{block}{_TENSOR_NAMES[role]}"
        heads = {"q": sizes.query_heads, "k": sizes.kv_groups}.get(role, 0) if graph.rotates_neighbours else 0
        yield TensorEntry(f"{name}.weight", shape, partial(_arrange_rows, find(linear, "weight"), shape, heads))
        if find(linear, "bias") is not None:
            yield TensorEntry(f"{name}.bias", shape[:1], partial(_arrange_rows, find(linear, "bias"), shape[:1], heads))
    if graph.qk_norm:
        yield _make_norm_entry(f"{block}attn_q_norm.weight", find(layer.attention, "q_norm"), dim)
        yield _make_norm_entry(f"{block}attn_k_norm.weight", find(layer.attention, "k_norm"), dim)


def _make_norm_entry(name: str, norm: Any, size: int) -> TensorEntry:
    return TensorEntry(name, (size,), lambda: torch.ones(size) if norm is None else norm.weight.detach())


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
