"""Frozen classifiers: the shipped ones are what they say, others are refused with a sentence, and a training makes one."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from src.build import build
from src.core.errors import NotApplicable, UserError
from src.core.spec import BINARY_STATIC, CONTINUOUS, DISCRETE
from src.data.digits import digits
from src.data.loading import ArrayData
from src.experiment import evaluate_run, load_data
from src.metrics.features import NetworkExtractor
from src.metrics.frozen_classifier import SHIPPED, find_frozen, frozen_file, read_frozen, write_frozen
from src.metrics.tensor_files import write_tensors
from src.networks.classifier import ConvClassifier, SmallClassifier
from src.runs import Run
from src.training.callbacks.freeze import FreezeClassifier
from tests.commands import QUICK, Said, call
from tests.configs import compose_config, load_option, options
from tests.examples import image_spec
from tests.measuring import byte_images

DATA_ROOT = Path(os.environ.get("DATA_ROOT", "data"))
SHIPPED_FILES = sorted(SHIPPED.glob("*.safetensors"))


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def extractor_of(file: Path) -> NetworkExtractor:
    state, about, sha256 = read_frozen(file, None)
    network = build(about["network"])
    network.load_state_dict(state)
    return NetworkExtractor(file.stem, network, sha256)


def accuracy_on(data: ArrayData, extractor: NetworkExtractor) -> float:
    """Share of the test images that it is right on, as it sees them in an evaluation."""
    batches = [data.to_units(batch) for batch in data.held_out_loader("test")]
    is_right = [extractor(data.spec.to_bytes(batch.x))[1].argmax(1) == batch.condition for batch in batches]
    return float(torch.cat(is_right).double().mean())


# --- those that ship -------------------------------------------------------------------------------------------------


def test_shipped_classifiers_are_those_that_the_configs_ask_for():
    asked = {}
    for name in options("data"):
        classifier = OmegaConf.select(load_option("data", name), "evaluation.classifier")
        if classifier is not None:
            asked[classifier.file] = classifier.sha256
            assert read_frozen(SHIPPED / classifier.file, classifier.sha256)[1]["data"] == name.removeprefix("stacked_")
    assert {file.name: sha256_of(file) for file in SHIPPED_FILES} == asked
    assert {"digits.safetensors", "mnist.safetensors"} <= set(asked)


@pytest.mark.parametrize("file", SHIPPED_FILES, ids=lambda file: file.stem)
def test_a_shipped_classifier_builds_its_network_and_classifies(file):
    _, about, sha256 = read_frozen(file, None)
    extractor = extractor_of(file)
    assert extractor.sha256 == sha256 == sha256_of(file)
    images = torch.zeros(3, *about["in_shape"], dtype=torch.uint8)
    features, logits = extractor(images)
    assert features.shape[0] == 3
    assert logits.shape == (3, len(about["class_names"]))
    assert features.isfinite().all()
    assert 0.5 < about["accuracy"] <= 1


def test_the_classifier_of_mnist_has_62_thousand_parameters_and_is_right_on_99_percent():
    state, about, _ = read_frozen(SHIPPED / "mnist.safetensors", None)
    assert sum(weights.numel() for weights in state.values()) == 61_706  # LeNet-5
    assert (SHIPPED / "mnist.safetensors").stat().st_size < 300_000
    assert about["accuracy"] >= 0.99
    assert about["in_shape"] == [1, 28, 28]
    assert about["class_names"] == [str(digit) for digit in range(10)]


def test_the_classifier_of_the_digits_is_as_often_right_as_it_says_and_of_these_data(cache):
    _, about, _ = read_frozen(SHIPPED / "digits.safetensors", None)
    data = ArrayData(digits(str(cache), "discrete"), batch_size=100, eval_batch_size=100, num_workers=0, seed=0)
    assert about["data_fingerprint"] == data.arrays.fingerprint
    assert accuracy_on(data, extractor_of(SHIPPED / "digits.safetensors")) == pytest.approx(about["accuracy"], abs=1 / 300)
    assert about["accuracy"] > 0.97


@pytest.mark.slow
@pytest.mark.skipif(not (DATA_ROOT / "MNIST" / "raw").is_dir(), reason=f"no MNIST under {DATA_ROOT}; set DATA_ROOT")
def test_the_classifier_of_mnist_is_right_on_99_percent_of_the_real_test_images(cache):
    data = load_data(compose_config("data=mnist", f"data.root={DATA_ROOT}", f"data.cache={cache}"))
    _, about, _ = read_frozen(SHIPPED / "mnist.safetensors", None)
    accuracy = accuracy_on(data, extractor_of(SHIPPED / "mnist.safetensors"))
    assert accuracy >= 0.99
    assert accuracy == pytest.approx(about["accuracy"], abs=1e-9)
    assert about["data_fingerprint"] == data.arrays.fingerprint


# --- which file it must be -------------------------------------------------------------------------------------------


@pytest.fixture
def run(trained, tmp_path) -> Run:
    """A finished run that a test may evaluate anew."""
    shutil.copytree(trained("gan").run.path, tmp_path / "run")
    return Run.open(tmp_path / "run")


def test_a_wrong_hash_is_recorded_and_measures_nothing_on_the_classifier(run):
    (run.path / "results.json").unlink()  # an earlier value would stay
    said = call("evaluate", f"run={run.path}", "metric=[fd,cs,fd_pca]", f"evaluation.classifier.sha256={'0' * 64}")
    assert said.code == 0, said.text
    metrics = run.results()["metrics"]
    words = r"digits\.safetensors has the SHA-256 \w{12}\.\.\., but evaluation\.classifier\.sha256 asks for 0{12}\.\.\."
    assert all(re.search(words, metrics[name]["not_applicable"]) for name in ("fd", "cs"))
    assert "value" in metrics["fd_pca"]
    assert "not applicable: fd, cs: the classifier" in said.text


def test_the_right_hash_is_on_the_card(run):
    said = call("evaluate", f"run={run.path}", "metric=[fd]")
    assert said.code == 0, said.text
    card = run.results()["metrics"]["fd"]["card"]
    assert card["extractor"] == "digits"
    assert card["extractor_sha256"] == sha256_of(SHIPPED / "digits.safetensors")


def measured_with(run: Run, file: Path) -> dict[str, Any]:
    """The results of `fd`, which needs the classifier, and of `fd_pca`, which does not."""
    config = run.config()
    config.metric = {name: config.metric[name] for name in ("fd", "fd_pca")}
    config.evaluation.classifier = {"file": str(file), "sha256": None}
    return evaluate_run(run, load_data(config), config)["metrics"]


ABOUT: dict[str, Any] = {
    "network": {"_target_": "src.networks.classifier.SmallClassifier", "in_shape": [1, 8, 8], "num_classes": 10},
    "data": "digits",
    "in_shape": [1, 8, 8],
    "class_names": [str(i) for i in range(10)],
    "accuracy": 0.5,
}


def write_classifier(file: Path, weights_of: nn.Module | None = None, **about: Any) -> None:
    write_frozen(file, weights_of or SmallClassifier([1, 8, 8], 10), ABOUT | about)


def write_about(file: Path, about: str) -> None:
    write_tensors(file, SmallClassifier([1, 8, 8], 10).state_dict(), about)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in ABOUT.items() if name != key}


def network(**changed: Any) -> dict[str, Any]:
    return {"network": ABOUT["network"] | changed}


NONE_OF_OURS = "(it is none of src.networks with plain arguments)"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (lambda file: None, "evaluation.classifier.file={file} is not a file"),
    "a folder": (lambda file: file.mkdir(), "{file} is not a file"),
    "a text": (lambda file: file.write_text("Dear reader, this is no tensor."), "{file} is no frozen classifier"),
    "empty": (lambda file: file.write_bytes(b""), "{file} is no frozen classifier"),
    "tensors alone": (lambda file: save_file({"x": torch.zeros(3)}, file), "{file} is no frozen classifier"),
    "about that is no JSON": (lambda file: write_about(file, "{"), "{file} is no frozen classifier"),
    "about that is a number": (lambda file: write_about(file, "3"), "{file} is no frozen classifier"),
    "about that is a list": (lambda file: write_about(file, "[]"), "{file} is no frozen classifier"),
    "about without its accuracy": (
        lambda file: write_about(file, json.dumps(without("accuracy"))),
        "{file} is no frozen classifier (it does not say its accuracy)",
    ),
    "a shape that is a number": (lambda file: write_classifier(file, in_shape=8), "{file}"),
    "of other shapes": (
        lambda file: write_classifier(file, SmallClassifier([1, 28, 28], 10), in_shape=[1, 28, 28]),
        "the classifier {file} is of [1, 28, 28] images in 10 classes; data=digits gives image 1x8x8",
    ),
    "of other classes": (
        lambda file: write_classifier(file, SmallClassifier([1, 8, 8], 7), class_names=list("abcdefg")),
        "the classifier {file} is of [1, 8, 8] images in 7 classes; data=digits gives image 1x8x8, discrete values "
        "(17 levels), 10 classes",
    ),
    "weights of another network": (
        lambda file: write_classifier(file, ConvClassifier([1, 8, 8], 10, width=4, feature_dim=8)),
        "the network of {file} cannot be built",
    ),
    "weights of another size": (
        lambda file: write_classifier(file, **network(num_classes=11)),
        "the network of {file} cannot be built",
    ),
    "a network that nobody may build": (
        lambda file: write_classifier(file, **network(_target_="os.system", command="true")),
        "{file}",
    ),
    "a network that does not exist": (
        lambda file: write_classifier(file, **network(_target_="src.networks.classifier.Nothing")),
        "{file}",
    ),
    "a network with another argument": (lambda file: write_classifier(file, **network(colour=3)), "{file}"),
    "a network that is a name": (lambda file: write_classifier(file, network="SmallClassifier"), "{file}"),
    "an entry point": (
        lambda file: write_classifier(file, network={"_target_": "src.sample.main"}),
        f"the network of {{file}} cannot be built {NONE_OF_OURS}",
    ),
    "a function that writes files": (
        lambda file: write_classifier(
            file, network={"_target_": "src.data.digits.digits", "cache": str(file.parent / "was_here"), "values": DISCRETE}
        ),
        f"the network of {{file}} cannot be built {NONE_OF_OURS}",
    ),
    "a network of torch": (
        lambda file: write_classifier(file, network={"_target_": "torch.nn.Identity"}),
        f"the network of {{file}} cannot be built {NONE_OF_OURS}",
    ),
    "a network without a target": (
        lambda file: write_classifier(file, network={"in_shape": [1, 8, 8], "num_classes": 10}),
        f"the network of {{file}} cannot be built {NONE_OF_OURS}",
    ),
    "an entry point as an argument": (
        lambda file: write_classifier(file, **network(num_classes={"_target_": "src.sample.main"})),
        f"the network of {{file}} cannot be built {NONE_OF_OURS}",
    ),
    "an entry point in a list": (
        lambda file: write_classifier(file, **network(in_shape=[1, 8, {"_target_": "src.sample.main"}])),
        f"the network of {{file}} cannot be built {NONE_OF_OURS}",
    ),
    "an entry point deep in a list": (
        lambda file: write_classifier(file, **network(_args_=[[{"a": [{"_target_": "src.sample.main"}]}]])),
        f"the network of {{file}} cannot be built {NONE_OF_OURS}",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_classifier_of_these_data_is_refused_with_a_sentence_and_the_rest_is_measured(
    kind, run, tmp_path, monkeypatch
):
    was_run = []

    def main() -> None:
        was_run.append("!")

    main.__module__, main.__qualname__ = "src.sample", "main"  # as the real one
    monkeypatch.setattr("src.sample.main", main)
    write, sentence = REFUSED[kind]
    file = tmp_path / "given.safetensors"
    write(file)
    metrics = measured_with(run, file)
    assert not was_run
    assert not (tmp_path / "was_here").exists()
    assert sentence.format(file=file) in metrics["fd"]["not_applicable"]
    assert "value" in metrics["fd_pca"]


def test_a_classifier_of_the_right_shape_and_classes_is_taken(run, tmp_path):
    file = tmp_path / "given.safetensors"
    write_classifier(file)
    card = measured_with(run, file)["fd"]["card"]
    assert (card["extractor"], card["extractor_sha256"]) == ("given", sha256_of(file))


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_bare_name_is_one_that_ships_a_path_is_a_file_and_none_is_the_one_of_these_data(tmp_path):
    spec = image_spec((1, 8, 8), DISCRETE)
    assert find_frozen("digits.safetensors", tmp_path, spec, "f" * 64) == SHIPPED / "digits.safetensors"
    assert find_frozen(str(tmp_path / "mine"), tmp_path, spec, "f" * 64) == tmp_path / "mine"
    file = frozen_file(tmp_path, spec, "f" * 64)
    assert file == tmp_path / f"made_up-discrete-{'f' * 12}.safetensors"
    write_classifier(file)
    assert find_frozen(None, tmp_path, spec, "f" * 64) == file
    others = (
        (spec, "e" * 64),
        (replace(spec, name="other"), "f" * 64),
        (image_spec((1, 8, 8), BINARY_STATIC), "f" * 64),  # black and white images are others than grey ones
        (image_spec((1, 8, 8), CONTINUOUS), "f" * 64),
    )
    for other, fingerprint in others:
        with pytest.raises(
            NotApplicable, match=rf"no frozen classifier of data={other.name} \(make one: .*experiment=classifier"
        ):
            find_frozen(None, tmp_path, other, fingerprint)


@pytest.mark.parametrize("build_network", [SmallClassifier, ConvClassifier])
def test_a_network_is_read_as_it_was_written(build_network, tmp_path):
    original, again = (build_network([3, 9, 9], 4) for _ in range(2))
    original.train()(torch.randn(8, 3, 9, 9))  # batch normalization has statistics
    sha256 = write_frozen(tmp_path / "folder" / "x.safetensors", original, ABOUT)
    state, about, found = read_frozen(tmp_path / "folder" / "x.safetensors", sha256)
    assert (about, found) == (ABOUT, sha256)
    again.load_state_dict(state)
    for mine, theirs in zip(again.state_dict().values(), original.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["x.safetensors"]


class Noisy(nn.Module):
    """A network that training mode would change."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 5), nn.Dropout())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(x)
        return features, features


