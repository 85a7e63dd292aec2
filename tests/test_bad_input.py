"""Bad input gets one clear sentence, and nothing good is lost."""

import os
import pickle
import shutil
import signal
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from src.build import build_model
from src.core.errors import UserError
from src.data.digits import digits
from src.data.image_folder import image_folder
from src.metrics.frozen_classifier import SHIPPED
from src.models.autoencoder import Autoencoder
from src.models.gan import GAN
from src.models.vae import VAE
from src.runs import Run
from tests.commands import QUICK, Said, call
from tests.configs import compose_model
from tests.examples import image_spec

# --- how it is told --------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, cache) -> Callable[..., str]:
    """`refused("train", ...)`: the sentence with which a command ends, after checking that it is one."""

    def command(name: str, *arguments: str) -> str:
        where = (f"hydra.run.dir={tmp_path / 'run'}", f"data.cache={cache}", *QUICK) if name == "train" else ()
        unmeasured = () if name != "train" or any("metric" in argument for argument in arguments) else ("metric=[]",)
        return _sentence(call(name, *where, *unmeasured, *arguments))

    return command


def _sentence(said: Said) -> str:
    assert said.code == 1, said.text
    assert "Traceback" not in said.text
    sentences = [line for line in said.text.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, said.text
    return sentences[0]


# --- data ------------------------------------------------------------------------------------------------------------


def _images(folder: Path, count: int = 12, side: int = 8) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (side, side), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def _refusal(path: Path, size: int = 8, held_out: float = 0.1) -> str:
    """The sentence with which a folder or zip of images is refused."""
    with pytest.raises(UserError) as caught:
        image_folder(str(path), None, str(path.parent / "cache"), "discrete", size, False, held_out)
    return str(caught.value)


@pytest.mark.parametrize(("data", "file"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("cifar10", "cifar-10")])
def test_missing_data_names_the_folder_and_the_options(refused, tmp_path, data, file):
    root = tmp_path / "nowhere"
    sentence = refused("train", f"data={data}", f"data.root={root}", "data.download=false")
    assert f"data={data} is not under {root} (no {file}" in sentence
    assert all(option in sentence for option in ("data.root=", "DATA_ROOT", "data.download=true"))
    assert not root.exists()


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_failed_download_names_the_folder_and_the_options(refused, tmp_path, monkeypatch, data):
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    sentence = refused("train", f"data={data}", f"data.root={tmp_path / 'nowhere'}", "data.download=true")
    assert f"data={data} is not under {tmp_path / 'nowhere'}" in sentence
    assert "the download failed" in sentence
    assert "DATA_ROOT" in sentence


def test_broken_file_of_a_data_set_is_named_with_its_root(refused, tmp_path):
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(b"\0\0\x08\x03")
    sentence = refused("train", "data=mnist", f"data.root={tmp_path / 'root'}")
    assert f"cannot read data=mnist under {tmp_path / 'root'}" in sentence


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def _write_text(file: Path) -> None:
    file.write_text("this is no image")


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _write_text, _empty])
def test_unreadable_image_is_named_and_nothing_half_prepared_stays(tmp_path, damage):
    folder = _images(tmp_path / "images")
    damage(folder / "7.png")
    assert f"7.png in {folder} is not a readable image" in _refusal(folder)
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_member_of_a_zip_is_named(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(_images(tmp_path / "images").iterdir()):
            archive.write(file, file.name)
    content = bytearray(path.read_bytes())
    start = content.index(b"7.png") + 60  # within its pixels
    content[start : start + 4] = bytes(255 - byte for byte in content[start : start + 4])
    path.write_bytes(content)
    assert f"7.png in {path} cannot be read" in _refusal(path)


def test_zip_with_a_broken_directory_is_named(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.png", "x")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02")] = 0
    path.write_bytes(content)
    assert f"data.path={path} is a broken zip" in _refusal(path)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "there is no file in"),
        (lambda path: path.write_text("text"), "is neither a folder nor a zip"),
        (lambda path: _images(path, count=1), "holds only one image"),
        (lambda path: _images(path, count=9), "holds only 9 images"),
    ],
    ids=["missing", "empty", "neither", "one image", "nine images"],
)
def test_source_without_enough_images_is_named(tmp_path, make, sentence):
    path = tmp_path / "images"
    make(path)
    found = _refusal(path)
    assert sentence in found
    assert str(path) in found


