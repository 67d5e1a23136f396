"""Group-wise asymmetric INT4 linears, and adapters that merge into them without loss (SAAP 3.5; QA-LoRA).

The weight [O, I] is cut along its inputs into groups of S columns, G = ceil(I / S). Every (row, group) has a scale
alpha = (max - min) / 15 and codes q in 0..15. Where the papers keep a floating zero point beta and write
alpha (q - beta), `zero` here is -alpha beta, in the units of the weight:

    W~ = alpha q + zero

The weights are the same, but nothing is divided by alpha: a constant group (alpha 0) is exact, and merging an adapter
is one addition.

Legend: O outputs, I inputs, S group size, G groups, r rank.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from prunelit.runtime.errors import BadOption

GROUP_SIZES = (16, 32, 64, 128)
MAX_CODE = 15
"""Largest 4-bit code."""


def check_group_size(group_size: int) -> None:
    """Check that the group size is one of GROUP_SIZES.

    Raises:
        BadOption: lists the sizes to choose from.

    Example:
        >>> check_group_size(32)
    """
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise BadOption(f"group_size: expected one of {sizes} (inputs per INT4 group), got {group_size!r}")


def compute_error_bound(group_size: int) -> float:
    """Compute the largest relative Frobenius error of min-max rounding to 4 bits, for weights of any distribution.

    Rounding errors spread evenly over a step have the mean square alpha^2 / 12, so a group adds S range^2 / (12 15^2);
    the sum of squares of its weights is at least max^2 + min^2 >= range^2 / 2. The quotient is S / 1350. For normally
    distributed weights the error is near half of the bound; an error above the bound shows a defect.

    Args:
        group_size: S.

    Example:
        >>> round(compute_error_bound(32), 3)
        0.154
    """
    return (group_size / (6 * MAX_CODE**2)) ** 0.5


@torch.no_grad()
def round_to_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight to 4 bits by the minimum and maximum of every row's groups.

    Args:
        weight: [O, I], floating point.
        group_size: S; if it does not divide I, the last group is narrower.

    Returns:
        Codes, uint8 [O, I] in 0..15; scale and zero, float32 [O, G]. Every weight is at most scale / 2 away from
        scale * code + zero; groups of one value are exact.

    Raises:
        BadOption: the group size is not one of GROUP_SIZES.

    Example:
        >>> codes, scale, zero = round_to_int4(torch.arange(16.0)[None], group_size=16)
        >>> codes.tolist(), scale.item(), zero.item()
        ([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]], 1.0, 0.0)
    """
    check_group_size(group_size)
    rows, width = weight.shape
    missing = -width % group_size
    values = weight.detach().float()
    if missing:  # repeat the last column, which changes neither minimum nor maximum
        values = torch.cat([values, values[:, -1:].expand(-1, missing)], 1)
    grouped = values.reshape(rows, -1, group_size)
    low, high = grouped.aminmax(dim=-1)
    scale = (high - low) / MAX_CODE
    steps = torch.where(scale > 0, scale, 1.0)[..., None]
    codes = ((grouped - low[..., None]) / steps).round_().clamp_(0, MAX_CODE).to(torch.uint8)
    return codes.view(rows, -1)[:, :width], scale, low


def pack_codes(codes: Tensor, group_size: int) -> Tensor:
    """Pack two codes into a byte, the even column in the low half.

    Args:
        codes: uint8 [O, I] in 0..15.
        group_size: S; the last group is filled up with code 0.

    Returns:
        uint8 [O, G S / 2].

    Example:
        >>> pack_codes(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), group_size=4).tolist()
        [[33, 3]]
    """
    padded = functional.pad(codes, (0, -codes.shape[1] % group_size))
    return padded[:, ::2] | padded[:, 1::2] << 4


