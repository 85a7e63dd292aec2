"""Normalizing flows and dequantization: exact densities, probabilities of levels, what is refused."""

import math
from functools import partial

import pytest
import torch

from src.build import build_model
from src.core.batch import Batch
from src.core.errors import NotApplicable, UserError
from src.core.protocols import CanBound, CanDecode, CanEncode, CanSample, CanScore, HasSettings, NeedsPreparation, Trainable
from src.core.rng import SampleNoise, StreamNoise
from src.evaluation.flow_oracles import CHECKS, FLOWS, Identity, awake, image_levels, log_det_by_autograd, small_flow
from src.models.flow import Flow
from src.networks.autoregressive_flow import MaskedAutoregressiveFlow, NeuralSplineFlow
from src.networks.coupling_flow import Coupling, CouplingFlow, channel_groups
from src.networks.scaling import Scaling, logit, sigmoid
from src.objectives.dequantization import (
    UniformDequantization,
    VariationalDequantization,
    bound_of_draws,
    dequantize,
    quantize,
)
from tests.configs import compose_config
from tests.examples import image_data, image_spec, vector_spec

SPLINES = partial(NeuralSplineFlow, hidden=[8], num_transforms=2, num_bins=4, passes=2)
AFFINE = partial(MaskedAutoregressiveFlow, hidden=[8], num_transforms=2, passes=None)
COUPLINGS = partial(CouplingFlow, widths=[4, 4], num_couplings=3, num_blocks=1)
LEARNED = partial(VariationalDequantization, network=partial(CouplingFlow, widths=[4], num_couplings=2, num_blocks=1))
MASKED = "network=masked_autoregressive_flow"
IMAGES = {"splines": SPLINES, "affine": AFFINE, "couplings": COUPLINGS}

every_image_flow = pytest.mark.parametrize("network", IMAGES.values(), ids=list(IMAGES))


def flow(spec, network, dequantization=UniformDequantization, **keys) -> Flow:
    torch.manual_seed(0)
    model = Flow(spec, network, dequantization, **{"num_dequantizations": 3, **keys})
    awake(model)
    return model


def levels_of(spec, count: int = 6) -> torch.Tensor:
    u = SampleNoise(0).uniform((count, *spec.shape), torch.zeros(()))
    return spec.to_units((u * spec.values.levels).long().clamp(max=spec.values.levels - 1))


def points(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return SampleNoise(seed).normal((count, dim), torch.zeros(()))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_quantity_has_its_known_value(check):
    before = torch.get_rng_state()
    found = list(check())
    assert found
    assert [oracle for oracle in found if not oracle.holds] == []
    assert torch.equal(before, torch.get_rng_state())


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
def test_condition_changes_the_flow_and_is_inverted_with_it(name):
    network = small_flow(name, torch.float64, condition_dim=3)
    x = SampleNoise(0).normal((3, *FLOWS[name][0]), torch.zeros((), dtype=torch.float64))
    z, log_det = network(x, torch.eye(3))
    torch.testing.assert_close(network.inverse(z, torch.eye(3)), x)
    other, _ = network(x, torch.eye(3).roll(1, 0))
    assert (other - z).abs().flatten(1).amax(1).min() > 1e-3
    given = torch.eye(3)[:1]
    expected = log_det_by_autograd(lambda one: network(one, given)[0], x[0])
    assert float(log_det[0].detach()) == pytest.approx(expected, abs=1e-9)


def test_context_changes_a_coupling_flow_and_its_determinant_is_that_of_the_jacobian():
    network = awake(CouplingFlow((2, 4, 4), [4, 4], num_couplings=6, num_blocks=1, context_channels=1)).double()
    x, context = (SampleNoise(i).normal((1, c, 4, 4), torch.zeros((), dtype=torch.float64)) for i, c in enumerate((2, 1)))
    z, log_det = network(x, None, context)
    torch.testing.assert_close(network.inverse(z, None, context), x)
    assert float(log_det.detach()) == pytest.approx(
        log_det_by_autograd(lambda one: network(one, None, context)[0], x[0]), abs=1e-9
    )
    assert not torch.allclose(network(x, None, 2 * context)[0], z)


def test_first_couplings_change_one_colour_of_the_checkerboard_each():
    network = CouplingFlow((1, 4, 4), [4], num_couplings=2, num_blocks=1)
    white = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 1
    awake(network.scales.couplings[0])
    x = points(1, 16).view(1, 1, 4, 4)
    assert torch.equal((network(x)[0] != x)[0, 0], white)
    awake(network.scales.couplings[1])
    assert (network(x)[0] != x).all()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_channel_is_changed_by_one_of_a_pair_of_couplings(channels):
    groups = torch.tensor(list(channel_groups(channels)))
    assert groups.shape == (6, 4 * channels)
    assert (groups[::2] ^ groups[1::2]).all()
    assert groups.any(1).all()
    assert len(groups.unique(dim=0)) == 6


def test_log_scales_stay_within_their_learned_bound():
    coupling = awake(Coupling([True, False], width=4, num_blocks=1, given_dim=0), std=30.0)
    coupling.log_bound.data.fill_(math.log(2.0))
    x = points(4, 8).view(4, 2, 2, 2)
    assert coupling(x, None)[1].abs().max() <= 4 * 2.0 + 1e-5
    assert coupling(x, None)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (2, 12, 20)])
