"""Trains the classifier of a labelled data set that `fd` and `cs` are measured on, once, and keeps it."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.optim import Optimizer

from src.core.errors import NotApplicable
from src.core.spec import DataSpec
from src.data.loading import ArrayData
from src.metrics.features import Extractor, NetworkExtractor
from src.models.classifier import Classifier
from src.training.callbacks.budget import StepBudget
from src.training.gradient import GradientTraining

__all__ = ["domain_classifier"]

log = logging.getLogger(__name__)

_DAMAGE = (OSError, EOFError, UnpicklingError, RuntimeError, LookupError, TypeError, ValueError, AttributeError)


def domain_classifier(
    data: ArrayData,
    cache: Path,
    network: Callable[..., nn.Module],
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    num_steps: int,
    batch_size: int,
    seed: int,
    recipe: dict[str, Any],
) -> Extractor:
    """The frozen classifier of a data set, as a feature extractor; trained at the first call, read back afterwards.

    Raises `NotApplicable` for data without labels.

    Args:
        data: the data set.
        cache: folder that keeps trained classifiers.
        network, optimizer, num_steps, batch_size, seed: the recipe.
        recipe: the same recipe as plain types; a classifier of another recipe or other data is never taken for this one.
    """
    spec = data.spec
    if not spec.num_classes:
        raise NotApplicable(f"data={spec.name} has no labels, so there is no classifier of it")
    key = json.dumps({"recipe": recipe, "data": data.arrays.fingerprint, "spec": spec.to_dict()}, sort_keys=True)
    name = f"{spec.name}-classifier-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    file = cache / f"{name}.pt"
    classifier = _untrained(spec, network, seed)
    if not _is_read_back(classifier, file):
        classifier = _untrained(spec, network, seed)  # a damaged file may have filled some of the weights
        _train(classifier, ArrayData(data.arrays, batch_size, 512, 0, seed), optimizer, num_steps, seed)
        _save(classifier, file)
    return NetworkExtractor(name, classifier)


def _untrained(spec: DataSpec, network: Callable[..., nn.Module], seed: int) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(spec, network)


def _is_read_back(classifier: Classifier, file: Path) -> bool:
    """Fill the classifier with the kept weights; False if there are none, or none that can be read."""
    if not file.exists():
        return False
    try:
        classifier.load_state_dict(torch.load(file, weights_only=True))
    except _DAMAGE as error:
        log.warning(f"{file} is damaged ({type(error).__name__}); the classifier is trained anew")
        return False
    return True


def _train(classifier: Classifier, data: ArrayData, optimizer: Callable[..., Optimizer], num_steps: int, seed: int) -> None:
    log.info(f"training a classifier of data={data.spec.name} once, for the metrics that need one")
    module = GradientTraining(
        classifier, optimizer, seed, log_every_n_steps=num_steps, ema_half_life_examples=None, gradient_clip_norm=None
    )
    trainer = L.Trainer(
        accelerator="cpu",  # the same classifier on every machine, as far as that goes
        devices=1,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[StepBudget(num_steps)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    log.info(f"the classifier is right on {100 * _accuracy(classifier, data):.1f} % of the test images")


@torch.no_grad()
def _accuracy(classifier: Classifier, data: ArrayData) -> float:
    classifier.eval()
    batches = [data.to_units(batch) for batch in data.held_out_loader("test")]
    right = sum(int((classifier(batch.x)[1].argmax(1) == batch.condition).sum()) for batch in batches)
    return right / sum(len(batch) for batch in batches)


def _save(classifier: Classifier, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".unfinished-{os.getpid()}")
    torch.save(classifier.state_dict(), unfinished)
    unfinished.replace(file)
