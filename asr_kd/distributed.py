"""Several processes that work on one run, as `torchrun` starts them; alone, nothing here does anything.

All processes run the same program over the same folders. The first one (rank 0) writes what is shared while the others wait; in
stages that are done together each takes its share and sums go through `torch.distributed`: gloo between CPUs, NCCL between GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from asr_kd.errors import AsrKdError

T = TypeVar("T")

TIMEOUT = timedelta(days=7)  # one waits for another as long as that one works; one that ended is noticed by gloo and by torchrun, which ends the rest


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that `torchrun` started, as its environment variables say; without them do nothing.

    An error in one process ends all: the first to fail raises its own error, the others, cut off from it, end silently.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield
        return
    store, number, size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=TIMEOUT)
    try:
        yield
    except BaseException as error:
        with suppress(RuntimeError):  # the store is gone where the whole job is
            if store.add("asr_kd_failures", 1) > 1:
                raise SystemExit(2) from error
        raise
    dist.destroy_process_group()


def concrete_device(device: torch.device | str) -> torch.device:
    """A device with its number: "cuda" is this thread's current GPU, and in threads begun later it would be another."""
    return torch.empty(0, device=device).device


def local_rank() -> int:
    """Number of this process on its machine: its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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
    with _others_alive():
        for tensor in tensors:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)


def total_over_processes(*numbers: float) -> list[float]:
    """Sum of each number over all processes (exact for integers below 2^53)."""
    total = torch.tensor(numbers, dtype=torch.float64)
    add_over_processes([total])
    return total.tolist()


def smallest_over_processes(tensor: Tensor) -> Tensor:
    """Elementwise minimum over all processes, a new tensor."""
    smallest = tensor.clone()
    if _together():
        with _others_alive():
            dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return smallest


def from_first_process(value: T) -> T:
    """What the process of rank 0 gave, in all processes, once it has come so far."""
    if not _together():
        return value
    shared: list[T] = [value]
    with _others_alive():
        dist.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
    return shared[0]


def by_first_process(work: Callable[[], T]) -> T:
    """What `work` gives, done by the process of rank 0 while the others wait for it."""
    if not _together():
        return work()
    return from_first_process(work() if rank() == 0 else cast(T, None))


def from_all_processes(value: T) -> list[T]:
    """What each process gave, in the order of their ranks, once all have come so far."""
    if not _together():
        return [value]
    gathered: list[Any] = [None] * world_size()
    with _others_alive():
        dist.all_gather_object(gathered, value)
    return gathered


def wait_for_all() -> None:
    """Return once all processes have come here."""
    from_all_processes(None)


@contextmanager
def _others_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise AsrKdError(f"process {rank()} of {world_size()}: another process of this run ended ({str(error).splitlines()[0][:100]}); "
                         "start the same command again to continue") from error


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
