"""The end of a sweep: `jobs.csv`, `compare.md`, `compare.csv` and `samples.png` in its directory, and the same in words."""

import csv
import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from rich import get_console

from src.claim import is_claimed
from src.core.errors import UserError
from src.evaluation.comparison import Column, Comparison, compare
from src.evaluation.comparison_formats import as_text, narrow_table, shown_value, to_csv, to_markdown
from src.evaluation.comparison_rows import RunResults, leaves, shown
from src.run_comparison import Measured, by_number, read_runs
from src.runs import Run, descriptive
from src.sweep_picture import Tile, arrange, newest_grid, paint

__all__ = ["JobEnd", "SweepReport", "write_report"]

log = logging.getLogger(__name__)

_COMPLETE = ("done", "pruned")
_STATUSES = (*_COMPLETE, "failed", "damaged", "interrupted", "running", "waiting")  # in the order they are said
_JOB_FILES = ("status.json", "job.json", "config.yaml")  # a directory with any of them is a job
_LEAST_WIDTH, _MOST_ROWS = 120, 20  # of the table in a log


@dataclass(frozen=True)
class JobEnd:
    """What became of a job.

    Args:
        run: its directory.
        status: "done", "pruned", "failed", "interrupted", "running", "waiting", or "damaged" if that cannot be read.
        reason: in one line; may be empty.
        overrides: what the command line gave it, by key.
        config: resolved, plain types; empty if it cannot be read.
        values: final metrics, and held-out means of the training.
        commit: of the code, with `+changes-HASH` if it was changed; empty if nobody knows.
        seconds: that it has run for, in all its lives.
    """

    run: Run
    status: str
    reason: str
    overrides: dict[str, str]
    config: dict[str, Any]
    values: dict[str, float]
    commit: str
    seconds: float

    @property
    def name(self) -> str:
        return self.run.path.name

    @property
    def seed(self) -> str:
        return self.setting("seed")

    @property
    def logs(self) -> list[Path]:
        """Files that say what happened, as paths to be typed."""
        files = (self.run.path / "log.txt", self.run.path / "output.txt")
        return [self.run.shown / file.name for file in files if file.is_file() and file.stat().st_size]

    def setting(self, key: str) -> str:
        """What was typed for a key, else what the config says; empty if neither says it in one value."""
        if key in self.overrides:
            return self.overrides[key]
        if key in ("model", "data"):
            key = f"name.{key}"
        return self._flat.get(key, "")

    @property
    def _flat(self) -> dict[str, str]:
        return {key: shown(value) for key, value in leaves(self.config)}


@dataclass(frozen=True)
class SweepReport:
    """How a sweep stands.

    Args:
        directory: the sweep's.
        jobs: run 2 before run 10.
        comparison: of those with results; without rows if there are none.
    """

    directory: Path
    jobs: tuple[JobEnd, ...]
    comparison: Comparison

    @property
    def is_complete(self) -> bool:
        """Whether no job failed and none is left to do."""
        return all(job.status in _COMPLETE for job in self.jobs)

    @property
    def counts(self) -> dict[str, int]:
        """How many jobs have each status that occurs."""
        held = Counter(job.status for job in self.jobs)
        return {status: held[status] for status in _STATUSES if held[status]}


def write_report(directory: Path, metrics: list[str] | None = None) -> SweepReport:
    """Write down and say how a sweep stands; raises `UserError` if the directory holds no job or cannot be written to.

    Args:
        directory: of the sweep; its jobs lie directly below it.
        metrics: those that come first in tables, as the objective of a search; None for the order of their measurement.
    """
    runs = _runs(directory)
    measured = read_runs(runs)
    configs = {run.path: run.config for run in measured.runs}
    jobs = tuple(_job(run, configs.get(str(run.shown))) for run in runs)
    swept = _swept(jobs)
    comparison = _compare(measured, metrics or [], _row_labels(measured.runs, jobs, swept))
    report = SweepReport(directory, jobs, comparison)
    _replace(directory / "jobs.csv", _jobs_csv(jobs, swept).encode())
    _replace(directory / "compare.md", _in_markdown(report).encode())
    _replace(directory / "compare.csv", to_csv(comparison).encode())
    _replace(directory / "samples.png", _picture(report, swept))
    _say(report, metrics or [])
    return report


# reading


def _runs(directory: Path) -> list[Run]:
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give the directory of a sweep, as in outputs/sweeps/NAME")
    found = [
        folder
        for folder in directory.iterdir()
        if folder.is_dir() and any((folder / name).is_file() for name in _JOB_FILES)
    ]
    if not found:
        raise UserError(f"{directory} holds no job of a sweep")
    return [Run(folder) for folder in sorted(found, key=by_number)]


def _job(run: Run, config: dict[str, Any] | None) -> JobEnd:
    status, reason = _status(run)
    return JobEnd(
        run=run,
        status=status,
        reason=" ".join(reason.split()),
        overrides=_overrides(_json(run.path / "job.json").get("overrides")),
        config=_config(run) if config is None else config,
        values=_values(run),
        commit=_commit(_json(run.path / "environment.json")),
        seconds=_seconds(_json(run.path / "status.json")),
    )


