"""A monitor of the game between two players: is the discriminator overfitting or sure, has the generator collapsed?

After every validation the trained weights, not the averaged ones, are asked, always with the same examples and the same
noise. The discriminator is asked as in training: batch norm by the examples at hand, augmentation as it is set; its state
is put back. A few modes that are missing do not show here: `modes`, `class_kl`, `modes_covered` and `coverage` see those.

    logit_train, logit_held_out, logit_generated   mean logits
    overfit     (train - held_out) / (train - generated) of the mean logits: 0 where the discriminator treats examples that
                it was trained on like others, 1 where it takes held-out examples for generated ones (Karras et al. 2020,
                "Training generative adversarial networks with limited data", arXiv:2006.06676, equation 1)
    separation  the share of pairs of a held-out and a generated example in which the held-out one has the higher logit: 1/2
                where the discriminator cannot tell, 1 where it always can, for every loss
    diversity   mean distance of two generated examples over that of two held-out ones
    averaging   mean distance of the averaged generator's example from the trained one's of the same noise, over the mean
                distance of two held-out examples: how far the generator moves about
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from src.core.errors import require_number
from src.core.protocols import Adversarial, CanSample
from src.core.rng import SampleNoise
from src.data.loading import ArrayData
from src.training.module import TrainingModule

__all__ = ["Stability", "mean_distance", "separation"]

log = logging.getLogger(__name__)

_LEARNING_VALIDATIONS = 5  # in which a generator may begin to be diverse


def separation(real: Tensor, generated: Tensor) -> float:
    """P(a > b) + P(a = b) / 2 over all pairs of logits a of `real` `(N,)` and b of `generated` `(M,)`: area under ROC."""
    rank = torch.cat([real, generated]).double()
    ordered, place = rank.unique(return_inverse=True)
    counts = place.bincount(minlength=len(ordered)).double()
    middle = counts.cumsum(0) - (counts - 1) / 2  # mid-ranks, from 1
    n, m = len(real), len(generated)
    return float((middle[place[:n]].sum() - n * (n + 1) / 2) / (n * m))


def mean_distance(x: Tensor) -> float:
    """Mean Euclidean distance of two different ones among examples `(N, *event)`."""
    return float(torch.pdist(x.flatten(1).double()).mean())


@contextmanager
def _as_in_training(network: nn.Module) -> Iterator[None]:
    """Inside the block a network is in training mode; its buffers are put back after it."""
    buffers = [buffer.clone() for buffer in network.buffers()]
    was_training = network.training
    network.train()
    try:
        yield
    finally:
        network.train(was_training)
        for buffer, before in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(before)


@dataclass(frozen=True)
class _Sign:
    quantity: str
    limit: float
    is_above: bool
    words: str

    def shows(self, value: float) -> bool:
        return value > self.limit if self.is_above else value < self.limit


class Stability(L.Callback):
    """Logs what the module above names as `stability/...`, and says in a sentence when something goes wrong or right.

    Args:
        num_examples: of each kind.
        overfit_above: the discriminator overfits; ADA's target is 0.6.
        separation_above: the discriminator is so sure that the generator may learn little from it.
        diversity_below: the generator has collapsed.
        averaging_above: the generator moves about faster than its average follows.
        seed: of the noise and of the choice of examples.
    """

    def __init__(
        self,
        num_examples: int,
        overfit_above: float,
        separation_above: float,
        diversity_below: float,
        averaging_above: float,
        seed: int,
    ) -> None:
        require_number("callback.stability.num_examples", num_examples, 8)
        for name, limit in (
            ("overfit_above", overfit_above),
            ("separation_above", separation_above),
            ("diversity_below", diversity_below),
            ("averaging_above", averaging_above),
        ):
            require_number(f"callback.stability.{name}", limit, 0)
        self._num_examples = num_examples
        self._seed = seed
        sure = "it tells nearly all held-out examples from generated ones, and may teach the generator little"
        self._diversity = _Sign(
            "diversity", diversity_below, False, "the generator has collapsed: its examples are too alike"
        )
        self._signs = (
            _Sign("overfit", overfit_above, True, "the discriminator overfits: held-out examples look generated to it"),
            _Sign("separation", separation_above, True, f"the discriminator is saturated: {sure}"),
            self._diversity,
            _Sign("averaging", averaging_above, True, "the generator moves about: its average draws something else"),
        )
        self._shown: dict[str, bool] = {}
        self._num_validations = 0
        self._was_diverse = False  # an untrained generator is not yet diverse, which is no collapse

    def on_validation_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        model = pl_module.model
        if not (trainer.is_global_zero and isinstance(model, Adversarial) and isinstance(model, CanSample)):
            return
        was_training = model.training
        model.eval()
        try:
            measured = self._measure(trainer.datamodule, pl_module)
        finally:
            model.train(was_training)
        pl_module.log_quantities({f"stability/{name}": value for name, value in measured.items()})
        self._num_validations += 1
        self._was_diverse |= not self._diversity.shows(measured.get("diversity", 0.0))
        for sign in self._signs:
            if sign.quantity not in measured:
                continue
            shows = sign.shows(measured[sign.quantity])
            if sign is self._diversity and not self._was_diverse and self._num_validations < _LEARNING_VALIDATIONS:
                continue
            if shows != self._shown.get(sign.quantity, False):
                over = "" if shows else "no longer: "
                log.info(f"step {pl_module.step}: {over}{sign.words} ({sign.quantity} {measured[sign.quantity]:.3g})")
            self._shown[sign.quantity] = shows

    def state_dict(self) -> dict[str, Any]:
        return {"shown": self._shown, "num_validations": self._num_validations, "was_diverse": self._was_diverse}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._shown = dict(state_dict["shown"])
        self._num_validations, self._was_diverse = state_dict["num_validations"], state_dict["was_diverse"]

    @torch.no_grad()
    def _measure(self, data: ArrayData, pl_module: TrainingModule) -> dict[str, float]:
        model = pl_module.model
        train, held_out = (self._examples(data, split, pl_module.device) for split in ("train", "val"))
        real, condition = held_out
        asked = condition if model.is_conditional else None
        fake = model.sample(len(real), asked, generator=SampleNoise(self._seed))
        with _as_in_training(model.players()[1]):
            judged = (model.logits(x, y, generator=SampleNoise(self._seed)) for x, y in (train, held_out, (fake, asked)))
            on_train, on_real, on_fake = (logits.float().cpu() for logits in judged)
        means = [float(logit.mean()) for logit in (on_train, on_real, on_fake)]
        measured = dict(zip(("logit_train", "logit_held_out", "logit_generated"), means, strict=True))
        measured["separation"] = separation(on_real, on_fake)
        if self._is_real_difference(on_train, on_fake):
            measured["overfit"] = (means[0] - means[1]) / (means[0] - means[2])
        real, fake = real.cpu(), fake.cpu()
        scale = mean_distance(real)
        if scale > 0:
            measured["diversity"] = mean_distance(fake) / scale
            if pl_module.weight_average is not None:
                with pl_module.averaged_weights():
                    steady = model.sample(len(real), asked, generator=SampleNoise(self._seed))
                moved = (steady.cpu() - fake).flatten(1).double().norm(dim=1).mean()
                measured["averaging"] = float(moved) / scale
        return measured

    def _examples(self, data: ArrayData, split: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Always the same examples of a split, on the model's device, and their classes."""
        size = len(data.arrays.splits[split])
        order = torch.randperm(size, generator=torch.Generator().manual_seed(self._seed))
        batches = [data.to_units(batch.to(device)) for batch in data.held_out_loader(split, order[: self._num_examples])]
        classes = [batch.condition for batch in batches if batch.condition is not None]
        return torch.cat([batch.x for batch in batches]), torch.cat(classes) if classes else None

    @staticmethod
    def _is_real_difference(a: Tensor, b: Tensor) -> bool:
        """Whether two mean logits differ by more than four standard errors; else a ratio of them is noise."""
        if min(len(a), len(b)) < 2:
            return False
        error = (a.var() / len(a) + b.var() / len(b)).sqrt()
        return bool((a.mean() - b.mean()).abs() > 4 * error)
