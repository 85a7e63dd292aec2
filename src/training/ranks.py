"""Training on several devices: one process and one copy of the model each, which take the same steps.

Lightning's `ddp` averages gradients by torch's DistributedDataParallel, which follows one forward and one backward pass
through the wrapped module. A step of two players has two or more backward passes through parts of it, each with parameters
that it does not use; a penalty has a backward pass within a forward one; and accumulated batches must not be averaged one
by one. What DistributedDataParallel then does hangs on which buckets became ready when. So here nothing is wrapped: each
process computes its own gradients, and they are averaged in one place, just before an optimizer steps. That costs one more
copy of the gradients, and no communication is hidden behind the backward pass.
"""

import logging
import subprocess
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from src.core.collectives import broadcast_from_first, num_ranks

__all__ = ["Replicas", "average_gradients"]

log = logging.getLogger(__name__)

_TIMEOUT = timedelta(hours=2)  # while rank 0 draws pictures and evaluates, the others wait for it
_CHILDREN_END_SECONDS = 10.0


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over all ranks.

    A parameter without a gradient on this rank counts as zero, and one without on all ranks keeps none.
    """
    if num_ranks() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    has_grad = torch.tensor([p.grad is not None for p in trained], dtype=grads[0].dtype, device=grads[0].device)
    flat = torch.cat([*(grad.reshape(-1) for grad in grads), has_grad])
    dist.all_reduce(flat)
    *sums, num_with = flat.split([*(grad.numel() for grad in grads), len(grads)])
    for parameter, total, count in zip(trained, sums, num_with.tolist(), strict=True):
        if count:
            parameter.grad = total.view_as(parameter).div(num_ranks())


class Replicas(DDPStrategy):
    """Lightning's `ddp` without DistributedDataParallel: the processes and their meeting, but no hidden averaging."""

    def __init__(self) -> None:
        super().__init__(timeout=_TIMEOUT)

    def configure_ddp(self) -> None:
        """Called where Lightning would wrap the model."""
        assert self.model is not None
        broadcast_from_first(self.model)
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, SyncBatchNorm)]
        if norms and self.world_size > 1 and self.is_global_zero:
            log.info(
                "batch norm sees each device's own batch, since torch synchronizes it on CUDA only; the running statistics "
                f"that are validated and saved are those of the first of {self.world_size} devices"
            )

    def on_exception(self, exception: BaseException) -> None:
        """The processes that this one started end with it.

        They are forgotten first: Lightning watches them, and would kill this process, too, when the first one has ended,
        before the run's status is written.
        """
        children: list[subprocess.Popen] = getattr(self.launcher, "procs", [])
        ending = children[:]
        children.clear()
        for child in ending:
            try:
                child.wait(_CHILDREN_END_SECONDS)
            except subprocess.TimeoutExpired:  # it waits for this one
                child.kill()
