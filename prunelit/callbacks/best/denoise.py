"""What of a short training's change to a weight is more than noise.

A few hundred steps on little text move every weight by about as much as the optimiser's step allows, wherever the
gradients point: much of a change is noise, spread evenly over all directions of the matrix, and costs quality. What the
steps agree on is of low rank and stands out of it. The singular values of pure noise follow the law of Marchenko and
Pastur, so their median says how strong the noise is; what lies within its bulk goes, and what stands out is shrunk by
as much as noise has stretched it.

Source: Gavish and Donoho, "Optimal shrinkage of singular values", IEEE Transactions on Information Theory 2017, arXiv
1405.7511, eq. (7), for the Frobenius norm, the noise estimated from the median as in "The optimal hard threshold for
singular values is 4/sqrt(3)", arXiv 1305.5870. That a training's change is such a matrix: ours, measured (lab log).
"""

import math

import torch
from torch import Tensor

_MIN_SIDE = 32  # the law is that of large matrices
_GRID_POINTS = 10_000


@torch.no_grad()
def estimate_signal(change: Tensor) -> Tensor:
    """The estimate of a low-rank matrix that was seen through independent noise of equal strength.

    Args:
        change: matrix [M, N]; one with a side under 32, a rank below half of the shorter, or a value that is not
            finite comes back as it is.

    Returns:
        [M, N], in the dtype and on the device of `change`.
    """
    short, long = sorted(change.shape)
    if short < _MIN_SIDE or not change.isfinite().all():
        return change
    if change.shape[0] > short:
        return estimate_signal(change.T).T
    aspect, wide = short / long, change.double()
    squares, left = torch.linalg.eigh(wide @ wide.T)  # far cheaper than the singular vectors of both sides
    values = squares.clamp(min=0).sqrt()
    noise = values.median() / compute_noise_median(aspect)
    if not noise > values.max() * torch.finfo(torch.float32).eps:
        return change
    height = values / noise
    inside = (height.square() - aspect - 1).square() - 4 * aspect
    stays = height > 1 + math.sqrt(aspect)
    gain = torch.where(stays, inside.clamp(min=0).sqrt() / height.square().clamp(min=1), 0.0)
    return ((left * gain) @ (left.T @ wide)).to(change)


def compute_noise_median(aspect: float) -> float:
    """The median singular value of a large matrix of noise with variance 1 / (its longer side).

    Args:
        aspect: shorter side by longer side, in (0, 1].
    """
    angle = (torch.arange(_GRID_POINTS, dtype=torch.float64) + 0.5) * (math.pi / _GRID_POINTS)
    square = 1 + aspect - 2 * math.sqrt(aspect) * angle.cos()  # rises with the angle
    below = (angle.sin().square() / square).cumsum(0)  # Marchenko-Pastur, by the angle
    middle = int(torch.searchsorted(below, below[-1] / 2))
    return math.sqrt(float(square[middle]))
