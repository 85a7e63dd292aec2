"""What every LightningModule here shares: one step counter, noise, averaged weights, logging at a stride.

Lightning's `global_step` counts optimizer steps, so with two optimizers it runs twice as fast. Nothing here reads it:
`step` counts batches once, and budgets, axes and file names use it.
"""

import time
from abc import ABC
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from src.core.batch import Batch
from src.core.errors import UserError, require_at_least
from src.core.protocols import Terms
from src.core.rng import SampleNoise, StreamNoise, derive_seed
from src.training.ema import WeightAverage
from src.training.meter import Meter, reduce_terms, require_finite

__all__ = ["TrainingModule"]


class TrainingModule(L.LightningModule, ABC):
    """Base of the two drivers, `GradientTraining` and `AdversarialTraining`.

    Args:
        model: what is trained.
        averaged: the network whose weights are averaged: the model, or its generator.
        seed: seed of the training noise; every rank has its own stream.
        log_every_n_steps: stride of the step-wise curves.
        ema_half_life_examples: half-life of the averaged weights, None for no averaging.
        gradient_clip_norm: largest norm of one optimizer's gradient, None for no clipping.
    """

    automatic_optimization = False  # one way to step for one optimizer and for two, so that both count alike

    def __init__(
        self,
        model: nn.Module,
        averaged: nn.Module,
        seed: int,
        log_every_n_steps: int,
        ema_half_life_examples: float | None,
        gradient_clip_norm: float | None,
    ) -> None:
        super().__init__()
        require_at_least("training.log_every_n_steps", log_every_n_steps, 1)
        require_at_least("training.ema_half_life_examples", ema_half_life_examples, 1)
        require_at_least("training.gradient_clip_norm", gradient_clip_norm, 1e-12)
        self.model = model
        self.step = 0  # batches so far
        self.examples_seen = 0  # over all ranks
        self.last_numbers: dict[str, float] = {}  # of the latest batch, on this rank
        self.weight_average = None
        if ema_half_life_examples is not None:
            self.weight_average = WeightAverage(averaged, ema_half_life_examples)
        self._averaged_network = (averaged,)  # in a tuple, so that torch does not register it a second time
        self._seed = seed
        self._log_every_n_steps = log_every_n_steps
        self._gradient_clip_norm = gradient_clip_norm
        self._noise = StreamNoise(seed)
        self._stride_meter, self._epoch_meter, self._val_meter = Meter(), Meter(), Meter()
        self._meters = (self._stride_meter, self._epoch_meter, self._val_meter)
        self._stride_start = (0.0, 0)  # time in seconds, examples seen
        self._val_examples = 0  # in this validation so far

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside the block the model has its averaged weights, if there are any, and is in evaluation mode."""
        was_training = self.model.training
        self.model.eval()
        try:
            if self.weight_average is None:
                yield
            else:
                with self.weight_average.swapped_into(self._averaged_network[0]):
                    yield
        finally:
            self.model.train(was_training)

    def log_quantities(self, quantities: dict[str, float]) -> None:
        """Write curves at the current step."""
        for logger in self.loggers:
            logger.log_metrics(quantities, step=self.step)

    def setup(self, stage: str) -> None:
        self._noise = StreamNoise(derive_seed(self._seed, self.global_rank))

    def on_train_start(self) -> None:
        self._stride_start = (time.perf_counter(), self.examples_seen)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self._gradient_clip_norm is not None:  # here, where mixed precision has unscaled the gradients
            self.clip_gradients(optimizer, self._gradient_clip_norm, "norm")

    def on_validation_epoch_start(self) -> None:
        self._val_examples = 0

    def on_validation_epoch_end(self) -> None:
        """Held-out means, and beside them the means of the training since the last validation."""
        means = self._val_meter.take()
        require_finite(means, self.step, "val")  # before a checkpoint of such weights takes the place of a good one
        self._log_means("train_epoch", self._epoch_meter.take())
        self._log_means("val", means)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = {"step": self.step, "examples_seen": self.examples_seen}
        checkpoint["noise"] = self._noise.state_dict()
        checkpoint["meters"] = [meter.state_dict() for meter in self._meters]
        checkpoint["torch_rng"] = torch.get_rng_state()  # of what draws from it all the same, as dropout

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.step = checkpoint["progress"]["step"]
        self.examples_seen = checkpoint["progress"]["examples_seen"]
        self._noise.load_state_dict(checkpoint["noise"])
        for meter, state in zip(self._meters, checkpoint["meters"], strict=True):
            meter.load_state_dict(state)
        torch.set_rng_state(checkpoint["torch_rng"])

    def _reduce(self, terms: Terms, prefix: str = "") -> tuple[Tensor, dict[str, float]]:
        """Mean loss and all means under their log names; stops the run if one is not finite."""
        loss, numbers = reduce_terms(terms)
        numbers = {prefix + name: number for name, number in numbers.items()}
        require_finite(numbers, self.step + 1, "train")
        return loss, numbers

    def _built(self, optimizer: Callable[[Iterable[nn.Parameter]], Optimizer], network: nn.Module) -> Optimizer:
        try:
            return optimizer(network.parameters())
        except (ValueError, TypeError) as error:
            raise UserError(f"the optimizer refuses its settings: {error} (see optim in the config)") from error

    def _descend(self, optimizer: LightningOptimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def _val_noise(self, batch: Batch) -> SampleNoise:
        """The same noise for the same example in every validation."""
        start = self._val_examples
        self._val_examples += len(batch)
        return SampleNoise(self._seed, start)

    def _reduce_val(self, terms: Terms, batch: Batch, prefix: str = "") -> None:
        _, numbers = reduce_terms(terms)
        self._val_meter.add({prefix + name: number for name, number in numbers.items()}, weight=len(batch))

    def _count_batch(self, batch: Batch, numbers: dict[str, float]) -> None:
        """End of a training step, after the optimizers: counters, averaged weights, curves."""
        self.step += 1
        num_examples = len(batch) * self.trainer.world_size
        self.examples_seen += num_examples
        if self.weight_average is not None:
            self.weight_average.update(self._averaged_network[0], num_examples, self.examples_seen)
        self.last_numbers = numbers
        self._stride_meter.add(numbers)
        self._epoch_meter.add(numbers)
        if self.step % self._log_every_n_steps == 0:
            self._log_stride()

    def _log_means(self, split: str, means: dict[str, float]) -> None:
        quantities = {f"{split}/{name}": value for name, value in means.items()}
        self.log_dict(quantities, logger=False, sync_dist=True)  # for callbacks that monitor a quantity
        self.log_quantities(quantities)

    def _log_stride(self) -> None:
        now, (then, examples_then) = time.perf_counter(), self._stride_start
        self._stride_start = (now, self.examples_seen)
        quantities = {f"train/{name}": mean for name, mean in self._stride_meter.take().items()}
        quantities["progress/examples_per_second"] = (self.examples_seen - examples_then) / (now - then)
        quantities["progress/examples_seen"] = self.examples_seen
        quantities["progress/epoch"] = self.current_epoch
        self.log_quantities(quantities)
