"""Commands in processes of their own, to be killed and interrupted, and what runs have come to, to be compared."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from src.runs import Run
from tests.commands import ROOT

__all__ = ["Command", "command", "curves", "kill", "outcome", "processes_below", "tensors", "wait_for", "weights"]


class Command:
    """`python -m src.ARGUMENTS`, running in a group of processes of its own.

    Args:
        arguments: of the command line.
        output: the file that takes what it says.
        through: a command that is given the line and starts it.
        environment: variables to set beside those of this process.
    """

    def __init__(self, arguments: Sequence[str], output: Path, through: Sequence[str], environment: dict[str, str]) -> None:
        self.output = output
        with open(output, "ab") as file:
            self.process = subprocess.Popen(
                [*through, sys.executable, "-m", f"src.{arguments[0]}", *arguments[1:]],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        return self.output.read_text()

    def is_running(self) -> bool:
        return self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def code(self, timeout_s: float = 300) -> int:
        """What it ends with; its words are in the error if it does not end."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it has not ended within {timeout_s:g} s; it said:\n{self.text}") from None

    def wait_for(self, what: Callable[[], Any], timeout_s: float = 180) -> Any:
        """What `what` returns once that is true, while the command is running."""
        return wait_for(lambda: what() or not self.is_running(), timeout_s, lambda: self.text)


@contextmanager
def command(*arguments: str, output: Path, through: Sequence[str] = (), **environment: str) -> Iterator[Command]:
    """A command that is started for the block; what is left of it and of its children is killed behind it."""
    one = Command(arguments, output, through, environment)
    try:
        yield one
    finally:
        kill([one.pid, *processes_below(one.pid)])
        one.process.wait()


def wait_for(what: Callable[[], Any], timeout_s: float = 180, said: Callable[[], str] = str) -> Any:
    """What `what` returns once that is true."""
    end = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < end, f"waited {timeout_s:g} s in vain: {said()}"
        time.sleep(0.002)
    return found


def kill(pids: Sequence[int]) -> None:
    """SIGKILL to each of them that is there, all stopped before so that none sees another one end."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def processes_below(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    below, new = [], [pid]
    while new:
        new = [child for one in new for child in parents.get(one, [])]
        below += new
    return below


def tensors(node: Any) -> list[Tensor]:
    if isinstance(node, Tensor):
        return [node]
    values = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors(value)]


def weights(run: Run) -> list[Tensor]:
    return tensors(torch.load(run.checkpoint("last"), weights_only=True)["state_dict"])


def curves(run: Run) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, but for the speed."""
    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if "per_second" not in name]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def outcome(run: Run) -> dict[str, Any]:
    """All that a run has come to, as plain values that are equal where every bit is."""
    found: dict[str, Any] = {}
    for file in sorted(run.checkpoints.glob("*.ckpt")):
        kept = torch.load(file, weights_only=True)
        for part in ("state_dict", "optimizer_states", "progress"):  # the others count what is done again
            found |= _leaves(kept[part], f"{file.name} {part}")
    found |= {f"curve {name}": curve for name, curve in curves(run).items()}
    found |= {f"picture {file.name}": file.read_bytes() for file in sorted(run.samples.iterdir())}
    results = {key: value for key, value in (run.results() or {}).items() if key != "costs"}  # times, which differ
    return found | {name: json.dumps(value) for name, value in (("results", results), ("means", run.validation()))}


def _leaves(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Tensor):
        yield name, (node.dtype, node.shape, bytes(node.reshape(-1).contiguous().view(torch.uint8).numpy()))
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{name}.{key}")
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _leaves(value, f"{name}.{i}")
    else:
        yield name, node
