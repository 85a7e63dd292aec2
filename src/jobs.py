"""A job of a sweep: a run directory that is prepared by the sweep and trained by a process of its own.

Whatever starts a job, the job itself decides from its `status.json`, under its claim, whether there is anything to do.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from src.claim import ClaimedError, claim, is_claimed
from src.core.errors import UserError
from src.core.pretrained import gpt2_config, weights_sha256
from src.runs import Run, descriptive, file_sha256, without_controls

__all__ = [
    "Job",
    "JobProcess",
    "end_with_parent",
    "named",
    "nothing_to_do",
    "objectives",
    "prepare",
    "run_as_job",
    "run_in_worker",
    "settle_lost",
    "stop_all",
    "wanted_of",
]

log = logging.getLogger(__name__)

_OF_SWEEP = "JOB_OF_SWEEP"  # in the environment of a job's process: "retry" if it may be tried again, "once" if not
_NOT_OF_WEIGHTS = ("name", "data", "model", "seed", "callback", "logger", "evaluation", "metric")  # or told by themselves
_SAVING_SECONDS = 60.0  # that a job has to save itself
_given = os.environ.pop(_OF_SWEEP, None)  # taken away, so that processes which this one starts are no jobs themselves
_ASK_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Job:
    """A prepared job.

    Args:
        number: in its sweep, from 0.
        run: its directory.
        overrides: what the command line gave it.
        config: what it is trained with.
        config_of_command: all that was composed, with what the command wants besides.
    """

    number: int
    run: Run
    overrides: list[str]
    config: DictConfig
    config_of_command: DictConfig

    @property
    def retry_failed(self) -> bool:
        """Whether it is tried again if it has failed before."""
        return bool(self.config_of_command.retry_failed)

    @property
    def plan(self) -> str:
        """What becomes of it, in words that begin with run, go on, retry or skip."""
        return _plan(self.run, self.retry_failed)

    @property
    def is_to_run(self) -> bool:
        return not self.plan.startswith("skip")

    @property
    def shown(self) -> str:
        return " ".join(self.overrides) or self.run.path.name


def named(config: DictConfig, hydra: DictConfig, job: Run | None = None) -> DictConfig:
    """The config of a run, with the names of its model and data, for messages and readers of the run.

    Args:
        config, hydra: as composed.
        job: the directory, where a job of a sweep may have been trained before.
    """
    own = without_controls(config)
    with open_dict(own):
        own.name = {"model": hydra.runtime.choices.model, "data": hydra.runtime.choices.data}
        if "autoencoder" in own:
            own.autoencoder = _of_autoencoder(str(own.autoencoder), str(hydra.runtime.choices.data), job)
        if (weights := OmegaConf.select(own, "network.weights")) is not None:
            # so that the run can be rebuilt where the folder is not, and begins with no other weights than these
            about = _of_weights(str(weights), job)
            own.network.config = own.model.network.config = about["config"]
            own.network.sha256 = own.model.network.sha256 = about["sha256"]
    return own


def _of_weights(folder: str, job: Run | None) -> dict[str, Any]:
    """The config and the hash of the weights that a run begins with. A job with a checkpoint needs their folder no more."""
    kept = _kept(job, "network")
    if kept is not None and kept.get("weights") == folder and not Path(folder).exists():
        return kept
    return {"config": gpt2_config(folder), "sha256": weights_sha256(folder)}


def _of_autoencoder(path: str, data: str, job: Run | None) -> dict[str, Any]:
    """What a run whose latents are modelled was made with, so that the new run can be rebuilt without it.

    {"run": its directory, "name": of its model, "model": the config of that, "training": the rest of what it was trained
     with, "seed", "checkpoint": "best" or "last", "sha256": of that file, "costs": {"training_seconds", "training_device"}}

    A job that has a checkpoint has the weights in it, and needs the other run no more, which may be gone or in training.
    """
    kept = _kept(job, "autoencoder")
    place = str(Path(path).absolute())
    if kept is not None and kept["run"] in (path, place) and (not Path(path).exists() or is_claimed(Path(path))):
        return kept  # what a training leaves behind is compared when it has ended
    run = Run.open(Path(path), "autoencoder")
    config, status = run.config(), run.state()["status"]
    if config.name.data != data:
        raise UserError(f"autoencoder={path} was trained on data={config.name.data}; choose it, instead of data={data}")
    if "autoencoder" in config:
        raise UserError(f"autoencoder={path} models the latents of another run; give that one, or another autoencoder")
    if status == "running" and is_claimed(run.path):
        raise UserError(f"autoencoder={path} is still being trained; wait until it is done, or give another run")
    if not (run.has_checkpoint("best") or run.has_checkpoint("last")):
        raise UserError(f"autoencoder={path} has no checkpoint (its status is {status}); give a run that is done")
    file = run.checkpoint("auto")
    sha256 = file_sha256(file)
    if job is not None and kept is not None:
        if kept.get("sha256", sha256) != sha256:
            raise UserError(
                f"autoencoder={path} has other weights than when {job.shown} was trained on its latents; give the sweep "
                "another name with sweep="
            )
        return kept
    plain = cast("dict[str, Any]", OmegaConf.to_container(config))
    costs = run.training_time()
    return {
        "run": place,
        "name": config.name.model,
        "model": plain["model"],
        "training": {key: value for key, value in plain.items() if key not in _NOT_OF_WEIGHTS},
        "seed": config.seed,
        "checkpoint": file.stem,
        "sha256": sha256,
        "costs": {} if costs is None else {"training_seconds": costs[0], "training_device": costs[1]},
    }


def _kept(job: Run | None, part: str) -> dict[str, Any] | None:
    """What a job's own config says of a part that was trained elsewhere, if the job has no more need of that place."""
    if job is None or not job.is_there():
        return None
    if job.state()["status"] not in ("done", "pruned") and not job.has_checkpoint("last"):
        return None
    found = cast("dict[str, Any]", OmegaConf.to_container(job.config())).get(part)
    return found if isinstance(found, dict) else None


