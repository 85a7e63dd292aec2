"""What the rows of a comparison cost. Seconds depend on the machine and on what else it did: they are told, not tested."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from src.evaluation.comparison_rows import Row, RunResults, shown

__all__ = ["Cost", "cost_columns", "cost_sentences", "require_costs"]

Costs = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """One quantity of all rows.

    Args:
        name: as in a heading.
        unit: of its values.
        values: by row, of each of its seeds for which it is known.
    """

    name: str
    unit: str
    values: tuple[tuple[float, ...], ...]

    def mean(self, row: int) -> float | None:
        return fmean(self.values[row]) if self.values[row] else None

    def sd(self, row: int) -> float | None:
        """Standard deviation over the seeds, with n - 1."""
        return stdev(self.values[row]) if len(self.values[row]) > 1 else None


def cost_columns(rows: Sequence[Row]) -> tuple[Cost, ...]:
    """Each quantity that is known of any row."""
    columns = []
    for (name, unit), read in _QUANTITIES.items():
        values = tuple(tuple(value for run in row.runs if (value := read(run.costs)) is not None) for row in rows)
        columns += [Cost(name, unit, values)] if any(values) else []
    return tuple(columns)


def cost_sentences(rows: Sequence[Row]) -> Iterator[str]:
    """On which device seconds were measured, and with which settings samples were drawn, each with its rows."""
    yield from _by_row("training on", rows, lambda run: run.costs.get("training_device") or "")
    yield from _by_row("training of the autoencoder on", rows, lambda run: _before(run.costs).get("training_device") or "")
    yield from map(_with_autoencoder, [row for row in rows if any("autoencoder" in run.config for run in row.runs)])
    yield from _by_row("sampling on", rows, lambda run: _sampling(run.costs).get("device", ""))
    yield from _by_row("sampling with", rows, lambda run: _in_words(_sampling(run.costs).get("settings", {})))


def require_costs(costs: Costs) -> None:
    """Raise `KeyError`, `TypeError` or `ValueError` for costs that are damaged."""
    sampling = _sampling(costs)
    if sampling and not sampling["samples"] > 0:
        raise ValueError("no samples were drawn")
    for read in _QUANTITIES.values():
        value = read(costs)
        if value is not None and not math.isfinite(value):
            raise ValueError("a cost is not finite")
    if not isinstance(sampling.get("settings", {}), dict):
        raise TypeError("settings of the sampling are no object")


def _by_row(what: str, rows: Sequence[Row], of: Callable[[RunResults], str]) -> Iterator[str]:
    """`sampling with steps=50: flow_matching on mnist, diffusion on mnist`; the rows are left out if all are alike."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        for words in dict.fromkeys(of(run) for run in row.runs):
            labels.setdefault(words, []).append(row.label)
    is_of_all = len(labels) == 1
    for words, those in labels.items():
        if words:
            yield f"{what} {words}" + ("" if is_of_all else f": {', '.join(those)}")


def _in_words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={shown(value)}" for key, value in settings.items())


def _with_autoencoder(row: Row) -> str:
    """`training of latent on mnist: 20 s, after 300 s of its autoencoder: 320 s in all`; of several seeds the means."""
    known = [(own, before) for run in row.runs if (own := _own(run.costs)) is not None and (before := _first(run.costs))]
    if len(known) < len(row.runs):
        return f"training of {row.label}: without that of its autoencoder, which is not known"
    own, before = (fmean(pair[i] for pair in known) for i in range(2))
    return f"training of {row.label}: {own:,.4g} s, after {before:,.4g} s of its autoencoder: {own + before:,.4g} s in all"


def _before(costs: Costs) -> dict[str, Any]:
    return costs.get("autoencoder") or {}


def _own(costs: Costs) -> float | None:
    return costs.get("training_seconds")


def _first(costs: Costs) -> float | None:
    """Seconds of the autoencoder's training."""
    return _before(costs).get("training_seconds")


def _in_all(costs: Costs) -> float | None:
    own = _own(costs)
    return None if own is None else own + (_first(costs) or 0.0)


def _sampling(costs: Costs) -> dict[str, Any]:
    return costs.get("sampling") or {}


def _seconds_per_thousand(costs: Costs) -> float | None:
    sampling = _sampling(costs)
    return 1000 * sampling["seconds"] / sampling["samples"] if sampling else None


_QUANTITIES: dict[tuple[str, str], Callable[[Costs], float | None]] = {
    ("parameters", ""): lambda costs: costs.get("parameters"),
    ("training", "s"): _in_all,
    ("of it the autoencoder's", "s"): _first,
    ("sampling", "s per 1,000"): _seconds_per_thousand,
    ("evaluations", "per sample"): lambda costs: _sampling(costs).get("evaluations_per_sample"),
}
