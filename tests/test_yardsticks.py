"""Densities that need no network: closed forms, sums over all x, and the published figures of MNIST."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from src.core.errors import NotApplicable
from src.core.rng import Noise, SampleNoise
from src.core.spec import BINARY_STATIC, CONTINUOUS, DISCRETE, OwnUnits
from src.metrics.likelihood import BitsPerDim, LogLikelihood
from src.metrics.metric import Measurement, Reading
from src.metrics.store import Store
from src.metrics.yardsticks import (
    bernoulli_mixture,
    bernoulli_mixture_log_prob,
    gaussian_log_prob,
    histogram_log_prob,
    level_counts,
    yardsticks,
)
from tests.examples import image_spec, vector_spec
from tests.measuring import SHAPE, byte_images, image_set, make_inputs
from tests.mnist import DATA_ROOT, mnist_data, needs_mnist


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_binary(num_dims: int) -> Tensor:
    return torch.tensor(list(itertools.product((0, 1), repeat=num_dims)))


def test_a_histogram_counts_every_level_once_more_than_it_occurs():
    levels = torch.tensor([[0, 2], [0, 1], [1, 2]])
    counts = level_counts(levels.split(2), 2, 3)
    assert counts.tolist() == [[2, 1, 0], [0, 1, 2]]
    found = histogram_log_prob(torch.tensor([[0, 0], [2, 2]]), counts)
    torch.testing.assert_close(found.exp(), torch.tensor([3 / 6 * 1 / 6, 1 / 6 * 3 / 6], dtype=torch.float64))


def test_a_histogram_is_a_distribution():
    counts = level_counts([torch.randint(4, (20, 3), generator=generator())], 3, 4)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    assert float(histogram_log_prob(every, counts).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_a_mixture_is_a_distribution():
    ones = torch.randint(2, (200, 8), generator=generator()).byte()
    weights, p = bernoulli_mixture(ones, 3, generator(1))
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert float(bernoulli_mixture_log_prob(all_binary(8), weights, p).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_a_mixture_of_one_is_of_independent_values():
    ones = torch.randint(2, (200, 5), generator=generator()).byte()
    weights, p = bernoulli_mixture(ones, 1, generator(1))
    expected = (ones.double().sum(0) + 0.5) / 201
    torch.testing.assert_close(p[0], expected, rtol=1e-6, atol=0)
    of = torch.distributions.Bernoulli(probs=expected)
    torch.testing.assert_close(bernoulli_mixture_log_prob(ones, weights, p), of.log_prob(ones.double()).sum(1))


def test_no_step_of_a_mixture_loses_likelihood():
    """Of its objective, the log likelihood with the prior that the halves stand for: sum ln p_kd (1 - p_kd) / 2."""
    p = 0.1 + 0.8 * torch.rand(4, 12, generator=generator())
    ones = torch.bernoulli(p[torch.randint(4, (500,), generator=generator(1))], generator=generator(2)).byte()

    def objective(steps: int) -> float:
        weights, found = bernoulli_mixture(ones, 4, generator(3), max_steps=steps)
        prior = 0.5 * (found.log() + (-found).log1p()).sum()
        return float(bernoulli_mixture_log_prob(ones, weights, found).sum() + prior)

    values = [objective(steps) for steps in range(1, 12)]
    assert all(after >= before - 1e-3 for before, after in itertools.pairwise(values))
    assert values[-1] > values[0] + 10


def test_a_mixture_finds_what_its_data_were_drawn_from():
    p = torch.tensor([[0.95] * 10 + [0.05] * 10, [0.05] * 10 + [0.95] * 10])
    which = torch.arange(4000) % 4 == 0
    ones = torch.bernoulli(p[which.long()], generator=generator()).byte()
    weights, found = bernoulli_mixture(ones, 2, generator(1))
    order = weights.argsort(descending=True)
    torch.testing.assert_close(weights[order], torch.tensor([0.75, 0.25], dtype=torch.float64), rtol=0, atol=0.01)
    torch.testing.assert_close(found[order], p.double(), rtol=0, atol=0.04)


def test_a_gaussian_is_that_of_torch():
    x = (
        torch.randn(50, 3, generator=generator(), dtype=torch.float64)
        @ torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 3, 1]]).double()
    )
    mean, covariance = x.mean(0), x.T.cov(correction=0)
    expected = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
    torch.testing.assert_close(gaussian_log_prob(x, mean, covariance), expected)


def test_points_in_a_plane_have_no_gaussian():
    x = torch.randn(50, 1, generator=generator()) * torch.ones(3)
    with pytest.raises(NotApplicable, match="singular"):
        gaussian_log_prob(x, x.mean(0).double(), x.double().T.cov(correction=0))


class Nothing(nn.Module):
    """Gives every example the log probability 0."""

    def log_prob(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        return torch.zeros(len(x))


class ToldItsClass(Nothing):
    is_conditional = True


def rows(found: Measurement) -> dict[str, float]:
    readings = {name: row for name, row in found.anchors.items() if isinstance(row, Reading)}
    assert len(readings) == len(found.anchors)
    return {name: row.value for name, row in readings.items()}


def images(values: str, levels: int = 256) -> tuple[Tensor, Tensor]:
    """Training images as bytes, and test images in data units."""
    spec = image_spec(SHAPE, values, levels)
    drawn = byte_images(60)
    bytes_ = drawn if levels == 256 else spec.to_bytes(spec.to_units(drawn.long() % levels))
    return bytes_, spec.to_units(byte_images(10, seed=1).long() % spec.values.levels)


def test_uniform_levels_cost_eight_bits():
    train, x = images(DISCRETE)
    inputs = make_inputs(Nothing(), reference=image_set(train), x=x)
    found = rows(BitsPerDim().measure(inputs))
    assert found["uniform"] == pytest.approx(8)
    counts = level_counts([train.flatten(1).long()], 64, 256)
    in_nats = float(histogram_log_prob(inputs.spec.to_levels(x).flatten(1), counts).mean())
    assert found["independent"] == pytest.approx(-in_nats / (64 * math.log(2)))
    assert rows(LogLikelihood().measure(inputs))["independent"] == pytest.approx(in_nats)


def test_fewer_levels_are_read_from_bytes():
    spec = image_spec(SHAPE, DISCRETE, 17)
    train, x = images(DISCRETE, 17)
    of = yardsticks(spec, image_set(train), Store(None))
    levels = byte_images(60).flatten(1).long() % 17
    expected = histogram_log_prob(spec.to_levels(x).flatten(1), level_counts([levels], 64, 17))
    torch.testing.assert_close(of["independent"](x), expected)


def test_binary_images_have_a_mixture_beside_them():
    train, x = images(BINARY_STATIC, 2)
    found = rows(LogLikelihood().measure(make_inputs(Nothing(), reference=image_set(train), x=x, values=BINARY_STATIC)))
    assert list(found) == ["uniform", "independent", "mixture_50"]
    assert found["uniform"] == pytest.approx(-64 * math.log(2))


def test_yardsticks_are_of_the_same_test_examples():
    train, x = images(DISCRETE)
    some = replace(make_inputs(Nothing(), reference=image_set(train), x=x), num_likelihood_examples=5)
    alone = make_inputs(Nothing(), reference=image_set(train), x=x[torch.arange(5) * 2])
    of_some = LogLikelihood().measure(some)
    assert {row.count for row in of_some.anchors.values()} == {5}
    assert rows(of_some) == pytest.approx(rows(LogLikelihood().measure(alone)))


def test_what_is_told_its_class_or_has_no_levels_has_none():
    train, x = images(DISCRETE)
    assert not LogLikelihood().measure(make_inputs(ToldItsClass(), reference=image_set(train), x=x)).anchors
    assert not LogLikelihood().measure(make_inputs(Nothing(), reference=image_set(train), x=x, values=CONTINUOUS)).anchors


def test_vectors_are_measured_in_their_own_units():
    x = torch.randn(200, 2, generator=generator())
    spec = replace(vector_spec(2), own_units=OwnUnits(("a", "b"), (1.0, -2.0), (10.0, 0.5)))
    inputs = replace(make_inputs(Nothing(), reference=image_set(x), x=x[:50]), spec=spec)
    own = spec.to_own_units(x)
    expected = torch.distributions.MultivariateNormal(own.mean(0), own.T.cov(correction=0)).log_prob(own[:50]).mean()
    assert rows(LogLikelihood().measure(inputs))["gaussian"] == pytest.approx(float(expected), abs=1e-6)


def test_what_is_fitted_is_kept(tmp_path):
    train = image_set(byte_images(60), identity=lambda: {"images": "made up"})
    for computed in (1, 0):
        store = Store(tmp_path)
        yardsticks(image_spec(SHAPE, DISCRETE), train, store)
        assert store.num_computed == computed


@pytest.mark.slow
@needs_mnist
def test_the_histogram_of_mnist_is_the_published_one():
    """1.689 bits/dim on the test images, but for how unseen levels are counted: 1.6897 here."""
    data = mnist_data(DATA_ROOT)
    train, test = (torch.from_numpy(data.arrays.splits[name].x) for name in ("train", "test"))
    counts = level_counts((some.flatten(1).long() for some in train.split(5000)), 784, 256)
    bits = -histogram_log_prob(test.flatten(1).long(), counts).mean() / (784 * math.log(2))
    assert float(bits) == pytest.approx(1.689, abs=1e-3)


@pytest.mark.slow
@needs_mnist
def test_binarized_mnist_has_its_published_yardsticks():
    """205.8 nats by independent pixels, 144.1 by 50 Bernoullis."""
    data = mnist_data(DATA_ROOT)
    noise = SampleNoise(0)

    def binary(split: str) -> Tensor:
        grey = torch.from_numpy(data.arrays.splits[split].x).flatten(1).float() / 255
        return (noise.uniform(tuple(grey.shape), grey) < grey).byte()

    train, test = binary("train"), binary("test")
    weights, p = bernoulli_mixture(train, 50, generator())
    counts = level_counts((some.long() for some in train.split(5000)), 784, 2)
    assert float(histogram_log_prob(test.long(), counts).mean()) == pytest.approx(-205.8, abs=0.3)
    assert float(bernoulli_mixture_log_prob(test, weights, p).mean()) == pytest.approx(-144.1, abs=1.5)
