"""The game between two networks: penalties against closed forms, packing, and which player learns from what."""

import pytest
import torch
from torch import Tensor, nn

from src.build import build, build_model
from src.core.batch import Batch
from src.core.errors import UserError
from src.core.rng import StreamNoise
from src.core.spec import CONTINUOUS, DataSpec, Values
from src.objectives.penalties import GradientPenalty, Judged, NoPenalty, ZeroCentred, judge, squared_gradient_norm
from tests.configs import compose_config, load_option, options

A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
PLANE = DataSpec("plane", "vector", (2,), Values(CONTINUOUS, -float("inf"), float("inf"), None))


def bowl(x: Tensor) -> Tensor:
    """x' A x / 2, whose gradient is A x."""
    return 0.5 * ((x @ A) * x).sum(1)


def points(seed: int) -> Tensor:
    return torch.randn(64, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def judged(critic, x: Tensor, for_slope: bool = False) -> Judged:
    return judge(critic, x, for_slope)


def penalty_of(penalty, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    return penalty(bowl, judged(bowl, real), judged(bowl, fake), StreamNoise(0))


# --- penalties -------------------------------------------------------------------------------------------------------


def test_the_squared_gradient_norm_is_the_closed_form():
    x = points(0)
    torch.testing.assert_close(squared_gradient_norm(bowl, x), (x @ A).square().sum(1), rtol=1e-12, atol=1e-12)


def test_zero_centred_penalties_are_half_gamma_times_it_at_their_places():
    real, fake = points(0), points(1)
    both = penalty_of(ZeroCentred(3.0, 5.0), real, fake)
    assert list(both) == ["r1", "r2"]
    torch.testing.assert_close(both["r1"], 1.5 * (real @ A).square().sum(1))
    torch.testing.assert_close(both["r2"], 2.5 * (fake @ A).square().sum(1))
    assert list(penalty_of(ZeroCentred(3.0, 0.0), real, fake)) == ["r1"]
    assert list(penalty_of(ZeroCentred(0.0, 3.0), real, fake)) == ["r2"]
    assert penalty_of(NoPenalty(), real, fake) == {}


def test_the_gradient_penalty_is_that_of_the_places_between():
    real, fake = points(0), points(1)
    u = StreamNoise(0).uniform((64, 1), like=real)
    between = u * real + (1 - u) * fake
    expected = 10 * ((between @ A).square().sum(1).sqrt() - 1).square()
    torch.testing.assert_close(penalty_of(GradientPenalty(10.0), real, fake)["gradient_penalty"], expected)


def test_the_gradient_penalty_has_a_finite_slope_where_the_critic_is_flat():
    weight = torch.zeros(2, 1, requires_grad=True)

    def critic(x: Tensor) -> Tensor:
        return (x @ weight).squeeze(1)

    real, fake = judged(critic, torch.ones(4, 2)), judged(critic, torch.zeros(4, 2))
    flat = GradientPenalty(10.0)(critic, real, fake, StreamNoise(0))
    torch.testing.assert_close(flat["gradient_penalty"], torch.full((4,), 10.0), rtol=1e-4, atol=0)
    (slope,) = torch.autograd.grad(flat["gradient_penalty"].sum(), weight)
    assert slope.isfinite().all()


@pytest.mark.parametrize("for_slope", [False, True])
@pytest.mark.parametrize("name", options("penalty"))
def test_penalties_teach_the_discriminator_as_autograd_says(name, for_slope):
    """Their gradients by the weights equal finite differences, so the second derivative is there."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    penalty = build(load_option("penalty", name))

    def value() -> Tensor:
        def of(x: Tensor) -> Tensor:
            return critic(x).squeeze(1)

        parts = penalty(of, judged(of, points(0), for_slope), judged(of, points(1), for_slope), StreamNoise(0))
        return sum((part.sum() for part in parts.values()), torch.zeros((), dtype=torch.float64))

    if name == "none":
        assert not value().requires_grad
        return
    weight = critic[0].weight
    (gradient,) = torch.autograd.grad(value(), weight)
    step = torch.zeros_like(weight)
    step[3, 1] = 1e-6
    with torch.no_grad():
        weight += step
        above = value()
        weight -= 2 * step
        below = value()
    assert float(gradient[3, 1]) == pytest.approx(float(above - below) / 2e-6, rel=1e-5)


def test_penalties_are_measured_without_recording_too():
    with torch.no_grad():
        measured = penalty_of(ZeroCentred(2.0, 0.0), points(0), points(1))["r1"]
    assert not measured.requires_grad
    torch.testing.assert_close(measured, (points(0) @ A).square().sum(1))


def test_penalties_are_computed_in_32_bits_under_mixed_precision():
    critic = nn.Linear(2, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm = squared_gradient_norm(lambda x: critic(x).squeeze(1), torch.ones(3, 2))
    torch.testing.assert_close(norm, critic.weight.square().sum().expand(3))


# --- the model -------------------------------------------------------------------------------------------------------


def gan(*overrides: str, spec: DataSpec = PLANE) -> nn.Module:
    config = compose_config("model=gan", *overrides)
    torch.manual_seed(0)
    return build_model(config.model, spec, "gan")


def batch(size: int = 12) -> Batch:
    return Batch(points(2)[:size].float(), None)


def test_packing_shows_the_discriminator_several_examples_at_a_time():
    model = gan("model.packing=3")
    assert model.discriminator.network.layers[0].in_features == 6
    terms = model.discriminator_loss(batch(12), generator=StreamNoise(0))
    assert {name: tuple(values.shape) for name, values in terms.items()} == dict.fromkeys(
        ("loss", "logit_real", "logit_fake"), (4,)
    )
    packed = model._pack(batch(13).x)
    assert packed.shape == (4, 6)  # the thirteenth is left out
    torch.testing.assert_close(packed[1], batch(13).x[3:6].flatten())
    images = torch.arange(2 * 3 * 4.0).view(2, 3, 2, 2)
    assert gan("model.packing=2")._pack(images).equal(images.reshape(1, 6, 2, 2))


def test_packing_of_one_is_none():
    model = gan("model.packing=1")
    assert model._pack(batch().x).equal(batch().x)


def test_packing_of_classes_is_refused():
    config = compose_config("model=cgan", "model.packing=2", "data=digits")
    spec = DataSpec("digits", "image", (1, 8, 8), Values(CONTINUOUS, -1, 1, None), tuple("0123456789"))
    with pytest.raises(UserError, match=r"model.packing=2: examples of different classes are not packed"):
        build_model(config.model, spec, "cgan")


@pytest.mark.parametrize("penalty", options("penalty"))
@pytest.mark.parametrize("loss", options("adversarial_loss"))
def test_every_game_can_be_played_in_the_plane(loss, penalty):
    model = gan(f"adversarial_loss={loss}", f"penalty={penalty}", "model.packing=2")
    generator, discriminator = model.players()
    terms = model.discriminator_loss(batch(), generator=StreamNoise(0))
    assert all(values.shape == (6,) and values.isfinite().all() for values in terms.values())
    terms["loss"].mean().backward()
    assert all(weight.grad is None for weight in generator.parameters())
    assert any(float(weight.grad.abs().sum()) > 0 for weight in discriminator.parameters())
    discriminator.requires_grad_(False)
    before = [weight.grad.clone() for weight in discriminator.parameters()]
    model.generator_loss(batch(), generator=StreamNoise(0))["loss"].mean().backward()
    assert all(float(weight.grad.abs().sum()) > 0 for weight in generator.parameters())
    assert all(weight.grad.equal(old) for weight, old in zip(discriminator.parameters(), before, strict=True))


def test_the_loss_is_the_game_and_the_penalty():
    model, plain = gan("penalty=r1_r2"), gan()
    terms, without = (some.discriminator_loss(batch(), generator=StreamNoise(0)) for some in (model, plain))
    torch.testing.assert_close(terms["loss"], without["loss"] + terms["r1"] + terms["r2"])
