"""The rows of a comparison: runs whose configs differ in nothing but the seed are one row, with a label of its own."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

__all__ = ["Row", "RunResults", "canonical", "leaves", "make_rows", "one_per_seed", "origin", "shown"]

# what changes neither the training nor its data; `name` says again what the config says
_NO_TRAINING = ("seed", "name", "hydra", "callback", "logger", "evaluation", "metric")
_PLACES = ("data.cache", "data.root")  # where data lie may differ between machines
_ORIGIN = ("weights", "checkpoint", "settings")  # of a card's model: where its weights come from, and how it draws
_MOST_KEYS = 3  # in a label; where it takes more, the directory says it shorter


@dataclass(frozen=True)
class RunResults:
    """What is known of one run.

    Args:
        path: its directory, as a person would type it.
        model, data: as in `model=NAME data=NAME`.
        seed: of the training.
        config: resolved, plain types.
        metrics: as in results.json, `{NAME: ENTRY}`.
        time: of its status, ISO 8601.
        status: "done", or what else it is, with the reason.
        costs: as in results.json; empty if they are not known.
    """

    path: str
    model: str
    data: str
    seed: int
    config: dict[str, Any]
    metrics: dict[str, Any]
    time: str
    status: str = "done"
    costs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model} ({self.path})"

    @cached_property
    def training(self) -> dict[str, Any]:
        """The config by dotted key, without the seed and whatever else makes no other model."""
        config = {key: value for key, value in self.config.items() if key not in _NO_TRAINING}
        return {key: value for key, value in leaves(config) if key not in _PLACES}

    @cached_property
    def group(self) -> str:
        """Equal for runs that differ in nothing but the seed."""
        return canonical(self.training)

    def entry(self, metric: str) -> dict[str, Any] | None:
        """What results.json says of a metric, if it has a value."""
        entry = self.metrics.get(metric, {})
        return entry if "value" in entry else None


@dataclass(frozen=True)
class Row:
    """Runs of one config, one a seed.

    Args:
        label: what to call it.
        runs: by seed.
        origin: of the weights that all its values are of, see `origin`; None if it has no value.
        weights: the same in words, and whether the classes were given: `averaged, best, classes given`.
    """

    label: str
    runs: tuple[RunResults, ...]
    origin: dict[str, str] | None
    weights: str

    @property
    def model(self) -> str:
        return self.runs[0].model

    @property
    def data(self) -> str:
        return self.runs[0].data


def one_per_seed(runs: Sequence[RunResults]) -> tuple[list[RunResults], list[str]]:
    """The runs without those that a later one repeats, and a sentence for each of these."""
    latest: dict[tuple[str, int], RunResults] = {}
    for run in runs:
        before = latest.get((run.group, run.seed))
        if before is None or run.time >= before.time:
            latest[run.group, run.seed] = run
    kept = [run for run in runs if run is latest[run.group, run.seed]]
    repeated = [run for run in runs if run is not latest[run.group, run.seed]]
    return kept, [
        f"{run.name}: {latest[run.group, run.seed].path} is a later run of the same config and seed" for run in repeated
    ]


def make_rows(
    runs: Sequence[RunResults],
    values: Callable[[RunResults], list[dict[str, Any]]],
    labels: Mapping[str, str] | None = None,
) -> tuple[Row, ...]:
    """Rows in the order of their first runs. The origin of a row is the one that most of its values have.

    Args:
        runs: one a seed.
        values: the entries of a run that may stand in the table.
        labels: by group; None for model and data, with the settings that tell rows apart.
    """
    groups: dict[str, list[RunResults]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    labels = labels or _labels([group[0] for group in groups.values()])
    return tuple(_row(labels[name], group, values) for name, group in groups.items())


def _row(label: str, group: Sequence[RunResults], values: Callable[[RunResults], list[dict[str, Any]]]) -> Row:
    runs = tuple(sorted(group, key=lambda run: run.seed))
    entries = [entry for run in group for entry in values(run)]
    if not entries:
        return Row(label, runs, None, "-")
    held = Counter(canonical(origin(entry)) for entry in entries)
    common = max(held, key=held.__getitem__)  # the first of equals
    same = [entry for entry in entries if canonical(origin(entry)) == common]
    words = [value for key, value in origin(same[0]).items() if key != "settings"] or ["unknown"]
    if any(entry["card"].get("model", {}).get("classes") for entry in same):
        words.append("classes given")
    return Row(label, runs, origin(same[0]), ", ".join(words))


def origin(entry: dict[str, Any]) -> dict[str, str]:
    """`{"weights": "averaged" or "raw", "checkpoint": "best" or "last", "settings": {...}}`, as far as the card says it."""
    about = entry["card"].get("model", {})
    return {field: shown(about[field]) for field in _ORIGIN if field in about}


def _labels(firsts: Sequence[RunResults]) -> dict[str, str]:
    """By group: model and data, with as many settings as tell it from the other groups of this model and data."""
    alike: dict[str, list[RunResults]] = {}
    for run in firsts:
        alike.setdefault(f"{run.model} on {run.data}", []).append(run)
    labels = {}
    for name, runs in alike.items():
        keys = _telling_keys([run.training for run in runs])
        for run in runs:
            settings = [_setting(key, run.training) for key in keys]
            labels[run.group] = " ".join([name, *(settings if len(keys) <= _MOST_KEYS else [run.path])])
    return labels


def _telling_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Keys whose values tell the configs apart: in turn the one that tells most of them apart."""

    def num_told(keys: Sequence[str]) -> int:
        return len({tuple(canonical(config[key]) if key in config else None for key in keys) for config in configs})

    keys: list[str] = []
    differing = [key for key in dict.fromkeys(key for config in configs for key in config) if num_told([key]) > 1]
    # keys that all have come first, then those high up: model.encoder.hidden repeats encoder.hidden
    differing.sort(key=lambda key: (not all(key in config for config in configs), key.count(".")))
    while num_told(keys) < len(configs):
        keys.append(max(differing, key=lambda key: num_told([*keys, key])))
    return keys


def _setting(key: str, config: dict[str, Any]) -> str:
    """`key=value`, of a class its last name alone: `likelihood=Bernoulli`."""
    value = shown(config[key]) if key in config else "none"
    return f"{key.removesuffix('._target_')}={value.rpartition('.')[2]}" if key.endswith("._target_") else f"{key}={value}"


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dictionaries; a list or an empty dictionary is a value."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def canonical(plain: Any) -> str:
    """JSON that is the same for equal values, whatever the order of their keys."""
    return json.dumps(plain, sort_keys=True, default=str)


def shown(value: Any) -> str:
    """A plain value as a person would type it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
