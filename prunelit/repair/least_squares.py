"""Least-squares correction of one linear, which brings its outputs closest to their targets.

A linear with weight W that reads X and misses its targets by E gets the correction D that minimises

    ||X D^T - E||^2 + ridge * mean(diag(X^T X)) * ||D||^2        D^T = (X^T X + ...)^-1 X^T E

The ridge pulls towards the present weights, not towards zero: directions that the text does not cover stay as they
were.

Legend: T tokens without padding, C inputs and K outputs of a linear, N = C, or C + 1 for a linear with a bias, which
has a constant input of 1.
"""

import copy
import warnings
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunelit.model.decoder import get_weight_out_in
from prunelit.runtime.distributed import get_rank, sum_over_ranks

_MAX_ATTEMPTS = 8  # the ridge grows tenfold until the matrix has a Cholesky factor
_SMALLEST_RIDGE = 1e-8  # from which a ridge of 0 grows
_MAX_RESIDUAL = 1e-4  # largest relative residual of a float32 solution
# Times the precision of the dtype: a column with a smaller part of its own follows from the other columns.
_SINGULARITY_FACTOR = 100


@dataclass(frozen=True)
class Fit:
    """Correction of a linear.

    Attributes:
        weight: [K, C], to be added to its weight; zeros if no correction lowers the error.
        bias: [K], to be added to its bias; None for a linear without one.
        ridge: the ridge that was used.
        before, after: relative error of the outputs, ||E|| / ||targets||, without and with the correction.

    Example: see `prunelit.callbacks.greedy_output.two_step`, which uses it.
    """

    weight: Tensor
    bias: Tensor | None
    ridge: float
    before: float
    after: float

    def add_to(self, linear: nn.Module) -> None:
        """Add the correction to a linear in place, computed in float32 and stored in its own dtype."""
        weight = get_weight_out_in(linear)
        weight.copy_(weight.float() + self.weight.to(weight.device))
        if self.bias is not None:
            bias = cast(Tensor, linear.bias)
            bias.copy_(bias.float() + self.bias.to(bias.device))


