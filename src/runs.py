"""The run directory: the only file that knows what lies where in it.

config.yaml       resolved, plain types          status.json     waiting | running | done | failed (+ reason) | ...
checkpoints/      last.ckpt, best.ckpt           samples/        grids by step and epoch
tensorboard/      events                         results.json    every metric with its card
log.txt           what the console said          environment.json  git commit, diff and status, versions, device, seed
spec.json         what one example of the data is, and the fingerprint of all of them
validation.json   held-out means at the best checkpoint
course.json       of each metric of the light evaluations the best value and the final one
job.json          overrides of a job of a sweep   output.txt      of such a job: what no log has, as the words of a crash

A status is "waiting" (not begun), "running", "done", "failed", "interrupted" or "pruned". Only the process that has claimed
the directory changes it; one that is "running" with nobody's claim was killed.
"""

import copy
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from src.core.errors import UserError

__all__ = ["Run", "config_hash", "descriptive", "file_sha256", "without_controls"]

_TRAINING = ("training_seconds", "training_device")  # in status.json
_FINGERPRINT = "fingerprint"  # in spec.json, beside the spec itself
_CHECKPOINTS = {"last": ["last"], "best": ["best"], "auto": ["best", "last"]}  # the files that a config may mean, in turn
_PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "omegaconf", "torchmetrics", "numpy")


_CONTROLS = ("hydra", "resume", "sweep", "plan", "retry_failed", "objective")  # of the command, not of a run
_WITHOUT_EFFECT = (  # on what comes out
    "logger",
    "loader.num_workers",
    "data.root",
    "data.cache",
    "callback.progress",
    "callback.prune",
    "callback.checkpoint.every_minutes",
    "autoencoder.run",  # its weights are known by their hash
    "autoencoder.costs",
)
_KNOWN_BY_HASH = ("network.weights", "model.network.weights")  # which stands beside the folder


def descriptive(overrides: Iterable[str]) -> list[str]:
    """The overrides that say what is trained, without those of the command and those that cannot change the result."""
    keys = "|".join(map(re.escape, (*_CONTROLS, *_WITHOUT_EFFECT)))
    return [override for override in overrides if not re.match(rf"[+~]*({keys})([.@=/]|$)", override)]


def without_controls(config: DictConfig) -> DictConfig:
    """The part of a composed config that describes a run, resolved."""
    everything = cast("dict[str, Any]", OmegaConf.to_container(config))
    own = OmegaConf.create({key: value for key, value in everything.items() if key not in _CONTROLS})
    return OmegaConf.create(cast("dict[str, Any]", OmegaConf.to_container(own, resolve=True)))


def file_sha256(file: Path) -> str:
    """The hash of a file, read once as long as it stays as it is."""
    about = file.stat()
    return _file_sha256(file, about.st_mtime_ns, about.st_size)


