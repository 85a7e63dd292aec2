"""Comparing run directories: which of them have results, and why the others have none."""

import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from src.core.errors import UserError
from src.evaluation.comparison import SCHEMA, Comparison, RunResults, compare
from src.evaluation.comparison_costs import require_costs
from src.evaluation.comparison_rows import by_seeds
from src.runs import Run

__all__ = ["Measured", "by_number", "compare_runs", "read_runs"]


@dataclass(frozen=True)
class Measured:
    """What was read of several runs.

    Args:
        runs: those with results.
        left_out: a sentence for each of the others.
        refusals: a sentence for each whose results are of another version of the framework.
    """

    runs: list[RunResults]
    left_out: list[str]
    refusals: list[str]


def compare_runs(paths: list[Path], metrics: list[str] | None = None) -> Comparison:
    """Compare the runs in these directories, each one a run or a folder with runs somewhere below it.

    Args:
        paths: the directories.
        metrics: what to compare; None for all that was measured.
    """
    found = {folder.resolve(): Run(folder) for path in paths for folder in _run_folders(path)}
    measured = read_runs(found.values())
    if not measured.runs:
        raise UserError(f"no run can be compared: {'; '.join([*measured.refusals, *measured.left_out])}")
    return compare(measured.runs, metrics, measured.left_out, measured.refusals)


def read_runs(runs: Iterable[Run]) -> Measured:
    """Read the results of runs, in their order."""
    measured = Measured([], [], [])
    for run in runs:
        try:
            status, results = run.status(), run.results()
            if results is None:
                measured.left_out.append(f"{run.shown}: {_why_unmeasured(run, status)}")
            elif results.get("schema") != SCHEMA:
                measured.refusals.append(f"results.json of {run.shown} {_why_unreadable(results.get('schema'))}")
            else:
                measured.runs.append(_read(run, status, results))
        except UserError as error:
            measured.left_out.append(f"{run.shown}: {error}")
    return replace(measured, runs=by_seeds(measured.runs))


def by_number(path: Path) -> str:
    """A key that sorts run 2 before run 10."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), str(path))


def _run_folders(path: Path) -> Iterator[Path]:
    """The directory itself if it holds a run, else all below it that do, run 2 before run 10."""
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give runs or a folder of runs, as in outputs/digits")
    below = []
    for folder, inner, files in os.walk(path):
        if "status.json" in files:
            inner.clear()
            below.append(Path(folder))
    if not below:
        raise UserError(f"{path} holds no run (no status.json lies there or below)")
    yield from sorted(below, key=by_number)


def _why_unmeasured(run: Run, status: dict[str, Any]) -> str:
    match status["status"]:
        case "waiting":
            return "it waits to be started"
        case "pruned":
            return f"it was {_in_words(status)}"
    remedy = f"; python -m src.evaluate run={run.shown} measures it" if status["status"] in ("done", "interrupted") else ""
    return f"it has no results, its status is {_in_words(status)}{remedy}"


def _why_unreadable(schema: Any) -> str:
    is_newer = isinstance(schema, int) and schema > SCHEMA
    remedy = "a newer version of the framework" if is_newer else "an older version of the framework"
    remedy += ", which can compare it" if is_newer else " and must be trained again to be compared"
    return f"has schema {schema}, not {SCHEMA}: the run is from {remedy}"


def _in_words(status: dict[str, Any]) -> str:
    return f"{status['status']} ({status['reason']})" if "reason" in status else status["status"]


def _read(run: Run, status: dict[str, Any], results: dict[str, Any]) -> RunResults:
    config = cast("dict[str, Any]", OmegaConf.to_container(run.config()))
    try:
        for entry in results["metrics"].values():
            if "not_applicable" not in entry:
                if not math.isfinite(entry["value"]):
                    raise ValueError("a value is not finite")
                _ = entry["interval"], entry["unit"], entry["better"], dict(entry["card"])
        name, seed = config["name"], int(config["seed"])
        costs = dict(results.get("costs", {}))  # results of an older version have none
        require_costs(costs)
        return RunResults(
            path=str(run.shown),
            model=name["model"],
            data=name["data"],
            seed=seed,
            config=config,
            metrics=results["metrics"],
            time=status.get("time", ""),
            status=_in_words(status),
            costs=costs,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"its results.json or config.yaml is damaged ({type(error).__name__}: {error})") from error
