"""Any table of numbers: data=table data.path=FILE, a CSV file with or without a header, or a NumPy file.

Each column is standardized with the mean and the standard deviation of the training rows. Likelihoods are reported in the
table's own units all the same, and samples are written in them: the spec knows both (`DataSpec.own_units`).
"""

import array
import csv
import itertools
import logging
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from src.core.errors import UserError
from src.core.spec import CONTINUOUS, OwnUnits, Values
from src.data.arrays import Arrays, prepare, save_own_units, save_splits, split_indices

__all__ = ["table"]

log = logging.getLogger(__name__)

_MIN_ROWS = 20
_FEW_VALUES = 10  # that a column of many rows takes: it is hardly one of real numbers
_DELIMITERS = ("\t", ";", ",")  # the first one that is in the first line; without any it is white space
_MISSING = ("", "na", "n/a", "#n/a", "<na>", "null", "none", "?", "-", ".")  # how programs write it, beside nan
_ALLOWED = "data.path= must be a CSV file in UTF-8, or an .npy or .npz file, of numbers"


def table(path: str, label: str | int | None, val: float, test: float, cache: str) -> Arrays:
    """The rows of a table `(N, D)`, cut into training, validation and test rows, always in the same way.

    A CSV file has its values between tabs, semicolons, commas or white space. Its first line is a header if none of its
    cells is a number, and not all are missing values. Columns without a name are called x0, x1, ...

    Args:
        path: a CSV file, an .npy file of one array, or an .npz file of one array (and one of classes).
        label: the column of classes, or None without one; of an .npz file also the name of an array `(N,)`.
        val: share of the rows for validation; from 1 on, how many rows.
        test: the same for the test.
        cache: folder of prepared data sets.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"data.path={path} {'is no file' if file.exists() else 'does not exist'}; {_ALLOWED}")
    _require_share("data.val", val)
    _require_share("data.test", test)
    label = None if label is None else str(label)
    stat = file.stat()
    source = {"path": str(file.resolve()), "size": stat.st_size, "time": stat.st_mtime_ns}
    source |= {"label": label, "val": val, "test": test}

    def make(folder: Path) -> tuple[str, ...]:
        found = _read_numpy(file, label) if file.suffix.lower() in (".npy", ".npz") else _read_csv(file, label)
        _require_usable(found, path)
        parts = _cut(len(found.x), val, test, path)
        shift, scale = _moments(found, parts["train"], path)
        y, class_names = (None, ()) if found.labels is None else _classes(found.labels, label, path)
        x = ((found.x - shift) / scale).astype(np.float32)
        save_splits(folder, ((part, x[rows], None if y is None else y[rows]) for part, rows in parts.items()))
        save_own_units(folder, OwnUnits(found.columns, tuple(shift.tolist()), tuple(scale.tolist()), label))
        return class_names

    values = Values(CONTINUOUS, low=-math.inf, high=math.inf, levels=None)
    return prepare("table", cache, source, modality="vector", values=values, source_levels=None, make=make)


@dataclass(frozen=True)
class _Table:
    """What a file holds.

    Args:
        columns: D names, without the column of classes.
        x: `(N, D)` float64.
        labels: N classes in words, or None.
        lines: where each row stands in a CSV file; None of an array.
    """

    columns: tuple[str, ...]
    x: np.ndarray
    labels: list[str] | None
    lines: array.array | None

    def place(self, row: int) -> str:
        return f"row {row} (counted from 0)" if self.lines is None else f"line {self.lines[row]}"


# --- CSV files -------------------------------------------------------------------------------------------------------


def _read_csv(file: Path, label: str | None) -> _Table:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            return _parsed(stream, file, label)
    except UnicodeDecodeError as error:
        raise UserError(f"data.path={file} is not text in UTF-8 ({error.reason}); {_ALLOWED}") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"data.path={file} cannot be read as CSV ({error}); {_ALLOWED}") from error


def _parsed(stream: TextIO, file: Path, label: str | None) -> _Table:
    rows = _rows(stream)
    head = list(itertools.islice(rows, 2))
    if not head:
        raise UserError(f"data.path={file} is empty; {_ALLOWED}")
    first_line, first = head[0]
    has_header = _is_header(first)
    columns = _header(first, first_line, file) if has_header else [f"x{i}" for i in range(len(first))]
    place = _place(label, columns, file)
    values, lines, labels = array.array("d"), array.array("q"), []
    for line, row in itertools.chain(head[1:] if has_header else head, rows):
        if len(row) != len(columns):
            raise UserError(
                f"line {line} of {file} has {len(row)} values where line {first_line} has {len(columns)}; mend or remove it"
            )
        if place is not None:
            labels.append(_filled(row.pop(place), line, str(label), file))
        lines.append(line)
        try:
            values.extend(map(float, row))
        except ValueError:
            error = _no_number(row, line, _without(columns, place), file)
            raise _with_hint(error, first) if line == first_line and not has_header else error from None
    kept = _without(columns, place)
    x = np.frombuffer(values, dtype=np.float64) if values else np.zeros(0)
    return _Table(tuple(kept), x.reshape(len(lines), len(kept)), None if place is None else labels, lines)


def _rows(stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    """The cells of each line that is not blank, with its number from 1."""
    line, first = next(((i, text) for i, text in enumerate(stream, 1) if text.strip()), (0, ""))
    if not first:
        return
    first = first.removeprefix("#")  # NumPy's savetxt writes a header so
    delimiter = next((some for some in _DELIMITERS if some in first), None)
    rest = itertools.chain([first], stream)
    if delimiter is None:
        yield from ((line + i, text.split()) for i, text in enumerate(rest) if text.strip())
        return
    reader = csv.reader(rest, delimiter=delimiter, skipinitialspace=True)
    for row in reader:
        if any(cell.strip() for cell in row) or len(row) > 1:
            yield line - 1 + reader.line_num, [cell.strip() for cell in row]


def _is_header(first: list[str]) -> bool:
    """Whether none of the first row is a number. A row with numbers and a gap is one of values, of which one is missing."""
    return not all(map(_is_missing, first)) and not any(map(_is_number, first))


def _is_missing(cell: str) -> bool:
    return cell.lower() in _MISSING


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _header(names: list[str], line: int, file: Path) -> list[str]:
    for i, name in enumerate(names):
        if not name:
            raise UserError(
                f"line {line} of {file} gives column {i + 1} no name; give it one, or remove it (pandas writes its index "
                "so, but for index=False)"
            )
    return names


def _filled(cell: str, line: int, column: str, file: Path) -> str:
    if not cell:
        raise UserError(f"line {line} of {file} has nothing in column {column!r}; fill it in, or remove the line")
    return cell


def _no_number(row: list[str], line: int, columns: list[str], file: Path) -> UserError:
    """Says which cell of a row is none."""
    cell, column = next((cell, name) for cell, name in zip(row, columns, strict=True) if not _is_number(cell))
    try:
        _filled(cell, line, column, file)
    except UserError as error:
        return error
    told = f"line {line} of {file} has {cell[:40]!r} in column {column!r}, which is no number"
    if _is_missing(cell):
        return UserError(f"{told} but a missing value; fill it in, or remove the line")
    return UserError(f"{told}; mend it, remove the column, or take it for the classes with data.label={column}")


def _with_hint(error: UserError, first: list[str]) -> UserError:
    """Of a first row that is neither all names nor all numbers."""
    number = next((cell for cell in first if _is_number(cell)), None)
    if number is None or any(map(_is_missing, first)):
        return error
    return UserError(
        f"{error}; if the line is a header, it may hold no numbers such as {number[:40]} (write x{number[:40]})"
    )


# --- NumPy files -----------------------------------------------------------------------------------------------------


def _read_numpy(file: Path, label: str | None) -> _Table:
    try:
        # never with allow_pickle: what a stranger hands over must not run code
        found = np.load(file, mmap_mode="r" if file.suffix.lower() == ".npy" else None, allow_pickle=False)
        arrays = {"": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise UserError(f"data.path={file} is broken, or holds Python objects ({error}); {_ALLOWED}") from error
    own = arrays.pop(label) if label in arrays and label != "" else None
    if len(arrays) != 1:
        raise UserError(
            f"{file} holds {len(arrays)} arrays ({', '.join(arrays)}); it must hold one, beside one of classes that "
            "data.label= names"
        )
    (x,) = arrays.values()
    if x.ndim != 2 or x.shape[1] == 0:
        raise UserError(f"{file} holds an array of the shape {x.shape}; rows and columns are needed, (N, D)")
    if x.dtype.kind not in "biuf":
        raise UserError(f"{file} holds values of the type {x.dtype}; they must be real numbers")
    columns = [f"x{i}" for i in range(x.shape[1])]
    if own is not None:
        if own.shape != (len(x),):
            raise UserError(
                f"the array {label} in {file} has the shape {own.shape}; one class for each of {len(x)} rows is needed"
            )
        return _Table(tuple(columns), x.astype(np.float64), [_in_words(value) for value in own.tolist()], None)
    place = _place(label, columns, file)
    labels = None if place is None else [_in_words(value) for value in x[:, place].tolist()]
    kept = x if place is None else np.delete(x, place, axis=1)
    return _Table(tuple(_without(columns, place)), kept.astype(np.float64), labels, None)


def _in_words(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


# --- of both ---------------------------------------------------------------------------------------------------------


def _place(label: str | None, columns: list[str], file: Path) -> int | None:
    """Where the column of classes is; None without one."""
    if label is None:
        return None
    if columns.count(label) != 1:
        problem = "is no column" if label not in columns else "is more than one column"
        raise UserError(f"data.label={label} {problem} of {file}; its columns are {', '.join(columns)}")
    if len(columns) == 1:
        raise UserError(f"data.label={label} is the only column of {file}; there must be numbers beside it")
    return columns.index(label)


def _without(columns: list[str], place: int | None) -> list[str]:
    return [name for i, name in enumerate(columns) if i != place]


def _require_usable(found: _Table, path: str) -> None:
    if len(found.x) < _MIN_ROWS:
        raise UserError(f"{path} has {len(found.x)} rows; at least {_MIN_ROWS} are needed to train and hold some out")
    is_bad = ~np.isfinite(found.x)
    if is_bad.any():
        row, column = np.unravel_index(int(is_bad.argmax()), is_bad.shape)
        raise UserError(
            f"{found.place(int(row))} of {path} has {found.x[row, column]} in column {found.columns[column]!r}; "
            "all values must be finite numbers (fill it in, or remove the row)"
        )


def _require_share(key: str, share: float) -> None:
    is_count = share >= 1 and share == int(share) if math.isfinite(share) else False
    if not (is_count or 0 < share < 1):
        raise UserError(f"{key}={share} must be a share of the rows between 0 and 1, or a whole number of rows")


def _cut(num_rows: int, val: float, test: float, path: str) -> dict[str, np.ndarray]:
    """The rows of each split."""
    num_val, num_test = (int(share) if share >= 1 else max(2, round(share * num_rows)) for share in (val, test))
    left = num_rows - num_val - num_test
    if left < 2:
        raise UserError(
            f"data.val={val:g} and data.test={test:g} leave {max(0, left)} of the {num_rows} rows of {path} to train on; "
            "lower them"
        )
    return split_indices(num_rows, num_val, num_test)


def _moments(found: _Table, rows: np.ndarray, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation `(D,)` of some rows."""
    x = found.x[rows]
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = x.mean(0), x.std(0)
    for name, column, value, spread in zip(found.columns, x.T, mean, std, strict=True):
        if (column == column[0]).all():
            raise UserError(f"column {name!r} of {path} is {column[0]:g} in all training rows; remove it")
        if not (math.isfinite(value) and math.isfinite(spread) and spread > 0):
            raise UserError(
                f"column {name!r} of {path} cannot be standardized (mean {value:g}, standard deviation {spread:g})"
            )
        num_values = len(np.unique(column))
        if num_values <= _FEW_VALUES < len(column):
            log.warning(
                f"column {name!r} of {path} has only {num_values} different values: a density may grow without bound at "
                "them, so likelihoods of this table say little"
            )
    return mean, std


def _classes(labels: list[str], label: str | None, path: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class labels `(N,)` and the names of the classes, by size if they are numbers."""
    names = set(labels)
    if not 2 <= len(names) <= len(labels) // 2:
        raise UserError(
            f"data.label={label} has {len(names)} different values in {len(labels)} rows of {path}; "
            f"classes are from 2 to {len(labels) // 2}"
        )
    in_order = sorted(names, key=float) if all(map(_is_number, names)) else sorted(names)
    number = {name: i for i, name in enumerate(in_order)}
    return np.array([number[name] for name in labels], dtype=np.int64), tuple(in_order)
