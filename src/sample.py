"""Draw from a run: `python -m src.sample run=outputs/... n=64 seed=0` writes PNG files and a grid.

Of vectors it writes one .npy and one .csv, and pictures if they have two dimensions. `picture=interpolation`, `traversal`,
`classes` and `styles` show how what is drawn hangs on the latents, the class and the styles; `picture=reconstruction`,
`posterior` and `inpainting` what the model makes of test examples.
"""

import functools
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from src.cli import run_entry_point
from src.core.errors import NotApplicable, UserError, require_at_least
from src.runs import Run

if TYPE_CHECKING:
    import torch
    from torch import nn

    from src.core.batch import Batch
    from src.core.drawing import Sampler
    from src.core.spec import DataSpec
    from src.core.views import Viewer
    from src.data.loading import ArrayData
    from src.sample_files import SampleFiles

log = logging.getLogger(__name__)

_SAMPLES, _ROWS = 64, 8  # where n is not given
_PER_ROW, _MAX_CLASSES = 8, 20  # in a grid of samples; a column each in a grid
_ROW_LENGTH, _CURVE_POINTS, _CLASS_POINTS = 10, 200, 200  # in a row; of points on a curve, and of a class
_TRAVERSAL_LENGTH = 11  # odd, so that there is a middle
_DENSITY_SAMPLES = 50_000
_ENCODED = 500  # examples whose codes say which dimensions are active
_SIDES = ("top", "bottom", "left", "right")


@dataclass(frozen=True)
class _Given:
    """What a picture of given examples is made from.

    Args:
        viewer: of the model.
        files: where the picture goes.
        examples: so many test examples, others for another seed; on the model's device.
        spec: of the data.
        condition: number of the class that was asked for.
    """

    viewer: "Viewer"
    files: "SampleFiles"
    examples: "Callable[[int], Batch]"
    spec: "DataSpec"
    condition: int | None


def sample(config: DictConfig) -> None:
    """Draw what `picture` asks for; sample i depends on the seed and i alone."""
    from src.core.drawing import Sampler
    from src.core.protocols import CanSample
    from src.core.views import Viewer
    from src.experiment import load_data, load_spec, load_trained_model, steer
    from src.sample_files import SampleFiles

    run = Run.open(Path(str(config.run)))
    of_run = run.config()
    spec = load_spec(run, of_run)
    model, about = load_trained_model(run, of_run, spec, config.checkpoint)
    name = of_run.name.model
    if config.picture in _PICTURES and not isinstance(model, CanSample):
        raise UserError(f"model={name} draws no samples (it has no CanSample); sample a model that does")
    if config.condition is not None and not getattr(model, "is_conditional", False):
        raise UserError(f"condition={config.condition} cannot be asked of model={name}: it is not conditional")
    chosen = None if config.condition is None else _class_number(config.condition, spec.class_names)
    steer(model, name, config.steps, config.guidance)
    folder = _given_folder(config) or run.samples / _folder_name(config, about["checkpoint"], chosen)
    is_of_run = run.samples.resolve() in folder.resolve().parents
    data = functools.cache(lambda: load_data(of_run))
    files = SampleFiles(folder, spec, data, is_of_run)
    truncation = ""
    try:
        if config.picture in _PICTURES:
            sampler = _with_truncation(Sampler, model, spec, name, config, chosen)
            drawn = _PICTURES[config.picture](sampler, files, spec, config)
            truncation = sampler.truncation_in_words(is_between=config.picture == "interpolation")
        else:
            viewer = Viewer(model, config.seed, config.batch_size)
            examples = functools.partial(_test_examples, data, config.seed, next(model.parameters()).device)
            drawn = _PICTURES_OF_GIVEN[config.picture](_Given(viewer, files, examples, spec, chosen), config)
    except NotApplicable as reason:
        raise UserError(f"picture={config.picture} cannot be asked of model={name}: {reason}") from reason
    steered = [f"{key}={config[key]:g}" for key in ("steps", "guidance") if config[key] is not None]
    how = "; ".join(filter(None, [f"{about['weights']} weights", *steered, truncation]))
    log.info(f"{drawn} of the {about['checkpoint']} checkpoint ({how}) in {folder}")


