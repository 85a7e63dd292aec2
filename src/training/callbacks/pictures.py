"""Pictures of what the model does: samples from fixed noise, reconstructions, interpolations."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid, save_image

from src.core.errors import require_at_least
from src.core.protocols import CanEncode, CanReconstruct, CanSample
from src.core.rng import SampleNoise
from src.core.spec import DataSpec
from src.data.loading import ArrayData
from src.training.module import TrainingModule

__all__ = ["Pictures", "image_grid"]

_INTERPOLATION_ROWS, _INTERPOLATION_STEPS = 8, 10
_LAST_EARLY_STEP = 512
_MIN_SIDE = 32  # smaller images are enlarged in a grid, pixel by pixel


def image_grid(spec: DataSpec, x: Tensor, per_row: int) -> Tensor:
    """Images `(N, C, H, W)` in data units as one uint8 picture `(3, height, width)`, with grey lines between them."""
    scale = max(1, -(-_MIN_SIDE // x.shape[-1]))
    images = spec.to_bytes(x).cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(images, nrow=per_row, padding=1, pad_value=128)


class Pictures(L.Callback):
    """Writes PNG grids and the same pictures to TensorBoard, with averaged weights where there are any.

    Samples come from the same noise every time, so one place in the grid shows one sample growing. They are also drawn
    at steps 1, 2, 4, 8, ... 512, when most happens.

    Args:
        directory: where the PNG files go.
        num_samples: samples in a grid, at least 2; for labelled data their classes take turns.
        every_n_validations: how often pictures are made.
        seed: seed of the fixed noise.
    """

    def __init__(self, directory: Path, num_samples: int, every_n_validations: int, seed: int) -> None:
        require_at_least("callback.pictures.num_samples", num_samples, 2)
        require_at_least("callback.pictures.every_n_validations", every_n_validations, 1)
        self._directory = directory
        self._num_samples = num_samples
        self._every_n_validations = every_n_validations
        self._num_validations = 0
        self._seed = seed

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: TrainingModule, *_: object) -> None:
        step = pl_module.step
        is_early = step <= _LAST_EARLY_STEP and step & (step - 1) == 0
        if is_early and self._wants(trainer) and isinstance(pl_module.model, CanSample):
            with pl_module.averaged_weights():
                self._show(pl_module, "samples", f"samples_step_{step:07d}", self._samples(trainer, pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        epoch = trainer.current_epoch + 1
        self._num_validations += 1
        if (self._num_validations - 1) % self._every_n_validations or not self._wants(trainer):
            return
        model = pl_module.model
        with pl_module.averaged_weights():
            if isinstance(model, CanSample):
                self._show(pl_module, "samples", f"samples_epoch_{epoch:04d}", self._samples(trainer, pl_module))
            if isinstance(model, CanReconstruct):
                x, condition = self._held_out(trainer, pl_module, self._num_samples // 2)
                pairs = torch.stack([x, model.reconstruct(x, condition)], dim=1).flatten(0, 1)
                self._show(pl_module, "reconstructions", f"reconstructions_epoch_{epoch:04d}", pairs)
            if isinstance(model, CanEncode):
                rows = self._interpolations(trainer, pl_module)
                self._show(pl_module, "interpolations", f"interpolations_epoch_{epoch:04d}", rows, _INTERPOLATION_STEPS)

    def state_dict(self) -> dict[str, int]:
        return {"num_validations": self._num_validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._num_validations = state_dict["num_validations"]

    def _wants(self, trainer: L.Trainer) -> bool:
        return trainer.is_global_zero and trainer.datamodule.spec.modality == "image"

    @torch.no_grad()
    def _samples(self, trainer: L.Trainer, pl_module: TrainingModule) -> Tensor:
        model = pl_module.model
        condition = None
        if model.is_conditional:
            num_classes = trainer.datamodule.spec.num_classes
            condition = torch.arange(self._num_samples, device=pl_module.device) % num_classes
        return model.sample(self._num_samples, condition, generator=SampleNoise(self._seed))

    def _held_out(self, trainer: L.Trainer, pl_module: TrainingModule, count: int) -> tuple[Tensor, Tensor | None]:
        """The first validation examples, on the model's device."""
        data: ArrayData = trainer.datamodule
        batch = data.to_units(next(iter(data.held_out_loader("val"))).to(pl_module.device))
        return batch.x[:count], None if batch.condition is None else batch.condition[:count]

    @torch.no_grad()
    def _interpolations(self, trainer: L.Trainer, pl_module: TrainingModule) -> Tensor:
        """Rows of examples on a straight line between the codes of two held-out ones (their first one's class)."""
        model = pl_module.model
        x, condition = self._held_out(trainer, pl_module, 2 * _INTERPOLATION_ROWS)
        start, end = x[0::2], x.roll(-1, 0)[0::2]  # an odd one out goes to the first
        c, c_end = (None, None) if condition is None else (condition[0::2], condition.roll(-1)[0::2])
        z_start, z_end = model.encode(start, c), model.encode(end, c_end)
        share = torch.linspace(0, 1, _INTERPOLATION_STEPS, device=x.device)[None, :, None]
        z = z_start[:, None] * (1 - share) + z_end[:, None] * share
        repeated = None if c is None else c.repeat_interleave(_INTERPOLATION_STEPS)
        return model.decode(z.flatten(0, 1), repeated)

    @torch.no_grad()
    def _show(self, pl_module: TrainingModule, tag: str, name: str, x: Tensor, per_row: int = 8) -> None:
        grid = image_grid(pl_module.trainer.datamodule.spec, x, per_row)
        save_image(grid / 255, self._directory / f"{name}.png")
        for logger in pl_module.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(tag, grid, pl_module.step)
