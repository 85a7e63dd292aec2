"""One short training of every model: it learns, and its directory holds what it promises."""

import functools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import Tensor, nn

from src.core.protocols import (
    Adversarial,
    CanDecode,
    CanEncode,
    CanReconstruct,
    CanSample,
    CanScore,
    NeedsPreparation,
    Trainable,
)
from src.core.rng import SampleNoise, StreamNoise
from src.core.spec import DataSpec
from src.data.loading import ArrayData
from src.evaluate import _take_given
from src.evaluation.protocol import draw_samples, spread_classes
from src.experiment import evaluate_run, load_autoencoder, load_data, load_model, load_trained_model
from src.metrics.metric import HELD_OUT, HIGHER, LOWER, NOISE, UNTRAINED, ZERO
from src.runs import Run, _git, config_hash
from tests.commands import QUICK, Trained, call, run_cli, train
from tests.configs import load_option, models_of_pictures, slow_but_for, target

NUM_STEPS = 40  # of 128 examples, ten to an epoch
MODELS = models_of_pictures()
SAMPLERS = [name for name in MODELS if hasattr(target("model", name), "sample")]
TRAINABLES = [name for name in MODELS if hasattr(target("model", name), "loss")]


YARDSTICKS = ("uniform", "independent", "gaussian")  # of likelihoods: densities that need no network
FEW = ("autoencoder", "classifier", "cvae", "dcgan", "gmm", "vae")  # the others are alike


@pytest.fixture(params=slow_but_for(MODELS, FEW))
def name(request) -> str:
    return request.param


@pytest.fixture
def this(name, trained) -> Trained:
    """The finished training of one model."""
    return trained(name)


@pytest.fixture
def run(this) -> Run:
    return this.run


@pytest.fixture
def data(run) -> ArrayData:
    return _data_of(run.path)


@pytest.fixture
def model(run) -> nn.Module:
    """With the weights that evaluation measures."""
    return _model_of(run.path)


@pytest.fixture
def untrained(run) -> nn.Module:
    return _untrained_of(run.path)


@pytest.fixture
def board(run) -> EventAccumulator:
    """What TensorBoard reads from the run."""
    return _board_of(run.path)


@functools.cache
def _data_of(path: Path) -> ArrayData:
    return load_data(Run.open(path).config())


@functools.cache
def _model_of(path: Path) -> nn.Module:
    run = Run.open(path)
    return load_trained_model(run, run.config(), _data_of(path).spec, "auto")[0]


@functools.cache
def _untrained_of(path: Path) -> nn.Module:
    return load_model(Run.open(path).config(), _data_of(path).spec).eval()


@functools.cache
def _board_of(path: Path) -> EventAccumulator:
    return EventAccumulator(str(Run.open(path).tensorboard), size_guidance={"scalars": 0, "images": 0}).Reload()


def _curve(board: EventAccumulator, tag: str) -> dict[int, float]:
    """Value by step."""
    return {event.step: event.value for event in board.Scalars(tag)}


def _results(run: Run) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((run.path / "results.json").read_text(), parse_constant=refuse)


def _values(run: Run) -> dict[str, float]:
    return {metric: entry["value"] for metric, entry in _results(run)["metrics"].items() if "value" in entry}


# --- it learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but_for(TRAINABLES, FEW))
@torch.no_grad()
def test_losses_fall(board, run, data, model):
    """In every epoch, and held-out ones from those of the untrained model, on the same noise, by far more than their error.

    A share of the loss would say nothing: one in nats has no zero, and the best one of a denoiser is far from it.
    """
    train, val = (list(_curve(board, f"{split}/loss").values()) for split in ("train", "val"))
    assert sum(train[-5:]) < sum(train[:5])
    assert val == sorted(val, reverse=True)
    before, after = (_held_out_losses(some, data) for some in (_at_the_first_step(run, data), model))
    gain = before - after
    assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))


def _held_out_losses(model: nn.Module, data: ArrayData) -> Tensor:
    batches = [data.to_units(batch) for batch in data.held_out_loader("val")]
    losses = [model.loss(batch, generator=SampleNoise(place))["loss"] for place, batch in enumerate(batches)]
    return torch.cat(losses).double()


def _at_the_first_step(run: Run, data: ArrayData) -> nn.Module:
    """The untrained model, after it has seen the training data if it needs to."""
    model = load_model(run.config(), data.spec)
    load_autoencoder(model, run.config(), data)
    if isinstance(model, NeedsPreparation):
        model.prepare(lambda: map(data.to_units, data.held_out_loader("train")), generator=StreamNoise(0))
    return model.eval()