def test_share_that_leaves_nothing_to_train_on_is_named(tmp_path):
    path = _images(tmp_path / "images", count=10)
    sentence = f"data.held_out=0.49 leaves none of the 10 images of {path} to train on"
    assert sentence in _refusal(path, held_out=0.49)


@pytest.mark.parametrize("setting", [{"size": 0}, {"held_out": 0.5}, {"held_out": 0}])
def test_senseless_setting_of_a_folder_is_named(tmp_path, setting):
    ((key, value),) = setting.items()
    assert f"data.{key}={value} must be" in _refusal(_images(tmp_path / "images"), **setting)


def test_folder_of_ten_images_is_enough_to_train_on(tmp_path):
    """One of them is all there is for validation, and one for the test."""
    path = _images(tmp_path / "images", count=10)
    settings = (f"data.path={path}", "data.size=8", f"data.cache={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'run'}")
    said = call("train", "model=vae", "data=image_folder", *settings, *QUICK, "trainer.max_steps=2")
    assert said.code == 0, said.text
    assert (tmp_path / "run" / "samples" / "interpolations_epoch_0001.png").is_file()


@pytest.mark.parametrize("name", ["train_x.npy", "val_y.npy", "meta.json"])
def test_damaged_prepared_data_names_the_folder_to_delete(tmp_path, name):
    digits(str(tmp_path), "discrete")
    (folder,) = tmp_path.iterdir()
    _truncate(folder / name)
    with pytest.raises(UserError, match=f"the prepared data in {folder} is damaged .*delete that folder"):
        digits(str(tmp_path), "discrete")


# --- a model that cannot take the data -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "size", "reason"), [("cgan", 8, "has no labels"), ("dcgan", 7, "8 to 128 pixels; the data set gives 1x7x7")]
)
def test_model_that_cannot_take_a_folder_of_images_names_both(refused, tmp_path, model, size, reason):
    path = _images(tmp_path / "images")
    settings = ("data=image_folder", f"data.path={path}", f"data.size={size}", "data.colour=false")
    sentence = refused("train", f"model={model}", *settings, f"data.cache={tmp_path / 'cache'}")
    assert f"model={model} with data=image_folder" in sentence
    assert reason in sentence


@pytest.mark.parametrize(
    ("overrides", "spec", "words"),
    [
        (["model=cvae"], image_spec((1, 8, 8), "discrete", num_classes=0), "has no labels"),
        (["model=vae_conv"], image_spec((1, 129, 129), "discrete"), "129x129"),
        (["model=vae_conv"], image_spec((1, 8, 12), "discrete"), "8x12"),
        (["likelihood=bernoulli"], image_spec((1, 8, 8), "discrete"), "Bernoulli is .*discrete.* data.values="),
        (["likelihood=bernoulli_on_grey"], image_spec((1, 8, 8), "binary_dynamic"), "BernoulliOnGrey is .*binary"),
        (["likelihood=gaussian"], image_spec((1, 8, 8), "discrete"), "Gaussian is .*discrete"),
        (["likelihood=gaussian_learned_scale"], image_spec((1, 8, 8), "binary_static"), "GaussianLearnedScale is .*binary"),
        (["likelihood=discretized_logistic"], image_spec((1, 8, 8), "continuous"), "DiscretizedLogistic is .*continuous"),
        (["prior=conditional_gaussian"], image_spec((1, 8, 8), "discrete"), "a conditional prior needs a conditional"),
    ],
)
def test_model_that_cannot_take_the_data_names_both(overrides, spec, words):
    config = compose_model("model=vae", *overrides)
    with pytest.raises(UserError, match=f"model=this with data=made_up: .*{words}"):
        build_model(config.model, spec, "this")


