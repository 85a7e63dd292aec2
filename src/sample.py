"""Draw from a run: `python -m src.sample run=outputs/... n=64 seed=0` writes PNG files and a grid.

Of vectors it writes one .npy and one .csv, and a picture if they have two dimensions.
"""

import logging
from csv import writer as csv_writer
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from src.cli import run_entry_point
from src.core.errors import UserError, require_at_least
from src.runs import Run

if TYPE_CHECKING:
    from torch import Tensor

    from src.core.spec import DataSpec

log = logging.getLogger(__name__)

_GRID = "grid.png"
_POINTS = ("points.csv", "points.npy")  # in the order they are written


def sample(config: DictConfig) -> None:
    """Write n samples; sample i depends on the seed and i alone."""
    import torch

    from src.core.protocols import CanSample
    from src.evaluation.protocol import draw_samples, spread_classes
    from src.experiment import load_spec, load_trained_model

    run = Run.open(Path(config.run))
    of_run = run.config()
    spec = load_spec(run, of_run)
    model, about = load_trained_model(run, of_run, spec, config.checkpoint)
    if not isinstance(model, CanSample):
        raise UserError(f"model={of_run.name.model} draws no samples (it has no CanSample); sample a model that does")
    if config["class"] is not None and not model.is_conditional:
        raise UserError(f"class={config['class']} cannot be asked of model={of_run.name.model}: it is not conditional")
    device = next(model.parameters()).device
    chosen = None if config["class"] is None else _class_number(config["class"], spec.class_names)
    condition = None
    if model.is_conditional:
        turns = spread_classes(spec, config.n, device)
        condition = turns if chosen is None else torch.full_like(turns, chosen)
    batches = draw_samples(model, config.n, config.batch_size, config.seed, condition)
    samples = torch.cat(list(batches))

    which = about["checkpoint"] if chosen is None else f"{about['checkpoint']}_class{chosen}"
    folder = Path(config.out) if config.out else run.samples / f"drawn_seed{config.seed}_{which}"
    if spec.modality == "image":
        _write_images(folder, spec, samples, spec.num_classes if condition is not None and chosen is None else 8)
    else:
        _write_points(folder, of_run, spec, samples, condition)
    log.info(f"{config.n} samples of the {about['checkpoint']} checkpoint ({about['weights']} weights) in {folder}")


def _write_images(folder: Path, spec: "DataSpec", samples: "Tensor", per_row: int) -> None:
    """The grid and a PNG file for each image."""
    from torchvision.utils import save_image

    from src.training.callbacks.pictures import image_grid

    _empty(folder)
    save_image(image_grid(spec, samples, per_row) / 255, folder / _GRID)
    width = max(5, len(str(len(samples) - 1)))
    for i, image in enumerate(spec.to_bytes(samples).cpu()):
        save_image(image / 255, folder / f"{i:0{width}d}.png")


def _write_points(
    folder: Path, of_run: DictConfig, spec: "DataSpec", samples: "Tensor", condition: "Tensor | None"
) -> None:
    """All values `(n, D)` as float32 in points.npy and, with a name and a class for each column, in points.csv.

    In two dimensions also points.png, over points of the data.
    """
    import numpy as np
    from torchvision.utils import save_image

    from src.experiment import load_data
    from src.training.callbacks.pictures import is_drawn_as_points, point_picture

    csv, npy = (folder / name for name in _POINTS)
    folder.mkdir(parents=True, exist_ok=True)
    if npy.exists() and not csv.exists():  # ours is written behind the other
        raise UserError(f"out={folder} holds points of someone else ({npy.name}); give another folder")
    x = samples.flatten(1).float().cpu().numpy()
    classes = None if condition is None else [spec.class_names[k] for k in condition.tolist()]
    names = [f"x{i}" for i in range(x.shape[1])] + ([] if classes is None else ["class"])
    with csv.open("w", newline="") as file:
        writer = csv_writer(file)
        writer.writerow(names)
        for i, row in enumerate(x.tolist()):
            writer.writerow(row if classes is None else [*row, classes[i]])
    np.save(npy, x)
    if is_drawn_as_points(spec):
        picture = point_picture(samples, load_data(of_run).held_out_points())
        save_image(picture / 255, folder / "points.png")


def _class_number(given: int | str, names: tuple[str, ...]) -> int:
    """The number of a class that is given by its name or its number; names come first."""
    wanted = str(given)
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    raise UserError(f"class={given} is not known; allowed: {', '.join(names)}, or a number from 0 to {len(names) - 1}")


def _empty(folder: Path) -> None:
    """Make the folder, or remove the samples of an earlier call; the grid, written first, tells that they are ours."""
    folder.mkdir(parents=True, exist_ok=True)
    numbered = [file for file in folder.glob("*.png") if file.stem.isdecimal()]
    if numbered and not (folder / _GRID).exists():
        raise UserError(f"out={folder} holds pictures of someone else ({numbered[0].name}); give another folder")
    for file in numbered:
        file.unlink()


def _check(config: DictConfig) -> None:
    Run.open(Path(config.run))
    for key in ("n", "batch_size"):
        require_at_least(key, config[key], 1)


def main() -> None:
    run_entry_point("sample", sample, _check)


if __name__ == "__main__":
    main()
