"""Keeps the held-out means in every checkpoint, so that those of the evaluated one can be told after the training."""

from pathlib import Path

import lightning as L
import torch

__all__ = ["HeldOutMeans", "held_out_means"]


class HeldOutMeans(L.Callback):
    """Puts the means of the latest validation, as "val/loss", into the checkpoints."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        measured = trainer.callback_metrics.items()
        self._means = {name: float(value) for name, value in measured if name.startswith("val/")}

    def state_dict(self) -> dict[str, float]:
        return self._means

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._means = dict(state_dict)


def held_out_means(checkpoint: Path) -> dict[str, float]:
    """The means in a checkpoint, by name; none if it was written before there were any."""
    states = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["callbacks"]
    return dict(states.get(HeldOutMeans.__qualname__, {}))
