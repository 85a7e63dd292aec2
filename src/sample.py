"""Draw from a run: `python -m src.sample run=outputs/... n=64 seed=0` writes PNG files and a grid.

Of vectors it writes one .npy and one .csv, and pictures if they have two dimensions; of texts a .txt file each, and prints
them. `picture=interpolation`, `traversal`,
`classes` and `styles` show how what is drawn hangs on the latents, the class and the styles; `picture=reconstruction`,
`posterior` and `inpainting` what the model makes of test examples.
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
from src.sample_pictures import ONLY_FOR, PICTURES, PICTURES_OF_GIVEN, SIDES, Given
from src.sample_texts import OF_CHOICE, choose_tokens, draw_texts, given_keys, name_of_given

if TYPE_CHECKING:
    import torch
    from torch import nn

    from src.core.batch import Batch
    from src.core.drawing import Sampler
    from src.core.spec import DataSpec
    from src.data.loading import ArrayData

log = logging.getLogger(__name__)


def sample(config: DictConfig) -> None:
    """Draw what `picture` asks for; sample i depends on the seed and i alone."""
    from src.core.drawing import Sampler
    from src.core.protocols import CanSample
    from src.core.views import Viewer
    from src.experiment import load_data_of, load_spec, load_trained_model, steer
    from src.sample_files import SampleFiles

    run = Run.open(Path(str(config.run)))
    of_run = run.config()
    spec = load_spec(run, of_run)
    model, about = load_trained_model(run, of_run, spec, config.checkpoint)
    name = of_run.name.model
    if config.picture in PICTURES and not isinstance(model, CanSample):
        raise UserError(f"model={name} draws no samples (it has no CanSample); sample a model that does")
    if config.condition is not None and not getattr(model, "is_conditional", False):
        raise UserError(f"condition={config.condition} cannot be asked of model={name}: it is not conditional")
    chosen = None if config.condition is None else _class_number(config.condition, spec.class_names)
    steer(model, name, config.steps, config.guidance)
    choose_tokens(model, name, spec, config)
    folder = _given_folder(config) or run.samples / _folder_name(config, about["checkpoint"], chosen)
    is_of_run = run.samples.resolve() in folder.resolve().parents
    data = functools.cache(lambda: load_data_of(run, of_run))
    files = SampleFiles(folder, spec, data, is_of_run)
    truncation = ""
    try:
        if config.picture == "samples" and spec.tokenizer is not None:
            drawn = draw_texts(model, name, spec, files, config, chosen)
        elif config.picture in PICTURES:
            sampler = _with_truncation(Sampler, model, spec, name, config, chosen)
            drawn = PICTURES[config.picture](sampler, files, spec, config)
            truncation = sampler.truncation_in_words(is_between=config.picture == "interpolation")
        else:
            viewer = Viewer(model, config.seed, config.batch_size)
            examples = functools.partial(_test_examples, data, config.seed, next(model.parameters()).device)
            drawn = PICTURES_OF_GIVEN[config.picture](Given(viewer, files, examples, spec, chosen), config)
    except NotApplicable as reason:
        raise UserError(f"picture={config.picture} cannot be asked of model={name}: {reason}") from reason
    steered = [f"{key}={value}" for key, value in given_keys(config, ("steps", "guidance", *OF_CHOICE)).items()]
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


def _given_folder(config: DictConfig) -> Path | None:
    return None if config.out in (None, "") else Path(str(config.out))  # a number, too, is the name of a folder


def _folder_name(config: DictConfig, checkpoint: str, chosen: int | None) -> str:
    condition = "" if chosen is None else f"_condition{chosen}"
    truncation = "" if config.truncation is None else f"_truncation{config.truncation:g}"
    steered = "".join(f"_{key}{config[key]:g}" for key in ("steps", "guidance") if config[key] is not None)
    return f"drawn_seed{config.seed}_{checkpoint}{condition}{truncation}{steered}{name_of_given(config)}"


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
    pictures = (*PICTURES, *PICTURES_OF_GIVEN)
    if config.picture not in pictures:
        raise UserError(f"picture={config.picture} is not known; allowed: {', '.join(pictures)}")
    if config.known is not None and config.known not in SIDES:
        raise UserError(f"known={config.known} is not known; allowed: {', '.join(SIDES)}")
    for key in ("seed", "batch_size"):
        if config[key] is None:
            raise UserError(f"{key}=null must be a whole number")
    for key, least in (("n", 1), ("batch_size", 1), ("length", 1), ("steps", 1), ("row_length", 2), ("crossover", 0)):
        _require_whole(key, config[key])
        require_at_least(key, config[key], least)
    for key, pictures in ONLY_FOR.items():
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
