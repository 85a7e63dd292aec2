"""One table over runs: `python -m src.compare RUN RUN ... [--metric fd,cs]`; of a folder, over all runs below it."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from rich import get_console
from rich.console import Console

from src.core.errors import UserError
from src.evaluation.comparison import Comparison
from src.evaluation.comparison_formats import print_text, sentences, to_csv, to_markdown
from src.run_comparison import compare_runs

_WIDE = 10_000  # columns of what is no terminal: nothing is wrapped


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