def test_an_extractor_is_frozen():
    noisy = Noisy().train()
    before = {name: tensor.clone() for name, tensor in noisy.state_dict().items()}
    extractor = NetworkExtractor("noisy", noisy)
    images = byte_images(20)
    features, logits = extractor(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = torch.cat([extractor(image[None])[0] for image in images])
    torch.testing.assert_close(again, features)
    assert not noisy.training
    assert not any(some.requires_grad for some in (features, logits, *noisy.parameters()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in noisy.state_dict().items())


# --- making one ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What `experiment=classifier` made of a folder of images."""

    of_data: tuple[str, ...]  # arguments that choose the data
    classifiers: Path
    run: Run
    said: Said

    @property
    def file(self) -> Path:
        (file,) = self.classifiers.iterdir()
        return file


MAKE = ("experiment=classifier", "loader.batch_size=32")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("classifier")
    random = np.random.default_rng(0)
    for i in range(600):  # 120 of them are held out, enough for the one percent of copying
        grey = random.integers(0, 100, (8, 8), dtype=np.uint8)
        grey[:, 3 * (i % 3) : 3 * (i % 3) + 2] += 150  # a bright bar: left, middle or right
        file = folder / "images" / ("left", "middle", "right")[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(file)
    of_data = (
        "data=image_folder", f"data.path={folder / 'images'}", f"data.cache={folder / 'prepared'}",
        "data.size=8", "data.colour=false", "data.held_out=0.2",
    )  # fmt: skip
    said = call("train", *QUICK, *of_data, *MAKE, f"hydra.run.dir={folder / 'run'}")
    assert said.code == 0, said.text
    return Made(of_data, folder / "prepared" / "classifiers", Run.open(folder / "run"), said)


def test_a_training_makes_the_frozen_classifier_of_its_data_and_says_so(made):
    state, about, sha256 = read_frozen(made.file, None)
    assert re.fullmatch(r"image_folder-discrete-[0-9a-f]{12}\.safetensors", made.file.name)
    assert (about["data"], about["in_shape"], about["class_names"]) == (
        "image_folder",
        [1, 8, 8],
        ["left", "middle", "right"],
    )
    assert about["accuracy"] > 0.9
    assert about["accuracy"] == pytest.approx(made.run.results()["metrics"]["accuracy"]["value"])
    assert accuracy_on(load_data(made.run.config()), extractor_of(made.file)) == pytest.approx(about["accuracy"], abs=0.03)
    assert f"right on {100 * about['accuracy']:.2f} % of the test images" in made.said.text
    assert f"SHA-256 {sha256}" in made.said.text
    checkpoint = torch.load(made.run.checkpoint("last"), weights_only=True)["state_dict"]
    for name, weights in state.items():  # the averaged ones, as an evaluation measures
        assert torch.equal(weights, checkpoint[f"weight_average.average.network.{name}"])


def test_later_runs_on_the_same_data_find_it_by_themselves(made, tmp_path):
    settings = ("model=gan", "metric=[fd,modes,copying]", "trainer.max_steps=2", f"hydra.run.dir={tmp_path / 'run'}")
    said = call("train", *QUICK, *made.of_data, *settings)
    assert said.code == 0, said.text
    metrics = Run.open(tmp_path / "run").results()["metrics"]
    for name in ("fd", "modes", "copying"):
        assert "value" in metrics[name], metrics[name]
        assert metrics[name]["card"]["extractor"] == made.file.stem
        assert metrics[name]["card"]["extractor_sha256"] == sha256_of(made.file)


def test_it_is_never_overwritten_but_another_file_may_be_named(made, tmp_path):
    before = made.file.read_bytes()
    said = call("train", *QUICK, *made.of_data, *MAKE, f"hydra.run.dir={tmp_path / 'run'}")
    assert said.code == 1
    (sentence,) = (line for line in said.text.splitlines() if line.startswith("error: "))
    assert "Traceback" not in said.text
    assert f"{made.file} exists" in sentence
    assert "callback.freeze.file=FILE" in sentence
    other = tmp_path / "mine" / "other.safetensors"
    settings = (
        f"callback.freeze.file={other}",
        "callback.freeze.min_accuracy=0",
        "trainer.max_steps=2",
        f"hydra.run.dir={tmp_path / 'again'}",
    )
    said = call("train", *QUICK, *made.of_data, *MAKE, *settings)
    assert said.code == 0, said.text
    assert read_frozen(other, None)[1]["data"] == "image_folder"
    assert made.file.read_bytes() == before


def test_only_a_classifier_can_be_frozen(tmp_path):
    callback = FreezeClassifier(partial(SmallClassifier), str(tmp_path), None, min_accuracy=0)
    with pytest.raises(UserError, match=r"callback\.freeze freezes model=classifier only"):
        callback.on_fit_start(SimpleNamespace(), SimpleNamespace(model=nn.Linear(1, 1)))
