"""Ranks: the rank of this process, its share of the work, and sums over all ranks."""

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def get_rank() -> int:
    """Get the rank of this process; 0 if there is only one.

    Example:
        >>> get_rank()
        0
    """
    return dist.get_rank() if dist.is_initialized() else 0


def take_rank_share(items: Sequence[Item], rank: int | None = None) -> list[Item]:
    """Take a rank's share of a list that all ranks hold: every n-th item, where n is the number of ranks.

    Args:
        items: the same on all ranks.
        rank: whose share; None: this rank's.

    Example:
        >>> take_rank_share(["a", "b"])
        ['a', 'b']
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return list(items)[get_rank() if rank is None else rank :: ranks]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place, and return it; all ranks must call this.

    Example:
        >>> import torch
        >>> sum_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_rank_zero(value: Item) -> Item:
    """Send a value of rank zero to all ranks, and return it; all ranks must call this.

    Args:
        value: a picklable value, such as a tensor on the CPU; what other ranks pass is ignored.

    Example:
        >>> broadcast_from_rank_zero([1, 2])
        [1, 2]
    """
    if dist.is_initialized():
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
    return value