class NormalEquations:
    """X^T X and X^T E of a linear, summed over batches and ranks.

    The products of a batch are float32, and their sums float64.

    Args:
        inputs: number of inputs, C.
        outputs: number of outputs, K.
        bias: add the constant input 1, whose weights correct the bias.
        device: device of the sums.

    Example:
        >>> linear, x = nn.Linear(2, 1, bias=False), torch.randn(50, 2)
        >>> targets = x @ torch.tensor([[1.0], [2.0]])
        >>> equations = NormalEquations(inputs=2, outputs=1)
        >>> equations.add_batch(x, targets - linear(x), targets)
        >>> fit = equations.solve(ridge=0.0)
        >>> torch.allclose(linear.weight + fit.weight, torch.tensor([[1.0, 2.0]]), atol=1e-3)
        True
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False, device: torch.device | None = None):
        self.inputs, self.bias = inputs, bias
        make_zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.gram = make_zeros(inputs + bias, inputs + bias)  # [N, N]
        self.cross = make_zeros(inputs + bias, outputs)  # [N, K]
        self.squares = make_zeros(3)  # squared error, squared targets, number of rows
        self._summed = False

    @torch.no_grad()
    def add_batch(self, x: Tensor, error: Tensor, targets: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add the rows of one batch.

        Args:
            x: [T, C] inputs.
            error: [T, K] targets minus outputs.
            targets: [T, K], to which errors are relative in `Fit`; None: `error` itself.
            weights: [T], weights of the rows' squared errors; None: all equal.
        """
        x, error = widen_to_float32(x), widen_to_float32(error)
        targets = error if targets is None else widen_to_float32(targets)
        row_weights = torch.ones_like(x[:, 0]) if weights is None else weights.to(x)
        if weights is not None:
            root = row_weights.sqrt()[:, None]
            x, error, targets = x * root, error * root, targets * root
        inputs = slice(self.inputs)
        self.gram[inputs, inputs] += x.T @ x
        self.cross[inputs] += x.T @ error
        if self.bias:
            constant = row_weights.sqrt()[:, None]
            total = (x * constant).sum(0, dtype=torch.float64)
            self.gram[-1, inputs] += total
            self.gram[inputs, -1] += total
            self.gram[-1, -1] += row_weights.sum(dtype=torch.float64)
            self.cross[-1] += (error * constant).sum(0, dtype=torch.float64)
        self.squares[0] += error.square().sum(dtype=torch.float64)
        self.squares[1] += targets.square().sum(dtype=torch.float64)
        self.squares[2] += row_weights.sum(dtype=torch.float64)

    def sum_over_ranks(self) -> None:
        """Sum over ranks, at the first call; every rank has to call it, as `solve` does."""
        if not self._summed:
            for sums in (self.gram, self.cross, self.squares):
                sum_over_ranks(sums)
        self._summed = True

    def solve(self, ridge: float) -> Fit:
        """Solve for the correction on rank zero and send it to the other ranks; every rank has to call it.

        The ridge grows tenfold until the matrix has a reliable Cholesky factor in float32 or float64. The correction is
        zero if the sums are not finite (with a warning), or if no correction lowers the error.

        Args:
            ridge: least ridge, relative to the mean square of the inputs.
        """
        self.sum_over_ranks()
        solution = torch.zeros_like(self.cross, dtype=torch.float32)
        numbers = torch.tensor([ridge, self.squares[0]], dtype=torch.float64, device=self.gram.device)
        if get_rank() == 0:
            solved = self._solve_locally(ridge)
            if solved is not None:
                # LAPACK returns a column-major matrix; the other ranks receive into a row-major one.
                solution, numbers = solved[0].contiguous(), numbers.new_tensor(solved[1:])
        if dist.is_initialized():
            dist.broadcast(solution, 0)
            dist.broadcast(numbers, 0)
        used_ridge, error_after = numbers.tolist()
        error_before, target_squares, _ = self.squares.tolist()
        weight = solution[: self.inputs].T
        bias = solution[-1] if self.bias else None
        before, after = (_compute_relative_error(error, target_squares) for error in (error_before, error_after))
        return Fit(weight, bias, used_ridge, before, after)

    def _solve_locally(self, ridge: float) -> tuple[Tensor, float, float] | None:
        """Solve the equations on this rank.

        Returns:
            D^T [N, K] in float32, the ridge, and the squared error with the correction; None if no correction lowers
            the error.
        """
        error, _, rows = self.squares.tolist()
        mean_diagonal = float(self.gram.diagonal()[: self.inputs].mean())
        if not all(map(torch.isfinite, (self.squares.sum(), self.gram.sum(), self.cross.sum()))):
            warnings.warn(
                "repair: activations of the cut model hold NaN or infinity; the weights they meet stay unrepaired",
                stacklevel=2,
            )
            return None
        if not error or mean_diagonal <= 0:
            return None
        ridge_diagonal = torch.ones_like(self.gram[0])  # [N]
        if self.bias:
            # The sum of squares of the constant input is `rows`: so the ridge pulls the bias as gently as the weights.
            ridge_diagonal[-1] = rows / mean_diagonal
        for attempt in range(_MAX_ATTEMPTS):
            current_ridge = max(ridge, _SMALLEST_RIDGE) * 10**attempt if attempt else ridge
            for dtype in (torch.float32, torch.float64):
                matrix, right_side = (self.gram / mean_diagonal).to(dtype), (self.cross / mean_diagonal).to(dtype)
                matrix.diagonal().add_(current_ridge * ridge_diagonal)
                factor, failed = torch.linalg.cholesky_ex(matrix)
                # Share of a column's square that the columns before it do not explain: rounding hides a smaller share.
                least_own_share = (factor.diagonal().square() / matrix.diagonal()).min()
                if failed or not least_own_share > _SINGULARITY_FACTOR * torch.finfo(dtype).eps:
                    continue
                solution = torch.cholesky_solve(right_side, factor)
                product = matrix @ solution
                if dtype == torch.float32 and not (product - right_side).norm() <= _MAX_RESIDUAL * right_side.norm():
                    continue
                solution, product = solution.double(), product.double()
                gram_product = product - current_ridge * ridge_diagonal[:, None] * solution  # X^T X D^T
                error_after = (
                    error - 2 * (solution * self.cross).sum() + mean_diagonal * (solution * gram_product).sum()
                )
                if not error_after < error:
                    return None
                return solution.float(), current_ridge, max(0.0, float(error_after))
        return None

    def derive_after_fit(self, fit: Fit) -> "NormalEquations":
        """Derive the equations that hold once `fit` has been added to the weights."""
        self.sum_over_ranks()
        change = fit.weight.double().T
        if self.bias:
            change = torch.cat([change, cast(Tensor, fit.bias).double()[None]])
        output_change = self.gram @ change
        error = self.squares[0] - 2 * (change * self.cross).sum() + (change * output_change).sum()
        return self._derive(self.inputs, self.gram, self.cross - output_change, error)

    def derive_after_cut(self, columns: Tensor, weight: Tensor) -> "NormalEquations":
        """Derive the equations that hold once the linear has lost its other inputs; no data is needed.

        Args:
            columns: indices of the remaining inputs.
            weight: [K, C] of the linear before the cut.
        """
        self.sum_over_ranks()
        remains = torch.zeros(len(self.gram), dtype=torch.bool, device=self.gram.device)
        remains[columns.to(remains.device)] = True
        remains[self.inputs :] = True  # the bias
        # What the removed inputs contributed to the outputs is error after the cut.
        removed_weight = weight.double().T[~remains[: self.inputs]]
        removed_gram = self.gram[~remains]
        error = self.squares[0] + 2 * (removed_weight * self.cross[~remains]).sum()
        error = error + (removed_weight * (removed_gram[:, ~remains] @ removed_weight)).sum()
        cross = self.cross[remains] + removed_gram[:, remains].T @ removed_weight
        return self._derive(len(columns), self.gram[remains][:, remains], cross, error)

    def _derive(self, inputs: int, gram: Tensor, cross: Tensor, error: Tensor) -> "NormalEquations":
        derived = copy.copy(self)
        derived.inputs, derived.gram, derived.cross = inputs, gram, cross
        derived.squares = torch.stack([error.clamp_min(0), *self.squares[1:]])
        return derived


def widen_to_float32(x: Tensor) -> Tensor:
    """Convert to float32 unless the dtype is wider.

    Example:
        >>> widen_to_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _compute_relative_error(error: float, target_squares: float) -> float:
    return (error / target_squares) ** 0.5 if target_squares > 0 else 0.0