def test_coupling_flow_takes_sides_that_can_be_halved(shape):
    x = points(2, math.prod(shape)).view(2, *shape)
    network = awake(COUPLINGS(in_shape=shape, condition_dim=0))
    z, log_det = network(x)
    assert z.shape == x.shape
    assert log_det.shape == (2,)


@pytest.mark.parametrize("shape", [(1, 27, 28), (1, 28, 30), (5,)])
def test_coupling_flow_refuses_other_shapes_by_their_size(shape):
    with pytest.raises(UserError, match=f"multiples of 4; the data set gives {'x'.join(map(str, shape))} .*network.widths"):
        COUPLINGS(in_shape=shape, condition_dim=0)


def test_networks_refuse_sizes_that_are_none():
    with pytest.raises(UserError, match="num_bins=0"):
        NeuralSplineFlow((2,), [8], num_transforms=1, num_bins=0, passes=2)
    with pytest.raises(UserError, match="num_transforms=0"):
        MaskedAutoregressiveFlow((2,), [8], num_transforms=0, passes=None)
    with pytest.raises(UserError, match="passes=0"):
        MaskedAutoregressiveFlow((2,), [8], num_transforms=1, passes=0)


# --- scaling ---------------------------------------------------------------------------------------------------------


def test_logit_is_finite_at_the_ends_and_inverted():
    v = torch.tensor([[0.0, 1e-3, 0.5, 1 - 1e-3, 1.0]])
    y, log_det = logit(v)
    assert y.isfinite().all()
    assert log_det.isfinite().all()
    torch.testing.assert_close(sigmoid(y), v, atol=1e-6, rtol=0)


@pytest.mark.parametrize("is_bounded", [True, False])
def test_scaling_standardizes_the_data_it_has_seen(is_bounded):
    x = SampleNoise(0).uniform((500, 3), torch.zeros(())) if is_bounded else 5 + 3 * points(500, 3)
    scaling = Scaling((3,), is_bounded)
    scaling.fit(x.split(64))
    z, _ = scaling(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaling.inverse(z), x, atol=1e-5, rtol=1e-5)


def test_column_without_spread_keeps_its_scale():
    x = torch.stack([points(50, 1)[:, 0], torch.full((50,), 7.3)], 1)
    scaling = Scaling((2,), is_bounded=False)
    scaling.fit([x])
    assert scaling.log_std[1] == 0
    assert scaling(x)[0].abs().max() < 10


# --- dequantization --------------------------------------------------------------------------------------------------


def test_noise_fills_the_whole_bin_evenly():
    spec = image_spec((1, 1, 1), "discrete", levels=5)
    x = spec.to_units(torch.full((20_000, 1, 1, 1), 3))
    y, log_volume = dequantize(x, spec, SampleNoise(0))
    place = ((y - x) / math.exp(log_volume)).flatten()
    assert -0.5 < place.min() < -0.499
    assert 0.499 < place.max() < 0.5
    assert float(place.mean()) == pytest.approx(0, abs=0.01)
    assert float(place.var()) == pytest.approx(1 / 12, rel=0.03)


def test_quantize_gives_the_nearest_level_and_clamps():
    spec = image_spec((1, 1, 1), "discrete", levels=3)
    y = torch.tensor([-9.0, -0.6, -0.4, 0.1, 0.6, 9.0])
    assert quantize(y, spec).tolist() == [-1, -1, 0, 0, 1, 1]