def _with_truncation(
    make: "type[Sampler]", model: "nn.Module", spec: "DataSpec", name: str, config: DictConfig, chosen: int | None
) -> "Sampler":
    try:
        return make(model, spec.num_classes, config.seed, config.batch_size, chosen, config.truncation)
    except NotApplicable as reason:
        raise UserError(f"truncation={config.truncation} cannot be asked of model={name}: {reason}") from reason


def _test_examples(data: "Callable[[], ArrayData]", seed: int, device: "torch.device", n: int) -> "Batch":
    """n test examples, or all if there are fewer; which ones depends on the seed, and the first are the same for any n."""
    import torch

    from src.core.batch import Batch
    from src.core.rng import derive_seed, hash_bits

    # not the first ones: a folder of images is sorted by class
    place = hash_bits(derive_seed(seed, 5), torch.arange(len(data().arrays.splits["test"])), 1).squeeze(1)
    batches = [data().to_units(batch.to(device)) for batch in data().held_out_loader("test", place.argsort()[:n])]
    labels = [batch.condition for batch in batches if batch.condition is not None]
    return Batch(torch.cat([batch.x for batch in batches]), torch.cat(labels) if labels else None)


def _draw_samples(sampler: "Sampler", files: "SampleFiles", spec: "DataSpec", config: DictConfig) -> str:
    n = config.n or _SAMPLES
    classes = sampler.classes_of(n)
    is_column_a_class = classes is not None and config.condition is None and spec.num_classes <= _MAX_CLASSES
    files.write_samples(sampler.samples(n), classes, spec.num_classes if is_column_a_class else _PER_ROW)
    if not files.has_density:
        return f"{n} samples"
    return f"{n} samples and {files.write_density(sampler.samples(_DENSITY_SAMPLES))} of {_DENSITY_SAMPLES:,} more"


def _draw_interpolation(sampler: "Sampler", files: "SampleFiles", spec: "DataSpec", config: DictConfig) -> str:
    length = config.row_length or (_CURVE_POINTS if spec.modality == "vector" else _ROW_LENGTH)
    drawn = sampler.interpolations(config.n or _ROWS, length)
    return f"{files.write_rows('interpolation', drawn)} with {drawn.shape[0]} rows of {length} {_things(spec)}"


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


def _draw_reconstruction(given: _Given, config: DictConfig) -> str:
    drawn = given.viewer.reconstructions(given.examples(config.n or _ROWS))
    n, is_image = len(drawn), given.spec.modality == "image"
    name = given.files.write_rows("reconstruction", drawn.transpose(0, 1) if is_image else drawn)
    return f"{name} with {n} test {_things(given.spec)} and their reconstructions" + (" below them" if is_image else "")


def _draw_traversal(given: _Given, config: DictConfig) -> str:
    length = config.row_length or _TRAVERSAL_LENGTH
    drawn = given.viewer.traversal(given.examples(_ENCODED), config.n or _ROWS, length, given.condition)
    name, dimensions = given.files.write_rows("traversal", drawn.x), ", ".join(map(str, drawn.dimensions))
    return f"{name} with the latent dimensions {dimensions} from -3 to 3, a row each,"


def _draw_posterior(given: _Given, config: DictConfig) -> str:
    length = config.row_length or _ROW_LENGTH
    drawn = given.viewer.posterior_draws(given.examples(config.n or _ROWS), length - 1)
    name = given.files.write_rows("posterior", drawn)
    return f"{name} with {len(drawn)} test {_things(given.spec)} and {length - 1} draws of p(x' | z ~ q(z | x)) of each"


