"""Mixtures of Gaussians: scikit-learn's figures, closed forms, and what expectation maximization promises."""

import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from scipy.stats import multivariate_normal
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as ScikitLearns
from torch import Tensor

from src.core.batch import Batch
from src.core.errors import UserError
from src.core.mixture import IsotropicMixture
from src.core.rng import SampleNoise, StreamNoise
from src.core.spec import CONTINUOUS, DISCRETE
from src.models.gmm import GaussianMixture
from src.objectives import gaussian_mixture
from src.objectives.gaussian_mixture import (
    COVARIANCES,
    Gaussians,
    add_statistics,
    coefficients,
    draw,
    from_clusters,
    from_statistics,
    kmeans_plus_plus,
    lloyd,
    log_joint,
    revive,
    statistics_of,
)
from src.training.fit import make_training_module
from tests import two_ranks
from tests.examples import image_spec, vector_spec

KINDS = pytest.mark.parametrize("kind", COVARIANCES)
DIM, NUM_COMPONENTS = 4, 3
MAXIMUM_LIKELIHOOD = {"prior_strength": 0.0, "reg_covar": 1e-12}


def clouds(count: int = 600, dim: int = DIM, seed: int = 0) -> Tensor:
    """Three overlapping clouds that are neither round nor of the same size, far from the origin, `(N, D)` float32."""
    noise, like = StreamNoise(seed), torch.zeros(())
    shapes = noise.normal((NUM_COMPONENTS, dim, dim), like)
    middles = 2 * noise.normal((NUM_COMPONENTS, dim), like)
    which = (noise.uniform((count,), like) * NUM_COMPONENTS).long()
    return (noise.normal((count, 1, dim), like) @ shapes[which])[:, 0] + middles[which] + 10


def prepared(x: Tensor, seed: int = 0, num_components: int = NUM_COMPONENTS, **keys: object) -> GaussianMixture:
    spec = image_spec(tuple(x.shape[1:]), keys.pop("values")) if x.ndim > 2 else vector_spec(x.shape[1])
    model = GaussianMixture(spec, num_components, **keys)
    model.prepare(lambda: (Batch(part) for part in x.split(250)), generator=StreamNoise(seed))
    return model


def epoch(model: GaussianMixture, x: Tensor, batch_size: int = 250) -> float:
    """One M step after all examples, or one after each batch; the mean log likelihood before."""
    terms = []
    for part in x.split(batch_size):
        terms.append(model.accumulate(Batch(part), generator=StreamNoise(1))["loss"])
        if model.maximizes_every_batch:
            model.maximize()
    if not model.maximizes_every_batch:
        model.maximize()
    return -float(torch.cat(terms).mean())


def score(model: GaussianMixture, x: Tensor) -> float:
    return -float(model.negative_log_likelihood(Batch(x), generator=SampleNoise(0))["loss"].mean())


def precisions(model: GaussianMixture) -> Tensor:
    """Precision matrices of the components, `(K, D, D)`."""
    kind, dim = model._covariance, model.means.shape[1]
    covariances = kind.to_covariances(model.factors)
    if covariances.ndim == 2:
        covariances = torch.diag_embed(covariances.expand(-1, dim))
    inverse = covariances.inverse()
    return (inverse + inverse.mT) / 2


# --- scikit-learn -----------------------------------------------------------------------------------------------------


