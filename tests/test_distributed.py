"""Several devices, accumulated batches and lower precision: the same training as one batch on one device."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from omegaconf import OmegaConf
from torch import Tensor, nn

from src.build import build, build_model
from src.core.batch import Batch
from src.core.errors import UserError
from src.core.protocols import Adversarial
from src.core.ranks import global_rank, launched_processes
from src.core.rng import SampleNoise
from src.runs import Run
from src.training.fit import make_trainer, make_training_module
from src.training.module import TrainingModule
from tests import two_ranks
from tests.commands import QUICK, ROOT, run_cli
from tests.configs import compose_model, models_by_themselves, slow_but_for, small, target
from tests.examples import image_data

TIMEOUT_S = 240  # of two processes, so that one that waits for the other for ever is a failure


@pytest.fixture(scope="module")
def both(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes of `tests.two_ranks` ended with; their checkpoint is beside it."""
    folder = tmp_path_factory.mktemp("two_ranks")
    two_ranks.load_data(compose_model(f"data.cache={cache}"))  # prepared once, before there are two
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.two_ranks", str(folder), str(cache)], cwd=ROOT,
        env=os.environ | ranks | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    found = [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]
    return [one | {"folder": folder} for one in found]


@pytest.fixture(scope="module")
def alone_of(cache: Path) -> Callable[[str], dict[str, Any]]:
    """`alone_of(name)`: what one process that takes the global batch at once ends with; trained once."""
    return functools.cache(lambda name: two_ranks.same_at_once(name, cache))


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((value.double() - other[name].double()).abs().max()) for name, value in one.items())


# --- two devices with half the batch each are one device with the whole batch ---------------------------------------


@pytest.mark.parametrize("name", two_ranks.SAME)
def test_two_devices_take_the_steps_of_one(name, both, alone_of):
    alone = alone_of(name)
    first, second = (found[name] for found in both)
    assert difference(first["state"], second["state"]) == 0
    assert difference(first["state"], alone["state"]) < 4e-7
    assert first["examples"] == alone["examples"] == two_ranks.NUM_STEPS * two_ranks.GLOBAL_BATCH
    assert any(float(value.abs().max()) > 0 for value in first["state"].values())


@pytest.mark.parametrize("name", [name for name, (k, _) in two_ranks.SAME.items() if k == 1])
def test_what_is_logged_is_the_mean_over_both(name, both, alone_of):
    alone = alone_of(name)["rows"]
    first, second = (found[name]["rows"] for found in both)
    assert first == second
    assert [step for step, _ in first] == [step for step, _ in alone]
    for (_, ours), (_, theirs) in zip(first, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert any("val/loss" in row or "val/generator_loss" in row for _, row in first)


def test_two_devices_take_the_steps_of_one_on_stretches_of_sounds_too(both, cache):
    alone = two_ranks.of_sounds(cache)
    first, second = (found["of sounds"] for found in both)
    assert difference(first["state"], second["state"]) == 0
    assert difference(first["state"], alone["state"]) < 1e-6
    losses = [[row["val/loss"] for _, row in some["rows"] if "val/loss" in row] for some in (first, second, alone)]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0]


def test_held_out_examples_are_each_measured_once_even_if_a_device_has_none(both, cache):
    alone = [row for _, row in two_ranks.few(cache)["rows"] if "val/loss" in row]
    first, second = ([row for _, row in found["few held out"]["rows"] if "val/loss" in row] for found in both)
    assert first == second
    assert len(first) == 2
    assert first[0] == pytest.approx(alone[0], rel=1e-5)


def test_samples_of_an_evaluation_are_drawn_in_shares_and_are_the_same(both, cache):
    alone = two_ranks.drawn(cache)
    assert both[1]["drawn"] == []
    assert len(both[0]["drawn"]) == len(alone) == 5
    for (images, labels), (our_images, our_labels) in zip(alone, both[0]["drawn"], strict=True):
        assert torch.equal(images, our_images)
        assert torch.equal(labels, our_labels)


def test_codebook_counts_the_vectors_of_both(both):
    alone = two_ranks.learnt_codes(revive_below=0.0)
    for found in both:
        assert difference(found["codes"], alone) < 1e-5
    first, second = (found["codes with revival"] for found in both)
    assert difference(first, second) == 0
    assert difference(first, alone) > 0.1


