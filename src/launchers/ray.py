"""Jobs on the GPUs of this machine, or of a Ray cluster: Ray queues them and gives each the devices it asks for."""

import importlib.util
import logging
import os
import socket
import threading
from pathlib import Path
from typing import Any

from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from src.core.errors import UserError, require_at_least
from src.jobs import Job, run_in_worker, settle_lost
from src.launchers.base import JobLauncher

__all__ = ["RayJobs"]

log = logging.getLogger(__name__)


class RayJobs(JobLauncher):
    """One Ray task a job.

    Args:
        address: of a Ray cluster, as "head:6379", "ray://head:10001", or "auto" for the one this machine belongs to; None
            starts Ray on this machine for the time of the sweep.
        num_cpus, num_gpus: what Ray is told that this machine has; None for what it finds. Only without an address.
        cpus_per_job: cores that a job is given; its threads are limited to them.
        gpus_per_job: GPUs that a job is given and sees, also a fraction of one; None for one if there are any.
        timeout_s: how long to wait for the cluster to answer.
    """

    def __init__(
        self,
        address: str | None,
        num_cpus: int | None,
        num_gpus: int | None,
        cpus_per_job: float,
        gpus_per_job: float | None,
        timeout_s: float,
    ) -> None:
        require_at_least("hydra.launcher.num_cpus", num_cpus, 1)
        require_at_least("hydra.launcher.num_gpus", num_gpus, 0)
        require_at_least("hydra.launcher.cpus_per_job", cpus_per_job, 0.01)
        require_at_least("hydra.launcher.gpus_per_job", gpus_per_job, 0)
        require_at_least("hydra.launcher.timeout_s", timeout_s, 0.1)
        self._address = address
        self._machine = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._cpus_per_job = cpus_per_job
        self._gpus_per_job = gpus_per_job
        self._timeout_s = timeout_s
        self._ray: Any = None
        self._task: Any = None
        self._started: dict[Any, Job] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        if importlib.util.find_spec("ray") is None:
            raise UserError("hydra/launcher=ray needs Ray, which is not installed: make extra EXTRA=ray")
        if self._address is not None and any(number is not None for number in self._machine.values()):
            raise UserError("hydra.launcher.num_cpus and num_gpus are for Ray on this machine; a cluster knows its own")

    @property
    def num_places(self) -> None:
        return None

    def require_possible(self, job: Job) -> None:
        super().require_possible(job)
        self.require_gpus(job, 1 if self._gpus_per_job is None else self._gpus_per_job)

    def open(self) -> None:
        if self._address is not None and self._address not in ("auto", "local"):
            self._require_answer(self._address)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of its future default
        import ray

        self._ray = ray
        self._connect()
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        num_gpus = self._gpus_per_job if self._gpus_per_job is not None else float(has_gpus)
        self._require_resources(self._cpus_per_job, num_gpus)
        # a job that is lost is not tried again here: it would go on when the sweep is typed again
        options = {"num_cpus": self._cpus_per_job, "num_gpus": num_gpus, "max_retries": 0}
        self._task = ray.remote(run_in_worker).options(**options)

    def start(self, jobs: list[Job]) -> list[Any]:
        folder = str(Path.cwd())
        references = [self._task.remote(str(job.run.path.absolute()), folder, job.retry_failed) for job in jobs]
        self._started |= dict(zip(references, jobs, strict=True))
        return references

    def wait(self, handles: list[Any]) -> list[Any]:
        ended, _ = self._ray.wait(handles, num_returns=1)
        for reference in ended:
            job = self._started.pop(reference)
            try:
                self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                settle_lost(job.run, f"Ray lost its worker: {str(error).strip().splitlines()[0]}")
        return ended

    def close(self) -> None:
        if self._ray is not None and self._ray.is_initialized():
            self._ray.shutdown()  # its workers end; with them the jobs, which save themselves
        for job in self._started.values():
            settle_lost(job.run, None)
        self._started = {}

    def place(self, position: int) -> str:
        where = "this machine" if self._address is None else f"the cluster at {self._address}"
        gpus = "1 GPU if there are any" if self._gpus_per_job is None else f"{self._gpus_per_job:g} GPUs"
        return f"{gpus}, {self._cpus_per_job:g} CPUs of {where}"

    def _connect(self) -> None:
        """Join the cluster within the time that is given for it (Ray may try for minutes), or start Ray here."""
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        failures: list[BaseException] = []

        def connect() -> None:
            try:
                self._ray.init(address=self._address, **quiet)
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
                failures.append(error)

        if self._address is None:  # not in another thread: what Ray starts here would end with it
            self._ray.init(address="local", include_dashboard=False, **self._machine, **quiet)
            return
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if thread.is_alive() or failures:
            self._ray = None
        if thread.is_alive():
            raise self._no_answer(f"it has not answered within {self._timeout_s:g} s")
        if failures:
            raise self._no_answer(str(failures[0]).strip().partition("\n")[0]) from failures[0]

    def _require_answer(self, address: str) -> None:
        """Raise `UserError` if nobody listens at the address."""
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f'hydra.launcher.address={address} must be a host and a port, as "head:6379", or auto')
        try:
            socket.create_connection((host, int(port)), timeout=self._timeout_s).close()
        except OSError as error:
            raise self._no_answer(str(error)) from error

    def _no_answer(self, why: str) -> UserError:
        return UserError(
            f"hydra.launcher.address={self._address}: Ray cannot be used there: {why} "
            f"(hydra.launcher.timeout_s={self._timeout_s:g})"
        )

    def _require_resources(self, num_cpus: float, num_gpus: float) -> None:
        """Raise `UserError` if no job could ever start; Ray would wait for ever."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= num_cpus and node.get("GPU", 0) >= num_gpus for node in nodes):
            has = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
            raise UserError(
                f"hydra.launcher.cpus_per_job={num_cpus:g} gpus_per_job={num_gpus:g}: no machine of Ray has as many ({has})"
            )