def scikit_learns(model: GaussianMixture, x: Tensor, num_iterations: int) -> ScikitLearns:
    """Its mixture after so many iterations from the components that the model has now."""
    kind, given = model._covariance.in_words, precisions(model)
    of_kind = {"full": given, "diagonal": given.diagonal(dim1=1, dim2=2), "spherical": given[:, 0, 0]}[kind]
    theirs = ScikitLearns(
        len(model.means),
        covariance_type=kind.removesuffix("onal"),
        max_iter=num_iterations,
        tol=0,
        reg_covar=1e-12,
        weights_init=model.log_weights.exp().numpy(),
        means_init=(model.means + model.centre).numpy(),
        precisions_init=of_kind.numpy(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return theirs.fit(x.double().numpy())


@KINDS
def test_it_is_scikit_learns_after_as_many_iterations_from_the_same_start(kind):
    x = clouds()
    model = prepared(x, covariance=kind, **MAXIMUM_LIKELIHOOD)
    theirs = scikit_learns(model, x, num_iterations=10)
    for _ in range(10):
        epoch(model, x)
    ours, expected = model.log_prob(x), theirs.score_samples(x.double().numpy())
    assert ours.dtype == torch.float64
    assert float(ours.mean()) == pytest.approx(expected.mean(), abs=1e-4)  # asked for
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose((model.means + model.centre).numpy(), theirs.means_, rtol=0, atol=1e-8)
    np.testing.assert_allclose(model.log_weights.exp().numpy(), theirs.weights_, rtol=0, atol=1e-10)


@KINDS
def test_log_prob_is_the_sum_over_components(kind):
    model = prepared(clouds(), covariance=kind)
    points = clouds(5, seed=1)
    covariances = precisions(model).inverse()
    terms = [
        float(weight) * multivariate_normal((mean + model.centre).numpy(), covariance.numpy()).pdf(points.double().numpy())
        for weight, mean, covariance in zip(model.log_weights.exp(), model.means, covariances, strict=True)
    ]
    np.testing.assert_allclose(model.log_prob(points).exp().numpy(), sum(terms), rtol=1e-9)


# --- the two steps ----------------------------------------------------------------------------------------------------


def some(kind: str, count: int = 300, dim: int = DIM) -> tuple[Tensor, Gaussians]:
    """Centred points and components somewhere among them."""
    z = clouds(count, dim).double()
    z = z - z.mean(0)
    clusters = lloyd(z, kmeans_plus_plus(z, NUM_COMPONENTS, StreamNoise(0)), num_iterations=3)
    return z, from_clusters(z, clusters, NUM_COMPONENTS, COVARIANCES[kind], floor=1e-9)[0]


@KINDS
@pytest.mark.parametrize("values", [512, 2**19], ids=["in parts", "at once"])
def test_e_step_is_the_sum_over_examples_as_it_is_written(kind, values, monkeypatch):
    monkeypatch.setattr(gaussian_mixture, "_CACHED_VALUES", values)
    covariance = COVARIANCES[kind]
    z, gaussians = some(kind)
    joint = log_joint(z, gaussians, covariance)
    log_prob, r = joint.logsumexp(1), joint.softmax(1)
    of_z = {
        "full": (z[:, :, None] * z[:, None, :])[:, *torch.triu_indices(DIM, DIM)],
        "diagonal": z**2,
        "spherical": (z**2).sum(1, keepdim=True),
    }[kind]
    s = torch.cat([torch.ones(len(z), 1), z, of_z], 1)
    statistics = torch.zeros(NUM_COMPONENTS, s.shape[1], dtype=torch.float64)
    torch.testing.assert_close(add_statistics(z, coefficients(gaussians, covariance), covariance, statistics), log_prob)
    torch.testing.assert_close(statistics, r.T @ s)


@KINDS
def test_m_step_is_the_inverse_of_the_statistics(kind):
    covariance = COVARIANCES[kind]
    _, gaussians = some(kind)
    again, is_low = from_statistics(7 * statistics_of(gaussians, covariance), DIM, covariance, floor=1e-9)
    for name in ("log_weights", "means", "factors"):
        torch.testing.assert_close(getattr(again, name), getattr(gaussians, name))
    assert not is_low.any()


@KINDS
def test_likelihood_never_falls(kind):
    x = clouds()
    model = prepared(x, covariance=kind, num_components=6, **MAXIMUM_LIKELIHOOD)
    course = [epoch(model, x) for _ in range(25)]
    assert all(after > before - 1e-10 for before, after in itertools.pairwise(course))
    assert course[-1] > course[0] + 0.01


def test_likelihood_never_falls_where_the_floor_holds():
    x = clouds()
    x = torch.cat([x, x[:, :1]], 1)  # in a hyperplane
    model = prepared(x, num_components=6, prior_strength=0.0, reg_covar=1e-2)
    course = [epoch(model, x) for _ in range(25)]
    assert all(after > before - 1e-10 for before, after in itertools.pairwise(course))
    assert course[-1] > course[0] + 0.01


@KINDS
def test_one_component_is_the_gaussian_of_the_largest_likelihood(kind):
    x = clouds()
    model = prepared(x, covariance=kind, num_components=1, **MAXIMUM_LIKELIHOOD)
    epoch(model, x)
    covariance = torch.cov(x.double().T, correction=0)
    if kind != "full":
        covariance = covariance.diagonal().diag()
    if kind == "spherical":
        covariance = covariance.trace() / DIM * torch.eye(DIM, dtype=torch.float64)
    expected = multivariate_normal(x.double().mean(0).numpy(), covariance.numpy()).logpdf(x.double().numpy())
    np.testing.assert_allclose(model.log_prob(x).numpy(), expected, rtol=0, atol=1e-8)


def test_prior_counts_as_so_many_examples():
    x = clouds()
    likely, careful = (prepared(x, num_components=1, prior_strength=strength) for strength in (0.0, 40.0))
    covariance = torch.cov(x.double().T, correction=0)
    for model in (likely, careful):
        epoch(model, x)
        torch.testing.assert_close(precisions(model)[0].inverse(), covariance)  # of one cluster the prior says the same
    careful.prior.copy_(torch.eye(DIM))
    epoch(careful, x)
    n_0 = 40 * (DIM + 1)
    expected = (600 * covariance + n_0 * torch.eye(DIM)) / (600 + n_0)
    torch.testing.assert_close(precisions(careful)[0].inverse(), expected)


# --- nothing collapses, nothing is lost -------------------------------------------------------------------------------


@KINDS
def test_many_examples_at_one_point_get_no_component_below_the_floor(kind):
    x = clouds()
    x[:100] = x[0]
    model = prepared(x, covariance=kind, num_components=6, prior_strength=0.0, reg_covar=1e-4)
    for _ in range(20):
        epoch(model, x)
    floor = 1e-4 * float(x.double().var(0, correction=0).mean())
    eigenvalues = torch.linalg.eigvalsh(precisions(model).inverse())
    assert eigenvalues.min() == pytest.approx(floor, rel=1e-6)
    assert model.log_prob(x).isfinite().all()


def test_values_that_never_change_are_no_trouble():
    x = clouds()
    x[:, 1] = 3
    model = prepared(x, num_components=5)
    for _ in range(5):
        assert math.isfinite(epoch(model, x))
    drawn = model.sample(200, generator=StreamNoise(0))
    assert drawn[:, 1].mean() == pytest.approx(3, abs=0.01)
    same = torch.full((40, 2), 7.0)
    assert prepared(same, num_components=3).log_prob(same).isfinite().all()


@KINDS
def test_component_without_examples_takes_half_of_the_heaviest(kind):
    x = clouds()
    model = prepared(x, covariance=kind, num_components=4)
    with torch.no_grad():
        model.means[2] += 1e4
    before = model.log_weights.exp().detach().clone()
    assert epoch(model, x) < score(model, x)
    weights = model.log_weights.exp()
    heaviest = int(weights.argmax())
    assert float(weights[2]) > 0.05
    assert before.sum() == pytest.approx(float(weights.sum()))
    assert model.means[2].norm() < 100
    assert heaviest != 2 or weights[2] <= weights.sum() / 2
    said = (model.accumulate(Batch(x)), model.maximize())[1]
    assert said["components_lost"] == 0


def test_halves_of_a_component_have_its_mean_and_nearly_its_density():
    covariance = COVARIANCES["full"]
    _, gaussians = some("full")
    heaviest = int(gaussians.log_weights.argmax())
    lost = torch.arange(NUM_COMPONENTS) == (heaviest + 1) % NUM_COMPONENTS
    after = revive(gaussians, covariance, lost)
    pair = [heaviest, int(lost.nonzero())]
    torch.testing.assert_close(after.means[pair].mean(0), gaussians.means[heaviest])
    weights, whole = after.log_weights.exp(), float(gaussians.log_weights.exp()[~lost].sum())
    torch.testing.assert_close(weights[pair], (gaussians.log_weights[heaviest].exp() / 2 / whole).expand(2))
    assert weights.sum() == pytest.approx(1)
    apart = (after.means[pair[0]] - after.means[pair[1]]).square().sum()
    variances = torch.linalg.eigvalsh(covariance.to_covariances(gaussians.factors)[heaviest])
    torch.testing.assert_close(apart, variances[-1])


# --- a part of the examples at a time ---------------------------------------------------------------------------------


def test_minibatches_come_near_to_what_all_examples_give():
    x = clouds(4000)
    full, online = (prepared(x, minibatch=minibatch, **MAXIMUM_LIKELIHOOD) for minibatch in (False, True))
    assert not full.maximizes_every_batch
    assert online.maximizes_every_batch
    for i in range(20):
        epoch(full, x)
        epoch(online, x[torch.randperm(len(x), generator=torch.Generator().manual_seed(i))], batch_size=200)
    assert score(online, x) > score(full, x) - 0.01
    assert online.num_maximizations == 20 * 20


def test_step_of_a_minibatch_is_as_stated():
    x = clouds()
    model = prepared(x, minibatch=True, step_decay=0.6, **MAXIMUM_LIKELIHOOD)
    for k in range(3):
        before = statistics_of(model.gaussians, model._covariance)
        model.accumulate(Batch(x[:200]))
        batch = model.statistics / model.statistics[:, 0].sum()
        model.maximize()
        step = (k + 2) ** -0.6
        torch.testing.assert_close(statistics_of(model.gaussians, model._covariance), before + step * (batch - before))


def test_a_share_of_an_epoch_moves_the_statistics_by_as_much():
    x = clouds()
    model = prepared(x, **MAXIMUM_LIKELIHOOD)
    before = statistics_of(model.gaussians, model._covariance)
    model.accumulate(Batch(x[:200]))
    batch = model.statistics / model.statistics[:, 0].sum()
    model.maximize(share=1 / 3)
    torch.testing.assert_close(statistics_of(model.gaussians, model._covariance), before + (batch - before) / 3)


# --- principal axes ---------------------------------------------------------------------------------------------------


def test_mixture_on_all_axes_is_that_of_x():
    x = clouds()
    plain, turned = prepared(x, num_components=1, **MAXIMUM_LIKELIHOOD), prepared(x, num_components=1, num_pca=DIM)
    for model in (plain, turned):
        epoch(model, x)
    torch.testing.assert_close(turned.log_prob(x), plain.log_prob(x))


def test_one_component_on_some_axes_is_probabilistic_pca():
    """Tipping and Bishop 1999: the covariance W W^T + s^2 I of the largest likelihood."""
    x = clouds()
    model = prepared(x, num_components=1, num_pca=2, **MAXIMUM_LIKELIHOOD)
    epoch(model, x)
    variances, vectors = torch.linalg.eigh(torch.cov(x.double().T, correction=0))
    variances[:-2] = variances[:-2].mean()
    covariance = (vectors * variances) @ vectors.T
    expected = multivariate_normal(x.double().mean(0).numpy(), covariance.numpy()).logpdf(x.double().numpy())
    np.testing.assert_allclose(model.log_prob(x).numpy(), expected, rtol=0, atol=1e-8)
    drawn = model.sample(20_000, generator=StreamNoise(0)).double()
    torch.testing.assert_close(torch.cov(drawn.T), covariance, rtol=0, atol=0.05 * float(variances[-1]))


def test_density_beside_axes_integrates_to_one():
    x = clouds(dim=2)
    model = prepared(x, num_pca=1)
    low, high = x.min(0).values - 5, x.max(0).values + 5
    axes = [torch.linspace(float(a), float(b), 400) for a, b in zip(low, high, strict=True)]
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    density = model.log_prob(torch.cartesian_prod(*axes)).exp()
    assert float(density.sum()) * cell == pytest.approx(1, abs=1e-3)


# --- a mixture for each class ------------------------------------------------------------------------------------------


def labelled(count: int = 600, num_classes: int = 3, seed: int = 0) -> Batch:
    """Clouds, of which each class has its own, in no order, `(N, D)` and `(N,)`."""
    condition = (StreamNoise(seed + 1).uniform((count,), torch.zeros(())).square() * num_classes).long()  # of several sizes
    x = torch.empty(count, DIM)
    for k in range(num_classes):
        x[condition == k] = clouds(count, seed=seed + 10 * k)[condition == k] + 3 * k
    return Batch(x, condition)


def conditional(data: Batch, num_classes: int = 3, num_components: int = 2, **keys: object) -> GaussianMixture:
    model = GaussianMixture(vector_spec(DIM, num_classes), num_components, conditional=True, **keys)
    model.prepare(lambda: parts_of(data), generator=StreamNoise(0))
    return model


def parts_of(data: Batch, size: int = 250) -> list[Batch]:
    return [Batch(*part) for part in zip(data.x.split(size), data.condition.split(size), strict=True)]


def own_part(model: GaussianMixture, k: int) -> GaussianMixture:
    """The components of one class as a mixture of their own."""
    own, single = model._components(k), GaussianMixture(vector_spec(DIM), model._num_components, model._covariance.in_words)
    single._set(Gaussians(model.log_weights[own], model.means[own], model.factors[own]))
    single.centre.copy_(model.centre)
    return single


@KINDS
@pytest.mark.parametrize("values", [None, 64], ids=["at once", "in parts"])
def test_of_each_class_it_is_scikit_learns_mixture_of_the_examples_of_that_class(kind, values, monkeypatch):
    if values:
        monkeypatch.setattr(gaussian_mixture, "_CACHED_VALUES", values)
    data = labelled()
    model = conditional(data, covariance=kind, **MAXIMUM_LIKELIHOOD)
    members = [data.x[data.condition == k] for k in range(3)]
    theirs = [scikit_learns(own_part(model, k), members[k], num_iterations=5) for k in range(3)]
    for _ in range(5):
        for part in parts_of(data):
            model.accumulate(part)
        model.maximize()
    for k in range(3):
        ours = model.log_prob(members[k], torch.full((len(members[k]),), k))
        np.testing.assert_allclose(ours.numpy(), theirs[k].score_samples(members[k].double().numpy()), rtol=0, atol=1e-6)
        weights = model.log_weights[model._components(k)].exp()
        np.testing.assert_allclose(weights.numpy(), theirs[k].weights_, rtol=0, atol=1e-9)
    in_order = torch.cat([model.log_prob(data.x[i : i + 1], data.condition[i : i + 1]) for i in range(20)])
    torch.testing.assert_close(in_order, model.log_prob(data.x, data.condition)[:20])


@pytest.mark.parametrize("keys", [{}, {"minibatch": True}, {"num_pca": 2}], ids=["full", "minibatch", "axes"])
def test_one_class_is_no_class(keys):
    x = clouds()
    told, plain = (
        GaussianMixture(vector_spec(DIM, 1), NUM_COMPONENTS, conditional=is_told, **keys) for is_told in (True, False)
    )
    for model in (told, plain):
        model.prepare(lambda: parts_of(Batch(x, torch.zeros(len(x), dtype=torch.int64))), generator=StreamNoise(0))
        for part in parts_of(Batch(x, torch.zeros(len(x), dtype=torch.int64))):
            model.accumulate(part)
            if model.maximizes_every_batch:
                model.maximize()
        if not model.maximizes_every_batch:
            model.maximize()
    torch.testing.assert_close(told.log_prob(x, torch.zeros(len(x), dtype=torch.int64)), plain.log_prob(x))


@KINDS
def test_samples_of_a_class_have_the_moments_of_its_mixture(kind):
    model = conditional(labelled(), covariance=kind)
    condition = torch.arange(60_000) % 3
    drawn = model.sample(len(condition), condition, generator=StreamNoise(0)).double() - model.centre
    for k in range(3):
        part = own_part(model, k)
        weights, covariances = part.log_weights.exp(), precisions(part).inverse()
        mean = weights @ part.means
        off = part.means - mean
        expected = torch.tensordot(weights, covariances + off[:, :, None] * off[:, None, :], 1)
        scale = float(expected.diagonal().max())
        own = drawn[condition == k]
        torch.testing.assert_close(own.mean(0), mean, rtol=0, atol=0.04 * math.sqrt(scale))
        torch.testing.assert_close(torch.cov(own.T), expected, rtol=0, atol=0.05 * scale)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("keys", [MAXIMUM_LIKELIHOOD, {}, {"minibatch": True}], ids=["likelihood", "prior", "minibatch"])
@pytest.mark.parametrize("count", [None, 4], ids=["many", "few"])
def test_a_class_that_was_not_seen_stays_as_it_is(keys, share, count):
    data = labelled()
    kept = torch.cat([(data.condition != 1).nonzero()[:, 0], (data.condition == 1).nonzero()[:count, 0]])
    data = Batch(data.x[kept], data.condition[kept])
    model = conditional(data, **keys)
    before = {k: own_part(model, k) for k in range(3)}
    is_seen = data.condition != 1
    for _ in range(3):
        model.accumulate(Batch(data.x[is_seen], data.condition[is_seen]))
        assert model.maximize(share)["components_lost"] == 0
    for k, part in before.items():
        after = own_part(model, k)
        for name in ("log_weights", "means", "factors"):
            assert torch.equal(getattr(after, name), getattr(part, name)) == (k == 1), (k, name)
        assert float(after.log_weights.exp().sum()) == pytest.approx(1)


def test_a_component_of_a_rare_class_is_not_lost_in_batches_with_little_of_it():
    data = labelled()
    few = (data.condition == 1).nonzero()[:8, 0]
    others = (data.condition != 1).nonzero()[:, 0]
    kept = torch.cat([others, few])
    model = conditional(Batch(data.x[kept], data.condition[kept]))
    in_batch = torch.cat([others.repeat(20), few])  # its share of the batch is a twentieth of that of the data
    model.accumulate(Batch(data.x[in_batch], data.condition[in_batch]))
    assert model.maximize(0.9)["components_lost"] == 0


def test_a_lost_component_takes_half_of_the_heaviest_of_its_class():
    data = labelled()
    model, unhurt = (conditional(data, num_components=3) for _ in range(2))
    with torch.no_grad():
        model.means[4] += 1e4
    model.accumulate(data)
    unhurt.accumulate(data)
    assert model.maximize()["components_lost"] == 1
    assert unhurt.maximize()["components_lost"] == 0
    own = data.x[data.condition == 1].double() - model.centre
    assert float(model.log_weights[4].exp()) > 0.1
    assert float((model.means[4] - own.mean(0)).norm()) < 3 * float(own.std(0).norm())
    for k in (0, 2):
        after, expected = own_part(model, k), own_part(unhurt, k)
        for name in ("log_weights", "means", "factors"):
            torch.testing.assert_close(getattr(after, name), getattr(expected, name), rtol=1e-9, atol=1e-9)


def test_a_class_of_one_example_is_no_trouble():
    data = labelled()
    x, condition = data.x[data.condition != 2], data.condition[data.condition != 2]
    data = Batch(torch.cat([x, data.x[data.condition == 2][:1]]), torch.cat([condition, torch.tensor([2])]))
    model = conditional(data, num_components=1, minibatch=True)
    for part in parts_of(data, 40):
        model.accumulate(part)
        model.maximize()
    assert model.log_prob(data.x, data.condition).isfinite().all()
    assert float(model.log_weights[2]) == pytest.approx(0)


def test_minibatches_of_classes_come_near_to_what_all_examples_give():
    data = labelled(1500)
    full, online = (conditional(data, minibatch=minibatch, **MAXIMUM_LIKELIHOOD) for minibatch in (False, True))
    for i in range(10):
        full.accumulate(data)
        full.maximize()
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(i))
        for part in parts_of(Batch(data.x[order], data.condition[order]), 100):
            online.accumulate(part)
            online.maximize()
    best, near = (float(model.log_prob(data.x, data.condition).mean()) for model in (full, online))
    assert near > best - 0.02


@pytest.mark.parametrize(
    ("num_classes", "num_components", "sentence"),
    [
        (
            4,
            2,
            r"there are no training examples of class class 3; model\.conditional=true needs some of every class",
        ),
        (3, 500, r"model\.num_components=500 must be at most \d+, the number of training examples of class class 0"),
        (0, 2, r"needs labelled data"),
    ],
)
def test_classes_that_cannot_have_a_mixture_are_refused(num_classes, num_components, sentence):
    with pytest.raises(UserError, match=sentence):
        conditional(labelled(), num_classes, num_components)


# --- samples, levels, starts ------------------------------------------------------------------------------------------


@KINDS
def test_samples_have_the_moments_of_the_mixture(kind):
    covariance = COVARIANCES[kind]
    _, gaussians = some(kind)
    drawn = draw(40_000, gaussians, covariance, StreamNoise(0))
    weights, each = gaussians.log_weights.exp(), covariance.to_covariances(gaussians.factors)
    each = each if kind == "full" else torch.diag_embed(each.expand(-1, DIM))
    mean = weights @ gaussians.means
    off = gaussians.means - mean
    expected = torch.tensordot(weights, each + off[:, :, None] * off[:, None, :], 1)
    scale = expected.diagonal().max().item()
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.03 * math.sqrt(scale))
    torch.testing.assert_close(torch.cov(drawn.T), expected, rtol=0, atol=0.04 * scale)