# --- senseless training settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["loader.batch_size=0"], "loader.batch_size=0 must be at least 1"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0 must be at least 1"),
        (["trainer.max_steps=0"], "trainer.max_steps=0 must be at least 1"),
        (["trainer.max_epochs=null", "trainer.max_steps=null"], "the training has no end"),
        (["trainer.accelerator=quantum"], "trainer"),
        (["trainer.precision=12"], "trainer"),
        (["callback.pictures.num_samples=1"], "callback.pictures.num_samples=1 must be at least 2"),
        (["callback.pictures.every_n_validations=0"], "callback.pictures.every_n_validations=0 must be at least 1"),
        (["callback.light_evaluation.num_samples=1"], "callback.light_evaluation.num_samples=1 must be at least 2"),
        (["callback.light_evaluation.every_n_validations=0"], "light_evaluation.every_n_validations=0 must be at least 1"),
        (["evaluation.num_samples=1"], "evaluation.num_samples=1 must be at least 2"),
        (["evaluation.num_samples=abc"], "evaluation.num_samples=abc must be a whole number, or null"),
        (["evaluation.num_samples=99.5"], "evaluation.num_samples=99.5 must be a whole number, or null"),
        (["evaluation.checkpoint=foo"], "checkpoint=foo is not known; allowed: last, best, auto"),
        (["metric=[c_t]", "metric.c_t.copying_effect=-1"], "metric.c_t.copying_effect=-1 must be at least 0"),
        (["metric=[modes]", "metric.modes.min_share=0"], "metric.modes.min_share=0 must be between 0 and 1"),
        (["metric=[copying]", "metric.copying.quantile=1"], "quantile=1 must be between 0 and 0.5 (metric.copying"),
        (["callback.progress.redraws_per_second=0"], "callback.progress.redraws_per_second=0 must be more than 0"),
        (["callback.checkpoint.monitor=val/lozz"], "monitor=val/lozz is not measured; allowed: val/kl, val/loss, "),
        (["model=gan", "training.n_critic=0"], "training.n_critic=0 must be at least 1"),
    ],
)
def test_senseless_setting_is_named_and_the_run_says_why_it_failed(refused, tmp_path, overrides, sentence):
    said = refused("train", *overrides)
    assert sentence in said
    status = Run.open(tmp_path / "run").status()
    assert status["status"] == "failed"
    assert said.removeprefix("error: ") in status["reason"]
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))  # it was refused before the training


def test_classifier_that_is_null_is_named(refused):
    sentence = "evaluation.classifier must have the keys file and sha256"
    assert sentence in refused("train", "evaluation.classifier=null", "trainer.max_steps=2")


# --- a loss that is not finite ---------------------------------------------------------------------------------------


def _nan_from(method: Callable[..., dict], first: int, term: str) -> Callable[..., dict]:
    """The same loss, with nan in one term from its nth call in training on."""
    calls = 0

    def broken(self, batch, **how):
        nonlocal calls
        terms = method(self, batch, **how)
        calls += self.training
        return terms | {term: terms[term] * float("nan")} if self.training and calls >= first else terms

    return broken


@pytest.mark.parametrize(
    ("model", "cls", "method", "term", "name"),
    [
        ("vae", VAE, "loss", "loss", "train/loss"),
        ("vae", VAE, "loss", "kl", "train/kl"),
        ("gan", GAN, "generator_loss", "loss", "train/generator_loss"),
        ("gan", GAN, "discriminator_loss", "logit_real", "train/discriminator_logit_real"),
    ],
)
def test_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    refused, tmp_path, monkeypatch, model, cls, method, term, name
):
    monkeypatch.setattr(cls, method, _nan_from(getattr(cls, method), 15, term))
    sentence = refused("train", f"model={model}")
    assert f"{name} became nan at step 15" in sentence
    run = Run.open(tmp_path / "run")
    assert run.status()["status"] == "failed"
    assert f"{name} became nan at step 15" in run.status()["reason"]
    assert name in (run.path / "log.txt").read_text()
    checkpoint = torch.load(run.checkpoint("last"), weights_only=True)
    assert checkpoint["progress"]["step"] == 10
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_run_that_broke_off_can_still_be_sampled(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(VAE, "loss", _nan_from(VAE.loss, 15, "loss"))
    refused("train", "model=vae")
    said = call("sample", f"run={tmp_path / 'run'}", "n=2")
    assert said.code == 0, said.text


def test_diverging_weights_never_take_the_place_of_good_ones(refused, tmp_path):
    """The step that ruins the weights has itself a finite loss; the validation after it has not."""
    settings = ("trainer.limit_train_batches=1", "trainer.max_epochs=5", "optim.lr=1e30")
    sentence = refused("train", "model=vae", *settings)
    assert "loss became" in sentence
    assert "at step 1" in sentence
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


# --- runs from strangers, and damaged ones ---------------------------------------------------------------------------


@pytest.fixture
def copied(trained, tmp_path) -> Run:
    """A finished run of one's own to damage."""
    shutil.copytree(trained("vae").run.path, tmp_path / "copy")
    return Run.open(tmp_path / "copy")


class _Code:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self._file,)


