"""Draw from a run: `python -m src.sample run=outputs/... n=64 seed=0` writes PNG files and a grid.

Of vectors it writes one .npy and one .csv, and pictures if they have two dimensions. `picture=interpolation`, `classes` and
`styles` show how what is drawn hangs on the latents, the class and the styles.
"""

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from src.cli import run_entry_point
from src.core.errors import NotApplicable, UserError, require_at_least
from src.runs import Run

if TYPE_CHECKING:
    from src.core.drawing import Sampler
    from src.core.spec import DataSpec
    from src.sample_files import SampleFiles

log = logging.getLogger(__name__)

_SAMPLES, _ROWS = 64, 8  # where n is not given
_STEPS, _CURVE_POINTS, _CLASS_POINTS = 10, 200, 200  # in a row; of points on a curve, and of a class
_DENSITY_SAMPLES = 50_000


def sample(config: DictConfig) -> None:
    """Draw what `picture` asks for; sample i depends on the seed and i alone."""
    from src.core.drawing import Sampler
    from src.core.protocols import CanSample
    from src.experiment import load_data, load_spec, load_trained_model
    from src.sample_files import SampleFiles

    run = Run.open(Path(config.run))
    of_run = run.config()
    spec = load_spec(run, of_run)
    model, about = load_trained_model(run, of_run, spec, config.checkpoint)
    name = of_run.name.model
    if not isinstance(model, CanSample):
        raise UserError(f"model={name} draws no samples (it has no CanSample); sample a model that does")
    if config.condition is not None and not model.is_conditional:
        raise UserError(f"condition={config.condition} cannot be asked of model={name}: it is not conditional")
    chosen = None if config.condition is None else _class_number(config.condition, spec.class_names)
    try:
        sampler = Sampler(model, spec.num_classes, config.seed, config.batch_size, chosen, config.truncation)
    except NotApplicable as reason:
        raise UserError(f"truncation={config.truncation} cannot be asked of model={name}: {reason}") from reason
    folder = Path(config.out) if config.out else run.samples / _folder_name(config, about["checkpoint"], chosen)
    files = SampleFiles(folder, spec, functools.cache(lambda: load_data(of_run)))
    try:
        drawn = _PICTURES[config.picture](sampler, files, spec, config)
    except NotApplicable as reason:
        raise UserError(f"picture={config.picture} cannot be asked of model={name}: {reason}") from reason
    truncated = f"; {sampler.truncated}" if sampler.truncated else ""
    log.info(f"{drawn} of the {about['checkpoint']} checkpoint ({about['weights']} weights{truncated}) in {folder}")


def _draw_samples(sampler: "Sampler", files: "SampleFiles", spec: "DataSpec", config: DictConfig) -> str:
    n = config.n or _SAMPLES
    classes = sampler.classes_of(n)
    files.write_samples(sampler.samples(n), classes, take_turns=classes is not None and config.condition is None)
    if not files.has_density:
        return f"{n} samples"
    return f"{n} samples and {files.write_density(sampler.samples(_DENSITY_SAMPLES))} of {_DENSITY_SAMPLES:,} more"


def _draw_interpolation(sampler: "Sampler", files: "SampleFiles", spec: "DataSpec", config: DictConfig) -> str:
    steps = config.steps or (_CURVE_POINTS if spec.modality == "vector" else _STEPS)
    drawn = sampler.interpolations(config.n or _ROWS, steps)
    return f"{files.write_rows('interpolation', drawn)} with {drawn.shape[0]} rows of {steps} steps"


def _draw_classes(sampler: "Sampler", files: "SampleFiles", spec: "DataSpec", config: DictConfig) -> str:
    is_points = files.has_density
    drawn = sampler.classes(config.n or (_CLASS_POINTS if is_points else _ROWS), spec.num_classes)
    name = files.write_rows("classes", drawn.transpose(0, 1) if is_points else drawn)
    return f"{name} with {drawn.shape[0]} latents for each of {drawn.shape[1]} classes"


def _draw_styles(sampler: "Sampler", files: "SampleFiles", spec: "DataSpec", config: DictConfig) -> str:
    drawn = sampler.mixed_styles(config.n or _ROWS, config.crossover)
    return f"{files.write_styles(drawn)} with the styles of {len(drawn.coarse)} and {len(drawn.fine)} samples mixed"


_PICTURES: dict[str, Callable[["Sampler", "SampleFiles", "DataSpec", DictConfig], str]] = {
    "samples": _draw_samples,
    "interpolation": _draw_interpolation,
    "classes": _draw_classes,
    "styles": _draw_styles,
}
_ONLY_FOR = {"steps": ("interpolation",), "crossover": ("styles",), "condition": ("samples", "interpolation", "styles")}


def _folder_name(config: DictConfig, checkpoint: str, chosen: int | None) -> str:
    condition = "" if chosen is None else f"_condition{chosen}"
    truncation = "" if config.truncation is None else f"_truncation{config.truncation:g}"
    return f"drawn_seed{config.seed}_{checkpoint}{condition}{truncation}"


def _class_number(given: int | str, names: tuple[str, ...]) -> int:
    """The number of a class that is given by its name or its number; names come first."""
    wanted = str(given)
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    raise UserError(f"condition={given} is not known; allowed: {', '.join(names)}, or a number from 0 to {len(names) - 1}")


def _check(config: DictConfig) -> None:
    Run.open(Path(config.run))
    if config.picture not in _PICTURES:
        raise UserError(f"picture={config.picture} is not known; allowed: {', '.join(_PICTURES)}")
    for key, least in (("n", 1), ("batch_size", 1), ("steps", 2), ("crossover", 0)):
        _require_whole(key, config[key])
        require_at_least(key, config[key], least)
    for key, pictures in _ONLY_FOR.items():
        if config[key] is not None and config.picture not in pictures:
            raise UserError(
                f"{key}={config[key]} is nothing that picture={config.picture} takes; "
                f"it is for picture={' or picture='.join(pictures)}"
            )
    _require_truncation(config.truncation)


def _require_whole(key: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UserError(f"{key}={value} must be a whole number")


def _require_truncation(value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if value is not None and not (is_number and value >= 0):
        raise UserError(f"truncation={value} must be a number that is at least 0, or null for no truncation")


def main() -> None:
    run_entry_point("sample", sample, _check)


if __name__ == "__main__":
    main()