def test_entropy_bounds_the_cross_entropy_from_below_and_is_nearly_reached():
    """Eight Gaussians of sigma 0.02 on a ring: ln 8 + ln(2 pi e sigma^2) = -2.906 nats, the modes being far apart."""
    count, sigma = 6000, 0.02
    angle = torch.arange(8) * (2 * math.pi / 8)
    ring = IsotropicMixture(
        2 * torch.stack([angle.cos(), angle.sin()], 1).double(), sigma, torch.full((8,), 1 / 8, dtype=torch.float64)
    )
    train, held_out = (ring.sample(count, StreamNoise(seed))[0].float() for seed in (3, 4))
    entropy = math.log(8) + math.log(2 * math.pi * math.e * sigma**2)
    assert entropy == pytest.approx(-2.906, abs=1e-3)
    model = prepared(train, num_components=12)
    for _ in range(10):
        epoch(model, train)
    assert -score(model, held_out) > entropy - 4 / math.sqrt(count)  # the standard error in the plane is 1 / sqrt(n)
    divergence = (ring.log_prob(held_out) - model.log_prob(held_out)).mean()  # of the same points: a far smaller one
    assert 0 < divergence < 0.02


def test_levels_are_bounded_by_the_integral_over_their_bins():
    """One pixel of a single Gaussian: P(x) is a difference of its distribution function, and L_k comes close from below."""
    levels = (40 * StreamNoise(0).normal((800, 1, 1, 1), torch.zeros(())) + 128).round().clamp(0, 255)
    spec = image_spec((1, 1, 1), DISCRETE)
    x = spec.to_units(levels.byte())
    model = prepared(x, num_components=1, values=DISCRETE, num_dequantizations=64)
    epoch(model, x)
    assert model.is_discrete
    gaussian = torch.distributions.Normal(model.centre + model.means[0], model.factors[0, 0, 0].reciprocal())
    middle = x.flatten().double()
    exact = (gaussian.cdf(middle + 1 / 255) - gaussian.cdf(middle - 1 / 255)).log()
    bound = model.log_prob_bound(x, generator=StreamNoise(2))
    torch.testing.assert_close(bound, exact, rtol=0, atol=0.02)  # the noise of 64 draws in the tails
    torch.testing.assert_close(bound.mean(), exact.mean(), rtol=0, atol=1e-4)
    drawn = model.sample(50, generator=StreamNoise(0))
    assert torch.equal(drawn, spec.to_units(spec.to_levels(drawn)))


