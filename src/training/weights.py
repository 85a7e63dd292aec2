"""Weights out of a checkpoint, into a model built anew."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from src.core.errors import UserError
from src.core.protocols import Adversarial

__all__ = ["load_weights", "require_vocabulary"]


def load_weights(model: nn.Module, file: Path, vocabulary: str | None = None) -> dict[str, Any]:
    """Load a checkpoint's weights into `model`, the averaged ones where there are any.

    Only tensors and plain types are read from the file, so a checkpoint from a stranger cannot run code.

    Args:
        model: built as the one that was trained.
        file: the checkpoint.
        vocabulary: what the model's tokens are, if it is one of texts.

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
    require_vocabulary(checkpoint, vocabulary, str(file))
    try:
        model.load_state_dict(_below(state, "model."))
        average = _below(state, "weight_average.average.")
        if average:
            averaged = model.players()[0] if isinstance(model, Adversarial) else model
            averaged.load_state_dict(average)
    except RuntimeError as error:
        raise UserError(f"{file} does not fit the model of its config.yaml ({str(error).splitlines()[0]})") from error
    return {"weights": "averaged" if average else "raw", **progress}


def require_vocabulary(checkpoint: dict[str, Any], vocabulary: str | None, shown: str) -> None:
    """Raise `UserError` if a checkpoint was trained on other tokens, be they as many; of an older one nobody knows."""
    trained = checkpoint.get("vocabulary", vocabulary)
    if trained != vocabulary:
        raise UserError(
            f"{shown} was trained on other tokens: on {trained or 'no text'}, and here are {vocabulary or 'none of a text'}"
            "; take a checkpoint of the same vocabulary"
        )


def _below(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