@pytest.mark.parametrize("kind", [UniformDequantization, LEARNED], ids=["uniform", "learned"])
def test_draws_of_the_noise_stay_in_their_bins(kind):
    spec = image_spec((1, 4, 4), "discrete")
    torch.manual_seed(0)
    dequantization = awake(kind(spec=spec), std=3.0)
    x = spec.to_units(torch.arange(16).mul(17).view(1, 1, 4, 4)).expand(50, -1, -1, -1)
    v, log_q = dequantization(x, SampleNoise(0))
    assert v.min() > 0
    assert v.max() < 1
    assert torch.equal(dequantization.to_data(v), x)
    assert log_q.isfinite().all()


def test_bound_of_draws_is_the_log_of_the_mean_weight():
    weights = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    draws = iter(weights.log())
    terms = bound_of_draws(lambda: next(draws), 2)
    torch.testing.assert_close(sum(terms.values()), weights.mean(0).log())
    torch.testing.assert_close(terms["one_draw"], weights.log().mean(0))
    assert terms["several_draws"].min() >= -1e-6


@pytest.mark.parametrize("levels", [2, 256])
def test_training_the_noise_raises_the_bound_towards_the_probability(levels):
    spec = image_levels((1, 2, 2), levels)
    torch.manual_seed(0)
    model = Flow(spec, Identity, LEARNED, num_dequantizations=1)
    x = torch.full((400, 1, 2, 2), -1.0)
    exact = 4 * float(torch.special.log_ndtr(torch.tensor(1 / levels, dtype=torch.float64).logit()))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)

    def bound() -> float:
        with torch.no_grad():
            return float(model.log_prob_bound(x, generator=SampleNoise(0)).mean())

    uniform = bound()
    for step in range(60):
        optimizer.zero_grad()
        model.loss(Batch(x), generator=SampleNoise(1 + step))["loss"].mean().backward()
        optimizer.step()
    assert uniform + 0.1 < bound() <= exact + 0.02


# --- the model -------------------------------------------------------------------------------------------------------


def test_flow_has_all_its_capabilities():
    model = flow(vector_spec(3), SPLINES)
    for capability in (CanSample, CanScore, CanBound, CanEncode, CanDecode, HasSettings, NeedsPreparation, Trainable):
        assert isinstance(model, capability)


@every_image_flow
@pytest.mark.parametrize("kind", ["discrete", "binary_static"])
def test_levels_survive_the_way_to_the_latents_and_back(network, kind):
    spec = image_spec((1, 4, 4), kind)
    model = flow(spec, network)
    ends = torch.cat([torch.full((1, 1, 4, 4), end) for end in (-1.0, 1.0)])
    x = torch.cat([levels_of(spec), ends])
    model.prepare(lambda: [Batch(x)], generator=StreamNoise(0))
    z = model.encode(x)
    assert z.shape == (len(x), 16)
    assert torch.equal(model.decode(z), x)
    assert model.log_prob_bound(x, generator=SampleNoise(0)).isfinite().all()
    loss = model.loss(Batch(x), generator=SampleNoise(0))
    assert all(values.isfinite().all() for values in loss.values())
    torch.testing.assert_close(loss["bits_per_dim"] * 16 * math.log(2), loss["loss"])


def test_prepared_flow_is_near_the_data_before_the_first_step():
    data = image_data((1, 8, 8), "discrete")
    torch.manual_seed(0)
    model = Flow(data.spec, COUPLINGS, UniformDequantization, num_dequantizations=1)
    batches = [data.to_units(batch) for batch in data.train_dataloader()]
    model.prepare(lambda: batches, generator=StreamNoise(0))
    bits = model.loss(batches[0], generator=SampleNoise(0))["bits_per_dim"].mean()
    assert 7 < bits < 9  # of pixels that need 8


def test_more_draws_give_a_tighter_bound_whose_parts_add_up():
    spec = image_spec((1, 4, 4), "discrete")
    x = levels_of(spec)
    model = flow(spec, COUPLINGS, num_dequantizations=64)
    terms = model.log_prob_bound_terms(x, generator=SampleNoise(0))
    assert (terms["several_draws"] > 0).all()
    bound = model.log_prob_bound(x, generator=SampleNoise(0))
    torch.testing.assert_close(bound, sum(terms.values()))
    loss = flow(spec, COUPLINGS, num_dequantizations=1)
    once = loss.log_prob_bound(x, generator=SampleNoise(0))
    torch.testing.assert_close(-loss.loss(Batch(x), generator=SampleNoise(0))["loss"], once)


