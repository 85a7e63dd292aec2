"""One process works on a run directory at a time, and its claim ends with it."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from src import claim as claims
from src.claim import ClaimedError, claim, is_claimed
from src.core.errors import UserError

PROCESSES = multiprocessing.get_context("fork")  # nothing heavy is imported here, so that forking is cheap
NUM_ROUNDS, NUM_PROCESSES = 8, 6


@contextmanager
def process(body: Callable[..., None], *arguments: Any) -> Iterator[multiprocessing.process.BaseProcess]:
    one = PROCESSES.Process(target=body, args=arguments, daemon=True)
    one.start()
    try:
        yield one
    finally:
        one.kill()
        one.join()


def hold(directory: Path) -> None:
    with claim(directory):
        time.sleep(60)


def wait_until_claimed(directory: Path) -> None:
    end = time.monotonic() + 20
    while not (directory / ".claim.json").exists():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_directory_is_refused_while_another_process_has_it_and_free_when_that_was_killed(tmp_path):
    directory = tmp_path / "run"
    with process(hold, directory) as other:
        wait_until_claimed(directory)
        assert is_claimed(directory)
        with pytest.raises(ClaimedError, match=f"{directory} is being worked on by process {other.pid}$"), claim(directory):
            pass
        os.kill(other.pid, signal.SIGKILL)
        other.join()
        assert not is_claimed(directory)
        with claim(directory):
            assert is_claimed(directory)
    assert not is_claimed(directory)


def test_the_claim_of_this_process_is_refused_to_itself_and_ends_with_its_block(tmp_path):
    with claim(tmp_path):
        with pytest.raises(ClaimedError, match=str(os.getpid())), claim(tmp_path):
            pass
        assert is_claimed(tmp_path)
        with process(hold, tmp_path) as other:
            other.join(20)
            assert other.exitcode == 1
        assert is_claimed(tmp_path)
    assert not is_claimed(tmp_path)
    with pytest.raises(ZeroDivisionError), claim(tmp_path):
        raise ZeroDivisionError
    with claim(tmp_path):
        pass


def test_a_child_that_outlives_a_killed_process_is_not_in_the_way(tmp_path):
    """A data worker is such a child: it ends when it notices that its parent has."""
    with process(hold_with_child, tmp_path, 3) as other:
        wait_until_claimed(tmp_path)
        time.sleep(0.2)
        os.kill(other.pid, signal.SIGKILL)
        other.join()
        with claim(tmp_path):
            assert is_claimed(tmp_path)


def hold_with_child(directory: Path, seconds: float) -> None:
    with claim(directory):
        if os.fork() == 0:
            time.sleep(seconds)
            os._exit(0)
        time.sleep(60)


# --- another machine, whose locks do not hold here -------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(claims, "_SIGN_EVERY_SECONDS", 0.1)
    monkeypatch.setattr(claims, "_DEAD_AFTER_SECONDS", 1.5)


def hold_elsewhere(directory: Path) -> None:
    """As a process on another machine does, on a file system that keeps no locks."""
    claims.platform.node = lambda: "elsewhere"
    claims.FileLock = lambda path: FileLockOfAnother()
    hold(directory)


class FileLockOfAnother:
    def acquire(self, timeout: float) -> None: ...

    def release(self) -> None: ...


def test_a_holder_on_another_machine_is_respected_while_it_gives_signs_of_life(quick, tmp_path):
    with process(hold_elsewhere, tmp_path) as other:
        wait_until_claimed(tmp_path)
        assert is_claimed(tmp_path)
        with (
            pytest.raises(ClaimedError, match=f"is being worked on by process {other.pid} on elsewhere$"),
            claim(tmp_path),
        ):
            pass
        assert json.loads((tmp_path / ".claim.json").read_text())["host"] == "elsewhere"
        os.kill(other.pid, signal.SIGKILL)
        other.join()
        time.sleep(1.6)
        assert not is_claimed(tmp_path)
        with claim(tmp_path):
            assert is_claimed(tmp_path)


def test_the_holder_gives_signs_of_life(quick, tmp_path):
    with claim(tmp_path):
        first = (tmp_path / ".claim.json").stat().st_mtime_ns
        end = time.monotonic() + 10
        while (tmp_path / ".claim.json").stat().st_mtime_ns == first:
            assert time.monotonic() < end
            time.sleep(0.02)


# --- many at once ----------------------------------------------------------------------------------------------------


def race(directory: Path, together: Barrier, number: int) -> None:
    """Claim one directory after the other at the same time as all others; write down who got it."""
    for i in range(NUM_ROUNDS):
        folder = directory / str(i)
        together.wait(30)
        try:
            with claim(folder):
                with open(directory / f"{i}.txt", "a") as file:
                    file.write(f"{number} ")
                together.wait(30)
        except ClaimedError:
            together.wait(30)


@pytest.mark.parametrize("left_by", ["nobody", "a killed process", "another machine"])
def test_of_many_at_once_exactly_one_gets_it(left_by, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_DEAD_AFTER_SECONDS", 0.0)
    signs = {
        "a killed process": {"host": claims.platform.node(), "pid": dead_pid()},
        "another machine": {"host": "x", "pid": 1},
    }
    for i in range(NUM_ROUNDS):
        (tmp_path / str(i)).mkdir()
        if left_by in signs:
            (tmp_path / str(i) / ".claim.json").write_text(json.dumps(signs[left_by]))
    monkeypatch.setattr(claims, "_WORKERS_END_SECONDS", 0.0)
    together = PROCESSES.Barrier(NUM_PROCESSES)
    all_of_them = [PROCESSES.Process(target=race, args=(tmp_path, together, i)) for i in range(NUM_PROCESSES)]
    for one in all_of_them:
        one.start()
    for one in all_of_them:
        one.join(60)
    assert [one.exitcode for one in all_of_them] == [0] * NUM_PROCESSES
    owners = [(tmp_path / f"{i}.txt").read_text().split() for i in range(NUM_ROUNDS)]
    assert [len(some) for some in owners] == [1] * NUM_ROUNDS


def dead_pid() -> int:
    with process(time.sleep, 0) as one:
        one.join()
        assert one.pid is not None
        return one.pid


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    sentence = r"cannot write to .*file/run: Not a directory \(set hydra.run.dir=\)"
    with pytest.raises(UserError, match=sentence), claim(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": 1}', "\x00"])
def test_a_damaged_sign_of_life_is_no_claim(content, tmp_path):
    (tmp_path / ".claim.json").write_text(content)
    with claim(tmp_path):
        assert json.loads((tmp_path / ".claim.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".claim.json").exists()
