"""Preparation: any data set becomes memory-mapped arrays beside a small JSON, once.

A prepared data set is a folder

    <cache>/<name>-<key>/   meta.json   train_x.npy train_y.npy   test_x.npy test_y.npy   (val likewise)
                            units.json, where vectors were standardized

where the key is a hash of where the data came from and how it was cut, so that a changed source is never served stale.
The folder is written under another name and renamed when whole: a killed preparation leaves nothing that looks finished.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from src.core.density import Density
from src.core.errors import UserError
from src.core.spec import BINARY_DYNAMIC, BINARY_STATIC, CONTINUOUS, DISCRETE, DataSpec, OwnUnits, Values
from src.core.stack import Stack
from src.core.tokens import Tokenizer
from src.data.token_windows import TokenWindows

__all__ = [
    "Arrays", "Split", "damaged", "fingerprint_of", "image_values", "prepare", "prepare_images", "prepared_folder",
    "save_in_chunks", "save_own_units", "save_splits", "split_indices",
]  # fmt: skip

log = logging.getLogger(__name__)

_HASHED_EXAMPLES = 4096  # at a time
_UNITS = "units.json"


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Args:
        x: `(N, *event)` uint8 levels or uint16 tokens, or float32 values in data units, memory-mapped; or the windows of a
            stream of tokens, which behave as such an array.
        y: `(N,)` int64 class labels, or None.
    """

    x: Any
    y: np.ndarray | None

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def sha256(self) -> str:
        """Hash of the arrays' bytes as they are now, whatever was written down when they were prepared."""
        digest = hashlib.sha256()
        for array in (self.x,) if self.y is None else (self.x, self.y):
            for start in range(0, len(array), _HASHED_EXAMPLES):
                digest.update(array[start : start + _HASHED_EXAMPLES].tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Arrays:
    """A prepared data set.

    Args:
        spec: what one example is, as models see it.
        source_levels: number of integer levels in the arrays (256 for 8-bit images), or None if they hold real numbers.
        splits: "train", "val" and "test".
        fingerprint: hash of the arrays' bytes; two data sets with the same fingerprint are the same.
        density: what the examples were drawn from, if it is known.
        stack: how the examples are made of smaller images, if they are.
        tokenizer: what the tokens of texts mean, if the examples are some.
        text_sha256: hash of the training text and the test text as characters, whatever their tokens are, where it is kept.
    """

    spec: DataSpec
    source_levels: int | None
    splits: dict[str, Split]
    fingerprint: str
    density: Density | None = None
    stack: Stack | None = None
    tokenizer: Tokenizer | None = None
    text_sha256: str | None = None

    @property
    def streams(self) -> dict[str, np.ndarray]:
        """Of texts, all tokens of each split `(T,)` uint16 in their order, of which the examples are windows; else none."""
        windows = {name: split.x for name, split in self.splits.items()}
        return {name: x.stream for name, x in windows.items() if isinstance(x, TokenWindows)}


def prepare_images(
    name: str,
    cache: str,
    source: dict[str, Any],
    levels: int,
    values: str,
    make: Callable[[Path], tuple[str, ...]],
    stack: Stack | None = None,
) -> Arrays:
    """As `prepare`, of images: `levels` integer levels, seen by models as `values`, e.g. "discrete"."""
    return prepare(name, cache, source, "image", image_values(values, levels), levels, make, stack=stack)


def prepare(
    name: str,
    cache: str,
    source: dict[str, Any],
    modality: str,
    values: Values,
    source_levels: int | None,
    make: Callable[[Path], tuple[str, ...]],
    density: Density | None = None,
    stack: Stack | None = None,
) -> Arrays:
    """Return the prepared arrays of a data set, making them first if they are not there.

    Args:
        name: the data set's name.
        cache: folder of all prepared data sets.
        source: what the arrays depend on, as plain JSON types.
        modality: "image" or "vector".
        values: what a value is, as models shall see it.
        source_levels: number of integer levels in the arrays; None if they hold real numbers.
        make: writes `<split>_x.npy` and `<split>_y.npy` into a folder and returns the class names (empty: no labels); of
            vectors that it has standardized also what they were (`save_own_units`).
        density: what the examples are drawn from, if it is known.
        stack: how the examples are made of smaller images, if they are.
    """
    folder = prepared_folder(name, cache, source, make)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits = {split: _open_split(folder, split, bool(meta["class_names"])) for split in ("train", "val", "test")}
        own_units = _read_own_units(folder)
    except (OSError, ValueError, KeyError) as error:
        raise damaged(folder, error) from error
    spec = DataSpec(
        name=name,
        modality=modality,
        shape=splits["train"].x.shape[1:],
        values=values,
        class_names=tuple(meta["class_names"]),
        own_units=own_units,
    )
    return Arrays(spec, source_levels, splits, fingerprint_of(meta["sha256"]), density, stack)


def prepared_folder(name: str, cache: str, source: dict[str, Any], make: Callable[[Path], tuple[str, ...]]) -> Path:
    """The folder of a prepared data set, made first if it is not there; arguments as of `prepare`."""
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(cache) / f"{name}-{key}"
    if not (folder / "meta.json").exists():
        _make_folder(folder, name, source, make)
    return folder


def damaged(folder: Path, error: Exception) -> UserError:
    """What to say of a prepared data set that cannot be read."""
    return UserError(f"the prepared data in {folder} is damaged ({error}); delete that folder to prepare anew")


def fingerprint_of(sums: dict[str, str]) -> str:
    """The fingerprint of a data set from the SHA-256 of each of its files, by name."""
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def image_values(kind: str, levels: int) -> Values:
    """The values of images in [-1, 1] by their kind; raises `UserError` for an unknown one."""
    known = {DISCRETE: levels, BINARY_STATIC: 2, BINARY_DYNAMIC: 2, CONTINUOUS: None}
    if kind not in known:
        raise UserError(f"data.values={kind} is not known; allowed: {', '.join(known)}")
    return Values(kind, low=-1.0, high=1.0, levels=known[kind])


def split_indices(num_examples: int, num_val: int, num_test: int) -> dict[str, np.ndarray]:
    """Cut shuffled indices 0 .. N-1 into train, val and test, always in the same way for the same three numbers."""
    assert num_examples > num_val + num_test
    order = np.random.default_rng(0).permutation(num_examples)
    test, val, train = np.split(order, [num_test, num_test + num_val])
    return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}


