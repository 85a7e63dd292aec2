"""Draw from a run: `python -m src.sample run=outputs/... n=64 seed=0` writes PNG files and a grid.

Of vectors it writes one .npy and one .csv, and pictures if they have two dimensions. `picture=interpolation`, `classes` and
`styles` show how what is drawn hangs on the latents, the class and the styles.
"""

import functools
import logging
import math
import os
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
_PER_ROW, _MAX_CLASSES = 8, 20  # in a grid of samples; a column each in a grid
_STEPS, _CURVE_POINTS, _CLASS_POINTS = 10, 200, 200  # in a row; of points on a curve, and of a class
_DENSITY_SAMPLES = 50_000


def sample(config: DictConfig) -> None:
    """Draw what `picture` asks for; sample i depends on the seed and i alone."""
    from src.core.drawing import Sampler
    from src.core.protocols import CanSample
    from src.experiment import load_data, load_spec, load_trained_model
    from src.sample_files import SampleFiles

    run = Run.open(Path(str(config.run)))
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
    folder = _given_folder(config) or run.samples / _folder_name(config, about["checkpoint"], chosen)
    is_of_run = run.samples.resolve() in folder.resolve().parents
    files = SampleFiles(folder, spec, functools.cache(lambda: load_data(of_run)), is_of_run)
    try:
        drawn = _PICTURES[config.picture](sampler, files, spec, config)
    except NotApplicable as reason:
        raise UserError(f"picture={config.picture} cannot be asked of model={name}: {reason}") from reason
    truncation = sampler.truncation_in_words(is_between=config.picture == "interpolation")
    how = "; ".join(filter(None, [f"{about['weights']} weights", truncation]))
    log.info(f"{drawn} of the {about['checkpoint']} checkpoint ({how}) in {folder}")


def _draw_samples(sampler: "Sampler", files: "SampleFiles", spec: "DataSpec", config: DictConfig) -> str:
    n = config.n or _SAMPLES
    classes = sampler.classes_of(n)
    is_column_a_class = classes is not None and config.condition is None and spec.num_classes <= _MAX_CLASSES
    files.write_samples(sampler.samples(n), classes, spec.num_classes if is_column_a_class else _PER_ROW)
    if not files.has_density:
        return f"{n} samples"
    return f"{n} samples and {files.write_density(sampler.samples(_DENSITY_SAMPLES))} of {_DENSITY_SAMPLES:,} more"


def _draw_interpolation(sampler: "Sampler", files: "SampleFiles", spec: "DataSpec", config: DictConfig) -> str:
    steps = config.steps or (_CURVE_POINTS if spec.modality == "vector" else _STEPS)
    drawn = sampler.interpolations(config.n or _ROWS, steps)
    return f"{files.write_rows('interpolation', drawn)} with {drawn.shape[0]} rows of {steps} steps"


def _draw_classes(sampler: "Sampler", files: "SampleFiles", spec: "DataSpec", config: DictConfig) -> str:
    is_points = files.has_density
    drawn = sampler.classes(config.n or (_CLASS_POINTS if is_points else _ROWS), min(spec.num_classes, _MAX_CLASSES))
    name = files.write_rows("classes", drawn.transpose(0, 1) if is_points else drawn)
    first = f"the first {_MAX_CLASSES} of " if spec.num_classes > _MAX_CLASSES else ""
    return f"{name} with {drawn.shape[0]} latents for each of {first}{spec.num_classes} classes"


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


def _given_folder(config: DictConfig) -> Path | None:
    return None if config.out in (None, "") else Path(str(config.out))  # a number, too, is the name of a folder


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
    if config.run is None:
        raise UserError("run=null is no directory of a run; give one, as in run=outputs/digits/vae/...")
    Run.open(Path(str(config.run)))
    _require_folder(_given_folder(config))
    if config.picture not in _PICTURES:
        raise UserError(f"picture={config.picture} is not known; allowed: {', '.join(_PICTURES)}")
    for key in ("seed", "batch_size"):
        if config[key] is None:
            raise UserError(f"{key}=null must be a whole number")
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


def _require_folder(out: Path | None) -> None:
    """Refuse a folder that is a file or below one."""
    existing = next((path for path in (out, *out.parents) if os.path.lexists(path)), None) if out else None
    if existing is not None and not existing.is_dir():
        raise UserError(f"out={out} cannot be a folder, since {existing} is a file; give another folder")


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