def prepare(job: Job) -> Run:
    """Write a job's config into its directory, if nobody works there; raises `UserError` if it holds another config."""
    try:
        with claim(job.run.path):
            return Run.prepare(job.run.path, job.config, job.overrides)
    except ClaimedError:
        return job.run


def _plan(run: Run, retry_failed: bool) -> str:
    if not run.is_there():
        return "run"
    status = run.state()
    match status["status"]:
        case "waiting":
            return "run"
        case "interrupted" | "running":
            return "go on" if run.has_checkpoint("last") else "run"
        case "failed" if retry_failed:
            return "retry"
        case "failed":
            return f"skip: failed ({status.get('reason', 'no reason known')}); retry_failed=true tries again"
        case other:
            return f"skip: {other}"


def nothing_to_do(run: Run) -> str | None:
    """Why this process, if it is a job of a sweep, shall leave the run alone that it has claimed; None if it shall not."""
    if _given is None:
        return None
    plan = _plan(run, retry_failed=_given == "retry")
    return plan if plan.startswith("skip") else None


def end_with_parent() -> None:
    """In the process of a job: save and end when the sweep does, however it ends."""
    if _given is None:
        return

    def wait() -> None:
        with open(0, "rb", closefd=False) as held_by_parent:
            held_by_parent.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


