"""TensorBoard's custom-scalars page: the curves that belong together, side by side."""

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from src.training.module import TrainingModule

__all__ = ["Dashboard"]


class Dashboard(L.Callback):
    """Lays the page out once, after the first validation, from the quantities that the model really reports."""

    def __init__(self) -> None:
        self._is_done = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        if self._is_done:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(_layout(set(trainer.callback_metrics)))
        self._is_done = True


def _layout(tags: set[str]) -> dict[str, dict[str, list]]:
    """Pages of charts: training against validation for each quantity; the two players against each other."""
    names = sorted({tag.partition("/")[2] for tag in tags})
    held_out = {name: [f"val/{name}"] if f"val/{name}" in tags else [] for name in names}
    compared = {name: ["Multiline", [f"train_epoch/{name}", *held_out[name]]] for name in names}
    pages = {"training against held-out data": compared}
    if "generator_loss" in names:
        losses = ["train/discriminator_loss", "train/generator_loss"]
        logits = ["train/discriminator_logit_real", "train/discriminator_logit_fake"]
        pages["the two players"] = {"losses": ["Multiline", losses], "logits": ["Multiline", logits]}
    pages["speed"] = {"examples per second": ["Multiline", ["progress/examples_per_second"]]}
    return pages
