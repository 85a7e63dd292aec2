"""A search: a sweep whose jobs are the trials of an Optuna study, which lies in storage and goes on where it ended.

A trial is asked for whenever a place for a job is free. A trial that was running when the search was killed keeps its
number, its parameters and its directory, so that its training goes on from its checkpoint. Trial n is drawn with a seed
made of `seed` and n: a search that was killed and typed again draws what it would have drawn.
"""

import hashlib
import importlib.util
import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from src.claim import claim
from src.core.errors import UserError, require_at_least
from src.jobs import Job, objectives
from src.launchers.base import JobLauncher
from src.runs import Run, descriptive
from src.search_report import SearchReport, counted, pairs, retried, say_plan
from src.search_space import read_space
from src.training.study import PRUNERS, is_url, open_storage, shown_storage

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler

__all__ = ["Search"]

log = logging.getLogger(__name__)

_SAMPLERS = ("tpe", "random", "gp", "nsgaii")
_DIRECTIONS = ("minimize", "maximize")
_NAME_IN_JOURNAL = "search"
_PRUNED_BY = "light_evaluation"


class Search(Sweeper):
    """Hydra's side of a study.

    Args:
        n_trials: of the study, over all its lives; those that failed count, too.
        n_jobs: trials at a time; None: as many as the launcher has places.
        sampler: what chooses the parameters of a trial: "tpe", "random", "gp" or "nsgaii".
        n_startup_trials: before the sampler and the pruner look at those that have ended.
        seed: of the sampler.
        pruner: what gives trainings up: "none", "median" or "halving".
        n_warmup_epochs: before which none is given up.
        storage: None for a journal file in the directory of the sweep; path of another one; URL of a data base.
        study_name: None for the name of the sweep's directory.
        params: the space, Hydra's sweep expressions by key.
    """

    def __init__(
        self,
        n_trials: int,
        n_jobs: int | None,
        sampler: str,
        n_startup_trials: int,
        seed: int,
        pruner: str,
        n_warmup_epochs: int,
        storage: str | None,
        study_name: str | None,
        params: Mapping[str, Any] | None,
    ) -> None:
        self._n_trials = n_trials
        self._n_jobs = n_jobs
        self._sampler = sampler
        self._n_startup_trials = n_startup_trials
        self._seed = seed
        self._pruner = pruner
        self._n_warmup_epochs = n_warmup_epochs
        self._storage = storage
        self._study_name = study_name
        self._params = dict(params or {})
        self._has_warned = False

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise UserError("hydra/sweeper=optuna needs Optuna: make extra EXTRA=optuna")
        self._require_settings()
        self._context = hydra_context
        self._config = config
        self._objective = _objective(config)
        self._directory = Path(config.hydra.sweep.dir)
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self._num_places = self._places()

    def sweep(self, arguments: list[str]) -> None:
        self._space = read_space(self._params, arguments, self._context.config_loader)
        if not self._space.distributions:
            raise UserError("a search needs a space: give an interval or a choice, as optim.lr=interval(1e-4,1e-2)")
        self._quantity = self._quantity_to_prune_by()
        self._where = self._absolute_storage()
        self._name = self._study_name or (_NAME_IN_JOURNAL if self._storage is None else self._directory.name)
        if self._config.plan:
            self._print_plan()
            return
        with claim(self._directory):
            self._study = self._open()
            self._going_on = deque(self._take_over())
            if self._config.retry_failed:
                self._retry()
            self._report = self._new_report()
            self._report.say_start(self._num_left(), self._n_trials, self._num_places)
            self._running: dict[Path, list[int]] = {}  # numbers of trials by the directory of their job
            try:
                if isinstance(self._launcher, JobLauncher):
                    self._launcher.work_off(self._next_job, self._at_end, self._num_left())
                else:
                    self._in_batches()
            finally:
                self._report.write_trials()
            self._report.say_end(self._fixed_without_search(), self._compose_alone)

    # what was given

    def _require_settings(self) -> None:
        least = {"n_trials": 1, "n_jobs": 1, "n_startup_trials": 0, "n_warmup_epochs": 0, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, f"_{name}")
            if not (isinstance(value, int) and not isinstance(value, bool)) and not (name == "n_jobs" and value is None):
                raise UserError(f"hydra.sweeper.{name}={value} must be a whole number")
            require_at_least(f"hydra.sweeper.{name}", value, bound)
        for name, allowed in {"sampler": _SAMPLERS, "pruner": PRUNERS}.items():
            if (value := getattr(self, f"_{name}")) not in allowed:
                raise UserError(f"hydra.sweeper.{name}={value} is not known; allowed: {', '.join(allowed)}")

    def _places(self) -> int:
        """Trials at a time."""
        if not isinstance(self._launcher, JobLauncher):
            return self._n_jobs or 1
        places = self._launcher.num_places
        if self._n_jobs is None and places is None:
            raise UserError("this launcher starts as many jobs as it is given; say how many with hydra.sweeper.n_jobs=")
        if self._n_jobs is not None and places is not None and self._n_jobs > places:
            raise UserError(
                f"hydra.sweeper.n_jobs={self._n_jobs}, but the launcher has places for {places} jobs; give it more "
                "(hydra.launcher.n_jobs=), or leave hydra.sweeper.n_jobs out"
            )
        places = self._n_jobs or places
        assert places is not None
        return places

    def _quantity_to_prune_by(self) -> str | None:
        """What a training reports while it runs; None without pruning. Checks the objective, too."""
        config = self._compose(self._space.fixed)
        for name in self._objective:
            if not name.startswith("val/") and name not in config.metric:
                raise UserError(
                    f"objective={name} is neither a held-out mean of the training, as val/loss, nor one of metric=: "
                    f"{', '.join(map(str, config.metric))}"
                )
        if self._pruner == "none":
            return None
        given = f"hydra.sweeper.pruner={self._pruner}"
        if len(self._objective) > 1:
            raise UserError(f"{given} judges a training by one quantity, and there are {len(self._objective)} objectives")
        if not isinstance(self._launcher, JobLauncher):
            raise UserError(f"{given} needs a launcher of ours: hydra/launcher=local, slurm or ray")
        if config.trainer.devices not in (1, "1") or config.trainer.num_nodes != 1:
            raise UserError(f"{given} cannot prune a training on several devices")
        (name,) = self._objective
        if name.startswith("val/"):
            return name
        light = list(config.callback.light_evaluation.metrics or ())
        if name in light:
            return f"{_PRUNED_BY}/{name}"
        raise UserError(
            f"{given}: {name} is not measured during a training; give an objective that is: a held-out mean, as val/loss, "
            f"or one of callback.light_evaluation.metrics=[{','.join(light)}]"
        )

    def _absolute_storage(self) -> str:
        """The storage by a name that holds in the processes of the trainings, too."""
        if self._storage is None:
            return str((self._directory / "study.journal").absolute())
        if not is_url(self._storage):
            return str(Path(self._storage).absolute())
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            url = make_url(self._storage)
        except ArgumentError as error:
            raise UserError(f"hydra.sweeper.storage={self._storage} is no URL, as sqlite:///study.db is") from error
        if url.password is not None and self._quantity is not None:
            raise UserError(
                "hydra.sweeper.storage= holds a password, which pruning would write into the config of every run; let the "
                "data base's own password file give it, or set hydra.sweeper.pruner=none"
            )
        if url.get_backend_name() == "sqlite":
            if url.database in (None, "", ":memory:"):
                raise UserError(f"hydra.sweeper.storage={self._storage} keeps nothing; name a file, as sqlite:///study.db")
            url = url.set(database=str(Path(url.database).absolute()))
        return url.render_as_string(hide_password=False)

    # the study

    def _is_there(self) -> bool:
        """Whether the storage is there; of a data base of its own process nobody knows before it is asked."""
        if not is_url(self._where):
            return Path(self._where).exists()
        from sqlalchemy.engine import make_url

        url = make_url(self._where)
        return url.get_backend_name() != "sqlite" or Path(str(url.database)).exists()

    def _open(self) -> "Study":
        import optuna

        for file in [Path(self._where)] if not is_url(self._where) else []:
            file.parent.mkdir(parents=True, exist_ok=True)
        storage = open_storage(self._where)
        arguments: dict[str, Any] = {
            "study_name": self._name,
            "storage": storage,
            "sampler": self._new_sampler(0),
            "directions": list(self._objective.values()),
        }
        wanted = [list(pair) for pair in self._objective.items()]
        study = optuna.create_study(**arguments, load_if_exists=True)
        judged = study.user_attrs.get("objective", wanted)
        if judged != wanted:
            if any(trial.state.is_finished() and trial.values for trial in study.get_trials(deepcopy=False)):
                raise UserError(
                    f"the study is judged by {pairs(dict(judged))}, not by {pairs(self._objective)}; give this search "
                    "another directory with sweep=NAME, or another hydra.sweeper.study_name="
                )
            optuna.delete_study(study_name=self._name, storage=storage)  # it has no value yet
            study = optuna.create_study(**arguments)
        study.set_user_attr("objective", wanted)
        self._require_same_kinds(study)
        return study

    def _require_same_kinds(self, study: "Study") -> None:
        """Optuna lets the ends of an interval change between trials, the options of a choice not."""
        from optuna.distributions import check_distribution_compatibility

        for trial in study.get_trials(deepcopy=False):
            for key in trial.distributions.keys() & self._space.distributions.keys():
                try:
                    check_distribution_compatibility(trial.distributions[key], self._space.distributions[key])
                except ValueError as error:
                    raise UserError(
                        f"{key}={self._space.expressions[key]} differs from what the study has tried so far; give this "
                        "search another directory with sweep=NAME, or another hydra.sweeper.study_name="
                    ) from error

    def _take_over(self) -> Iterator[int]:
        """Trials that this sweep was running when it ended."""
        from optuna.trial import TrialState

        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._storage is not None and trial.user_attrs.get("sweep") != self._address:
                continue  # another sweep's, in a storage that several may share
            if trial.params.keys() == self._space.distributions.keys():
                yield trial.number
            else:
                self._set(trial.number, "is_left", True)
                self._fail(trial.number, "the space has other keys now")

    def _retry(self) -> None:
        """Queue the parameters of the trials again whose trainings failed."""
        from optuna.trial import TrialState

        again = retried(self._study)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
            run = Run(Path(trial.user_attrs.get("directory", "")))
            if trial.number not in again and run.is_there() and run.state()["status"] == "failed":
                self._study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})

    def _num_left(self) -> int:
        return max(0, self._n_trials - len(counted(self._study))) + len(self._going_on)

    @property
    def _address(self) -> str:
        return str(self._directory.absolute())

    def _set(self, number: int, key: str, value: Any) -> None:
        storage = self._study._storage
        trial_id = storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
        storage.set_trial_user_attr(trial_id, key, value)

    def _new_sampler(self, number: int) -> "BaseSampler":
        from optuna.samplers import GPSampler, NSGAIISampler, RandomSampler, TPESampler

        seed = int(hashlib.sha256(f"{self._seed}/{number}".encode()).hexdigest()[:8], 16)
        match self._sampler:
            case "tpe":
                return TPESampler(n_startup_trials=self._n_startup_trials, seed=seed)
            case "gp":
                return GPSampler(n_startup_trials=self._n_startup_trials, seed=seed)
            case "nsgaii":
                return NSGAIISampler(seed=seed)
        return RandomSampler(seed=seed)

    # trials

    def _next_trial(self) -> int | None:
        if self._going_on:
            return self._going_on.popleft()
        if len(counted(self._study)) >= self._n_trials:
            return None
        self._study.sampler = self._new_sampler(len(self._study.get_trials(deepcopy=False)))
        trial = self._study.ask(self._space.distributions)
        trial.set_user_attr("sweep", self._address)
        return trial.number

    def _overrides(self, number: int) -> list[str]:
        return [*self._params_of(number), *self._space.fixed]

    def _params_of(self, number: int) -> list[str]:
        return self._space.overrides(self._study.get_trials(deepcopy=False)[number].params)

    def _next_job(self) -> Job | None:
        """The job of the next trial that has anything to train."""
        assert isinstance(self._launcher, JobLauncher)
        while len(self._running) < self._num_places and (number := self._next_trial()) is not None:
            with _in_one_sentence():
                job = self._launcher.job(self._overrides(number), number)
            job = replace(job, overrides=self._params_of(number))  # what it is called by
            self._launcher.require_possible(job)
            self._set(number, "directory", str(job.run.path))
            if job.run.path in self._running:  # the same parameters, drawn twice
                self._running[job.run.path].append(number)
                continue
            if self._quantity is not None:
                with open_dict(job.config):
                    job.config.callback.prune = self._prune_settings(number)
            if self._launcher.worth_running([job]):
                self._running[job.run.path] = [number]
                return job
            self._tell(number, job.run)
        return None

    def _at_end(self, job: Job) -> None:
        for number in self._running.pop(job.run.path):
            self._tell(number, job.run)

    def _in_batches(self) -> None:
        """Under a launcher that is not ours: the next batch begins when the slowest of the last one has ended."""
        while True:
            batch = [number for _ in range(self._num_places) if (number := self._next_trial()) is not None]
            if not batch:
                return
            returned = self._launcher.launch([self._overrides(number) for number in batch], initial_job_idx=batch[0])
            for number, job in zip(batch, returned, strict=True):
                if job.hydra_cfg is None:
                    self._fail(number, f"its launcher gave nothing back ({job._return_value})")
                    continue
                run = Run(Path(job.hydra_cfg.hydra.runtime.output_dir))
                self._set(number, "directory", str(run.path))
                self._tell(number, run)

    def _prune_settings(self, number: int) -> dict[str, Any]:
        return {
            "_target_": "src.training.callbacks.pruning.Prune",
            "storage": self._where,
            "study": self._name,
            "trial": number,
            "quantity": self._quantity,
            "pruner": self._pruner,
            "n_startup_trials": self._n_startup_trials,
            "n_warmup_epochs": self._n_warmup_epochs,
        }

    def _tell(self, number: int, run: Run) -> None:
        """Tell the study how the job of a trial stands."""
        from optuna.trial import TrialState

        status = run.state() if run.is_there() else {"status": "failed", "reason": "it never began"}
        match status["status"]:
            case "done":
                self._tell_values(number, run)
            case "pruned":
                self._study.tell(number, state=TrialState.PRUNED)
                log.info(f"trial {number}: pruned ({status.get('reason', 'no reason known')})")
            case "failed":
                self._fail(number, status.get("reason", "no reason known"))
            case other:
                log.warning(f"trial {number}: {other}; the same command goes on with it")

    def _tell_values(self, number: int, run: Run) -> None:
        values = dict(zip(self._objective, objectives(run, list(self._objective)), strict=True))
        if not all(map(math.isfinite, values.values())):
            measured = (run.results() or {}).get("metrics", {})
            reasons = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
            reasons += [why for name in values if (why := measured.get(name, {}).get("not_applicable"))]
            self._fail(number, "; ".join(reasons))
            return
        self._study.tell(number, list(values.values()))
        self._warn_of_test_images(run)
        self._report.say_values(number, values)

    def _warn_of_test_images(self, run: Run) -> None:
        """Once: what is chosen by the test images is better on them than it is."""
        measured = (run.results() or {}).get("metrics", {})
        by_test = [name for name in self._objective if measured.get(name, {}).get("card", {}).get("split") == "test"]
        if by_test and not self._has_warned:
            self._has_warned = True
            log.warning(
                f"{', '.join(by_test)} is measured on the test images: what is chosen by it has no honest test; choose by "
                "a held-out mean, as val/loss"
            )

    def _fail(self, number: int, reason: str) -> None:
        from optuna.trial import TrialState

        self._set(number, "reason", reason)
        self._study.tell(number, state=TrialState.FAIL)
        log.warning(f"trial {number}: failed ({reason}); the search goes on")

    # what is said

    def _print_plan(self) -> None:
        counts = "a new study"
        if self._is_there():
            import optuna

            storage = open_storage(self._where, may_write=False)
            if self._name in [study.study_name for study in optuna.get_all_study_summaries(storage)]:
                self._study = optuna.load_study(study_name=self._name, storage=storage)
                left = max(0, self._n_trials - len(counted(self._study)))
                counts = f"{self._new_report().counts()}; {left} are left"
        about = {
            "study": f"{self._name} in {shown_storage(self._where)}: {counts}",
            "sampler": f"{self._sampler}; pruner {self._pruner}" + (f" by {self._quantity}" if self._quantity else ""),
        }
        how = f"{self._n_trials} trials, {self._num_places} at a time, judged by {pairs(self._objective)}"
        say_plan(how, about, self._space)

    def _new_report(self) -> SearchReport:
        return SearchReport(self._study, self._objective, self._space, self._directory)

    def _fixed_without_search(self) -> list[str]:
        """What is the same in all trials, as it would be typed for one run."""
        typed = [
            line for line in descriptive(self._space.fixed) if line.partition("=")[0] not in ("search", "model", "data")
        ]
        choices = self._compose(self._space.fixed).hydra.runtime.choices
        return [f"model={choices.model}", f"data={choices.data}", *typed]

    def _compose(self, overrides: list[str]) -> DictConfig:
        with _in_one_sentence():
            return self._context.config_loader.load_sweep_config(self._config, list(overrides))

    def _compose_alone(self, overrides: list[str]) -> DictConfig:
        """The config of one run that is no job of a sweep."""
        loader, name = self._context.config_loader, self._config.hydra.job.config_name
        with _in_one_sentence():
            return loader.load_configuration(name, overrides, RunMode.RUN)


def _objective(config: DictConfig) -> dict[str, str]:
    """Directions by name; what is null is not judged by."""
    given = config.get("objective")
    if not isinstance(given, DictConfig):
        raise UserError(f"objective={given} must name directions, as in objective={{val/loss:minimize}}")
    directions = {str(name): direction for name, direction in given.items() if direction is not None}
    if not directions:
        raise UserError("a search needs something to judge trials by: set objective={val/loss:minimize}, or search=")
    for name, direction in directions.items():
        if direction not in _DIRECTIONS:
            raise UserError(f"objective={{{name}:{direction}}} is no direction; allowed: {', '.join(_DIRECTIONS)}")
    return directions


@contextmanager
def _in_one_sentence() -> Iterator[None]:
    """Inside the block what Hydra says of a config becomes a sentence for the user."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"a trial cannot be composed: {str(error).splitlines()[0]}") from error
