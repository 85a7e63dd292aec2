"""What a metric is handed: sets of images, and inputs of which a test gives only what matters to it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from src.build import build
from src.core.batch import Batch
from src.core.errors import NotApplicable
from src.core.rng import SampleNoise
from src.core.spec import DISCRETE
from src.metrics.features import Extractor, ImageSet
from src.metrics.metric import Inputs, Metric
from src.metrics.store import Store
from tests.configs import load_option
from tests.examples import image_spec

__all__ = ["NUM_CLASSES", "SHAPE", "byte_images", "image_set", "make_inputs", "make_metric"]

SHAPE = (1, 8, 8)
NUM_CLASSES = 3


def byte_images(count: int, seed: int = 0) -> Tensor:
    u = SampleNoise(seed).uniform((count, *SHAPE), torch.zeros(()))
    return (256 * u).floor().byte()


def image_set(
    images: Tensor,
    labels: Tensor | None = None,
    batch_size: int = 16,
    identity: Callable[[], dict[str, Any]] | None = None,
) -> ImageSet:
    label_parts = [None] * len(images) if labels is None else labels.split(batch_size)
    return ImageSet(lambda: zip(images.split(batch_size), label_parts, strict=False), len(images), identity)


def make_inputs(
    model: nn.Module | None = None,
    generated: ImageSet | NotApplicable | None = None,
    reference: ImageSet | None = None,
    anchors: dict[str, ImageSet] | None = None,
    classifier: Extractor | None = None,
    x: Tensor | None = None,
    values: str = DISCRETE,
    batch_size: int = 4,
    seed: int = 0,
    store: Store | None = None,
    unseen: ImageSet | None = None,
) -> Inputs:
    x = torch.zeros(10, *SHAPE) if x is None else x

    def classifier_or_reason() -> Extractor:
        if classifier is None:
            raise NotApplicable("there is no classifier")
        return classifier

    return Inputs(
        model=model or nn.Identity(),
        model_name="fake",
        device=torch.device("cpu"),
        spec=image_spec(SHAPE, values, num_classes=NUM_CLASSES),
        test_batches=lambda: (Batch(part) for part in x.split(batch_size)),
        seed=seed,
        generated=generated or NotApplicable("fake has no CanSample"),
        reference=reference or image_set(byte_images(40)),
        anchors=anchors or {},
        classifier=classifier_or_reason,
        store=store or Store(None),
        unseen=unseen,
    )


def make_metric(name: str, **keys: object) -> Metric:
    """The metric of a YAML, as by `metric=NAME metric.NAME.KEY=VALUE`."""
    return build({**load_option("metric", name)[name], **keys})
