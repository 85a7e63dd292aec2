"""Noise: its distribution, and what it does and does not depend on."""

import io
import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from src.core.rng import Noise, SampleNoise, StreamNoise, derive_seed, fresh_noise, hash_bits

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
FLOAT = torch.zeros(())
DOUBLE = torch.zeros((), dtype=torch.float64)
EVENTS = [(), (1,), (2,), (7,), (20,), (3, 5, 5)]

kinds = pytest.mark.parametrize("kind", ["normal", "uniform"])
sources = pytest.mark.parametrize("source", [SampleNoise, StreamNoise])


def draw(noise: Noise, kind: str, shape: tuple[int, ...], like: Tensor = FLOAT) -> Tensor:
    return getattr(noise, kind)(shape, like)


def splitmix64(state: int) -> int:
    """The next output of Java's SplittableRandom at a state (Steele, Lea, Flood 2014, figure 17)."""
    z = (state + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference_bits(seed: int, index: int, position: int) -> int:
    stream = splitmix64(splitmix64(seed - GOLDEN) + index * GOLDEN - GOLDEN)
    return splitmix64(stream + position * GOLDEN)


def test_reference_splitmix64_gives_the_published_stream_of_seed_zero():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [splitmix64(i * GOLDEN) for i in range(4)] == published


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 + 7, -(2**70) + 3])
def test_hash_bits_are_splitmix64_in_plain_integers(seed):
    index = [0, 1, 2, 1000, 2**40]
    bits = hash_bits(seed, torch.tensor(index), count=5, offset=3)
    expected = [[reference_bits(seed, i, position) for position in range(3, 8)] for i in index]
    assert [[word & MASK for word in row] for row in bits.tolist()] == expected


@kinds
@pytest.mark.parametrize("event", EVENTS, ids=str)
@pytest.mark.parametrize("sizes", [[10, 10], [7, 13], [1] * 20], ids=str)
def test_sample_noise_is_the_same_in_any_batches(kind, event, sizes):
    def three_draws(n: int, start: int) -> Tensor:
        noise = SampleNoise(5, start)
        return torch.stack([draw(noise, kind, (n, *event)) for _ in range(3)], dim=1)

    starts = itertools.accumulate(sizes[:-1], initial=0)
    parts = [three_draws(n, start) for n, start in zip(sizes, starts, strict=True)]
    assert torch.equal(torch.cat(parts), three_draws(20, 0))


@kinds
@sources
def test_noise_repeats_for_one_seed_only(source, kind):
    first, again, other = (draw(source(seed), kind, (8, 5)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not (first == other).any()


@kinds
@sources
def test_successive_draws_differ(source, kind):
    noise = source(3)
    assert not (draw(noise, kind, (8, 5)) == draw(noise, kind, (8, 5))).any()


def test_kinds_of_draws_take_turns_without_overlap():
    noise = SampleNoise(0)
    uniforms = torch.cat([noise.uniform((4, 3), DOUBLE), noise.normal((4, 3), DOUBLE), noise.uniform((4, 3), DOUBLE)])
    assert uniforms.unique().numel() == uniforms.numel()


@sources
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_normal_noise_has_the_normal_distribution(source, seed):
    z = source(seed).normal((4000, 5), DOUBLE).flatten()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    moments = torch.stack([(z**k).mean() for k in range(1, 5)])
    # standard errors of the raw moments: sqrt((E z^2k - (E z^k)^2) / n)
    errors = torch.tensor([1.0, 2.0, 15.0, 96.0], dtype=torch.float64).div(len(z)).sqrt()
    assert ((moments - torch.tensor([0.0, 1.0, 0.0, 3.0])).abs() < 4 * errors).all()


@sources
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_uniform_noise_has_the_uniform_distribution(source, seed):
    u = source(seed).uniform((4000, 5), DOUBLE).flatten()
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert abs(float(u.mean()) - 0.5) < 4 / math.sqrt(12 * len(u))


@sources
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_uniform_noise_lies_inside_the_open_interval(source, dtype):
    u = source(0).uniform((20_000, 5), torch.zeros((), dtype=dtype))
    assert u.dtype == dtype
    assert ((u > 0) & (u < 1)).all()


@kinds
def test_neighbouring_samples_and_positions_and_seeds_are_uncorrelated(kind):
    x, of_next_seed = (draw(SampleNoise(seed), kind, (20_000, 3), DOUBLE) for seed in (7, 8))
    pairs = {
        "samples": (x[:-1, 0], x[1:, 0]),
        "positions": (x[:, 0], x[:, 1]),
        "box and muller's pair": (x[:, 0], x[:, 2]),
        "seeds": (x[:, 0], of_next_seed[:, 0]),
    }
    for what, pair in pairs.items():
        correlation = torch.corrcoef(torch.stack(pair))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(len(pair[0])), what


@kinds
@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_every_event_size_gets_its_own_values(kind, event):
    x = draw(SampleNoise(0), kind, (6, *event), DOUBLE)
    assert x.shape == (6, *event)
    assert x.unique().numel() == x.numel()


def test_derived_seeds_are_distinct_63_bit_integers():
    purposes = [(), *((i,) for i in range(20)), *itertools.product(range(-2, 10), repeat=2)]
    seeds = [derive_seed(seed, *purpose) for seed in (*range(20), -1, 2**63) for purpose in purposes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@kinds
def test_a_restored_stream_continues_where_it_was_saved(kind):
    noise = StreamNoise(3)
    draw(noise, kind, (4, 5))
    file = io.BytesIO()
    torch.save(noise.state_dict(), file)
    expected = draw(noise, kind, (4, 5))

    file.seek(0)
    restored = StreamNoise(99)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(draw(restored, kind, (4, 5)), expected)


def test_fresh_noise_does_not_repeat():
    assert not torch.equal(fresh_noise().normal((4, 5), FLOAT), fresh_noise().normal((4, 5), FLOAT))


@kinds
@pytest.mark.parametrize("make", [lambda: SampleNoise(0), lambda: StreamNoise(0), fresh_noise])
def test_global_generator_is_neither_read_nor_moved(make, kind):
    before = torch.get_rng_state()
    draw(make(), kind, (4, 5))
    assert torch.equal(torch.get_rng_state(), before)
