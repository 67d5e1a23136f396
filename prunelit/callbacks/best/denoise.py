"""Separate the signal in a short training's change of a weight from noise.

A few hundred steps on little text move every weight by about the step size of the optimiser, wherever the gradients
point. Much of such a change is noise, which spreads evenly over all directions of the matrix and costs quality. What
the steps agree on is of low rank and stands out. The singular values of pure noise follow the Marchenko-Pastur law, so
their median shows the strength of the noise. Singular values within the bulk of the noise are set to zero, and larger
ones are shrunk by as much as noise has stretched them.

Source: Gavish and Donoho, "Optimal shrinkage of singular values", IEEE Transactions on Information Theory 2017, arXiv
1405.7511, eq. (7), for the Frobenius norm; the noise is estimated from the median as in "The optimal hard threshold for
singular values is 4/sqrt(3)", arXiv 1305.5870. Ours, from measurements (lab log): a training's change is such a matrix.

Legend: M rows, N columns of a weight.
"""

import math

import torch
from torch import Tensor

_MIN_SIDE = 32  # the Marchenko-Pastur law holds for large matrices
_GRID_POINTS = 10_000  # of the integral in `compute_noise_median`


@torch.no_grad()
def estimate_signal(change: Tensor) -> Tensor:
    """Estimate a low-rank matrix from its sum with independent noise of equal variance.

    Args:
        change: [M, N]; returned as it is if a side is below 32, a value is not finite, or the rank is below half of the
            shorter side.

    Returns:
        [M, N], in the dtype and on the device of `change`.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> signal = torch.ones(64, 64)
        >>> noisy = signal + torch.randn(64, 64, generator=generator)
        >>> (estimate_signal(noisy) - signal).norm() < 0.5 * (noisy - signal).norm()
        tensor(True)
    """
    shorter, longer = sorted(change.shape)
    if shorter < _MIN_SIDE or not change.isfinite().all():
        return change
    if change.shape[0] > shorter:
        return estimate_signal(change.T).T
    aspect, matrix = shorter / longer, change.double()
    # Eigenvectors of the smaller product are far cheaper than the singular vectors of both sides.
    squares, left = torch.linalg.eigh(matrix @ matrix.T)
    singular_values = squares.clamp(min=0).sqrt()
    noise = singular_values.median() / compute_noise_median(aspect)
    if not noise > singular_values.max() * torch.finfo(torch.float32).eps:
        return change
    relative = singular_values / noise
    discriminant = (relative.square() - aspect - 1).square() - 4 * aspect
    exceeds_noise = relative > 1 + math.sqrt(aspect)  # the upper edge of the bulk
    gain = torch.where(exceeds_noise, discriminant.clamp(min=0).sqrt() / relative.square().clamp(min=1), 0.0)
    return ((left * gain) @ (left.T @ matrix)).to(change)


def compute_noise_median(aspect: float) -> float:
    """Compute the median singular value of a large noise matrix with variance 1 / (its longer side).

    Args:
        aspect: shorter side / longer side, in (0, 1].

    Example:
        >>> round(compute_noise_median(1.0), 3)
        0.808
    """
    angle = (torch.arange(_GRID_POINTS, dtype=torch.float64) + 0.5) * (math.pi / _GRID_POINTS)
    # Squared singular values, substituted by an angle: the density has no singularities in it.
    square = 1 + aspect - 2 * math.sqrt(aspect) * angle.cos()
    cumulative = (angle.sin().square() / square).cumsum(0)  # Marchenko-Pastur distribution
    median = int(torch.searchsorted(cumulative, cumulative[-1] / 2))
    return math.sqrt(float(square[median]))
