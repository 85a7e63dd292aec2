"""What every LightningModule here shares: one step counter, noise, averaged weights, logging at a stride.

Lightning's `global_step` counts optimizer steps, so with two optimizers it runs twice as fast. Nothing here reads it:
`step` counts batches once, and budgets, axes and file names use it.

Gradients may be accumulated: a round of `accumulate_batches` batches gives one update of the weights, the one that a batch
of all their examples would give. An epoch is a number of whole rounds, and a checkpoint is written between two of them.

On several devices every rank takes the same steps: gradients are averaged before each update (src.training.ranks), and
what is logged is the mean over all ranks.
"""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from src.core.batch import Batch
from src.core.collectives import broadcast_from_first, gather, mean_over_ranks
from src.core.errors import UserError, require_at_least
from src.core.protocols import NeedsPreparation, Terms
from src.core.rng import SampleNoise, StreamNoise, derive_seed
from src.training.ema import WeightAverage
from src.training.meter import Meter, reduce_terms, require_finite
from src.training.ranks import average_gradients
from src.training.schedules import Constant, Schedule
from src.training.weights import require_vocabulary

__all__ = ["TrainingModule"]


class TrainingModule(L.LightningModule, ABC):
    """Base of the three drivers, `GradientTraining`, `AdversarialTraining` and `ExpectationMaximizationTraining`.

    Args:
        model: what is trained.
        averaged: the network whose weights are averaged: the model, or its generator.
        seed: seed of the training noise; every rank has its own stream.
        log_every_n_steps: stride of the step-wise curves.
        ema_half_life_examples: half-life of the averaged weights, None for no averaging.
        gradient_clip_norm: largest norm of one optimizer's gradient, None for no clipping.
        accumulate_batches: batches that one update of the weights is made of.
    """

    _schedule: Schedule = Constant()  # of those that have no other

    automatic_optimization = False  # one way to step for one optimizer and for two, so that both count alike

    def __init__(
        self,
        model: nn.Module,
        averaged: nn.Module,
        seed: int,
        log_every_n_steps: int,
        ema_half_life_examples: float | None,
        gradient_clip_norm: float | None,
        accumulate_batches: int,
    ) -> None:
        super().__init__()
        require_at_least("training.log_every_n_steps", log_every_n_steps, 1)
        require_at_least("training.ema_half_life_examples", ema_half_life_examples, 1)
        require_at_least("training.gradient_clip_norm", gradient_clip_norm, 1e-12)
        require_at_least("training.accumulate_batches", accumulate_batches, 1)
        self.model = model
        self.step = 0  # batches so far
        self.examples_seen = 0  # over all ranks
        self.last_numbers: dict[str, float] = {}  # of the latest batch, means over all ranks
        self.accumulate_batches = accumulate_batches
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

    @property
    def num_rounds(self) -> int:
        """Updates of the weights so far."""
        return self.step // self.accumulate_batches

    @property
    def place_in_round(self) -> int:
        """Batches of the round that is begun; 0 between two rounds."""
        return self.step % self.accumulate_batches

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
        if self.global_rank > 0:  # what draws from the global generators all the same, as dropout, differs between ranks
            _seed_global_generators(derive_seed(self._seed, self.global_rank, 1))

    def on_train_start(self) -> None:
        num_batches = self.trainer.num_training_batches
        if num_batches % self.accumulate_batches:
            raise UserError(
                f"an epoch of {num_batches} batches is no whole number of training.accumulate_batches="
                f"{self.accumulate_batches} (set trainer.limit_train_batches= to a multiple of it)"
            )
        self._stride_start = (time.perf_counter(), self.examples_seen)
        if self.step == 0 and isinstance(self.model, NeedsPreparation):
            self._prepare_model(self.model)

    @torch.no_grad()
    def _prepare_model(self, model: NeedsPreparation) -> None:
        """The same on all ranks: each sees all of the training data, in its order."""
        data = self.trainer.datamodule

        def examples() -> Iterator[Batch]:
            return (data.to_units(batch.to(self.device)) for batch in data.held_out_loader("train"))

        noise = StreamNoise(derive_seed(self._seed, 0, 2))
        model.prepare(examples, generator=noise)
        broadcast_from_first(self)
        if self.weight_average is not None:
            self.weight_average.restart(self._averaged_network[0])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self._gradient_clip_norm is not None:  # here, where mixed precision has unscaled the gradients
            self.clip_gradients(optimizer, self._gradient_clip_norm, "norm")

    def on_validation_epoch_start(self) -> None:
        broadcast_from_first(self, buffers_only=True)  # batch norm's statistics, where they are not synchronized

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if len(batch):  # a rank may have no share in few held-out examples
            # the same noise for the same example in every validation, whatever the number of ranks
            noise = SampleNoise(self._seed, self.trainer.datamodule.first_val_example(batch_idx))
            with self.averaged_weights():
                self._validate(batch, noise)

    @abstractmethod
    def _validate(self, batch: Batch, noise: SampleNoise) -> None:
        """Count the losses of held-out examples."""

    def on_validation_epoch_end(self) -> None:
        """Held-out means, and beside them the means of the training since the last validation."""
        self._val_meter.add_other_ranks()
        means = self._val_meter.take()
        require_finite(means, self.step, "val")  # before a checkpoint of such weights takes the place of a good one
        self._log_means("train_epoch", self._epoch_meter.take())
        self._log_means("val", means)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.place_in_round == 0, "the gradients of a round that is begun are in no checkpoint"
        checkpoint["progress"] = {"step": self.step, "examples_seen": self.examples_seen}
        checkpoint["meters"] = [meter.state_dict() for meter in self._meters]  # the same on all ranks
        checkpoint["schedule"] = self._schedule.state_dict()
        if (vocabulary := self._vocabulary()) is not None:
            checkpoint["vocabulary"] = vocabulary
        checkpoint["ranks"] = gather({"noise": self._noise.state_dict(), **_global_generators(self.device)})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ranks = checkpoint.get("ranks", [])
        if len(ranks) != self.trainer.world_size:
            raise UserError(
                f"the checkpoint is of a training on {len(ranks)} devices, this one has {self.trainer.world_size}: set "
                "trainer.devices= and trainer.num_nodes= as they were"
                if ranks
                else "the checkpoint was written by an older version of this program, which cannot be resumed by this one"
            )
        require_vocabulary(checkpoint, self._vocabulary(), "the checkpoint")
        self.step = checkpoint["progress"]["step"]
        self.examples_seen = checkpoint["progress"]["examples_seen"]
        for meter, state in zip(self._meters, checkpoint["meters"], strict=True):
            meter.load_state_dict(state)
        self._schedule.load_state_dict(checkpoint.get("schedule", {}))  # one of an older version has none
        own = ranks[self.global_rank]
        self._noise.load_state_dict(own["noise"])
        _set_global_generators(own, self.device)

    def _vocabulary(self) -> str | None:
        """What the tokens of the data are, if they are of texts."""
        tokenizer = self.trainer.datamodule.arrays.tokenizer
        return None if tokenizer is None else tokenizer.vocabulary

    def _reduce(self, terms: Terms, prefix: str = "") -> tuple[Tensor, dict[str, float]]:
        """This rank's mean loss, and all means over all ranks under their log names; stops the run if one is not finite.

        What is not finite on one rank is not finite in the mean, so all of them stop.
        """
        loss, numbers = reduce_terms(terms)
        numbers = {prefix + name: number for name, number in mean_over_ranks(numbers, self.device).items()}
        require_finite(numbers, self.step + 1, "train")
        return loss, numbers

    def _built(self, optimizer: Callable[[Iterable[nn.Parameter]], Optimizer], network: nn.Module) -> Optimizer:
        try:
            return optimizer(network.parameters())
        except (ValueError, TypeError) as error:
            raise UserError(f"the optimizer refuses its settings: {error} (see optim in the config)") from error

    def _descend(self, optimizer: LightningOptimizer, loss: Tensor, place: int) -> None:
        """The share of one batch in an update, the batch at `place` of its round; with the last one the update itself."""
        if place == 0:
            optimizer.zero_grad()
        self.manual_backward(loss / self.accumulate_batches)
        if place + 1 == self.accumulate_batches:
            average_gradients(weight for group in optimizer.param_groups for weight in group["params"])
            optimizer.step()

    def _reduce_val(self, terms: Terms, prefix: str = "") -> None:
        if not (size := len(terms["loss"])):  # too few held-out examples on this rank for a pack of them
            return
        _, numbers = reduce_terms(terms)
        self._val_meter.add({prefix + name: number for name, number in numbers.items()}, weight=size)

    def _count_batch(self, batch: Batch, numbers: dict[str, float]) -> None:
        """End of a training step, after the optimizers: counters, averaged weights, curves."""
        self.step += 1
        num_examples = len(batch) * self.trainer.world_size
        self.examples_seen += num_examples
        if self.weight_average is not None and self.place_in_round == 0:
            num_examples *= self.accumulate_batches
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


def _seed_global_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # on all devices


def _global_generators(device: torch.device) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's own generators, as tensors and plain types."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert name == "MT19937"
    assert isinstance(keys, np.ndarray)
    return {
        "python": random.getstate(),
        "numpy": {"keys": torch.from_numpy(keys.astype(np.int64)), "rest": [int(position), int(has_gauss), float(gauss)]},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_global_generators(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(("MT19937", state["numpy"]["keys"].numpy().astype(np.uint32), *state["numpy"]["rest"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
