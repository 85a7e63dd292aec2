"""Puts a model, its data and a trainer together, and trains."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import nn

from src.core.errors import UserError, require_at_least
from src.core.protocols import Adversarial, ExpectationMaximization, Trainable
from src.core.ranks import launched_processes
from src.training.adversarial import AdversarialTraining
from src.training.callbacks.budget import StepBudget
from src.training.callbacks.last_validation import LastValidation
from src.training.em import ExpectationMaximizationTraining
from src.training.gradient import GradientTraining
from src.training.module import TrainingModule
from src.training.ranks import Replicas

__all__ = ["make_trainer", "make_training_module"]

log = logging.getLogger(__name__)

_STRATEGIES = ("auto", "ddp")  # others split the weights, which averaged weights and checkpoints are not made for
_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")  # losses and statistics need float32 weights


def make_training_module(
    model: nn.Module, optimizers: Callable[..., Any] | dict[str, Callable[..., Any]], knobs: dict[str, Any], seed: int
) -> TrainingModule:
    """The driver that fits what the model can do.

    Args:
        model: a `Trainable`, an `Adversarial` or an `ExpectationMaximization`.
        optimizers: called with parameters; for an `Adversarial` a dict of "generator" and "discriminator"; for an
            `ExpectationMaximization` an empty one.
        knobs: the further arguments of the driver, from `training:` in the model's YAML.
        seed: seed of the training noise.
    """
    if isinstance(model, ExpectationMaximization):
        return _without_gradients(model, optimizers, knobs, seed)
    if isinstance(model, Adversarial):
        if not isinstance(optimizers, dict):
            raise UserError("a model of two players takes two optimizers: optim.generator and optim.discriminator")
        generator, discriminator = optimizers["generator"], optimizers["discriminator"]
        return AdversarialTraining(model, generator, discriminator, seed=seed, **knobs)
    assert isinstance(model, Trainable), f"{type(model).__name__} has no protocol of training"
    if isinstance(optimizers, dict):
        raise UserError("a model with one loss takes one optimizer: optim, without generator and discriminator")
    return GradientTraining(model, optimizers, seed=seed, **knobs)


def _without_gradients(model: nn.Module, optimizers: Any, knobs: dict[str, Any], seed: int) -> TrainingModule:
    if optimizers != {}:
        raise UserError("a model that is trained by expectation maximization takes no optimizer (leave optim out)")
    if others := sorted(set(knobs) - {"log_every_n_steps"}):
        raise UserError(
            f"training.{others[0]} means nothing to expectation maximization, which has no gradients (leave it out)"
        )
    return ExpectationMaximizationTraining(model, seed=seed, **knobs)


def make_trainer(
    default_root_dir: Path,
    callbacks: list[L.Callback],
    logger: list[Logger],
    accelerator: str,
    devices: int | str | list[int],
    num_nodes: int,
    strategy: str,
    precision: Any,
    max_epochs: int | None,
    max_steps: int | None,
    limit_train_batches: int | float | None,
    limit_val_batches: int | float | None,
    val_every_n_epochs: int,
    deterministic: bool,
    benchmark: bool,
) -> L.Trainer:
    """Lightning's trainer, with the budget in batches.

    Args:
        default_root_dir, callbacks, logger: from the entry point.
        strategy: "ddp" for a process on each device; "auto" for that if there are several, and for none of it on one.
        max_steps: end after so many batches, whatever max_epochs says; None for a budget in epochs.
        val_every_n_epochs: how often the model is measured on held-out data, drawn and saved.
        The others: see `lightning.Trainer`.
    """
    if max_epochs is None and max_steps is None:
        raise UserError("the training has no end: set trainer.max_epochs= or trainer.max_steps=")
    require_at_least("trainer.max_epochs", max_epochs, 1)
    require_at_least("trainer.max_steps", max_steps, 1)
    require_at_least("trainer.val_every_n_epochs", val_every_n_epochs, 1)
    if precision not in _PRECISIONS:
        raise UserError(f"trainer.precision={precision} is not supported; allowed: {', '.join(_PRECISIONS)}")
    if strategy not in _STRATEGIES:
        raise UserError(f"trainer.strategy={strategy} is not supported; allowed: {', '.join(_STRATEGIES)}")
    is_one = num_nodes == 1 and (devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1))
    is_cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    budget = [] if max_steps is None else [StepBudget(max_steps)]
    callbacks = [*callbacks, *budget, LastValidation()]
    try:
        trainer = L.Trainer(
            default_root_dir=default_root_dir,
            callbacks=callbacks,
            logger=logger,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy="auto" if is_one and strategy == "auto" else Replicas(),
            sync_batchnorm=is_cuda and not is_one,  # elsewhere torch cannot, and `Replicas` says so
            precision=precision,
            max_epochs=max_epochs if max_steps is None else -1,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            check_val_every_n_epoch=val_every_n_epochs,
            deterministic=deterministic,
            benchmark=benchmark,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # our samplers share the batches out among ranks themselves
            enable_checkpointing=False,  # our callback counts batches, Lightning's counts optimizer steps
            enable_model_summary=False,
        )
    except (ValueError, RuntimeError, L.fabric.utilities.exceptions.MisconfigurationException) as error:
        raise UserError(f"Lightning's trainer refuses its arguments: {error} (see trainer.* in the config)") from error
    if launched_processes() not in (1, trainer.world_size):
        raise UserError(
            f"{launched_processes()} processes were started for a training on trainer.devices={devices} times "
            f"trainer.num_nodes={num_nodes}; set both to what torchrun or srun was asked for, or start one process"
        )
    return trainer