def test_a_training_on_two_devices_is_resumed_bit_for_bit_with_batch_norm_too(both):
    for found in both:
        whole, resumed = found["whole"], found["resumed"]
        assert difference(whole["state"], resumed["state"]) == 0
        assert resumed["rows"] == [row for row in whole["rows"] if row[0] > two_ranks.CUT]
    assert difference(both[0]["whole"]["state"], both[1]["whole"]["state"]) == 0


def test_the_checkpoint_has_a_noise_of_its_own_for_each_device(both):
    ranks = torch.load(both[0]["folder"] / "cut.ckpt", weights_only=True)["ranks"]
    assert len(ranks) == 2
    assert not torch.equal(ranks[0]["noise"]["cpu"], ranks[1]["noise"]["cpu"])
    assert not torch.equal(ranks[0]["torch"], ranks[1]["torch"])


def test_it_is_not_resumed_on_another_number_of_devices(both, cache):
    with pytest.raises(UserError, match=r"of a training on 2 devices, this one has 1: set trainer\.devices="):
        two_ranks.fit(cache, *two_ranks.SMALL_DCGAN, resume=both[0]["folder"] / "cut.ckpt")


def test_a_loss_that_is_not_finite_on_one_device_stops_both_with_the_same_sentence(both):
    assert "train/discriminator_loss became nan at step 4" in both[0]["broken"]
    assert both[0]["broken"] == both[1]["broken"]


def test_a_signal_to_one_process_saves_and_ends_both_after_the_same_step(both):
    assert [found["stopped"] for found in both] == [5, 5]


# --- how processes are started ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "rank", "launched"),
    [
        ({}, 0, 1),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, 1, 1),  # by Lightning
        ({"LOCAL_RANK": "0", "NODE_RANK": "1", "WORLD_SIZE": "4"}, 1, 1),
        ({"RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "4"}, 3, 4),  # by torchrun
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, 2, 4),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}, 0, 1),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, 0, 1),
    ],
)
def test_which_process_this_is_stands_in_its_environment(environment, rank, launched, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (global_rank(), launched_processes()) == (rank, launched)


def test_the_rank_is_known_without_importing_torch():
    script = "import sys, src.core.ranks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def _trainer(folder: Path, *overrides: str, callbacks: tuple[L.Callback, ...] = ()) -> L.Trainer:
    config = two_ranks.configured("trainer.accelerator=cpu", *overrides)
    return make_trainer(folder, [*callbacks, two_ranks.Quiet()], [], **build(config.trainer))


def test_a_strategy_that_would_split_the_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"trainer\.strategy=fsdp is not supported; allowed: auto, ddp"):
        _trainer(tmp_path, "trainer.strategy=fsdp")


def test_several_devices_are_several_processes_also_without_saying_so(tmp_path):
    assert _trainer(tmp_path, "trainer.devices=2").world_size == 2
    assert _trainer(tmp_path, "trainer=ddp", "trainer.devices=2").world_size == 2
    assert _trainer(tmp_path).world_size == 1


def test_more_processes_than_devices_are_refused(tmp_path, monkeypatch):
    slurm = {"PROCID": 1, "LOCALID": 1, "NODEID": 0, "NTASKS": 2, "NTASKS_PER_NODE": 2, "JOB_NAME": "train", "JOB_ID": 7}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    with pytest.raises(UserError, match=r"2 processes were started for a training on trainer\.devices=1"):
        _trainer(tmp_path)


# --- accumulated batches ----------------------------------------------------------------------------------------------


