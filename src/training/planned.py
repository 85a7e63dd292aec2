"""What a training is planned to be, beside what its schedule was made for."""

import logging

from src.training.callbacks.budget import planned_steps
from src.training.module import TrainingModule
from src.training.schedules import Schedule

__all__ = ["say_if_schedule_does_not_fit"]

log = logging.getLogger(__name__)


def say_if_schedule_does_not_fit(schedule: Schedule, module: TrainingModule) -> None:
    """One sentence to the log if the schedule ends long before the training or long after it."""
    num_steps = planned_steps(module.trainer)
    if schedule.examples is None or num_steps is None:
        return
    planned = num_steps * module.trainer.datamodule.batch_size * module.trainer.world_size
    share = planned / schedule.examples
    if not 0.5 <= share <= 2:
        log.info(
            f"training.schedule ends after {schedule.examples:,.0f} examples, and this training sees about "
            f"{planned:,.0f}: {share:.2g} of it (training.schedule.examples= to fit it)"
        )
