"""What the processes of a run on several devices tell each other; in a run of one process nothing is said.

Every process must call the same function at the same time. Each holds a rank, 0, 1, ...; rank 0 writes and speaks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "broadcast",
    "broadcast_from_first",
    "gather",
    "gather_to_first",
    "largest_over_ranks",
    "mean_over_ranks",
    "meet",
    "num_ranks",
    "own_rank",
    "part",
    "sum_over_ranks",
]


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    return dist.get_rank() if num_ranks() > 1 else 0


def mean_over_ranks(numbers: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each number; nan or infinite everywhere if it is so on one rank. All ranks have the same names."""
    if num_ranks() == 1:
        return numbers
    total = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(numbers, (total / num_ranks()).tolist(), strict=True))


def largest_over_ranks(number: int, device: torch.device) -> int:
    if num_ranks() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


@torch.no_grad()
def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of what each rank gives, of the same shape, on all of them; without gradient."""
    if num_ranks() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def gather(one: Any) -> list[Any]:
    """What each rank gives, in the order of the ranks, on all of them."""
    if num_ranks() == 1:
        return [one]
    everyones: list[Any] = [None] * num_ranks()
    dist.all_gather_object(everyones, one)
    return everyones


def gather_to_first(one: Any) -> list[Any]:
    """What each rank gives, in the order of the ranks, on rank 0; nothing on the others."""
    if num_ranks() == 1:
        return [one]
    everyones: list[Any] | None = [None] * num_ranks() if own_rank() == 0 else None
    dist.gather_object(one, everyones)
    return everyones or []


@torch.no_grad()
def broadcast(tensor: Tensor) -> Tensor:
    """What rank 0 gives, on all ranks; they give tensors of the same shape."""
    if num_ranks() == 1:
        return tensor.detach()
    received = tensor.detach().clone()
    dist.broadcast(received, src=0)
    return received


@torch.no_grad()
def broadcast_from_first(network: nn.Module, buffers_only: bool = False) -> None:
    """Give all ranks the weights and buffers of rank 0."""
    if num_ranks() > 1:
        for tensor in [*(() if buffers_only else network.parameters()), *network.buffers()]:
            dist.broadcast(tensor.data, src=0)


def meet() -> None:
    """Wait until all ranks are here."""
    if num_ranks() > 1:
        dist.barrier()


def part() -> None:
    """The last that all ranks do together; from now on each is by itself."""
    if num_ranks() > 1:
        dist.barrier()
        dist.destroy_process_group()
