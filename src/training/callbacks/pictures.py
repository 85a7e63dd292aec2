"""Pictures of what the model does: samples from fixed noise, reconstructions, interpolations, classes."""

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from src.core.drawing import Sampler
from src.core.errors import require_at_least
from src.core.latents import lerp
from src.core.protocols import CanContinue, CanDecode, CanEncode, CanReconstruct, CanSample
from src.core.rng import SampleNoise
from src.core.sound import to_waveform
from src.core.spec import DataSpec
from src.data.loading import ArrayData
from src.training.callbacks.point_pictures import curve_picture, density_picture, is_drawn_as_points, point_picture
from src.training.callbacks.sound_files import joined, mel_grid, write_wav
from src.training.callbacks.text_samples import MAX_TEXTS, show_texts
from src.training.module import TrainingModule

__all__ = ["Pictures", "image_grid"]

_ROWS, _STEPS = 8, 10  # of interpolations
_MAX_CLASSES = 10  # columns of the classes
_CURVE_POINTS, _CLASS_POINTS = 200, 100  # the same of points: on a curve, of a class
_LAST_EARLY_STEP = 512
_MIN_SIDE = 32  # smaller images are enlarged in a grid, pixel by pixel
_NUM_POINTS = 2500  # drawn in a picture of points
_NUM_DENSITY = 10_000  # points that a density is made of
_BATCH_SIZE = 1000
_NUM_HEARD = 16  # clips in a WAV file


