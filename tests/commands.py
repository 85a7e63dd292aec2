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

from src.runs import Run
from tests.configs import parts, small

__all__ = ["QUICK", "ROOT", "Said", "Trained", "call", "run_cli", "train"]

ROOT = Path(__file__).resolve().parent.parent

QUICK = (  # what makes a run short, whatever it trains
    "trainer.accelerator=cpu",
    "trainer.max_steps=40",
    "trainer.val_every_n_epochs=1",
    "training.log_every_n_steps=1",
    "callback.pictures.num_samples=8",
    "evaluation.num_samples=200",  # more than the classifier's 84 features, and enough for 64 components
    "evaluation.batch_size=50",
    "evaluation.batch_norm_samples=256",
)

QUICK_GAME = ("optim.generator.lr=1e-3", "optim.discriminator.lr=1e-3", "training.n_critic=1")  # to learn in 40 steps


@dataclass(frozen=True)
class Said:
    """How a command ended, and all that it wrote to the screen."""

    code: int
    text: str


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    run: Run
    said: Said


def train(directory: Path, cache: Path, *overrides: str) -> Trained:
    """A short training on digits that must succeed."""
    model = next((one.partition("=")[2] for one in overrides if one.startswith("model=")), "vae")
    is_narrow_game = bool(small(model)) and "optim@optim.generator" in parts(model)
    of_game = QUICK_GAME if is_narrow_game else ()
    said = call("train", *QUICK, *small(model), *of_game, f"hydra.run.dir={directory}", f"data.cache={cache}", *overrides)
    assert said.code == 0, said.text
    return Trained(Run.open(directory), said)


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
