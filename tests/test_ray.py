"""A sweep on Ray: every job has a device of its own, and no job's end stops the others."""

import csv
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from src.runs import Run
from tests.commands import QUICK
from tests.killing import Command, command

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

TOO_HIGH, KILLED = "1e+30", "0.005"
RATES = (TOO_HIGH, *(f"{i / 1000:g}" for i in range(1, 12)))  # as Hydra writes them; with the first the loss is not finite
ON_RAY = ("hydra/launcher=ray", "hydra.launcher.num_cpus=2", "hydra.launcher.cpus_per_job=0.5")


def sweep(directory: Path, cache: Path, *overrides: str) -> list[str]:
    return [
        "train", "-m", *QUICK, "trainer.max_steps=30", "metric=[]", "callback.checkpoint.every_minutes=0",
        "callback.light_evaluation.metrics=[]", f"data.cache={cache}", f"hydra.sweep.dir={directory}", *overrides,
    ]  # fmt: skip


def runs(directory: Path) -> dict[str, Run]:
    """The jobs by their learning rate."""
    found = [Run(file.parent) for file in directory.glob("*/status.json")]
    return {next(line for line in run.overrides() if "optim.lr" in line).partition("=")[2]: run for run in found}


@dataclass
class Swept:
    """A sweep as it was seen from outside."""

    directory: Path
    line: list[str]
    code: int = 0
    text: str = ""
    devices: list[list[str]] = field(default_factory=list)  # of the jobs that were seen to run at once


def devices_of_running(directory: Path) -> list[str]:
    """CUDA_VISIBLE_DEVICES of the processes that work on the jobs."""
    found = []
    for sign in directory.glob("*/.claim.json"):
        try:
            pid = json.loads(sign.read_text())["pid"]
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        except (OSError, ValueError):
            continue
        if any(line.startswith("JOB_OF_SWEEP=") for line in variables):  # else it is the sweep that prepares it
            found += [line.partition("=")[2] for line in variables if line.startswith("CUDA_VISIBLE_DEVICES=")]
    return found


