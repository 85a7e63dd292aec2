"""One comparison over runs: which values may stand side by side, and which differences are more than chance.

A row is all seeds of one config, its values all of the same kind of weights at the same checkpoint. A column holds values
of one protocol. Any other value is refused. The best row x of a column is compared with every other row y:

    common seeds    mean(d) ± t_{n-1, 0.975} sd(d) / sqrt(n)    with d_s = y_s - x_s
    single runs     y - x ± 1.96 sqrt(se_y^2 + se_x^2)          with se = half of the 95 % interval / 1.96

A metric that is best near zero is compared by its absolute values.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from src.core.errors import UserError
from src.evaluation.comparison_costs import Cost, cost_columns, cost_sentences
from src.evaluation.comparison_rows import (
    Row,
    RunResults,
    by_seeds,
    canonical,
    leaves,
    make_rows,
    one_per_seed,
    origin,
    shared_origin,
    shown,
)
from src.evaluation.significance import Difference, holm, independent_difference, paired_difference, sign_flip_p

__all__ = ["ANCHORS", "SCHEMA", "Anchor", "Cell", "Column", "Comparison", "Row", "RunResults", "Verdict", "compare"]

SCHEMA = 2  # of the results.json that is understood here
ANCHORS = {"held_out": "held-out real (floor)", "noise": "noise (ceiling)"}  # others are called by their names
_OF_ONE_RUN = ("untrained",)  # reference rows that differ from run to run

# of a card: of what, with what, at what cost, and what a model can see of a text; not how it was measured
_NO_PROTOCOL = ("model", "software", "evaluations_per_example", "context", "num_tokens")
_SETTINGS = ("num_samples", "seed", "checkpoint")  # fields of a card that are settings of `evaluation`
_STEERING = ("steps", "guidance")  # the same, within the settings of the model
_FLIPPED = range(5, 17)  # seeds: with fewer the smallest p is above 0.05, with more there are too many sign flips


@dataclass(frozen=True)
class Cell:
    """What a row has in a column.

    Args:
        values: by seed; empty if there is none.
        interval: 95 % interval of the value, if it is a single one that has one.
        is_refused: whether a value of another protocol or of other weights was left out.
        protocol: of its values, else of the first one refused; None without either.
    """

    values: dict[int, float]
    interval: tuple[float, float] | None
    is_refused: bool
    protocol: dict[str, Any] | None

    @property
    def mean(self) -> float | None:
        return fmean(self.values.values()) if self.values else None

    @property
    def sd(self) -> float | None:
        """Standard deviation over the seeds, with n - 1."""
        return stdev(self.values.values()) if len(self.values) > 1 else None

    def losses(self, better: str | None) -> dict[int, float]:
        """The values by seed, turned so that less is better."""
        if better == "zero":
            return {seed: abs(value) for seed, value in self.values.items()}
        return {seed: -value if better == "higher" else value for seed, value in self.values.items()}


@dataclass(frozen=True)
class Anchor:
    """The same quantity of reference images, of which there were `count`."""

    value: float
    interval: tuple[float, float] | None
    count: int | None


@dataclass(frozen=True)
class Column:
    """One metric under one protocol.

    Args:
        metric: its name.
        unit: of its values.
        better: "lower", "higher", "zero", or None where none is better.
        protocol: the card without what it says of the model, of the software, of evaluations and of tokens, and without the
            name of an extractor whose hash it gives.
        cells: one a row.
        anchors: by name; the reason where there is no value.
        best: indices of the best rows, more than one if they are equal; empty if there is nothing to choose from.
    """

    metric: str
    unit: str
    better: str | None
    protocol: dict[str, Any]
    cells: tuple[Cell, ...]
    anchors: dict[str, Anchor | str]
    best: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """A row against the best one of a column.

    Args:
        metric: the column's.
        row, best: indices of the two rows.
        word: "worse"; "inconclusive" if the interval of the difference holds zero; "better" if it is so over the common
            seeds, though not over all; "no interval".
        difference: other minus best, None without an interval.
        num_seeds: the common seeds it is over; 0 for single runs.
        p_flip: p of the sign-flip test, where it was computed.
        p_holm: p adjusted for all comparisons of the table.
        reason: why there is no interval, if there is none.
    """

    metric: str
    row: int
    best: int
    word: str
    difference: Difference | None = None
    num_seeds: int = 0
    p_flip: float | None = None
    p_holm: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """Rows by columns, and in sentences what does not fit into a table.

    Args:
        rows: the runs, grouped.
        columns: the metrics.
        verdicts: the best row of each column against every other.
        alarms: what is wrong with a run, by its own findings.
        refusals: what may not stand in the table; if there is any, the table is not the one that was asked for.
        absences: which metrics have no value, and why.
        left_out: runs that are not in the table, and why.
        unfinished: runs that are in the table though they are not done.
        costs: what the rows cost; none is compared.
        about_costs: devices and settings behind them.
    """

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    verdicts: tuple[Verdict, ...]
    alarms: tuple[str, ...]
    refusals: tuple[str, ...]
    absences: tuple[str, ...]
    left_out: tuple[str, ...]
    unfinished: tuple[str, ...]
    costs: tuple[Cost, ...] = ()
    about_costs: tuple[str, ...] = ()


def compare(
    runs: Sequence[RunResults],
    metrics: Sequence[str] | None = None,
    left_out: Iterable[str] = (),
    refusals: Iterable[str] = (),
    labels: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare runs.

    Args:
        runs: with results, in the order of the rows.
        metrics: names of the columns; None for all that have a value, in the order of the first run.
        left_out: sentences about runs without results.
        refusals: sentences about results that cannot be read.
        labels: of the rows, by the `group` of their runs; None for model and data, with the settings that tell rows apart.
    """
    kept, repeated = one_per_seed(by_seeds(runs))
    known = list(dict.fromkeys(metric for run in runs for metric in run.metrics))
    named = known if metrics is None else list(dict.fromkeys(metrics))
    if unknown := [metric for metric in named if metric not in known]:
        raise UserError(f"metric={unknown[0]} was measured in no run; allowed: {', '.join(known) or 'none so far'}")
    names = [metric for metric in named if metrics is not None or any(run.entry(metric) for run in kept)]
    terms = {metric: _common_terms(metric, kept) for metric in names}
    rows = make_rows(
        kept, lambda run: [entry for metric in names if (entry := _fitting(run, metric, terms[metric]))], labels
    )
    columns = tuple(_column(metric, kept, rows, terms[metric]) for metric in names)
    return Comparison(
        rows=rows,
        columns=columns,
        verdicts=_verdicts(columns),
        alarms=tuple(_alarms(kept)),
        refusals=(*refusals, *(line for column in columns for line in _refusals(column, rows))),
        absences=tuple(_absences(named, rows, columns)),
        left_out=(*left_out, *repeated),
        unfinished=tuple(f"{run.name} is not done, its status is {run.status}" for run in kept if run.status != "done"),
        costs=cost_columns(rows),
        about_costs=tuple(cost_sentences(rows)),
    )


