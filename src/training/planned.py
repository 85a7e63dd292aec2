"""What a training is planned to be, beside what its schedule was made for."""

import logging

from src.training.callbacks.budget import planned_steps
from src.training.module import TrainingModule
from src.training.schedules import Schedule

__all__ = ["planned_examples", "say_if_schedule_does_not_fit"]

log = logging.getLogger(__name__)


def planned_examples(module: TrainingModule) -> int | None:
    """How many examples the training sees until its end, over all devices; None if it is not known."""
    num_steps = planned_steps(module.trainer)
    return None if num_steps is None else num_steps * module.trainer.datamodule.batch_size * module.trainer.world_size


def say_if_schedule_does_not_fit(schedule: Schedule, module: TrainingModule) -> None:
    """One sentence to the log if the schedule ends long before the training or long after it."""
    planned = planned_examples(module)
    if schedule.examples is None or planned is None:
        return
    share = planned / schedule.examples
    if not 0.5 <= share <= 2:
        log.info(
            f"training.schedule ends after {schedule.examples:,.0f} examples, and this training sees about "
            f"{planned:,.0f}: {share:.2g} of it (training.schedule.examples= to fit it)"
        )
