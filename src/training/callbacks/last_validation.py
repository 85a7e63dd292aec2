"""A training ends with a validation, also one that ends between two of them."""

import lightning as L

__all__ = ["LastValidation"]


class LastValidation(L.Callback):
    """Makes Lightning validate after the last epoch, and when the budget of steps is spent."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.should_stop:
            trainer.check_val_every_n_epoch = 1
