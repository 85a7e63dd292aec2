"""Flow matching: closed forms between Gaussians, couplings, and what flow matching and diffusion models share."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import NotApplicable, UserError
from src.core.protocols import (
    CanBeSteered,
    CanBound,
    CanDecode,
    CanEncode,
    CanInpaint,
    CanSample,
    CanScore,
    CountsEvaluations,
    CountsLikelihoodEvaluations,
    HasPaths,
    HasSettings,
    NeedsPreparation,
    Trainable,
)
from src.core.rng import SampleNoise, StreamNoise
from src.evaluation import matching_oracles
from src.evaluation.matching_oracles import CHECKS, gaussian_denoiser, gaussian_field
from src.objectives.diffusion import EDM
from src.objectives.matching import EightGaussians, StandardNormal, StraightPath, VariancePreservingPath, matching_loss
from src.objectives.transport import Independent, OptimalTransport, cheapest_assignment
from src.samplers.diffusion import DDIM
from src.samplers.ode import Adaptive, Euler, Heun
from tests.examples import image_spec, vector_spec
from tests.stepwise import KINDS, flow_matching

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return SampleNoise(seed).normal(shape, torch.zeros(()))


def classes(n: int, num_classes: int = 3) -> Tensor:
    return torch.arange(n) % num_classes


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_quantity_has_its_known_value(check):
    before = torch.get_rng_state()
    found = list(check())
    assert found
    assert [oracle for oracle in found if not oracle.holds] == []
    assert len({oracle.name for oracle in found}) == len(found)
    assert torch.equal(before, torch.get_rng_state())


def test_wrong_field_fails_the_oracles(monkeypatch):
    monkeypatch.setattr(matching_oracles, "gaussian_field", lambda mu, sigma: gaussian_field(mu + 0.3, sigma))
    for check in (matching_oracles.irreducible_matching_loss, matching_oracles.flow_between_gaussians):
        assert not all(oracle.holds for oracle in check())


@pytest.mark.parametrize("path", [StraightPath(), VariancePreservingPath()])
def test_target_is_the_derivative_of_the_path(path):
    x0, x1 = normal(4, 2, 3).double(), normal(4, 2, 3, seed=1).double()
    t = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    x_t, target = path.at(x0, x1, t)
    torch.testing.assert_close(x_t[0], x0[0])
    torch.testing.assert_close(x_t[3], x1[3])
    step = 1e-6
    later, earlier = path.at(x0, x1, t + step)[0], path.at(x0, x1, t - step)[0]
    torch.testing.assert_close((later - earlier) / (2 * step), target, rtol=1e-6, atol=1e-6)


def test_variance_preserving_path_preserves_variance():
    t = torch.linspace(0, 1, 9)
    a, b, *_ = VariancePreservingPath().coefficients(t)
    torch.testing.assert_close(a.square() + b.square(), torch.ones(9))


def test_loss_is_a_mean_over_dimensions_in_float32():
    v, target = normal(5, 2, 3), normal(5, 2, 3, seed=1)
    loss = matching_loss(v.bfloat16(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (v - target).square().sum((1, 2)) / 6, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("source", [StandardNormal(), EightGaussians(2.0, 0.4)])
def test_source_has_the_density_that_it_is_drawn_from(source):
    """Its density adds up to 1, and so much of it is in each ring around the origin as of the draws."""
    grid = torch.linspace(-6, 6, 241, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    mass = source.log_prob(points).exp() * 0.05**2
    assert float(mass.sum()) == pytest.approx(1, abs=1e-4)
    x = source.sample((20_000, 2), points, SampleNoise(0))
    assert x.dtype == torch.float64
    drawn = torch.bincount((x.norm(dim=1) / 0.5).long(), minlength=20) / len(x)
    expected = torch.zeros(20, dtype=torch.float64).index_add(0, (points.norm(dim=1) / 0.5).long(), mass)
    torch.testing.assert_close(drawn.double(), expected, rtol=0, atol=0.02)


# --- couplings -------------------------------------------------------------------------------------------------------


def test_cheapest_assignment_is_the_best_of_all_permutations():
    x0, x1 = normal(6, 2), normal(6, 2, seed=1)

    def cost(order: Sequence[int]) -> float:
        return float((x0[torch.tensor(order)] - x1).square().sum())

    order = cheapest_assignment(x0, x1)
    assert sorted(order.tolist()) == list(range(6))
    assert cost(order.tolist()) == pytest.approx(min(cost(some) for some in itertools.permutations(range(6))))


@pytest.mark.parametrize("coupling", [Independent(), OptimalTransport()])
@pytest.mark.parametrize("condition", [None, classes(12)])
def test_coupling_is_a_permutation_of_the_noise_within_each_class(coupling, condition):
    x0, x1 = normal(12, 1, 2, 2), normal(12, 1, 2, 2, seed=1)
    order = coupling.order(x0, x1, condition)
    assert sorted(order.tolist()) == list(range(12))
    if condition is not None:
        assert torch.equal(condition[order], condition)


def test_optimal_transport_leaves_the_noise_of_every_class_standard_normal():
    """Two classes apart: over all of a batch near noise goes to the near class, within a class it does not."""
    means = torch.tensor([[-4.0, 0.0], [4.0, 0.0]])
    skewed, kept = [], []
    for seed in range(40):
        condition = classes(64, 2)
        x1 = means[condition] + normal(64, 2, seed=2 * seed)
        x0 = normal(64, 2, seed=2 * seed + 1)
        for found, given in ((skewed, None), (kept, condition)):
            found.append(x0[OptimalTransport().order(x0, x1, given)][condition == 1])
    error = 1 / math.sqrt(40 * 32)
    assert float(torch.cat(skewed)[:, 0].mean()) > 0.5
    x0 = torch.cat(kept)
    assert float(x0.mean(0).abs().max()) <= 3 * error
    assert float((x0.T.cov() - torch.eye(2)).abs().max()) <= 3 * math.sqrt(2) * error


class Remembers(nn.Module):
    """Keeps what it was asked, and answers with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.asked: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        self.asked.append((x, t, condition))
        return self.weight * x


