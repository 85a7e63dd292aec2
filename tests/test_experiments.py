"""The published experiments, run as their headers say, on real data: `make test-all DATA_ROOT=FOLDER`."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from src.runs import Run
from tests.commands import call
from tests.configs import compose_config, options

DATA_ROOT = Path(os.environ.get("DATA_ROOT", "data"))

pytestmark = pytest.mark.slow
has_mnist = (DATA_ROOT / "MNIST" / "raw").is_dir()
has_shakespeare = (DATA_ROOT / "tinyshakespeare" / "input.txt").is_file()
needs_cifar10 = pytest.mark.skipif(
    not (DATA_ROOT / "cifar10" / "test.zip").is_file(), reason=f"no cifar10/test.zip under {DATA_ROOT}; set DATA_ROOT"
)


def far_below_anchors(entry: dict) -> bool:
    return entry["value"] < 0.05 * min(entry["anchors"][row]["value"] for row in ("noise", "untrained"))


PROMISES: dict[str, tuple[str, Callable[[dict], bool]]] = {
    "vae_mnist_dynamic": ("bound", lambda entry: entry["value"] >= -104),
    "vae_mnist_grey": ("test_loss", lambda entry: entry["value"] <= 106.5),
    "cvae_mnist": ("condition_accuracy", lambda entry: entry["value"] >= 0.95),
    "dcgan_mnist": ("fd", far_below_anchors),
    "cgan_mnist": ("condition_accuracy", lambda entry: entry["value"] >= 0.90),
    "classifier": ("accuracy", lambda entry: entry["value"] >= 0.97),  # of digits
    "mnist_recipes": ("fd", lambda entry: entry["value"] <= 250),  # dcgan, of its recipes
    "ring_gan": ("modes_covered", lambda entry: entry["value"] <= 7),
    "ring_pacgan": ("modes_covered", lambda entry: entry["value"] == 8),  # with seed 0; not with all
    "ring_relativistic": ("high_quality", lambda entry: entry["value"] >= 0.9),
    "grid_gan": ("modes_covered", lambda entry: entry["value"] <= 20),
    "grid_pacgan": ("modes_covered", lambda entry: entry["value"] >= 20),  # with seed 0; not with all
    "grid_relativistic": ("modes_covered", lambda entry: entry["value"] >= 24),
    "stacked_mnist_small_dcgan": ("modes_covered", lambda entry: entry["value"] >= 95),
    "stacked_mnist_small_pacgan": ("modes_covered", lambda entry: entry["value"] >= 95),
    "stacked_mnist_small_relativistic": ("modes_covered", lambda entry: entry["value"] >= 95),
    "two_moons_flow": ("forward_kl", lambda entry: entry["value"] <= 0.05),
    "two_moons_flow_matching": ("forward_kl", lambda entry: entry["value"] <= 0.05),
    "checkerboard_flow": ("forward_kl", lambda entry: entry["value"] <= 0.15),
    "checkerboard_flow_matching": ("forward_kl", lambda entry: entry["value"] <= 0.15),
    "mnist_iwae": ("iw_bound_5000", lambda entry: entry["value"] >= -94.5),  # with k = 5
    "mnist_flow": ("bound_bits_per_dim", lambda entry: entry["value"] <= 1.5),
    "mnist_quadrants": ("iw_bound_5000", lambda entry: entry["value"] >= -75),  # the baseline: -104.3
    "mnist_latents": ("reconstruction_error", lambda entry: entry["value"] <= 0.031),  # of the autoencoder
    "mnist_families": ("fd", lambda entry: entry["value"] <= 350),  # vae, of its families
    "shakespeare_nanogpt": ("nats_per_token", lambda entry: abs(entry["value"] - 1.886) <= 0.03),
    "shakespeare_gpt2": (
        "nats_per_token",
        lambda entry: abs(entry["value"] - 1.899) <= 0.02,
    ),  # that of shakespeare_nanogpt
    "shakespeare_lstm": ("nats_per_token", lambda entry: entry["value"] < 1.669),  # a 5-gram's
    "shakespeare_transformer": ("nats_per_token", lambda entry: entry["value"] < 1.669),
    "fsdd_models": ("log_mel_distance", lambda entry: entry["value"] <= 3),  # dB, of audio_vae_mel; of noise 57
    "eight_gaussians_to_moons": ("wasserstein", lambda entry: entry["value"] <= 0.45),
}


def below_a_bigram(entry: dict) -> bool:
    return entry["value"] < entry["anchors"]["bigram"]["value"]


def fd_at_most(value: float) -> Callable[[dict], bool]:
    return lambda entry: entry["value"] <= value


OF_SOUNDS: dict[str, tuple[str, Callable[[dict], bool]]] = {  # the models of fsdd_models
    "wavenet": ("bits_per_sample", below_a_bigram),
    "transformer_mu_law": ("bits_per_sample", below_a_bigram),
    "audio_vae": ("fd", fd_at_most(1000)),
    "audio_vae_mel": ("fd", fd_at_most(1200)),
    "flow_matching_mel": ("fd", fd_at_most(250)),
}
OF_GPU: dict[str, tuple[str, Callable[[dict], bool]]] = {  # hours on one
    "stacked_mnist_dcgan": ("modes_covered", lambda entry: entry["value"] < 300),
    "stacked_mnist_pacgan": ("modes_covered", lambda entry: entry["value"] >= 999),
    "stacked_mnist_r3gan": ("modes_covered", lambda entry: entry["value"] >= 999),
    "mnist_flow_single_scale": ("bound_bits_per_dim", lambda entry: entry["value"] <= 1.09),
    "mnist_flow_multi_scale": ("bound_bits_per_dim", lambda entry: entry["value"] <= 1.03),
    "shakespeare_gpu": ("nats_per_token", lambda entry: entry["value"] <= 1.48),
    "cifar10_sngan": ("fid", lambda entry: entry["value"] <= 18),
    "cifar10_projection_gan": ("fid", lambda entry: entry["value"] <= 12),
    "cifar10_stylegan2": ("fid", lambda entry: entry["value"] <= 6),
    "cifar10_r3gan": ("fid", lambda entry: entry["value"] <= 12),
}
_WIDTH = ("generator.width=32", "discriminator.width=32")
_MAX_WIDTH = ("generator.max_width=64", "discriminator.max_width=64")
NARROW = {  # for steps on a CPU
    "shakespeare_gpu": ("network.width=48", "data.context=32", "trainer.accelerator=cpu", "trainer.precision=32-true"),
    "cifar10_sngan": _WIDTH,
    "cifar10_projection_gan": _WIDTH,
    "cifar10_stylegan2": (*_WIDTH, *_MAX_WIDTH),
    "cifar10_r3gan": (*_WIDTH, *_MAX_WIDTH),
    "stacked_mnist_dcgan": _WIDTH,
    "stacked_mnist_pacgan": _WIDTH,
    "stacked_mnist_r3gan": (*_WIDTH, *_MAX_WIDTH),
    "mnist_flow_single_scale": ("network.widths=[8]",),
    "mnist_flow_multi_scale": ("network.widths=[8,8]",),
}


def test_every_experiment_has_a_promise() -> None:
    assert set(options("experiment")) == set(PROMISES) | set(OF_GPU)


@pytest.mark.parametrize("experiment", OF_GPU)
def test_an_experiment_for_a_gpu_takes_fifty_steps_with_narrow_networks(
    experiment: str, tmp_path: Path, cache: Path
) -> None:
    if experiment.startswith("cifar10") and not (DATA_ROOT / "cifar10" / "train.zip").is_file():
        pytest.skip(f"no cifar10/train.zip under {DATA_ROOT}; set DATA_ROOT")
    skip_without_data(experiment)
    data: tuple[str, ...] = (f"data.root={DATA_ROOT}",)
    if experiment.startswith("cifar10"):  # the JPEG copies of it
        data = ("data=image_folder", f"data.path={DATA_ROOT / 'cifar10' / 'train.zip'}", "~data.num_val")
    short = (
        "trainer.max_steps=50",
        "loader.batch_size=8",
        "evaluation.num_samples=200",
        "evaluation.batch_norm_samples=64",
    )
    said = call(
        "train", f"experiment={experiment}", *data, *short, *NARROW[experiment], "metric=[fd_pca]",
        "callback.light_evaluation.metrics=[]", f"data.cache={cache}", f"hydra.run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert said.code == 0, said.text
    assert Run.open(tmp_path / "run").status()["status"] == "done"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it takes hours on a GPU, and there is none")
@pytest.mark.parametrize("experiment", OF_GPU)
def test_an_experiment_for_a_gpu_keeps_its_promise(experiment: str, tmp_path: Path, cache: Path) -> None:
    keep_promise(experiment, OF_GPU[experiment], tmp_path, cache)


@pytest.mark.parametrize("experiment", PROMISES)
def test_an_experiment_keeps_its_promise(experiment: str, tmp_path: Path, cache: Path) -> None:
    keep_promise(experiment, PROMISES[experiment], tmp_path, cache)


@pytest.mark.parametrize("model", OF_SOUNDS)
def test_a_model_of_spoken_digits_keeps_its_promise(model: str, tmp_path: Path, cache: Path) -> None:
    keep_promise("fsdd_models", OF_SOUNDS[model], tmp_path, cache, f"model={model}")


def test_independent_pairs_make_paths_that_one_step_cannot_follow(tmp_path: Path, cache: Path) -> None:
    told = ("experiment=eight_gaussians_to_moons", "coupling=independent", f"data.cache={cache}")
    said = call("train", *told, f"hydra.run.dir={tmp_path / 'run'}")
    assert said.code == 0, said.text
    found = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert found["wasserstein"]["value"] >= 1.5
    assert found["path_energy"]["value"] >= 2 * 6.84  # of pairs by optimal transport


def test_densities_on_latents_draw_better_digits_than_the_prior_of_a_vae(tmp_path: Path, cache: Path) -> None:
    skip_without_data("mnist_latents")
    on_latents = f"autoencoder={tmp_path / 'autoencoder'}"
    runs = {
        "autoencoder": ("model=autoencoder",),
        "latent_flow_matching": ("model=latent_flow_matching", on_latents),
        "latent": ("model=latent", on_latents),
        "vae": ("model=vae",),
    }
    told = ("experiment=mnist_latents", f"data.root={DATA_ROOT}", f"data.cache={cache}")
    for name, chosen in runs.items():
        said = call("train", *told, *chosen, f"hydra.run.dir={tmp_path / name}")
        assert said.code == 0, said.text
    found = {name: json.loads((tmp_path / name / "results.json").read_text())["metrics"]["fd"] for name in runs}
    upper = {name: entry["interval"][1] for name, entry in found.items() if "interval" in entry}
    assert upper["latent_flow_matching"] < found["latent"]["interval"][0]
    assert upper["latent"] < found["vae"]["interval"][0]


def skip_without_data(experiment: str) -> None:
    if experiment.startswith("shakespeare"):
        if not has_shakespeare:
            pytest.skip(f"no tinyshakespeare/input.txt under {DATA_ROOT}; set DATA_ROOT")
    elif experiment.startswith("fsdd"):
        if not (DATA_ROOT / "fsdd" / "recordings").is_dir():
            pytest.skip(f"no fsdd/recordings under {DATA_ROOT}; set DATA_ROOT")
    elif not experiment.startswith("cifar10") and not has_mnist:
        pytest.skip(f"no MNIST under {DATA_ROOT}; set DATA_ROOT")


def keep_promise(
    experiment: str, promise: tuple[str, Callable[[dict], bool]], tmp_path: Path, cache: Path, *also: str
) -> None:
    is_downloaded = "root" in compose_config(f"experiment={experiment}").data
    if is_downloaded:
        skip_without_data(experiment)
    folder = tmp_path / "run"
    said = call(
        "train",
        f"experiment={experiment}",
        *also,
        *([f"data.root={DATA_ROOT}"] if is_downloaded else []),
        f"data.cache={tmp_path if experiment == 'classifier' else cache}",  # a classifier is never frozen twice
        f"hydra.run.dir={folder}",
    )
    assert said.code == 0, said.text
    metric, is_kept = promise
    entry = json.loads((folder / "results.json").read_text())["metrics"][metric]
    assert is_kept(entry), entry


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that choose a zip of colour photographs, of which there is a frozen classifier."""
    folder = tmp_path_factory.mktemp("photographs")
    path = DATA_ROOT / "cifar10" / "test.zip"
    data = ("data=image_folder", f"data.path={path}", f"data.cache={folder / 'prepared'}")
    said = call("train", "experiment=classifier", *data, "trainer.max_steps=50", f"hydra.run.dir={folder / 'run'}")
    assert said.code == 0, said.text
    return data


@needs_cifar10
@pytest.mark.parametrize("model", ["vae_conv", "dcgan", "cgan"])
def test_colour_photographs_in_a_zip_are_a_data_set(model: str, tmp_path: Path, photographs: tuple[str, ...]) -> None:
    folder = tmp_path / "run"
    short = ("trainer.max_steps=30", "evaluation.num_samples=200")
    said = call("train", f"model={model}", *photographs, *short, f"hydra.run.dir={folder}")
    assert said.code == 0, said.text
    run = Run.open(folder)
    assert run.status()["status"] == "done"
    card = json.loads((folder / "results.json").read_text())["metrics"]["fd"]["card"]
    assert card["num_reference"] == 8000
    assert card["extractor"].startswith("image_folder-")
