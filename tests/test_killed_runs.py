"""A run that is killed outright, again and again, and resumed each time is the run that was not: bit for bit."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest
import torch

from src.runs import Run
from tests.commands import QUICK, call
from tests.configs import models_by_themselves, small
from tests.killing import Command, command, outcome

NUM_STEPS = 40  # of ten to an epoch
METRICS = "kd,c_t,copying,bound,test_loss,reconstruction_error,psnr,ssim,accuracy"  # for each model some that take time
KILLS = ("start-up", "steps", "steps", "steps", "evaluation")  # of each run


def overrides(model: str, cache: Path, folder: Path) -> list[str]:
    return [
        *QUICK, *small(model), f"model={model}", f"trainer.max_steps={NUM_STEPS}", f"metric=[{METRICS}]",
        "callback.checkpoint.every_minutes=0", "callback.light_evaluation.metrics=[]", f"data.cache={cache}",
        f"hydra.run.dir={folder}",
    ]  # fmt: skip


def wait_for_start_up(chance: random.Random, one: Command, folder: Path) -> str:
    """Any time between the first sign of the run and its first step."""
    one.wait_for((folder / "status.json").exists)
    delay = chance.uniform(0, 2)
    time.sleep(delay)
    return f"{delay:.2f} s after the start"


def wait_for_steps(chance: random.Random, one: Command, folder: Path) -> str:
    """Some steps later, at any moment of a step, or of the validation and the pictures behind it."""
    file = folder / "checkpoints" / "last.ckpt"
    num_steps, delay = chance.randint(1, NUM_STEPS // 4), chance.uniform(0, 0.08)
    before = written(file)
    for _ in range(num_steps):
        before = one.wait_for(lambda before=before: (now := written(file)) != before and now)
    time.sleep(delay)
    return f"{delay:.3f} s after {num_steps} checkpoints"


def wait_for_evaluation(chance: random.Random, one: Command, folder: Path) -> str:
    one.wait_for(lambda: "evaluating the" in (folder / "log.txt").read_text())
    delay = chance.uniform(0, 0.05)
    time.sleep(delay)
    return f"{delay:.2f} s after the evaluation began"


MOMENTS: dict[str, Callable[[random.Random, Command, Path], str]] = {
    "start-up": wait_for_start_up,
    "steps": wait_for_steps,
    "evaluation": wait_for_evaluation,
}


def written(file: Path) -> int:
    """When a file was written; 0 if it never was."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("model", models_by_themselves())
def test_a_run_killed_five_times_ends_as_the_one_that_was_not(model, cache, tmp_path):
    said = call("train", *overrides(model, cache, tmp_path / "whole"))
    assert said.code == 0, said.text
    killed = tmp_path / "killed"
    chance = random.Random(crc32(model.encode()))
    line, history, steps = overrides(model, cache, killed), [], []
    for moment in KILLS:
        with command("train", *line, output=tmp_path / "said.txt") as one:
            history.append(MOMENTS[moment](chance, one, killed))
            one.send(signal.SIGKILL)
            assert one.code() == -signal.SIGKILL, f"{history}: it ended before it was killed:\n{one.text}"
        assert Run.open(killed).status()["status"] == "running"
        file = killed / "checkpoints" / "last.ckpt"
        steps.append(torch.load(file, weights_only=True)["progress"]["step"] if file.exists() else 0)
        line = [f"resume={killed}"]
    with command("train", *line, output=tmp_path / "said.txt") as one:
        assert one.code() == 0, f"{history}:\n{one.text}"
    assert Run.open(killed).status()["status"] == "done"
    assert len(set(steps[1:4])) == 3, f"{history}: killed with checkpoints of the steps {steps}"
    assert all(0 < step < NUM_STEPS for step in steps[1:4]), steps
    one, other = outcome(Run.open(killed)), outcome(Run.open(tmp_path / "whole"))
    different = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    assert not different, f"killed {history}, with checkpoints of the steps {steps}: {different[:10]}"


@pytest.mark.slow
def test_of_two_that_resume_a_run_at_the_same_instant_one_goes_on(cache, tmp_path):
    folder = tmp_path / "run"
    line = [*overrides("gan", cache, folder), "trainer.max_steps=200"]
    with command("train", *line, output=tmp_path / "said.txt") as one:
        one.wait_for((folder / "checkpoints" / "last.ckpt").exists)
        one.send(signal.SIGKILL)
    again = ("train", f"resume={folder}")
    with command(*again, output=tmp_path / "one.txt") as one, command(*again, output=tmp_path / "other.txt") as other:
        both = sorted([one, other], key=Command.code)
        assert [some.code() for some in both] == [0, 1], one.text + other.text
        first, second = both
    refused = f"{folder} is being worked on by process {first.pid}", "the run is done"  # by the time it asked
    assert any(words in second.text for words in refused), second.text
    assert "Traceback" not in second.text
    log = (folder / "log.txt").read_text()
    assert log.count("going on with") == log.count(": done: the run lies in") == 1
