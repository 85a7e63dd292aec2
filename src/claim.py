"""The right to work on a run directory: one process has it at a time, and it ends with the process.

It is a lock on a file, which the operating system frees however the process ends. Where runs lie on a file system whose
locks do not hold between machines, the holder's sign of life does: a file that it touches every few seconds.
"""

import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from src.core.errors import UserError

__all__ = ["ClaimedError", "claim", "is_claimed"]

_SIGN_EVERY_SECONDS = 5.0
_DEAD_AFTER_SECONDS = 20.0  # without a sign, on another machine
_PROBE_SECONDS = 0.5  # somebody may only be looking whether there is a claim
_WORKERS_END_SECONDS = 15.0  # a killed process's data workers hold its lock until they notice


class ClaimedError(UserError):
    """Another process works on the directory."""


@contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Inside the block this process alone works on the directory, which is made if it is not there.

    Raises `ClaimedError` if another process does, and `UserError` if the directory cannot be written to.
    """
    lock, sign = FileLock(directory / ".claim.lock"), directory / ".claim.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _acquire(lock, sign)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error} (set hydra.run.dir=)") from error
    ended = threading.Event()
    try:
        _require_dead(sign)
        sign.write_text(json.dumps({"host": platform.node(), "pid": os.getpid()}))
        threading.Thread(target=_give_signs, args=(sign, ended), daemon=True).start()
        yield
    finally:
        ended.set()
        if _holder(sign) == (platform.node(), os.getpid()):
            sign.unlink()
        lock.release()


def is_claimed(directory: Path) -> bool:
    """Whether a process works on the directory."""
    sign, file = directory / ".claim.json", directory / ".claim.lock"
    if file.exists():
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
            lock.release()
        except Timeout:
            return True
    host, _ = _holder(sign)
    return host not in (None, platform.node()) and _age(sign) < _DEAD_AFTER_SECONDS


def _acquire(lock: FileLock, sign: Path) -> None:
    try:
        lock.acquire(timeout=_PROBE_SECONDS)
    except Timeout:
        host, pid = _holder(sign)
        if host == platform.node() and not _is_alive(pid):
            try:
                lock.acquire(timeout=_WORKERS_END_SECONDS)
            except Timeout:
                pass
            else:
                return
        raise _claimed(sign) from None


def _require_dead(sign: Path) -> None:
    """Raise `ClaimedError` if a process of another machine, which our lock does not keep out, gives signs of life."""
    host, _ = _holder(sign)
    if host in (None, platform.node()):
        return
    before = _touched(sign)
    while _age(sign) < _DEAD_AFTER_SECONDS:
        if _touched(sign) != before:
            raise _claimed(sign)
        time.sleep(0.5)


def _age(sign: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system, which all machines share."""
    touched = _touched(sign)
    if touched is None:
        return float("inf")
    with tempfile.NamedTemporaryFile(dir=sign.parent, prefix=".clock-") as file:
        return (Path(file.name).stat().st_mtime_ns - touched) / 1e9


def _claimed(sign: Path) -> ClaimedError:
    host, pid = _holder(sign)
    who = "another process" if host is None else f"process {pid}" + ("" if host == platform.node() else f" on {host}")
    return ClaimedError(f"{sign.parent} is being worked on by {who}")


def _give_signs(sign: Path, ended: threading.Event) -> None:
    while not ended.wait(_SIGN_EVERY_SECONDS):
        try:
            os.utime(sign)
        except OSError:  # the directory was taken away; the run itself will say so
            return


def _touched(sign: Path) -> int | None:
    try:
        return sign.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _holder(sign: Path) -> tuple[str | None, int | None]:
    """Machine and process that have, or had, the claim; (None, None) if it was given back, or is being taken."""
    try:
        content: dict[str, Any] = json.loads(sign.read_text())
        return str(content["host"]), int(content["pid"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None, None


def _is_alive(pid: int | None) -> bool:
    """Whether a process of this machine runs; one that nobody has named may."""
    if pid is None:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
