"""What training counts, when each player moves, and the averaged weights."""

from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from src.build import build, build_model
from src.core.errors import UserError
from src.core.protocols import Adversarial
from src.core.rng import SampleNoise, derive_seed
from src.experiment import light_measure, load_data, load_model, load_trained_model
from src.training.callbacks.held_out_means import held_out_means
from src.training.callbacks.progress import EpochProgress
from src.training.ema import WeightAverage
from src.training.fit import make_trainer, make_training_module
from src.training.module import TrainingModule
from tests.commands import train
from tests.configs import compose_model, options, slow_but_for, small, target
from tests.examples import image_data

# --- one counter, of batches -----------------------------------------------------------------------------------------


def _checkpoint(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)


def _updates(checkpoint: dict[str, Any]) -> list[int]:
    """Steps that each optimizer has taken, by its own count."""
    return [int(next(iter(optimizer["state"].values()))["step"]) for optimizer in checkpoint["optimizer_states"]]


@pytest.mark.parametrize("budget", ["trainer.max_steps=7", "trainer.max_epochs=1"])
def test_a_training_ends_with_a_validation(tmp_path, cache, budget):
    run = train(tmp_path, cache, budget, "metric=[]").run
    assert (run.checkpoints / "best.ckpt").is_file()
    assert list(run.samples.glob("reconstructions_*.png"))


def test_a_budget_of_steps_replaces_the_one_of_epochs(tmp_path, cache):
    train(tmp_path, cache, "trainer.max_epochs=1", "trainer.max_steps=13", "metric=[]")
    assert _checkpoint(tmp_path)["progress"]["step"] == 13


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "fp8"])
def test_a_precision_that_would_break_the_losses_is_refused(tmp_path, precision):
    arguments = build(compose_model(f"trainer.precision={precision}").trainer)
    with pytest.raises(UserError, match=f"trainer.precision={precision} is not supported"):
        make_trainer(tmp_path, [], [], **arguments)


