"""What a search says and leaves behind: its plan, how it gets on, the best trial (best.yaml), all trials (trials.csv)."""

import csv
import io
import logging
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from src.runs import Run, config_hash, descriptive
from src.search_space import Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

__all__ = ["SearchReport", "counted", "pairs", "retried", "say_plan"]

log = logging.getLogger(__name__)


def retried(study: "Study") -> set[int]:
    """Numbers of the trials that were tried again, under another number."""
    return {trial.user_attrs.get("retry_of", -1) for trial in study.get_trials(deepcopy=False)}


def counted(study: "Study") -> "list[FrozenTrial]":
    """The trials so far, those that wait or were tried again not."""
    from optuna.trial import TrialState

    again = retried(study)
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state is not TrialState.WAITING and trial.number not in again and "is_left" not in trial.user_attrs
    ]


def pairs(values: Mapping[str, Any]) -> str:
    """`fd 12.3, val/loss 0.4`."""
    return ", ".join(
        f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def say_plan(first: str, about: Mapping[str, str], space: Space) -> None:
    """What a search would do, from the line `first` to what it varies."""
    log.info(f"search: {first}")
    for name, what in about.items():
        log.info(f"  {name:<9} {what}")
    for key, expression in space.expressions.items():
        log.info(f"  varied    {key}={expression}")
    for override in descriptive(space.fixed):
        log.info(f"  fixed     {override}")
    log.info("plan: nothing was started")


class SearchReport:
    """Words and files about the trials of a study.

    Args:
        objective: directions by name.
        space: what is searched.
        directory: of the search; its files lie there.
    """

    def __init__(self, study: "Study", objective: Mapping[str, str], space: Space, directory: Path) -> None:
        self._study = study
        self._objective = objective
        self._space = space
        self._directory = directory

    def counts(self) -> str:
        """`3 complete, 1 failed`."""
        words = {"fail": "failed"}
        states = Counter(trial.state.name.lower() for trial in counted(self._study))
        return ", ".join(f"{number} {words.get(state, state)}" for state, number in sorted(states.items()))

    def say_start(self, num_left: int, num_trials: int, num_places: int) -> None:
        at_a_time = f"{num_places} at a time" if num_places > 1 else "one at a time"
        log.info(
            f"search by {pairs(self._objective)}: {num_left} of {num_trials} trials to run, {at_a_time}"
            + (f"; so far {counts}" if (counts := self.counts()) else "")
        )

    def say_values(self, number: int, values: Mapping[str, float]) -> None:
        """A trial has ended well, and what it is among the others."""
        best = self._best()
        among = (
            f"{len(best)} on the front"
            if len(self._objective) > 1
            else f"best: {best[0].value:.5g}, trial {best[0].number}"
        )
        log.info(f"trial {number}: {pairs(values)} ({among})")

    def say_end(self, fixed: Sequence[str], compose: Callable[[list[str]], DictConfig]) -> None:
        """The best trials and how to train them once more.

        Args:
            fixed: overrides of one run that all trials have in common.
            compose: gives the config of one run from its overrides.
        """
        best = sorted(self._best(), key=lambda trial: trial.values)
        log.info(f"search: {self.counts()}")
        if not best:
            log.warning("no trial has ended well, so there is no best one")
            return
        if len(best) > 1:
            log.info(f"{len(best)} trials are on the front: none is better than another by all objectives")
        entries = [self._entry(trial, fixed, compose) for trial in best]
        for entry in entries:
            log.info(f"best trial {entry['trial']}: {pairs(entry['values'])} with {' '.join(entry['params'])}")
            log.info(f"  run            {Run(Path(entry['directory'])).shown}")
            log.info(f"  once more      {entry['command']}")
            if "beyond" in entry:
                log.info(f"                 {entry['beyond']}")
        what = f"The best of {len(counted(self._study))} trials by {pairs(self._objective)}."
        _replace(self._directory / "best.yaml", f"# {what}\n{OmegaConf.to_yaml(OmegaConf.create(entries))}")
        where = Run(self._directory).shown
        log.info(f"  the best       {where}/best.yaml")
        log.info(f"  all trials     {where}/trials.csv")

    def write_trials(self) -> None:
        keys = list(self._space.distributions)
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", *self._objective, *keys, "directory", "reason"])
        for trial in self._study.get_trials(deepcopy=False):
            values = trial.values or [""] * len(self._objective)
            params = [trial.params.get(key, "") for key in keys]
            about = [trial.user_attrs.get(name, "") for name in ("directory", "reason")]
            writer.writerow([trial.number, trial.state.name.lower(), *values, *params, *about])
        _replace(self._directory / "trials.csv", file.getvalue())

    def _best(self) -> "list[FrozenTrial]":
        """The best trial, or the front of several objectives; none if none has ended well."""
        from optuna.trial import TrialState

        if not self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            return []
        return self._study.best_trials if len(self._objective) > 1 else [self._study.best_trial]

    def _entry(
        self, trial: "FrozenTrial", fixed: Sequence[str], compose: Callable[[list[str]], DictConfig]
    ) -> dict[str, Any]:
        params = self._space.overrides(trial.params)
        run = Run(Path(trial.user_attrs["directory"]))
        overrides = [*fixed, *params]
        entry = {
            "trial": trial.number,
            "values": dict(zip(self._objective, map(float, trial.values), strict=True)),
            "params": params,
            "directory": str(run.path),
            "command": shlex.join(["python", "-m", "src.train", *overrides]),
        }
        if config_hash(compose(overrides)) != config_hash(run.config()):
            entry["beyond"] = f"the search's YAML sets more than that: see {run.shown}/config.yaml"
        return entry


def _replace(file: Path, text: str) -> None:
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(file)
