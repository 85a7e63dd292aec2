"""What changes in the course of a training: learning rates, Adam's second moment, the weight of a penalty.

Each is a function of the examples seen, so it depends neither on the batch size nor on the number of devices.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

from torch.optim import Optimizer

from src.core.errors import UserError, require_number

__all__ = ["Constant", "Cosine", "Linear", "Schedule", "WarmUpCosine"]


class Schedule(ABC):
    """A way from the settings as they are given to others."""

    examples: float | None = None  # seen until its end

    def plan(self, num_examples: float | None, per_update: int) -> None:  # noqa: B027 - most have no use for it
        """Told before the first step what the training is to be.

        Args:
            num_examples: that it is planned to see; None if that is not known.
            per_update: examples that one update of the weights is made of, over all devices.
        """

    def state_dict(self) -> dict[str, float]:
        """What was planned at the beginning, for a checkpoint: a training that is resumed keeps to it."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:  # noqa: B027 - most have none
        """Take what `state_dict` gave; of an empty one nothing."""

    @property
    def ends(self) -> dict[str, float]:
        """Factors of the learning rate (`lr`) and the penalty (`penalty`), and a value of Adam's `beta2`, at its end."""
        return {}

    @abstractmethod
    def progress(self, examples_seen: float) -> float:
        """How far on the way, from 0 to 1."""

    def lr_factor(self, examples_seen: float) -> float:
        """What all learning rates are multiplied by."""
        return 1 + (self.ends.get("lr", 1.0) - 1) * self.progress(examples_seen)

    def penalty_factor(self, examples_seen: float) -> float:
        """What the weight of the penalty is multiplied by."""
        return 1 + (self.ends.get("penalty", 1.0) - 1) * self.progress(examples_seen)

    def remember(self, optimizer: Optimizer) -> None:
        """Note an optimizer's settings as they are given. Raises `UserError` if it lacks one that changes."""
        for group in optimizer.param_groups:
            group["given_lr"] = group["lr"]
            if "beta2" in self.ends:
                if "betas" not in group:
                    raise UserError(
                        f"training.schedule.beta2 is of Adam and its kin; {type(optimizer).__name__} has no betas"
                    )
                group["given_beta2"] = group["betas"][1]

    def apply(self, optimizer: Optimizer, examples_seen: float) -> None:
        """Set what the optimizer takes its next step with."""
        if not self.ends:
            return
        share = self.progress(examples_seen)
        for group in optimizer.param_groups:
            group["lr"] = group["given_lr"] * self.lr_factor(examples_seen)
            if "beta2" in self.ends:
                beta2 = group["given_beta2"] + (self.ends["beta2"] - group["given_beta2"]) * share
                group["betas"] = (group["betas"][0], beta2)


class Constant(Schedule):
    """Nothing changes."""

    def progress(self, examples_seen: float) -> float:
        return 0.0


class _Change(Schedule):
    """To other settings, within the first `examples`; then they stay.

    Args:
        examples: seen until the end of the change.
        lr_factor: of all learning rates, at its end.
        penalty_factor: of the weight of the penalty, at its end.
        beta2: of all optimizers, at its end; None leaves it.
    """

    def __init__(self, examples: float, lr_factor: float, penalty_factor: float, beta2: float | None) -> None:
        require_number("training.schedule.examples", examples, 1)
        require_number("training.schedule.lr_factor", lr_factor, 0)
        require_number("training.schedule.penalty_factor", penalty_factor, 0)
        if beta2 is not None and not 0 <= beta2 < 1:
            raise UserError(f"training.schedule.beta2={beta2} must be at least 0 and below 1")
        if lr_factor == penalty_factor == 1 and beta2 is None:
            raise UserError(
                "training.schedule changes nothing: set its lr_factor, penalty_factor or beta2, or choose "
                "schedule@training.schedule=constant"
            )
        self.examples = examples
        self._ends = {"lr": lr_factor, "penalty": penalty_factor} | ({} if beta2 is None else {"beta2": beta2})

    @property
    def ends(self) -> dict[str, Any]:
        return self._ends

    def progress(self, examples_seen: float) -> float:
        return min(1.0, examples_seen / self.examples)


class Linear(_Change):
    """In a straight line, as SNGAN's learning rate goes to zero. Arguments: as of the others."""


class Cosine(_Change):
    """Along half a cosine: (1 - cos(pi t)) / 2, as R3GAN's burn-in (arXiv:2501.05441, appendix D)."""

    def progress(self, examples_seen: float) -> float:
        return (1 - math.cos(math.pi * super().progress(examples_seen))) / 2


class WarmUpCosine(Schedule):
    """The learning rate climbs in a straight line, then falls along half a cosine to a floor, and stays there.

    It is set anew before every update. Loshchilov, Hutter 2017, "SGDR: stochastic gradient descent with warm restarts",
    arXiv:1608.03983, without restarts. The warm-up is as nanoGPT has it: update i of W, counted from 0, is taken with the
    share (i + 1) / (W + 1) of the learning rate, so the first one is not lost.

    A training that is resumed and made longer keeps the examples that were planned at its beginning.

    Args:
        examples: seen until the floor is reached; None for as many as the training is planned to see.
        warm_up: share of these examples within which the learning rate climbs.
        lr_factor: of all learning rates, at the floor.
    """

    def __init__(self, examples: float | None, warm_up: float, lr_factor: float) -> None:
        if examples is not None:
            require_number("training.schedule.examples", examples, 1)
        if not 0 <= warm_up < 1:
            raise UserError(f"training.schedule.warm_up={warm_up} must be a share of the examples, at least 0 and below 1")
        require_number("training.schedule.lr_factor", lr_factor, 0)
        self.examples = examples
        self._is_planned = examples is None
        self._per_update = 1
        self._warm_up = warm_up
        self._floor = lr_factor

    @property
    def ends(self) -> dict[str, float]:
        return {"lr": self._floor}

    def plan(self, num_examples: float | None, per_update: int) -> None:
        self._per_update = per_update
        self.examples = num_examples if self.examples is None else self.examples
        if self.examples is None:
            raise UserError("the training has no planned end: set training.schedule.examples= to the examples it may see")

    def state_dict(self) -> dict[str, float]:
        return {"examples": self.examples} if self._is_planned and self.examples is not None else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self._is_planned:
            self.examples = state.get("examples", self.examples)

    def progress(self, examples_seen: float) -> float:
        """How far on the way down, from 0 to 1."""
        assert self.examples is not None, "the training is not planned yet"
        climb = self._warm_up * self.examples
        share = (examples_seen - climb) / (self.examples - climb)
        return (1 - math.cos(math.pi * min(1.0, max(0.0, share)))) / 2

    def lr_factor(self, examples_seen: float) -> float:
        assert self.examples is not None, "the training is not planned yet"
        climb = self._warm_up * self.examples
        if examples_seen >= climb:
            return super().lr_factor(examples_seen)
        of_whole_updates = examples_seen // self._per_update * self._per_update
        return (of_whole_updates + self._per_update) / (climb + self._per_update)
