"""The command of a sweep, around Hydra's: where it lies, what may be asked of it, and what is done when it has ended."""

import hashlib
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from src.core.errors import UserError
from src.runs import config_hash, descriptive

__all__ = [
    "handing_on_errors",
    "is_sweep",
    "job_name",
    "register_plugins",
    "require_asked_rightly",
    "sweep",
    "sweep_directory",
]

log = logging.getLogger(__name__)

_FLAGS = ("-m", "--multirun")
_FOR_SWEEPS = ("sweep", "plan", "retry_failed")
_OF_SWEEPS = ("multirun.yaml", "log.txt")  # what a sweep without jobs leaves

sys.path.append(str(Path(__file__).resolve().parent / "plugins"))  # holds hydra_plugins, where our launchers are


def is_sweep() -> bool:
    """Whether the command line asks for a sweep."""
    return any(argument in _FLAGS or argument.upper() == "HYDRA.MODE=MULTIRUN" for argument in sys.argv[1:])


def require_asked_rightly(overrides: list[str]) -> None:
    """Raise `UserError` for what has no effect on this command, or none that could be meant."""
    given = {override.lstrip("+").partition("=")[0]: override.partition("=")[2] for override in overrides}
    if not is_sweep():
        for key in _FOR_SWEEPS:
            if key in given:
                raise UserError(f"{key}={given[key]} is for a sweep: python -m src.train -m ...")
        return
    if "resume" in given:
        raise UserError("resume= goes on with one run, without -m; a sweep goes on by itself when it is typed again")
    subdir = re.sub(r"\$\{[^}]*\}", "", given.get("hydra.sweep.subdir", "job").strip("'\""))
    if "/" in subdir or subdir in (".", ".."):
        raise UserError("hydra.sweep.subdir must be a plain name, below the directory of the sweep")
    if "${" in given.get("hydra.sweep.dir", ""):
        raise UserError(f"hydra.sweep.dir={given['hydra.sweep.dir']} must be a path, the same for all jobs")


def sweep(
    decorated: Callable[[], Any], directory: Path, config: DictConfig, end: Callable[[Path, DictConfig], bool]
) -> None:
    """Run the sweep in its directory, say what became of it, and end the program.

    Args:
        decorated: Hydra's main.
        directory: of the sweep.
        config: of the first job.
        end: see `src.cli.run_entry_point`.
    """
    _put_first("--multirun", f"hydra.sweep.dir='{directory}'")
    was_there = directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: cannot write to {directory}: {error.strerror or error} (set hydra.sweep.dir=)")
    code: int | str | None = 0
    try:
        with handing_on_errors():
            decorated()
    except KeyboardInterrupt:
        code = 130
        log.error("interrupted; the same command goes on")
    except OSError as error:  # as of a full disk
        code = f"error: {error.strerror or error}: {error.filename or directory}; the same command goes on"
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        code = f"error: {' '.join(sentence.split())}"
    has_jobs = any(directory.glob("*/status.json"))
    if not was_there and (config.plan or not has_jobs):
        _leave_nothing(directory)
    if config.plan or not has_jobs:
        sys.exit(code)
    try:
        is_complete = end(directory, config)
    except (UserError, OSError) as error:
        sys.exit(code or f"error: the report of the sweep cannot be written: {error}")
    sys.exit(code or (0 if is_complete else 1))


def job_name(root: DictConfig) -> str:
    """The directory of a job, by what it is and not by how it was typed: data, model, seed, and the hash of all of it."""
    choices = root.hydra.runtime.choices
    return f"{choices.data}-{choices.model}-seed{root.seed}-{config_hash(root)}"


def register_plugins() -> None:
    """Make our launchers and sweepers known to Hydra, which may have looked for plugins before it could find them."""
    ours = importlib.import_module("hydra_plugins.generative")
    for name in ours.__all__:
        Plugins.instance().register(getattr(ours, name))


@contextmanager
def handing_on_errors() -> Iterator[None]:
    """Inside the block Hydra hands errors on, instead of printing them and ending the program."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def sweep_directory(overrides: list[str], name: object) -> Path:
    """Where `hydra.sweep.dir=` says, else in outputs/sweeps under the given name or one made of the overrides.

    The name says what is swept, so that the same command finds its sweep again. Raises `UserError` for a name that is none.
    """
    given = [override.partition("=")[2].strip("'\"") for override in overrides if override.startswith("hydra.sweep.dir=")]
    if given:
        return Path(given[-1])
    if name is not None:
        if not re.fullmatch(r"[\w.+=-]+", str(name)) or set(str(name)) == {"."}:
            raise UserError(f"sweep={name} must be a plain name; its directory is in outputs/sweeps")
        return Path("outputs/sweeps") / str(name)
    named = descriptive(overrides)
    digest = hashlib.sha256("\n".join(sorted(named)).encode()).hexdigest()[:8]
    return Path("outputs/sweeps") / "-".join([*filter(None, [_slug(named)]), digest])


def _slug(overrides: list[str]) -> str:
    """Overrides as part of a file name, whatever their order: `model=vae,gan` is `model-vae-gan`; at most 60 characters."""
    in_order = sorted(overrides, key=lambda override: ("." in override.partition("=")[0], override))  # parts before values
    return re.sub(r"[^\w.]+", "-", " ".join(in_order)).strip("-")[:60].rstrip("-.")


def _put_first(flag: str, override: str) -> None:
    """Give Hydra a flag and an override. It takes overrides in one piece only, so neither `a=1 -m` nor `a=1 -m b=2` may
    have another one behind it."""
    rest = [argument for argument in sys.argv[1:] if argument not in _FLAGS]
    place = next((i for i, argument in enumerate(rest) if not argument.startswith("-")), len(rest))
    sys.argv[1:] = [flag, *rest[:place], override, *rest[place:]]


def _leave_nothing(directory: Path) -> None:
    """Take a directory away in which nothing but this command has written."""
    if {path.name for path in directory.iterdir()} <= set(_OF_SWEEPS):
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


def _sentence(error: BaseException | None) -> str | None:
    """The sentence for the user that is behind an error, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return None if error is None else str(error)
