"""The tensors of a GGUF file: which of llama.cpp's graphs computes what a model does, and what that graph reads.

The graph is the family's own where all layers agree. Where the layers of a Llama-like family differ it is `deci`, which
reads head counts and FFN widths per layer. There

  a removed attention   has 0 heads; but in layer 0, from which llama.cpp takes the head size, it is one head of zeros;
  a removed FFN         is one of 32 channels of zeros: with 0 the graph drops the layer's attention too, silently.

Two graphs rotate neighbours where transformers rotates halves of a head, so rows of q and k are put in another order,
in each layer by its own number of heads.

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
"""Numbers in a block of Q8_0; channels of an FFN that stands for none."""
FLOAT16_MAX = 65504.0
"""Largest number of float16."""


class LlamaCppGraph(NamedTuple):
    """What one of llama.cpp's graphs does and reads.

    Attributes:
        neighbours: rope rotates neighbours, not halves.
        biases: projections that may have one.
        rope_factors: it reads a factor per rope frequency.
        per_layer: it reads sizes per layer.
        qk_norm: it has norms on queries and keys.
        square: Q * D must be H.
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
"""Graphs of a family, the most usual first."""


class LayerSizes(NamedTuple):
    """Sizes of one layer in the file."""

    query_heads: int
    kv_groups: int
    head_dim: int
    channels: int


class TensorEntry(NamedTuple):
    """A tensor of the file: its name, shape [out, in] or [size], and how to get it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Tensor]


def choose_graph(decoder: Decoder) -> str:
    """Name of the graph that computes what the model does.

    Raises:
        DoesNotFit: none does; says which formats remain.
    """
    family = get_model_family(decoder)
    check_llama_layers(decoder, "gguf", GRAPHS_OF_FAMILY)
    widths = {(s.query_heads, s.kv_groups, s.ffn_channels) for s in (layer.shape for layer in decoder)}
    uniform = len(widths) == 1 and 0 not in next(iter(widths))
    square = {heads * get_head_dim(decoder) for heads, _, _ in widths} == {int(decoder.config.hidden_size)}
    biased = {
        role for layer in decoder for role, linear in collect_projections(layer).items() if linear.bias is not None
    }
    scaled = compute_rope_factors(decoder, "gguf") is not None
    for name in GRAPHS_OF_FAMILY[family]:
        graph = GRAPHS[name]
        shaped = graph.per_layer or (uniform and (square or not graph.square_attention))
        if shaped and biased <= graph.biases and (graph.rope_factors or not scaled):
            return name
    if not uniform:
        raise DoesNotFit(
            f"format 'gguf': expected layers of one shape, which llama.cpp's {family} graph needs, got layers that "
            "differ; export format 'padded' and then that folder to gguf, or prune with --scope layer"
        )
    what = "a scaled rope" if scaled else f"biases on {', '.join(sorted(biased))}"
    raise DoesNotFit(f"format 'gguf': llama.cpp's {family} graph does not read {what}; use format 'hetero'")


def compute_layer_sizes(decoder: Decoder, kind: str) -> list[LayerSizes]:
    """Sizes of the layers in a file whose matrices are of type `kind`; "q8_0" needs whole blocks of channels."""
    dim, found = get_head_dim(decoder), []
    for layer in decoder:
        heads, groups, channels = layer.shape.query_heads, layer.shape.kv_groups, layer.shape.ffn_channels
        if layer.index == 0 and not heads:
            heads = groups = 1
        unit = Q8_BLOCK_SIZE if kind == "q8_0" or not channels else 1
        found.append(LayerSizes(heads, groups, dim, -(-max(channels, 1) // unit) * unit))
    return found


def list_tensor_entries(decoder: Decoder, graph: LlamaCppGraph, layers: list[LayerSizes]) -> Iterator[TensorEntry]:
    """All tensors of the file, in its order."""
    model: Any = decoder.model
    table, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    hidden = table.shape[1]
    yield TensorEntry("token_embd.weight", tuple(table.shape), lambda: table)
    factors = compute_rope_factors(decoder, "gguf")
    if factors is not None:
        yield TensorEntry("rope_freqs.weight", tuple(factors.shape), lambda: factors)
    for layer, found in zip(decoder, layers, strict=True):
        yield from _list_layer_entries(layer, graph, found, hidden)
    yield _make_norm_entry(
        "output_norm.weight", find(model, decoder.architecture.layers.rpartition(".")[0] + ".norm"), hidden
    )
    if not has_tied_embeddings(model):
        yield TensorEntry("output.weight", tuple(head.shape), lambda: head)


def _list_layer_entries(layer: Layer, graph: LlamaCppGraph, sizes: LayerSizes, hidden: int) -> Iterator[TensorEntry]:
    """Tensors of one layer; what is missing from it, and the file must have, is zeros behind a norm of ones."""
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
    """A weight or bias in the file's shape, zeros where it has nothing, and in the graph's order of rows."""
    if x is None:
        return torch.zeros(shape)
    found = x.detach()
    if found.shape != shape:
        found = found.new_zeros(shape)
        found[tuple(slice(count) for count in x.shape)] = x.detach()
    return _interleave_rotary_rows(found, heads) if heads else found


def _interleave_rotary_rows(x: Tensor, heads: int) -> Tensor:
    """Rows [heads * D, ...]: dimension i and i + D / 2 of a head, which are rotated together, become neighbours."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)
