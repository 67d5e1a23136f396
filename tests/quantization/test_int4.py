"""INT4: codes against the papers' formula, the layer against the weight it stands for, merges against the adapter."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from prunelit.quantization.int4 import GROUP_SIZES, GroupLora, Int4Linear, compute_error_bound, round_to_int4
from prunelit.runtime.errors import BadOption

WIDTHS = (1, 15, 32, 77, 100, 128)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def filled(adapter: GroupLora, scale: float = 1.0) -> GroupLora:
    """The adapter with a B that is not zero."""
    torch.nn.init.normal_(adapter.lora_B, std=scale)
    return adapter


@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 140),
    group_size=st.sampled_from(GROUP_SIZES),
    seed=st.integers(0, 99),
    shift=st.sampled_from((0.0, 3.0, -40.0)),
    power=st.integers(-30, 30),
)
def test_codes_follow_the_formula_and_stay_within_half_a_step(
    rows: int, width: int, group_size: int, seed: int, shift: float, power: int
) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(rows, width) + shift) * 2.0**power
    codes, scale, zero = round_to_int4(weight, group_size)
    assert codes.shape == weight.shape and scale.shape == zero.shape == (rows, -(-width // group_size))
    for row in range(rows):
        for group, part in enumerate(weight[row].double().split(group_size)):
            low, high = part.min(), part.max()
            alpha = (high - low) / 15
            mine = codes[row].split(group_size)[group].double()
            assert abs(scale[row, group] - alpha) <= 1e-6 * (abs(low) + abs(high)) and zero[row, group] == low
            if alpha > 0:  # beta = -min / alpha; a value between two codes may go either way
                beta = -low / alpha
                exact = (part / alpha + beta).clamp(0, 15)
                assert (mine - exact).abs().max() <= 0.5 + 1e-4 * (1 + beta.abs())
                restored = mine * scale[row, group] + zero[row, group]
                assert (restored - part).abs().max() <= alpha / 2 + 1e-6 * part.abs().max()
    assert int(codes.max()) <= 15


@given(
    value=st.floats(-(2.0**90), 2.0**90, width=32),
    width=st.integers(1, 40),
    group_size=st.sampled_from(GROUP_SIZES),
)
def test_constant_groups_are_exact_and_merge(value: float, width: int, group_size: int) -> None:
    weight = torch.full((3, width), value)
    linear = Int4Linear.from_weight(weight, None, group_size)
    assert torch.equal(linear.dequantize_weight(), weight)
    adapter = filled(GroupLora(linear, 2, 4))
    update = (adapter.lora_B @ adapter.lora_A * 2 / group_size).repeat_interleave(group_size, 1)[:, :width]
    torch.testing.assert_close(adapter.merge().dequantize_weight(), weight + update)


@pytest.mark.parametrize("tiny_spread", [1e-30, 1e-42])
def test_nearly_constant_groups_merge(tiny_spread: float) -> None:
    weight = torch.randn(4, 64).sign() * tiny_spread
    adapter = filled(GroupLora(Int4Linear.from_weight(weight), 2, 4))
    x = torch.randn(5, 64)
    wanted = adapter(x)
    assert relative(adapter.merge()(x), wanted) < 1e-5


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_is_the_linear_of_its_weight(width: int, group_size: int) -> None:
    weight, bias = torch.randn(24, width), torch.nn.Parameter(torch.randn(24))
    layer = Int4Linear.from_weight(weight, bias, group_size)
    codes, scale, zero = round_to_int4(weight, group_size)
    full = (scale.repeat_interleave(group_size, 1)[:, :width] * codes) + zero.repeat_interleave(group_size, 1)[
        :, :width
    ]
    torch.testing.assert_close(layer.dequantize_weight(), full)
    assert relative(full, weight) <= compute_error_bound(group_size)
    x, twin = (torch.randn(2, 5, width).requires_grad_() for _ in range(2))
    twin.data.copy_(x.data)
    got, wanted = layer(x), functional.linear(twin, full, bias)
    assert relative(got, wanted) < 1e-5
    for y in (got, wanted):
        y.square().sum().backward()
    assert relative(x.grad, twin.grad) < 1e-5
    assert layer.packed.shape == (24, layer.scale.shape[1] * group_size // 2)


def test_backward_keeps_no_unpacked_weight() -> None:
    layer = Int4Linear.from_weight(torch.randn(64, 256))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 256, requires_grad=True))
    assert {tensor.data_ptr() for tensor in kept} == {t.data_ptr() for t in (layer.packed, layer.scale, layer.zero)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("width", WIDTHS)
def test_merge_is_lossless(width: int, group_size: int, bias: bool) -> None:
    parameter = torch.nn.Parameter(torch.randn(24)) if bias else None
    layer = Int4Linear.from_weight(torch.randn(24, width) / width**0.5, parameter, group_size)
    adapter = filled(GroupLora(layer, 4, 8, dropout=0.3)).eval()
    x = torch.randn(3, 7, width)
    wanted, packed, scale = adapter(x), layer.packed.clone(), layer.scale.clone()
    merged = adapter.merge()
    assert relative(merged(x), wanted) <= 1e-4
    assert merged is layer and torch.equal(merged.packed, packed) and torch.equal(merged.scale, scale)
    torch.testing.assert_close(adapter(x), merged(x))  # the adapter was used up: merging twice changes nothing


def test_merge_is_lossless_after_training() -> None:
    target = torch.randn(24, 77)
    adapter = GroupLora(Int4Linear.from_weight(torch.randn(24, 77)), 4, 8)
    optimizer = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(60):
        x = torch.randn(32, 77)
        loss = (adapter(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    x = torch.randn(9, 77) + 1  # a mean, so that the pooled part counts
    wanted = adapter(x).detach()
    assert losses[-1] < losses[0] and relative(adapter.base_layer(x), wanted) > 1e-2
    assert relative(adapter.merge()(x), wanted) <= 1e-4


def test_adapter_starts_at_zero_and_pools_by_the_group_size() -> None:
    layer = Int4Linear.from_weight(torch.randn(8, 40), None, 32)
    adapter = GroupLora(layer, 2, 6)
    x = torch.randn(4, 40)
    torch.testing.assert_close(adapter(x), layer(x))
    filled(adapter)
    pooled = torch.stack([x[:, :32].sum(1), x[:, 32:].sum(1)], 1) / 32  # the last group has 8 inputs
    torch.testing.assert_close(adapter(x), layer(x) + 3 * pooled @ adapter.lora_A.T @ adapter.lora_B.T)


def test_state_goes_round_and_scales_stay_float32() -> None:
    layer = Int4Linear.from_weight(torch.randn(8, 50), torch.nn.Parameter(torch.randn(8)), 16)
    twin = Int4Linear(50, 8, 16, bias=True)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 50)
    assert torch.equal(twin(x), layer(x))
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert cast.scale.dtype == cast.zero.dtype == torch.float32 and cast.bias.dtype == torch.bfloat16
    assert torch.equal(cast.dequantize_weight(), layer.dequantize_weight())
    empty = Int4Linear(50, 8, 16, bias=True, device="meta").to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_dtypes(compute_dtype: torch.dtype | None) -> None:
    layer = Int4Linear.from_weight(torch.randn(8, 64), None, 32, compute_dtype)
    adapter = filled(GroupLora(layer, 2, 4))
    x = torch.randn(3, 64)
    wanted = adapter(x)
    half = adapter(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative(half, wanted) < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x.requires_grad_())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and relative(y, wanted) < 2e-2 and x.grad is not None


@pytest.mark.parametrize("group_size", [0, 48, 256, 32.0, "32"])
def test_group_sizes_are_checked(group_size: object) -> None:
    with pytest.raises(BadOption, match="group_size: expected one of 16, 32, 64, 128"):
        Int4Linear(64, 8, group_size)  # type: ignore[arg-type]


def test_groups_have_32_inputs_by_default() -> None:
    for layer in (Int4Linear(64, 8), Int4Linear.from_weight(torch.randn(8, 64))):
        assert layer.group_size == 32 and layer.scale.shape == layer.zero.shape == (8, 2)


@pytest.mark.parametrize("draw", ["normal", "uniform", "laplace", "cubed"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_error_bound_holds_for_heavy_and_light_tails(draw: str, group_size: int) -> None:
    weight = torch.randn(64, 256)
    if draw == "uniform":
        weight = torch.rand(64, 256) - 0.5
    elif draw == "laplace":
        weight = torch.distributions.Laplace(0.0, 1.0).sample((64, 256))
    elif draw == "cubed":
        weight = weight**3
    error = relative(Int4Linear.from_weight(weight, None, group_size).dequantize_weight(), weight)
    assert 0.01 < error < compute_error_bound(group_size)
