"""The rows of a comparison: runs whose configs differ in nothing but the seed are one row, with a label of its own."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

__all__ = [
    "Row", "RunResults", "by_seeds", "canonical", "leaves", "make_rows", "one_per_seed", "origin", "shared_origin", "shown",
]  # fmt: skip

# what changes neither the training nor its data; `name` says again what the config says
_NO_TRAINING = ("seed", "name", "hydra", "callback", "logger", "evaluation", "metric")
_PLACES = ("data.cache", "data.root")  # where data lie may differ between machines
# of a run on the latents of another one: its directory, and what is the same for all seeds of its config
_OF_AUTOENCODER = ("autoencoder.run", "autoencoder.sha256", "autoencoder.seed", "autoencoder.costs")
_WEIGHTS = ("weights", "checkpoint")  # of a card's model: where its weights come from
_DRAWING, _SCORING = "settings", "likelihood settings"  # how it draws samples, and how it computes likelihoods
_LIKELIHOOD = "likelihood"  # the part of a card's settings that is of likelihoods alone
_MOVING, _GUIDANCE = "path settings", "guidance"  # how it follows its field accurately, whatever the steps of samples
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
        is_by_autoencoder: whether runs on other seeds of its autoencoder are in other rows.
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
    is_by_autoencoder: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} ({self.path})"

    @cached_property
    def training(self) -> dict[str, Any]:
        """The config by dotted key, without the seed and whatever else makes no other model."""
        config = {key: value for key, value in self.config.items() if key not in _NO_TRAINING}
        left_out = (*_PLACES, *(_OF_AUTOENCODER if self.seed_of_autoencoder is not None else ()))
        told = {key: value for key, value in leaves(config) if not _is_at_or_below(key, left_out)}
        return told | ({"autoencoder.seed": self.seed_of_autoencoder} if self.is_by_autoencoder else {})

    @property
    def seed_of_autoencoder(self) -> int | None:
        """Of the training of the model whose latents are modelled; None if there is none, or it is not known."""
        about = self.config.get("autoencoder")
        return about.get("seed") if isinstance(about, dict) else None

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

    @property
    def has_one_autoencoder(self) -> bool:
        """Whether all of several runs are on the latents of one training, which is not in their spread then."""
        seeds = {run.seed_of_autoencoder for run in self.runs}
        return len(self.runs) > 1 and len(seeds) == 1 and None not in seeds


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


def by_seeds(runs: Sequence[RunResults]) -> list[RunResults]:
    """The runs, where some are on latents, with seeds that tell runs of one config apart.

    A run on latents has two seeds, its own and that of its autoencoder. The runs of a config go by their own if each has an
    autoencoder of its own, or all have the same one (`Row.has_one_autoencoder`); else by those of the autoencoders if each
    of these has one run. In all other cases the autoencoders are told apart as different rows, since runs on the same one
    are not independent.
    """
    pairs: dict[str, set[tuple[int, int]]] = {}
    for run in runs:
        if run.seed_of_autoencoder is not None:
            pairs.setdefault(run.group, set()).add((run.seed, run.seed_of_autoencoder))
    return [_by_seeds(run, pairs[run.group]) if run.seed_of_autoencoder is not None else run for run in runs]


def _by_seeds(run: RunResults, pairs: set[tuple[int, int]]) -> RunResults:
    assert run.seed_of_autoencoder is not None
    own, of_autoencoders = ({pair[i] for pair in pairs} for i in range(2))
    if len(of_autoencoders) == 1 or len(own) == len(of_autoencoders) == len(pairs):
        return run
    if len(of_autoencoders) == len(pairs):
        return replace(run, seed=run.seed_of_autoencoder)
    return replace(run, is_by_autoencoder=True)


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
    same = _most_alike(entries, lambda entry: _weights(origin(entry)))
    common = _weights(origin(same[0]))
    for what in (_DRAWING, _SCORING, _MOVING):
        concerned = [entry for entry in same if _concern(entry) == what]
        if concerned:
            common |= origin(_most_alike(concerned, origin)[0])
    words = [value for key, value in common.items() if key in _WEIGHTS] or ["unknown"]
    if any(entry["card"].get("model", {}).get("classes") for entry in same):
        words.append("classes given")
    return Row(label, runs, common, ", ".join(words))


def _most_alike(entries: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """Those that have in common what most of them have."""
    held = Counter(canonical(of(entry)) for entry in entries)
    common = max(held, key=held.__getitem__)  # the first of equals
    return [entry for entry in entries if canonical(of(entry)) == common]


def origin(entry: dict[str, Any]) -> dict[str, str]:
    """`{"weights": "averaged" or "raw", "checkpoint": "best" or "last", "settings": {...}}`, as far as the card says it.

    The settings are those that the value depends on: of one that is measured on samples those of drawing them, of another
    the "likelihood settings", of the energy of a field's paths the "path settings".
    """
    about = entry["card"].get("model", {})
    found = {field: shown(about[field]) for field in _WEIGHTS if field in about}
    settings = about.get("settings")
    if settings:
        what = _concern(entry)
        parts = {
            _DRAWING: lambda: _without_likelihood(settings),
            _SCORING: lambda: _only(settings, _LIKELIHOOD) or settings,
            _MOVING: lambda: _only(settings, _GUIDANCE),
        }
        found[what] = shown(parts[what]())
    return found


def shared_origin(row: Row, entry: dict[str, Any]) -> dict[str, str]:
    """What `origin` of a value must be for it to stand in the row."""
    common = origin(entry) if row.origin is None else row.origin
    return {key: value for key, value in common.items() if key in (*_WEIGHTS, _concern(entry))}


def _weights(of_values: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in of_values.items() if key in _WEIGHTS}


def _concern(entry: dict[str, Any]) -> str:
    if "num_paths" in entry["card"]:
        return _MOVING
    is_of_examples = "num_examples" in entry["card"] and "num_samples" not in entry["card"]
    return _SCORING if is_of_examples else _DRAWING


def _without_likelihood(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_likelihood(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key != _LIKELIHOOD
    }


def _only(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of this name in the same nesting, with nothing else in it."""
    parts = {key: value for key, value in settings.items() if key == name or isinstance(value, dict)}
    found = {key: value if key == name else _only(value, name) for key, value in parts.items()}
    return {key: value for key, value in found.items() if value != {}}


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


def _is_at_or_below(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


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