def _unpack_weight(packed: Tensor, scale: Tensor, zero: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Compute the weight [O, I] of packed codes, in float32."""
    rows, groups = scale.shape
    weight = torch.empty(*packed.shape, 2, dtype=torch.float32, device=packed.device)
    weight[..., 0], weight[..., 1] = packed & 15, packed >> 4
    weight = weight.view(rows, groups, -1).mul_(scale[..., None]).add_(zero[..., None])
    return weight.view(rows, -1)[:, :width].to(dtype)


class _Int4Product(torch.autograd.Function):
    """x W~^T with a gradient for x only. Backward unpacks again, so no unpacked weight is kept between the passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(packed, scale, zero)
        ctx.width = width
        with torch.autocast(x.device.type, enabled=False):
            return x @ _unpack_weight(packed, scale, zero, width, x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        packed, scale, zero = ctx.saved_tensors
        return gradient @ _unpack_weight(packed, scale, zero, ctx.width, gradient.dtype), None, None, None, None


class Int4Linear(nn.Module):
    """A frozen linear with 4-bit codes: y = x W~^T + b, with gradients for x and b only.

    Args:
        in_features: I; does not have to be a multiple of the group size.
        out_features: O.
        group_size: S, one of GROUP_SIZES.
        bias: whether it has a bias, a parameter.
        compute_dtype: dtype of the product; None: the dtype of the input, or of autocast.
        device: of all tensors.

    Attributes:
        packed: buffer, uint8 [O, G S / 2], two codes per byte.
        scale: buffer, float32 [O, G]; stays float32 when the module is cast.
        zero: buffer, float32 [O, G]; stays float32 when the module is cast.

    Raises:
        BadOption: the group size is not one of GROUP_SIZES.

    Example:
        >>> linear = Int4Linear.from_weight(torch.arange(16.0)[None], group_size=16)
        >>> linear(torch.ones(1, 16))
        tensor([[120.]])
        >>> linear.dequantize_weight().shape
        torch.Size([1, 16])
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = 32,
        bias: bool = False,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        check_group_size(group_size)
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.compute_dtype = compute_dtype
        groups = -(-in_features // group_size)
        bytes_per_row = groups * group_size // 2
        self.register_buffer("packed", torch.zeros(out_features, bytes_per_row, dtype=torch.uint8, device=device))
        for name in ("scale", "zero"):
            self.register_buffer(name, torch.zeros(out_features, groups, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: nn.Parameter | None = None,
        group_size: int = 32,
        compute_dtype: torch.dtype | None = None,
    ) -> "Int4Linear":
        """Quantise a weight [O, I]; the bias [O] is used as it is.

        Raises:
            BadOption: the group size is not one of GROUP_SIZES.
        """
        codes, scale, zero = round_to_int4(weight, group_size)
        return cls.from_parts(pack_codes(codes, group_size), scale, zero, weight.shape[1], bias, compute_dtype)

    @classmethod
    def from_parts(
        cls,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor,
        in_features: int,
        bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> "Int4Linear":
        """Build a linear from its tensors (see the class), with any group size, as files have them."""
        linear = cls(in_features, len(packed), GROUP_SIZES[0], False, compute_dtype, "meta")
        linear.group_size = 2 * packed.shape[1] // scale.shape[1]
        linear.packed, linear.scale, linear.zero, linear.bias = packed, scale, zero, bias
        return linear

    def dequantize_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute the weight W~ [O, I]."""
        return _unpack_weight(self.packed, self.scale, self.zero, self.in_features, dtype)

    @torch.no_grad()
    def add_to_zeros(self, update: Tensor) -> None:
        """Add to the zero of every group [O, G]: all weights of a group change by the same amount, without rounding."""
        self.zero += update.to(self.zero.device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O] in the dtype of x, or of autocast."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        compute_dtype = self.compute_dtype or dtype
        y = cast(Tensor, _Int4Product.apply(x.to(compute_dtype), self.packed, self.scale, self.zero, self.in_features))
        if self.bias is not None:
            y = y + self.bias.to(compute_dtype)
        return y.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int4Linear":
        # Casting the model (`.to(bfloat16)`, precision="bf16-true") would round the scales. Casts skip integers, so the
        # scales are seen as integers meanwhile.
        for name in ("scale", "zero"):
            setattr(self, name, getattr(self, name).view(torch.int32))
        super()._apply(fn, recurse)
        for name in ("scale", "zero"):
            setattr(self, name, getattr(self, name).view(torch.float32))
        return self

    def extra_repr(self) -> str:
        """Describe the module for `repr`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}"
        )


class GroupLora(nn.Module):
    """A low-rank adapter on an INT4 linear that pools every group of inputs (QA-LoRA, arXiv 2309.14717).

        y = W~ x + s B A pool(x),   s = alpha / r,   pool(x)[g] = sum of the inputs of group g / S

    The sum is divided by S in a narrower last group too, so that the update is (B A)[o, g] s / S for every input of a
    group, which is what `merge` adds to the group's zero. A [r, G] starts Xavier uniform, B [O, r] at zero; float32.

    Args:
        base_layer: the INT4 linear.
        rank: r.
        alpha: the update is scaled by alpha / r.
        dropout: on the pooled inputs.

    Example:
        >>> adapter = GroupLora(Int4Linear.from_weight(torch.arange(16.0)[None], group_size=16), rank=1, alpha=1)
        >>> adapter(torch.ones(1, 16)).item()  # B starts at zero
        120.0
        >>> isinstance(adapter.merge(), Int4Linear)
        True
    """

    def __init__(self, base_layer: Int4Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.rank, self.scaling = rank, alpha / rank
        self.dropout = nn.Dropout(dropout)
        outputs, groups = base_layer.scale.shape
        device = base_layer.scale.device
        self.lora_A = nn.Parameter(torch.empty(rank, groups, device=device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, device=device))
        nn.init.xavier_uniform_(self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        size = self.base_layer.group_size
        padded = functional.pad(x, (0, -self.in_features % size))
        pooled = padded.unflatten(-1, (-1, size)).mean(-1, dtype=self.lora_A.dtype)
        y = cast(Tensor, self.base_layer(x))
        update = functional.linear(functional.linear(self.dropout(pooled), self.lora_A), self.lora_B)
        return y + (self.scaling * update).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> Int4Linear:
        """Add the adapter to the zeros of its INT4 linear, in place; the adapter is zero afterwards.

        Codes and scales stay as they are, no weight is unpacked, and outputs are the same up to float32 rounding.

        Returns:
            The INT4 linear.
        """
        update = self.lora_B.float() @ self.lora_A.float()
        self.base_layer.add_to_zeros(self.scaling / self.base_layer.group_size * update)
        self.lora_B.zero_()
        return self.base_layer

    def extra_repr(self) -> str:
        """Describe the module for `repr`."""
        return f"rank={self.rank}, scaling={self.scaling:g}"
