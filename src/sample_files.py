"""The files of what was drawn: PNG files of images, arrays and pictures of points, texts; other files are left alone."""

import json
import os
import re
from collections.abc import Callable
from csv import writer as csv_writer
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import save_image

from src.core.drawing import MixedStyles
from src.core.errors import UserError
from src.core.sound import Sound, to_waveform
from src.core.spec import DataSpec
from src.data.loading import ArrayData
from src.training.callbacks.pictures import image_grid
from src.training.callbacks.point_pictures import curve_picture, density_picture, is_drawn_as_points, point_picture
from src.training.callbacks.sound_files import joined, write_wav

__all__ = ["SampleFiles"]

_MARKER = ".drawn"
_DIGITS = 5  # at least, of the number of an image
_SAMPLE = re.compile(rf"\d{{{_DIGITS},}}\.(png|txt|wav)")
_MAIN = re.compile(
    r"(grid|points|density|interpolation|classes|styles|reconstruction|traversal|posterior|inpainting)\.(png|npy|csv|wav)"
)


class SampleFiles:
    """Writes into one folder, each kind of picture into files of its own. The methods give the names of the main ones.

    Args:
        folder: made when it is needed.
        spec: what the examples are.
        load_data: the data set, behind pictures of points.
        is_of_run: whether the folder is one that a run keeps for samples. There, what has no marker is of an older version.
    """

    def __init__(self, folder: Path, spec: DataSpec, load_data: Callable[[], ArrayData], is_of_run: bool) -> None:
        self._folder = folder
        self._spec = spec
        self._load_data = load_data
        self._own = _OwnFiles(folder, is_of_run)
        self.has_density = is_drawn_as_points(spec)

    def write_samples(self, x: Tensor, classes: Tensor | None, per_row: int) -> str:
        """Images `(N, *event)` as a PNG file each, and a grid; vectors as points.npy and points.csv, and a picture.

        Sounds as a WAV file each, and a grid of their log-mels.
        """
        if self._spec.sound is not None:
            return self._write_sounds(x, self._spec.sound, per_row)
        return self._write_images(x, per_row) if self._spec.modality == "image" else self._write_points(x, classes)

    def write_texts(self, texts: list[str]) -> str:
        """A file each, 00000.txt and so on."""
        names = _numbered(len(texts), "txt")
        self._own.claim(names, instead_of=_SAMPLE)
        for name, text in zip(names, texts, strict=True):
            (self._folder / name).write_text(text, encoding="utf-8", newline="")
        return names[0]

    def write_rows(self, kind: str, x: Tensor) -> str:
        """Images `(num_rows, num_columns, *event)` as one grid KIND.png; vectors as KIND.npy.

        Of points in the plane KIND.png has each row in a colour of its own. Sounds as a grid of their log-mels, and as
        KIND.wav, row by row.
        """
        if self._spec.sound is not None:
            self._own.claim([f"{kind}.png", f"{kind}.wav"])
            clips = to_waveform(x.flatten(0, 1), self._spec.sound)
            write_wav(self._folder / f"{kind}.wav", joined(clips, self._spec.sound), self._spec.sound.sample_rate)
            return self._save(image_grid(self._spec, x.flatten(0, 1), x.shape[1]), f"{kind}.png")
        if self._spec.modality == "image":
            self._own.claim([f"{kind}.png"])
            return self._save(image_grid(self._spec, x.flatten(0, 1), x.shape[1]), f"{kind}.png")
        self._own.claim([f"{kind}.npy", *([f"{kind}.png"] if self.has_density else [])])
        np.save(self._folder / f"{kind}.npy", self._spec.to_own_units(x.flatten(2).float()).cpu().numpy())
        if not self.has_density:
            return f"{kind}.npy"
        return self._save(curve_picture(x, self._load_data().held_out_points()), f"{kind}.png")

    def write_styles(self, drawn: MixedStyles) -> str:
        """One grid styles.png: the sources of the coarse styles above, of the fine ones on the left."""
        self._own.claim(["styles.png"])
        middle = (self._spec.values.low + self._spec.values.high) / 2
        corner = torch.full_like(drawn.coarse[:1], middle)
        rows = [torch.cat([drawn.fine[:, None], drawn.mixed], 1).flatten(0, 1)]
        grid = torch.cat([corner, drawn.coarse, *rows])
        return self._save(image_grid(self._spec, grid, len(drawn.coarse) + 1), "styles.png")

    def write_density(self, x: Tensor) -> str:
        """The density of points `(N, 2)` beside that of the data."""
        self._own.claim(["density.png"])
        data = self._load_data()
        density = data.arrays.density
        picture = density_picture(x, data.held_out_points(), None if density is None else density.log_prob)
        return self._save(picture, "density.png")

    def _write_images(self, x: Tensor, per_row: int) -> str:
        names = _numbered(len(x), "png")
        self._own.claim(["grid.png", *names], instead_of=_SAMPLE)
        for name, image in zip(names, self._spec.to_bytes(x).cpu(), strict=True):
            self._save(image, name)
        return self._save(image_grid(self._spec, x, per_row), "grid.png")

    def _write_sounds(self, x: Tensor, sound: Sound, per_row: int) -> str:
        names = _numbered(len(x), "wav")
        self._own.claim(["grid.png", *names], instead_of=_SAMPLE)
        for name, clip in zip(names, to_waveform(x, sound), strict=True):
            write_wav(self._folder / name, clip, sound.sample_rate)
        return self._save(image_grid(self._spec, x, per_row), "grid.png")

    def _write_points(self, samples: Tensor, classes: Tensor | None) -> str:
        """All values `(n, D)` in points.npy and, with a name and a class for each column, in points.csv: in the units that
        the data came in, else as float32."""
        pictures = ["points.png", "density.png"] if self.has_density else []  # density.png: all of it or nothing
        self._own.claim(["points.csv", "points.npy", *pictures])
        x, columns, label = self._in_own_units(samples)
        names = None if classes is None else [self._spec.class_names[k] for k in classes.tolist()]
        with (self._folder / "points.csv").open("w", newline="") as file:
            writer = csv_writer(file)
            writer.writerow([*columns, *([] if names is None else [label])])
            for i, row in enumerate(x.tolist()):
                writer.writerow(row if names is None else [*row, names[i]])
        np.save(self._folder / "points.npy", x)
        if self.has_density:
            self._save(point_picture(samples, self._load_data().held_out_points()), "points.png")
        return "points.npy"

    def _in_own_units(self, x: Tensor) -> tuple[np.ndarray, list[str], str]:
        """The values `(n, D)` in the units the data came in, the name of each column, and that of the classes."""
        own, values = self._spec.own_units, self._spec.to_own_units(x.flatten(1).float()).cpu().numpy()
        if own is None:
            return values, [f"x{i}" for i in range(values.shape[1])], "class"
        return values, list(own.columns), own.label or "class"

    def _save(self, picture: Tensor, name: str) -> str:
        save_image(picture / 255, self._folder / name)
        return name