LATE = {"wgan_gp", "ddpm"}  # its critic learns first; its samples lie at the edges of the range after so few steps


@pytest.mark.parametrize("name", slow_but_for(sorted({*SAMPLERS} - LATE), FEW))
def test_samples_come_nearer_to_the_data(model, untrained, data):
    real = data.spec.to_units(torch.from_numpy(data.arrays.splits["train"].x[:].copy()))

    def distance(some: nn.Module) -> float:
        return float((_draw(some, data.spec, 200).mean(0) - real.mean(0)).norm())

    assert distance(model) < 0.8 * distance(untrained)


def _draw(model: nn.Module, spec: DataSpec, count: int) -> Tensor:
    condition = spread_classes(spec, count, torch.device("cpu")) if model.is_conditional else None
    return torch.cat(list(draw_samples(model, count, 100, 0, condition)))


@pytest.mark.parametrize("name", slow_but_for(SAMPLERS, FEW))
def test_samples_come_nearer_by_the_reported_metric(run):
    fd = _results(run)["metrics"]["fd"]
    assert fd["value"] < fd["anchors"]["untrained"]["value"]
    assert fd["anchors"]["held_out"]["value"] < fd["value"]


@pytest.mark.parametrize("name", ["vae"])
def test_the_row_of_the_untrained_model_can_be_left_out(run, data, tmp_path):
    again = Run(shutil.copytree(run.path, tmp_path / "run"))
    config = OmegaConf.merge(run.config(), {"evaluation": {"untrained": False, "num_samples": 100}})
    config.metric = load_option("metric", "fd")
    rows = evaluate_run(again, data, config)["metrics"]["fd"]["anchors"]
    assert set(_results(run)["metrics"]["fd"]["anchors"]) - set(rows) == {UNTRAINED}


def test_every_weight_of_every_network_moves(run, untrained):
    state = torch.load(run.checkpoint("last"), weights_only=True)["state_dict"]
    initial = dict(untrained.named_parameters())
    still = {name for name, before in initial.items() if torch.equal(state[f"model.{name}"], before)}
    assert still <= _level_that_does_not_count(untrained)


def _level_that_does_not_count(model: nn.Module) -> set[str]:
    """The bias of the logit, where a loss hangs on differences of logits alone."""
    if not isinstance(model, Adversarial):
        return set()
    real, fake = torch.tensor([0.3, -2.0]), torch.tensor([-0.2, 1.0])
    loss = model._loss.discriminator
    if not torch.allclose(loss(real, fake), loss(real + 1, fake + 1)):
        return set()
    return {name for name, weight in model.named_parameters() if weight is model.discriminator.network.head.bias}


def test_all_logged_numbers_are_finite(board):
    values = {tag: list(_curve(board, tag).values()) for tag in board.Tags()["scalars"]}
    assert [tag for tag, some in values.items() if not all(math.isfinite(value) for value in some)] == []


# --- the run directory -----------------------------------------------------------------------------------------------


def test_status_is_done(run):
    assert run.status()["status"] == "done"
    assert "reason" not in run.status()


def test_config_is_resolved_and_plain(run, name):
    text = (run.path / "config.yaml").read_text()
    assert "${" not in text
    config = yaml.safe_load(text)
    assert config["name"] == {"model": name, "data": "digits"}
    assert set(_types(config)) <= {str, int, float, bool, type(None)}


def test_checkpoints_hold_tensors_and_plain_types_only(run, model):
    names = {file.name for file in run.checkpoints.iterdir()}
    assert names == ({"last.ckpt"} if isinstance(model, Adversarial) else {"last.ckpt", "best.ckpt"})
    for name in names:
        checkpoint = torch.load(run.checkpoints / name, weights_only=True)
        assert set(_types(checkpoint)) <= {str, int, float, bool, type(None), Tensor}


def _types(node: Any) -> Iterator[type]:
    if isinstance(node, dict):
        node = [*node.keys(), *node.values()]
    if isinstance(node, (list, tuple)):
        for part in node:
            yield from _types(part)
    else:
        yield type(node)


def test_checkpoint_counts_batches_once(run):
    progress = torch.load(run.checkpoint("last"), weights_only=True)["progress"]
    assert progress == {"step": NUM_STEPS, "examples_seen": 128 * NUM_STEPS}


