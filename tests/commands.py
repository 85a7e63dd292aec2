"""The project's command line, called in this process or, where the process is the subject, in one of its own."""

import importlib
import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

__all__ = ["QUICK", "Said", "call", "run_cli"]

ROOT = Path(__file__).resolve().parent.parent

QUICK = (  # what makes a run short, whatever it trains
    "trainer.accelerator=cpu",
    "evaluation.num_samples=60",
    "evaluation.batch_size=50",
    "evaluation.classifier.num_steps=20",
)


@dataclass(frozen=True)
class Said:
    """How a command ended, and all that it wrote to the screen."""

    code: int
    text: str


def call(command: str, *arguments: str) -> Said:
    """`python -m src.COMMAND ARGUMENTS`, in this process: the same parsing, checking, logging and exit codes."""
    main = importlib.import_module(f"src.{command}").main
    screen, code = io.StringIO(), 0
    with (
        _arguments(f"src/{command}.py", *arguments),
        _logging_as_it_was(),
        redirect_stdout(screen),
        redirect_stderr(screen),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code if isinstance(end.code, str) else "")
    return Said(code, screen.getvalue())


def run_cli(*arguments: str, flags: tuple[str, ...] = (), timeout_s: float = 120) -> Said:
    """`python FLAGS -m src.ARGUMENTS` in a process of its own, from the checkout."""
    line = [sys.executable, *flags, "-m", f"src.{arguments[0]}", *arguments[1:]]
    done = subprocess.run(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False
    )
    return Said(done.returncode, done.stdout)


@contextmanager
def _arguments(*argv: str) -> Iterator[None]:
    before, sys.argv = sys.argv, list(argv)
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _logging_as_it_was() -> Iterator[None]:
    """Hydra sets the root logger up for every job; pytest wants its own back."""
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        yield
    finally:
        for handler in logging.root.handlers:
            if handler not in handlers:
                handler.close()
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
