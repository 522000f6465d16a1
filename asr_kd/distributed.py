"""Several processes that work on one training or extraction, as `torchrun` starts them; alone, nothing here does anything."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


def rank() -> int:
    """Number of this process, 0 when alone."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if _together() else 1


def own_share(values: Tensor) -> Tensor:
    """This process's part of `values` along the first axis; the parts differ by at most one in length."""
    return values.tensor_split(world_size())[rank()]


def add_over_processes(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    if not _together():
        return
    for tensor in tensors:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)


def smallest_over_processes(tensor: Tensor) -> Tensor:
    """Elementwise minimum over all processes, a new tensor."""
    smallest = tensor.clone()
    if _together():
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return smallest


def from_first_process(value: T) -> T:
    """What the process of rank 0 gave, in all processes."""
    if not _together():
        return value
    shared: list[T] = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