def test_images_of_constant_pixels_have_a_full_covariance():
    levels = (255 * StreamNoise(0).uniform((60, 1, 12, 12), torch.zeros(()))).round()
    levels[:, :, :4] = 0
    x = image_spec((1, 12, 12), DISCRETE).to_units(levels.byte())
    model = prepared(x, num_components=4, values=DISCRETE)
    first = epoch(model, x)
    assert math.isfinite(first)
    assert score(model, x) > first
    assert -score(model, x) < 144 * math.log(256)


def test_real_values_in_a_range_are_scored_and_drawn_within_it():
    x = image_spec((1, 4, 4), CONTINUOUS).to_units(StreamNoise(0).uniform((60, 1, 4, 4), torch.zeros(())) * 2 - 1)
    model = prepared(x, values=CONTINUOUS, num_pca=3)
    assert model.log_prob(x).shape == (60,)
    assert model.settings() == {}
    assert model.sample(500, generator=StreamNoise(0)).abs().max() <= 1


def test_seeds_of_kmeans_are_spread_over_clusters_that_lie_apart():
    like = torch.zeros((), dtype=torch.float64)
    middles = 100 * torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0)).double()
    z = (middles[:, None] + StreamNoise(0).normal((25, 20, 2), like)).flatten(0, 1)
    for seed in range(5):
        chosen = kmeans_plus_plus(z, 25, StreamNoise(seed))
        assert torch.cdist(middles, chosen).min(1).values.max() < 10
        assert all(bool((point == z).all(1).any()) for point in chosen)
    clusters = lloyd(z, chosen, 10)
    assert clusters.bincount().tolist() == [20] * 25


