"""Whole evaluations of fake models on a few of the digits, with the classifier that ships for them."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src.build import build
from src.core.errors import NotApplicable
from src.core.rng import Noise
from src.core.spec import DISCRETE
from src.data.arrays import Arrays, Split
from src.data.loading import ArrayData
from src.evaluation.protocol import evaluate
from src.evaluation.results import to_json
from src.metrics.features import Extractor, NetworkExtractor
from src.metrics.frozen_classifier import SHIPPED, read_frozen
from src.metrics.metric import Metric
from src.metrics.store import Store
from tests.configs import compose_config
from tests.examples import image_spec
from tests.measuring import SHAPE

__all__ = [
    "Draws", "all_metrics", "digit_data", "digits", "digits_classifier", "real_digits", "results_of", "uniform",
]  # fmt: skip


class Draws(nn.Module):
    """A model whose samples are a function of how many are asked for, and of the noise."""

    is_conditional = False

    def __init__(self, of: Callable[[int, Noise], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))  # says where the model lies
        self._of = of

    def sample(self, n: int, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        assert generator is not None
        return self._of(n, generator)


def uniform(n: int, noise: Noise, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Images of uniform noise."""
    return 2 * noise.uniform((n, *shape), torch.zeros(())) - 1


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """All 1,797 digits `(N, 1, 8, 8)` in 17 levels, and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images.astype(np.uint8)[:, None], found.target.astype(np.int64)


def real_digits(n: int, of_class: int | None = None) -> Tensor:
    """n digits that are in no `digit_data`, or n of one class; the same ones again if there are fewer."""
    x, y = digits()
    chosen = x[1000:] if of_class is None else x[y == of_class]
    return torch.from_numpy(np.resize(chosen, (n, *SHAPE))).float() / 8 - 1


def digit_data(
    x: np.ndarray, y: np.ndarray | None, num_train: int = 300, num_test: int = 150, values: str = DISCRETE, levels: int = 17
) -> ArrayData:
    """The first images as training images, the next as test images; 150 others for validation."""
    parts = {"train": slice(0, num_train), "val": slice(850, 1000), "test": slice(num_train, num_train + num_test)}
    splits = {name: Split(x[part], None if y is None else y[part]) for name, part in parts.items()}
    spec = image_spec(x.shape[1:], values, levels=levels, num_classes=0 if y is None else 10)
    arrays = Arrays(spec, levels, splits, "made_up")
    return ArrayData(arrays, batch_size=50, eval_batch_size=50, num_workers=0, seed=0)


@functools.cache
def digits_classifier() -> NetworkExtractor:
    state, about, sha256 = read_frozen(SHIPPED / "digits.safetensors", None)
    network = build(about["network"])
    network.load_state_dict(state)
    return NetworkExtractor("digits", network, sha256)


@functools.cache
def all_metrics() -> dict[str, Metric]:
    return build(compose_config("data=digits").metric)


def results_of(
    model: nn.Module,
    store: Store,
    data: ArrayData | None = None,
    num_samples: int = 150,  # enough for the 64 principal components
    untrained: nn.Module | None = None,
    metrics: dict[str, Metric] | None = None,
    classifier: Extractor | None = None,
) -> dict[str, Any]:
    """The results of an evaluation as plain JSON types, of all metrics on the digits unless said otherwise."""
    data = digit_data(*digits()) if data is None else data

    def classifier_or_reason() -> Extractor:
        if not data.spec.num_classes:
            raise NotApplicable(f"data={data.spec.name} has no labels, so there is no classifier of it")
        return classifier or digits_classifier()

    results = evaluate(
        model=model,
        untrained=untrained or Draws(uniform),
        model_name="fake",
        data=data,
        metrics=all_metrics() if metrics is None else metrics,
        classifier=classifier_or_reason,
        store=store,
        num_samples=num_samples,
        batch_size=32,
        seed=0,
        about={"weights": "raw"},
    )
    return to_json(results)