def _draw_inpainting(given: _Given, config: DictConfig) -> str:
    import torch

    from src.core.batch import Batch
    from src.core.views import half_mask

    spec, batch = given.spec, given.examples(config.n or _ROWS)
    if spec.modality != "image":
        raise NotApplicable(f"it is for halves of images; data={spec.name} gives {spec.modality}s")
    if config.row_length == 2:
        raise UserError("row_length=2 must be at least 3 for picture=inpainting: what is known, a completion, the image")
    if given.condition is not None:
        batch = Batch(batch.x, torch.full((len(batch),), given.condition, device=batch.x.device))
    length, known = config.row_length or _ROW_LENGTH, config.known or _SIDES[0]
    blank = (spec.values.low + spec.values.high) / 2
    drawn = given.viewer.completions(batch, half_mask(known, spec.shape).to(batch.x.device), length - 2, blank)
    name = given.files.write_rows("inpainting", drawn)
    return f"{name} with the {known} half of {len(drawn)} test images, {length - 2} completions of each, and the image,"


def _things(spec: "DataSpec") -> str:
    return "images" if spec.modality == "image" else "points"


_PICTURES_OF_GIVEN: dict[str, Callable[[_Given, DictConfig], str]] = {
    "reconstruction": _draw_reconstruction,
    "traversal": _draw_traversal,
    "posterior": _draw_posterior,
    "inpainting": _draw_inpainting,
}
_IN_STEPS = ("samples", "interpolation", "classes", "traversal", "inpainting")  # of models that draw in steps
_ONLY_FOR = {
    "row_length": ("interpolation", "traversal", "posterior", "inpainting"),
    "crossover": ("styles",),
    "known": ("inpainting",),
    "condition": ("samples", "interpolation", "styles", "traversal", "inpainting"),
    "truncation": ("samples", "interpolation", "classes", "styles"),
    "steps": _IN_STEPS,
    "guidance": _IN_STEPS,
}


def _given_folder(config: DictConfig) -> Path | None:
    return None if config.out in (None, "") else Path(str(config.out))  # a number, too, is the name of a folder


def _folder_name(config: DictConfig, checkpoint: str, chosen: int | None) -> str:
    condition = "" if chosen is None else f"_condition{chosen}"
    truncation = "" if config.truncation is None else f"_truncation{config.truncation:g}"
    steered = "".join(f"_{key}{config[key]:g}" for key in ("steps", "guidance") if config[key] is not None)
    return f"drawn_seed{config.seed}_{checkpoint}{condition}{truncation}{steered}"


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
    pictures = (*_PICTURES, *_PICTURES_OF_GIVEN)
    if config.picture not in pictures:
        raise UserError(f"picture={config.picture} is not known; allowed: {', '.join(pictures)}")
    if config.known is not None and config.known not in _SIDES:
        raise UserError(f"known={config.known} is not known; allowed: {', '.join(_SIDES)}")
    for key in ("seed", "batch_size"):
        if config[key] is None:
            raise UserError(f"{key}=null must be a whole number")
    for key, least in (("n", 1), ("batch_size", 1), ("steps", 1), ("row_length", 2), ("crossover", 0)):
        _require_whole(key, config[key])
        require_at_least(key, config[key], least)
    for key, pictures in _ONLY_FOR.items():
        if config[key] is not None and config.picture not in pictures:
            raise UserError(
                f"{key}={config[key]} is nothing that picture={config.picture} takes; "
                f"it is for picture={' or picture='.join(pictures)}"
            )
    for key, off in (("truncation", "no truncation"), ("guidance", "what the model was trained with")):
        _require_number(key, config[key], off)


def _require_folder(out: Path | None) -> None:
    """Refuse a folder that is a file or below one."""
    existing = next((path for path in (out, *out.parents) if os.path.lexists(path)), None) if out else None
    if existing is not None and not existing.is_dir():
        raise UserError(f"out={out} cannot be a folder, since {existing} is a file; give another folder")


def _require_whole(key: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UserError(f"{key}={value} must be a whole number")


def _require_number(key: str, value: object, off: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if value is not None and not (is_number and value >= 0):
        raise UserError(f"{key}={value} must be a number that is at least 0, or null for {off}")


def main() -> None:
    run_entry_point("sample", sample, _check)


if __name__ == "__main__":
    main()
