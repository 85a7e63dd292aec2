"""A light evaluation every few epochs: enough to see a collapse while it can still be stopped."""

import logging
from collections.abc import Callable

import lightning as L
from torch import nn

from src.core.errors import require_at_least
from src.training.module import TrainingModule

__all__ = ["LightEvaluation"]

log = logging.getLogger(__name__)


class LightEvaluation(L.Callback):
    """Measures a few metrics on few samples, with averaged weights where there are any, and says what is found.

    Few samples give other values than many, so the curves stand apart from the final results, under `light_evaluation/`.

    Args:
        measure: called with a model, a number of samples and names of metrics; gives values by name, findings in words.
        every_n_validations: how often.
        num_samples: drawn each time.
        metrics: names of those that are measured, among those that the run measures at its end; none turns it off.
    """

    def __init__(
        self,
        measure: Callable[[nn.Module, int, list[str]], tuple[dict[str, float], list[str]]],
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

    def on_validation_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        self._num_validations += 1
        self.latest = None
        is_due = self._metrics and self._num_validations % self._every_n_validations == 0
        if not is_due or not trainer.is_global_zero:
            return
        with pl_module.averaged_weights():
            self.latest, findings = self._measure(pl_module.model, self._num_samples, self._metrics)
        pl_module.log_quantities({f"light_evaluation/{name}": value for name, value in self.latest.items()})
        for words in findings:
            log.info(f"step {pl_module.step}: {words}")

    def state_dict(self) -> dict[str, int]:
        return {"num_validations": self._num_validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._num_validations = state_dict["num_validations"]
