"""The pictures of `python -m src.sample picture=NAME`: what each of them draws, which options it takes, and its sentence.

Nothing heavy is imported before a picture is drawn, so that a mistyped option ends at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from src.core.errors import NotApplicable, UserError

if TYPE_CHECKING:
    from src.core.batch import Batch
    from src.core.drawing import Sampler
    from src.core.spec import DataSpec
    from src.core.views import Viewer
    from src.sample_files import SampleFiles

__all__ = ["ONLY_FOR", "PICTURES", "PICTURES_OF_GIVEN", "SIDES", "Given"]

_SAMPLES, _ROWS = 64, 8  # where n is not given
_PER_ROW, _MAX_CLASSES = 8, 20  # in a grid of samples; a column each in a grid
_ROW_LENGTH, _CURVE_POINTS, _CLASS_POINTS = 10, 200, 200  # in a row; of points on a curve, and of a class
_TRAVERSAL_LENGTH = 11  # odd, so that there is a middle
_DENSITY_SAMPLES = 50_000
_ENCODED = 500  # examples whose codes say which dimensions are active
SIDES = ("top", "bottom", "left", "right")


@dataclass(frozen=True)
class Given:
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


PICTURES: dict[str, Callable[["Sampler", "SampleFiles", "DataSpec", DictConfig], str]] = {
    "samples": _draw_samples,
    "interpolation": _draw_interpolation,
    "classes": _draw_classes,
    "styles": _draw_styles,
}


def _draw_reconstruction(given: Given, config: DictConfig) -> str:
    drawn = given.viewer.reconstructions(given.examples(config.n or _ROWS))
    n, is_image = len(drawn), given.spec.modality == "image" or given.spec.sound is not None
    name = given.files.write_rows("reconstruction", drawn.transpose(0, 1) if is_image else drawn)
    return f"{name} with {n} test {_things(given.spec)} and their reconstructions" + (" below them" if is_image else "")


def _draw_traversal(given: Given, config: DictConfig) -> str:
    length = config.row_length or _TRAVERSAL_LENGTH
    drawn = given.viewer.traversal(given.examples(_ENCODED), config.n or _ROWS, length, given.condition)
    name, dimensions = given.files.write_rows("traversal", drawn.x), ", ".join(map(str, drawn.dimensions))
    return f"{name} with the latent dimensions {dimensions} from -3 to 3, a row each,"


def _draw_posterior(given: Given, config: DictConfig) -> str:
    length = config.row_length or _ROW_LENGTH
    drawn = given.viewer.posterior_draws(given.examples(config.n or _ROWS), length - 1)
    name = given.files.write_rows("posterior", drawn)
    return f"{name} with {len(drawn)} test {_things(given.spec)} and {length - 1} draws of p(x' | z ~ q(z | x)) of each"


def _draw_inpainting(given: Given, config: DictConfig) -> str:
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
    length, own = config.row_length or _ROW_LENGTH, given.viewer.own_mask()
    if config.known is None and own is not None:
        mask, known = own
    else:
        side = config.known or SIDES[0]
        mask, known = half_mask(side, spec.shape), f"the {side} half"
    blank = (spec.values.low + spec.values.high) / 2
    drawn = given.viewer.completions(batch, mask.to(batch.x.device), length - 2, blank)
    name = given.files.write_rows("inpainting", drawn)
    return f"{name} with {known} of {len(drawn)} test images, {length - 2} completions of each, and the image,"


def _things(spec: "DataSpec") -> str:
    return "clips" if spec.sound is not None else "images" if spec.modality == "image" else "points"


PICTURES_OF_GIVEN: dict[str, Callable[[Given, DictConfig], str]] = {
    "reconstruction": _draw_reconstruction,
    "traversal": _draw_traversal,
    "posterior": _draw_posterior,
    "inpainting": _draw_inpainting,
}
_IN_STEPS = ("samples", "interpolation", "classes", "traversal", "inpainting")  # of models that draw in steps
ONLY_FOR = {
    "row_length": ("interpolation", "traversal", "posterior", "inpainting"),
    "crossover": ("styles",),
    "known": ("inpainting",),
    "condition": ("samples", "interpolation", "styles", "traversal", "inpainting"),
    "truncation": ("samples", "interpolation", "classes", "styles"),
    "steps": _IN_STEPS,
    "guidance": _IN_STEPS,
}