class JobProcess:
    """The process that trains a prepared job: `python -m src.train resume=DIRECTORY`.

    It is in a group of its own, so that Ctrl-C reaches it through its parent, once. If the parent ends, however it ends, so
    does it, with a checkpoint: its standard input ends then.

    Args:
        directory: the job's.
        output: a file for what it prints beside its log; None: it prints to this process's screen.
        environment: variables to set beside those of this process.
        retry_failed: whether it shall try a job again that has failed.
    """

    def __init__(
        self, directory: Path, output: Path | None, environment: Mapping[str, str], retry_failed: bool = False
    ) -> None:
        self._directory = directory
        self._was_asked = False
        quoted = str(directory).replace("\\", "\\\\").replace("'", "\\'")
        command = [sys.executable, "-m", "src.train", f"resume='{quoted}'"]
        self._output: IO[bytes] | None = None if output is None else open(output, "ab")  # noqa: SIM115 - of the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=None if self._output is None else subprocess.STDOUT,
            env={**os.environ, **environment, _OF_SWEEP: "retry" if retry_failed else "once"},
            start_new_session=True,
        )

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> None:
        """Until it ends, and settle how it ended; if this process is asked to end meanwhile, so is that one."""
        try:
            while not self.has_ended():  # not `Popen.wait`: it holds a lock that `stop`, called by a signal handler, needs
                time.sleep(0.05)
        except BaseException:
            self.stop()
            raise
        self.close()

    def ask_to_end(self) -> None:
        """Ask it, once, to save itself and end."""
        if not self._was_asked and not self.has_ended():
            self._was_asked = True
            self._process.terminate()

    def stop(self) -> None:
        """Ask it to save itself and end, and wait until it has."""
        stop_all([self])

    def kill(self) -> None:
        """End it at once."""
        log.warning(f"{self._directory} does not end by itself; it is killed")
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with the processes of its other devices
        self._process.wait()

    def close(self) -> None:
        """After its end: put down how it ended, where it could not do that itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._output is not None:
            self._output.close()
        _settle(Run(self._directory), self._process.returncode, self._was_asked)


def stop_all(processes: Sequence[JobProcess]) -> None:
    """Ask them to save themselves and end, and wait until they have; Ctrl-C ends them at once."""
    for process in processes:
        process.ask_to_end()
    end = time.monotonic() + _SAVING_SECONDS
    try:
        while not all(process.has_ended() for process in processes) and time.monotonic() < end:
            time.sleep(0.05)
    except KeyboardInterrupt:
        pass
    for process in processes:
        if not process.has_ended():
            process.kill()
        process.close()


def _settle(run: Run, code: int, was_stopped: bool) -> None:
    """Put down how a job ended whose process could not do that itself; `code` is what the process ended with."""
    if run.state()["status"] not in ("waiting", "running"):
        return
    try:
        with claim(run.path):
            if run.state()["status"] not in ("waiting", "running"):
                return
            if was_stopped or -code in _ASK_TO_END:
                run.set_status("interrupted")
            elif code < 0:
                run.set_status("failed", f"its process was ended by {signal.Signals(-code).name}")
            else:
                run.set_status("failed", f"its process ended with code {code}")
    except ClaimedError:
        return  # another sweep works on it


def settle_lost(run: Run, reason: str | None) -> None:
    """Put down how a job ended whose keeper was lost, after the time that it has to save itself.

    Args:
        run: the job's.
        reason: of its failure, if it could not end by itself; None if it was asked to.
    """
    end = time.monotonic() + _SAVING_SECONDS
    while is_claimed(run.path) and time.monotonic() < end:
        time.sleep(0.1)
    if run.state()["status"] not in ("waiting", "running"):
        return
    try:
        with claim(run.path):
            status = run.state()["status"]
            if reason is not None and status in ("waiting", "running"):
                run.set_status("failed", reason)
            elif status == "running":
                run.set_status("interrupted")
    except ClaimedError:
        return  # another sweep works on it, or it still ends


def run_in_worker(directory: str, folder: str, retry_failed: bool) -> None:
    """Train a job in a process that something else has started, as a worker of a cluster.

    Args:
        directory: the job's.
        folder: to run in, for the paths of its config.
        retry_failed: whether it shall be tried again if it has failed.
    """
    os.chdir(folder)
    path = Path(directory)
    JobProcess(path, path / "output.txt", {}, retry_failed).wait()


def objectives(run: Run, wanted: list[str]) -> list[float]:
    """The values by which a search judges a run.

    Args:
        run: the run.
        wanted: names of metrics, or of held-out means of the training, as "val/loss".

    Returns:
        A value for each name; NaN where the run has none, since it failed or the metric does not apply.
    """
    if run.state()["status"] != "done":
        return [math.nan] * len(wanted)
    measured, means = (run.results() or {}).get("metrics", {}), run.validation()
    values = []
    for name in wanted:
        if name not in measured and name not in means:
            allowed = ", ".join([*measured, *means])
            raise UserError(f"objective={name} was not measured in {run.shown}; allowed: {allowed}")
        values.append(float(means[name] if name in means else measured[name].get("value", math.nan)))
    return values


def run_as_job(config: DictConfig, hydra: DictConfig) -> list[float] | None:
    """One job of a sweep whose launcher is not ours: its objectives, if there are any."""
    run = Run(Path(hydra.runtime.output_dir))
    job = Job(hydra.job.num, run, descriptive(hydra.overrides.task), named(config, hydra, run), config)
    if config.plan:
        log.info(f"{job.shown}: {job.plan} ({run.shown})")
        return None
    prepare(job)
    if job.is_to_run:
        JobProcess(run.path, None, {}, config.retry_failed).wait()
    else:
        log.info(f"{job.shown}: {job.plan}")
    return objectives(run, wanted_of(config)) if wanted_of(config) else None


def wanted_of(config: DictConfig) -> list[str]:
    """The names in a command's `objective`; what is null there is not wanted."""
    return [str(name) for name, direction in config.objective.items() if direction is not None]
