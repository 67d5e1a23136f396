"""The shapes of a GGUF file's layers, seen from its tensors, as the settings of a config.

A file for llama.cpp's `deci` graph has other heads and FFN widths in each layer, and may lack an attention. What cannot
be missing there is zeros, which `prunelit.export.gguf` writes: a block with an output projection of zeros adds nothing,
and is read as removed.

Legend: H hidden size, Q query heads, G KV groups, D head size, F FFN channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prunelit.model.per_layer import ADDED_BIASES


class LayerTensors(NamedTuple):
    """What the tensors of one layer are.

    Attributes:
        query_heads, kv_groups: Q and G; 0 without attention.
        channels: F; 0 without an FFN.
        biases: tensors of the layer that have a bias, such as "attn_q".

    Example: see `measure_layer`.
    """

    query_heads: int
    kv_groups: int
    channels: int
    biases: frozenset[str]

    @property
    def removed(self) -> list[str]:
        """The blocks that are not there, by their names in `per_layer_config`."""
        return ["attention"] * (not self.query_heads) + ["mlp"] * (not self.channels)


def measure_layer(
    rows: Mapping[str, int], biases: frozenset[str], head_dim: int, empty: Sequence[str] = ()
) -> LayerTensors:
    """Measure a layer without experts.

    Args:
        rows: rows of the weights, by names such as "attn_q".
        biases: tensors with a bias.
        head_dim: D.
        empty: output projections ("attn_output", "ffn_down") that are zeros and have no bias.

    Returns:
        Its heads and channels.

    Example:
        >>> measure_layer({"attn_q": 32, "attn_k": 16, "attn_output": 64, "ffn_up": 96}, frozenset(), 8)[:3]
        (4, 2, 96)
    """
    has_attention = "attn_q" in rows and "attn_output" not in empty
    has_ffn = "ffn_up" in rows and "ffn_down" not in empty
    if not has_attention and not has_ffn:  # two blocks of zeros: a layer keeps one of them
        has_ffn = "ffn_up" in rows
        has_attention = not has_ffn
    return LayerTensors(
        rows["attn_q"] // head_dim if has_attention else 0,
        rows["attn_k"] // head_dim if has_attention else 0,
        rows["ffn_up"] if has_ffn else 0,
        frozenset(name for name in biases if (has_attention if name.startswith("attn") else has_ffn)),
    )


def describe_layers(layers: Sequence[LayerTensors], config_biases: frozenset[str]) -> dict[str, Any]:
    """Describe layers as settings of a config: the widths of most, and what single layers have instead.

    Args:
        layers: all layers.
        config_biases: tensors that have a bias in every layer of the class.

    Returns:
        Settings of the config; with `per_layer_config` where a stock class cannot have these layers.

    Example:
        >>> layer = LayerTensors(4, 2, 96, frozenset())
        >>> describe_layers([layer, layer], frozenset())
        {'num_attention_heads': 4, 'num_key_value_heads': 2, 'intermediate_size': 96}
        >>> describe_layers([layer, layer._replace(channels=64)], frozenset())["per_layer_config"]
        {'1': {'intermediate_size': 64}}
    """
    attentions = [(layer.query_heads, layer.kv_groups) for layer in layers if layer.query_heads]
    heads, groups = _find_most_frequent(attentions)
    widths = {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": _find_most_frequent([layer.channels for layer in layers if layer.channels] or [1]),
    }
    per_layer: dict[str, Any] = {}
    for index, layer in enumerate(layers):
        own = dict(zip(widths, layer[:3], strict=True))
        different: dict[str, Any] = {name: width for name, width in own.items() if width and width != widths[name]}
        added = [
            block
            for block, name in (("attention", "attn_output"), ("mlp", "ffn_down"))
            if name in layer.biases - config_biases
        ]
        different |= ({ADDED_BIASES: added} if added else {}) | ({"skip": layer.removed} if layer.removed else {})
        if different:
            per_layer[str(index)] = different
    if not per_layer:
        return widths
    # transformers' schema requires a global value beside a per-layer one.
    added_biases: dict[str, Any] = {ADDED_BIASES: []} if any(ADDED_BIASES in own for own in per_layer.values()) else {}
    return widths | added_biases | {"per_layer_config": per_layer}


def _find_most_frequent(values: Sequence[Any]) -> Any:
    """The most frequent value, and of several the first."""
    return max(values, key=values.count)
