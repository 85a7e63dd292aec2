"""The published experiments, run as their headers say, on real data: `make test-all DATA_ROOT=FOLDER`."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from src.runs import Run
from tests.commands import call
from tests.configs import options

DATA_ROOT = Path(os.environ.get("DATA_ROOT", "data"))

pytestmark = pytest.mark.slow
needs_mnist = pytest.mark.skipif(
    not (DATA_ROOT / "MNIST" / "raw").is_dir(), reason=f"no MNIST under {DATA_ROOT}; set DATA_ROOT"
)
needs_cifar10 = pytest.mark.skipif(
    not (DATA_ROOT / "cifar10" / "train.zip").is_file(), reason=f"no cifar10/train.zip under {DATA_ROOT}; set DATA_ROOT"
)


def far_below_anchors(entry: dict) -> bool:
    return entry["value"] < 0.05 * min(entry["anchors"]["noise"], entry["anchors"]["untrained"])


PROMISES: dict[str, tuple[str, Callable[[dict], bool]]] = {
    "vae_mnist_dynamic": ("bound", lambda entry: entry["value"] >= -104),
    "vae_mnist_grey": ("test_loss", lambda entry: entry["value"] <= 106.5),
    "cvae_mnist": ("condition_accuracy", lambda entry: entry["value"] >= 0.95),
    "dcgan_mnist": ("fd", far_below_anchors),
    "cgan_mnist": ("condition_accuracy", lambda entry: entry["value"] >= 0.90),
}


def test_every_experiment_has_a_promise() -> None:
    assert set(options("experiment")) == set(PROMISES)


@needs_mnist
@pytest.mark.parametrize("experiment", options("experiment"))
def test_an_experiment_keeps_its_promise(experiment: str, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "run"
    said = call(
        "train",
        f"experiment={experiment}",
        f"data.root={DATA_ROOT}",
        f"data.cache={cache}",
        f"hydra.run.dir={folder}",
    )
    assert said.code == 0, said.text
    metric, is_kept = PROMISES[experiment]
    entry = json.loads((folder / "results.json").read_text())["metrics"][metric]
    assert is_kept(entry), entry


@needs_cifar10
@pytest.mark.parametrize("model", ["vae_conv", "dcgan", "cgan"])
def test_colour_photographs_in_a_zip_are_a_data_set(model: str, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "run"
    said = call(
        "train",
        f"model={model}",
        "data=image_folder",
        f"data.path={DATA_ROOT / 'cifar10' / 'test.zip'}",
        f"data.cache={cache}",
        "trainer.max_steps=30",
        "evaluation.num_samples=200",
        "evaluation.classifier.num_steps=50",
        f"hydra.run.dir={folder}",
    )
    assert said.code == 0, said.text
    run = Run.open(folder)
    assert run.status()["status"] == "done"
    assert json.loads((folder / "results.json").read_text())["metrics"]["fd"]["card"]["num_reference"] == 8000
