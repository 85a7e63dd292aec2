"""A sweep that is killed or interrupted and typed again ends as the one that was not; two of one kind share its jobs."""

import csv
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.claim import is_claimed
from src.runs import Run
from tests.commands import QUICK
from tests.killing import Command, command, kill, outcome, processes_below, wait_for

pytestmark = pytest.mark.slow

JOBS = ("model=gan,vae", "seed=0,1,2,3,4,5")
LONG = ("trainer.max_steps=100000", "trainer.val_every_n_epochs=1000")


def sweep(directory: Path, cache: Path, *overrides: str) -> list[str]:
    return [
        "train", "-m", *QUICK, "trainer.max_steps=30", "trainer.val_every_n_epochs=2", "metric=[cs]",
        "callback.checkpoint.every_minutes=0", "callback.light_evaluation.metrics=[]", f"data.cache={cache}",
        f"hydra.sweep.dir={directory}", *overrides,
    ]  # fmt: skip


def jobs(directory: Path) -> dict[str, Run]:
    return {file.parent.name: Run(file.parent) for file in sorted(directory.glob("*/status.json"))}


def statuses(directory: Path) -> list[str]:
    return sorted(run.status()["status"] for run in jobs(directory).values())


def training(directory: Path) -> list[Run]:
    """The jobs that a process works on, and that have a checkpoint."""
    return [run for run in jobs(directory).values() if is_claimed(run.path) and run.has_checkpoint("last")]


def num_done(run: Run) -> int:
    """How often it was run to its end."""
    return (run.path / "log.txt").read_text().count(": done: the run lies in")


@pytest.fixture(scope="module")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with command(*sweep(folder / "sweep", cache, *JOBS, "hydra.launcher.n_jobs=2"), output=folder / "said.txt") as one:
        assert one.code(600) == 0, one.text
    return folder / "sweep"


def require_same(directory: Path, undisturbed: Path) -> None:
    """12 jobs, each done once, with every bit of what the undisturbed sweep has."""
    runs, others = jobs(directory), jobs(undisturbed)
    assert len(runs) == 12
    assert runs.keys() == others.keys()
    assert statuses(directory) == ["done"] * 12
    assert {name: num_done(run) for name, run in runs.items()} == dict.fromkeys(runs, 1)
    for name, run in runs.items():
        ours, theirs = outcome(run), outcome(others[name])
        different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        assert not different, f"{name}: {different[:10]}"


def kill_all(one: Command) -> None:
    """The sweep and its jobs at one moment."""
    kill([one.pid, *processes_below(one.pid)])


def kill_parent(one: Command) -> None:
    """The sweep alone: its jobs save themselves and end, since it has."""
    below = processes_below(one.pid)
    one.send(signal.SIGKILL)
    one.process.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in below), 60)


def kill_parent_and_type_again(one: Command) -> None:
    """The sweep alone; the next one begins while the jobs of this one save themselves."""
    one.send(signal.SIGKILL)
    one.process.wait()


def kill_parent_then_jobs(one: Command) -> None:
    """The jobs while they save themselves."""
    below = processes_below(one.pid)
    one.send(signal.SIGKILL)
    time.sleep(0.2)
    kill(below)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_sweep_killed_five_times_ends_as_the_one_that_was_not(undisturbed, cache, tmp_path):
    directory, chance = tmp_path / "sweep", random.Random(5)
    line = sweep(directory, cache, *JOBS, "hydra.launcher.n_jobs=2")
    done = []
    for how in (kill_all, kill_parent, kill_all, kill_parent_and_type_again, kill_parent_then_jobs):
        before = statuses(directory).count("done")
        with command(*line, output=tmp_path / "said.txt") as one:
            one.wait_for(lambda: training(directory))
            time.sleep(chance.uniform(0, 6))
            assert one.is_running(), f"it ended before it was killed: {one.text}"
            how(one)
        done.append(statuses(directory).count("done"))
        assert done[-1] >= before
    assert done[-1] < 12, f"nothing was left to do after the last kill: {done}"
    with command(*line, output=tmp_path / "said.txt") as one:
        assert one.code(600) in (0, 1), one.text
    require_same(directory, undisturbed)
    with command(*line, output=tmp_path / "again.txt") as one:
        assert one.code() == 0, one.text
        assert "12 jobs: 12 done" in one.text
    require_same(directory, undisturbed)


def test_two_sweeps_of_one_kind_do_every_job_once(undisturbed, cache, tmp_path):
    directory = tmp_path / "sweep"
    line = sweep(directory, cache, *JOBS)
    with command(*line, output=tmp_path / "one.txt") as one, command(*line, output=tmp_path / "other.txt") as other:
        codes = {one.code(600), other.code(600)}
    assert 0 in codes, one.text + other.text
    assert "Traceback" not in one.text + other.text
    require_same(directory, undisturbed)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_places", [1, 2])
def test_ctrl_c_saves_what_runs_and_the_same_command_finishes(num_places, cache, tmp_path):
    directory = tmp_path / "sweep"
    line = sweep(directory, cache, "model=gan", "seed=0,1,2", f"hydra.launcher.n_jobs={num_places}")
    line = [*line, "trainer.max_steps=200"]
    with command(*line, output=tmp_path / "said.txt") as one:
        one.wait_for(lambda: len(training(directory)) == num_places)
        press_ctrl_c(one)
        assert one.code(60) == 130, one.text
    assert statuses(directory) == ["interrupted"] * num_places + ["waiting"] * (3 - num_places)
    assert sum(run.has_checkpoint("last") for run in jobs(directory).values()) == num_places
    assert "interrupted; the same command goes on" in one.text
    assert f"3 jobs: {num_places} interrupted, {3 - num_places} waiting" in one.text
    assert "Traceback" not in one.text
    with open(directory / "jobs.csv") as file:
        assert sorted(row["status"] for row in csv.DictReader(file)) == statuses(directory)
    with command(*line, output=tmp_path / "again.txt") as one:
        assert one.code() == 0, one.text
    assert statuses(directory) == ["done"] * 3
    logs = [(run.path / "log.txt").read_text() for run in jobs(directory).values()]
    assert sum("going on with" in text for text in logs) == num_places


def press_ctrl_c(one: Command) -> None:
    """As a terminal does: to all that are in the group of the command."""
    os.killpg(one.pid, signal.SIGINT)


@pytest.fixture
def stuck(request, cache: Path, tmp_path: Path) -> Iterator[Command]:
    """A sweep whose jobs do not answer."""
    directory = tmp_path / "sweep"
    line = sweep(directory, cache, "model=gan", "seed=0,1,2", *LONG, f"hydra.launcher.n_jobs={request.param}")
    with command(*line, output=tmp_path / "said.txt") as one:
        one.wait_for(lambda: len(training(directory)) == request.param)
        for pid in processes_below(one.pid):
            os.kill(pid, signal.SIGSTOP)
        yield one


@pytest.mark.parametrize("stuck", [1, 2], indirect=True)
def test_a_second_ctrl_c_ends_it_at_once(stuck, tmp_path):
    press_ctrl_c(stuck)
    time.sleep(1)
    assert stuck.is_running()
    press_ctrl_c(stuck)
    start = time.monotonic()
    assert stuck.code(60) == 130, stuck.text
    assert time.monotonic() - start < 20  # it still writes the report
    assert "does not end by itself; it is killed" in stuck.text
    assert "Traceback" not in stuck.text
    assert set(statuses(tmp_path / "sweep")) <= {"interrupted", "waiting"}
