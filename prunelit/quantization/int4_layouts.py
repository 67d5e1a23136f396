"""Layouts of 4-bit linears in safetensors. All hold eight codes in a word of 32 bits, the first in the lowest bits.

`metal`, transformers' name for the one whose groups begin anywhere, W~ = scales * code + qbiases:

    weight    uint32 [O, I / 8]   codes
    scales    [O, I / S]          alpha
    qbiases   [O, I / S]          zero, in the units of the weight

It is the only 4-bit layout of transformers with a float offset that can be saved and that loads on any device without a
quantisation package: with kernels on Apple GPUs, as plain linears in the dtype of `scales` elsewhere.

`compressed-tensors` in its format "pack-quantized", which vLLM has kernels for, W~ = weight_scale * (code - point):

    weight_packed       int32 [O, I / 8]       codes
    weight_scale        [O, I / S]             alpha
    weight_zero_point   int32 [O / 8, I / S]   points, whole numbers in 0..15, packed along the rows; none: all are 8
    weight_shape        int64 [2]              O, I

Legend: O outputs, I inputs, S group size.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunelit.quantization.int4 import pack_codes
from prunelit.quantization.integer_zeros import compute_points, compute_zeros

CODES_PER_WORD = 8
"""Codes in one word; group sizes are multiples of it."""


class Int4Layout(NamedTuple):
    """A layout of 4-bit linears.

    Attributes:
        method: `quant_method` in config.json.
        suffixes: names of the tensors of a linear after its own name, the codes first, then what must be there too.
        optional: names of further tensors, which may lack.
        list_shapes: (O, I, S) -> shape by suffix.
        offsets: all suffixes but the first, in words, for messages.
        group_sizes: that its readers take; None: all multiples of 8.
        rows_per_word: the rows of a linear are multiples of it.
        make_settings: (group size, names of plain linears) -> `quantization_config`.
        find_group_size: `quantization_config` -> group size, unchecked; None for other bits or another format.
        pack: (codes uint8 [O, I / 2], scale [O, G], zero [O, G], dtype of the offsets) -> tensors by their suffixes.
        unpack: tensors by suffix -> (codes uint8 [O, I / 2], scale [O, G], zero [O, G], both float32).

    Example:
        >>> METAL.make_settings(32, ["lm_head"])["group_size"]
        32
    """

    method: str
    suffixes: tuple[str, ...]
    optional: tuple[str, ...]
    list_shapes: Callable[[int, int, int], dict[str, tuple[int, ...]]]
    offsets: str
    group_sizes: tuple[int, ...] | None
    rows_per_word: int
    make_settings: Callable[[int, Collection[str]], dict[str, Any]]
    find_group_size: Callable[[Mapping[str, Any]], Any]
    pack: Callable[[Tensor, Tensor, Tensor, torch.dtype], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor, Tensor]]


def _list_metal_shapes(rows: int, width: int, group_size: int) -> dict[str, tuple[int, ...]]:
    offsets = rows, width // group_size
    return {"weight": (rows, width // CODES_PER_WORD), "scales": offsets, "qbiases": offsets}


def _make_metal_settings(group_size: int, plain_linears: Collection[str]) -> dict[str, Any]:
    settings = {"quant_method": "metal", "bits": 4, "group_size": group_size}
    return {**settings, "modules_to_not_convert": [*plain_linears]}


def _find_metal_group_size(settings: Mapping[str, Any]) -> Any:
    return (settings.get("group_size") or 0) if settings.get("bits") == 4 else None


def _pack_metal(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": codes.contiguous().view(torch.uint32), "scales": scale.to(dtype), "qbiases": zero.to(dtype)}


def _unpack_metal(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return tensors["weight"].clone().view(torch.uint8), tensors["scales"].float(), tensors["qbiases"].float()


METAL = Int4Layout(
    "metal",
    ("weight", "scales", "qbiases"),
    (),
    _list_metal_shapes,
    "scales and qbiases",
    None,
    1,
    _make_metal_settings,
    _find_metal_group_size,
    _pack_metal,
    _unpack_metal,
)


def _list_compressed_shapes(rows: int, width: int, group_size: int) -> dict[str, tuple[int, ...]]:
    groups = width // group_size
    return {
        "weight_packed": (rows, width // CODES_PER_WORD),
        "weight_scale": (rows, groups),
        "weight_zero_point": (-(-rows // CODES_PER_WORD), groups),
    }


def _make_compressed_settings(group_size: int, plain_linears: Collection[str]) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
    group = {"targets": ["Linear"], "weights": {**weights, "dynamic": False}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "input_activations": None, "output_activations": None}},
        "ignore": [*plain_linears],
        # transformers: plain linears; compressed-tensors 0.20 cannot run those with points packed
        "dequantize": True,
    }


def _find_compressed_group_size(settings: Mapping[str, Any]) -> Any:
    groups = settings.get("config_groups")
    if settings.get("format") != "pack-quantized" or not isinstance(groups, Mapping) or len(groups) != 1:
        return None
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or group.get("input_activations") or weights.get("actorder"):
        return None
    kind = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy", "group")
    return (weights.get("group_size") or 0) if kind == (4, "int", "group") else None


def _pack_compressed(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    packed_points = pack_codes(compute_points(scale, zero).T, CODES_PER_WORD)
    return {
        "weight_packed": codes.contiguous().view(torch.int32),
        "weight_scale": scale.to(dtype),
        "weight_zero_point": packed_points.flatten().view(torch.int32).view(len(packed_points), -1).T.contiguous(),
        "weight_shape": torch.tensor([len(codes), 2 * codes.shape[1]]),
    }


def _unpack_compressed(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    scale = tensors["weight_scale"].float()
    if (packed := tensors.get("weight_zero_point")) is None:
        points = torch.full_like(scale, 8)
    else:
        bytes_ = packed.T.flatten().view(torch.uint8).view(packed.shape[1], -1)
        points = torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten(1).T[: len(scale)]
    return tensors["weight_packed"].clone().view(torch.uint8), scale, compute_zeros(scale, points)


COMPRESSED_TENSORS = Int4Layout(
    "compressed-tensors",
    ("weight_packed", "weight_scale"),
    ("weight_zero_point",),
    _list_compressed_shapes,
    "weight_scale",
    (32, 64, 128),
    CODES_PER_WORD,
    _make_compressed_settings,
    _find_compressed_group_size,
    _pack_compressed,
    _unpack_compressed,
)
LAYOUTS = {layout.method: layout for layout in (METAL, COMPRESSED_TENSORS)}
