"""Jobs in the queue of a Slurm cluster, through submitit."""

import importlib.util
import time
from pathlib import Path
from typing import Any

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from src.core.errors import UserError, require_at_least
from src.jobs import Job, JobProcess, settle_lost
from src.launchers.base import JobLauncher

__all__ = ["SlurmJobs"]

_ASK_EVERY_SECONDS = 5.0  # submitit itself asks Slurm less often
_LIGHTNING_STARTS_PROCESSES = {"SLURM_JOB_NAME": "interactive"}  # itself, for several devices: srun has started one task


class SlurmJobs(JobLauncher):
    """One Slurm job each, submitted as an array.

    A job that is preempted, or whose time is over, is asked to save itself and put into the queue again.

    Args:
        cluster: "slurm"; "local" runs the same processes on this machine, to try things out.
        partition, account, qos: as in sbatch; None for the cluster's default.
        timeout_min: minutes that a job may take before it is saved and queued again.
        max_times: how often a job is queued again when its time is over.
        gpus_per_job, cpus_per_job, mem_gb: what a job is given, on one machine.
        max_jobs: of the sweep, running at a time.
        signal_delay_s: seconds between the request to save and the end of a job.
        setup: shell commands to run on the machine before the job.
        sbatch: further arguments of sbatch by name.
    """

    def __init__(
        self,
        cluster: str,
        partition: str | None,
        account: str | None,
        qos: str | None,
        timeout_min: int,
        max_times: int,
        gpus_per_job: int,
        cpus_per_job: int,
        mem_gb: float | None,
        max_jobs: int,
        signal_delay_s: int,
        setup: list[str],
        sbatch: dict[str, Any],
    ) -> None:
        if cluster not in ("slurm", "local"):
            raise UserError(f"hydra.launcher.cluster={cluster} is not known; allowed: slurm, local")
        for name, value in {"timeout_min": timeout_min, "cpus_per_job": cpus_per_job, "max_jobs": max_jobs}.items():
            require_at_least(f"hydra.launcher.{name}", value, 1)
        require_at_least("hydra.launcher.gpus_per_job", gpus_per_job, 0)
        self._cluster = cluster
        self._max_times = max_times
        self._gpus_per_job = gpus_per_job
        self._parameters: dict[str, Any] = {
            "timeout_min": timeout_min,
            "cpus_per_task": cpus_per_job,
            "gpus_per_node": gpus_per_job,
            "tasks_per_node": 1,
            "nodes": 1,
        }
        if mem_gb is not None:
            self._parameters["mem_gb"] = mem_gb
        if cluster == "slurm":
            optional = {"partition": partition, "account": account, "qos": qos}
            named = {f"slurm_{name}": value for name, value in optional.items() if value is not None}
            self._parameters |= named | {
                "slurm_array_parallelism": max_jobs,
                "slurm_signal_delay_s": signal_delay_s,
                "slurm_setup": list(setup),
                "slurm_additional_parameters": dict(sbatch),
            }
        self._executor: Any = None
        self._started: dict[Any, Job] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        if importlib.util.find_spec("submitit") is None:
            raise UserError("hydra/launcher=slurm needs submitit, which is not installed: make extra EXTRA=slurm")
        self._folder = Path(config.hydra.sweep.dir) / "slurm"

    @property
    def num_places(self) -> None:
        return None

    def require_possible(self, job: Job) -> None:
        super().require_possible(job)
        self.require_gpus(job, self._gpus_per_job)

    def open(self) -> None:
        import submitit

        try:
            self._executor = submitit.AutoExecutor(
                folder=self._folder / "%j", cluster=self._cluster, slurm_max_num_timeout=self._max_times
            )
            self._executor.update_parameters(name=self._folder.parent.name, **self._parameters)
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            raise UserError(f"hydra/launcher=slurm: submitit refuses: {error}") from error

    def start(self, jobs: list[Job]) -> list[Any]:
        if self._cluster == "slurm":
            with self._executor.batch():  # one array
                handles = [self._executor.submit(_SlurmJob(job.run.path.absolute(), job.retry_failed)) for job in jobs]
        else:
            handles = [self._executor.submit(_SlurmJob(job.run.path.absolute(), job.retry_failed)) for job in jobs]
        self._started |= {id(handle): job for handle, job in zip(handles, jobs, strict=True)}
        return handles

    def wait(self, handles: list[Any]) -> list[Any]:
        while not (ended := [handle for handle in handles if handle.done()]):
            time.sleep(_ASK_EVERY_SECONDS if self._cluster == "slurm" else 0.2)
        for handle in ended:
            job, error = self._started.pop(id(handle)), handle.exception()
            if error is not None:
                settle_lost(job.run, f"Slurm's job {handle.job_id} ended: {str(error).strip().splitlines()[0]}")
        return ended

    def close(self) -> None:
        """Jobs in the queue stay there when the sweep is interrupted: they need nobody here."""
        self._started = {}

    def place(self, position: int) -> str:
        gpus, cpus = self._gpus_per_job, self._parameters["cpus_per_task"]
        partition = self._parameters.get("slurm_partition")
        return f"{gpus} GPUs, {cpus} CPUs of " + (f"the partition {partition}" if partition else self._cluster)


class _SlurmJob:
    """What Slurm runs: a job by its directory."""

    def __init__(self, directory: Path, retry_failed: bool) -> None:
        self._directory = directory
        self._retry_failed = retry_failed
        self._process: JobProcess | None = None

    def __call__(self) -> None:
        output = self._directory / "output.txt"
        self._process = JobProcess(self._directory, output, _LIGHTNING_STARTS_PROCESSES, self._retry_failed)
        self._process.wait()

    def checkpoint(self) -> Any:
        """Called by submitit when the job has to make place: save, and come back later."""
        import submitit

        if self._process is not None:
            self._process.stop()
        return submitit.helpers.DelayedSubmission(_SlurmJob(self._directory, self._retry_failed))
