"""FID and the inception score: torchmetrics on the Inception network of 2015-12-05, and on nothing else.

The weights (96 MB) come from a local file or from torchmetrics' own download. With neither the metric is absent, with its
reason; no other network ever stands in for it. Images are resized to 299x299 by torch-fidelity's TensorFlow-like bilinear
interpolation, grey ones repeated to three channels.

References:
    Heusel et al. 2017, arXiv:1706.08500 (FID); Salimans et al. 2016, arXiv:1606.03498 (IS).
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore

from src.core.errors import NotApplicable, UserError
from src.metrics.features import ImageSet
from src.metrics.metric import Inputs, Measurement, Metric, measure_anchors

__all__ = ["FID", "InceptionScore"]

_FEATURE_DIM = 2048
_BATCH_SIZE = 64


class _InceptionMetric(Metric):
    """Shared by both: where the weights come from, and the card.

    Args:
        weights: file of the Inception weights (weights-inception-2015-12-05-6726825d.pth), or None.
        download: let torchmetrics fetch them, if no file is given.
    """

    _name: ClassVar[str]  # of its YAML, for messages

    def __init__(self, weights: str | None, download: bool) -> None:
        if weights is not None and not Path(weights).is_file():
            raise UserError(f"metric.{self._name}.weights={weights} is not a file")
        self._weights = weights
        self._download = download

    def _network(self, layer: str, inputs: Inputs) -> "_Inception":
        if self._weights is None and not self._download:
            raise NotApplicable(
                f"no Inception weights: give metric.{self._name}.weights=FILE, or metric.{self._name}.download=true"
            )
        try:
            network = _load(self._weights, layer)
        except Exception as error:  # network, file and format errors of many kinds: all mean "no weights"
            raise NotApplicable(f"the Inception weights cannot be loaded ({type(error).__name__}: {error})") from error
        return network.to(inputs.device)

    def _card(self, network: "_Inception", **rest: Any) -> dict[str, Any]:
        return {
            "extractor": f"inception-v3-compat (2015-12-05), {network.layer}",
            "extractor_sha256": network.sha256,
            "resize": "299x299 bilinear as TensorFlow 1, grey repeated to 3 channels",
            **rest,
        }


class FID(_InceptionMetric):
    """The Fréchet Inception distance between samples and training images, pool3 features."""

    _name = "fid"

    def measure(self, inputs: Inputs) -> Measurement:
        generated = inputs.need_generated()
        network = self._network("2048", inputs)
        metric = FrechetInceptionDistance(feature=network, reset_real_features=False).to(network.device)
        num_reference = _feed(inputs.reference, lambda x: metric.update(x, real=True), network.device)

        def distance(images: ImageSet) -> tuple[float, int]:
            metric.reset()
            num_samples = _feed(images, lambda x: metric.update(x, real=False), network.device)
            if min(num_samples, num_reference) < 2:
                raise NotApplicable("FID needs at least two samples on each side")
            return float(metric.compute()), num_samples

        value, num_samples = distance(generated)
        anchors, about = measure_anchors(inputs, distance)
        card = self._card(network, num_samples=num_samples, num_reference=num_reference, reference_split="train", **about)
        return Measurement(value, "1", card, anchors=anchors)


class InceptionScore(_InceptionMetric):
    """The inception score of the samples, mean over ten splits."""

    _name = "inception_score"

    def measure(self, inputs: Inputs) -> Measurement:
        generated = inputs.need_generated()
        network = self._network("logits_unbiased", inputs)
        value, num_samples = self._score(network, generated)
        anchors, about = measure_anchors(inputs, lambda images: self._score(network, images))
        return Measurement(value, "1", self._card(network, num_samples=num_samples, splits=10, **about), anchors=anchors)

    def _score(self, network: "_Inception", images: ImageSet) -> tuple[float, int]:
        metric = TorchmetricsInceptionScore(feature=network, splits=10).to(network.device)
        num_samples = _feed(images, metric.update, network.device)
        if num_samples < 10:
            raise NotApplicable(f"the inception score needs at least 10 samples for its 10 splits, not {num_samples}")
        with torch.random.fork_rng():  # torchmetrics shuffles by the global generator
            torch.manual_seed(0)
            return float(metric.compute()[0]), num_samples


class _Inception(nn.Module):
    """One layer of torch-fidelity's Inception, frozen, in float64, for uint8 images of any size and 1 or 3 channels."""

    num_features = _FEATURE_DIM

    def __init__(self, network: NoTrainInceptionV3, layer: str, sha256: str) -> None:
        super().__init__()
        self.layer = layer
        self.sha256 = sha256
        self._network = network.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self._network.parameters()).device

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.repeat(1, 3, 1, 1)
        return self._network(images).double()


@lru_cache(maxsize=2)
def _load(weights: str | None, layer: str) -> _Inception:
    if weights is not None:
        torch.load(weights, weights_only=True)  # torch-fidelity would run whatever code the file holds
    with torch.random.fork_rng():  # its random weights, replaced at once, come from the global generator
        network = NoTrainInceptionV3(
            "inception-v3-compat", [layer], feature_extractor_weights_path=weights, antialias=False
        )
    return _Inception(network, layer, _file_sha256(weights))


def _feed(images: ImageSet, update: Callable[[Tensor], None], device: torch.device) -> int:
    """Send all images through `update`, few at a time since 299x299 pixels want memory; returns how many they were."""
    count = 0
    for batch, _ in images.batches():
        for part in batch.split(_BATCH_SIZE):
            update(part.to(device))
        count += len(batch)
    return count


def _file_sha256(weights: str | None) -> str:
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
