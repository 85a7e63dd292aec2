"""The files of what was drawn: PNG files of images, arrays and pictures of points."""

from collections.abc import Callable
from csv import writer as csv_writer
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import save_image

from src.core.drawing import MixedStyles
from src.core.errors import UserError
from src.core.spec import DataSpec
from src.data.loading import ArrayData
from src.training.callbacks.pictures import image_grid
from src.training.callbacks.point_pictures import curve_picture, density_picture, is_drawn_as_points, point_picture

__all__ = ["SampleFiles"]

_GRID = "grid.png"
_POINTS = ("points.csv", "points.npy")  # in the order they are written
_PER_ROW = 8


class SampleFiles:
    """Writes into one folder, each kind of picture into files of its own. The methods give the names of the main ones.

    Args:
        folder: made when it is needed.
        spec: what the examples are.
        load_data: the data set, behind pictures of points.
    """

    def __init__(self, folder: Path, spec: DataSpec, load_data: Callable[[], ArrayData]) -> None:
        self._folder = folder
        self._spec = spec
        self._load_data = load_data
        self.has_density = is_drawn_as_points(spec)

    def write_samples(self, x: Tensor, classes: Tensor | None, take_turns: bool) -> str:
        """Images `(N, *event)` as a PNG file each, and a grid; vectors as points.npy and points.csv, and a picture."""
        if self._spec.modality == "image":
            return self._write_images(x, self._spec.num_classes if take_turns else _PER_ROW)
        return self._write_points(x, classes)

    def write_rows(self, kind: str, x: Tensor) -> str:
        """Images `(num_rows, num_columns, *event)` as one grid KIND.png; vectors as KIND.npy.

        Of points in the plane KIND.png has each row in a colour of its own.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._spec.modality == "image":
            return self._save(image_grid(self._spec, x.flatten(0, 1), x.shape[1]), f"{kind}.png")
        np.save(self._folder / f"{kind}.npy", x.flatten(2).float().cpu().numpy())
        if not is_drawn_as_points(self._spec):
            return f"{kind}.npy"
        return self._save(curve_picture(x, self._load_data().held_out_points()), f"{kind}.png")

    def write_styles(self, drawn: MixedStyles) -> str:
        """One grid styles.png: the sources of the coarse styles above, of the fine ones on the left."""
        self._folder.mkdir(parents=True, exist_ok=True)
        middle = (self._spec.values.low + self._spec.values.high) / 2
        corner = torch.full_like(drawn.coarse[:1], middle)
        rows = [torch.cat([drawn.fine[:, None], drawn.mixed], 1).flatten(0, 1)]
        grid = torch.cat([corner, drawn.coarse, *rows])
        return self._save(image_grid(self._spec, grid, len(drawn.coarse) + 1), "styles.png")

    def write_density(self, x: Tensor) -> str:
        """The density of points `(N, 2)` beside that of the data."""
        data = self._load_data()
        mixture = data.arrays.mixture
        picture = density_picture(x, data.held_out_points(), None if mixture is None else mixture.log_prob)
        return self._save(picture, "density.png")

    def _write_images(self, x: Tensor, per_row: int) -> str:
        self._empty()
        name = self._save(image_grid(self._spec, x, per_row), _GRID)
        width = max(5, len(str(len(x) - 1)))
        for i, image in enumerate(self._spec.to_bytes(x).cpu()):
            save_image(image / 255, self._folder / f"{i:0{width}d}.png")
        return name

    def _write_points(self, samples: Tensor, classes: Tensor | None) -> str:
        """All values `(n, D)` as float32 in points.npy and, with a name and a class for each column, in points.csv."""
        csv, npy = (self._folder / name for name in _POINTS)
        self._folder.mkdir(parents=True, exist_ok=True)
        if npy.exists() and not csv.exists():  # ours is written behind the other
            raise UserError(f"out={self._folder} holds points of someone else ({npy.name}); give another folder")
        x = samples.flatten(1).float().cpu().numpy()
        names = None if classes is None else [self._spec.class_names[k] for k in classes.tolist()]
        with csv.open("w", newline="") as file:
            writer = csv_writer(file)
            writer.writerow([f"x{i}" for i in range(x.shape[1])] + ([] if names is None else ["class"]))
            for i, row in enumerate(x.tolist()):
                writer.writerow(row if names is None else [*row, names[i]])
        np.save(npy, x)
        if is_drawn_as_points(self._spec):
            self._save(point_picture(samples, self._load_data().held_out_points()), "points.png")
        return npy.name

    def _save(self, picture: Tensor, name: str) -> str:
        save_image(picture / 255, self._folder / name)
        return name

    def _empty(self) -> None:
        """Make the folder, or remove the samples of an earlier call; the grid, written first, tells that they are ours."""
        self._folder.mkdir(parents=True, exist_ok=True)
        numbered = [file for file in self._folder.glob("*.png") if file.stem.isdecimal()]
        if numbered and not (self._folder / _GRID).exists():
            raise UserError(f"out={self._folder} holds pictures of someone else ({numbered[0].name}); give another folder")
        for file in numbered:
            file.unlink()
