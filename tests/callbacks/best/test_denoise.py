"""The spectral estimate against the matrix that was hidden, and the law of noise against noise."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunelit.callbacks.best.denoise import compute_noise_median, estimate_signal


def noise(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def low_rank(rows: int, columns: int, heights: list[float]) -> torch.Tensor:
    """Singular values of `heights`, in units of what noise of variance 1 would have: sqrt(longer side)."""
    left, right = (torch.linalg.qr(noise(side, len(heights), side + 7))[0] for side in (rows, columns))
    return left * torch.tensor(heights) * math.sqrt(max(rows, columns)) @ right.T


@pytest.mark.parametrize(("rows", "columns"), [(200, 200), (100, 400), (400, 100), (64, 1000)])
def test_the_median_of_noise(rows: int, columns: int) -> None:
    values = torch.linalg.svdvals(noise(rows, columns).double()) / math.sqrt(max(rows, columns))
    expected = compute_noise_median(min(rows, columns) / max(rows, columns))
    assert float(values.median()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("shape", [(200, 200), (150, 400), (400, 150)])
def test_pure_noise_goes_almost_all(shape: tuple[int, int]) -> None:
    x = noise(*shape)
    assert estimate_signal(x).norm() < 0.1 * x.norm()


@pytest.mark.parametrize("shape", [(200, 200), (150, 400), (400, 150)])
@pytest.mark.parametrize("scale", [1e-4, 3.0])
def test_what_stands_out_is_found(shape: tuple[int, int], scale: float) -> None:
    hidden = low_rank(*shape, [9.0, 6.0, 4.0, 3.0])
    seen = (hidden + noise(*shape)) * scale
    error = (estimate_signal(seen) - hidden * scale).norm()
    assert error < 0.35 * (seen - hidden * scale).norm()
    # No other weights of the same directions do much better: those that know what is hidden.
    left, _, right = torch.linalg.svd(seen, full_matrices=False)
    best = (left * (left.T @ (hidden * scale) @ right.T).diagonal()) @ right
    assert error < 1.15 * (best - hidden * scale).norm()


def test_one_height_by_hand() -> None:
    """Gavish and Donoho's eq. (7) at aspect 1: y -> sqrt(y^2 - 4)."""
    x = noise(300, 300).double()
    left, values, right = torch.linalg.svd(x)
    values[0] = 5 * values.median() / compute_noise_median(1.0)
    found = torch.linalg.svdvals(estimate_signal((left * values) @ right))
    assert float(found[0]) == pytest.approx(float(values[0]) * math.sqrt(1 - 4 / 25), rel=1e-6)


@given(st.integers(33, 60), st.integers(33, 60), st.integers(0, 99), st.floats(1e-6, 1e6))
def test_never_longer_and_no_matter_the_scale_or_the_side(rows: int, columns: int, seed: int, scale: float) -> None:
    x = noise(rows, columns, seed).double() + 0.3
    found = estimate_signal(x)
    assert found.norm() <= x.norm()
    assert torch.allclose(estimate_signal(x * scale), found * scale, rtol=1e-6, atol=1e-9 * scale)
    assert torch.allclose(estimate_signal(x.T), found.T, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("x", [torch.zeros(64, 64), low_rank(64, 90, [2.0, 1.0]), noise(31, 500), noise(4, 4)])
def test_left_alone(x: torch.Tensor) -> None:
    assert torch.equal(estimate_signal(x), x)


def test_a_training_that_diverged_is_no_error_here() -> None:
    x = noise(64, 64)
    x[3, 5] = float("nan")
    assert estimate_signal(x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    assert estimate_signal(noise(64, 80).to(dtype)).dtype is dtype