@pytest.mark.parametrize("coupling", [Independent(), OptimalTransport()])
def test_labels_stay_with_their_examples(coupling):
    """Class k lies at (100 k, 0), so x_t / t tells which example each row is made of."""
    model = flow_matching(vector_spec(2, 3), coupling=coupling, conditional=True, standardize=False).train()
    model.network = Remembers()
    condition = classes(30)
    x = torch.stack([100.0 * condition, torch.zeros(30)], 1)
    model.loss(Batch(x, condition), generator=SampleNoise(0))
    ((x_t, t, one_hot),) = model.network.asked
    far = t > 0.1
    assert torch.equal((x_t[far, 0] / t[far] / 100).round().long(), condition[far])
    assert torch.equal(one_hot.argmax(1), condition)


def test_condition_is_dropped_for_about_the_share_asked_for():
    model = flow_matching(vector_spec(2, 3), conditional=True, drop_condition=0.2).train()
    model.network = Remembers()
    condition = classes(3000)
    model.loss(Batch(normal(3000, 2), condition), generator=SampleNoise(0))
    one_hot = model.network.asked[0][2]
    is_dropped = one_hot.sum(1) == 0
    assert float(is_dropped.float().mean()) == pytest.approx(0.2, abs=3 * math.sqrt(0.16 / 3000))
    assert torch.equal(one_hot[~is_dropped].argmax(1), condition[~is_dropped])


def test_held_out_loss_looks_at_a_time_of_each_quarter_and_has_the_training_losss_mean():
    model = flow_matching(vector_spec(2))
    batch = Batch(normal(4000, 2))
    held_out = model.loss(batch, generator=SampleNoise(0))["loss"]
    trained = model.train().loss(batch, generator=SampleNoise(1))["loss"]
    held_out, trained = held_out.detach(), trained.detach()
    error = 3 * math.sqrt(float(held_out.var() + trained.var()) / 4000)
    assert float(held_out.mean()) == pytest.approx(float(trained.mean()), abs=error)
    assert held_out.std() < 0.6 * trained.std()
    model.eval().network = Remembers()
    model.loss(batch, generator=SampleNoise(0))
    assert [set((4 * t).long().tolist()) for _, t, _ in model.network.asked] == [{0}, {1}, {2}, {3}]


@pytest.mark.parametrize("coupling", [Independent(), OptimalTransport()])
def test_held_out_loss_of_an_example_depends_on_it_and_its_noise_alone(coupling):
    model = flow_matching(vector_spec(2), coupling=coupling)
    x = normal(6, 2)
    together = model.loss(Batch(x), generator=SampleNoise(0))["loss"]
    apart = [model.loss(Batch(x[i : i + 1]), generator=SampleNoise(0, i))["loss"] for i in range(6)]
    torch.testing.assert_close(torch.cat(apart), together)


