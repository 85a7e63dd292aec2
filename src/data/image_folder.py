"""Any folder or zip of images; sub-folders are classes."""

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps
from rich.progress import track

from src.core.errors import UserError, require_at_least
from src.data.arrays import Arrays, prepare_images, split_indices

__all__ = ["image_folder"]

_MIN_IMAGES = 10


def image_folder(
    path: str, test_path: str | None, cache: str, values: str, size: int, colour: bool, held_out: float
) -> Arrays:
    """Images of any size and format that Pillow reads, resized and cropped to squares.

    Every image must lie in a sub-folder (its class), or none of them (no labels). Folders that all images share are
    skipped, so a zip of `train/cat/1.jpg`, `train/dog/2.jpg` has the classes cat and dog. Hidden files are passed over.

    Args:
        path: folder or zip of the images.
        test_path: folder or zip of the test images; None takes a share of `path`.
        cache: folder of prepared data sets.
        values: "discrete", "binary_static", "binary_dynamic" or "continuous".
        size: side of the squares in pixels; the shorter side is resized to it and the longer one cropped at both ends.
        colour: three channels (RGB) if True, one (grey) if False.
        held_out: share of the images for validation, and again for the test if there is no `test_path`.
    """
    if not 0 < held_out < 0.5:
        raise UserError(f"data.held_out={held_out} must be a share between 0 and 0.5")
    require_at_least("data.size", size, 1)
    images = _find(path)
    test_images = _find(test_path) if test_path is not None else None
    source = {"path": images.digest(), "size": size, "colour": colour, "held_out": held_out}
    source["test_path"] = test_images.digest() if test_images else None

    def make(folder: Path) -> tuple[str, ...]:
        labels, class_names = images.classes()
        num_images = len(images.names)
        num_held_out = max(1, round(held_out * num_images))
        num_test = 0 if test_images else num_held_out
        if num_held_out + num_test >= num_images:
            raise UserError(
                f"data.held_out={held_out} leaves none of the {num_images} images of {path} to train on; lower it"
            )
        parts = split_indices(num_images, num_held_out, num_test)
        for split, index in parts.items():
            if len(index):
                _write(folder, split, images, index, labels, size, colour)
        if test_images:
            test_labels, test_class_names = test_images.classes()
            if test_class_names != class_names:
                raise UserError(f"{path} has the classes {class_names}, but {test_path} has {test_class_names}")
            _write(folder, "test", test_images, np.arange(len(test_images.names)), test_labels, size, colour)
        return class_names

    return prepare_images("image_folder", cache, source, levels=256, values=values, make=make)


@dataclass(frozen=True)
class _Images:
    """The images of a folder or zip: their names and a way to read one."""

    root: str
    names: list[str]  # sorted, with "/" between folders
    stamps: list[tuple[int, int]]  # size in bytes and time or checksum
    read: Callable[[str], bytes]

    def digest(self) -> str:
        listing = "\n".join(f"{name} {stamp}" for name, stamp in zip(self.names, self.stamps, strict=True))
        return hashlib.sha256(listing.encode()).hexdigest()

    def classes(self) -> tuple[np.ndarray | None, tuple[str, ...]]:
        """Labels `(N,)` and class names; None and () if the images are in no sub-folders."""
        folders = [PurePosixPath(name).parts[:-1] for name in self.names]
        shared = 0
        while all(len(parts) > shared and parts[shared] == folders[0][shared] for parts in folders):
            shared += 1
        outside = [name for name, parts in zip(self.names, folders, strict=True) if len(parts) == shared]
        if len(outside) == len(self.names):
            return None, ()
        if outside:
            raise UserError(
                f"{outside[0]} in {self.root} lies beside the class folders; put every image into a sub-folder, or none"
            )
        class_names = tuple(sorted({parts[shared] for parts in folders}))
        index = {name: i for i, name in enumerate(class_names)}
        return np.array([index[parts[shared]] for parts in folders], dtype=np.int64), class_names


