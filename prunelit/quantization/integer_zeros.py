"""4-bit groups whose zero is a code, as the kernels of vLLM and others need it.

    W~ = alpha (q - p),   q and p whole numbers in 0..15

In the terms of `prunelit.quantization.int4`, `zero` is -alpha p. Its own groups begin at any number, so taking them
over shifts every group by up to alpha / 2. A weight in full precision is rounded in groups that hold the number 0.

Legend: O outputs, I inputs, S group size, G groups.
"""

import torch
from torch import Tensor, nn

from prunelit.quantization.int4 import MAX_CODE, Int4Linear, pack_codes
from prunelit.runtime.errors import BadQuantisation


def compute_points(scale: Tensor, zero: Tensor) -> Tensor:
    """Compute the codes that stand for the number 0, uint8 [O, G].

    Args:
        scale: [O, G].
        zero: [O, G], in the units of the weight.

    Example:
        >>> compute_points(torch.tensor([[0.5]]), torch.tensor([[-2.0]])).item()
        4
    """
    return (-zero / torch.where(scale > 0, scale, 1.0)).round().clamp(0, MAX_CODE).to(torch.uint8)


def compute_zeros(scale: Tensor, points: Tensor) -> Tensor:
    """Compute `zero` of groups [O, G], in the units of the weight, from the codes that stand for the number 0.

    Example:
        >>> compute_zeros(torch.tensor([[0.5]]), torch.tensor([[4]])).item()
        -2.0
    """
    return -(scale * points)


@torch.no_grad()
def round_with_integer_zeros(weight: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight to 4 bits, with groups in which the number 0 is a code.

    Args:
        weight: [O, I], floating point.
        group_size: S; if it does not divide I, the last group is narrower.
        dtype: that the scales are stored in; they are rounded to it before the codes are chosen.

    Returns:
        Codes, uint8 [O, I] in 0..15; scale and zero, float32 [O, G].

    Example:
        >>> codes, scale, zero = round_with_integer_zeros(torch.arange(-5.0, 11)[None], 16, torch.float32)
        >>> codes[0, :3].tolist(), scale.item(), zero.item()
        ([0, 1, 2], 1.0, -5.0)
    """
    rows, width = weight.shape
    values = nn.functional.pad(weight.detach().float(), (0, -width % group_size))
    grouped = values.view(rows, -1, group_size)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((high - low) / MAX_CODE).to(dtype).float()
    points = compute_points(scale, low)
    steps = torch.where(scale > 0, scale, 1.0)[..., None]
    codes = ((grouped / steps).round() + points[..., None]).clamp_(0, MAX_CODE).to(torch.uint8)
    return codes.view(rows, -1)[:, :width], scale, compute_zeros(scale, points)


def make_linear_with_integer_zeros(
    weight: Tensor, bias: nn.Parameter | None, group_size: int, compute_dtype: torch.dtype | None = None
) -> Int4Linear:
    """Quantise a weight [O, I] as `round_with_integer_zeros` does, with scales in its own dtype.

    Example:
        >>> linear = make_linear_with_integer_zeros(torch.arange(-5.0, 11)[None], None, group_size=16)
        >>> linear(torch.ones(1, 16))
        tensor([[40.]])
    """
    codes, scale, zero = round_with_integer_zeros(weight, group_size, weight.dtype)
    return Int4Linear.from_parts(pack_codes(codes, group_size), scale, zero, weight.shape[1], bias, compute_dtype)


def find_float_zeros(model: nn.Module) -> str | None:
    """Find the first 4-bit linear whose zeros are no codes, by its name; None where all are.

    Example:
        >>> linear = Int4Linear.from_weight(torch.tensor([[0.1, 0.7] * 8]), group_size=16)
        >>> find_float_zeros(nn.Sequential(linear))
        '0'
    """
    for name, linear in model.named_modules():
        if isinstance(linear, Int4Linear):
            nearest = compute_zeros(linear.scale, compute_points(linear.scale, linear.zero))
            if not torch.equal(nearest, linear.zero):
                return name
    return None


@torch.no_grad()
def round_zeros(model: nn.Module, dtype: torch.dtype) -> dict[str, float]:
    """Give every 4-bit linear of a model groups in which the number 0 is a code, in place.

    Codes and scales stay where the nearest code is in 0..15; other groups are rounded anew.

    Args:
        model: int4, without adapters.
        dtype: that the scales are stored in.

    Returns:
        Relative change |W' - W~| / |W~| in the Frobenius norm, by the name of the linear.

    Raises:
        BadQuantisation: no linear is in 4 bits.

    Example:
        >>> linear = Int4Linear.from_weight(torch.tensor([[-0.26, 0.49] * 8]), group_size=16)
        >>> changes = round_zeros(nn.Sequential(linear), torch.float32)
        >>> 0.02 < changes["0"] < 0.03, find_float_zeros(linear) is None
        (True, True)
    """
    changes = {}
    for name, linear in model.named_modules():
        if isinstance(linear, Int4Linear):
            weight = linear.dequantize_weight()
            codes, scale, zero = round_with_integer_zeros(weight, linear.group_size, dtype)
            own_points = -linear.zero / linear.scale
            is_kept = (own_points.round() >= 0) & (own_points.round() <= MAX_CODE)  # not where a scale is 0
            own_scale = linear.scale.to(dtype).float()
            own_zero = compute_zeros(own_scale, compute_points(linear.scale, linear.zero))
            packed = pack_codes(codes, linear.group_size).view(*scale.shape, -1)
            linear.packed = torch.where(is_kept[..., None], linear.packed.view_as(packed), packed).flatten(1)
            linear.scale = torch.where(is_kept, own_scale, scale)
            linear.zero = torch.where(is_kept, own_zero, zero)
            changes[name] = ((linear.dequantize_weight() - weight).norm() / weight.norm()).nan_to_num(0).item()
    if not changes:
        raise BadQuantisation("zeros: expected a model in 4 bits, got plain linears; quantise it first")
    return changes
