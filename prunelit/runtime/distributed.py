"""Ranks: who this process is, its share of the work, and sums over all of them."""

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def get_rank() -> int:
    """This process's rank; 0 where there is one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def take_rank_share(items: Sequence[Item], rank: int | None = None) -> list[Item]:
    """This rank's part (or another's) of a list that all ranks hold: every world-size-th item; all in one process."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return list(items)[get_rank() if rank is None else rank :: world]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place and returned; the tensor itself in a single process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