@torch.no_grad()
def test_optimal_transport_pairs_in_training_and_says_that_it_does_not_in_evaluation():
    """A field of zeros has the mean squared distance of the pairs as its loss."""
    model = flow_matching(vector_spec(2), coupling=OptimalTransport(), standardize=False)
    model.network = Remembers()
    batch = Batch(normal(256, 2, seed=3))
    held_out = float(model.loss(batch, generator=SampleNoise(0))["loss"].mean())
    trained = float(model.train().loss(batch, generator=SampleNoise(0))["loss"].mean())
    assert held_out == pytest.approx(2, abs=0.3)
    assert trained < 0.2
    assert "independent pairs in evaluation" in model.objective


def test_objective_says_what_its_value_depends_on():
    spec, images = vector_spec(2, 3), image_spec((1, 2, 2), "discrete")
    models = [
        flow_matching(spec),
        flow_matching(spec, standardize=False),
        flow_matching(spec, path=VariancePreservingPath()),
        flow_matching(spec, coupling=OptimalTransport()),
        flow_matching(spec, source=EightGaussians(5.0, 0.5), standardize=False),
        flow_matching(spec, conditional=True),
        flow_matching(spec, conditional=True, drop_condition=0.1),
        flow_matching(images),
        KINDS["diffusion"](spec),
    ]
    assert len({model.objective for model in models}) == len(models)


# --- what both kinds of model promise --------------------------------------------------------------------------------


@every_kind
def test_capabilities(kind):
    model = kind(vector_spec(2, 3))
    for one in (
        CanSample,
        CanScore,
        CanBound,
        CanDecode,
        CanInpaint,
        HasSettings,
        CountsEvaluations,
        CountsLikelihoodEvaluations,
        CanBeSteered,
        Trainable,
    ):
        assert isinstance(model, one), one
    assert isinstance(model, HasPaths) == (kind is flow_matching)
    assert isinstance(model, NeedsPreparation)
    assert not isinstance(model, CanEncode)


@every_kind
@pytest.mark.parametrize("sampler", [Heun(6), Euler(6), Adaptive(1e-4, 1e-4)])
def test_samples_do_not_depend_on_their_batch(kind, sampler):
    model = kind(vector_spec(3, 3), sampler=sampler, conditional=True)
    together = model.sample(7, classes(7), generator=SampleNoise(0))
    apart = [model.sample(1, classes(7)[i : i + 1], generator=SampleNoise(0, i)) for i in range(7)]
    torch.testing.assert_close(torch.cat(apart), together, rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("size", [1, 3])
def test_steps_by_the_error_do_not_depend_on_the_batch_either(kind, size):
    """Rounding errors differ with the size of a batch; where they were as large as the errors that steps are chosen by,
    the steps would differ, too."""
    model = kind(vector_spec(2), sampler=Adaptive(1e-5, 1e-5))
    together = model.sample(8, generator=SampleNoise(0))
    apart = [model.sample(min(size, 8 - i), generator=SampleNoise(0, i)) for i in range(0, 8, size)]
    torch.testing.assert_close(torch.cat(apart), together, rtol=1e-5, atol=1e-5)


@every_kind
def test_sample_is_the_decoded_noise(kind):
    model = kind(vector_spec(3, 3), conditional=True)
    z = SampleNoise(0).normal((5, 3), torch.zeros(()))
    assert model.latent_dim == 3
    torch.testing.assert_close(model.decode(z, classes(5)), model.sample(5, classes(5), generator=SampleNoise(0)))


@every_kind
def test_guidance_of_1_is_the_plain_conditional_model_to_the_bit(kind):
    spec = vector_spec(3, 3)
    plain, guided = kind(spec, conditional=True), kind(spec, conditional=True, drop_condition=0.1)
    expected = plain.sample(5, classes(5), generator=SampleNoise(0))
    assert torch.equal(guided.sample(5, classes(5), generator=SampleNoise(0)), expected)
    assert guided.num_evaluations == plain.num_evaluations  # none of a missing class
    guided.steer(guidance=2.0)
    assert not torch.allclose(guided.sample(5, classes(5), generator=SampleNoise(0)), expected)
    guided.steer(guidance=1.0)
    assert torch.equal(guided.sample(5, classes(5), generator=SampleNoise(0)), expected)


@every_kind
def test_guidance_of_0_forgets_the_class(kind):
    model = kind(vector_spec(3, 3), conditional=True, drop_condition=0.1, guidance=0.0)
    one, other = (model.sample(5, torch.full((5,), k), generator=SampleNoise(0)) for k in (0, 1))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("name", "sampler", "each"),
    [
        ("flow_matching", Heun(6), 12),
        ("flow_matching", Euler(6), 6),
        ("diffusion", Heun(6), 11),
        ("diffusion", Euler(6), 6),
        ("diffusion", DDIM(6, 1.0), 6),
        ("flow_matching", Adaptive(1e-4, 1e-4), None),
    ],
)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_evaluations_are_counted_as_they_happen(name, sampler, each, guidance):
    model = KINDS[name](vector_spec(3, 3), sampler=sampler, conditional=True, drop_condition=0.1, guidance=guidance)
    model.log_prob(normal(2, 3), classes(2))
    before = model.network.num_rows
    assert model.num_likelihood_evaluations == before > 0
    assert model.num_evaluations == 0  # those of a likelihood are none of a sample
    model.sample(5, classes(5), generator=SampleNoise(0))
    assert model.num_evaluations == model.network.num_rows - before
    assert model.num_likelihood_evaluations == before
    if each is not None:
        assert model.num_evaluations == 5 * each * (1 if guidance == 1 else 2)