def test_bound_of_an_example_does_not_depend_on_its_batch():
    spec = image_spec((1, 4, 4), "discrete")
    model, x = flow(spec, COUPLINGS, LEARNED), levels_of(spec)
    together = model.log_prob_bound(x, generator=SampleNoise(0))
    apart = torch.cat([model.log_prob_bound(x[i : i + 2], generator=SampleNoise(0, i)) for i in range(0, 6, 2)])
    torch.testing.assert_close(apart, together)


def test_bound_is_of_levels_and_the_density_of_real_values():
    of_levels, of_points = flow(image_spec((1, 4, 4), "discrete"), COUPLINGS), flow(vector_spec(2), SPLINES)
    with pytest.raises(NotApplicable, match="lower bound"):
        of_levels.log_prob(torch.zeros(1, 1, 4, 4))
    with pytest.raises(NotApplicable, match="exact log density"):
        of_points.log_prob_bound(torch.zeros(1, 2))
    assert of_levels.settings() == {"dequantization": "uniform", "bound": "log-mean-exp over 3 draws"}
    assert of_points.settings() == {}
    assert of_levels.objective != of_points.objective


@pytest.mark.parametrize("network", [SPLINES, AFFINE], ids=["splines", "affine"])
def test_density_is_in_the_units_of_the_data(network):
    x = points(50, 3)
    densities = []
    for scale, shift in ((1.0, 0.0), (100.0, 7.0)):
        model, scaled = flow(vector_spec(3), network).double(), (scale * x + shift).double()
        model.prepare(lambda x=scaled: [Batch(x)], generator=StreamNoise(0))
        densities.append(model.log_prob(scaled))
    torch.testing.assert_close(densities[1], densities[0] - 3 * math.log(100), atol=1e-4, rtol=0)


def test_density_of_values_in_a_range_is_that_of_the_logits_times_their_slope():
    spec = image_spec((1, 2, 2), "continuous")
    model = Flow(spec, Identity, UniformDequantization, num_dequantizations=1)
    x = torch.tensor([0.2, -0.5, 0.9, 0.0]).view(1, 1, 2, 2)
    v = (x + 1) / 2
    expected = torch.distributions.Normal(0, 1).log_prob(v.logit()) - (v * (1 - v)).log() - math.log(2)
    torch.testing.assert_close(model.log_prob(x), expected.sum().view(1), atol=1e-3, rtol=0)
    torch.testing.assert_close(model.decode(model.encode(x)), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("network", [SPLINES, AFFINE], ids=["splines", "affine"])
def test_samples_of_points_are_repeatable_and_independent_of_their_batch(network):
    model = flow(vector_spec(4), network)
    torch.manual_seed(1)
    together = model.sample(6, generator=SampleNoise(5))
    torch.manual_seed(2)
    apart = torch.cat([model.sample(2, generator=SampleNoise(5, start)) for start in (0, 2, 4)])
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(model.encode(together)), together, atol=1e-4, rtol=0)


def test_density_and_samples_depend_on_the_class():
    spec = vector_spec(2, num_classes=3)
    model, x = flow(spec, SPLINES, conditional=True), points(3, 2)
    first, second = (model.log_prob(x, condition) for condition in (torch.arange(3), torch.arange(3).roll(1)))
    assert (first - second).abs().min() > 1e-4
    assert model.sample(3, torch.arange(3), generator=SampleNoise(0)).shape == (3, 2)
    assert "given its class" in model.objective


def test_what_has_no_levels_needs_no_learned_noise():
    with pytest.raises(UserError, match="dequantization=uniform"):
        flow(vector_spec(2), SPLINES, LEARNED)


@pytest.mark.parametrize(
    "parts", [("model=flow_image", "dequantization=variational"), ("model=flow", MASKED)], ids="-".join
)
def test_parts_combine_by_their_names_and_all_of_them_learn(parts):
    spec = image_spec((1, 4, 4), "discrete")
    torch.manual_seed(0)
    model = awake(build_model(compose_config(*parts).model, spec, "flow"))
    terms = model.loss(Batch(levels_of(spec)), generator=SampleNoise(0))
    gradients = torch.autograd.grad(terms["loss"].mean(), list(model.parameters()))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_flow_refuses_too_few_draws():
    with pytest.raises(UserError, match=r"model\.num_dequantizations=0"):
        flow(image_spec((1, 4, 4), "discrete"), COUPLINGS, num_dequantizations=0)
