"""Pictures of what the model does: samples from fixed noise, reconstructions, interpolations. Of images, or of points."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from src.core.errors import require_at_least
from src.core.protocols import CanEncode, CanReconstruct, CanSample
from src.core.rng import SampleNoise
from src.core.spec import DataSpec
from src.data.loading import ArrayData
from src.training.module import TrainingModule

__all__ = ["Pictures", "image_grid", "is_drawn_as_points", "point_picture"]

_INTERPOLATION_ROWS, _INTERPOLATION_STEPS = 8, 10
_LAST_EARLY_STEP = 512
_MIN_SIDE = 32  # smaller images are enlarged in a grid, pixel by pixel
_NUM_POINTS = 2500  # drawn in a picture of points
_POINT_SIDE, _MARGIN = 512, 0.15  # of a picture of points, in pixels; around the data, as a share of their range
_DATA_COLOUR, _POINT_COLOUR = (0.6, 0.66, 0.76), (0.75, 0.08, 0.12)


def image_grid(spec: DataSpec, x: Tensor, per_row: int) -> Tensor:
    """Images `(N, C, H, W)` in data units as one uint8 picture `(3, height, width)`, with grey lines between them."""
    scale = max(1, -(-_MIN_SIDE // x.shape[-1]))
    images = spec.to_bytes(x).cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(images, nrow=per_row, padding=1, pad_value=128)


def is_drawn_as_points(spec: DataSpec) -> bool:
    return spec.modality == "vector" and spec.num_dims == 2


def point_picture(x: Tensor, data: Tensor) -> Tensor:
    """Points `(N, 2)` in red over real ones `(M, 2)` in grey, the denser the darker, as a uint8 picture `(3, side, side)`.

    The axes have one scale and reach a little beyond the real points. Points outside lie on the rim.
    """
    low, high = data.amin(0), data.amax(0)
    half = (0.5 + _MARGIN) * float((high - low).max()) or 1.0
    corner = (low + high) / 2 - half
    picture = torch.ones(3, _POINT_SIDE, _POINT_SIDE)
    # a real point is drawn larger, so that it shows around the samples that lie on it
    for points, colour, width, least in ((data, _DATA_COLOUR, 5, 0.4), (x, _POINT_COLOUR, 3, 0.6)):
        ink = _ink(points.detach().float().cpu(), corner.float().cpu(), 2 * half, width, least)
        picture = picture * (1 - ink) + torch.tensor(colour)[:, None, None] * ink
    return picture.mul(255).round().byte()


def _ink(points: Tensor, corner: Tensor, length: float, width: int, least: float) -> Tensor:
    """How dark each pixel is, `(side, side)` in 0 .. 1: 0 without a point, from `least` on with one, 1 with the most."""
    place = (points[points.isfinite().all(1)] - corner) / length * _POINT_SIDE
    column, row = place.clamp(0, _POINT_SIDE - 1).long().unbind(1)
    counts = torch.bincount((_POINT_SIDE - 1 - row) * _POINT_SIDE + column, minlength=_POINT_SIDE**2)
    counts = counts.float().reshape(1, 1, _POINT_SIDE, _POINT_SIDE)
    spread = F.max_pool2d(counts, width, stride=1, padding=width // 2)[0, 0].log1p()
    most = spread.max()
    return torch.where(spread > 0, least + (1 - least) * spread / most, 0.0) if most > 0 else spread


class Pictures(L.Callback):
    """Writes PNG grids and the same pictures to TensorBoard, with averaged weights where there are any.

    Samples come from the same noise every time, so one place in the grid shows one sample growing. They are also drawn
    at steps 1, 2, 4, 8, ... 512, when most happens. Data of two dimensions are drawn as points in the plane; of other
    vectors there are no pictures.

    Args:
        directory: where the PNG files go.
        num_samples: images in a grid, at least 2; for labelled data their classes take turns.
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
                rebuilt = self._reconstructions(trainer, pl_module)
                self._show(pl_module, "reconstructions", f"reconstructions_epoch_{epoch:04d}", rebuilt)
            if isinstance(model, CanEncode):
                rows = self._interpolations(trainer, pl_module)
                self._show(pl_module, "interpolations", f"interpolations_epoch_{epoch:04d}", rows, _INTERPOLATION_STEPS)

    def state_dict(self) -> dict[str, int]:
        return {"num_validations": self._num_validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._num_validations = state_dict["num_validations"]

    def _wants(self, trainer: L.Trainer) -> bool:
        spec = trainer.datamodule.spec
        return trainer.is_global_zero and (spec.modality == "image" or is_drawn_as_points(spec))

    @torch.no_grad()
    def _samples(self, trainer: L.Trainer, pl_module: TrainingModule) -> Tensor:
        model, spec = pl_module.model, trainer.datamodule.spec
        count = _NUM_POINTS if is_drawn_as_points(spec) else self._num_samples
        condition = torch.arange(count, device=pl_module.device) % spec.num_classes if model.is_conditional else None
        return model.sample(count, condition, generator=SampleNoise(self._seed))

    @torch.no_grad()
    def _reconstructions(self, trainer: L.Trainer, pl_module: TrainingModule) -> Tensor:
        """Held-out images, each before its reconstruction; of points the reconstructions alone."""
        is_points = is_drawn_as_points(trainer.datamodule.spec)
        x, condition = self._held_out(trainer, pl_module, _NUM_POINTS if is_points else self._num_samples // 2)
        rebuilt = pl_module.model.reconstruct(x, condition)
        return rebuilt if is_points else torch.stack([x, rebuilt], dim=1).flatten(0, 1)

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
        data: ArrayData = pl_module.trainer.datamodule
        is_points = is_drawn_as_points(data.spec)
        grid = point_picture(x, data.held_out_points()) if is_points else image_grid(data.spec, x, per_row)
        save_image(grid / 255, self._directory / f"{name}.png")
        for logger in pl_module.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(tag, grid, pl_module.step)