def test_environment_is_written_down(run):
    environment = json.loads((run.path / "environment.json").read_text())
    assert {"git_commit", "git_diff", "git_status", "packages", "device", "seed", "command"} <= set(environment)
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert (environment["seed"], environment["device"]) == (0, "cpu")


def test_output_of_git_may_have_any_encoding(monkeypatch):
    done = subprocess.CompletedProcess([], 0, stdout=b" M caf\xe9\n")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: done)
    assert _git("status") == " M caf\N{REPLACEMENT CHARACTER}"


def test_log_holds_what_the_console_said(this):
    log = (this.run.path / "log.txt").read_text()
    missing = [line for line in this.said.text.splitlines() if line.strip() and line.strip() not in log]
    assert missing == []
    assert "done: the run lies in" in log


def test_every_metric_has_a_value_with_a_card_or_a_reason(run):
    results = _results(run)
    assert results["schema"] == 2
    assert sorted(results["metrics"]) == sorted(load_option("metric", "default").defaults)
    for entry in results["metrics"].values():
        if "not_applicable" in entry:
            _require_reason(entry)
            continue
        assert set(entry) == {"value", "interval", "unit", "better", "parts", "card", "anchors", "finding"}
        _require_value(entry)
        assert entry["unit"]
        assert entry["better"] in (HIGHER, LOWER, ZERO, None)
        assert all(math.isfinite(part) for part in entry["parts"].values())
        for row, reading in entry["anchors"].items():
            assert row in (HELD_OUT, NOISE, UNTRAINED, *YARDSTICKS)
            if "not_applicable" in reading:
                _require_reason(reading)
            else:
                assert set(reading) == {"value", "interval", "count"}
                _require_value(reading)


def _require_reason(entry: dict[str, Any]) -> None:
    assert list(entry) == ["not_applicable"]
    assert entry["not_applicable"]


def _require_value(entry: dict[str, Any]) -> None:
    assert math.isfinite(entry["value"])
    assert entry["interval"] is None or entry["interval"][0] <= entry["value"] <= entry["interval"][1]


def test_cards_say_what_was_measured(run):
    cards = {metric: entry["card"] for metric, entry in _results(run)["metrics"].items() if "card" in entry}
    is_averaged = run.config().training.get("ema_half_life_examples") is not None
    assert cards
    for card in cards.values():
        assert card["model"]["weights"] == ("averaged" if is_averaged else "raw")
        assert {"checkpoint", "step", "examples_seen"} <= set(card["model"])
        assert card["model"]["step"] == NUM_STEPS
        assert {"data", "data_values"} <= set(card)
        assert card["software"]["torch"] == version("torch")
        assert {"split", "num_examples"} <= set(card) or {"reference_split", "num_samples"} <= set(card)
        assert ("extractor" in card) == ("extractor_sha256" in card) == ("num_samples" in card)


DRAWS_NOISE = ("bound", "bound_bits_per_dim", "iw_bound_5", "iw_bound_50", "test_loss")
SEES_BYTES = ("psnr", "ssim")


def test_cards_name_the_seed_and_the_quantisation_where_they_matter_and_nowhere_else(run):
    cards = {metric: entry["card"] for metric, entry in _results(run)["metrics"].items() if "card" in entry}
    assert cards
    for metric, card in cards.items():
        is_of_samples = "num_samples" in card
        assert ("seed" in card) == (is_of_samples or metric in DRAWS_NOISE), metric
        assert ("quantisation" in card) == (is_of_samples or metric in SEES_BYTES), metric


def test_cards_say_which_models_were_told_the_classes(run, name, model):
    cards = [entry["card"] for entry in _results(run)["metrics"].values() if "card" in entry]
    is_told = isinstance(model, CanSample) and model.is_conditional
    assert is_told == (name in ("cgan", "cvae", "flow_matching_mel", "projection_gan"))
    given = {card["model"].get("classes") for card in cards}
    assert given == ({"given, as frequent as in the training data"} if is_told else {None})
    of_what = {metric: entry["card"].get("of") for metric, entry in _results(run)["metrics"].items() if "card" in entry}
    for metric in ("bound", "bound_bits_per_dim", "iw_bound_5", "iw_bound_50"):
        assert of_what.pop(metric, None) in ({"x given its class", None} if name == "cvae" else {"x", None})
    assert set(of_what.values()) == {None}


