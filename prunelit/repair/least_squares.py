"""One linear: the correction that brings its outputs closest to what they should be.

A linear with weight W, which reads X and misses its target by E, gets the correction D that minimises

    ||X D^T - E||^2 + ridge * mean(diag(X^T X)) * ||D||^2        D^T = (X^T X + ...)^-1 X^T E

so the ridge pulls towards the weights that are there, not towards zero: what the text does not say stays as it was.

Legend: T tokens that count (no padding), C inputs and K outputs of a linear, N = C, and one more for the constant input
1 of a linear that has a bias.
"""

import copy
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.model.decoder import get_weight_out_in
from prunelit.runtime.distributed import get_rank, sum_over_ranks

_MAX_ATTEMPTS = 8  # the ridge grows tenfold while the matrix has no Cholesky factor
_SMALLEST_RIDGE = 1e-8  # from which a ridge of 0 grows
_MAX_RESIDUAL = 1e-4  # largest relative residual of a float32 solution
_SINGULARITY_FACTOR = 100  # times the precision: a column of which less than that is its own follows from the others


@dataclass(frozen=True)
class Fit:
    """The correction of a linear.

    Attributes:
        weight: what to add to its weight [K, C]; zeros where nothing makes the error smaller.
        bias: what to add to its bias [K], None where it has none.
        ridge: the one it took.
        before, after: error of the outputs relative to what they should be, root of the ratio of sums of squares.
    """

    weight: Tensor
    bias: Tensor | None
    ridge: float
    before: float
    after: float

    def add_to(self, linear: nn.Module) -> None:
        """Correct a linear in place: computed in float32, stored in its own dtype."""
        weight = get_weight_out_in(linear)
        weight.copy_(weight.float() + self.weight.to(weight.device))
        if self.bias is not None:
            bias = cast(Tensor, linear.bias)
            bias.copy_(bias.float() + self.bias.to(bias.device))