@pytest.fixture(scope="module")
def swept(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """12 jobs on two devices; one of them raises, and one is killed."""
    folder = tmp_path_factory.mktemp("ray")
    directory = folder / "sweep"
    rates = ",".join(RATES)
    seen = Swept(directory, sweep(directory, cache, *ON_RAY, "hydra.launcher.num_gpus=2", f"optim.lr={rates}"))
    is_killed = False
    with command(*seen.line, output=folder / "said.txt") as one:
        end = time.monotonic() + 900
        while one.is_running():
            assert time.monotonic() < end, one.text
            seen.devices.append(devices_of_running(directory))
            victim = runs(directory).get(KILLED)
            if not is_killed and victim is not None and victim.has_checkpoint("last"):
                os.kill(json.loads((victim.path / ".claim.json").read_text())["pid"], signal.SIGKILL)
                is_killed = True
            time.sleep(0.02)
        seen.code, seen.text = one.code(), one.text
    assert is_killed, seen.text
    return seen


def test_two_jobs_run_at_once_each_with_a_device_of_its_own(swept):
    assert all(len(set(some)) == len(some) for some in swept.devices)
    assert max(len(some) for some in swept.devices) == 2
    assert {device for some in swept.devices for device in some} == {"0", "1"}


def test_a_job_that_raises_and_one_that_is_killed_stop_no_other(swept):
    statuses = {rate: run.status() for rate, run in runs(swept.directory).items()}
    assert statuses.keys() == set(RATES)
    assert Counter(status["status"] for status in statuses.values()) == {"done": 10, "failed": 2}
    assert "became" in statuses[TOO_HIGH]["reason"]
    assert statuses[KILLED]["reason"] == "its process was ended by SIGKILL"


def test_the_exit_code_the_report_and_the_table_say_so(swept):
    assert swept.code == 1
    assert "12 jobs: 10 done, 2 failed" in swept.text
    for rate, reason in ((TOO_HIGH, "train/loss became"), (KILLED, "its process was ended by SIGKILL")):
        run = runs(swept.directory)[rate]
        (line,) = [line for line in swept.text.splitlines() if line.startswith(f"{run.path.name}: ")]
        assert reason in line
        assert f"{run.path}/log.txt" in line
    with open(swept.directory / "jobs.csv") as file:
        rows = {row["optim.lr"]: row for row in csv.DictReader(file)}
    assert {rate for rate, row in rows.items() if row["status"] == "failed"} == {TOO_HIGH, KILLED}
    assert rows[KILLED]["reason"] == "its process was ended by SIGKILL"
    assert rows[KILLED]["log"].endswith("log.txt")


def test_typed_again_only_what_failed_is_tried_and_only_when_asked(swept, tmp_path):
    before = {rate: (run.path / "log.txt").read_text() for rate, run in runs(swept.directory).items()}
    with command(*swept.line, output=tmp_path / "again.txt") as one:
        assert one.code() == 1, one.text
    assert {rate: (run.path / "log.txt").read_text() for rate, run in runs(swept.directory).items()} == before
    assert one.text.count("retry_failed=true tries again") == 2
    with command(*swept.line, "retry_failed=true", output=tmp_path / "retried.txt") as one:
        assert one.code() == 1, one.text
    logs = {rate: (run.path / "log.txt").read_text() for rate, run in runs(swept.directory).items()}
    assert {rate for rate in logs if logs[rate] != before[rate]} == {TOO_HIGH, KILLED}
    statuses = {rate: run.status()["status"] for rate, run in runs(swept.directory).items()}
    assert statuses == dict.fromkeys(RATES, "done") | {TOO_HIGH: "failed"}


# --- interrupted -----------------------------------------------------------------------------------------------------


def running(directory: Path) -> list[Run]:
    return [run for run in runs(directory).values() if run.has_checkpoint("last")]


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_a_sweep_that_ends_early_takes_its_jobs_along_and_goes_on(how, cache, tmp_path):
    directory = tmp_path / "sweep"
    line = sweep(directory, cache, *ON_RAY, "hydra.launcher.num_gpus=2", "optim.lr=1e-3,2e-3,3e-3", "trainer.max_steps=400")
    with command(*line, output=tmp_path / "said.txt") as one:
        one.wait_for(lambda: len(running(directory)) == 2)
        one.send(signal.Signals[how])
        assert one.code(90) == (130 if how == "SIGINT" else -signal.SIGKILL), one.text
        wait_until_nobody_works(directory, one)
    if how == "SIGINT":
        assert Counter(run.status()["status"] for run in runs(directory).values()) == {"interrupted": 2, "waiting": 1}
        assert "Traceback" not in one.text
    with command(*line, output=tmp_path / "again.txt") as one:
        assert one.code() == 0, one.text
    logs = [(run.path / "log.txt").read_text() for run in runs(directory).values()]
    assert sum("going on with" in text for text in logs) == 2
    assert [text.count(": done: the run lies in") for text in logs] == [1, 1, 1]


def wait_until_nobody_works(directory: Path, one: Command) -> None:
    end = time.monotonic() + 90
    while devices_of_running(directory):
        assert time.monotonic() < end, one.text
        time.sleep(0.1)


# --- a cluster that does not answer ----------------------------------------------------------------------------------


@contextmanager
def nobody() -> Iterator[int]:
    """A port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    yield port


@contextmanager
def silence() -> Iterator[int]:
    """A port whose server takes every connection, and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield server.getsockname()[1]


@contextmanager
def nothing_back() -> Iterator[int]:
    """A port whose packets are swallowed: its queue is full."""
    with ExitStack() as held, socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            one = held.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("server", "prefix", "why"),
    [
        (nobody, "", "Connection refused"),
        (silence, "", "it has not answered within 4 s"),
        (silence, "ray://", "it has not answered within 4 s"),
        (nothing_back, "", "timed out"),
    ],
)
def test_a_cluster_that_does_not_answer_ends_it_in_time_with_a_sentence(server, prefix, why, cache, tmp_path):
    with server() as port:
        address = f"{prefix}127.0.0.1:{port}"
        line = sweep(
            tmp_path / "sweep", cache, "hydra/launcher=ray", f"hydra.launcher.address='{address}'",
            "hydra.launcher.timeout_s=4", "seed=0,1",
        )  # fmt: skip
        with command(*line, output=tmp_path / "said.txt") as one:
            one.wait_for(lambda: (tmp_path / "sweep").exists())
            start = time.monotonic()
            assert one.code(90) == 1, one.text
            assert time.monotonic() - start < 45, one.text  # with imports and the report
    (sentence,) = [line for line in one.text.splitlines() if line.startswith("error: ")]
    assert f"hydra.launcher.address={address}: Ray cannot be used there: " in sentence
    assert why in sentence
    assert "Traceback" not in one.text
    assert "2 jobs: 2 waiting" in one.text