def test_seeds_among_equal_points_are_no_trouble():
    z = torch.ones(10, 2, dtype=torch.float64)
    assert kmeans_plus_plus(z, 4, StreamNoise(0)).shape == (4, 2)
    assert lloyd(z, z[:4], 5).tolist() == [0] * 10


def test_start_does_not_depend_on_batches():
    x = clouds()
    one = GaussianMixture(vector_spec(DIM), 3)
    one.prepare(lambda: [Batch(x)], generator=StreamNoise(0))
    torch.testing.assert_close(dict(one.state_dict()), dict(prepared(x).state_dict()))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"covariance": "tied"}, r"model\.covariance=tied does not exist; allowed: full, diagonal, spherical"),
        ({"num_pca": 5}, r"model\.num_pca=5 must be at most 4"),
        ({"num_components": 0}, r"model\.num_components=0 must be at least 1"),
        ({"num_components": None}, r"model\.num_components=null must be a number"),
        ({"reg_covar": 0.0}, r"model\.reg_covar=0\.0 must be at least"),
        ({"step_decay": 0.5}, r"model\.step_decay=0\.5 must be more than 0\.5"),
        ({"num_components": 2**26}, r"covariances too large for memory"),
    ],
)
def test_settings_that_cannot_be_are_refused(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        GaussianMixture(vector_spec(DIM), **({"num_components": 3} | keys))


def test_more_components_than_examples_are_refused():
    with pytest.raises(UserError, match=r"model\.num_components=7 must be at most 5, the number of training examples"):
        prepared(clouds(5), num_components=7)


# --- its training -----------------------------------------------------------------------------------------------------


GMM = ("model=gmm", "model.num_components=4", "model.num_pca=5")


def trained(cache: Path, *also: str, callbacks: tuple[Callback, ...] = (), resume: Path | None = None, steps: int = 20):
    return two_ranks.fit(cache, *GMM, *also, callbacks=callbacks, resume=resume, max_steps=steps)


@pytest.mark.parametrize("also", [(), ("model.minibatch=true",)], ids=["full", "minibatch"])
def test_a_training_is_resumed_bit_for_bit(also, cache, tmp_path):
    file, cut = tmp_path / "cut.ckpt", 13
    whole, rows = trained(cache, *also, callbacks=(two_ranks.SaveAfter(cut, file),))
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert bool(saved["model.statistics"].any()) == (not also)
    resumed, later = trained(cache, *also, resume=file)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert later.rows == [row for row in rows.rows if row[0] > cut]


def test_an_epoch_has_one_m_step_and_an_end_within_an_epoch_another(cache):
    whole, _ = trained(cache, steps=20)  # of ten to an epoch
    cut, rows = trained(cache, steps=14)
    assert (int(whole.model.num_maximizations), int(cut.model.num_maximizations)) == (2, 2)
    assert not cut.model.statistics.any()
    steps = [step for step, row in rows.rows if "train/components_lost" in row]
    assert steps == [10, 14]


def test_held_out_loss_is_of_the_components_after_the_m_step(cache):
    module, rows = trained(cache, steps=14)
    *_, measured = [row["val/loss"] for _, row in rows.rows if "val/loss" in row]
    data = module.trainer.datamodule
    x = torch.cat([data.to_units(batch).x for batch in data.val_dataloader()])
    held_out = module.model.negative_log_likelihood(Batch(x), generator=SampleNoise(0))  # the noise of a validation
    assert float(held_out["loss"].mean()) == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize(
    ("also", "sentence"),
    [
        (("trainer.precision=bf16-mixed",), r"trainer\.precision=bf16-mixed saves nothing .*trainer\.precision=32-true"),
        (("+training.ema_half_life_examples=1000.0",), r"training\.ema_half_life_examples means nothing to expec"),
        (("+training.gradient_clip_norm=1.0",), r"training\.gradient_clip_norm means nothing to expectation maximization"),
        (("+training.accumulate_batches=2",), r"training\.accumulate_batches means nothing to expectation maximization"),
    ],
)
def test_what_belongs_to_gradients_is_refused(also, sentence, cache):
    with pytest.raises(UserError, match=sentence):
        trained(cache, *also)


def test_an_optimizer_is_refused():
    model = GaussianMixture(vector_spec(DIM), 3)
    with pytest.raises(UserError, match="takes no optimizer"):
        make_training_module(model, torch.optim.SGD, {"log_every_n_steps": 1}, seed=0)
