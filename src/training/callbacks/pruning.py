"""A training of a search tells its study how it gets on, and ends when the study gives it up."""

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L

from src.core.errors import PrunedError, UserError
from src.training.callbacks.light_evaluation import LightEvaluation
from src.training.study import is_url, make_pruner, open_storage, shown_storage

if TYPE_CHECKING:
    from optuna.trial import Trial

__all__ = ["Prune"]

log = logging.getLogger(__name__)

_LIGHT = "light_evaluation/"


class Prune(L.Callback):
    """Reports a quantity to the trial after every validation that measured it; raises `PrunedError` if it is given up.

    The search writes it into the config of its trainings. It comes after the checkpoints, so a training that is given up
    has its last one. A training whose trial has ended, as one that is resumed by hand, is not given up.

    Args:
        storage, study, trial: URL or journal file; name; number.
        quantity: as "val/loss", or "light_evaluation/fd".
        pruner, n_startup_trials, n_warmup_epochs: see `make_pruner`.
    """

    def __init__(
        self,
        storage: str,
        study: str,
        trial: int,
        quantity: str,
        pruner: str,
        n_startup_trials: int,
        n_warmup_epochs: int,
    ) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise UserError("callback.prune needs Optuna: make extra EXTRA=optuna")
        self._storage = storage
        self._study = study
        self._number = trial
        self._quantity = quantity
        self._pruner_name = pruner
        self._pruner = make_pruner(pruner, n_startup_trials, n_warmup_epochs)
        self._trial: Trial | None = None
        self._is_due = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            raise UserError(f"a training on {trainer.world_size} devices is not pruned; set hydra.sweeper.pruner=none")
        self._trial = self._open()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._is_due = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._is_due or self._trial is None:
            return
        self._is_due = False
        value = self._value(trainer)
        if value is None:
            return
        epoch = trainer.current_epoch + 1  # comparable also between batches of different sizes
        self._trial.report(value, epoch)
        is_last = trainer.should_stop or epoch == trainer.max_epochs
        if not is_last and self._trial.should_prune():
            raise PrunedError(f"{self._quantity} {value:.5g} at epoch {epoch}, by the {self._pruner_name} pruner")

    def _open(self) -> "Trial | None":
        import optuna

        where = shown_storage(self._storage)
        if not is_url(self._storage) and not Path(self._storage).exists():
            raise UserError(
                f"the study of this training, {where}, is not there; was it moved? (to train without it, take "
                "callback.prune out of the run's config.yaml)"
            )
        storage = open_storage(self._storage)
        try:
            study_id = storage.get_study_id_from_name(self._study)
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, self._number)
        except KeyError as error:
            hint = "" if is_url(self._storage) else "; was it moved?"
            raise UserError(
                f"{where} has no trial {self._number} of a study {self._study}{hint} (to train without it, take "
                "callback.prune out of the run's config.yaml)"
            ) from error
        if storage.get_trial(trial_id).state.is_finished():
            log.info(f"trial {self._number} of the study {self._study} has ended, so this training is not pruned")
            return None
        sampler = optuna.samplers.RandomSampler()  # never asked
        study = optuna.load_study(study_name=self._study, storage=storage, sampler=sampler, pruner=self._pruner)
        return optuna.trial.Trial(study, trial_id)

    def _value(self, trainer: L.Trainer) -> float | None:
        """The quantity, None if this validation was none of those that measure it."""
        if not self._quantity.startswith(_LIGHT):
            measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        else:
            light = next(callback for callback in trainer.callbacks if isinstance(callback, LightEvaluation))
            if light.latest is None:
                return None
            measured = {f"{_LIGHT}{name}": value for name, value in light.latest.items()}
        if self._quantity not in measured:
            allowed = ", ".join(name for name in measured if name.startswith(("val/", _LIGHT)))
            if self._quantity.startswith(_LIGHT):
                allowed = f"{allowed or 'none'} (some need more samples: callback.light_evaluation.num_samples=)"
            raise UserError(f"a search cannot prune by {self._quantity}, which is not measured; allowed: {allowed}")
        return measured[self._quantity]