def save_splits(folder: Path, parts: Iterable[tuple[str, np.ndarray, np.ndarray | None]]) -> None:
    """Write whole arrays `(split, x (N, *event) uint8 or float32, y (N,) or None)` in the layout of a prepared data set."""
    for split, x, y in parts:
        assert x.dtype in (np.uint8, np.float32)
        np.save(folder / f"{split}_x.npy", x)
        if y is not None:
            np.save(folder / f"{split}_y.npy", y.astype(np.int64))


def save_own_units(folder: Path, own_units: OwnUnits) -> None:
    """Write what the values of vectors were before they were standardized, beside them."""
    (folder / _UNITS).write_text(json.dumps(asdict(own_units)))


def save_in_chunks(folder: Path, split: str, shape: tuple[int, ...], x: Iterable[np.ndarray], y: np.ndarray) -> None:
    """As `save_splits`, of one split that need not fit into memory.

    Args:
        shape: of the whole array, `(N, *event)`.
        x: its parts `(B, *event)` uint8, in order.
        y: `(N,)`.
    """
    whole = np.lib.format.open_memmap(folder / f"{split}_x.npy", mode="w+", dtype=np.uint8, shape=shape)
    start = 0
    for some in x:
        whole[start : start + len(some)] = some
        start += len(some)
    assert start == len(whole) == len(y)
    whole.flush()
    np.save(folder / f"{split}_y.npy", y.astype(np.int64))


def _make_folder(folder: Path, name: str, source: dict[str, Any], make: Callable[[Path], tuple[str, ...]]) -> None:
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process that had our number
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write the prepared data to {folder}: {error.strerror} (set data.cache=)") from error
    try:
        log.info(f"preparing data={name} once, in {folder}")
        class_names = make(unfinished)
        sums = {file.name: _sha256(file) for file in sorted(unfinished.glob("*.npy"))}
        meta = {"name": name, "class_names": class_names, "source": source, "sha256": sums}
        (unfinished / "meta.json").write_text(json.dumps(meta, indent=2))
        _rename_unless_there(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _rename_unless_there(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not (folder / "meta.json").exists():  # otherwise another process was faster; its arrays are the same
            raise


def _read_own_units(folder: Path) -> OwnUnits | None:
    file = folder / _UNITS
    return OwnUnits.from_dict(json.loads(file.read_text())) if file.exists() else None


def _open_split(folder: Path, split: str, has_labels: bool) -> Split:
    x = np.load(folder / f"{split}_x.npy", mmap_mode="r")
    return Split(x, np.load(folder / f"{split}_y.npy") if has_labels else None)
