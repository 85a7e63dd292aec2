"""Jobs as processes of this machine, one after the other or several at a time, each with a GPU of its own."""

import os
import shutil
import subprocess
import time

from src.core.errors import UserError, require_at_least
from src.jobs import Job, JobProcess, stop_all
from src.launchers.base import JobLauncher, num_devices

__all__ = ["LocalJobs"]


class LocalJobs(JobLauncher):
    """Up to `n_jobs` processes at a time. Place i of them is given GPU i, i + number of GPUs, ...

    Args:
        n_jobs: jobs at a time. With 1 a job prints to the screen and sees all GPUs; with more it prints to its output.txt,
            and the CPU's cores are shared out, unless OMP_NUM_THREADS says otherwise.
    """

    def __init__(self, n_jobs: int) -> None:
        require_at_least("hydra.launcher.n_jobs", n_jobs, 1)
        self._gpus = _visible_gpus()
        self._places: list[JobProcess | None] = [None] * n_jobs

    @property
    def num_places(self) -> int:
        return len(self._places)

    def require_possible(self, job: Job) -> None:
        super().require_possible(job)
        if self._gpus and self.num_places > 1 and job.config.trainer.accelerator != "cpu" and (num_devices(job) or 1) > 1:
            raise UserError(
                f"trainer.devices={job.config.trainer.devices}: with hydra.launcher.n_jobs={self.num_places} a job has one "
                "GPU; set hydra.launcher.n_jobs=1, or use hydra/launcher=ray with hydra.launcher.gpus_per_job"
            )
        if self._gpus and self.num_places == 1:
            self.require_gpus(job, len(self._gpus))

    def open(self) -> None:
        assert not any(self._places)

    def start(self, jobs: list[Job]) -> list[JobProcess]:
        processes = []
        for job in jobs:
            place = self._places.index(None)
            output = job.run.path / "output.txt" if self.num_places > 1 else None
            process = JobProcess(job.run.path, output, self._environment(place), job.retry_failed)
            self._places[place] = process
            processes.append(process)
        return processes

    def wait(self, handles: list[JobProcess]) -> list[JobProcess]:
        while not (ended := [process for process in handles if process.has_ended()]):
            time.sleep(0.05)
        for process in ended:
            process.close()
            self._places[self._places.index(process)] = None
        return ended

    def close(self) -> None:
        stop_all([process for process in self._places if process is not None])
        self._places = [None] * len(self._places)

    def place(self, position: int) -> str:
        if not self._gpus:
            return "the CPU"
        if self.num_places == 1:
            return f"GPU {','.join(self._gpus)}"
        return f"GPU {self._gpus[position % self.num_places % len(self._gpus)]}"

    def _environment(self, place: int) -> dict[str, str]:
        if self.num_places == 1:
            return {}
        environment = {"CUDA_VISIBLE_DEVICES": self._gpus[place % len(self._gpus)]} if self._gpus else {}
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.num_places))
        return environment


def _visible_gpus() -> list[str]:
    """The GPUs of this machine that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []
