"""What a test lets several processes do at once. It imports little, so that they start fast.

They are started by a fork server: it imports this file once, in a process without threads that could hold a lock.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.metrics.features import ImageSet
from src.metrics.frechet import GaussianStatistics, GaussianSums
from src.metrics.jackknife import block_of
from src.metrics.store import Store

__all__ = ["NUM_ROUNDS", "SPLITS", "in_two_processes", "meet", "moments_of", "race", "statistics_of_part", "value_of"]


def in_two_processes(body: Callable[..., None], *arguments: Any) -> None:
    """Call `body(rank, together, *arguments)` in two processes, and wait for both; `together` is a barrier for two."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    together = context.Barrier(2)
    both = [context.Process(target=body, args=(rank, together, *arguments)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)


# --- statistics of features that are spread over processes -----------------------------------------------------------

SPLITS = {"uneven": (0, 71, 100), "one has none": (0, 100, 100)}  # where the part of each process begins and ends


def statistics_of_part(start: int, stop: int) -> GaussianStatistics:
    """Of some of 100 feature vectors, which lie in four blocks."""
    x = 1000 + torch.randn(100, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    statistics = GaussianStatistics(shift=torch.full((5,), 999.0), num_blocks=4)
    for index in torch.arange(start, stop).split(16):
        statistics.update(x[index], block_of(len(x), 4)[index])
    return statistics


def moments_of(sums: GaussianSums) -> list[Tensor]:
    """Mean and covariance of all, and without each block."""
    return [*sums.moments(), *(part for g in range(4) for part in sums.without(g))]


def meet(rank: int, together: Barrier, folder: Path) -> None:
    """Add up a part of the features, and write down what both know then."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    statistics = {name: statistics_of_part(*SPLITS[name][rank : rank + 2]) for name in SPLITS}
    torch.save({name: moments_of(some.sums()) for name, some in statistics.items()}, folder / f"sums_{rank}.pt")
    torch.save({name: list(some.compute()) for name, some in statistics.items()}, folder / f"computed_{rank}.pt")
    torch.distributed.destroy_process_group()


# --- a store that is asked for the same things at once ---------------------------------------------------------------

NUM_ROUNDS = 40


def value_of(name: int) -> Tensor:
    return torch.full((50_000,), float(name))


def race(rank: int, together: Barrier, folder: Path, failures: Path) -> None:
    """Ask for one thing after the other, each at the same time as the other process; write down what was wrong."""
    for name in range(NUM_ROUNDS):
        images = ImageSet(lambda: [], 0, lambda name=name: {"name": name})
        together.wait(60)
        try:
            found = Store(folder).get("race", images, None, {}, lambda name=name: {"x": value_of(name)})
            assert torch.equal(found["x"], value_of(name)), f"{name} is {found['x']}"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure
            with open(failures, "a") as file:
                file.write(f"{rank}: {type(error).__name__}: {error}\n")