@every_kind
def test_steering_is_on_the_card(kind):
    model = kind(vector_spec(3, 3), conditional=True, drop_condition=0.1)
    likelihood = {"solver": "dormand_prince", "rtol": 1e-4, "atol": 1e-4, "divergence": "exact"}
    assert model.settings() == {"solver": "heun", "steps": 6, "guidance": 1.0, "likelihood": likelihood}
    model.steer(steps=3, guidance=2)
    assert model.settings() == {"solver": "heun", "steps": 3, "guidance": 2.0, "likelihood": likelihood}
    model.steer()
    assert model.settings()["steps"] == 3


@every_kind
@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"guidance": 2.0, "conditional": True}, r"model\.guidance=2 needs .* model\.drop_condition=0\.1"),
        ({"guidance": 2.0}, r"model\.guidance=2 needs a conditional model"),
        ({"guidance": -1.0, "conditional": True, "drop_condition": 0.1}, r"model\.guidance=-1.0 must be at least 0"),
        ({"drop_condition": 0.1}, r"model\.drop_condition=0\.1 needs a condition .* model\.conditional=true"),
        ({"drop_condition": 1.0, "conditional": True}, r"model\.drop_condition=1\.0 must be"),
        ({"divergence": "approximate"}, r"model\.divergence=approximate is not known; allowed: exact, hutchinson"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(kind, keys, sentence):
    with pytest.raises(UserError, match=sentence):
        kind(vector_spec(2, 3), **keys)


@every_kind
def test_steering_refuses_what_the_model_cannot_do(kind):
    with pytest.raises(UserError, match=r"^guidance=2 needs"):
        kind(vector_spec(2, 3)).steer(guidance=2.0)
    with pytest.raises(UserError, match="steps=5 cannot be set"):
        kind(vector_spec(2, 3), sampler=Adaptive(1e-4, 1e-4)).steer(steps=5)
    with pytest.raises(UserError, match=r"sampler\.steps=0"):
        kind(vector_spec(2, 3)).steer(steps=0)


def test_flow_matching_refuses_parts_that_do_not_fit():
    with pytest.raises(UserError, match="sampler=euler, heun or adaptive"):
        flow_matching(vector_spec(2), sampler=DDIM(5, 0.0))
    with pytest.raises(UserError, match=r"model\.standardize=false"):
        flow_matching(vector_spec(2), source=EightGaussians(5.0, 0.5))
    with pytest.raises(UserError, match="source=eight_gaussians is of points in the plane; data=made_up gives vector 3"):
        flow_matching(vector_spec(3), source=EightGaussians(5.0, 0.5), standardize=False)
    assert not isinstance(flow_matching(vector_spec(2), source=EightGaussians(5.0, 0.5), standardize=False), CanDecode)


@every_kind
def test_preparation_brings_data_to_their_scale_and_is_exact_in_the_likelihood(kind):
    spec = vector_spec(2)
    x = normal(500, 2) * torch.tensor([3.0, 0.2]) + torch.tensor([10.0, -1.0])
    model = kind(spec)
    model.prepare(lambda: [Batch(x[:100]), Batch(x[100:])], generator=StreamNoise(0))
    own = model._to_model(x)
    assert float(own.mean(0).abs().max()) < 1e-5
    std = 1.0 if kind is flow_matching else 0.5
    torch.testing.assert_close(own.std(0, correction=0), torch.full((2,), std))
    raw = kind(spec, standardize=False)
    expected = raw.log_prob(own[:4]) - model.scale.log().sum()
    torch.testing.assert_close(model.log_prob(x[:4]), expected, rtol=1e-4, atol=1e-4)


def test_preparation_of_images_is_by_channel_and_leaves_constant_values_alone():
    model = flow_matching(image_spec((2, 4, 4), "continuous"))
    x = torch.cat([0.3 + 0.1 * normal(50, 1, 4, 4), torch.full((50, 1, 4, 4), -1.0)], 1)
    model.prepare(lambda: [Batch(x)], generator=StreamNoise(0))
    assert model.shift.shape == (2, 1, 1)
    torch.testing.assert_close(model.shift.flatten(), torch.tensor([float(x[:, 0].mean()), -1.0]))
    torch.testing.assert_close(model.scale.flatten(), torch.tensor([float(x[:, 0].std()), 1.0]), rtol=1e-3, atol=0)


@every_kind
def test_density_of_a_model_integrates_to_one(kind):
    model = kind(vector_spec(1), likelihood_solver=Adaptive(1e-5, 1e-5))
    x = torch.linspace(-8, 8, 1601)[:, None] * (1 if kind is flow_matching else 0.6)
    log_prob = model.log_prob(x)
    assert float(torch.trapezoid(log_prob.exp(), x[:, 0])) == pytest.approx(1, abs=5e-3)


@every_kind
def test_exact_and_estimated_likelihood_agree_on_average(kind):
    spec, x = vector_spec(3), normal(1, 3)
    exact = kind(spec).log_prob(x)
    estimates = kind(spec, divergence="hutchinson").log_prob(x.expand(1000, 3), generator=SampleNoise(0))
    assert float(estimates.mean()) == pytest.approx(float(exact), abs=3 * float(estimates.std()) / math.sqrt(1000) + 1e-3)


@every_kind
def test_bound_of_levels_is_the_density_of_the_bins(kind):
    spec = image_spec((1, 1, 2), "discrete", levels=4)
    model = kind(spec, divergence="exact")
    x = torch.tensor([[-1.0, -1 / 3], [1.0, 1 / 3]]).reshape(2, 1, 1, 2)
    terms = model.log_prob_bound_terms(x, generator=SampleNoise(0))
    torch.testing.assert_close(terms["bins"], torch.full((2,), 2 * math.log(2 / 3)))
    torch.testing.assert_close(model.log_prob_bound(x, generator=SampleNoise(0)), terms["density"] + terms["bins"])
    with pytest.raises(NotApplicable, match="see the bound"):
        model.log_prob(x)
    assert model.settings()["likelihood"]["dequantization"] == "uniform, one draw"


@every_kind
def test_binary_and_continuous_values_have_no_bound(kind):
    for values, reason in (("binary_static", "no likelihood of binary"), ("continuous", "log likelihood of continuous")):
        with pytest.raises(NotApplicable, match=reason):
            kind(image_spec((1, 2, 2), values)).log_prob_bound_terms(torch.ones(1, 1, 2, 2))


@every_kind
def test_samples_of_discrete_data_are_levels(kind):
    spec = image_spec((1, 3, 3), "discrete", levels=5)
    x = kind(spec).sample(20, generator=SampleNoise(0))
    torch.testing.assert_close(spec.to_units(spec.to_levels(x)), x)
    assert len(x.unique()) > 2


@every_kind
def test_inpainting_keeps_what_is_known_and_draws_the_rest(kind):
    spec = image_spec((1, 4, 4), "continuous")
    x = normal(3, 1, 4, 4).clamp(-1, 1)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    model = kind(spec)
    first, again, other = (model.inpaint(x, mask, generator=SampleNoise(seed)) for seed in (0, 0, 1))
    assert torch.equal(first[..., :2], x[..., :2])
    assert torch.equal(first, again)
    assert not torch.allclose(first[..., 2:], other[..., 2:])


class LineDenoiser(nn.Module):
    """What EDM's network must answer for x0 = (a, a) plus a little: the best denoiser, along the line and across it."""

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        sigma = (4 * t).exp()
        c = EDM(0.5).coefficients(sigma[:, None])
        x = x / c.scale
        turn = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
        parts = zip((0.5, 0.02), (x @ turn).unbind(1), strict=True)
        clean = torch.stack([gaussian_denoiser(0.0, scale)(part, sigma) for scale, part in parts], 1) @ turn
        return (clean - c.skip * x) / c.out


@pytest.mark.parametrize(("sampler", "largest"), [(Heun(40), 0.5), (DDIM(100, 1.0), 0.2)])
def test_inpainting_follows_what_is_known(sampler, largest):
    """The missing value is nearly the known one; not exactly, since the noise is lost on the two at once."""
    model = KINDS["diffusion"](vector_spec(2), sampler=sampler, standardize=False)
    model.network = LineDenoiser()
    known = 0.5 * normal(200, 1)
    x = torch.cat([known, torch.zeros(200, 1)], 1)
    drawn = model.inpaint(x, torch.tensor([[True, False]]), generator=SampleNoise(1))
    apart = float((drawn[:, 1] - known[:, 0]).abs().mean())
    assert apart < largest * float((model.sample(200, generator=SampleNoise(2))[:, 1] - known[:, 0]).abs().mean())


@every_kind
def test_mixed_precision_does_not_reach_the_paths(kind):
    model = kind(vector_spec(3))
    expected = model.sample(4, generator=SampleNoise(0))
    x = normal(4, 3)
    log_prob = model.log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.sample(4, generator=SampleNoise(0)), expected)
        assert torch.equal(model.log_prob(x), log_prob)
        assert model.loss(Batch(x), generator=SampleNoise(0))["loss"].dtype == torch.float32


