"""FID, KID and the inception score: on the Inception network of 2015-12-05, and on nothing else.

The weights (96 MB) come from a local file or from torch-fidelity's own download. With neither the metric is absent, with
its reason; no other network ever stands in for it. Images are resized to 299x299 by torch-fidelity's TensorFlow-like
bilinear interpolation, grey ones repeated to three channels. FID and the score are computed by torchmetrics.

References:
    Heusel et al. 2017, arXiv:1706.08500 (FID); Salimans et al. 2016, arXiv:1606.03498 (IS).
    Binkowski et al. 2018, arXiv:1801.01401 (KID).
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore

from src.core.errors import NotApplicable, UserError
from src.metrics.features import Extractor, ImageSet
from src.metrics.kernel_distance import KernelDistance
from src.metrics.metric import HIGHER, Inputs, Reading, SampleMetric, Space

__all__ = ["FID", "KID", "InceptionScore"]

_FEATURE_DIM = 2048
_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of the weights of 2015-12-05
_LEAST_IMAGES = _FEATURE_DIM + 1  # for a covariance of full rank
_BATCH_SIZE = 64  # 299x299 pixels want memory
_RESIZE = {"resize": "299x299 bilinear as TensorFlow 1, grey repeated to 3 channels"}


class _Inception(Space):
    """The features of pool3 and the logits, by a network whose weights come from a file or are fetched.

    Args:
        metric: name of the metric that asks, for messages.
        weights: file of the Inception weights (weights-inception-2015-12-05-6726825d.pth), or None.
        download: let torch-fidelity fetch them, if no file is given.
    """

    def __init__(self, metric: str, weights: str | None, download: bool) -> None:
        if weights is not None and not Path(weights).is_file():
            raise UserError(f"metric.{metric}.weights={weights} is not a file")
        self._metric = metric
        self._weights = weights
        self._download = download

    def extractor(self, inputs: Inputs) -> Extractor:
        if self._weights is None and not self._download:
            raise NotApplicable(
                f"no Inception weights: give metric.{self._metric}.weights=FILE, or metric.{self._metric}.download=true"
            )
        try:
            network = _load(self._weights)
        except Exception as error:  # network, file and format errors of many kinds: all mean "no weights"
            raise NotApplicable(f"the Inception weights cannot be loaded ({type(error).__name__}: {error})") from error
        sha256 = _file_sha256(self._weights)
        if sha256 != _SHA256:
            raise NotApplicable(
                f"metric.{self._metric}.weights are not Inception's of 2015-12-05: their SHA-256 is {sha256[:12]}..., not "
                f"{_SHA256[:12]}..."
            )
        return _InceptionExtractor(network.to(inputs.device), sha256)


class FID(SampleMetric):
    """The Fréchet Inception distance between samples and training images: the plain estimate, as published ones are.

    Args:
        weights, download: see the module.
    """

    def __init__(self, weights: str | None, download: bool) -> None:
        super().__init__(_Inception("fid", weights, download))

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        if min(images.count, inputs.reference.count) < _LEAST_IMAGES:
            raise NotApplicable(
                f"{images.count} and {inputs.reference.count} images are too few for the covariance of {_FEATURE_DIM} "
                f"features; at least {_LEAST_IMAGES} are needed on each side (evaluation.num_samples=)"
            )
        metric = FrechetInceptionDistance(feature=_Given(), reset_real_features=False, sync_on_compute=False)
        sums = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")  # torchmetrics' names

        def reference() -> dict[str, Tensor]:
            metric.update(inputs.features(inputs.reference, extractor).features.double(), real=True)
            return {name: getattr(metric, name) for name in sums}

        for name, value in inputs.store.get("inception_sums", inputs.reference, extractor, {}, reference).items():
            setattr(metric, name, value)
        features = inputs.features(images, extractor).features.double()
        metric.update(features, real=False)
        return Reading(float(metric.compute()), len(features))

    def protocol(self) -> dict[str, Any]:
        return _RESIZE | {"estimate": "plug-in"}


class KID(KernelDistance):
    """The kernel distance on Inception's pool3. Args as `FID`."""

    def __init__(self, weights: str | None, download: bool) -> None:
        super().__init__(_Inception("kid", weights, download))

    def protocol(self) -> dict[str, Any]:
        return _RESIZE | super().protocol()


class InceptionScore(SampleMetric):
    """The inception score of the samples, mean over ten splits. Args as `FID`."""

    better = HIGHER

    def __init__(self, weights: str | None, download: bool) -> None:
        super().__init__(_Inception("inception_score", weights, download))

    def of(self, images: ImageSet, inputs: Inputs, extractor: Extractor) -> Reading:
        logits = inputs.features(images, extractor).logits.double()
        if len(logits) < 10:
            raise NotApplicable(f"the inception score needs at least 10 images for its 10 splits, not {len(logits)}")
        metric = TorchmetricsInceptionScore(feature=_Given(), splits=10, sync_on_compute=False)
        metric.update(logits)
        with torch.random.fork_rng():  # torchmetrics shuffles by the global generator
            torch.manual_seed(0)
            return Reading(float(metric.compute()[0]), len(logits))

    def protocol(self) -> dict[str, Any]:
        return _RESIZE | {"splits": 10}


class _InceptionExtractor(Extractor):
    """Takes uint8 images of any size, grey or colour."""

    name = "inception-v3-compat (2015-12-05), pool3 and logits"

    def __init__(self, network: FeatureExtractorInceptionV3, sha256: str) -> None:
        self.sha256 = sha256
        self._network = network

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        device = next(self._network.parameters()).device
        if images.shape[1] == 1:
            images = images.repeat(1, 3, 1, 1)
        with torch.autocast(device.type, enabled=False):
            pairs = [self._network(part.to(device)) for part in images.split(_BATCH_SIZE)]
        features, logits = (torch.cat(parts).flatten(1).cpu().float() for parts in zip(*pairs, strict=True))
        return features, logits


class _Given(nn.Module):
    """Stands where torchmetrics expects a network, and passes on the features it is given."""

    num_features: ClassVar[int] = _FEATURE_DIM

    def forward(self, features: Tensor) -> Tensor:
        return features


@lru_cache(maxsize=1)
def _load(weights: str | None) -> FeatureExtractorInceptionV3:
    if weights is not None:
        torch.load(weights, weights_only=True)  # torch-fidelity would run whatever code the file holds
    with torch.random.fork_rng():  # its random weights, replaced at once, come from the global generator
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )
    return network.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def _file_sha256(weights: str | None) -> str:
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