class NormalEquations:
    """X^T X and X^T E, summed in float64 over batches and ranks, from float32 products of each batch.

    Args:
        inputs: C.
        outputs: K.
        bias: add the constant input 1, whose weights are a correction of the bias.
        device: of the sums.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False, device: torch.device | None = None):
        self.inputs, self.bias = inputs, bias
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.gram = torch.zeros(inputs + bias, inputs + bias, **wide)  # [N, N]
        self.cross = torch.zeros(inputs + bias, outputs, **wide)  # [N, K]
        self.squares = torch.zeros(3, **wide)  # of the error, of the wanted outputs; rows
        self._summed = False

    @torch.no_grad()
    def add_batch(self, x: Tensor, error: Tensor, wanted: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add the rows of one batch.

        Args:
            x: [T, C] inputs.
            error: [T, K] wanted minus actual outputs.
            wanted: [T, K], to state errors relative to; the error itself if None.
            weights: [T] of the rows' squared errors; None: all alike.
        """
        x, error = widen_to_float32(x), widen_to_float32(error)
        wanted = error if wanted is None else widen_to_float32(wanted)
        count = torch.ones_like(x[:, 0]) if weights is None else weights.to(x)
        if weights is not None:
            root = count.sqrt()[:, None]
            x, error, wanted = x * root, error * root, wanted * root
        of = slice(self.inputs)
        self.gram[of, of] += x.T @ x
        self.cross[of] += x.T @ error
        if self.bias:
            one = count.sqrt()[:, None]
            total = (x * one).sum(0, dtype=torch.float64)
            self.gram[-1, of] += total
            self.gram[of, -1] += total
            self.gram[-1, -1] += count.sum(dtype=torch.float64)
            self.cross[-1] += (error * one).sum(0, dtype=torch.float64)
        self.squares[0] += error.square().sum(dtype=torch.float64)
        self.squares[1] += wanted.square().sum(dtype=torch.float64)
        self.squares[2] += count.sum(dtype=torch.float64)

    def sum_over_ranks(self) -> None:
        """Sum over ranks, once; every rank calls it (`solve` does)."""
        if not self._summed:
            for sums in (self.gram, self.cross, self.squares):
                sum_over_ranks(sums)
        self._summed = True

    def solve(self, ridge: float) -> Fit:
        """The correction, solved on rank zero and sent to the others.

        The ridge grows tenfold as long as there is no Cholesky factor to be trusted, in float32 or in float64. Sums
        that are not finite, or a correction that does not lower the error, give zeros.
        """
        self.sum_over_ranks()
        solution = torch.zeros_like(self.cross, dtype=torch.float32)
        numbers = torch.tensor([ridge, self.squares[0]], dtype=torch.float64, device=self.gram.device)
        if get_rank() == 0:
            found = self._solve_locally(ridge)
            if found is not None:
                # LAPACK's columns come first in memory; what is sent to other ranks has rows first.
                solution, numbers = found[0].contiguous(), numbers.new_tensor(found[1:])
        if dist.is_initialized():
            dist.broadcast(solution, 0)
            dist.broadcast(numbers, 0)
        took, after = numbers.tolist()
        before, wanted, _ = self.squares.tolist()
        weight = solution[: self.inputs].T
        bias = solution[-1] if self.bias else None
        return Fit(weight, bias, took, *(_compute_relative_error(error, wanted) for error in (before, after)))

    def _solve_locally(self, ridge: float) -> tuple[Tensor, float, float] | None:
        """(D^T float32 [N, K], ridge, squared error after), or None where the weights are better left alone."""
        error, _, rows = self.squares.tolist()
        mean = float(self.gram.diagonal()[: self.inputs].mean())
        if not all(map(torch.isfinite, (self.squares.sum(), self.gram.sum(), self.cross.sum()))):
            warnings.warn(
                "repair: activations of the cut model hold NaN or infinity; the weights they meet stay unrepaired",
                stacklevel=2,
            )
            return None
        if not error or mean <= 0:
            return None
        pull = torch.ones_like(self.gram[0])  # [N]
        if self.bias:
            pull[-1] = rows / mean  # the constant's own square: the bias is pulled as gently as the weights
        for attempt in range(_MAX_ATTEMPTS):
            now = max(ridge, _SMALLEST_RIDGE) * 10**attempt if attempt else ridge
            for dtype in (torch.float32, torch.float64):
                matrix, right = (self.gram / mean).to(dtype), (self.cross / mean).to(dtype)
                matrix.diagonal().add_(now * pull)
                factor, failed = torch.linalg.cholesky_ex(matrix)
                # What is left of a column's square once the columns before it have explained their part.
                left = (factor.diagonal().square() / matrix.diagonal()).min()
                if failed or not left > _SINGULARITY_FACTOR * torch.finfo(dtype).eps:
                    continue
                solution = torch.cholesky_solve(right, factor)
                product = matrix @ solution
                if dtype == torch.float32 and not (product - right).norm() <= _MAX_RESIDUAL * right.norm():
                    continue
                solution, product = solution.double(), product.double()
                fitted = product - now * pull[:, None] * solution  # X^T X D^T
                after = error - 2 * (solution * self.cross).sum() + mean * (solution * fitted).sum()
                if not after < error:
                    return None
                return solution.float(), now, max(0.0, float(after))
        return None

    def derive_after_fit(self, fit: Fit) -> "NormalEquations":
        """The equations once `fit` is part of the weights."""
        self.sum_over_ranks()
        change = fit.weight.double().T
        if self.bias:
            change = torch.cat([change, cast(Tensor, fit.bias).double()[None]])
        moved = self.gram @ change
        error = self.squares[0] - 2 * (change * self.cross).sum() + (change * moved).sum()
        return self._derive(self.inputs, self.gram, self.cross - moved, error)

    def derive_after_cut(self, columns: Tensor, weight: Tensor) -> "NormalEquations":
        """The equations once the linear has lost its other inputs; no data is needed.

        Args:
            columns: indices of the inputs that stay.
            weight: [K, C] of the linear before it loses them.
        """
        self.sum_over_ranks()
        stays = torch.zeros(len(self.gram), dtype=torch.bool, device=self.gram.device)
        stays[columns.to(stays.device)] = True
        stays[self.inputs :] = True  # the bias
        lost = weight.double().T[~stays[: self.inputs]]  # their part of the outputs is error now
        gone = self.gram[~stays]
        error = self.squares[0] + 2 * (lost * self.cross[~stays]).sum() + (lost * (gone[:, ~stays] @ lost)).sum()
        return self._derive(
            len(columns), self.gram[stays][:, stays], self.cross[stays] + gone[:, stays].T @ lost, error
        )

    def _derive(self, inputs: int, gram: Tensor, cross: Tensor, error: Tensor) -> "NormalEquations":
        found = copy.copy(self)
        found.inputs, found.gram, found.cross = inputs, gram, cross
        found.squares = torch.stack([error.clamp_min(0), *self.squares[1:]])
        return found


def widen_to_float32(x: Tensor) -> Tensor:
    """In float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _compute_relative_error(error: float, wanted: float) -> float:
    return (error / wanted) ** 0.5 if wanted > 0 else 0.0