class Constant(nn.Module):
    """The same answer everywhere."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.answer.expand_as(x)


def test_energy_of_straight_paths_is_their_squared_length_in_data_units():
    model = flow_matching(vector_spec(2))
    model.network = Constant(torch.tensor([3.0, -1.0]))
    model.scale.copy_(torch.tensor([1.0, 2.0]))
    model.shift.fill_(100.0)
    terms = model.path_energy_terms(5, generator=SampleNoise(0))
    torch.testing.assert_close(terms["displacement"], torch.full((5,), 3.0**2 + 2.0**2))
    torch.testing.assert_close(terms["bend"], torch.zeros(5), rtol=0, atol=1e-3)


def test_energy_of_paths_between_gaussians():
    """x(t) = t mu + r(t) x0 with r^2 = (1 - t)^2 + (t sigma)^2: the energy is the integral of (mu + r' x0)^2."""
    mu, sigma = 1.5, 2.0
    model = flow_matching(vector_spec(1), sampler=Euler(1), likelihood_solver=Adaptive(1e-6, 1e-6))
    model.network = Field(gaussian_field(mu, sigma))
    terms = model.path_energy_terms(16, generator=SampleNoise(0))
    x0 = SampleNoise(0).normal((16, 1), torch.zeros(())).double()
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    speed = mu + x0 * (t * sigma**2 - (1 - t)) / ((1 - t).square() + (t * sigma).square()).sqrt()
    torch.testing.assert_close(terms["displacement"].double(), (mu + (sigma - 1) * x0).square()[:, 0], rtol=1e-4, atol=1e-4)
    energy = torch.trapezoid(speed.square(), t)
    torch.testing.assert_close((terms["displacement"] + terms["bend"]).double(), energy, rtol=1e-4, atol=1e-4)
    begin = {"source": "N(0, I)", "standardization": "to mean 0 and standard deviation 1"}
    assert model.path_settings() == begin | {"solver": "dormand_prince", "rtol": 1e-6, "atol": 1e-6}
    plain = flow_matching(vector_spec(2), source=EightGaussians(5.0, 0.1), standardize=False)
    assert "on a circle" in plain.path_settings()["source"]
    assert plain.path_settings()["standardization"] == "none"


def test_the_objective_says_that_held_out_pairs_are_independent():
    of = {kind: flow_matching(vector_spec(2), coupling=kind()).objective for kind in (Independent, OptimalTransport)}
    assert "each batch of the training, independent pairs in evaluation, from N(0, I)" in of[OptimalTransport]
    assert "straight paths, independent pairs, from N(0, I)" in of[Independent]


class Field(nn.Module):
    """A field that is a formula."""

    def __init__(self, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._of = of

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self._of(x, t)
