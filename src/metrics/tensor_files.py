"""Tensors with a text beside them in one safetensors file: written in one step, read without running any code."""

import secrets
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

__all__ = ["read_tensors", "write_tensors"]

_TEXT = "text"


def write_tensors(file: Path, tensors: dict[str, Tensor], text: str) -> None:
    """Write a file, or replace it in one step, so that no reader ever sees half of it. Raises `OSError`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.unfinished-{secrets.token_hex(4)}")
    try:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        unfinished.write_bytes(save(plain, metadata={_TEXT: text}))
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def read_tensors(file: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file and its text. Raises `OSError`, or `ValueError` for a file that is none of ours."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
            return tensors, (opened.metadata() or {})[_TEXT]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