def _seconds(status: dict[str, Any]) -> float:
    seconds = status.get("seconds", 0.0)
    return float(seconds) if isinstance(seconds, (int, float)) else 0.0


def _status(run: Run) -> tuple[str, str]:
    """The status, and why it is so."""
    try:
        about = run.status()
    except UserError as error:
        return "damaged", str(error)
    status, reason = str(about["status"]), str(about.get("reason", ""))
    if status not in _STATUSES:
        return "damaged", f"status.json says {status}"
    if status != "running":
        return status, reason
    if not is_claimed(run.path):
        return "interrupted", f"its process {about.get('pid')} has ended without a word"
    return status, f"process {about.get('pid')} on {about.get('host')}"


def _config(run: Run) -> dict[str, Any]:
    """The config; empty if it is damaged, which the comparison says of a run that has results."""
    try:
        plain = OmegaConf.to_container(run.config())
    except UserError:
        return {}
    return cast("dict[str, Any]", plain) if isinstance(plain, dict) else {}


def _json(file: Path) -> dict[str, Any]:
    """What a file of a job says; nothing if it is missing or damaged, as after a crash."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _overrides(lines: Any) -> dict[str, str]:
    """`{"optim.lr": "0.1"}` of `["optim.lr=0.1"]`, without those that steer the command."""
    found = {}
    for line in descriptive(map(str, lines if isinstance(lines, list) else [])):
        key, equals, value = line.partition("=")
        key = key.lstrip("+~").partition("@")[0]
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        found[key] = (value[1:-1] if quoted else value) if equals else "none"
    return found


def _values(run: Run) -> dict[str, float]:
    """Final metrics, and held-out means of the training, which a search may have as its objective."""
    metrics = _json(run.path / "results.json").get("metrics")
    entries = metrics.items() if isinstance(metrics, dict) else ()
    values = {name: entry.get("value") for name, entry in entries if isinstance(entry, dict)}
    values |= _json(run.path / "validation.json")
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def _commit(environment: dict[str, Any]) -> str:
    commit, diff = environment.get("git_commit") or "", environment.get("git_diff") or ""
    changes = f"+changes-{hashlib.sha256(str(diff).encode()).hexdigest()[:8]}" if diff else ""
    return f"{commit}{changes}"


# what the jobs differ in


def _swept(jobs: Sequence[JobEnd]) -> list[str]:
    """The overrides that differ between jobs, in the order in which they were typed."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    return [key for key in keys if len({job.setting(key) for job in jobs}) > 1]


def _label(job: JobEnd, swept: Sequence[str]) -> str:
    """What a job shares with its other seeds: `model=vae optim.lr=0.1`, or model and data where nothing else differs."""
    told = [f"{key}={job.setting(key) or '-'}" for key in swept if key != "seed"]
    if told:
        return " ".join(told)
    return " on ".join(name for key in ("model", "data") if (name := job.setting(key))) or job.name


