"""Seconds of a decoder layer at other widths: a small table, measured on this machine with the model's own code.

One layer of each distinct shape is run at a few numbers of heads and a few FFN widths, as copies of the model cut down
to that layer by `prunelit.model.surgery`; the model itself is not touched. Between the points the table is linear, and it
never falls with the width.

Legend: Q query heads, F FFN channels.
"""

import bisect
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn

from prunelit.core.plan import LayerPlan, LayerShape, PruningPlan
from prunelit.core.scores import Unit
from prunelit.model import surgery
from prunelit.model.context_length import get_context_limit
from prunelit.model.decoder import Decoder
from prunelit.model.modes import use_eval_mode
from prunelit.model.per_layer import find
from prunelit.runtime.distributed import get_rank
from prunelit.runtime.errors import BadOption
from prunelit.runtime.timing import run_in_rounds

LatencyMode = Literal["prefill", "decode"]
Curve = list[list[float]]
"""[[width, seconds], ...], widths ascending, seconds never falling."""
Timer = Callable[[nn.Module, int], Callable[[], float]]
"""(a causal LM, the number of one of its layers) -> what runs the model once and returns that layer's seconds."""


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds of the layers of one model on one machine.

    Attributes:
        curves: for each shape, seconds of the attention block over its query heads and of the FFN over its channels.
        record: the same as plain data, with how it was measured, for the plan.
    """

    curves: dict[LayerShape, tuple[Curve, Curve]]
    record: dict[str, Any]

    def estimate_seconds(self, shape: LayerShape, query_heads: int, kv_groups: int, ffn_channels: int) -> float:
        """Seconds of a layer at these widths; KV groups follow the heads as in the measurement. A `rank.Cost`."""
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
    """Measure the layers of a model at a few widths. In a distributed run rank zero does, and all ranks get its table.

    Args:
        decoder: the model; left as it is.
        unit: what attention is cut by, see `prunelit.planning.budget.select_units`: the table follows heads and KV groups on that path.
        align: measured FFN widths are multiples of this.
        mode: "prefill" reads `tokens` tokens at once; "decode" reads one token after `tokens` others.
        tokens: fewer where the model's positions end before.
        points: widths per block, spread evenly from nothing (not measured) to all.
        repeats: runs per width, one width after another in every round; the median counts.
        timer: runs and times a model's layer, see `Timer`; default: by the clock.

    Raises:
        BadOption: an unknown mode, or a count below 1.
    """
    for name, value in (("tokens", tokens), ("points", points), ("repeats", repeats)):
        if value < 1:
            raise BadOption(f"{name}: expected at least 1, got {value}")
    if mode not in ("prefill", "decode"):
        raise BadOption(f"mode: expected prefill or decode, got {mode!r}")
    curves: list[tuple[Curve, Curve]] = []
    distinct = list(dict.fromkeys(layer.shape for layer in decoder))
    limit = get_context_limit(decoder.config) or tokens + repeats + 1
    length = max(1, min(tokens, limit - repeats - 1))
    if get_rank() == 0:
        clock = timer or partial(_make_layer_timer, mode, length)
        curves = [_measure_curves(decoder, shape, unit, align, points, repeats, clock) for shape in distinct]
    if dist.is_initialized():
        box = [curves]
        dist.broadcast_object_list(box, src=0)
        curves = box[0]
    layers = [layer.shape for layer in decoder]
    record = {
        "mode": mode,
        "tokens": length,
        "device": _get_device_name(decoder.device),
        "dtype": str(next(decoder.model.parameters()).dtype).removeprefix("torch."),
        "unit": unit,
        "tables": [
            {
                "layers": [index for index, each in enumerate(layers) if each == shape],
                "heads_seconds": attention,
                "channels_seconds": ffn,
            }
            for shape, (attention, ffn) in zip(distinct, curves, strict=True)
        ],
    }
    return LatencyTable(dict(zip(distinct, curves, strict=True)), record)


def _measure_curves(
    decoder: Decoder, shape: LayerShape, unit: Unit, align: int, points: int, repeats: int, timer: Timer
) -> tuple[Curve, Curve]:
    """Seconds of attention over query heads, and of the FFN over channels, of one layer of this shape."""
    rungs = shape.kv_groups if unit == "kv_group" else shape.group_size
    numbers = _spread_widths(rungs, points, 1)
    kept = [_keep_first_units(shape, unit, number, 0) for number in numbers if shape.heads_prunable or number == rungs]
    # The FFN's own time is what it adds to the layer with the smallest attention.
    small = kept[0] if kept else LayerPlan((), (), ())
    widths = _spread_widths(shape.ffn_channels, points, align)
    kept += [LayerPlan(small.query_heads, small.kv_groups, tuple(range(width))) for width in widths]
    runs = [timer(*_isolate_layer(decoder, shape, plan)) for plan in kept]
    found = [statistics.median(seen) for seen in run_in_rounds(runs, repeats, "measuring latency")]
    heads = len(found) - len(widths)
    base = found[0] if heads else 0.0
    attention = [(len(plan.query_heads), seconds) for plan, seconds in zip(kept[:heads], found[:heads], strict=True)]
    ffn = [(width, seconds - base) for width, seconds in zip(widths, found[heads:], strict=True)]
    return _fit_monotone_curve(attention), _fit_monotone_curve(ffn)


def _spread_widths(size: int, points: int, align: int) -> list[int]:
    """Up to `points` widths from the smallest that may stay to `size`, multiples of `align` but for the last."""
    wanted = [size * number / points for number in range(1, points)]
    inner = {max(align, round(width / align) * align) for width in (align if size else 0, *wanted)}
    return sorted({width for width in inner if width < size} | ({size} if size else set()))


def _keep_first_units(shape: LayerShape, unit: Unit, number: int, channels: int) -> LayerPlan:
    """A layer that keeps its first KV groups, or the first heads of every group, and its first channels."""
    groups = range(number if unit == "kv_group" else shape.kv_groups)
    in_group = range(shape.group_size if unit == "kv_group" else number)
    heads = tuple(group * shape.group_size + head for group in groups for head in in_group)
    return LayerPlan(heads, tuple(groups), tuple(range(channels)))


def _isolate_layer(decoder: Decoder, shape: LayerShape, kept: LayerPlan) -> tuple[nn.Module, int]:
    """A copy of the model with one layer of this shape, cut; it shares every weight that is not cut. And its number.

    A layer without attention brings the first layer that has one along: without any, there is no cache.
    """
    index = next(layer.index for layer in decoder if layer.shape == shape)
    # Deep-copying modules but no tensors costs no memory, and the cut makes new tensors.
    tensors = [*decoder.model.parameters(), *decoder.model.buffers()]
    model = copy.deepcopy(decoder.model, {id(tensor): tensor for tensor in tensors})
    layers = [LayerPlan((), (), ())] * len(decoder.layers)
    layers[index] = kept
    if kept.attention_removed:
        helper = next((layer for layer in decoder if layer.has_attention), None)
        if helper is not None:
            layers[helper.index] = _keep_first_units(helper.shape, "kv_group", helper.shape.kv_groups, 0)
    surgery.apply(model, PruningPlan("latency", Decoder(model).shape, tuple(layers)))
    return model, sum(not plan.removed for plan in layers[:index])


def _make_layer_timer(mode: LatencyMode, length: int, model: nn.Module, index: int) -> Callable[[], float]:
    """The default `Timer`: wall clock from a layer's first to its last operation, finished on the device."""
    decoder = Decoder(model)
    layer = cast(nn.ModuleList, find(model, decoder.architecture.layers))[index]
    device = decoder.device
    ids = (torch.arange(length + 1, device=device)[None] * 7 + 3) % int(decoder.config.vocab_size)
    state: dict[str, Any] = {"cache": None}
    stamps: list[float] = []

    def stamp(*args: Any) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        stamps.append(time.perf_counter())

    def run() -> float:
        stamps.clear()
        handles = [layer.register_forward_pre_hook(stamp), layer.register_forward_hook(stamp)]
        try:
            with torch.no_grad(), use_eval_mode(model):
                if mode == "prefill":
                    decoder.backbone(input_ids=ids[:, :length], use_cache=False)
                else:  # the cache grows by one token a run
                    decoder.backbone(input_ids=ids[:, -1:], past_key_values=state["cache"], use_cache=True)
        finally:
            for handle in handles:
                handle.remove()
        return stamps[1] - stamps[0]

    if mode == "decode":
        with torch.no_grad(), use_eval_mode(model):
            state["cache"] = decoder.backbone(input_ids=ids[:, :length], use_cache=True).past_key_values
    return run


def _fit_monotone_curve(points: Sequence[tuple[int, float]]) -> Curve:
    """The nearest curve (least squares) that starts at zero and never falls: widths out of order share their mean."""
    pools: list[list[float]] = []  # [sum, count]
    for _, seconds in points:
        pools.append([max(0.0, seconds), 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    smooth = [total / count for total, count in pools for _ in range(int(count))]
    return [[0, 0.0], *([width, seconds] for (width, _), seconds in zip(points, smooth, strict=True))]


def _interpolate_curve(curve: Curve, width: int) -> float:
    """Linear between the points."""
    right = min(bisect.bisect_left([point[0] for point in curve], width), len(curve) - 1)
    if curve[right][0] <= width:
        return curve[right][1]
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (width - x0) / (x1 - x0)


def _get_device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
