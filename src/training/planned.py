"""What a training is planned to be: schedules are told of it, beside what they were made for."""

import logging

from src.training.callbacks.budget import planned_steps
from src.training.module import TrainingModule
from src.training.schedules import Schedule

__all__ = ["plan_schedule", "planned_examples"]

log = logging.getLogger(__name__)


def planned_examples(module: TrainingModule) -> int | None:
    """How many examples the training sees until its end, over all devices; None if it is not known."""
    num_steps = planned_steps(module.trainer)
    return None if num_steps is None else num_steps * _examples_per_step(module)


def plan_schedule(schedule: Schedule, module: TrainingModule) -> None:
    """Tell a schedule what the training is planned to be; one sentence to the log if it ends long before it or after it."""
    planned = planned_examples(module)
    schedule.plan(planned, _examples_per_step(module) * module.accumulate_batches)
    if schedule.examples is None or planned is None:
        return
    share = planned / schedule.examples
    if not 0.5 <= share <= 2:
        log.info(
            f"training.schedule ends after {schedule.examples:,.0f} examples, and this training sees about "
            f"{planned:,.0f}: {share:.2g} of it (training.schedule.examples= to fit it)"
        )


def _examples_per_step(module: TrainingModule) -> int:
    """In the batches of all devices, as large as the loaders make them."""
    trainer = module.trainer
    return trainer.datamodule.training_batch_size(trainer.world_size, module.accumulate_batches) * trainer.world_size
