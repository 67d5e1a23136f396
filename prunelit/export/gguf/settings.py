"""What llama.cpp's graphs of single families compute beside Llama's layers: scales, windows, layers without rope.

llama.cpp has most of it in its code and reads some numbers from the file. A model that has it otherwise, such as one
whose sliding layers are no longer every second one after a cut, is refused here in one line.
"""

from typing import Any, NamedTuple

from prunelit.export.llama_layers import compute_context_limit, get_head_dim, get_model_family, has_tied_embeddings
from prunelit.model.decoder import Decoder
from prunelit.runtime.errors import DoesNotFit

SILU = ("silu", "swish")
GELU = ("gelu_pytorch_tanh",)
"""Names of the activations that graphs compute."""
_LOCAL_ROPE_THETA = 10000.0


class GraphSettings(NamedTuple):
    """What a graph computes, where it is not as in Llama.

    Attributes:
        activation: names of its activation.
        post_norms: it has norms behind attention and FFN.
        joins_inputs: queries, keys and values are one tensor, and so are gate and up.
        needs_tied: the token table is the output head.
        multipliers: it reads Granite's multipliers.
        softcaps: it reads Gemma 2's limits of logits.
        window_interval: every so many layers one has no sliding window; 0: it has no windows.
        two_ropes: layers with a window have a rope of their own.
        no_rope_interval: every so many layers one has no rope; 0: all have.
        scaled_by_heads: number of layers with which queries are divided by the root of H / Q instead of D; 0: never.

    Example: see `prunelit.export.gguf.layout.GRAPHS`.
    """

    activation: tuple[str, ...] = SILU
    post_norms: bool = False
    joins_inputs: bool = False
    needs_tied: bool = False
    multipliers: bool = False
    softcaps: bool = False
    window_interval: int = 0
    two_ropes: bool = False
    no_rope_interval: int = 0
    scaled_by_heads: int = 0


def check_graph_settings(decoder: Decoder, settings: GraphSettings) -> None:
    """Check that a graph computes what the config of a model says.

    Args:
        decoder: the model.
        settings: of the graph of its family.

    Raises:
        DoesNotFit: it computes something else; the message names the setting.

    Example: see `prunelit.export.gguf.layout.choose_graph`.
    """
    config, count = decoder.config, len(decoder.layers)
    if settings.needs_tied and not has_tied_embeddings(decoder.model):
        _refuse(decoder, "an output head that is the token table", "one of its own")
    if settings.no_rope_interval:
        expected = [int((index + 1) % settings.no_rope_interval != 0) for index in range(count)]
        if list(config.no_rope_layers) != expected:
            _refuse(decoder, f"no_rope_layers = {expected}", str(list(config.no_rope_layers)))
    if settings.softcaps and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        _refuse(decoder, "attn_logit_softcapping and final_logit_softcapping", "None")
    if not settings.softcaps and getattr(config, "final_logit_softcapping", None) is not None:
        _refuse(decoder, "final_logit_softcapping = None", str(config.final_logit_softcapping))
    if getattr(config, "use_bidirectional_attention", None):
        _refuse(decoder, "attention to earlier tokens", "bidirectional attention")
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None:
        shape = next(layer.shape for layer in decoder if layer.has_attention)
        by_heads = settings.scaled_by_heads == count
        expected_scalar = config.hidden_size / shape.query_heads if by_heads else get_head_dim(decoder)
        if scalar != expected_scalar:
            _refuse(decoder, f"query_pre_attn_scalar = {expected_scalar:g}", f"{scalar:g}")
    if settings.two_ropes:
        if not _has_usual_windows(decoder, settings):
            expected_layers = f"every layer but each {settings.window_interval}th with a sliding window"
            _refuse(decoder, expected_layers, "other layers, or layers that were removed")
        ropes = config.rope_parameters
        for name, kinds in (("sliding_attention", ("default",)), ("full_attention", ("default", "linear"))):
            if (kind := ropes[name].get("rope_type", "default")) not in kinds:
                _refuse(decoder, f"rope_type {' or '.join(kinds)} in {name}", repr(kind))
        if (theta := float(ropes["sliding_attention"]["rope_theta"])) != _LOCAL_ROPE_THETA:
            _refuse(decoder, f"rope_theta = {_LOCAL_ROPE_THETA:g} in sliding_attention", f"{theta:g}")


def _refuse(decoder: Decoder, expected: str, got: str) -> None:
    raise DoesNotFit(
        f"format 'gguf': expected {expected}, which llama.cpp's {get_model_family(decoder)} graph computes, got {got}; "
        "use format 'uniform' or 'hetero'"
    )


def _has_usual_windows(decoder: Decoder, settings: GraphSettings) -> bool:
    """Whether the layers with a sliding window are those of the graph."""
    interval = settings.window_interval
    if not interval:
        return False
    expected = ["sliding_attention" if (i + 1) % interval else "full_attention" for i in range(len(decoder.layers))]
    return list(getattr(decoder.config, "layer_types", None) or []) == expected


def compute_file_context(decoder: Decoder, settings: GraphSettings) -> int:
    """Compute the number of tokens up to which a graph computes what the model does.

    Args:
        decoder: the model.
        settings: of the graph.

    Returns:
        The context length of the model, or its sliding window where the graph has no window in the same layers.

    Example: see `prunelit.export.gguf.writer`, which uses it.
    """
    if _has_usual_windows(decoder, settings):
        return int(decoder.config.max_position_embeddings)
    return compute_context_limit(decoder)


def write_graph_settings(writer: Any, decoder: Decoder, settings: GraphSettings) -> None:
    """Write rope, windows and scales to a `gguf.GGUFWriter` as metadata.

    Example: see `prunelit.export.gguf.writer`, which uses it.
    """
    config = decoder.config
    rope = config.rope_parameters["full_attention"] if settings.two_ropes else config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if settings.two_ropes and rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if settings.window_interval:
        writer.add_sliding_window(int(config.sliding_window))
    if settings.softcaps:
        writer.add_attn_logit_softcapping(float(config.attn_logit_softcapping))
        writer.add_final_logit_softcapping(float(config.final_logit_softcapping))
    if settings.multipliers:
        writer.add_attention_scale(float(config.attention_multiplier))
        writer.add_embedding_scale(float(config.embedding_multiplier))
        writer.add_residual_scale(float(config.residual_multiplier))
        writer.add_logit_scale(float(config.logits_scaling))
