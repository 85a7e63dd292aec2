"""Sweeps: what a job is, what becomes of it when the command is typed again, and who runs when and where."""

import json
import re
import shutil
import subprocess
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from src.core.errors import UserError
from src.jobs import Job, nothing_to_do, objectives, prepare, settle_lost
from src.launchers.base import JobLauncher
from src.launchers.local import LocalJobs
from src.launchers.ray import RayJobs
from src.launchers.slurm import SlurmJobs
from src.runs import Run, config_hash, descriptive
from src.sweeping import job_name, sweep_directory
from tests.commands import QUICK, call
from tests.configs import CONF, compose_config

# --- what a job is ---------------------------------------------------------------------------------------------------


def test_what_cannot_change_the_result_does_not_change_the_identity():
    without_effect = (
        "data.root=/elsewhere", "data.cache=/elsewhere", "loader.num_workers=3", "logger=[csv]", "resume=/a", "sweep=name",
        "plan=true", "retry_failed=true", "+objective.fd=minimize", "callback.progress.redraws_per_second=9.0",
        "callback.checkpoint.every_minutes=1.0",
    )  # fmt: skip
    alone = config_hash(compose_config("data=mnist"))
    assert config_hash(compose_config("data=mnist", *without_effect)) == alone
    assert config_hash(compose_config("data=mnist", "~callback.progress")) == alone


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1), ("optim.lr", 1e-4), ("data.values", "continuous"), ("trainer.max_epochs", 3), ("loader.batch_size", 7),
        ("trainer.devices", 2), ("evaluation.num_samples", 9), ("metric", {}), ("callback.pictures.seed", 1),
        ("trainer.precision", "bf16-mixed"), ("model", {"_target_": "another"}),
    ],
)  # fmt: skip
def test_what_may_change_the_result_changes_the_identity(key, value):
    config = compose_config()
    OmegaConf.update(config, key, value, merge=False)
    assert config_hash(config) != config_hash(compose_config())


def test_the_identity_is_that_of_the_config_that_a_run_keeps(tmp_path):
    config = compose_config("seed=3")
    with open_dict(config):
        config.name = {"model": "vae", "data": "digits"}
    run = Run.create(tmp_path, config)
    assert config_hash(run.config()) == config_hash(compose_config("seed=3"))


def test_overrides_of_the_command_do_not_describe_a_job():
    given = [
        *("model=vae", "plan=true", "hydra/launcher=ray", "hydra.launcher.num_gpus=2", "sweep=a"),
        *("+objective.fd=minimize", "seed=0", "retry_failed=true", "planet=1"),
    ]
    assert descriptive(given) == ["model=vae", "seed=0", "planet=1"]


# --- what becomes of it ----------------------------------------------------------------------------------------------


def made(folder: Path, status: str | None, reason: str | None = None, retry_failed: bool = False) -> Job:
    run = Run(folder)
    command = OmegaConf.create({"retry_failed": retry_failed, "plan": False, "objective": {}})
    config = OmegaConf.create(
        {"seed": 0, "data": {"root": "/here"}, "trainer": {"devices": 1, "num_nodes": 1, "accelerator": "auto"}}
    )
    if status is not None:
        folder.mkdir()
        Run.create(folder, config)
        run.set_status(status, reason)
    return Job(0, run, ["seed=0"], config, command)


@pytest.mark.parametrize(
    ("status", "has_checkpoint", "retry_failed", "plan"),
    [
        (None, False, False, "run"),
        ("waiting", False, False, "run"),
        ("running", False, False, "run"),  # nobody has it: it was killed
        ("running", True, False, "go on"),
        ("interrupted", True, False, "go on"),
        ("interrupted", False, False, "run"),
        ("done", True, True, "skip: done"),
        ("pruned", True, True, "skip: pruned"),
        ("failed", True, False, "skip: failed (lost); retry_failed=true tries again"),
        ("failed", True, True, "retry"),
    ],
)
def test_a_job_decides_from_its_status(status, has_checkpoint, retry_failed, plan, tmp_path):
    job = made(tmp_path / "job", status, "lost" if status == "failed" else None, retry_failed)
    if has_checkpoint:
        (job.run.checkpoints / "last.ckpt").touch()
    assert job.plan == plan
    assert job.is_to_run is not plan.startswith("skip")


