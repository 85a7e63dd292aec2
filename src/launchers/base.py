"""What all launchers share: jobs are composed and written down at once, and each one that ends makes place for the next."""

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, open_dict

from src.core.errors import UserError
from src.jobs import Job, named, objectives, prepare, wanted_of
from src.runs import Run, descriptive

__all__ = ["Handle", "JobLauncher", "num_devices"]

log = logging.getLogger(__name__)

Handle = Any  # of a job that has been started; what it is the launcher knows


class JobLauncher(Launcher, ABC):
    """Runs jobs by their directories. Subclasses say how one is started, and which of those started have ended."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context = hydra_context
        self._config = config

    @property
    @abstractmethod
    def num_places(self) -> int | None:
        """How many jobs may be started at a time; None if whoever takes them queues them."""

    @abstractmethod
    def open(self) -> None:
        """Get ready to start jobs."""

    @abstractmethod
    def start(self, jobs: list[Job]) -> list[Handle]:
        """Start them."""

    @abstractmethod
    def wait(self, handles: list[Handle]) -> list[Handle]:
        """Those that have ended, as soon as one has."""

    @abstractmethod
    def close(self) -> None:
        """Stop what still runs, so that it may go on another time."""

    @abstractmethod
    def place(self, position: int) -> str:
        """In words, on which devices the job at this position of the queue would run."""

    def require_possible(self, job: Job) -> None:
        """Raise `UserError` if this launcher cannot run the job."""
        if job.config.trainer.num_nodes != 1:
            raise UserError(
                f"trainer.num_nodes={job.config.trainer.num_nodes}: a job of a sweep runs on one machine; start a run over "
                "several machines by itself, without -m"
            )

    @staticmethod
    def require_gpus(job: Job, given: float) -> None:
        """Raise `UserError` if a job shall train on more GPUs than it is given."""
        devices, wanted = job.config.trainer.devices, num_devices(job)
        if job.config.trainer.accelerator != "cpu" and wanted is not None and wanted > max(given, 1):
            raise UserError(
                f"trainer.devices={devices}: a job is given {given:g} GPUs here; it takes {wanted}, with "
                f"hydra/launcher=ray or slurm set hydra.launcher.gpus_per_job={wanted}"
            )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """All jobs, to the end of the last one."""
        jobs = [self.job(overrides, initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        for job in jobs:
            self.require_possible(job)
        if jobs and jobs[0].config_of_command.plan:
            self._print_plan(jobs)
        else:
            waiting = deque(self.worth_running(jobs))
            if waiting:
                self.work_off(lambda: _next_to_run(waiting), lambda job: None, len(waiting))
        return [_returned(job) for job in jobs]

    def job(self, overrides: Sequence[str], number: int) -> Job:
        """A job as it is composed now; nothing is written."""
        config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        HydraConfig.instance().set_config(config)  # for references to ${hydra:...}
        directory = Path(config.hydra.sweep.dir) / str(config.hydra.sweep.subdir)
        run, overrides = Run(directory), descriptive(config.hydra.overrides.task)
        return Job(number, run, overrides, named(config, config.hydra, run), config)

    def worth_running(self, jobs: Sequence[Job]) -> list[Job]:
        """Those that have something to do, each directory once, written down; says why the others have not."""
        first: dict[Path, Job] = {}
        for job in jobs:
            other = first.setdefault(job.run.path, job)
            if other is not job:
                log.info(f"job {job.number}  {job.shown}: the same as job {other.number}")
                continue
            prepare(job)
            if not job.is_to_run:
                log.info(f"job {job.number}  {job.shown}: {job.plan}")
        return [job for job in first.values() if job.is_to_run]

    def work_off(self, next_job: Callable[[], Job | None], at_end: Callable[[Job], None], num_jobs: int | None) -> None:
        """Run jobs while there are any, without waiting for slow ones.

        Args:
            next_job: gives a prepared job, or None while there is none.
            at_end: called with a job when it has ended, before the next one is asked for.
            num_jobs: how many there will be, for the messages; None if nobody knows.
        """
        running: dict[Handle, Job] = {}
        num_ended = 0
        of = "" if num_jobs is None else f" of {num_jobs}"
        try:
            self.open()
            while True:
                new: list[Job] = []
                while self.num_places is None or len(running) + len(new) < self.num_places:
                    if (job := next_job()) is None:
                        break
                    prepare(job)  # once more: somebody may have taken its directory away
                    new.append(job)
                running |= dict(zip(self.start(new), new, strict=True)) if new else {}
                if not running:
                    return
                for handle in self.wait(list(running)):
                    job, num_ended = running.pop(handle), num_ended + 1
                    log.info(f"ended {num_ended}{of}  {job.shown}: {_in_words(job.run)}")
                    at_end(job)
        finally:
            self.close()

    def _print_plan(self, jobs: list[Job]) -> None:
        num_to_run, directories = 0, set()
        for job in jobs:
            is_first = job.run.path not in directories  # the same job may be there twice
            directories.add(job.run.path)
            where = f"  on {self.place(num_to_run)}" if job.is_to_run and is_first else ""
            num_to_run += job.is_to_run and is_first
            log.info(f"job {job.number}  {job.shown}: {job.plan}{where}  ({job.run.shown})")
        log.info(f"plan: {num_to_run} of {len(jobs)} jobs would run; nothing was started")


def _next_to_run(waiting: deque[Job]) -> Job | None:
    """The next one that another sweep has not run meanwhile."""
    while waiting:
        job = waiting.popleft()
        if job.is_to_run:
            return job
        log.info(f"job {job.number}  {job.shown}: {job.plan}")
    return None


def num_devices(job: Job) -> int | None:
    """Devices that a job is trained on; None if it takes all that it sees."""
    devices = job.config.trainer.devices
    if isinstance(devices, ListConfig):
        return len(devices)
    return int(devices) if str(devices).isdigit() else None


def _in_words(run: Run) -> str:
    status = run.state()
    reason = f" ({status['reason']}; log: {run.shown}/log.txt)" if "reason" in status else ""
    return f"{status['status']}{reason}"


def _returned(job: Job) -> JobReturn:
    wanted = wanted_of(job.config_of_command)
    value = objectives(job.run, wanted) if wanted and job.run.is_there() else None
    return JobReturn(
        overrides=job.overrides,
        cfg=job.config,
        working_dir=str(job.run.path),
        status=JobStatus.COMPLETED,
        _return_value=value,
    )