def _row_labels(runs: Sequence[RunResults], jobs: Sequence[JobEnd], swept: Sequence[str]) -> dict[str, str]:
    """Labels of the comparison's rows by group; where configs differ in more than was swept, with the name of a job."""
    by_path = {str(job.run.shown): job for job in jobs}
    groups: dict[str, list[JobEnd]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(by_path[run.path])
    labels = {group: _label(alike[0], _shared(alike, swept)) for group, alike in groups.items()}
    held = Counter(labels.values())
    return {group: label if held[label] == 1 else f"{label} ({groups[group][0].name})" for group, label in labels.items()}


def _shared(jobs: Sequence[JobEnd], swept: Sequence[str]) -> list[str]:
    """What was swept but is the same for these jobs: they may be on the latents of several seeds of an autoencoder."""
    return [key for key in swept if len({job.setting(key) for job in jobs}) == 1]


# writing


def _jobs_csv(jobs: Sequence[JobEnd], swept: Sequence[str]) -> str:
    """One line a job; numbers with every digit, nothing where there is none."""
    metrics = list(dict.fromkeys(name for job in jobs for name in job.values))
    settings = [*swept, *(key for key in ("model", "data", "seed") if key not in swept)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["job", "status", "reason", *settings, *metrics, "seconds", "commit", "log"])
    for job in jobs:
        values = [repr(job.values[name]) if name in job.values else "" for name in metrics]
        logs = [str(path) for path in job.logs[:1]]
        given = [job.setting(key) for key in settings]
        writer.writerow(
            [job.name, job.status, job.reason, *given, *values, f"{job.seconds:.1f}", job.commit, *(logs or [""])]
        )
    return file.getvalue()


def _compare(measured: Measured, first: Sequence[str], labels: dict[str, str]) -> Comparison:
    """The metrics that have a value, those that are wanted first."""
    names = dict.fromkeys(name for run in measured.runs for name in run.metrics if run.entry(name))
    ordered = [*(name for name in first if name in names), *(name for name in names if name not in first)]
    return compare(measured.runs, ordered, measured.left_out, measured.refusals, labels)


def _in_markdown(report: SweepReport) -> str:
    lines = [_headline(report), *_code_warning(report.jobs), *_failures(report.jobs)]
    if not report.comparison.rows:
        lines.append("No job has results.")
    return "\n\n".join([f"# {report.directory.name}", *lines, to_markdown(report.comparison)])


def _picture(report: SweepReport, swept: Sequence[str]) -> bytes:
    several_seeds = len({job.seed for job in report.jobs}) > 1
    tiles = [_tile(job, _label(job, swept), several_seeds) for job in report.jobs]
    image = paint(arrange(tiles, _headline(report)))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _tile(job: JobEnd, label: str, with_seed: bool) -> Tile:
    picture = None if job.status == "failed" else newest_grid(job.run.samples)
    words = f"{job.status}: {job.reason}" if job.reason else job.status
    about = [f"seed={job.seed or '-'}"] if with_seed else []
    if picture and job.status != "done":
        about.append(f"({job.status})")
    if picture and picture.name.startswith("reconstructions"):
        about.append("reconstructions")
    words = "done, without pictures" if words == "done" else words
    return Tile(label, " ".join(about), picture, words, is_wrong=job.status in ("failed", "damaged"))


def _replace(file: Path, content: bytes) -> None:
    """Write a file in one step, so that a reader never sees half of it, nor two writers each other's."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error


# words


def _say(report: SweepReport, metrics: Sequence[str]) -> None:
    log.info(_headline(report))
    for metric in metrics:
        if not any(metric in job.values for job in report.jobs):
            log.warning(f"{metric} has no value in any job")
        elif metric not in (column.metric for column in report.comparison.columns):
            log.info(f"{metric} is no final metric: jobs.csv has its values")
    for line in _results(report.comparison):
        log.info(line)
    for line in _code_warning(report.jobs):
        log.warning(line)
    for line in _failures(report.jobs):
        log.warning(line)
    where = Run(report.directory).shown
    log.info(f"  jobs           {where}/jobs.csv")
    log.info(f"  comparison     {where}/compare.md")
    log.info(f"  pictures       {where}/samples.png")
    log.info(f"  dashboard      make tensorboard ARGS=--logdir={where}")


def _headline(report: SweepReport) -> str:
    """`sweep NAME: 3 jobs: 2 done, 1 failed`."""
    counts = ", ".join(
        f"{number} {status}" + (" elsewhere" if status == "running" else "") for status, number in report.counts.items()
    )
    return f"sweep {report.directory.name}: {len(report.jobs)} job{'s' * (len(report.jobs) > 1)}: {counts}"


def _results(comparison: Comparison) -> Iterator[str]:
    """The table as far as it fits, the best rows, and what else there is to be known of it."""
    if not comparison.rows:
        yield "no job has results"
        return
    width = max(_LEAST_WIDTH, get_console().width)
    table, num_columns = narrow_table(comparison, width, _MOST_ROWS)
    yield as_text(table, width)
    columns = comparison.columns[:num_columns]
    for column in columns[:1]:
        yield from _best(comparison, column)
    others = [f"{_names(comparison, column)} by {column.metric}" for column in columns[1:] if column.best]
    if others:
        yield f"best by others: {'; '.join(others)}"
    more = {
        "more rows": max(0, len(comparison.rows) - _MOST_ROWS),
        "more metrics": len(comparison.columns) - num_columns,
        "alarms": len(comparison.alarms),
        "refused values": len(comparison.refusals),
    }
    if told := [f"{what}: {number}" for what, number in more.items() if number]:
        yield f"in compare.md: {', '.join(told)}"


def _best(comparison: Comparison, column: Column) -> Iterator[str]:
    """`best by fd: model=vae, 12.0 ± 2.0 (3); of 2 others: 1 worse, 1 inconclusive`."""
    if not column.best:
        return
    value = shown_value(comparison, column, column.best[0])
    words = Counter(verdict.word for verdict in comparison.verdicts if verdict.metric == column.metric)
    if words.total() > 1:
        others, told = f"of {words.total()} others", ", ".join(f"{number} {word}" for word, number in words.most_common())
    else:
        others, told = "the other", "".join(words)
    yield f"best by {column.metric}: {_names(comparison, column)}, {value}" + (f"; {others}: {told}" if told else "")


def _names(comparison: Comparison, column: Column) -> str:
    """The best row, or that several are equal."""
    first, *equal = (comparison.rows[row].label for row in column.best)
    return f"{first} and {len(equal)} as good" if equal else first


def _code_warning(jobs: Sequence[JobEnd]) -> list[str]:
    """One sentence if results of different code stand side by side."""
    held = Counter(job.commit for job in jobs if job.commit and job.values)
    if len(held) < 2:
        return []
    states = ", ".join(f"{commit[:7]}{commit[40:]} ({number})" for commit, number in held.most_common())
    return [f"results of different code are compared, by commit and number of jobs: {states}"]


def _failures(jobs: Sequence[JobEnd]) -> list[str]:
    """One line for each job that failed or cannot be read, with the files that say more."""
    return [
        f"{job.name}: {job.reason or job.status} (log: {', '.join(map(str, job.logs)) or 'none was written'})"
        for job in jobs
        if job.status in ("failed", "damaged")
    ]