class Steps(L.Callback):
    """Notes the weights after every batch."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: TrainingModule, *_: object) -> None:
        self.weights.append(_weights(pl_module.model))


def _weights(network: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


@pytest.mark.parametrize(("k", "model", "n_critic"), [(4, "vae", None), (2, "gan", 1), (4, "gan", 2)])
def test_small_batches_give_the_weights_of_a_large_one(k, model, n_critic, cache, monkeypatch):
    of_model = two_ranks.STEADY_GAN if model == "gan" else [f"model={model}"]
    # with seed 0 one activation lies within a rounding error of the kink of its leaky ReLU, which shows as 4e-5
    how = [*of_model, *([] if n_critic is None else [f"training.n_critic={n_critic}", "seed=1"])]
    monkeypatch.setitem(two_ranks.SAME, "here", (k, how))
    several, one = two_ranks.same("here", cache), two_ranks.same_at_once("here", cache)
    assert (several["step"], one["step"]) == (k * two_ranks.NUM_STEPS, two_ranks.NUM_STEPS)
    assert difference(several["state"], one["state"]) < 1e-6


def _driver(model: str, clip: float | None, k: int) -> TrainingModule:
    """A model on tiny made-up images, by plain gradient descent of rate 1."""
    config = compose_model(f"model={model}")
    torch.manual_seed(0)
    network = build_model(config.model, image_data((1, 8, 8), "discrete").spec, model)
    optimizers = {"generator": _descend, "discriminator": _descend} if isinstance(network, Adversarial) else _descend
    knobs = {"gradient_clip_norm": clip, "accumulate_batches": k}
    return make_training_module(network, optimizers, build(config.training) | knobs, seed=0)


def _descend(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


class Seen(L.Callback):
    """Notes the batches."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: TrainingModule, batch: Batch, *_: object) -> None:
        self.batches.append(batch)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_accumulated_gradient_is_what_is_clipped(precision, tmp_path):
    module, seen = _driver("vae", clip=0.5, k=3), Seen()
    before = _weights(module.model)
    start = [weight.detach().clone() for weight in module.model.parameters()]
    trainer = _trainer(
        tmp_path, "trainer.max_steps=3", "trainer.limit_val_batches=0",
        *([] if precision == "16-mixed" else [f"trainer.precision={precision}"]),
        callbacks=(seen, two_ranks.UseNoise(SampleNoise(7))),
    )  # fmt: skip
    if precision == "16-mixed":  # Lightning has bf16 instead on a CPU, so that its scaler has to be put in by hand
        trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu")
    trainer.fit(module, datamodule=image_data((1, 8, 8), "discrete"))
    moved = _weights(module.model) - before

    for weight, value in zip(module.model.parameters(), start, strict=True):
        weight.data.copy_(value)
        weight.grad = None
    noise, dtype = SampleNoise(7), torch.float16 if precision == "16-mixed" else torch.bfloat16
    for batch in seen.batches:
        with torch.autocast("cpu", dtype, enabled=precision != "32-true", cache_enabled=False):
            loss = module.model.train().loss(batch, generator=noise)["loss"].mean() / 3
        loss.backward()
    norm = nn.utils.clip_grad_norm_(module.model.parameters(), 0.5)
    assert float(norm) > 1
    expected = -torch.cat([weight.grad.flatten() for weight in module.model.parameters()])
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6 if precision == "32-true" else 1e-3)
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-3)


def test_the_state_of_the_gradient_scaler_is_in_the_checkpoint(tmp_path):
    module = _driver("gan", clip=1.0, k=2)
    trainer = _trainer(tmp_path, "trainer.max_steps=4", "trainer.limit_val_batches=0")
    trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu")
    trainer.fit(module, datamodule=image_data((1, 8, 8), "discrete", count=32))
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    kept = torch.load(tmp_path / "some.ckpt", weights_only=True)["MixedPrecision"]
    assert kept == trainer.precision_plugin.scaler.state_dict()
    assert 0 < kept["_growth_tracker"] <= 4  # two players, two rounds


@pytest.mark.parametrize(("model", "n_critic"), [("vae", None), ("gan", 1), ("gan", 2)])
def test_weights_move_at_the_end_of_a_round_only(model, n_critic, tmp_path):
    module, steps = _driver(model, clip=0.1, k=3), Steps()
    if n_critic is not None:
        module._n_critic = n_critic
    trainer = _trainer(tmp_path, "trainer.max_steps=6", "trainer.limit_val_batches=0", callbacks=(steps,))
    first = _weights(module.model)
    trainer.fit(module, datamodule=image_data((1, 8, 8), "discrete"))
    has_moved = [not torch.equal(a, b) for a, b in zip([first, *steps.weights], steps.weights, strict=False)]
    assert has_moved == [False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["trainer.max_steps=4"], r"trainer\.max_steps=4 counts batches and must be a multiple of training\.accumulate_b"),
        (["trainer.limit_train_batches=2"], r"an epoch of 2 batches is no whole number of training\.accumulate_batches=3"),
    ],
)
def test_a_training_that_would_end_within_a_round_is_refused(settings, sentence, tmp_path):
    trainer = _trainer(tmp_path, *settings)
    with pytest.raises(UserError, match=sentence):
        trainer.fit(_driver("vae", clip=None, k=3), datamodule=image_data((1, 8, 8), "discrete"))


