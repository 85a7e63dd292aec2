"""The results of a run, as plain JSON and as a table."""

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from src.core.errors import NotApplicable
from src.metrics.metric import Measurement

__all__ = ["absences", "results_table", "scalars", "to_json"]

SCHEMA = 1
Results = Mapping[str, Measurement | NotApplicable]


def to_json(results: Results) -> dict[str, Any]:
    """`{"schema": 1, "metrics": {NAME: {"value", "interval", "unit", "card", "anchors"} or {"not_applicable": why}}}`."""
    return {"schema": SCHEMA, "metrics": {name: _entry(result) for name, result in results.items()}}


def scalars(plain: dict[str, Any]) -> dict[str, float]:
    """The values of a results JSON that exist, by name."""
    return {name: entry["value"] for name, entry in plain["metrics"].items() if "value" in entry}


def results_table(plain: dict[str, Any]) -> Table:
    """The values of a results JSON as a table: a row a metric, a column for each reference row."""
    entries = {name: entry for name, entry in plain["metrics"].items() if "value" in entry}
    anchors = sorted({name for entry in entries.values() for name in entry["anchors"]})
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for anchor in anchors:
        counts = {entry["card"]["anchors"][anchor] for entry in entries.values() if anchor in entry["anchors"]}
        table.add_column(f"{anchor.replace('_', ' ')} ({_range(counts)})", justify="right", style="dim")
    table.add_column("unit")
    for name, entry in entries.items():
        row = [f"{entry['anchors'][anchor]:.4g}" if anchor in entry["anchors"] else "" for anchor in anchors]
        table.add_row(name, f"{entry['value']:.4g}", *row, entry["unit"])
    return table


def _range(counts: set[int]) -> str:
    return "-".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def absences(plain: dict[str, Any]) -> list[str]:
    """One line for each reason why metrics have no value, naming them."""
    by_reason: dict[str, list[str]] = {}
    for name, entry in plain["metrics"].items():
        if "not_applicable" in entry:
            by_reason.setdefault(entry["not_applicable"], []).append(name)
    return [f"not applicable: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def _entry(result: Measurement | NotApplicable) -> dict[str, Any]:
    if isinstance(result, NotApplicable):
        return {"not_applicable": str(result)}
    if not math.isfinite(result.value):
        return {"not_applicable": f"the value is {result.value}"}
    return {
        "value": result.value,
        "interval": list(result.interval) if result.interval else None,
        "unit": result.unit,
        "card": result.card,
        "anchors": result.anchors,
    }
