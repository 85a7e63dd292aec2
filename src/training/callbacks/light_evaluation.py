"""A light evaluation every few epochs: enough to see a collapse while it can still be stopped."""

import logging
import math
from collections.abc import Callable
from typing import Any

import lightning as L
from torch import nn

from src.core.errors import require_at_least
from src.training.module import TrainingModule

__all__ = ["LightEvaluation"]

log = logging.getLogger(__name__)

Measured = tuple[dict[str, float], dict[str, str | None], list[str]]
_SIGNS = {"lower": 1.0, "higher": -1.0}  # what a value is multiplied by so that smaller is better


class LightEvaluation(L.Callback):
    """Measures a few metrics on few samples, with averaged weights where there are any, and says what is found.

    Few samples give other values than many, so the curves stand apart from the final results, under `light_evaluation/`.
    The last validation is always measured, so that the best value can be told beside the final one: many trainings,
    of GANs above all, are at their best long before their end.

    Args:
        measure: called with a model, a number of samples and names of metrics; gives values by name, which of them are
            better ("lower", "higher", or another word where it hangs on more), findings in words.
        every_n_validations: how often.
        num_samples: drawn each time.
        metrics: names of those that are measured, among those that the run measures at its end; none turns it off.
    """

    def __init__(
        self,
        measure: Callable[[nn.Module, int, list[str]], Measured],
        every_n_validations: int,
        num_samples: int,
        metrics: list[str],
    ) -> None:
        require_at_least("callback.light_evaluation.every_n_validations", every_n_validations, 1)
        require_at_least("callback.light_evaluation.num_samples", num_samples, 2)
        self._measure = measure
        self._num_samples = num_samples
        self._metrics = metrics
        self._every_n_validations = every_n_validations
        self._num_validations = 0
        self.latest: dict[str, float] | None = None  # measured after the latest validation; None if it was not due
        self.course: dict[str, dict[str, Any]] = {}  # of each metric the best and the latest value, each with its step

    def on_validation_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        self._num_validations += 1
        self.latest = None
        is_last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        is_due = self._metrics and (is_last or self._num_validations % self._every_n_validations == 0)
        if not is_due or not trainer.is_global_zero:
            return
        with pl_module.averaged_weights():
            self.latest, better, findings = self._measure(pl_module.model, self._num_samples, self._metrics)
        pl_module.log_quantities({f"light_evaluation/{name}": value for name, value in self.latest.items()})
        for words in findings:
            log.info(f"step {pl_module.step}: {words}")
        for name, value in self.latest.items():
            self._note(name, value, _SIGNS.get(better.get(name) or ""), pl_module.step)

    def state_dict(self) -> dict[str, Any]:
        return {"num_validations": self._num_validations, "course": self.course}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_validations = state_dict["num_validations"]
        self.course = state_dict.get("course", {})

    def _note(self, name: str, value: float, sign: float | None, step: int) -> None:
        if sign is None or not math.isfinite(value):  # no value is better than another by itself
            return
        now = {"value": value, "step": step}
        best = self.course.get(name, {}).get("best", now)
        best = now if sign * value < sign * best["value"] else best
        worse, better = (value, best["value"]) if sign > 0 else (best["value"], value)
        ratio = worse / better if better > 0 else None  # 1: the last is the best; None: of no meaning
        self.course = {**self.course, name: {"best": best, "final": now, "ratio": ratio}}