def test_an_epoch_has_whole_rounds_only(tmp_path):
    module = _driver("vae", clip=None, k=2)
    trainer = _trainer(tmp_path, "trainer.max_epochs=1", "trainer.limit_val_batches=0")
    trainer.fit(module, datamodule=image_data((1, 8, 8), "discrete"))  # three batches of 8
    assert module.step == 2


# --- bf16 -------------------------------------------------------------------------------------------------------------


WITH_GRADIENTS = [one for one in models_by_themselves() if not hasattr(target("model", one), "maximize")]


@pytest.mark.parametrize("model", slow_but_for(WITH_GRADIENTS, ("dcgan", "flow", "flow_matching", "gan", "vae", "vqvae")))
def test_every_model_with_gradients_trains_in_bf16(model, cache):
    module, rows = two_ranks.fit(
        cache, f"model={model}", *small(model), "trainer.precision=bf16-mixed", "trainer.max_epochs=1",
        "trainer.limit_train_batches=3", "trainer.limit_val_batches=1", max_steps=None,
    )  # fmt: skip
    assert module.step == 3
    assert all(weight.dtype == torch.float32 for weight in module.model.parameters())
    assert any("val/loss" in row or "val/generator_loss" in row for _, row in rows.rows)


# --- the command ------------------------------------------------------------------------------------------------------


DDP = ("trainer=ddp", "trainer.devices=2")


@pytest.mark.slow
@pytest.mark.parametrize("model", models_by_themselves())
def test_every_model_trains_on_two_devices_from_the_command_line(model, cache, tmp_path):
    line = ("train", *QUICK, *DDP, f"model={model}", *small(model), "trainer.max_steps=12", f"data.cache={cache}")
    said = run_cli(*line, f"hydra.run.dir={tmp_path}", timeout_s=TIMEOUT_S)
    assert said.code == 0, said.text
    run = Run.open(tmp_path)
    assert run.status()["status"] == "done"
    checkpoint = torch.load(run.checkpoint("last"), weights_only=True)
    assert checkpoint["progress"] == {"step": 12, "examples_seen": 12 * 2 * 128}
    assert said.text.count("data: image") == 1, "both processes speak"
    has_batch_norm = "batch_norm: true" in OmegaConf.to_yaml(compose_model(f"model={model}").model, resolve=True)
    assert ("batch norm sees each device's own batch" in said.text) == has_batch_norm
    together = run.results()["metrics"]
    alone = run_cli("evaluate", f"run={tmp_path}", timeout_s=TIMEOUT_S)
    assert alone.code == 0, alone.text
    assert Run.open(tmp_path).results()["metrics"] == together


@pytest.mark.slow
def test_a_run_on_two_devices_that_is_asked_to_end_saves_itself_and_goes_on(cache, tmp_path):
    line = [*QUICK, *DDP, "model=gan", "trainer.max_steps=300", "metric=[cs]", "callback.light_evaluation.metrics=[]"]
    line += ["trainer.val_every_n_epochs=5", f"data.cache={cache}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "src.train", *line, f"hydra.run.dir={tmp_path / 'stopped'}"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT_S
    while not (tmp_path / "stopped" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    run = Run.open(tmp_path / "stopped")
    assert run.status()["status"] == "interrupted", said
    assert 0 < torch.load(run.checkpoint("last"), weights_only=True)["progress"]["step"] < 300
    for arguments in ([f"resume={tmp_path / 'stopped'}"], [*line, f"hydra.run.dir={tmp_path / 'whole'}"]):
        ended = run_cli("train", *arguments, timeout_s=TIMEOUT_S)
        assert ended.code == 0, ended.text
    states = [torch.load(Run.open(tmp_path / name).checkpoint("last"), weights_only=True) for name in ("stopped", "whole")]
    assert difference(states[0]["state_dict"], states[1]["state_dict"]) == 0
    results = [Run.open(tmp_path / name).results()["metrics"]["cs"]["value"] for name in ("stopped", "whole")]
    assert results[0] == results[1]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_the_run_and_ends_both_processes(cache, tmp_path):
    line = ("train", *QUICK, *DDP, "model=vae", "optim.lr=1e30", f"data.cache={cache}", f"hydra.run.dir={tmp_path}")
    said = run_cli(*line, timeout_s=60)
    assert said.code == 1, said.text
    assert said.text.count("Traceback") == 0, said.text
    assert Run.open(tmp_path).status()["status"] == "failed"
