"""Densities that need no network, fitted on the training examples: a model below them has learned nothing.

    uniform      every level of every value alike: D ln V nats, so 8 bits/dim for 256 levels
    independent  each value by its own histogram over the training examples, every level counted once more than it occurs
    mixture_50   of binary values: 50 products of Bernoullis, by expectation maximization
    gaussian     of real vectors: one Gaussian with a full covariance, by maximum likelihood

Each is an exact log probability of the same test examples as the model's.

References:
    Bishop 2006, "Pattern recognition and machine learning", section 9.3.3: mixtures of Bernoullis.
    Salakhutdinov, Murray 2008, "On the quantitative analysis of deep belief networks", ICML: a mixture of Bernoullis as a
        yardstick of models of binarized MNIST.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from src.core.errors import NotApplicable
from src.core.rng import derive_seed
from src.core.spec import BINARY_DYNAMIC, BINARY_STATIC, DataSpec
from src.metrics.features import ImageSet
from src.metrics.store import Store

__all__ = [
    "LogProb",
    "bernoulli_mixture",
    "bernoulli_mixture_log_prob",
    "gaussian_log_prob",
    "histogram_log_prob",
    "level_counts",
    "yardsticks",
]

LogProb = Callable[[Tensor], Tensor]  # of examples in data units `(B, ...)`, `(B,)` float64 in nats

_COMPONENTS = 50
_MOST_STEPS = 100
_LEAST_GAIN = 1e-3  # nats of an example in one step of expectation maximization
_AT_A_TIME = 10_000  # examples


def level_counts(levels: Iterable[Tensor], num_dims: int, num_levels: int) -> Tensor:
    """How often each value has each level, `(D, V)` float64, in batches of levels `(B, D)` int64."""
    counts = torch.zeros(num_dims * num_levels, dtype=torch.float64)
    first = torch.arange(num_dims) * num_levels
    for some in levels:
        counts += torch.bincount((some + first).flatten(), minlength=len(counts))
    return counts.view(num_dims, num_levels)


def histogram_log_prob(levels: Tensor, counts: Tensor) -> Tensor:
    """sum_d ln (n_d(x_d) + 1) / (N + V), `(B,)` float64 in nats.

    Args:
        levels: `(B, D)` int64.
        counts: `(D, V)`, see `level_counts`.
    """
    log_p = ((counts + 1) / (counts + 1).sum(1, keepdim=True)).log()
    return log_p[torch.arange(len(counts)), levels].sum(1)


def bernoulli_mixture(
    ones: Tensor, num_components: int, generator: torch.Generator, max_steps: int = _MOST_STEPS
) -> tuple[Tensor, Tensor]:
    """Weights `(K,)` and probabilities of a one `(K, D)`, float64, of a mixture of products of Bernoullis.

        E step  r_nk = p(k | x_n),   M step  w_k = N_k / N,  p_kd = (sum_n r_nk x_nd + 1/2) / (N_k + 1),  N_k = sum_n r_nk

    The halves keep every probability inside (0, 1). The start is K of the examples, halfway to 1/2. It ends after
    `max_steps`, or once a step gains less than 1e-3 nats an example.

    Args:
        ones: `(N, D)` uint8, 0 or 1.
        num_components: K, at most N.
        generator: chooses the start.
    """
    assert 1 <= num_components <= len(ones)
    chosen = torch.randperm(len(ones), generator=generator)[:num_components]
    p = 0.25 + 0.5 * ones[chosen].double()
    weights = torch.full((num_components,), 1 / num_components, dtype=torch.float64)
    before = -math.inf
    for _ in range(max_steps):
        mass, sums, total = torch.zeros_like(weights), torch.zeros_like(p), 0.0
        for some in ones.split(_AT_A_TIME):
            x = some.float()
            joint = _bernoulli_log_joint(x, weights, p)
            total += float(joint.logsumexp(1).double().sum())
            responsibilities = joint.softmax(1)
            mass += responsibilities.sum(0).double()
            sums += (responsibilities.T @ x).double()
        weights, p = mass / mass.sum(), (sums + 0.5) / (mass[:, None] + 1)
        if total / len(ones) - before < _LEAST_GAIN:
            break
        before = total / len(ones)
    return weights, p


def bernoulli_mixture_log_prob(ones: Tensor, weights: Tensor, p: Tensor) -> Tensor:
    """ln sum_k w_k prod_d p_kd^x_d (1 - p_kd)^(1 - x_d), `(B,)` float64 in nats, of `ones` `(B, D)`, 0 or 1."""
    return _bernoulli_log_joint(ones.double(), weights, p).logsumexp(1)


def _bernoulli_log_joint(x: Tensor, weights: Tensor, p: Tensor) -> Tensor:
    """ln w_k p(x | k), `(B, K)`, in the precision of x."""
    odds, constant = (p.log() - (-p).log1p()).to(x.dtype), ((-p).log1p().sum(1) + weights.log()).to(x.dtype)
    return x @ odds.T + constant


def gaussian_log_prob(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """ln N(x; mean, covariance), `(B,)` float64 in nats, of x `(B, D)`; raises `NotApplicable` if it is singular."""
    factor, info = torch.linalg.cholesky_ex(covariance.double())
    scale = covariance.diagonal().abs().max().sqrt()
    if int(info) or float(factor.diagonal().min()) < 1e-7 * float(scale):
        raise NotApplicable("the training examples lie in a plane: their covariance is singular")
    z = torch.linalg.solve_triangular(factor, (x.double() - mean).T, upper=False)
    return -0.5 * (z.square().sum(0) + x.shape[1] * math.log(2 * math.pi)) - factor.diagonal().log().sum()


def yardsticks(spec: DataSpec, train: ImageSet, store: Store) -> dict[str, LogProb]:
    """Log probabilities of examples in data units by name; none for tokens and sound, which have yardsticks of their own.

    Args:
        spec: the data.
        train: the training examples, as metrics see them.
        store: keeps what is fitted.
    """
    if spec.sound is not None or spec.modality not in ("image", "vector"):
        return {}
    if spec.values.levels is None:
        return _of_vectors(train, store) if spec.modality == "vector" else {}
    return _of_levels(spec, train, store)


def _of_vectors(train: ImageSet, store: Store) -> dict[str, LogProb]:
    def make() -> dict[str, Tensor]:
        x = torch.cat([some.double() for some, _ in train.batches()])
        mean = x.mean(0)
        return {"mean": mean, "covariance": (x - mean).T @ (x - mean) / len(x)}

    fitted = store.get("gaussian_yardstick", train, None, {}, make)
    return {"gaussian": lambda x: gaussian_log_prob(x.cpu(), fitted["mean"], fitted["covariance"])}


def _of_levels(spec: DataSpec, train: ImageSet, store: Store) -> dict[str, LogProb]:
    num_levels = spec.values.levels
    assert num_levels is not None

    def to_levels(x: Tensor) -> Tensor:
        return spec.to_levels(x.cpu()).flatten(1)

    def training_levels() -> Iterable[Tensor]:
        for images, _ in train.batches():  # bytes, whatever the levels
            yield (images.flatten(1).float() * ((num_levels - 1) / 255)).round().long()

    def make_counts() -> dict[str, Tensor]:
        return {"counts": level_counts(training_levels(), spec.num_dims, num_levels)}

    counts = store.get("histogram_yardstick", train, None, {"levels": num_levels}, make_counts)["counts"]
    nats = spec.num_dims * math.log(num_levels)
    found: dict[str, LogProb] = {
        "uniform": lambda x: torch.full((len(x),), -nats, dtype=torch.float64),
        "independent": lambda x: histogram_log_prob(to_levels(x), counts),
    }
    if spec.values.kind in (BINARY_STATIC, BINARY_DYNAMIC) and train.count >= _COMPONENTS:

        def make_mixture() -> dict[str, Tensor]:
            ones = torch.cat([some.byte() for some in training_levels()])
            weights, p = bernoulli_mixture(ones, _COMPONENTS, torch.Generator().manual_seed(derive_seed(0, 7)))
            return {"weights": weights, "p": p}

        settings = {"components": _COMPONENTS, "most_steps": _MOST_STEPS, "least_gain": _LEAST_GAIN}
        mixture = store.get("mixture_yardstick", train, None, settings, make_mixture)
        found[f"mixture_{_COMPONENTS}"] = lambda x: bernoulli_mixture_log_prob(
            to_levels(x), mixture["weights"], mixture["p"]
        )
    return found
