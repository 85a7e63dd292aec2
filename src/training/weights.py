"""Weights out of a checkpoint, into a model built anew."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from src.core.errors import UserError
from src.core.protocols import Adversarial

__all__ = ["load_weights"]


def load_weights(model: nn.Module, file: Path) -> dict[str, Any]:
    """Load a checkpoint's weights into `model`, the averaged ones where there are any.

    Only tensors and plain types are read from the file, so a checkpoint from a stranger cannot run code.

    Returns:
        What a card says of them: `{"weights": "averaged" or "raw", "step": ..., "examples_seen": ...}`.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        state, progress = checkpoint["state_dict"], checkpoint["progress"]
    except UnpicklingError as error:
        raise UserError(
            f"{file} is damaged or holds more than tensors and plain types, so reading it could run code; refused"
        ) from error
    except Exception as error:  # reading a damaged file raises many kinds
        raise UserError(f"{file} cannot be read as a checkpoint ({type(error).__name__}: {error})") from error
    try:
        model.load_state_dict(_below(state, "model."))
        average = _below(state, "weight_average.average.")
        if average:
            averaged = model.players()[0] if isinstance(model, Adversarial) else model
            averaged.load_state_dict(average)
    except RuntimeError as error:
        raise UserError(f"{file} does not fit the model of its config.yaml ({str(error).splitlines()[0]})") from error
    return {"weights": "averaged" if average else "raw", **progress}


def _below(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