def _numbered(count: int, suffix: str) -> list[str]:
    """Names of so many samples in their order, all of one length."""
    width = max(_DIGITS, len(str(count - 1)))
    return [f"{i:0{width}d}.{suffix}" for i in range(count)]


class _OwnFiles:
    """Which files of a folder this program has drawn: those that its file .drawn names. All others are left alone.

    Args:
        folder: made with the first claim.
        adopts: without .drawn, whether files with names that this program gives are its own.
    """

    def __init__(self, folder: Path, adopts: bool) -> None:
        self._folder = folder
        self._adopts = adopts

    def claim(self, names: list[str], instead_of: re.Pattern[str] | None = None) -> None:
        """Make files of these names ours, before they are written, and remove those of ours that they are instead of.

        Raises:
            UserError: one of them is there and not ours; nothing has been changed then. Or the folder cannot be written to.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            ours = self._ours()
            for name in names:
                if name not in ours and os.path.lexists(self._folder / name):
                    raise self._foreign(name)
            outdated = {name for name in ours if instead_of is not None and instead_of.fullmatch(name)}
            for name in outdated:
                (self._folder / name).unlink()
            self._list({*(ours - outdated), *names})
        except OSError as error:
            raise UserError(f"out={self._folder} cannot be written to ({error.strerror}); give another folder") from error

    def _ours(self) -> set[str]:
        """The names of our files that are still there."""
        marker = self._folder / _MARKER
        if not marker.exists():
            there = {file.name for file in self._folder.iterdir()} if self._adopts else set()
            return {name for name in there if _SAMPLE.fullmatch(name) or _MAIN.fullmatch(name)}
        try:
            listed = json.loads(marker.read_text())
        except ValueError as error:
            raise self._foreign(_MARKER) from error
        if not (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
            raise self._foreign(_MARKER)
        return {name for name in listed if os.path.lexists(self._folder / name)}

    def _list(self, names: set[str]) -> None:
        """Write the marker in one step, so that a call that is killed leaves the old one or the new one."""
        unfinished = self._folder / f"{_MARKER}.unfinished"
        unfinished.write_text(json.dumps(sorted(names)))
        unfinished.replace(self._folder / _MARKER)

    def _foreign(self, name: str) -> UserError:
        return UserError(f"out={self._folder} holds {name}, which was not drawn by this program; give another folder")