@pytest.mark.parametrize("given", ["once", "retry"])
@pytest.mark.parametrize("status", ["done", "failed", "pruned", "interrupted"])
def test_the_process_of_a_job_decides_anew_when_it_has_the_job(given, status, tmp_path, monkeypatch):
    """Its sweep may have decided long ago: a queue is long, and another sweep may have had the job meanwhile."""
    run = made(tmp_path / "job", status, "lost" if status == "failed" else None).run
    assert nothing_to_do(run) is None  # typed by a person, it goes on
    monkeypatch.setattr("src.jobs._given", given)
    is_to_run = status == "interrupted" or (status == "failed" and given == "retry")
    assert (nothing_to_do(run) is None) is is_to_run


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": 1}'])
def test_a_damaged_status_is_a_failure_of_that_job_alone(damage, tmp_path):
    job = made(tmp_path / "job", "waiting")
    (tmp_path / "job" / "status.json").write_text(damage)
    assert job.plan.startswith("skip: failed (")
    assert "status.json is damaged" in job.plan
    again = made(tmp_path / "other", None, retry_failed=True)
    retried = Job(0, job.run, job.overrides, job.config, again.config_of_command)
    assert retried.plan == "retry"
    prepare(retried)
    assert job.run.status()["status"] == "failed"


def test_a_directory_with_another_config_is_refused_and_left_alone(tmp_path):
    job = made(tmp_path / "job", "waiting")
    before = (tmp_path / "job" / "config.yaml").read_text()
    other = OmegaConf.create({"seed": 1})
    with pytest.raises(UserError, match="holds a run of another config; give the sweep another name"):
        Run.prepare(job.run.path, other, ["seed=1"])
    assert (tmp_path / "job" / "config.yaml").read_text() == before


@pytest.mark.parametrize("status", ["waiting", "running", "interrupted", "failed", "done", "pruned"])
def test_a_job_prepared_again_keeps_its_status_and_follows_where_the_data_lie(status, tmp_path):
    job = made(tmp_path / "job", status)
    again = OmegaConf.merge(job.config, {"data": {"root": "/elsewhere"}})
    Run.prepare(job.run.path, again, ["seed=0", "data.root=/elsewhere"])
    assert job.run.status()["status"] == status
    follows = status not in ("done", "pruned")
    assert job.run.config().data.root == ("/elsewhere" if follows else "/here")
    assert job.run.overrides() == (["seed=0", "data.root=/elsewhere"] if follows else None)


def test_an_objective_is_a_metric_or_a_held_out_mean_and_nan_without_a_value(tmp_path):
    job = made(tmp_path / "job", "done")
    job.run.write_results({"metrics": {"fd": {"value": 3.5}, "bound": {"not_applicable": "it has none"}}})
    job.run.write_validation({"val/loss": 1.25})
    fd, loss, bound = objectives(job.run, ["fd", "val/loss", "bound"])
    assert (fd, loss) == (3.5, 1.25)
    assert bound != bound
    with pytest.raises(UserError, match=r"objective=fdd was not measured in .*; allowed: fd, bound, val/loss"):
        objectives(job.run, ["fdd"])
    job.run.set_status("failed", "lost")
    assert all(value != value for value in objectives(job.run, ["fd", "val/loss"]))


@pytest.mark.parametrize(("reason", "status"), [("its worker was lost", "failed"), (None, "interrupted")])
def test_a_job_whose_keeper_was_lost_says_how_it_ended(reason, status, tmp_path):
    job = made(tmp_path / "job", "running")
    settle_lost(job.run, reason)
    assert (job.run.status()["status"], job.run.status().get("reason")) == (status, reason)
    done = made(tmp_path / "done", "done")
    settle_lost(done.run, reason)
    assert done.run.status()["status"] == "done"


