"""A comparison as text, as a Markdown table, and as CSV with every digit."""

import csv
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from rich.console import Console
from rich.table import Table
from rich.text import Text

from src.evaluation.comparison import ANCHORS, Anchor, Cell, Column, Comparison, Verdict
from src.evaluation.comparison_costs import Cost
from src.evaluation.comparison_rows import canonical

__all__ = ["as_text", "narrow_table", "print_text", "sentences", "shown_value", "to_csv", "to_markdown", "verdict_sentence"]

_Styled = tuple[str, str]  # a text and its style: "bold", "dim" or none
_WIDE = 10_000  # characters: nothing is wrapped
_MOST_COLUMNS = 6  # metrics; more of them are shown as rows

_CSV_FIELDS = (
    *("row", "model", "data", "seeds", "metric", "unit", "value", "sd", "low", "high", "best", "verdict"),
    *("difference", "difference_low", "difference_high", "p", "p_holm", "floor", "ceiling", "protocol"),
)


def print_text(comparison: Comparison, console: Console) -> None:
    """Print the table, best values bold, and below it every sentence in a line of its own."""
    console.print(_table(_grid(comparison)))
    for title, lines in sentences(comparison).items():
        console.print(f"\n{title}:", style="bold", markup=False, highlight=False)
        for line in lines:
            console.print(line, soft_wrap=True, markup=False, highlight=False)


def narrow_table(comparison: Comparison, width: int, most_rows: int) -> tuple[Table, int]:
    """A table with a row a run that has as many of the first metrics as fit, at least one; and how many these are.

    It leaves the costs out.

    Args:
        comparison: what to show.
        width: in characters.
        most_rows: of more rows those that are best by the first column are shown.
    """
    console = Console(width=_WIDE)
    part = replace(_best_rows(comparison, most_rows), costs=())
    weights = {row.weights for row in part.rows}
    for num_columns in range(min(len(part.columns), _MOST_COLUMNS), 0, -1):
        grid = _grid(replace(part, columns=part.columns[:num_columns]))
        table = _table([[*row[:2], *row[2 if len(weights) > 1 else 3 :]] for row in grid])
        if num_columns == 1 or console.measure(table).maximum <= width:
            return table, num_columns
    return _table(_grid(part)), 0


def _best_rows(comparison: Comparison, most: int) -> Comparison:
    """The rows that are best by the first column, in their order; those without a value there come last."""
    if len(comparison.rows) <= most or not comparison.columns:
        return comparison
    first = comparison.columns[0]
    losses = [fmean(cell.losses(first.better).values()) if cell.values else math.inf for cell in first.cells]
    kept = sorted(sorted(range(len(losses)), key=losses.__getitem__)[:most])
    columns = [
        replace(
            column,
            cells=tuple(column.cells[i] for i in kept),
            best=tuple(kept.index(i) for i in column.best if i in kept),
        )
        for column in comparison.columns
    ]
    return replace(comparison, rows=tuple(comparison.rows[i] for i in kept), columns=tuple(columns))


def as_text(table: Table, width: int) -> str:
    """The table without any style, for a log."""
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def shown_value(comparison: Comparison, column: Column, row: int) -> str:
    """A cell as the table shows it: `11.6 [11.2, 12.0]` or `12.0 ± 2.0 (3)`."""
    return _cell(column.cells[row], len(comparison.rows[row].runs))


def to_markdown(comparison: Comparison) -> str:
    """A GitHub table, best values bold, and below it a list for each kind of sentence."""
    rows = [[f"**{text}**" if style == "bold" else text for text, style in row] for row in _grid(comparison)]
    lines = [_markdown_row(cells) for cells in [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]]
    for title, items in sentences(comparison).items():
        lines += ["", f"{title}:", "", *(f"- {item}" for item in items)]
    return "\n".join(lines) + "\n"