def _common_terms(metric: str, runs: Sequence[RunResults]) -> str:
    """What most of the values agree on, canonical; "" if there are none."""
    held = Counter(canonical(_terms(entry)) for run in runs if (entry := run.entry(metric)))
    return max(held, key=held.__getitem__, default="")  # the first of equals


def _fitting(run: RunResults, metric: str, terms: str) -> dict[str, Any] | None:
    """The run's entry, if it has a value on these terms."""
    entry = run.entry(metric)
    return entry if entry and canonical(_terms(entry)) == terms else None


def _column(metric: str, runs: Sequence[RunResults], rows: Sequence[Row], terms: str) -> Column:
    same = [entry for run in runs if (entry := _fitting(run, metric, terms))]
    first = same[0] if same else {"unit": "", "better": None, "card": {}}
    cells = tuple(_cell(metric, row, terms) for row in rows)
    return Column(
        metric=metric,
        unit=first["unit"],
        better=first["better"],
        protocol=_protocol(first),
        cells=cells,
        anchors={name: anchor for name in _anchor_names(same) if (anchor := _anchor(same, name)) is not None},
        best=_best(cells, first["better"]),
    )


def _protocol(entry: dict[str, Any]) -> dict[str, Any]:
    card = entry["card"]
    # an extractor is its weights, not its name; the one without weights, of hash "none", has nothing but its name
    by_hash = ("extractor",) if card.get("extractor_sha256", "none") != "none" else ()
    return {field: value for field, value in card.items() if field not in (*_NO_PROTOCOL, *by_hash)}


def _terms(entry: dict[str, Any]) -> dict[str, Any]:
    """All that two values of one column have in common, by dotted name."""
    return {"unit": entry["unit"], "better": entry["better"]} | dict(leaves(_protocol(entry)))


