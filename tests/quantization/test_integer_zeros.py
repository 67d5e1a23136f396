"""Groups in which the number 0 is a code: bounds of the rounding, and what the float zeros of INT4 linears become."""

import pytest
import torch
from torch import nn

from prunelit.quantization.int4 import GROUP_SIZES, Int4Linear
from prunelit.quantization.integer_zeros import (
    compute_points,
    compute_zeros,
    find_float_zeros,
    make_linear_with_integer_zeros,
    round_with_integer_zeros,
    round_zeros,
)
from prunelit.runtime.errors import BadQuantisation


def make_weight(kind: str) -> torch.Tensor:
    weight = torch.randn(12, 100)
    shifts = {"normal": 0.0, "positive": 9.0, "negative": -9.0}
    return torch.zeros(12, 100) if kind == "zero" else weight + shifts[kind]


@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "zero"])
@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_within_half_a_step(kind: str, size: int, dtype: torch.dtype) -> None:
    weight = make_weight(kind)
    codes, scale, zero = round_with_integer_zeros(weight, size, dtype)
    assert codes.max() <= 15 and torch.equal(scale.to(dtype).float(), scale)
    points = compute_points(scale, zero)
    assert torch.equal(compute_zeros(scale, points), zero)
    groups = torch.arange(100) // size
    rounded = (codes - points.float()[:, groups]) * scale[:, groups]
    slack = 0.5 if dtype == torch.float32 else 0.55  # a step that was rounded to 8 bits, fifteen times
    assert ((rounded - weight).abs() <= slack * scale[:, groups] + 1e-6).all()
    assert kind != "zero" or not rounded.any()


def test_a_linear_computes_with_them() -> None:
    weight = torch.randn(8, 40)
    linear = make_linear_with_integer_zeros(weight, nn.Parameter(torch.randn(8)), group_size=16)
    x = torch.randn(3, 40)
    assert torch.allclose(linear(x), x @ linear.dequantize_weight().T + linear.bias, atol=1e-6)
    assert find_float_zeros(nn.Sequential(linear)) is None
    assert (linear.dequantize_weight() - weight).norm() < 0.1 * weight.norm()


def test_float_zeros_move_to_the_nearest_code_and_codes_stay() -> None:
    linear = Int4Linear.from_weight(torch.randn(8, 64), None, 16)
    linear.zero += 0.3 * linear.scale * torch.randn_like(linear.zero)  # as adapters leave them
    packed, scale, weight = linear.packed.clone(), linear.scale.clone(), linear.dequantize_weight()
    model = nn.Sequential(linear)
    assert find_float_zeros(model) == "0"
    changes = round_zeros(model, torch.float32)
    shift = (linear.dequantize_weight() - weight).abs().view(8, 4, 16).amax(-1)
    assert torch.equal(linear.packed, packed) and torch.equal(linear.scale, scale)
    assert (shift <= 0.5 * scale + 1e-6).all() and find_float_zeros(model) is None
    assert changes == {"0": pytest.approx(((linear.dequantize_weight() - weight).norm() / weight.norm()).item())}
    assert round_zeros(model, torch.float32)["0"] < 1e-7


def test_groups_without_the_number_0_are_rounded_anew() -> None:
    weight = torch.randn(8, 32) + torch.tensor([9.0, 0.0]).repeat_interleave(16)
    linear = Int4Linear.from_weight(weight, None, 16)
    codes = linear.packed.clone()
    round_zeros(nn.Sequential(linear), torch.bfloat16)
    assert torch.equal(linear.packed[:, 8:], codes[:, 8:]) and not torch.equal(linear.packed[:, :8], codes[:, :8])
    assert ((linear.dequantize_weight() - weight).abs() <= 1.6 * linear.scale.repeat_interleave(16, 1)).all()
    constant = Int4Linear.from_weight(torch.full((8, 16), -0.5), None, 16)
    round_zeros(nn.Sequential(constant), torch.float32)
    assert torch.allclose(constant.dequantize_weight(), torch.tensor(-0.5))


def test_a_weight_of_zeros_does_not_change() -> None:
    linear = Int4Linear.from_weight(torch.zeros(8, 16), None, 16)
    assert round_zeros(nn.Sequential(linear), torch.float32) == {"0": 0.0}
    assert not linear.dequantize_weight().any()


def test_plain_linears_are_refused() -> None:
    with pytest.raises(BadQuantisation, match="expected a model in 4 bits"):
        round_zeros(nn.Linear(4, 4), torch.float32)