def _find(path: str) -> _Images:
    root = Path(path)
    if root.is_dir():
        images = _find_in_folder(root)
    elif root.is_file() and zipfile.is_zipfile(root):
        images = _find_in_zip(root)
    else:
        problem = "is neither a folder nor a zip" if root.exists() else "does not exist"
        raise UserError(f"data.path={path} {problem}; give a folder or a zip of images")
    if not images.names:
        raise UserError(f"there is no file in {path}; give a folder or a zip of images with data.path=")
    if len(images.names) < _MIN_IMAGES:
        count = "only one image" if len(images.names) == 1 else f"only {len(images.names)} images"
        raise UserError(f"{path} holds {count}; at least {_MIN_IMAGES} are needed to train and hold some out")
    return images


def _find_in_folder(root: Path) -> _Images:
    files = (file.relative_to(root) for file in root.rglob("*") if file.is_file())
    names = sorted(file.as_posix() for file in files if _is_wanted(file.parts))  # the order of a zip of this folder
    stats = [(root / name).stat() for name in names]
    return _Images(
        root=str(root),
        names=names,
        stamps=[(stat.st_size, stat.st_mtime_ns) for stat in stats],
        read=lambda name: (root / name).read_bytes(),
    )


def _find_in_zip(root: Path) -> _Images:
    try:
        archive = zipfile.ZipFile(root)
    except zipfile.BadZipFile as error:
        raise UserError(f"data.path={root} is a broken zip ({error}); copy or make it anew") from error
    entries = sorted(
        (entry for entry in archive.infolist() if not entry.is_dir() and _is_wanted(PurePosixPath(entry.filename).parts)),
        key=lambda entry: entry.filename,
    )
    return _Images(
        root=str(root),
        names=[entry.filename for entry in entries],
        stamps=[(entry.file_size, entry.CRC) for entry in entries],
        read=archive.read,
    )


def _is_wanted(parts: tuple[str, ...]) -> bool:
    """Not hidden, and none of the litter that desktops leave."""
    return not any(part.startswith((".", "__MACOSX")) or part in ("Thumbs.db", "desktop.ini") for part in parts)


def _write(
    folder: Path, split: str, images: _Images, index: np.ndarray, labels: np.ndarray | None, size: int, colour: bool
) -> None:
    shape = (len(index), 3 if colour else 1, size, size)
    x = np.lib.format.open_memmap(folder / f"{split}_x.npy", mode="w+", dtype=np.uint8, shape=shape)
    names = [images.names[i] for i in index]
    for i, pixels in enumerate(_decode_all(images, names, size, colour, f"decoding {split} images")):
        x[i] = pixels
    x.flush()
    if labels is not None:
        np.save(folder / f"{split}_y.npy", labels[index])


def _decode_all(images: _Images, names: list[str], size: int, colour: bool, what: str) -> Iterator[np.ndarray]:
    def decode(name: str, content: bytes) -> np.ndarray:
        try:
            return _decode(content, size, colour)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{name} in {images.root} is not a readable image ({error}); mend or remove it") from error

    # reading stays in this thread (a zip has one file position); decoding releases the interpreter lock
    with ThreadPoolExecutor() as pool:
        for first in track(range(0, len(names), 256), description=what, transient=True):
            some = names[first : first + 256]
            yield from pool.map(decode, some, [_read(images, name) for name in some])


def _read(images: _Images, name: str) -> bytes:
    try:
        return images.read(name)
    except (OSError, zipfile.BadZipFile, RuntimeError, zipfile.zlib.error) as error:
        raise UserError(f"{name} in {images.root} cannot be read ({error}); mend or remove it") from error


def _decode(content: bytes, size: int, colour: bool) -> np.ndarray:
    """One encoded image to `(C, size, size)` uint8."""
    with Image.open(io.BytesIO(content)) as image:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            raise ValueError(f"its pixels have mode {image.mode}; convert it to 8 bits a channel")
        upright = ImageOps.exif_transpose(image).convert("RGB" if colour else "L")
    square = ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(square, dtype=np.uint8)
    return pixels.transpose(2, 0, 1) if colour else pixels[None]