@functools.lru_cache
def _file_sha256(file: Path, *_: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.lru_cache
def _parsed(file: Path, *_: int) -> DictConfig:
    """A config file, read once as long as it stays as it is: to read one takes ten times as long as to copy it."""
    return cast("DictConfig", OmegaConf.load(file))


def config_hash(config: DictConfig) -> str:
    """Eight hexadecimal digits that name what a config makes."""
    return _digest(config)[:8]


def _digest(config: DictConfig) -> str:
    """SHA-256 of a config, without what cannot change the result, and without names."""
    plain = cast("dict[str, Any]", OmegaConf.to_container(without_controls(config)))
    for path in (*_WITHOUT_EFFECT, *_KNOWN_BY_HASH, "name"):
        *above, last = path.split(".")
        node: Any = plain
        for key in above:
            node = node.get(key, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node.pop(last, None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path

    @classmethod
    def create(cls, path: Path, config: DictConfig) -> "Run":
        """A new run in a directory that this process has claimed; refuses one that already holds a run."""
        run = cls(path)
        if run._status_file.exists():
            raise UserError(f"{path} already holds a run; give another directory with hydra.run.dir=")
        run._write_down(config)
        return run

    @classmethod
    def prepare(cls, path: Path, config: DictConfig, overrides: list[str]) -> "Run":
        """A run of a sweep in a directory that this process has claimed: "waiting" if it is new, else as it is.

        What cannot change the result, as where the data lie, follows the config of today.
        """
        run = cls(path)
        status = run.state() if run.is_there() else {"status": "waiting"}
        if run.is_there() and (path / "config.yaml").is_file() and _digest(run.config()) != _digest(config):
            raise UserError(
                f"{path} holds a run of another config; give the sweep another name with sweep=, or let hydra.sweep.subdir "
                "hold ${job_name:}"
            )
        if status["status"] not in ("done", "pruned"):
            _write_json(path / "job.json", {"overrides": overrides})
            run._write_down(config, status)
        return run

    def _write_down(self, config: DictConfig, status: dict[str, Any] | None = None) -> None:
        try:
            for folder in (self.checkpoints, self.samples, self.tensorboard):
                folder.mkdir(exist_ok=True)
            _write(self.path / "config.yaml", OmegaConf.to_yaml(config))
            _write_json(self._status_file, status or {"status": "waiting"})  # the last: it makes the directory a run
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror} (set hydra.run.dir=)") from error

    @classmethod
    def reopen(cls, path: Path, is_longer: bool) -> "Run":
        """A run to go on with, which this process has claimed; refuses one that is done, unless it is made longer."""
        run = cls.open(path, "resume")
        if run.status()["status"] == "done":
            if not is_longer:
                raise UserError(
                    f"resume={path}: the run is done; make it longer with trainer.max_epochs= or trainer.max_steps="
                )
            run.checkpoint("last")
        return run

    @classmethod
    def open(cls, path: Path, key: str = "run") -> "Run":
        """A finished or running run; raises `UserError` if the directory, given as `key=`, is none."""
        run = cls(path)
        if not path.is_dir():
            raise UserError(f"{key}={path} does not exist; give the directory of a run, as in {key}=outputs/digits/vae/...")
        missing = [name for name in ("config.yaml", "status.json") if not (path / name).is_file()]
        if missing:
            raise UserError(f"{key}={path} is not a run directory (it has no {missing[0]})")
        return run

    def is_there(self) -> bool:
        """Whether the directory holds a run."""
        return self._status_file.is_file()

    @property
    def shown(self) -> Path:
        """The path as a person would type it: from here, if it lies below."""
        here = Path.cwd()
        return self.path.relative_to(here) if self.path.is_relative_to(here) else self.path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def _status_file(self) -> Path:
        return self.path / "status.json"

    def config(self) -> DictConfig:
        """The resolved config the run was made with."""
        try:
            file = self.path / "config.yaml"
            about = file.stat()
            return copy.deepcopy(_parsed(file, about.st_mtime_ns, about.st_size, about.st_ino))
        except Exception as error:  # yaml and omegaconf raise many kinds
            raise UserError(f"{self.path / 'config.yaml'} cannot be read: {error}") from error

    def checkpoint(self, name: str) -> Path:
        """The file of a checkpoint: "last", "best", or "auto" for what `evaluation.checkpoint` of the run's config says.

        Where that is "auto", too: the best one if there is one, else the last.
        """
        self.require_checkpoint_name(name)
        if name == "auto":
            name = str(OmegaConf.select(self.config(), "evaluation.checkpoint", default=name))
            self.require_checkpoint_name(name)
        for choice in _CHECKPOINTS[name]:
            file = self.checkpoints / f"{choice}.ckpt"
            if file.is_file():
                return file
        raise UserError(
            f"run={self.path} has no {_CHECKPOINTS[name][-1]} checkpoint (its status is {self.status()['status']})"
        )

    def has_checkpoint(self, name: str) -> bool:
        return (self.checkpoints / f"{name}.ckpt").is_file()

    @staticmethod
    def require_checkpoint_name(name: str) -> None:
        """Raise `UserError` unless `checkpoint` knows the name."""
        if name not in _CHECKPOINTS:
            raise UserError(f"checkpoint={name} is not known; allowed: {', '.join(_CHECKPOINTS)}")

    def status(self) -> dict[str, Any]:
        status = _read_json(self._status_file)
        if "status" not in status:
            raise UserError(f"{self._status_file} is damaged (it has no status)")
        return status

    def state(self) -> dict[str, Any]:
        """The status; "failed" with the reason if it is damaged or gone."""
        try:
            return self.status()
        except UserError as error:
            return {"status": "failed", "reason": str(error)}

    def set_status(self, status: str, reason: str | None = None) -> None:
        """Record how the run is, with the reason of a failure or of its pruning, and the seconds that it has run for."""
        now = datetime.now(UTC)
        before = self.state() if self.is_there() else {}
        entry = {"status": status, "time": now.isoformat(timespec="seconds"), "seconds": before.get("seconds", 0.0)}
        entry |= {key: before[key] for key in _TRAINING if key in before}
        if status == "running":
            entry |= {"host": platform.node(), "pid": str(os.getpid()), "since": now.timestamp()}
        elif "since" in before:
            entry["seconds"] += now.timestamp() - before["since"]
        _write_json(self._status_file, entry | ({"reason": reason} if reason else {}))

    def add_training_time(self, seconds: float, device: str) -> None:
        """Record that training went on for so long; a process that is killed records nothing."""
        status = self.state()
        total = status.get(_TRAINING[0], 0.0) + seconds
        _write_json(self._status_file, status | dict(zip(_TRAINING, (total, device), strict=True)))

    def training_time(self) -> tuple[float, str] | None:
        """Seconds of the training in all its lives, validation and pictures with it, and the device; None if unknown."""
        status = self.state()
        return (status[_TRAINING[0]], status[_TRAINING[1]]) if all(key in status for key in _TRAINING) else None

    def overrides(self) -> list[str] | None:
        """What the command line gave a job of a sweep; None in a run that is none."""
        file = self.path / "job.json"
        return list(_read_json(file)["overrides"]) if file.exists() else None

    def validation(self) -> dict[str, float]:
        """Held-out means by name, as "val/loss", at the best checkpoint or else the last one; none without validation."""
        file = self.path / "validation.json"
        return _read_json(file) if file.exists() else {}

    def write_validation(self, means: dict[str, float]) -> None:
        _write_json(self.path / "validation.json", means)

    def write_course(self, course: dict[str, Any]) -> None:
        _write_json(self.path / "course.json", course)

    def results(self) -> dict[str, Any] | None:
        """What was measured so far; None if nothing was."""
        file = self.path / "results.json"
        return _read_json(file) if file.exists() else None

    def write_results(self, results: dict[str, Any]) -> None:
        _write_json(self.path / "results.json", results)

    def spec(self) -> dict[str, Any] | None:
        """The data spec the model was built for, as plain types; None in a run from before it was written down."""
        return {key: value for key, value in written.items() if key != _FINGERPRINT} if (written := self._spec()) else None

    def fingerprint(self) -> str | None:
        """Of the data it was trained on; None in a run from before it was written down."""
        return (self._spec() or {}).get(_FINGERPRINT)

    @property
    def spec_file(self) -> Path:
        return self.path / "spec.json"

    def write_spec(self, spec: dict[str, Any], fingerprint: str) -> None:
        """Record the data that the training begins with, by their spec and the fingerprint of the prepared arrays."""
        content = spec | {_FINGERPRINT: fingerprint}
        _write(self.spec_file, json.dumps(content, indent=2))  # unbounded values have infinite limits

    def _spec(self) -> dict[str, Any] | None:
        return _read_json(self.spec_file) if self.spec_file.exists() else None

    def write_environment(self, seed: int, device: str) -> None:
        """Record what else the run depends on: code, packages, machine, command."""
        environment = {
            "command": [sys.executable, *sys.argv],
            "git_commit": _git("rev-parse", "HEAD"),
            "git_diff": _git("diff", "HEAD"),
            "git_status": _git("status", "--porcelain"),  # names the files that git does not know
            "python": platform.python_version(),
            "packages": {name: version(name) for name in _PACKAGES},
            "platform": platform.platform(),
            "num_cpus": os.cpu_count(),
            "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "device": device,
            "seed": seed,
        }
        _write_json(self.path / "environment.json", environment)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object)")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content, indent=2, allow_nan=False))


def _write(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader never sees half of it."""
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # or a loss of power may leave a new name on no content
    unfinished.replace(path)


def _git(*arguments: str) -> str | None:
    """Output of a git command in the source tree; None where there is no git or no repository."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return done.stdout.decode(errors="replace").strip("\n")  # a diff quotes files of any encoding