def test_the_seconds_of_all_lives_of_a_run_are_counted(tmp_path):
    run = made(tmp_path / "job", "waiting").run
    for since, status in ((100, "interrupted"), (20, "done")):
        run.set_status("running")
        about = run.status()
        (tmp_path / "job" / "status.json").write_text(json.dumps(about | {"since": about["since"] - since}))
        run.set_status(status)
    assert run.status()["seconds"] == pytest.approx(120, abs=5)


# --- who runs when ---------------------------------------------------------------------------------------------------


class Clock(JobLauncher):
    """Jobs that take as many ticks as their seed says."""

    num_places = 2

    def __init__(self) -> None:
        self.now, self.log, self.is_open, self.ends = 0, [], False, {}

    def open(self) -> None:
        self.is_open = True

    def close(self) -> None:
        self.is_open = False

    def start(self, jobs: list[Job]) -> list[int]:
        for job in jobs:
            self.log.append((self.now, f"start {job.number}"))
            self.ends[job.number] = self.now + job.config.seed
        return [job.number for job in jobs]

    def wait(self, handles: list[int]) -> list[int]:
        self.now = min(self.ends[handle] for handle in handles)
        return [handle for handle in handles if self.ends[handle] == self.now]

    def place(self, position: int) -> str:
        return f"place {position % 2}"


def timed(tmp_path: Path, *ticks: int) -> deque[Job]:
    jobs: deque[Job] = deque()
    for number, tick in enumerate(ticks):
        job = made(tmp_path / str(number), None)
        config = OmegaConf.merge(job.config, {"seed": tick})
        jobs.append(Job(number, job.run, job.overrides, config, job.config_of_command))
    return jobs


def test_a_place_that_is_free_is_filled_at_once(tmp_path):
    jobs, launcher, ended = timed(tmp_path, 10, 1, 1, 1, 1), Clock(), []
    launcher.work_off(lambda: jobs.popleft() if jobs else None, lambda job: ended.append((launcher.now, job.number)), 5)
    assert launcher.log == [(0, "start 0"), (0, "start 1"), (1, "start 2"), (2, "start 3"), (3, "start 4")]
    assert ended == [(1, 1), (2, 2), (3, 3), (4, 4), (10, 0)]
    assert not launcher.is_open


def test_a_directory_that_was_taken_away_is_made_again(tmp_path):
    (job,) = timed(tmp_path, 1)
    prepare(job)
    shutil.rmtree(job.run.path)
    launcher, jobs = Clock(), deque([job])
    launcher.work_off(lambda: jobs.popleft() if jobs else None, lambda job: None, 1)
    assert job.run.status()["status"] == "waiting"  # the clock trains nothing
    assert launcher.log == [(0, "start 0")]


def test_what_is_interrupted_is_closed(tmp_path):
    jobs, launcher = timed(tmp_path, 1, 1), Clock()

    def interrupt(job: Job) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launcher.work_off(lambda: jobs.popleft() if jobs else None, interrupt, 2)
    assert not launcher.is_open


# --- and where -------------------------------------------------------------------------------------------------------


def places_of(monkeypatch: pytest.MonkeyPatch, visible: str | None, n_jobs: int) -> list[dict[str, str]]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    launcher = LocalJobs(n_jobs)
    return [launcher._environment(place) for place in range(n_jobs)]


def test_jobs_at_a_time_are_given_a_gpu_each_and_their_share_of_the_cores(monkeypatch):
    assert places_of(monkeypatch, "3,5", 3) == [
        {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "2"} for gpu in ("3", "5", "3")
    ]
    assert places_of(monkeypatch, "3,5", 1) == [{}]  # one at a time sees all
    assert places_of(monkeypatch, "", 2) == [{"OMP_NUM_THREADS": "4"}] * 2


