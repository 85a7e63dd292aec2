"""The results of a run, as plain JSON, as a table and in words."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from rich.table import Table

from src.core.errors import NotApplicable
from src.metrics.metric import HELD_OUT, NOISE, UNTRAINED, Curve, Finding, Measurement, Reading

__all__ = ["SCHEMA", "absences", "alarms", "findings", "results_table", "scalars", "to_json", "to_markdown", "yardsticks"]

SCHEMA = 2
_COLUMNS = (HELD_OUT, NOISE, UNTRAINED)  # reference rows with a column of their own; others stand below the table
Results = Mapping[str, Measurement | NotApplicable]


def to_json(results: Results) -> dict[str, Any]:
    """`{"schema": 2, "metrics": {NAME: entry}}`, where an entry is `{"not_applicable": why}` or what follows. A run's
    results.json has `costs` besides, see `costs_to_json`; that of an older version has none.

    {"value", "interval": [low, high] or null, "unit", "better": "lower", "higher", "zero" or null, "parts": {name: x},
     "card": {...the protocol..., "model": {...}, "software": {...}},
     "anchors": {row: {"value", "interval", "count"} or {"not_applicable": why}},
     "finding": {"words", "alarm": kind or null} or null,
     "curve": {"of", "places": [...], "rows": {"": [...], row: [...]}}, only where there is something to draw}
    """
    return {"schema": SCHEMA, "metrics": {name: _entry(result) for name, result in results.items()}}


def scalars(plain: dict[str, Any]) -> dict[str, float]:
    """The values of a results JSON that exist, by name."""
    return {name: entry["value"] for name, entry in plain["metrics"].items() if "value" in entry}


def results_table(plain: dict[str, Any]) -> Table:
    """The values of a results JSON as a table: a row a metric, a column for each reference row."""
    names, rows = _cells(plain)
    table = Table()
    for name in names:
        is_anchor = name not in ("metric", "value", "95 % interval", "unit")
        justify: Literal["left", "right"] = "left" if name in ("metric", "unit") else "right"
        table.add_column(name, justify=justify, style="dim" if is_anchor else None, no_wrap=not is_anchor)
    for row in rows:
        table.add_row(*row)
    return table


def to_markdown(plain: dict[str, Any]) -> str:
    """The same table for TensorBoard, with findings and absences below it."""
    names, rows = _cells(plain)
    lines = [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows)]
    notes = [f"- {line}" for line in [*findings(plain), *yardsticks(plain), *absences(plain)]]
    return "\n".join([*lines, "", *notes])


def findings(plain: dict[str, Any]) -> list[str]:
    """What the values mean, in words: first what is wrong, each with its kind, then one line of what is not."""
    found = [entry["finding"] for entry in plain["metrics"].values() if entry.get("finding")]
    wrong = [f"ALARM ({finding['alarm']}): {finding['words']}" for finding in found if finding["alarm"]]
    fine = [finding["words"] for finding in found if not finding["alarm"]]
    return wrong + ([f"no alarm: {'; '.join(fine)}"] if fine else [])


def yardsticks(plain: dict[str, Any]) -> list[str]:
    """One line for each metric with rows that have no column, as "nats_per_token 1.5 nats/token, beside uniform 4.174"."""
    lines = []
    for name, entry in plain["metrics"].items():
        rows = {row: some for row, some in entry.get("anchors", {}).items() if row not in _COLUMNS and "value" in some}
        if rows:
            shown = ", ".join(f"{row.replace('_', ' ')} {reading['value']:.4g}" for row, reading in rows.items())
            unit = "" if entry["unit"] == "1" else f" {entry['unit']}"
            lines.append(f"{name} {entry['value']:.4g}{unit}, beside {shown}")
    return lines


def alarms(plain: dict[str, Any]) -> set[str]:
    """The kinds of alarm that were raised."""
    found = [entry["finding"] for entry in plain["metrics"].values() if entry.get("finding")]
    return {finding["alarm"] for finding in found if finding["alarm"]}


def absences(plain: dict[str, Any]) -> list[str]:
    """One line for each reason why metrics have no value, naming them."""
    by_reason: dict[str, list[str]] = {}
    for name, entry in plain["metrics"].items():
        if "not_applicable" in entry:
            by_reason.setdefault(entry["not_applicable"], []).append(name)
    return [f"not applicable: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def _cells(plain: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of text."""
    entries = {name: entry for name, entry in plain["metrics"].items() if "value" in entry}
    counts: dict[str, set[int]] = {}
    for entry in entries.values():
        for anchor, reading in entry["anchors"].items():
            if "value" in reading:
                counts.setdefault(anchor, set()).add(reading["count"])
    order = [anchor for anchor in _COLUMNS if anchor in counts]
    headers = {anchor: f"{anchor.replace('_', ' ')} ({_range(counts[anchor])})" for anchor in order}
    names = ["metric", "value", "95 % interval", *headers.values(), "unit"]
    rows = []
    for name, entry in entries.items():
        readings = [entry["anchors"].get(anchor, {}) for anchor in headers]
        shown = [f"{reading['value']:.4g}" if "value" in reading else "" for reading in readings]
        interval = "[{:.4g}, {:.4g}]".format(*entry["interval"]) if entry["interval"] else ""
        rows.append([name, f"{entry['value']:.4g}", interval, *shown, entry["unit"]])
    return names, rows


def _range(counts: set[int]) -> str:
    return "-".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def _entry(result: Measurement | NotApplicable) -> dict[str, Any]:
    if isinstance(result, NotApplicable):
        return {"not_applicable": str(result)}
    if not math.isfinite(result.value):
        return {"not_applicable": f"the value is {result.value}"}
    return {
        "value": result.value,
        "interval": _interval(result.interval),
        "unit": result.unit,
        "better": result.better,
        "parts": result.parts,
        "card": result.card,
        "anchors": {name: _anchor(reading) for name, reading in result.anchors.items()},
        "finding": _finding(result.finding),
        **({} if result.curve is None else {"curve": _curve(result.curve)}),
    }


def _curve(curve: Curve) -> dict[str, Any]:
    return {"of": curve.of, "places": list(curve.places), "rows": {name: list(row) for name, row in curve.rows.items()}}


def _anchor(reading: Reading | NotApplicable) -> dict[str, Any]:
    if isinstance(reading, NotApplicable):
        return {"not_applicable": str(reading)}
    if not math.isfinite(reading.value):
        return {"not_applicable": f"the value is {reading.value}"}
    return {"value": reading.value, "interval": _interval(reading.interval), "count": reading.count}


def _interval(interval: tuple[float, float] | None) -> list[float] | None:
    return list(interval) if interval and all(math.isfinite(end) for end in interval) else None


def _finding(finding: Finding | None) -> dict[str, Any] | None:
    return {"words": finding.words, "alarm": finding.alarm} if finding else None