def test_what_a_model_cannot_do_is_said_with_its_name(run, name, model):
    reasons = {metric: entry.get("not_applicable") for metric, entry in _results(run)["metrics"].items()}
    if not isinstance(model, CanScore):
        assert reasons["log_likelihood"] == f"{name} has no CanScore"
    assert reasons["fd"] == (None if isinstance(model, CanSample) else f"{name} has no CanSample")
    assert reasons["test_loss"] == (None if isinstance(model, Trainable) else f"{name} has no Trainable")
    assert "metric.fid.weights=FILE" in reasons["fid"] or not isinstance(model, CanSample)


def test_pictures_show_what_the_model_can_do(run, model):
    kinds = {re.split("_(?:step|epoch)_", file.name)[0] for file in run.samples.glob("*_*_*.png")}
    assert kinds == _kinds_of_pictures(model)


def _kinds_of_pictures(model: nn.Module) -> set[str]:
    capabilities = {
        "samples": CanSample,
        "latent_interpolations": CanDecode,
        "reconstructions": CanReconstruct,
        "interpolations": CanEncode,
    }
    kinds = {kind for kind, capability in capabilities.items() if isinstance(model, capability)}
    return kinds | ({"classes"} if isinstance(model, CanSample) and model.is_conditional else set())


@pytest.mark.parametrize("name", slow_but_for(SAMPLERS, FEW))
def test_early_samples_are_spaced_by_powers_of_two(run):
    steps = sorted(int(file.stem.split("_")[-1]) for file in run.samples.glob("samples_step_*.png"))
    assert steps == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("name", slow_but_for(SAMPLERS, FEW))
def test_pictures_have_contrast_and_change_as_the_model_learns(run):
    first, last = (np.asarray(Image.open(run.samples / f"samples_epoch_{epoch:04d}.png")) for epoch in (1, 4))
    assert first.std() > 1
    assert not np.array_equal(first, last)


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def test_curves_have_the_same_names_in_every_model(board, model):
    tags = set(board.Tags()["scalars"])
    losses = ["generator_loss", "discriminator_loss"] if isinstance(model, Adversarial) else ["loss"]
    assert {f"{split}/{loss}" for split in ("train", "train_epoch", "val") for loss in losses} <= tags
    assert {"progress/examples_per_second", "progress/examples_seen", "progress/epoch"} <= tags


def test_steps_of_all_curves_are_batches(board, model):
    loss = "generator_loss" if isinstance(model, Adversarial) else "loss"
    assert list(_curve(board, f"train/{loss}")) == list(range(1, NUM_STEPS + 1))
    assert list(_curve(board, f"val/{loss}")) == [10, 20, 30, 40]
    assert max(step for tag in board.Tags()["scalars"] for step in _curve(board, tag)) == NUM_STEPS
    assert _curve(board, "progress/examples_seen")[NUM_STEPS] == 128 * NUM_STEPS


def test_pictures_are_in_tensorboard_at_their_steps(board, model):
    expected = _kinds_of_pictures(model)
    assert set(board.Tags()["images"]) == expected
    assert all(max(image.step for image in board.Images(tag)) == NUM_STEPS for tag in expected)


def test_custom_scalars_page_shows_curves_that_exist(board):
    content = board.PluginTagToContent("custom_scalars")
    layout = layout_pb2.Layout.FromString(board.Tensors(next(iter(content)))[0].tensor_proto.string_val[0])
    shown = {tag for page in layout.category for chart in page.chart for tag in chart.multiline.tag}
    assert len(shown) > 2
    assert shown <= set(board.Tags()["scalars"])


def test_hparams_page_lists_the_final_metrics_beside_the_settings(board, run, name):
    content = board.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    assert "_hparams_/experiment" not in content  # it would hide what other runs beside this one have of their own
    assert start.hparams["model"].string_value == name
    assert start.hparams["loader.batch_size"].number_value == 128
    for metric, value in _values(run).items():
        assert _curve(board, f"final/{metric}") == {NUM_STEPS: pytest.approx(value, rel=1e-6)}


# --- evaluating and sampling a finished run --------------------------------------------------------------------------


def test_evaluating_again_gives_the_same_results(run):
    before, costs = _results(run), run.results()["costs"]
    (run.path / "results.json").unlink()
    said = call("evaluate", f"run={run.path}")
    assert said.code == 0, said.text
    assert _results(run)["metrics"] == before["metrics"]
    assert run.results()["costs"] | {"sampling": None} == costs | {"sampling": None}  # the time of which is another


