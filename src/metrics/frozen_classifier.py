"""Classifiers whose weights never change again, in safetensors files: what `fd`, `cs` and their kin are measured on.

A retrained classifier gives other values (metrics move by 10 to 20 %), so values are comparable only on the same weights.
The file says of what network they are, of what data, and how often it is right; its SHA-256 stands on every card.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from src.core.errors import NotApplicable
from src.core.spec import DataSpec
from src.metrics.tensor_files import read_tensors, write_tensors

__all__ = ["SHIPPED", "find_frozen", "frozen_file", "read_frozen", "write_frozen"]

SHIPPED = Path(__file__).parent / "classifiers"
"""The folder of those that come with the project."""

_ABOUT = {"network": dict, "data": str, "in_shape": list, "class_names": list, "accuracy": float}


def write_frozen(file: Path, network: nn.Module, about: dict[str, Any]) -> str:
    """Write a network's weights and what a reader must know of them; returns the SHA-256 of the file.

    Args:
        about: plain JSON types; see `read_frozen`.
    """
    write_tensors(file, network.state_dict(), json.dumps(about))
    return _sha256(file)


def read_frozen(file: Path, sha256: str | None) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Weights, what is known of them, and the file's SHA-256.

    What is known has the keys `network` (its `_target_` and arguments), `data` (a name), `in_shape`, `class_names` and
    `accuracy` (share of the test images that it is right on); that of sounds also `sound`, how it sees them.

    Raises `NotApplicable` if the file cannot be read, or is not the one that is asked for.

    Args:
        sha256: what the file's hash must be; None takes any.
    """
    if not file.is_file():
        raise NotApplicable(f"evaluation.classifier.file={file} is not a file")
    try:
        found = _sha256(file)
        state, text = read_tensors(file)
        about = json.loads(text)
    except (OSError, ValueError) as error:
        raise NotApplicable(f"{file} is no frozen classifier ({error})") from error
    if sha256 is not None and found != sha256:
        raise NotApplicable(
            f"the classifier {file} has the SHA-256 {found[:12]}..., but evaluation.classifier.sha256 asks for "
            f"{sha256[:12]}...; values on other weights are not comparable, so nothing is measured on it"
        )
    for key, kind in _ABOUT.items():
        if not isinstance(about, dict) or not isinstance(about.get(key), kind):
            raise NotApplicable(f"{file} is no frozen classifier (it does not say its {key})")
    return state, about, found


def frozen_file(folder: Path, spec: DataSpec, fingerprint: str) -> Path:
    """Where the frozen classifier of a prepared data set is kept, one for each kind of values; of sounds one for all."""
    kind = spec.values.kind if spec.sound is None else "sound"
    return folder / f"{spec.name}-{kind}-{fingerprint[:12]}.safetensors"


def find_frozen(named: str | None, folder: Path, spec: DataSpec, fingerprint: str) -> Path:
    """The file that is named (without a folder: one that ships with the project), or else the one made of these data."""
    if named is not None:
        return SHIPPED / named if Path(named).name == named else Path(named)
    file = frozen_file(folder, spec, fingerprint)
    if not file.is_file():
        raise NotApplicable(
            f"there is no frozen classifier of data={spec.name} (make one: python -m src.train experiment=classifier "
            f"data={spec.name} ..., with the same data settings)"
        )
    return file


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