def to_csv(comparison: Comparison) -> str:
    """One line for each row and metric; numbers with every digit, nothing where there is none.

    `seeds` counts the runs behind a value, `low` and `high` are its 95 % interval, `difference` is this row minus the best,
    `protocol` is the start of the protocol's SHA-256. What a row costs comes as further lines with the verdict "cost".
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV_FIELDS)
    verdicts = {(verdict.metric, verdict.row): verdict for verdict in comparison.verdicts}
    for i in range(len(comparison.rows)):
        for column in comparison.columns:
            writer.writerow(_csv_line(comparison, i, column, verdicts.get((column.metric, i))))
        for cost in comparison.costs:
            writer.writerow(_csv_cost(comparison, i, cost))
    return file.getvalue()


def sentences(comparison: Comparison) -> dict[str, list[str]]:
    """What does not fit into the table, by title; a title without sentences is left out."""
    kinds = {
        "Verdicts": [verdict_sentence(comparison, verdict) for verdict in comparison.verdicts],
        "Alarms": comparison.alarms,
        "Refused": comparison.refusals,
        "No value": comparison.absences,
        "Costs": comparison.about_costs,
        "Not done": comparison.unfinished,
        "Left out": comparison.left_out,
    }
    return {title: [" ".join(line.split()) for line in lines] for title, lines in kinds.items() if lines}


def verdict_sentence(comparison: Comparison, verdict: Verdict) -> str:
    """`fd: gan on mnist is worse than vae on mnist by 3.1 [2.0, 4.2], paired over 3 seeds, p = 0.012 (Holm 0.024)`."""
    other, best = comparison.rows[verdict.row].label, comparison.rows[verdict.best].label
    column = next(column for column in comparison.columns if column.metric == verdict.metric)
    if verdict.difference is None:
        return f"{verdict.metric}: {other} against {best}: no interval: {verdict.reason}"
    if verdict.word == "inconclusive":
        claim, sign = f"inconclusive: {other} minus {best} is", 1
    elif verdict.word == "better":
        claim, sign = f"{other} is better than {best} over the common seeds by", 1 if column.better == "higher" else -1
    else:
        claim, sign = f"{other} is worse than {best} by", -1 if column.better == "higher" else 1
    ends = sorted((sign * verdict.difference.low, sign * verdict.difference.high))
    size = _with_interval(sign * verdict.difference.value, (ends[0], ends[1]))
    absolute = " in absolute value" if column.better == "zero" else ""
    rows = [comparison.rows[i] for i in (verdict.row, verdict.best)] if verdict.num_seeds else []
    fixed = " and of ".join(row.label for row in rows if row.has_one_autoencoder)
    limit = (
        f"; the training of the autoencoder of {fixed} is not in the spread, it is the same for all seeds" if fixed else ""
    )
    return f"{verdict.metric}: {claim} {size}{absolute}, {_evidence(verdict)}{limit}"


def _evidence(verdict: Verdict) -> str:
    assert verdict.difference is not None
    assert verdict.p_holm is not None
    p = f"p {_p(verdict.difference.p)} (Holm {_p(verdict.p_holm).removeprefix('= ')})"
    if not verdict.num_seeds:
        return f"{p}; this covers the sampling of these checkpoints, not retraining"
    if verdict.p_flip is not None:
        p += f", sign-flip p {_p(verdict.p_flip)}"
    elif verdict.num_seeds > 16:
        p += f", sign-flip p not computed over {verdict.num_seeds} seeds"
    return f"paired over {verdict.num_seeds} seeds, {p}"


def _p(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"= {p:.2g}"


def _grid(comparison: Comparison) -> list[list[_Styled]]:
    """Headings and rows of texts with their styles: a row a run, or a row a metric if there are many of them."""
    grid = [[(heading, "") for heading in _headings(comparison)]]
    for i, cells in enumerate(_rows(comparison)):
        best = [False] * 3 + [i in column.best for column in comparison.columns] + [False] * len(comparison.costs)
        grid.append([(cell, "bold" if is_best else "") for cell, is_best in zip(cells, best, strict=True)])
    grid += [[(cell, "dim") for cell in cells] for cells in _anchor_rows(comparison)]
    if len(comparison.columns) <= _MOST_COLUMNS:
        return grid
    return [list(column) for column in zip(*grid, strict=True)]


def _table(grid: list[list[_Styled]]) -> Table:
    headings, *rows = grid
    table = Table()
    for i, heading in enumerate(headings):
        table.add_column(_styled(heading), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_styled, row))
    return table


def _styled(cell: _Styled) -> Text:
    return Text(cell[0], style=cell[1])


def _headings(comparison: Comparison) -> list[str]:
    metrics = (_heading(column) for column in comparison.columns)
    costs = (f"{cost.name} [{cost.unit}]" if cost.unit else cost.name for cost in comparison.costs)
    return ["run", "seeds", "weights", *metrics, *costs]


def _heading(column: Column) -> str:
    """The metric, its unit if it has one, and which way is better."""
    unit = f" [{column.unit}]" if column.unit not in ("", "1") else ""
    return column.metric + unit + {"lower": " ↓", "higher": " ↑", "zero": " →0"}.get(column.better or "", "")


def _rows(comparison: Comparison) -> list[list[str]]:
    return [
        [row.label, str(len(row.runs)), row.weights]
        + [_cell(column.cells[i], len(row.runs)) for column in comparison.columns]
        + [_cost(cost, i) for cost in comparison.costs]
        for i, row in enumerate(comparison.rows)
    ]


def _cell(cell: Cell, num_runs: int) -> str:
    if cell.mean is None:
        return "refused" if cell.is_refused else "-"
    if cell.sd is not None:
        decimals = _decimals(cell.mean, cell.sd)
        return f"{_number(cell.mean, decimals)} ± {_number(cell.sd, decimals)} ({len(cell.values)})"
    return _with_interval(cell.mean, cell.interval) + (" (1)" if num_runs > 1 else "")


def _cost(cost: Cost, row: int) -> str:
    mean, sd = cost.mean(row), cost.sd(row)
    if mean is None:
        return "-"
    if not sd:  # one seed, or the same for all, as parameters are
        return _number(mean, _decimals(mean, 0))
    decimals = _decimals(mean, sd)
    return f"{_number(mean, decimals)} ± {_number(sd, decimals)} ({len(cost.values[row])})"


def _anchor_rows(comparison: Comparison) -> list[list[str]]:
    measured = dict.fromkeys(name for column in comparison.columns for name in column.anchors)
    return [
        [ANCHORS.get(name, name), "", "", *(_anchor(column, column.anchors.get(name)) for column in comparison.columns)]
        + [""] * len(comparison.costs)
        for name in dict.fromkeys([*ANCHORS, *measured])
        if name in measured
    ]


def _anchor(column: Column, anchor: Anchor | str | None) -> str:
    if not isinstance(anchor, Anchor):
        return "-"
    num_samples = column.protocol.get("num_samples", anchor.count)
    count = f" (of {anchor.count})" if anchor.count not in (None, num_samples) else ""
    return _with_interval(anchor.value, anchor.interval) + count


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    decimals = _decimals(value, (interval[1] - interval[0]) / 2 if interval else 0)
    ends = f" [{_number(interval[0], decimals)}, {_number(interval[1], decimals)}]" if interval else ""
    return f"{_number(value, decimals)}{ends}"


def _number(value: float, decimals: int) -> str:
    """`49,995,000` or `-0.50`; what is rounded to zero has no sign."""
    return f"{value:z,.{decimals}f}"


def _decimals(value: float, spread: float) -> int:
    """How many decimals show two digits of the spread; without one, four digits of the value, or none of an integer."""
    if spread <= 0 and float(value).is_integer():
        return 0
    size, digits = (spread, 2) if spread > 0 else (abs(value), 4)
    return max(0, digits - 1 - math.floor(math.log10(size)))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _csv_line(comparison: Comparison, i: int, column: Column, verdict: Verdict | None) -> list[str]:
    row, cell = comparison.rows[i], column.cells[i]
    difference = verdict.difference if verdict else None
    low, high = cell.interval or (None, None)
    ends = (difference.value, difference.low, difference.high, difference.p) if difference else (None,) * 4
    floor, ceiling = (column.anchors.get(name) for name in ANCHORS)
    return [
        *(row.label, row.model, row.data, str(len(cell.values)), column.metric, column.unit),
        *map(_exact, (cell.mean, cell.sd, low, high)),
        *("true" if i in column.best else "false", _word(cell, verdict, column.best[:1] == (i,))),
        *map(_exact, (*ends, verdict.p_holm if verdict else None)),
        *(_exact(anchor.value if isinstance(anchor, Anchor) else None) for anchor in (floor, ceiling)),
        "" if cell.protocol is None else hashlib.sha256(canonical(cell.protocol).encode()).hexdigest()[:12],
    ]


def _csv_cost(comparison: Comparison, i: int, cost: Cost) -> list[str]:
    row = comparison.rows[i]
    line = {
        "row": row.label,
        "model": row.model,
        "data": row.data,
        "seeds": str(len(cost.values[i])),
        "metric": cost.name,
        "unit": cost.unit,
        "value": _exact(cost.mean(i)),
        "sd": _exact(cost.sd(i)),
        "best": "false",
        "verdict": "cost",
    }
    return [line.get(field, "") for field in _CSV_FIELDS]


def _word(cell: Cell, verdict: Verdict | None, is_best: bool) -> str:
    if not cell.values:
        return "refused" if cell.is_refused else "no value"
    return verdict.word if verdict else "best" if is_best else ""


def _exact(number: float | None) -> str:
    return "" if number is None else repr(number + 0.0)  # -0.0 + 0.0 is 0.0