@pytest.fixture
def copied(trained, tmp_path) -> Run:
    """A finished VAE of one's own to change."""
    shutil.copytree(trained("vae").run.path, tmp_path / "copy")
    return Run.open(tmp_path / "copy")


def test_evaluation_takes_what_is_not_given_from_the_run_and_keeps_other_results(copied):
    before = _results(copied)["metrics"]
    said = call("evaluate", f"run={copied.path}", "evaluation.seed=1", "metric=[fd]")
    assert said.code == 0, said.text
    after = _results(copied)["metrics"]
    assert list(after) == list(before)
    assert {metric: after[metric] for metric in after if metric != "fd"} == {m: before[m] for m in before if m != "fd"}
    assert after["fd"]["card"] == before["fd"]["card"] | {"seed": 1}  # the run's number of samples and its classifier
    assert after["fd"]["value"] != before["fd"]["value"]


def test_a_value_stays_when_a_later_evaluation_has_none(copied):
    before = _results(copied)["metrics"]
    assert "not_applicable" in before["log_likelihood"]
    settings = ("metric=[fd,log_likelihood,psnr]", "evaluation.num_samples=20")
    said = call("evaluate", f"run={copied.path}", *settings)
    assert said.code == 0, said.text
    assert "fd has no value now; the earlier one stays in the results" in said.text
    assert said.text.count("the earlier one stays") == 1
    assert "not applicable: fd: 20 images are too few" in said.text
    assert _results(copied)["metrics"] == before


def test_a_reason_gives_way_to_a_value_and_to_another_reason(copied):
    def classifier_of_fd(*settings: str) -> dict[str, Any]:
        said = call("evaluate", f"run={copied.path}", "metric=[fd]", *settings)
        assert said.code == 0, said.text
        assert "the earlier one stays" not in said.text
        return _results(copied)["metrics"]["fd"]

    value = _results(copied)["metrics"]["fd"]
    (copied.path / "results.json").unlink()
    assert "too few" in classifier_of_fd("evaluation.num_samples=20")["not_applicable"]
    assert "is not a file" in classifier_of_fd("evaluation.classifier.file=/no/such")["not_applicable"]
    assert classifier_of_fd() == value


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["evaluation.seed=1"], {"metric": {"fd": {"a": 1}, "cs": {}}, "evaluation": {"seed": 1, "n": {"x": 7, "y": 8}}}),
        (["evaluation.n={x:1}"], {"metric": {"fd": {"a": 1}, "cs": {}}, "evaluation": {"seed": 5, "n": {"x": 1, "y": 8}}}),
        (["metric.fid.b=2", "run=x"], {"metric": {"fd": {"a": 1}, "cs": {}, "fid": {"b": 2, "t": 0}}}),
        (["metric.fid.b=2", "metric=[fid]"], {"metric": {"fid": {"b": 2, "t": 0}}}),
        (["~metric.cs"], {"metric": {"fd": {"a": 1}}}),
    ],
)
def test_command_line_changes_the_keys_it_names_alone(overrides, expected):
    of_run = {"metric": {"fd": {"a": 1}, "cs": {}}, "evaluation": {"seed": 5, "n": {"x": 7, "y": 8}}, "data": {}}
    given = OmegaConf.create({"metric": {"fid": {"b": 2, "t": 0}}, "evaluation": {"seed": 0, "n": {"x": 0, "y": 0}}})
    config = OmegaConf.create(of_run)
    _take_given(config, given, overrides)
    assert OmegaConf.to_container(config) == of_run | expected


def test_run_without_its_data_can_be_sampled(copied, tmp_path):
    file = copied.path / "config.yaml"
    file.write_text(file.read_text().replace("src.data.digits.digits", "src.data.nowhere.nothing"))
    assert len(_sample(copied, tmp_path / "out", "n=2")) == 3
    (copied.path / "spec.json").write_text('{"name": "digits"}')
    said = call("sample", f"run={copied.path}", "n=2")
    assert (said.code, said.text.count("spec.json is damaged (KeyError: 'modality')")) == (1, 1)


def test_fewer_samples_leave_none_of_an_earlier_call(copied):
    for n in (12, 3):
        assert call("sample", f"run={copied.path}", f"n={n}").code == 0
    folder = copied.samples / "drawn_seed0_best"
    assert sorted(file.name for file in folder.iterdir()) == [".drawn", "00000.png", "00001.png", "00002.png", "grid.png"]


