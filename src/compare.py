"""One table over runs: `python -m src.compare RUN RUN ... [--metric fd,cs]`; of a folder, over all runs below it."""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

from omegaconf import OmegaConf
from rich import get_console
from rich.console import Console

from src.core.errors import UserError
from src.evaluation.comparison import SCHEMA, Comparison, RunResults, compare
from src.evaluation.comparison_formats import print_text, sentences, to_csv, to_markdown
from src.runs import Run

__all__ = ["compare_runs"]

_WIDE = 10_000  # columns of what is no terminal: nothing is wrapped


def compare_runs(paths: list[Path], metrics: list[str] | None = None) -> Comparison:
    """Compare the runs in these directories, each one a run or a folder with runs somewhere below it.

    Args:
        paths: the directories.
        metrics: what to compare; None for all that was measured.
    """
    found = {folder.resolve(): Run(folder) for path in paths for folder in _run_folders(path)}
    runs, left_out, refusals = [], [], []
    for run in found.values():
        try:
            status, results = run.status(), run.results()
            if results is None:
                left_out.append(f"{run.shown}: {_why_unmeasured(run, status)}")
            elif results.get("schema") != SCHEMA:
                refusals.append(f"results.json of {run.shown} {_why_unreadable(results.get('schema'))}")
            else:
                runs.append(_read(run, status, results))
        except UserError as error:
            left_out.append(f"{run.shown}: {error}")
    if not runs:
        raise UserError(f"no run can be compared: {'; '.join([*refusals, *left_out])}")
    return compare(runs, metrics, left_out, refusals)


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
    yield from sorted(below, key=lambda run: re.sub(r"\d+", lambda number: number[0].zfill(20), str(run)))


def _why_unmeasured(run: Run, status: dict[str, Any]) -> str:
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
        return RunResults(
            path=str(run.shown),
            model=name["model"],
            data=name["data"],
            seed=seed,
            config=config,
            metrics=results["metrics"],
            time=status.get("time", ""),
            status=_in_words(status),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"its results.json or config.yaml is damaged ({type(error).__name__}: {error})") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python -m src.compare --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m src.compare", description="Print one table over runs.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run, or a folder with runs below it")
    parser.add_argument("--metric", help="what to compare, as in fd,cs; else all that was measured")
    parser.add_argument("--format", choices=("text", "csv", "markdown"), default="text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table to this file, too")
    return parser


def _write(comparison: Comparison, form: str, out: Path | None) -> None:
    """To the screen, and to the file if there is one. CSV has no place for sentences: they go to stderr."""
    text = {"csv": to_csv, "markdown": to_markdown}.get(form, _as_text)(comparison)
    if out is not None:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out={out} cannot be written: {error.strerror}") from error
    if form == "text" and get_console().is_terminal:
        print_text(comparison, get_console())
    else:
        print(text, end="")
    if form == "csv":
        for lines in sentences(comparison).values():
            print(*lines, sep="\n", file=sys.stderr)


def _as_text(comparison: Comparison) -> str:
    console = Console(width=_WIDE, no_color=True, force_terminal=False)
    with console.capture() as capture:
        print_text(comparison, console)
    return capture.get()


def main() -> None:
    try:
        given = _parser().parse_args()
        metrics = [metric.strip() for metric in given.metric.split(",")] if given.metric is not None else None
        comparison = compare_runs(given.runs, metrics)
        _write(comparison, given.format, given.out)
    except UserError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    if comparison.refusals:
        sys.exit(1)


if __name__ == "__main__":
    main()
