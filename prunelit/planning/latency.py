"""Measures seconds of a decoder layer at other widths: a small table, taken on this machine with the model's own code.

One layer of each distinct shape is run at a few numbers of heads and a few FFN widths. The runs use copies of the model
that `prunelit.model.surgery` has cut down to that layer; the model itself is not touched. Between the measured points
the table is linear, and it never falls as the width grows.

Legend: Q query heads, F FFN channels.
"""

import bisect
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, Literal, cast

import torch
from torch import nn

from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan
from prunelit.core.scores import Unit
from prunelit.model import surgery
from prunelit.model.context_length import get_context_limit
from prunelit.model.decoder import Decoder
from prunelit.model.modes import get_cache_name, use_eval_mode
from prunelit.model.per_layer import find
from prunelit.runtime.distributed import broadcast_from_rank_zero, get_rank
from prunelit.runtime.errors import BadOption
from prunelit.runtime.timing import run_in_rounds

LatencyMode = Literal["prefill", "decode"]
Curve = list[list[float]]
"""[[width, seconds], ...], widths ascending, seconds never falling."""
Timer = Callable[[nn.Module, int], Callable[[], float]]
"""(causal LM, index of one of its layers) -> a function that runs the model once and returns that layer's seconds."""


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds of the layers of one model on one machine.

    Attributes:
        curves: for each layer shape, seconds of the attention block over its query heads, and of the FFN over its
            channels.
        record: the same as plain data, with the conditions of the measurement; goes into the plan.

    Example:
        >>> layer = LayerShape(4, 2, 8, 32, 3, 256, 256, 48, 1552, 1552)
        >>> table = LatencyTable({layer: ([[0, 0.0], [4, 0.2]], [[0, 0.0], [32, 0.4]])}, {})
        >>> table.estimate_seconds(layer, query_heads=2, kv_groups=1, ffn_channels=16)
        0.30000000000000004
    """

    curves: dict[LayerShape, tuple[Curve, Curve]]
    record: dict[str, Any]

    def estimate_seconds(self, shape: LayerShape, query_heads: int, kv_groups: int, ffn_channels: int) -> float:
        """Interpolate the seconds of a layer at these widths; a `prunelit.core.scores.Cost`.

        KV groups are not looked at: they follow the query heads as in the measurement.
        """
        attention, ffn = self.curves[shape]
        return _interpolate_curve(attention, query_heads) + _interpolate_curve(ffn, ffn_channels)


@torch.no_grad()
def measure_latency_table(
    decoder: Decoder,
    unit: Unit = "kv_group",
    align: int = 64,
    mode: LatencyMode = "prefill",
    tokens: int = 512,
    points: int = 5,
    repeats: int = 9,
    timer: Timer | None = None,
) -> LatencyTable:
    """Measure the layers of a model at a few widths.

    In a distributed run rank zero measures, and all ranks get its table.

    Args:
        decoder: the model; it is not changed.
        unit: what attention is pruned by, see `prunelit.planning.budget.select_units`; the measured widths are those
            that this unit leads to.
        align: the measured FFN widths are multiples of this.
        mode: "prefill" reads `tokens` tokens at once; "decode" reads one token after `tokens` others.
        tokens: length of the text; fewer if the model has fewer positions.
        points: number of widths per block, spread evenly from zero (not measured) to the full width.
        repeats: runs per width. Each round runs every width once; the median counts.
        timer: runs and times a layer, see `Timer`; default: the wall clock.

    Raises:
        BadOption: the mode is unknown, or a count is below 1.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        >>> decoder = Decoder(LlamaForCausalLM(LlamaConfig(**sizes)))
        >>> table = measure_latency_table(decoder, tokens=4, points=1, repeats=1)
        >>> [width for width, seconds in table.record["tables"][0]["heads_seconds"]]
        [0, 1, 2]
    """
    for name, value in (("tokens", tokens), ("points", points), ("repeats", repeats)):
        if value < 1:
            raise BadOption(f"{name}: expected at least 1, got {value}")
    if mode not in ("prefill", "decode"):
        raise BadOption(f"mode: expected prefill or decode, got {mode!r}")
    curves: list[tuple[Curve, Curve]] = []
    distinct_shapes = list(dict.fromkeys(layer.shape for layer in decoder))
    # In mode "decode" the cache grows by one token with every run, and there is one run before those that count.
    limit = get_context_limit(decoder.config) or tokens + repeats + 1
    length = max(1, min(tokens, limit - repeats - 1))
    if get_rank() == 0:
        make_timer = timer or partial(_make_layer_timer, mode, length)
        curves = [
            _measure_curves(decoder, shape, unit, align, points, repeats, make_timer) for shape in distinct_shapes
        ]
    curves = broadcast_from_rank_zero(curves)
    layer_shapes = [layer.shape for layer in decoder]
    record = {
        "mode": mode,
        "tokens": length,
        "device": _get_device_name(decoder.device),
        "dtype": str(next(decoder.model.parameters()).dtype).removeprefix("torch."),
        "unit": unit,
        "tables": [
            {
                "layers": [index for index, other in enumerate(layer_shapes) if other == shape],
                "heads_seconds": attention,
                "channels_seconds": ffn,
            }
            for shape, (attention, ffn) in zip(distinct_shapes, curves, strict=True)
        ],
    }
    return LatencyTable(dict(zip(distinct_shapes, curves, strict=True)), record)


@torch.no_grad()
def measure_product_rate(device: torch.device, dtype: str = "auto", element_size: int = 4, repeats: int = 3) -> float:
    """Measure how many multiply-accumulates a second one matrix product reaches: a bound on how fast layers run.

    Args:
        device: that multiplies.
        dtype: "float32", "bfloat16", "float16"; "auto" goes by the size of an element.
        element_size: bytes, for "auto".
        repeats: products that count; the fastest counts.

    Example:
        >>> measure_product_rate(torch.device("cpu"), repeats=1) > 0
        True
    """
    chosen = getattr(torch, dtype) if dtype != "auto" else torch.float32 if element_size == 4 else torch.bfloat16
    rows, width, columns = (256, 1024, 1024) if device.type == "cpu" else (2048, 4096, 4096)
    left, right = (torch.ones(size, device=device, dtype=chosen) for size in ((rows, width), (columns, width)))

    def run() -> float:
        start = time.perf_counter()
        product = nn.functional.linear(left, right)
        product[-1, -1].item()  # waits for the device
        return time.perf_counter() - start

    (seconds,) = run_in_rounds([run], repeats, "measuring a matrix product")
    return rows * width * columns / min(seconds)


@torch.no_grad()
def measure_outside_seconds(decoder: Decoder, tokens: int = 512, repeats: int = 9) -> float:
    """Measure the seconds of one prefill outside the decoder layers: embeddings, last norm, head of the last token.

    In a distributed run rank zero measures, and all ranks get its number.

    Args:
        decoder: the model; it is not changed.
        tokens: length of the text; fewer if the model has fewer positions.
        repeats: runs; the median counts.

    Returns:
        Seconds of the whole model with one layer, without those of the layer.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
        >>> measure_outside_seconds(Decoder(LlamaForCausalLM(LlamaConfig(**sizes))), tokens=4, repeats=1) > 0
        True
    """
    seconds = 0.0
    if get_rank() == 0:
        first = next((layer for layer in decoder if layer.has_attention), decoder.layers[0])
        model, index = _isolate_layer(decoder, first.shape, LayerPlan.dense(first.shape))
        one_layer = Decoder(model)
        length = max(1, min(tokens, get_context_limit(decoder.config) or tokens))
        ids = (torch.arange(length, device=decoder.device)[None] * 7 + 3) % int(decoder.config.vocab_size)
        last_logits = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        layer = one_layer.layer_modules[index]
        stamps: list[float] = []

        def add_stamp(*args: Any) -> None:
            if decoder.device.type != "cpu":
                torch.accelerator.synchronize(decoder.device)
            stamps.append(time.perf_counter())

        def run() -> float:
            stamps.clear()
            handles = [layer.register_forward_pre_hook(add_stamp), layer.register_forward_hook(add_stamp)]
            try:
                add_stamp()
                with torch.no_grad(), use_eval_mode(model):
                    model(input_ids=ids, use_cache=False, **last_logits)
                add_stamp()
            finally:
                for handle in handles:
                    handle.remove()
            return stamps[3] - stamps[2] + stamps[1] - stamps[0]

        (measured,) = run_in_rounds([run], repeats, "measuring what is outside the layers")
        seconds = statistics.median(measured)
    return broadcast_from_rank_zero(seconds)


def _measure_curves(
    decoder: Decoder, shape: LayerShape, unit: Unit, align: int, points: int, repeats: int, timer: Timer
) -> tuple[Curve, Curve]:
    """Seconds of attention over query heads, and of the FFN over channels, of one layer of this shape."""
    most = shape.kv_groups if unit == "kv_group" else shape.group_size
    head_counts = [count for count in _spread_widths(most, points, 1) if shape.heads_prunable or count == most]
    attention_plans = [_keep_first_units(shape, unit, count, 0) for count in head_counts]
    # A layer without attention has no cache to decode with, so the FFN is timed beside the smallest attention, whose
    # own seconds are subtracted.
    smallest = attention_plans[0] if attention_plans else LayerPlan((), (), (), mixer=shape.has_mixer)
    widths = _spread_widths(shape.ffn_channels, points, align)
    ffn_plans = [replace(smallest, ffn_channels=tuple(range(width))) for width in widths]
    runs = [timer(*_isolate_layer(decoder, shape, plan)) for plan in attention_plans + ffn_plans]
    medians = [statistics.median(seconds) for seconds in run_in_rounds(runs, repeats, "measuring latency")]
    attention_seconds, ffn_seconds = medians[: len(attention_plans)], medians[len(attention_plans) :]
    base = attention_seconds[0] if attention_seconds else 0.0
    attention = [(len(plan.query_heads), value) for plan, value in zip(attention_plans, attention_seconds, strict=True)]
    ffn = [(width, value - base) for width, value in zip(widths, ffn_seconds, strict=True)]
    return _fit_monotone_curve(attention), _fit_monotone_curve(ffn)


def _spread_widths(size: int, points: int, align: int) -> list[int]:
    """Up to `points` widths from the smallest that may remain to `size`; all but the last are multiples of `align`."""
    even = [size * number / points for number in range(1, points)]
    inner = {max(align, round(width / align) * align) for width in (align if size else 0, *even)}
    return sorted({width for width in inner if width < size} | ({size} if size else set()))


def _keep_first_units(shape: LayerShape, unit: Unit, number: int, channels: int) -> LayerPlan:
    """Plan a layer that keeps its first KV groups, or the first heads of every group, and its first channels."""
    groups = range(number if unit == "kv_group" else shape.kv_groups)
    in_group = range(shape.group_size if unit == "kv_group" else number)
    heads = tuple(group * shape.group_size + head for group in groups for head in in_group)
    return LayerPlan(heads, tuple(groups), tuple(range(channels)), mixer=shape.has_mixer)


def _isolate_layer(decoder: Decoder, shape: LayerShape, plan: LayerPlan) -> tuple[nn.Module, int]:
    """Copy the model with one layer of this shape only, cut as planned; all weights that are not cut are shared.

    If the layer has no attention, the first layer that has one stays too, because a model without any has no KV cache.

    Returns:
        The copy, and the index of the layer in it.
    """
    index = next(layer.index for layer in decoder if layer.shape == shape)
    # A deep copy that shares the tensors takes no memory, and surgery replaces tensors instead of changing them.
    tensors = [*decoder.model.parameters(), *decoder.model.buffers()]
    model = copy.deepcopy(decoder.model, {id(tensor): tensor for tensor in tensors})
    layers = [LayerPlan.dense(each.shape) if each.shape.fixed else LayerPlan((), (), ()) for each in decoder]
    layers[index] = plan
    if plan.attention_removed:
        helper = next((layer for layer in decoder if layer.has_attention), None)
        if helper is not None:
            layers[helper.index] = _keep_first_units(helper.shape, "kv_group", helper.shape.kv_groups, 0)
    surgery.apply(model, PruningPlan("latency", Decoder(model).shape, tuple(layers)))
    return model, sum(not before.removed for before in layers[:index])


def _make_layer_timer(mode: LatencyMode, length: int, model: nn.Module, index: int) -> Callable[[], float]:
    """The default `Timer`: wall clock from a layer's first to its last operation, with the device synchronized."""
    decoder = Decoder(model)
    layer = cast(nn.ModuleList, find(model, decoder.architecture.layers))[index]
    device = decoder.device
    ids = (torch.arange(length + 1, device=device)[None] * 7 + 3) % int(decoder.config.vocab_size)
    cache: Any = None
    cache_name = get_cache_name(decoder.backbone)
    stamps: list[float] = []

    def add_stamp(*args: Any) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        stamps.append(time.perf_counter())

    def run() -> float:
        stamps.clear()
        handles = [layer.register_forward_pre_hook(add_stamp), layer.register_forward_hook(add_stamp)]
        try:
            with torch.no_grad(), use_eval_mode(model):
                if mode == "prefill":
                    decoder.backbone(input_ids=ids[:, :length], use_cache=False)
                else:  # the cache grows by one token with every run
                    decoder.backbone(input_ids=ids[:, -1:], **{cache_name: cache}, use_cache=True)
        finally:
            for handle in handles:
                handle.remove()
        return stamps[1] - stamps[0]

    if mode == "decode":
        with torch.no_grad(), use_eval_mode(model):
            cache = getattr(decoder.backbone(input_ids=ids[:, :length], use_cache=True), cache_name)
    return run


def _fit_monotone_curve(points: Sequence[tuple[int, float]]) -> Curve:
    """Fit the nearest curve (least squares) that starts at zero and never falls, by pooling adjacent violators."""
    pools: list[list[float]] = []  # [sum of seconds, number of points]
    for _, seconds in points:
        pools.append([max(0.0, seconds), 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    smooth = [total / count for total, count in pools for _ in range(int(count))]
    return [[0, 0.0], *([width, seconds] for (width, _), seconds in zip(points, smooth, strict=True))]


def _interpolate_curve(curve: Curve, width: int) -> float:
    """Read a curve at a width, linear between its points and constant after the last."""
    right = min(bisect.bisect_left([point[0] for point in curve], width), len(curve) - 1)
    if curve[right][0] <= width:
        return curve[right][1]
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (width - x0) / (x1 - x0)


def _get_device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