def test_pictures_of_someone_else_are_left_alone(copied, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "00001.png").write_text("mine")
    said = call("sample", f"run={copied.path}", "n=2", f"out={out}")
    assert said.code == 1
    assert f"out={out} holds 00001.png, which was not drawn by this program; give another folder" in said.text
    assert [file.name for file in out.iterdir()] == ["00001.png"]


@pytest.mark.parametrize("name", ["cgan"])
def test_one_class_can_be_drawn_by_name_or_number(run, model, data, tmp_path):
    name = data.spec.class_names[3]
    pictures = _sample(run, tmp_path / "by_number", "n=3", "seed=3", "condition=3")
    by_name = _sample(run, tmp_path / "by_name", "n=3", "seed=3", f"condition='{name}'")
    drawn = torch.cat(list(draw_samples(model, 3, 3, 3, torch.full((3,), 3))))
    for i, expected in enumerate(data.spec.to_bytes(drawn).numpy()):
        assert abs(_grey(pictures[f"{i:05d}.png"]) - expected[0]).max() <= 1
        assert (pictures[f"{i:05d}.png"] == by_name[f"{i:05d}.png"]).all()


@pytest.mark.parametrize(
    ("model", "given", "sentence"),
    [
        ("cgan", "10", "condition=10 is not known; allowed: "),
        ("cgan", "cat", "condition=cat is not known; allowed: "),
        ("cgan", "-1", "condition=-1 is not known; allowed: "),
        ("vae", "1", "condition=1 cannot be asked of model=vae: it is not conditional"),
    ],
)
def test_class_that_cannot_be_drawn_is_named(trained, tmp_path, model, given, sentence):
    said = call("sample", f"run={trained(model).run.path}", f"out={tmp_path / 'out'}", f"condition={given}")
    assert said.code == 1
    assert f"error: {sentence}" in said.text


def _sample(run: Run, out: Path, *arguments: str) -> dict[str, np.ndarray]:
    """The pictures that `python -m src.sample` writes, by name."""
    said = call("sample", f"run={run.path}", f"out={out}", *arguments)
    assert said.code == 0, said.text
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in out.glob("*.png")}


@pytest.mark.parametrize("name", ["vae", "cgan"])  # that the noise of every model is so, test_contracts.py shows
def test_sampling_writes_pictures_that_depend_on_the_seed_alone(run, tmp_path):
    pictures = _sample(run, tmp_path / "first", "n=11", "seed=3")
    assert sorted(pictures) == [*(f"{i:05d}.png" for i in range(11)), "grid.png"]
    again = _sample(run, tmp_path / "again", "n=11", "seed=3")
    assert all((pictures[name] == again[name]).all() for name in pictures)
    in_parts = _sample(run, tmp_path / "in_parts", "n=11", "seed=3", "batch_size=4")
    assert all(abs(pictures[name] - in_parts[name]).max() <= 1 for name in pictures)
    other = _sample(run, tmp_path / "other", "n=11", "seed=4")
    assert all((pictures[name] != other[name]).any() for name in pictures)


@pytest.mark.parametrize("name", slow_but_for(SAMPLERS, FEW))
def test_samples_are_those_of_the_model(run, model, data, tmp_path):
    pictures = _sample(run, tmp_path / "out", "n=3", "seed=3")
    condition = torch.arange(3) if model.is_conditional else None
    expected = data.spec.to_bytes(torch.cat(list(draw_samples(model, 3, 3, 3, condition)))).numpy()
    for i in range(3):
        assert abs(_grey(pictures[f"{i:05d}.png"]) - expected[i, 0]).max() <= 1


def _grey(picture: np.ndarray) -> np.ndarray:
    """A picture of three equal channels as one."""
    if picture.ndim == 3:
        assert (picture == picture[..., :1]).all()
        picture = picture[..., 0]
    return picture


def test_model_without_samples_is_named_when_asked_for_some(trained, tmp_path):
    said = call("sample", f"run={trained('autoencoder').run.path}", f"out={tmp_path / 'out'}")
    assert said.code == 1
    assert "error: model=autoencoder draws no samples (it has no CanSample)" in said.text


# --- runs side by side -----------------------------------------------------------------------------------------------