def image_grid(spec: DataSpec, x: Tensor, per_row: int) -> Tensor:
    """Images `(N, C, H, W)` in data units as one uint8 picture `(3, height, width)`, with grey lines between them.

    Of sounds `(N, *event)` their log-mels.
    """
    if spec.sound is not None:
        return mel_grid(x, spec.sound, per_row)
    scale = max(1, -(-_MIN_SIDE // x.shape[-1]))
    images = spec.to_bytes(x).cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return make_grid(images, nrow=per_row, padding=1, pad_value=128)


class Pictures(L.Callback):
    """Writes PNG grids and the same pictures to TensorBoard, with averaged weights where there are any.

    Samples come from the same noise every time, so one place in the grid shows one sample growing. They are also drawn
    at steps 1, 2, 4, 8, ... 512, when most happens. Of models whose z is N(0, I) there are interpolations between latents,
    of those that encode between the codes of held-out examples, and conditional models show one latent for all classes.
    Data of two dimensions are drawn as points in the plane, and as their density; of other vectors there are no pictures.
    Sounds are shown as their log-mels, and samples and reconstructions of them are written as WAV files, one clip after the
    other; but for the first steps, when they are drawn only from models that do so at once.
    Texts are written as they are, a few of them, to .txt files.

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
        if is_early and self._wants(trainer) and _draws_at_once(pl_module.model):
            with pl_module.averaged_weights():
                samples = self._grid(trainer, self._samples(trainer, pl_module))
                self._show(pl_module, "samples", f"step_{step:07d}", samples)

    def on_validation_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        self._num_validations += 1
        if (self._num_validations - 1) % self._every_n_validations:
            return
        spec = trainer.datamodule.spec
        if trainer.is_global_zero and spec.tokenizer is not None and isinstance(pl_module.model, CanSample):
            with pl_module.averaged_weights():
                when, count = f"epoch_{trainer.current_epoch + 1:04d}", min(self._num_samples, MAX_TEXTS)
                show_texts(pl_module, spec, self._directory, when, count, self._seed)
        if not self._wants(trainer):
            return
        with pl_module.averaged_weights():
            when = f"epoch_{trainer.current_epoch + 1:04d}"
            for tag, picture in self._pictures(trainer, pl_module, when):
                self._show(pl_module, tag, when, picture)

    def state_dict(self) -> dict[str, int]:
        return {"num_validations": self._num_validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._num_validations = state_dict["num_validations"]

    def _wants(self, trainer: L.Trainer) -> bool:
        spec = trainer.datamodule.spec
        is_pictured = spec.modality == "image" or spec.sound is not None or is_drawn_as_points(spec)
        return trainer.is_global_zero and is_pictured

    def _pictures(self, trainer: L.Trainer, pl_module: TrainingModule, when: str) -> Iterator[tuple[str, Tensor]]:
        """All that the model can show, by tag; what can be heard is written on the way."""
        model, spec = pl_module.model, trainer.datamodule.spec
        if isinstance(model, CanSample):
            samples = self._samples(trainer, pl_module)
            self._play(pl_module, spec, "samples", when, samples)
            yield "samples", self._grid(trainer, samples)
            yield from self._of_noise(trainer, Sampler(model, spec.num_classes, self._seed, _BATCH_SIZE), model)
        if isinstance(model, CanReconstruct):
            rebuilt = self._reconstructions(trainer, pl_module)
            self._play(pl_module, spec, "reconstructions", when, rebuilt)
            yield "reconstructions", self._grid(trainer, rebuilt)
        if isinstance(model, CanEncode):
            yield "interpolations", self._grid(trainer, self._interpolations(trainer, pl_module), _STEPS)

    def _of_noise(self, trainer: L.Trainer, sampler: Sampler, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What the noise of the samples gives besides them."""
        spec = trainer.datamodule.spec
        is_points = is_drawn_as_points(spec)
        if isinstance(model, CanDecode):
            rows = sampler.interpolations(_ROWS, _CURVE_POINTS if is_points else _STEPS)
            yield "latent_interpolations", self._rows(trainer, rows)
        if model.is_conditional and _draws_at_once(model):
            rows = sampler.classes(_CLASS_POINTS if is_points else _ROWS, min(spec.num_classes, _MAX_CLASSES))
            yield "classes", self._rows(trainer, rows.transpose(0, 1) if is_points else rows)
        if is_points:
            density = trainer.datamodule.arrays.density
            exact = None if density is None else density.log_prob
            drawn = sampler.samples(_NUM_DENSITY)
            yield "density", density_picture(drawn, trainer.datamodule.held_out_points(), exact)

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
        x, condition = self._held_out(trainer, pl_module, 2 * _ROWS)
        start, end = x[0::2], x.roll(-1, 0)[0::2]  # an odd one out goes to the first
        c, c_end = (None, None) if condition is None else (condition[0::2], condition.roll(-1)[0::2])
        z_start, z_end = model.encode(start, c), model.encode(end, c_end)
        z = torch.stack([lerp(z_start, z_end, k / (_STEPS - 1)) for k in range(_STEPS)], dim=1)
        repeated = None if c is None else c.repeat_interleave(_STEPS)
        return model.decode(z.flatten(0, 1), repeated)

    def _grid(self, trainer: L.Trainer, x: Tensor, per_row: int = 8) -> Tensor:
        data: ArrayData = trainer.datamodule
        is_points = is_drawn_as_points(data.spec)
        return point_picture(x, data.held_out_points()) if is_points else image_grid(data.spec, x, per_row)

    def _rows(self, trainer: L.Trainer, x: Tensor) -> Tensor:
        """Examples `(num_rows, num_columns, *event)`, of points each row in a colour of its own."""
        data: ArrayData = trainer.datamodule
        is_points = is_drawn_as_points(data.spec)
        return curve_picture(x, data.held_out_points()) if is_points else image_grid(data.spec, x.flatten(0, 1), x.shape[1])

    def _show(self, pl_module: TrainingModule, tag: str, when: str, picture: Tensor) -> None:
        save_image(picture / 255, self._directory / f"{tag}_{when}.png")
        for logger in pl_module.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(tag, picture, pl_module.step)

    def _play(self, pl_module: TrainingModule, spec: DataSpec, tag: str, when: str, x: Tensor) -> None:
        """Write the first of some sounds as a WAV file, one after the other, and give them to TensorBoard's player."""
        if spec.sound is None:
            return
        waveform = joined(to_waveform(x[:_NUM_HEARD], spec.sound), spec.sound).cpu()
        write_wav(self._directory / f"{tag}_{when}.wav", waveform, spec.sound.sample_rate)
        for logger in pl_module.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_audio(tag, waveform[None], pl_module.step, spec.sound.sample_rate)


def _draws_at_once(model: nn.Module) -> bool:
    """Whether a model draws samples, and not token by token, for which the first steps have no time."""
    return isinstance(model, CanSample) and not isinstance(model, CanContinue)
