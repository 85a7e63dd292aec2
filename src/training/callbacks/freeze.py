"""Freezes a trained classifier: its weights become the file that metrics of these data are measured on."""

import functools
import logging
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch
from torch import nn

from src.core.errors import UserError
from src.core.sound import LOG_MEL
from src.metrics.frozen_classifier import frozen_file, write_frozen
from src.models.classifier import Classifier
from src.training.module import TrainingModule

__all__ = ["FreezeClassifier"]

log = logging.getLogger(__name__)


class FreezeClassifier(L.Callback):
    """Writes the classifier at the end of its training, with averaged weights where there are any.

    Never over one that is there: values measured on it would lose their meaning.

    Args:
        network: what the classifier was built from, a class with its own arguments.
        folder: where the classifiers of prepared data are kept.
        file: write to this file instead.
        min_accuracy: a classifier that is right on a smaller share of the test images is not frozen.
    """

    def __init__(self, network: functools.partial, folder: str, file: str | None, min_accuracy: float) -> None:
        self._min_accuracy = min_accuracy
        self._network = network
        self._folder = Path(folder)
        self._given = None if file is None else Path(file)

    def on_fit_start(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        if not isinstance(pl_module.model, Classifier):
            raise UserError("callback.freeze freezes model=classifier only")
        file = self._file(trainer)
        if file.exists():
            raise UserError(
                f"{file} exists: the frozen classifier of these data. Values measured on it stay comparable only while it "
                "stays; remove it yourself, or write another with callback.freeze.file=FILE"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        if not trainer.is_global_zero:
            return
        spec, file, classifier = trainer.datamodule.spec, self._file(trainer), pl_module.model
        assert isinstance(classifier, Classifier)
        described = {
            "_target_": f"{self._network.func.__module__}.{self._network.func.__qualname__}",
            **self._network.keywords,
            "in_shape": list(classifier.in_shape),
            "num_classes": spec.num_classes,
        }
        with pl_module.averaged_weights():
            accuracy = self._accuracy(trainer, pl_module)
            if accuracy < self._min_accuracy:
                log.warning(
                    f"not frozen: the classifier is right on {100 * accuracy:.1f} % of the test images, fewer than "
                    f"callback.freeze.min_accuracy={self._min_accuracy:g} asks for; train it longer"
                )
                return
            about = {
                "network": described,
                "data": spec.name,
                "data_fingerprint": trainer.datamodule.arrays.fingerprint,
                "in_shape": list(classifier.in_shape),
                "class_names": list(spec.class_names),
                "accuracy": accuracy,
            }
            if spec.sound is not None:
                about["sound"] = asdict(spec.sound.seen_as(LOG_MEL))
            network = pl_module.model.network
            assert isinstance(network, nn.Module)
            sha256 = write_frozen(file, network, about)
        log.info(f"froze the classifier: right on {100 * accuracy:.2f} % of the test images")
        log.info(f"  file    {file}")
        log.info(f"  SHA-256 {sha256}")

    def _file(self, trainer: L.Trainer) -> Path:
        data = trainer.datamodule
        return self._given or frozen_file(self._folder, data.spec, data.arrays.fingerprint)

    @torch.no_grad()
    def _accuracy(self, trainer: L.Trainer, pl_module: TrainingModule) -> float:
        data = trainer.datamodule
        batches = [data.to_units(batch.to(pl_module.device)) for batch in data.held_out_loader("test")]
        is_right = [pl_module.model.classify(batch.x).argmax(1) == batch.condition for batch in batches]
        return float(torch.cat(is_right).double().mean())