def _everything(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


def test_second_run_in_a_directory_is_refused_and_touches_nothing(trained, cache):
    run = trained("vae").run
    before = _everything(run.path)
    said = call("train", "model=gan", f"hydra.run.dir={run.path}", f"data.cache={cache}")
    assert said.code == 1
    assert f"error: {run.path} already holds a run; give another directory with hydra.run.dir=" in said.text
    assert _everything(run.path) == before


@pytest.mark.parametrize("name", slow_but_for(["vae", "dcgan"], ["dcgan"]))
def test_same_seed_gives_the_same_weights_bit_by_bit(name, trained, tmp_path, cache):
    first, again = trained(name).run, train(tmp_path / "again", cache, f"model={name}").run
    other = train(tmp_path / "other", cache, f"model={name}", "seed=1", "trainer.max_steps=1", "metric=[]").run
    weights = [torch.load(run.checkpoint("last"), weights_only=True)["state_dict"] for run in (first, again, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert any(not torch.equal(weights[0][key], weights[2][key]) for key in weights[0])
    assert _values(first) == _values(again)


def test_seed_changes_the_initial_weights(trained):
    config = trained("vae").run.config()
    spec = load_data(config).spec
    first = load_model(config, spec).state_dict()
    config.seed = 1
    second = load_model(config, spec).state_dict()
    assert not any(torch.equal(first[key], second[key]) for key in first if key.endswith("weight"))


@pytest.mark.slow
def test_sweep_gives_every_job_a_directory_of_its_own(tmp_path, cache):
    quick = ("trainer.accelerator=cpu", "trainer.max_steps=2", "metric=[]")
    arguments = ("-m", "model=autoencoder,gan", f"hydra.sweep.dir={tmp_path}", f"data.cache={cache}", *quick)
    said = run_cli("train", *arguments)
    assert said.code == 0, said.text
    runs = [Run.open(folder) for folder in sorted(tmp_path.iterdir()) if folder.is_dir()]
    assert [run.config().name.model for run in runs] == ["autoencoder", "gan"]
    for run in runs:
        assert run.path.name == f"digits-{run.config().name.model}-seed0-{config_hash(run.config())}"
    assert all(run.status()["status"] == "done" for run in runs)
    for run in runs:
        assert (
            f"beginning with model={run.config().name.model} on data=digits"
            in (run.path / "log.txt").read_text().splitlines()[0]
        )


def test_sweep_goes_on_after_a_job_that_fails(tmp_path, cache):
    settings = ("model=gan", "trainer.max_steps=0,2", f"hydra.sweep.dir={tmp_path}", f"data.cache={cache}")
    said = call("train", "-m", *settings, *(setting for setting in QUICK if "max_steps" not in setting), "metric=[]")
    assert said.code == 1
    runs = [Run.open(folder) for folder in sorted(tmp_path.iterdir()) if folder.is_dir()]
    failed, done = sorted(runs, key=lambda run: run.config().trainer.max_steps)
    assert (failed.status()["status"], done.status()["status"]) == ("failed", "done")
    assert "trainer.max_steps=0 must be at least 1" in failed.status()["reason"]


# --- what other settings of a run give -------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [("logger=[]",), ("metric=[]",), ("logger=[tensorboard,csv]",)])
def test_loggers_and_metrics_may_be_chosen_as_lists(tmp_path, cache, overrides):
    run = train(tmp_path / "run", cache, "model=autoencoder", "trainer.max_steps=2", *overrides).run
    assert any(run.tensorboard.iterdir()) != ("logger=[]" in overrides)
    assert bool(_results(run)["metrics"]) != ("metric=[]" in overrides)
    assert (run.path / "csv").exists() == ("logger=[tensorboard,csv]" in overrides)


@pytest.mark.parametrize(
    ("evaluation", "meant"),
    [({"checkpoint": "auto"}, "best"), ({"checkpoint": "last"}, "last"), ({"checkpoint": "best"}, "best"), ({}, "best")],
    ids=str,
)
def test_checkpoint_auto_is_the_one_that_the_run_was_evaluated_by(tmp_path, evaluation, meant):
    run = Run(tmp_path)
    OmegaConf.save({"evaluation": evaluation}, tmp_path / "config.yaml")
    run.checkpoints.mkdir()
    for name in ("last", "best"):
        (run.checkpoints / f"{name}.ckpt").touch()
    assert run.checkpoint("auto").stem == meant
    assert [run.checkpoint(name).stem for name in ("last", "best")] == ["last", "best"]