READERS = [["evaluate"], ["sample", "n=1"]]


@pytest.mark.parametrize("reader", READERS, ids=["evaluate", "sample"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_checkpoint_that_would_run_code_is_refused_and_does_not_run_it(copied, refused, tmp_path, reader, how):
    for file in copied.checkpoints.iterdir():
        checkpoint = torch.load(file, weights_only=True) | {"surprise": _Code(tmp_path / "pwned")}
        if how == "torch":
            torch.save(checkpoint, file)
        else:
            file.write_bytes(pickle.dumps(checkpoint, protocol=2))
    sentence = refused(reader[0], f"run={copied.path}", *reader[1:])
    assert "could run code; refused" in sentence
    assert "best.ckpt" in sentence
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("evaluation.num_samples=abc", "evaluation.num_samples=abc must be a whole number, or null"),
        ("evaluation.num_samples=99.5", "evaluation.num_samples=99.5 must be a whole number, or null"),
        ("evaluation.num_samples=1", "evaluation.num_samples=1 must be at least 2"),
        ("evaluation.checkpoint=foo", "checkpoint=foo is not known; allowed: last, best, auto"),
        ("evaluation.classifier=null", "evaluation.classifier must have the keys file and sha256"),
    ],
)
def test_senseless_setting_of_an_evaluation_is_named_and_the_results_stay(copied, refused, setting, sentence):
    before = (copied.path / "results.json").read_bytes()
    assert sentence in refused("evaluate", f"run={copied.path}", "metric=[fd]", setting)
    assert (copied.path / "results.json").read_bytes() == before


def test_run_whose_config_has_no_classifier_is_told_what_is_missing(copied, refused):
    config = copied.config()
    del config.evaluation.classifier
    (copied.path / "config.yaml").write_text(OmegaConf.to_yaml(config))
    assert "evaluation.classifier must have the keys file and sha256" in refused("evaluate", f"run={copied.path}")


@pytest.mark.parametrize("size", [0, 1000, -1000])
def test_truncated_checkpoint_is_named(copied, refused, size):
    file = copied.checkpoint("auto")
    file.write_bytes(file.read_bytes()[:size])
    assert f"{file} cannot be read as a checkpoint (" in refused("sample", f"run={copied.path}")


@pytest.mark.parametrize(("content", "kind"), [("this is text, no checkpoint", "IndexError"), ("", "EOFError")])
def test_text_in_place_of_a_checkpoint_is_named_with_what_went_wrong(copied, refused, content, kind):
    file = copied.checkpoint("auto")
    file.write_text(content)
    assert f"{file} cannot be read as a checkpoint ({kind}: " in refused("sample", f"run={copied.path}")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"status": '])
def test_damaged_status_is_named(copied, content):
    (copied.path / "status.json").write_text(content)
    with pytest.raises(UserError, match=r"status\.json is damaged \("):
        copied.status()


def test_damaged_results_are_named_before_anything_is_measured(copied, refused):
    (copied.path / "results.json").write_text("{")
    assert f"{copied.path / 'results.json'} is damaged (" in refused("evaluate", f"run={copied.path}")


@pytest.mark.parametrize("content", [b"", b"this is text", None], ids=["empty", "text", "truncated"])
def test_damaged_classifier_is_named_and_measures_nothing(copied, tmp_path, content):
    file = tmp_path / "classifier.safetensors"
    file.write_bytes((SHIPPED / "digits.safetensors").read_bytes()[:-100] if content is None else content)
    settings = (f"evaluation.classifier.file={file}", "evaluation.classifier.sha256=null")
    before = copied.results()["metrics"]
    (copied.path / "results.json").unlink()  # an earlier value would stay
    said = call("evaluate", f"run={copied.path}", "metric=[fd,reconstruction_error]", *settings)
    assert said.code == 0, said.text
    after = copied.results()["metrics"]
    assert after["fd"]["not_applicable"].startswith(f"{file} is no frozen classifier (")
    assert after["reconstruction_error"] == before["reconstruction_error"]
    assert f"not applicable: fd: {file} is no frozen classifier (" in said.text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["evaluation.classifier.file=/no/such/file"], "evaluation.classifier.file=/no/such/file is not a file"),
        (["evaluation.classifier.sha256=0123456789abcdef"], "evaluation.classifier.sha256 asks for 0123456789ab..."),
        (
            ["evaluation.classifier.file=mnist.safetensors", "evaluation.classifier.sha256=null"],
            "data=digits gives image 1x8x8",
        ),
        (["evaluation.classifier.file=null"], "python -m src.train experiment=classifier data=digits"),
    ],
    ids=["missing", "hash", "other images", "not made"],
)
def test_classifier_that_cannot_be_used_is_the_reason_why_there_is_no_value(copied, settings, reason):
    (copied.path / "results.json").unlink()  # an earlier value would stay
    said = call("evaluate", f"run={copied.path}", "metric=[fd]", *settings)
    assert said.code == 0, said.text
    assert reason in copied.results()["metrics"]["fd"]["not_applicable"]


