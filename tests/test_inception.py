"""FID, KID and inception score: their answers without weights, what weights they refuse, and a pass with random ones."""

import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from src.core.errors import NotApplicable, UserError
from src.metrics import inception
from src.metrics.metric import HELD_OUT
from tests.measuring import byte_images, image_set, make_inputs, make_metric

pytestmark = pytest.mark.filterwarnings("ignore:Metric `InceptionScore`")

INCEPTION = ["fid", "kid", "inception_score"]


@pytest.mark.parametrize("name", INCEPTION)
def test_inception_metrics_without_weights_name_the_option_that_gives_them(name):
    inputs = make_inputs(generated=image_set(byte_images(24)))
    with pytest.raises(NotApplicable, match=rf"metric\.{name}\.weights=FILE, or metric\.{name}\.download=true"):
        make_metric(name).measure(inputs)


@pytest.mark.parametrize("name", INCEPTION)
def test_inception_metrics_refuse_a_file_that_is_not_there_before_anything_is_measured(name, tmp_path):
    with pytest.raises(UserError, match=rf"metric\.{name}\.weights=.*nowhere\.pth is not a file"):
        make_metric(name, weights=str(tmp_path / "nowhere.pth"))


class MakesFolder:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self._folder),)


@pytest.mark.parametrize("name", INCEPTION)
@pytest.mark.parametrize(
    "save", [torch.save, lambda thing, file: file.write_bytes(pickle.dumps(thing, protocol=2))], ids=["torch", "pickle"]
)
def test_weights_that_would_run_code_are_refused_unread(name, save, tmp_path):
    weights, trace = tmp_path / "weights.pth", tmp_path / "was_here"
    save({"fc.bias": MakesFolder(trace)}, weights)
    with pytest.raises(NotApplicable, match="the Inception weights cannot be loaded"):
        make_metric(name, weights=str(weights)).measure(make_inputs(generated=image_set(byte_images(24))))
    assert not trace.exists()


@pytest.mark.parametrize("name", INCEPTION)
def test_weights_of_another_network_are_refused(name, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(nn.Linear(2, 2).state_dict(), weights)
    with pytest.raises(NotApplicable, match="the Inception weights cannot be loaded"):
        make_metric(name, weights=str(weights)).measure(make_inputs(generated=image_set(byte_images(24))))


class Mean(nn.Module):
    """Stands for Inception: 2,048 features and 1,008 logits of a few pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = self.weight * x.float().flatten(1) / 255
        return pixels.repeat(1, 2048 // pixels.shape[1] + 1)[:, :2048], pixels.repeat(1, 1008 // pixels.shape[1] + 1)[
            :, :1008
        ]


@pytest.fixture
def weights_of_mean(tmp_path, monkeypatch) -> Path:
    """A file that is loaded as `Mean`."""
    file = tmp_path / "weights.pth"
    file.write_bytes(b"whatever")
    monkeypatch.setattr(inception, "_load", lambda _: Mean())
    return file


@pytest.mark.parametrize("name", INCEPTION)
def test_weights_with_another_hash_are_refused_with_both(name, weights_of_mean):
    found = hashlib.sha256(weights_of_mean.read_bytes()).hexdigest()[:12]
    words = rf"metric\.{name}\.weights are not Inception's .*: their SHA-256 is {found}\.\.\., not 6726825d0af5\.\.\."
    with pytest.raises(NotApplicable, match=words):
        make_metric(name, weights=str(weights_of_mean)).measure(make_inputs(generated=image_set(byte_images(24))))


def test_fid_needs_more_images_than_features_on_each_side(weights_of_mean, monkeypatch):
    monkeypatch.setattr(inception, "_SHA256", hashlib.sha256(weights_of_mean.read_bytes()).hexdigest())
    assert inception._LEAST_IMAGES == 2049
    fid = make_metric("fid", weights=str(weights_of_mean))
    few, enough = (image_set(byte_images(count), batch_size=500) for count in (2048, 2049))
    for generated, reference, words in ((few, enough, "2048 and 2049"), (enough, few, "2049 and 2048")):
        with pytest.raises(NotApplicable, match=rf"{words} images are too few .* at least 2049 are needed on each side"):
            fid.measure(make_inputs(generated=generated, reference=reference))
    monkeypatch.setattr(inception, "_LEAST_IMAGES", 24)
    few = image_set(byte_images(24))
    monkeypatch.setattr(
        inception.FrechetInceptionDistance, "compute", lambda _: torch.tensor(3.0)
    )  # slow in 2,048 dimensions
    assert fid.measure(make_inputs(generated=few, reference=few)).value == 3.0


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights in the file format of the Inception network, taken for Inception's, and few images for enough."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = fidelity.FeatureExtractorInceptionV3("random", ["2048"])
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
        patch.setattr(inception, "_LEAST_IMAGES", 24)
        yield file


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("fid", 24), ("kid", 40)])
def test_distance_of_equal_sets_is_near_zero_and_of_others_is_not(inception_weights, name, count):
    images = byte_images(count)
    anchors = {HELD_OUT: image_set(images // 4)}
    inputs = make_inputs(generated=image_set(images), reference=image_set(images.flip(0)), anchors=anchors)
    measured = make_metric(name, weights=str(inception_weights)).measure(inputs)
    dark = measured.anchors[HELD_OUT]
    if name == "fid":
        assert abs(measured.value) < 1e-3 * dark.value
    else:  # unbiased, so that a set is nearer to itself than chance has it
        assert measured.value < 0 < dark.value
    assert measured.card["num_samples"] == measured.card["num_reference"] == dark.count == count


@pytest.mark.slow
def test_images_pass_through_inception_once_for_all_its_metrics(inception_weights):
    generated, reference = image_set(byte_images(24)), image_set(byte_images(24, seed=1))
    inputs = make_inputs(generated=generated, reference=reference)
    make_metric("fid", weights=str(inception_weights)).measure(inputs)
    num_computed = inputs.store.num_computed
    measured = make_metric("inception_score", weights=str(inception_weights)).measure(inputs)
    assert measured.card["extractor_sha256"] == hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    assert inputs.store.num_computed == num_computed == 3  # features of two sets, and sums of one


@pytest.mark.slow
def test_inception_score_repeats_and_leaves_the_global_generator_alone(inception_weights):
    inputs = make_inputs(generated=image_set(byte_images(24)))
    metric = make_metric("inception_score", weights=str(inception_weights))
    before = torch.get_rng_state()
    first = metric.measure(inputs).value
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert metric.measure(inputs).value == first
    assert 1 <= first <= 24 / 10 + 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count", "least"), [("inception_score", 9, 10), ("kid", 39, 40)])
def test_too_few_images_have_no_value(inception_weights, name, count, least):
    inputs = make_inputs(generated=image_set(byte_images(count)))
    with pytest.raises(NotApplicable, match=f"at least {least} images .*not {count}"):
        make_metric(name, weights=str(inception_weights)).measure(inputs)
