"""DiffAugment: what each step does, that gradients pass, and that real and generated images get the same treatment."""

import pytest
import torch
from torch import Tensor

from src.build import build_model
from src.core.batch import Batch
from src.core.errors import UserError
from src.core.rng import SampleNoise, StreamNoise
from src.objectives.augmentation import DiffAugment, NoAugmentation, adjust_colour, cut_out, translate
from tests.configs import compose_model
from tests.examples import image_data, vector_spec


def images(count: int = 4, channels: int = 3, side: int = 16) -> Tensor:
    return SampleNoise(0).uniform((count, channels, side, side), torch.zeros(())) * 2 - 1


def test_colour_is_brightness_saturation_and_contrast():
    x = images()
    u = StreamNoise(0).uniform((4, 3), x)
    brightness, saturation, contrast = (u[:, i].view(4, 1, 1, 1) for i in range(3))
    y = x + brightness - 0.5
    grey = y.mean(1, keepdim=True)
    y = grey + (y - grey) * 2 * saturation
    mean = y.mean((1, 2, 3), keepdim=True)
    y = mean + (y - mean) * (contrast + 0.5)
    torch.testing.assert_close(adjust_colour(x, StreamNoise(0)), y)


def test_saturation_does_nothing_to_grey():
    x = images(channels=1)
    u = StreamNoise(0).uniform((4, 3), x)
    y = x + u[:, 0].view(4, 1, 1, 1) - 0.5
    mean = y.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(adjust_colour(x, StreamNoise(0)), mean + (y - mean) * (u[:, 2].view(4, 1, 1, 1) + 0.5))


def test_translation_moves_by_up_to_an_eighth_and_fills_with_zeros():
    x = images(count=200) + 5  # no pixel is zero
    moved = translate(x, StreamNoise(0))
    seen = set()
    for before, after in zip(x, moved, strict=True):
        rows, columns = after[0].any(1).nonzero().flatten(), after[0].any(0).nonzero().flatten()
        height, width = len(rows), len(columns)
        down, right = (16 - height) * (1 if rows[0] else -1), (16 - width) * (1 if columns[0] else -1)
        source = before[:, max(0, -down) : 16 - max(0, down), max(0, -right) : 16 - max(0, right)]
        assert torch.equal(after[:, rows[0] : rows[0] + height, columns[0] : columns[0] + width], source)
        seen |= {("down", down), ("right", right)}
    assert seen == {(way, by) for way in ("down", "right") for by in range(-2, 3)}


def test_cutout_zeroes_a_rectangle_of_half_of_each_side():
    x = images(count=100) + 5
    cut = cut_out(x, StreamNoise(0)) == 0
    assert torch.equal(cut, cut[:, :1].expand_as(cut))
    rows, columns = cut[:, 0].any(2).sum(1), cut[:, 0].any(1).sum(1)
    assert torch.equal(cut[:, 0].sum((1, 2)), rows * columns)
    assert int(rows.max()) == int(columns.max()) == 8
    assert int(rows.min()) < 8, "the centre may lie at the border"


@pytest.mark.parametrize("step", [adjust_colour, translate, cut_out, DiffAugment(True, True, True)])
def test_gradients_pass_as_finite_differences_say(step):
    x = images(count=2, side=8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: step(x, StreamNoise(3)), (x,))


def test_an_image_is_transformed_by_itself():
    x = images()
    together = DiffAugment(True, True, True)(x, SampleNoise(0))
    apart = torch.cat([DiffAugment(True, True, True)(x[i : i + 1], SampleNoise(0, start=i)) for i in range(4)])
    torch.testing.assert_close(apart, together)


def test_what_does_nothing_is_refused():
    with pytest.raises(UserError, match="does nothing"):
        DiffAugment(False, False, False)
    x = images()
    assert NoAugmentation()(x, StreamNoise(0)) is x


def test_vectors_are_refused():
    config = compose_model("model=gan", "augmentation=diffaugment")
    with pytest.raises(UserError, match="augmentation=diffaugment is of images; data=made_up gives vector"):
        build_model(config.model, vector_spec(2), "gan")


class Recorder:
    """Augments by nothing, and keeps what it was asked to."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def require(self, spec: object) -> None: ...

    def __call__(self, x: Tensor, noise: object) -> Tensor:
        self.seen.append(x.detach().clone())
        return x + 0.25  # so that one sees who gets it


@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
def test_real_and_generated_images_are_augmented_in_both_steps(loss):
    data = image_data((1, 8, 8), "discrete")
    model = build_model(compose_model("model=gan", f"adversarial_loss={loss}").model, data.spec, "gan")
    model._augmentation = recorder = Recorder()
    judged: list[Tensor] = []
    model.discriminator.register_forward_pre_hook(lambda _, arguments: judged.append(arguments[0].detach().clone()))
    batch = data.to_units(next(iter(data.train_dataloader())))
    batch = Batch(batch.x)
    model.discriminator_loss(batch, generator=SampleNoise(0))
    assert len(recorder.seen) == 2
    assert any(torch.equal(x, batch.x) for x in recorder.seen)
    model.generator_loss(batch, generator=SampleNoise(0))
    assert len(recorder.seen) == (4 if loss == "relativistic" else 3)
    assert {tuple((x + 0.25).flatten().tolist()) for x in recorder.seen} == {tuple(x.flatten().tolist()) for x in judged}
