"""Optimal Brain Surgeon over whole columns: in which order the inputs of a linear can go, and what each step costs.

With the remaining inputs refitted after every step, the squared error of removing the set S of columns of W is

    tr( W_S ((C^-1)_SS)^-1 W_S^T )          C = sum_t x_t x_t^T, the second moment of the inputs

and what is left is again such a problem, on W - W_S ((C^-1)_SS)^-1 (C^-1)_S and the Schur complement of C^-1. So a
channel that others can stand in for is cheap, however large it is.

Source: Hassibi & Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NeurIPS 1992; for
structures, Kurtic et al., "ZipLM", NeurIPS 2023 (arXiv 2302.04089), one unit at a time; several at a time are ours.

Legend: O outputs, I inputs, U units, K inputs per unit.
"""

import torch
from torch import Tensor


@torch.no_grad()
def eliminate(
    weight: Tensor, moment: Tensor, unit_size: int = 1, stop: int = 1, at_once: int = 1, ridge: float = 1e-2
) -> tuple[list[int], list[float]]:
    """The order in which units go, greedily, and the growth of the squared error at each step.

    Args:
        weight: [O, I], the rows scaled by the root of what an error in that output costs.
        moment: [I, I] second moment of the inputs, summed over tokens (each weighted as the caller likes).
        unit_size: K consecutive inputs are one unit, U = I / K.
        stop: units that stay.
        at_once: the cheapest so many units go per step, and share its cost equally.
        ridge: added to the diagonal of `moment`, as a share of its mean: inputs that hardly move are not trusted to
            stand in for others.

    Returns:
        Units in the order in which they go, U - stop of them, and the cost of each; costs never fall.
    """
    count = weight.shape[1] // unit_size
    c = moment.double()
    c = c + ridge * c.diagonal().mean().clamp(min=1e-30) * torch.eye(len(c), dtype=c.dtype, device=c.device)
    inverse = torch.linalg.inv(c)
    w = weight.double()
    left = torch.arange(count, device=c.device)
    order: list[int] = []
    costs: list[float] = []
    while len(left) > stop:
        blocks = inverse.view(len(left), unit_size, len(left), unit_size).diagonal(dim1=0, dim2=2)  # [K, K, units]
        columns = w.view(len(w), len(left), unit_size).transpose(0, 1)  # [units, O, K]
        alone = torch.linalg.solve(blocks.permute(2, 0, 1), columns.transpose(1, 2))  # [units, K, O]
        each = (columns.transpose(1, 2) * alone).sum((1, 2))
        going = each.argsort(stable=True)[: min(at_once, len(left) - stop)]
        gone = torch.zeros(len(left), dtype=torch.bool, device=c.device)
        gone[going] = True
        inputs = gone.repeat_interleave(unit_size)
        rows = inverse[inputs]
        fill = torch.linalg.solve(rows[:, inputs], rows)  # ((C^-1)_SS)^-1 (C^-1)_S
        taken = w[:, inputs]
        cost = (taken * torch.linalg.solve(rows[:, inputs], taken.T).T).sum().item()
        w = (w - taken @ fill)[:, ~inputs]
        inverse = (inverse - rows.T @ fill)[~inputs][:, ~inputs]
        order += left[going].tolist()
        # Removing several together costs more than the cheapest of them alone would, and rounding may make steps fall.
        costs += [max(cost / len(going), costs[-1] if costs else 0.0)] * len(going)
        left = left[~gone]
    return order, costs