@pytest.mark.parametrize("n_critic", [1, 2, 3])
def test_budget_counts_batches_whatever_the_optimizers_do(tmp_path, cache, n_critic):
    settings = ("trainer.max_steps=12", f"training.n_critic={n_critic}", "metric=[]")
    run = train(tmp_path, cache, "model=gan", *settings).run
    checkpoint = _checkpoint(tmp_path)
    assert checkpoint["progress"] == {"step": 12, "examples_seen": 12 * 128}
    assert _updates(checkpoint) == [12 // n_critic, 12]  # generator, discriminator
    board = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/discriminator_loss")] == list(range(1, 13))


def test_budget_may_end_within_an_epoch_and_still_gives_a_whole_run(tmp_path, cache):
    run = train(tmp_path, cache, "model=autoencoder", "trainer.max_steps=7").run
    assert _checkpoint(tmp_path)["progress"]["step"] == 7
    assert run.status()["status"] == "done"
    assert (tmp_path / "results.json").is_file()


@pytest.mark.parametrize(("max_epochs", "max_steps", "total"), [(3, None, 9), (3, 5, 5), (1, 5, 5), (None, 5, 5)])
def test_progress_bar_ends_where_the_training_ends(tmp_path, max_epochs, max_steps, total):
    progress = EpochProgress(Console(file=StringIO(), force_terminal=True), redraws_per_second=1000.0)
    seen = []
    progress.on_train_batch_end = lambda *_: seen.append(progress._bar.tasks[0].total)
    settings = build(compose_model().trainer) | {"accelerator": "cpu", "max_epochs": max_epochs, "max_steps": max_steps}
    trainer = make_trainer(tmp_path, [progress], [], **settings | {"limit_val_batches": 0})
    trainer.fit(_module("vae", clip=0.01), datamodule=image_data((1, 8, 8), "discrete"))  # three batches an epoch
    assert seen == [total] * total


@pytest.mark.parametrize("n_critic", [0, -1])
def test_generator_that_never_moves_is_refused(n_critic):
    with pytest.raises(UserError, match=f"training.n_critic={n_critic} must be at least 1"):
        _module("gan", n_critic=n_critic)


# --- averaged weights ------------------------------------------------------------------------------------------------


class _Scalar(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(value, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(()))


def _average_after(half_life: float, batches: list[int], seen: int = 10**6) -> float:
    """The average that started at 0 and follows a weight of 1 over batches of these sizes."""
    average = WeightAverage(_Scalar(0.0), half_life)
    for num_examples in batches:
        seen += num_examples
        average.update(_Scalar(1.0), num_examples, seen)
    return float(average.average.w)


@pytest.mark.parametrize("batches", [[1000], [500, 500], [1] * 1000, [10, 90, 900]])
def test_after_a_half_life_an_old_weight_counts_half_whatever_the_batches(batches):
    assert _average_after(1000, batches) == pytest.approx(1 / 2, abs=1e-9)


@pytest.mark.parametrize("half_life", [10.0, 128.0, 5000.0])
def test_average_moves_by_its_formula(half_life):
    d = 0.5 ** (128 / half_life)
    assert _average_after(half_life, [128]) == pytest.approx(1 - d)
    assert _average_after(half_life, [128] * 3) == pytest.approx(1 - d**3)


def test_half_life_is_at_first_a_twentieth_of_the_examples_seen():
    assert _average_after(10_000, [100], seen=0) == pytest.approx(1 - 0.5 ** (100 / 5))
    assert _average_after(10_000, [100], seen=900) == pytest.approx(1 - 0.5 ** (100 / 50))
    assert _average_after(10_000, [100], seen=10**6) == pytest.approx(1 - 0.5 ** (100 / 10_000))


def test_buffers_are_copied():
    average, network = WeightAverage(_Scalar(0.0), 1e6), _Scalar(0.0)
    network.count.fill_(7)
    average.update(network, 1, 10**6)
    assert average.average.count == 7


def _module(model: str, clip: float | None = None, **knobs: Any) -> TrainingModule:
    """The driver of a model on tiny made-up images, with plain gradient descent of rate 1."""
    config = compose_model(f"model={model}", *small(model))
    network = build_model(config.model, image_data((1, 8, 8), "discrete").spec, model)
    descend = partial(torch.optim.SGD, lr=1.0)
    optimizers = {"generator": descend, "discriminator": descend} if isinstance(network, Adversarial) else descend
    return make_training_module(network, optimizers, build(config.training) | {"gradient_clip_norm": clip} | knobs, seed=0)


def _fit(module: TrainingModule, folder: Path, num_steps: int) -> None:
    settings = build(compose_model().trainer) | {"accelerator": "cpu", "max_epochs": None, "max_steps": num_steps}
    trainer = make_trainer(folder, [], [], **settings | {"limit_val_batches": 0})
    trainer.fit(module, datamodule=image_data((1, 8, 8), "discrete"))


def _copy(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def _is_same(network: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("model", ["gan", "dcgan", "vae"])
def test_averaged_weights_are_in_place_inside_the_block_and_the_raw_ones_after_it(model, tmp_path):
    module = _module(model, clip=0.1, ema_half_life_examples=10)
    _fit(module, tmp_path, num_steps=3)
    network = module.model.generator if model in ("gan", "dcgan") else module.model
    raw, average = _copy(network), _copy(module.weight_average.average)
    assert not _is_same(network, average)
    module.model.train()
    with module.averaged_weights():
        assert _is_same(network, average)
        assert not module.model.training
    assert _is_same(network, raw)
    assert module.model.training
    assert _is_same(module.weight_average.average, average)


def test_raw_weights_come_back_when_the_block_raises(tmp_path):
    module = _module("gan", clip=0.1)
    _fit(module, tmp_path, num_steps=3)
    raw, average = _copy(module.model.generator), _copy(module.weight_average.average)
    module.model.train()
    with pytest.raises(RuntimeError, match="inside"), module.averaged_weights():
        raise RuntimeError("inside")
    assert _is_same(module.model.generator, raw)
    assert _is_same(module.weight_average.average, average)
    assert module.model.training


def test_training_goes_on_with_the_raw_weights_after_the_block(tmp_path):
    """The optimizer holds the parameters themselves, so these must be the ones that come back."""
    module = _module("gan")
    optimizer, _ = module.configure_optimizers()
    with module.averaged_weights():
        pass
    before = _copy(module.model.generator)
    for weight in module.model.generator.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    after = module.model.generator.state_dict()
    assert all(torch.allclose(after[name], before[name] - 1, atol=1e-5) for name in before)


GANS = [name for name in options("model") if hasattr(target("model", name), "players")]


@pytest.mark.parametrize("model", slow_but_for(GANS, few=("cgan", "dcgan")))
def test_evaluation_and_sampling_load_the_averaged_generator(trained, model):
    run = trained(model).run
    state = _checkpoint(run.path)["state_dict"]
    average = {name.removeprefix("weight_average.average."): v for name, v in state.items() if "average." in name}
    loaded, about = load_trained_model(run, run.config(), load_data(run.config()).spec, "last")
    assert about["weights"] == "averaged"
    renewed = ("running_mean", "running_var", "num_batches_tracked")  # batch norm's statistics are taken anew
    assert all(torch.equal(v, average[k]) for k, v in loaded.generator.state_dict().items() if not k.endswith(renewed))
    norms = [module for module in loaded.generator.modules() if isinstance(module, _BatchNorm)]
    assert ("batch_norm" in about) == bool(norms)
    assert any(not torch.equal(average[name], state[f"model.generator.{name}"]) for name in average)
    assert all(
        torch.equal(v, state[f"model.discriminator.{name}"]) for name, v in loaded.discriminator.state_dict().items()
    )


def test_a_run_keeps_the_held_out_means_of_its_best_checkpoint(trained):
    run = trained("vae").run
    assert run.validation() == held_out_means(run.checkpoint("auto"))
    assert run.validation()["val/loss"] > 0


def test_without_averaging_the_raw_weights_are_loaded(trained):
    run = trained("vae").run
    loaded, about = load_trained_model(run, run.config(), load_data(run.config()).spec, "last")
    state = _checkpoint(run.path)["state_dict"]
    assert about["weights"] == "raw"
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in loaded.state_dict().items())


# --- gradient clipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["vae", "gan"])
def test_gradient_of_each_optimizer_is_clipped_to_its_norm(model, tmp_path):
    module = _module(model, clip=0.01)
    players = module.model.players() if model == "gan" else [module.model]
    before = [_weights(player) for player in players]
    _fit(module, tmp_path, num_steps=1)
    moved = [float((_weights(player) - start).norm()) for player, start in zip(players, before, strict=True)]
    assert moved == pytest.approx([0.01] * len(players), rel=1e-2)


def _weights(network: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


# --- the light evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", slow_but_for(["gan", "cgan"], few=["cgan"]))
def test_a_light_evaluation_leaves_the_global_generator_alone(model, trained):
    """The training's dropout and shuffling would otherwise go another way for having been looked at."""
    config = trained(model).run.config()
    data = load_data(config)
    measure = light_measure(config, data)
    network = load_model(config, data.spec)
    before = torch.get_rng_state()
    values, better, findings = measure(network, 100, ["fd", "class_kl", "effective_support"])
    assert set(values) >= {"fd", "class_kl", "effective_support"}
    assert better["fd"] == "lower"
    assert findings
    assert torch.equal(before, torch.get_rng_state())


def test_a_training_is_the_same_with_and_without_light_evaluations(tmp_path, cache):
    states = []
    for name, metrics in (("none", "[]"), ("some", "[fd,modes]")):
        settings = ("callback.light_evaluation.every_n_validations=1", f"callback.light_evaluation.metrics={metrics}")
        run = train(tmp_path / name, cache, "model=gan", "trainer.max_steps=20", "metric=[fd,modes]", *settings).run
        tags = EventAccumulator(str(run.tensorboard)).Reload().Tags()["scalars"]
        assert any(tag.startswith("light_evaluation/") for tag in tags) == (name == "some")
        states.append(torch.load(run.checkpoint("last"), weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_no_metrics_turn_the_light_evaluation_off(cache, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr("src.experiment.light_measure", lambda *_: lambda *asked: measured.append(asked) or ({}, {}, []))
    settings = ("model=gan", "metric=[]", "trainer.max_steps=20", "callback.light_evaluation.every_n_validations=1")
    for name, off in (("empty", "[]"), ("null", "null")):
        train(tmp_path / name, cache, *settings, f"callback.light_evaluation.metrics={off}")
        assert measured == []
    train(tmp_path / "on", cache, *settings)
    assert len(measured) == 2


# --- batch norm's statistics of averaged weights ----------------------------------------------------------------------


def test_batch_norm_is_renewed_with_the_statistics_of_its_own_samples(trained):
    """The running statistics are the means over batches of what each norm sees, and the variance is the unbiased one."""
    run = trained("dcgan").run
    config = run.config()
    spec = load_data(config).spec
    config.evaluation.batch_norm_samples = 0
    copied, about = load_trained_model(run, config, spec, "last")
    assert about["batch_norm"] == "statistics of the trained weights"
    config.evaluation.batch_norm_samples = 1000
    renewed, about = load_trained_model(run, config, spec, "last")
    assert about["batch_norm"] == "statistics of 896 samples of these weights"
    again, _ = load_trained_model(run, config, spec, "last")
    assert _is_same(again, _copy(renewed))
    assert not renewed.training
    first = next(module for module in renewed.generator.modules() if isinstance(module, _BatchNorm))
    seen: list[torch.Tensor] = []
    hook = first.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for start in range(0, 896, 128):
        with torch.no_grad():
            renewed.sample(128, generator=SampleNoise(derive_seed(config.evaluation.seed, 4), start))
    hook.remove()
    torch.testing.assert_close(first.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert not _is_same(copied.generator, _copy(renewed.generator))


def test_too_few_samples_to_renew_batch_norm_are_refused(trained):
    run = trained("dcgan").run
    config = run.config()
    config.evaluation.batch_norm_samples = 100
    with pytest.raises(UserError, match=r"evaluation\.batch_norm_samples=100 must be at least loader.batch_size=128"):
        load_trained_model(run, config, load_data(config).spec, "last")


def test_the_averaged_generator_is_validated_with_statistics_of_its_own(tmp_path):
    """At a validation they are renewed, and the training goes on as if they had not been."""
    module = _module("dcgan", clip=0.1, ema_half_life_examples=1000)
    _fit(module, tmp_path, num_steps=3)
    norm = next(layer for layer in module.weight_average.average.modules() if isinstance(layer, _BatchNorm))
    copied, raw = norm.running_mean.clone(), _copy(module.model)
    module.on_validation_epoch_start()
    renewed = norm.running_mean.clone()
    assert not torch.allclose(renewed, copied)
    assert all(torch.equal(value, raw[name]) for name, value in module.model.state_dict().items())
    module.on_validation_epoch_start()
    assert torch.equal(norm.running_mean, renewed)