def test_checkpoint_of_another_model_is_refused(copied, refused, trained):
    shutil.copy(trained("autoencoder").run.checkpoint("auto"), copied.checkpoint("auto"))
    assert "does not fit the model of its config.yaml" in refused("evaluate", f"run={copied.path}")


@pytest.mark.parametrize(
    "code",
    [
        "{_target_: os.system, _args_: ['touch PWNED']}",
        "{_target_: src.runs.os.system, _args_: ['touch PWNED']}",
        "{_target_: src.runs._git, _args_: ['-c', 'alias.x=!touch PWNED', x]}",
        "!!python/object/apply:os.system ['touch PWNED']",
    ],
    ids=["os.system", "through ours", "git alias", "yaml tag"],
)
@pytest.mark.parametrize(
    ("command", "part"), [("sample", "model"), ("evaluate", "data"), ("evaluate", "loader"), ("evaluate", "metric")]
)
def test_config_that_would_run_code_is_refused_and_does_not_run_it(copied, refused, tmp_path, code, command, part):
    file = copied.path / "config.yaml"
    text = f"\n{file.read_text()}".replace(f"\n{part}:\n", f"\n{part}:\n  surprise: {code}\n")
    text = text.replace("PWNED", f"{tmp_path}/pwned")
    assert "surprise" in text
    file.write_text(text)
    refused(command, f"run={copied.path}")
    assert not (tmp_path / "pwned").exists()


def test_unreadable_config_of_a_run_is_named(copied, refused):
    (copied.path / "config.yaml").write_text("model: [vae")
    assert f"{copied.path / 'config.yaml'} cannot be read" in refused("evaluate", f"run={copied.path}")


def test_run_without_a_checkpoint_is_told_with_its_status(copied, refused):
    for file in copied.checkpoints.iterdir():
        file.unlink()
    copied.set_status("failed", "for the test")
    assert f"run={copied.path} has no last checkpoint (its status is failed)" in refused("evaluate", f"run={copied.path}")


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("n=0", "n=0 must be at least 1"),
        ("batch_size=0", "batch_size=0 must be at least 1"),
        ("n=2.5", "n=2.5 must be a whole number"),
        ("checkpoint=lst", "checkpoint=lst is not known; allowed: last, best, auto"),
    ],
)
def test_senseless_setting_of_sampling_is_named(trained, refused, argument, sentence):
    assert sentence in refused("sample", f"run={trained('vae').run.path}", argument)


# --- a run that is stopped -------------------------------------------------------------------------------------------


def test_interrupted_run_says_so_and_keeps_its_checkpoint(tmp_path, cache, monkeypatch):
    """By Ctrl-C, which this process gives itself; that a process of its own ends so, test_resume.py shows."""
    loss, calls = Autoencoder.loss, 0

    def interrupted(self, batch, **how):
        nonlocal calls
        calls += self.training
        if self.training and calls == 15:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, batch, **how)

    monkeypatch.setattr(Autoencoder, "loss", interrupted)
    where = (f"hydra.run.dir={tmp_path / 'run'}", f"data.cache={cache}")
    said = call("train", "model=autoencoder", *QUICK, "metric=[]", *where)
    run = Run.open(tmp_path / "run")
    assert said.code != 0
    assert run.status()["status"] == "interrupted"
    assert f"interrupted; to go on: python -m src.train resume={tmp_path / 'run'}" in said.text
    assert "Traceback" not in said.text
    assert torch.load(run.checkpoint("last"), weights_only=True)["progress"]["step"] == 15
