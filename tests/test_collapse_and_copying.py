"""The alarms on real MNIST: what was done to the samples is named by the right alarm, and by no other.

The samples are real images with one known fault each: 5,000 of them, against 20,000 training and 5,000 held-out images, in
the features of the shipped classifier. All of them are from MNIST's training set, which the classifier was trained on, so
that none is nearer or farther for that reason. One command shows the table that the README quotes:
`DATA_ROOT=FOLDER python -m tests.test_collapse_and_copying`.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from src.build import build
from src.data.arrays import Split
from src.data.loading import ArrayData
from src.evaluation.protocol import evaluate
from src.evaluation.results import alarms, findings, to_json
from src.metrics.store import Store
from tests.configs import compose_config
from tests.mnist import DATA_ROOT, Given, mnist_arrays, mnist_classifier, needs_mnist, noisy

NUM_TRAIN, NUM_HELD_OUT, NUM_SAMPLES = 20_000, 5_000, 5_000

pytestmark = [pytest.mark.slow, needs_mnist]


@functools.cache
def mnist() -> tuple[Tensor, Tensor]:
    """All 60,000 training images `(N, 1, 28, 28)` uint8 and their labels, in a fixed random order."""
    from torchvision.datasets import MNIST

    data = MNIST(str(DATA_ROOT), train=True, download=False)
    order = torch.randperm(len(data.targets), generator=torch.Generator().manual_seed(0))
    return data.data[order][:, None], data.targets[order]


@functools.cache
def data() -> ArrayData:
    x, y = mnist()
    held_out_end = NUM_TRAIN + NUM_HELD_OUT
    parts = {"train": slice(0, NUM_TRAIN), "val": slice(-NUM_HELD_OUT, None), "test": slice(NUM_TRAIN, held_out_end)}
    splits = {name: Split(np.asarray(x[part]), np.asarray(y[part])) for name, part in parts.items()}
    return mnist_arrays(splits, "mnist_20k")


def unseen(count: int = NUM_SAMPLES) -> Tensor:
    x, _ = mnist()
    first = NUM_TRAIN + NUM_HELD_OUT
    return x[first : first + count]


def copies(count: int) -> Tensor:
    """Training images, none twice."""
    return mnist()[0][:count]


def without_classes(*dropped: int) -> Tensor:
    x, y = mnist()
    kept = ~torch.isin(y, torch.tensor(dropped))
    kept[: NUM_TRAIN + NUM_HELD_OUT] = False
    return x[kept][:NUM_SAMPLES]


def blurred() -> Tensor:
    kernel = torch.ones(1, 1, 3, 3) / 9
    return F.conv2d(unseen().float(), kernel, padding=1).round().byte()


def few_unseen_per_class(each: int) -> Tensor:
    """So many images of each class, drawn again and again."""
    x, y = mnist()
    x, y = x[NUM_TRAIN + NUM_HELD_OUT :], y[NUM_TRAIN + NUM_HELD_OUT :]
    few = torch.cat([x[y == digit][:each] for digit in range(10)])
    return few.repeat(NUM_SAMPLES // len(few), 1, 1, 1)


def many_ones() -> Tensor:
    """Five times as many ones as there should be."""
    x, y = mnist()
    x, y = x[NUM_TRAIN + NUM_HELD_OUT :], y[NUM_TRAIN + NUM_HELD_OUT :]
    num_ones = round(NUM_SAMPLES * 5 * 0.1124 / (1 + 4 * 0.1124))
    return torch.cat([x[y == 1][:num_ones], x[y != 1][: NUM_SAMPLES - num_ones]])


SAMPLES: dict[str, tuple[Callable[[], Tensor], set[str]]] = {
    "unseen real images": (unseen, set()),
    "exact copies": (lambda: copies(NUM_SAMPLES), {"copying"}),
    "10 % copies": (lambda: torch.cat([copies(NUM_SAMPLES // 10), unseen(NUM_SAMPLES * 9 // 10)]), {"copying"}),
    "two classes dropped": (lambda: without_classes(3, 7), {"modes"}),
    "blurred 3x3": (blurred, {"underfit"}),
    "100 images copied": (lambda: copies(100).repeat(NUM_SAMPLES // 100, 1, 1, 1), {"copying", "support"}),
    "copies with noise": (lambda: noisy(copies(NUM_SAMPLES), sigma=0.1, seed=1), {"copying"}),
    "20 unseen images a class": (lambda: few_unseen_per_class(20), {"support"}),
    "ones five times as often": (many_ones, {"modes"}),
}


@functools.cache
def store() -> Store:
    return Store(None)


def measured(name: str) -> dict[str, Any]:
    """The results of all sample metrics on a set of samples."""
    images = SAMPLES[name][0]()
    assert len(images) == NUM_SAMPLES

    order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(1))
    results = evaluate(
        model=Given(images[order]),
        untrained=None,
        model_name=name,
        data=data(),
        metrics=build(compose_config("data=mnist").metric),
        classifier=mnist_classifier,
        store=store(),
        num_samples=NUM_SAMPLES,
        batch_size=500,
        seed=0,
        about={},
    )
    return to_json(results)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_fault_is_named_by_its_own_alarm_and_by_no_other(name: str) -> None:
    results = measured(name)
    assert alarms(results) == SAMPLES[name][1], findings(results)


def main() -> None:
    columns = [
        "fd", "precision", "recall", "density", "coverage", "modes", "class_kl",
        "effective_support", "c_t", "copying", "copying_pixels",
    ]  # fmt: skip
    print(f"| samples | {' | '.join(columns)} | alarms |")
    print(f"|---{'|---' * (len(columns) + 1)}|")
    for name in SAMPLES:
        results = measured(name)
        values = [f"{results['metrics'][column]['value']:.3g}" for column in columns]
        print(f"| {name} | {' | '.join(values)} | {', '.join(sorted(alarms(results))) or 'none'} |", flush=True)


if __name__ == "__main__":
    main()