def _cell(metric: str, row: Row, terms: str) -> Cell:
    entries = {run.seed: entry for run in row.runs if (entry := run.entry(metric))}
    fitting = {seed: entry for seed, entry in entries.items() if canonical(_terms(entry)) == terms}
    same = {seed: entry for seed, entry in fitting.items() if origin(entry) == shared_origin(row, entry)}
    intervals = [entry["interval"] for entry in same.values()]
    held = list((same or entries).values())
    return Cell(
        values={seed: entry["value"] for seed, entry in same.items()},
        interval=_pair(intervals[0]) if len(intervals) == 1 else None,
        is_refused=len(same) < len(entries),
        protocol=_protocol(held[0]) if held else None,
    )


def _anchor_names(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Those with a title first."""
    found = dict.fromkeys(name for entry in entries for name in entry.get("anchors", {}))
    return [name for name in [*ANCHORS, *(name for name in found if name not in ANCHORS)] if name not in _OF_ONE_RUN]


def _anchor(entries: Sequence[dict[str, Any]], name: str) -> Anchor | str | None:
    """The first run's that has a value, else the reason why there is none; None where it was not measured."""
    anchors = [anchor for entry in entries if (anchor := entry.get("anchors", {}).get(name))]
    for anchor in anchors:
        if "value" in anchor:
            return Anchor(anchor["value"], _pair(anchor.get("interval")), anchor.get("count"))
    return anchors[0]["not_applicable"] if anchors else None


def _pair(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval else None


def _best(cells: Sequence[Cell], better: str | None) -> tuple[int, ...]:
    losses = {i: fmean(cell.losses(better).values()) for i, cell in enumerate(cells) if cell.values}
    if better is None or len(losses) < 2:
        return ()
    return tuple(i for i, loss in losses.items() if loss == min(losses.values()))


def _verdicts(columns: Sequence[Column]) -> tuple[Verdict, ...]:
    found = [
        _verdict(column, row, column.best[0])
        for column in columns
        for row, cell in enumerate(column.cells)
        if column.best and row != column.best[0] and cell.values
    ]
    adjusted = iter(holm([verdict.difference.p for verdict in found if verdict.difference]))
    return tuple(replace(verdict, p_holm=next(adjusted)) if verdict.difference else verdict for verdict in found)


def _verdict(column: Column, row: int, best: int) -> Verdict:
    """A row against the best one, with p not yet adjusted."""
    other, least = (column.cells[i].losses(column.better) for i in (row, best))
    intervals = column.cells[row].interval, column.cells[best].interval
    differences = [other[seed] - least[seed] for seed in other if seed in least]
    num_seeds = len(differences) if len(differences) > 1 else 0
    if num_seeds:
        lost, reason = paired_difference(differences), "no spread over the seeds"
    elif intervals[0] and intervals[1]:
        lost = independent_difference(fmean(other.values()), intervals[0], fmean(least.values()), intervals[1])
        reason = "that of a single value has no width; train several seeds"
    else:
        several = all(len(column.cells[i].values) > 1 for i in (row, best))
        lost, reason = None, "train several seeds, the same of both" if several else "train several seeds"
    if lost is None:
        return Verdict(column.metric, row, best, "no interval", reason=reason)
    word = "worse" if lost.low > 0 else "better" if lost.high < 0 else "inconclusive"
    p_flip = sign_flip_p(differences) if num_seeds in _FLIPPED else None
    difference = Difference(-lost.value, -lost.high, -lost.low, lost.p) if column.better == "higher" else lost
    return Verdict(column.metric, row, best, word, difference, num_seeds, p_flip)


def _alarms(runs: Sequence[RunResults]) -> Iterator[str]:
    for run in runs:
        findings = [entry["finding"] for entry in run.metrics.values() if entry.get("finding")]
        for words in dict.fromkeys(finding["words"] for finding in findings if finding["alarm"]):
            yield f"ALARM {run.name}: {words}"


def _refusals(column: Column, rows: Sequence[Row]) -> Iterator[str]:
    terms = {"unit": column.unit, "better": column.better} | dict(leaves(column.protocol))
    for row, run in ((of, run) for of in rows for run in of.runs):
        if entry := run.entry(column.metric):
            weights, common = origin(entry), shared_origin(row, entry)
            unlike = [*_unlike(_terms(entry), terms, "column"), *_unlike(weights, common, "row")]
            if unlike:
                remedy = _remedy(run, column.metric, _terms(entry) | weights, terms | common)
                words = "; ".join([*unlike, *([remedy] if remedy else [])])
                yield f"{column.metric} of {run.name} is refused: {words}"


def _unlike(given: dict[str, Any], wanted: dict[str, Any], whose: str) -> Iterator[str]:
    for field in _differing(given, wanted):
        verb = "are" if field == "weights" or field.endswith("settings") else "is"
        yield f"its {field} {verb} {_term(given, field)}, the {whose}'s {verb} {_term(wanted, field)}"


def _differing(given: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [field for field in {**given, **wanted} if _term(given, field) != _term(wanted, field)]


def _term(terms: dict[str, Any], field: str) -> str:
    return shown(terms[field]) if field in terms else "not given"


def _remedy(run: RunResults, metric: str, given: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The command that measures what is wanted, where nothing but settings of `evaluation` stands in its way."""
    given, wanted = _with_steering(given), _with_steering(wanted)
    # a value on some of the examples says both how many they are and which
    fields = ["num_examples" if field == "examples" else field for field in _differing(given, wanted)]
    if any(field.startswith("data") for field in fields):  # data, data_values
        return "values on other data cannot be compared"
    keys = _keys(metric, wanted)
    if not all(field in keys and field in given and field in wanted for field in fields):
        return None
    # where nothing is said, evaluate takes what the run's config says, not what the value was measured with
    evaluation = run.config.get("evaluation") or {}
    evaluation = evaluation | ({"checkpoint": "best"} if evaluation.get("checkpoint") == "auto" else {})
    usual = dict(leaves({"evaluation": evaluation, "metric": run.config.get("metric") or {}}))
    told = [
        field
        for field, key in keys.items()
        if field in wanted and (field in fields or usual.get(key, wanted[field]) != wanted[field])
    ]
    is_on_all = wanted.get("examples") == "all"
    settings = [f"{keys[field]}={'null' if field == 'num_examples' and is_on_all else wanted[field]}" for field in told]
    if metric not in (run.config.get("metric") or {metric}):
        settings.append(f"metric=[{metric}]")
    return "measure it again: " + " ".join(["python -m src.evaluate", f"run={run.path}", *settings])


def _with_steering(terms: dict[str, Any]) -> dict[str, Any]:
    """The settings of drawing one by one, those that an evaluation may change by their own names."""
    if "settings" not in terms:
        return terms
    settings = {}
    for key, value in leaves(json.loads(terms["settings"])):
        name = key.rpartition(".")[2]
        settings[name if name in _STEERING else f"settings.{key}"] = value
    return {field: value for field, value in terms.items() if field != "settings"} | settings


def _keys(metric: str, wanted: dict[str, Any]) -> dict[str, str]:
    """The keys of a command line that set fields of a card."""
    keys = {field: f"evaluation.{field}" for field in (*_SETTINGS, *_STEERING)}
    if "examples" in wanted:
        return keys | {"num_examples": f"metric.{metric}.num_examples"}
    return keys | ({"num_examples": "evaluation.num_likelihood_examples"} if "of" in wanted else {})


def _absences(metrics: Sequence[str], rows: Sequence[Row], columns: Sequence[Column]) -> Iterator[str]:
    """One line for each reason, with the metrics and, unless it is so in all rows, whose they are."""
    absent: dict[str, dict[str, list[str]]] = {}  # reason, metric, owners
    for metric in metrics:
        for row in rows:
            reasons = {run.seed: _why_absent(run, metric) for run in row.runs}
            for reason in dict.fromkeys(filter(None, reasons.values())):
                seeds = [str(seed) for seed, why in reasons.items() if why == reason]
                owner = row.label if len(seeds) == len(row.runs) else f"{row.label} seed {', '.join(seeds)}"
                absent.setdefault(reason, {}).setdefault(metric, []).append(owner)
    for column in columns:
        for name, anchor in column.anchors.items():
            if isinstance(anchor, str):
                absent.setdefault(anchor, {}).setdefault(column.metric, []).append(ANCHORS.get(name, name))
    everywhere = [row.label for row in rows]
    for reason, owners in absent.items():
        together: dict[str, list[str]] = {}
        for metric, whose in owners.items():
            together.setdefault("" if whose == everywhere else f" of {', '.join(whose)}", []).append(metric)
        named = "; ".join(f"{', '.join(names)}{whose}" for whose, names in together.items())
        yield f"{named}: {reason}"


def _why_absent(run: RunResults, metric: str) -> str | None:
    if metric not in run.metrics:
        return "not measured; python -m src.evaluate run=DIR metric=[NAME] does it"
    return run.metrics[metric].get("not_applicable")