def test_without_the_variable_the_gpus_are_those_of_the_driver(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    done = subprocess.CompletedProcess([], 0, stdout="0\n1\n", stderr="")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: done)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places_of(monkeypatch, None, 2)] == ["0", "1"]


def ray(**changes: Any) -> RayJobs:
    settings: dict[str, Any] = {"address": None, "num_cpus": None, "num_gpus": None, "cpus_per_job": 1.0}
    return RayJobs(**(settings | {"gpus_per_job": None, "timeout_s": 5.0} | changes))


def slurm(gpus_per_job: int) -> SlurmJobs:
    nothing = dict.fromkeys(("partition", "account", "qos", "mem_gb"))
    return SlurmJobs(
        cluster="local", timeout_min=5, max_times=1, gpus_per_job=gpus_per_job, cpus_per_job=1, max_jobs=2,
        signal_delay_s=9, setup=[], sbatch={}, **nothing,
    )  # fmt: skip


def test_a_job_on_several_devices_is_refused_where_it_is_given_fewer(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    job = made(tmp_path / "job", None)
    job.config.trainer.devices = 2
    for launcher in (LocalJobs(2), ray(), ray(gpus_per_job=0.5), slurm(1)):
        with pytest.raises(UserError, match=r"trainer.devices=2: .*set hydra.launcher.(n_jobs=1|gpus_per_job=2)"):
            launcher.require_possible(job)
    for launcher in (LocalJobs(1), ray(gpus_per_job=2), slurm(2)):
        launcher.require_possible(job)
    job.config.trainer.num_nodes = 2
    for launcher in (LocalJobs(1), ray(gpus_per_job=2), slurm(2)):
        with pytest.raises(UserError, match=r"trainer.num_nodes=2: a job of a sweep runs on one machine"):
            launcher.require_possible(job)


# --- the command -----------------------------------------------------------------------------------------------------


def sweep(folder: Path, cache: Path, *arguments: str) -> tuple[str, ...]:
    quick = (setting for setting in QUICK if "max_steps" not in setting)
    return ("-m", *quick, "trainer.max_steps=2", "metric=[cs]", "callback.light_evaluation.metrics=[]",
            f"hydra.sweep.dir={folder}", f"data.cache={cache}", *arguments)  # fmt: skip


def test_a_plan_says_what_would_run_where_and_leaves_nothing(tmp_path, cache):
    said = call("train", *sweep(tmp_path / "sweep", cache, "model=vae,gan", "seed=0,1", "plan=true"))
    assert said.code == 0, said.text
    lines = [line for line in said.text.splitlines() if line.startswith("job ")]
    assert len(lines) == 4
    assert all(": run  on " in line and str(tmp_path / "sweep") in line for line in lines)
    assert "model=gan seed=1" in " ".join(lines[3].split())
    assert "plan: 4 of 4 jobs would run; nothing was started" in said.text
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_typed_again_does_nothing_twice_whoever_launches_it(tmp_path, cache):
    line = sweep(tmp_path / "sweep", cache, "model=autoencoder")
    said = call("train", *line, "seed=0", "hydra/launcher=basic")  # Hydra's own, in this process
    assert said.code == 0, said.text
    (job,) = [Run(status.parent) for status in (tmp_path / "sweep").glob("*/status.json")]
    assert job.status()["status"] == "done"
    before = (job.path / "results.json").stat().st_mtime_ns
    again = call("train", *line, "seed=0", "hydra/launcher=basic")
    assert "skip: done" in again.text
    assert "nothing was started" not in again.text
    job.set_status("failed", "a test said so")
    left = call("train", *line, "seed=0,0")
    assert left.code == 1
    assert left.text.count("skip: failed (a test said so); retry_failed=true tries again") == 1
    assert "the same as job 0" in left.text
    assert (job.path / "results.json").stat().st_mtime_ns == before
    planned = call("train", *line, "seed=0", "plan=true", "retry_failed=true")
    assert "retry  on" in planned.text
    assert "1 of 1 jobs would run" in planned.text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("seed=0,1", "hydra.launcher.n_jobs=0"), "hydra.launcher.n_jobs=0 must be at least 1"),
        (("seed=0,1", "hydra/launcher=joblub"), "hydra/launcher=joblub does not exist"),
        (("seed=0,1", "hydra.launcher.n_job=2"), "hydra.launcher.n_job is not a key of the config"),
        (("seed=0,1", "hydra.launcher.n_jobs=two"), "hydra.launcher.n_jobs=two must be a whole number"),
        (("seed=0,1", "hydra.sweep.subdir=a/b"), "hydra.sweep.subdir must be a plain name"),
        (("seed=0,1", "hydra.sweep.dir=a/${seed}"), "must be a path, the same for all jobs"),
        (("seed=0,1", "resume=x"), "resume= goes on with one run, without -m"),
        (("seed=0,1", "objective=fd"), "objective=fd must say what is good, as in objective={fd: minimize}"),
        (("seed=0,1", "objective={fd: min}"), "objective={fd:min} is no direction"),
    ],
)
def test_mistakes_are_told_in_a_sentence_before_anything_starts(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call("train", "-m", *arguments)
    assert said.code == 1
    assert sentence in said.text
    assert "Traceback" not in said.text
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("option", ["plan=true", "retry_failed=true", "sweep=mine"])
def test_what_is_for_sweeps_is_refused_for_a_run(option, tmp_path):
    said = call("train", option, f"hydra.run.dir={tmp_path}/run")
    assert said.code == 1
    assert f"{option} is for a sweep" in said.text
    assert not (tmp_path / "run").exists()


def test_a_plan_leaves_what_was_there(tmp_path, cache):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.txt").write_text("keep me")
    said = call("train", *sweep(tmp_path / "sweep", cache, "seed=0,1", "plan=true"))
    assert said.code == 0
    assert (tmp_path / "sweep" / "mine.txt").read_text() == "keep me"


def test_the_same_command_finds_the_same_sweep_whatever_its_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = []
    for arguments in (("model=gan", "seed=0"), ("seed=0", "model=gan")):
        said = call("train", "-m", *arguments, "plan=true")
        shown += re.findall(r"outputs/sweeps/([^/]+)/([^/)]+)\)", said.text)
    assert len(shown) == 2
    assert shown[0] == shown[1]
    assert shown[0][0] == sweep_directory(["seed=0", "model=gan"], None).name


def test_a_sweep_is_called_by_what_is_swept_or_as_it_is_told():
    folder = sweep_directory(["seed=0", "model=vae,gan"], None)
    assert folder == sweep_directory(["model=vae,gan", "seed=0", "plan=true"], None)
    assert folder != sweep_directory(["model=vae,gan", "seed=1"], None)
    assert sweep_directory(["seed=1", "model=vae,gan"], "mine") == Path("outputs/sweeps/mine")
    assert sweep_directory([], 2024) == Path("outputs/sweeps/2024")
    for name in ("a/b", "..", ".", "", "$(x)"):
        with pytest.raises(UserError, match="must be a plain name"):
            sweep_directory(["seed=0,1"], name)


@pytest.mark.parametrize("where", ["data.root=/a", "data.cache=/b", "loader.num_workers=2", "logger=[]", "plan=true"])
def test_what_cannot_change_the_result_does_not_change_where_a_job_lies(where):
    assert sweep_directory(["seed=0,1", where], None) == sweep_directory(["seed=0,1"], None)
    names = []
    for overrides in ((), (where,), ("model=vae", where)):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            names.append(job_name(compose("config", ["data=mnist", "seed=1", *overrides], return_hydra_config=True)))
    assert names[0] == names[1] == names[2]
    assert names[0].startswith("mnist-vae-seed1-")
