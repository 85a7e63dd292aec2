"""A run that was stopped and resumed is the run that was not: bit for bit, for every model, in mid-epoch too."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import open_dict

from src.build import build
from src.claim import claim
from src.experiment import load_data, load_model
from src.runs import Run
from src.training.callbacks.checkpoint import LastAndBest
from src.training.fit import make_trainer, make_training_module
from src.training.module import TrainingModule
from tests.commands import QUICK, ROOT, call
from tests.configs import compose_config, is_of_tokens, models_by_themselves, slow_but_for, small
from tests.killing import curves, tensors, weights
from tests.sounds import write_tones

NUM_STEPS = 24  # of ten to an epoch
LONG = 200  # steps of a training that is stopped before its end


class Rows(Logger):
    """Keeps what is logged, but for the speed."""

    name, version = "rows", "0"

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        kept = {name: value for name, value in metrics.items() if "per_second" not in name}
        self.rows.append((step or 0, kept))

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


class SaveAfter(L.Callback):
    """Saves one checkpoint after a step; after the last of an epoch behind its validation, as the framework does."""

    def __init__(self, step: int, file: Path) -> None:
        self._step, self._file = step, file

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: TrainingModule, *_: object) -> None:
        if pl_module.step == self._step and not trainer.is_last_batch:
            trainer.save_checkpoint(self._file)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
        if pl_module.step == self._step:
            trainer.save_checkpoint(self._file)


def trained(
    model: str, cache: Path, *callbacks: L.Callback, resume: Path | None = None, workers: int = 0, also: Sequence[str] = ()
) -> tuple[TrainingModule, Rows]:
    """A short training on digits, from its beginning or from a checkpoint."""
    config = compose_config(
        f"model={model}", *small(model), "trainer.accelerator=cpu", f"trainer.max_steps={NUM_STEPS}",
        "trainer.val_every_n_epochs=1", "training.log_every_n_steps=3", f"loader.num_workers={workers}",
        f"data.cache={cache}", *also,
    )  # fmt: skip
    with open_dict(config):
        config.name = {"model": model, "data": "digits"}
    L.seed_everything(0, verbose=False)
    data = load_data(config)
    optimizers = build(config.get("optim", {}))
    module = make_training_module(load_model(config, data.spec), optimizers, build(config.training), config.seed)
    rows = Rows()
    trainer = make_trainer(default_root_dir=cache, callbacks=[*callbacks, _Quiet()], logger=[rows], **build(config.trainer))
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, rows


class _Quiet(L.pytorch.callbacks.ProgressBar):
    """No progress bar."""

    def disable(self) -> None: ...


FEW = ("dcgan", "flow_matching", "gmm", "vqvae")  # the others are trained in the same ways; vae and gan: see below


def require_same(model: str, cache: Path, tmp_path: Path, cut: int, workers: int = 0, also: Sequence[str] = ()) -> None:
    whole, rows = trained(model, cache, SaveAfter(cut, tmp_path / "cut.ckpt"), workers=workers, also=also)
    resumed, later_rows = trained(model, cache, resume=tmp_path / "cut.ckpt", workers=workers, also=also)
    assert resumed.step == whole.step == NUM_STEPS
    assert resumed.examples_seen == whole.examples_seen
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert later_rows.rows == [row for row in rows.rows if row[0] > cut]
    before, after = (some.trainer.strategy.optimizer_state for some in (whole, resumed))
    for theirs, ours in zip(whole.trainer.optimizers, resumed.trainer.optimizers, strict=True):
        pairs = zip(tensors(before(theirs)), tensors(after(ours)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("model", slow_but_for(models_by_themselves(), FEW))
def test_a_training_resumed_in_the_middle_of_an_epoch_is_the_one_that_was_not(model, cache, tmp_path):
    require_same(model, cache, tmp_path, cut=13)


@pytest.mark.parametrize(("cut", "workers"), [(20, 0), (13, 2), pytest.param(20, 2, marks=pytest.mark.slow)])
def test_it_may_be_cut_anywhere_with_any_number_of_workers(cut, workers, cache, tmp_path):
    require_same("vae", cache, tmp_path, cut, workers)


@pytest.mark.parametrize("model", slow_but_for(["transformer", "lstm", "gpt2"], ["transformer"]))
def test_a_training_on_text_is_the_one_that_was_not_cut_too(model, cache, tmp_path):
    if model == "gpt2":
        pytest.importorskip("transformers", reason="transformers is not installed (make extra EXTRA=text)")
    file = tmp_path / "text.txt"
    file.write_text("".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(200, 0, -1)))
    text = [
        "data=text_file", f"data.path={file}", "data.context=16", "network.dropout=0.1", "loader.batch_size=8",
        "trainer.limit_train_batches=10",
    ]  # fmt: skip
    require_same(model, cache, tmp_path, cut=13, also=text)


@pytest.mark.parametrize(
    "model", slow_but_for(["wavenet", "transformer_mu_law", "audio_vae", "audio_vae_mel"], ["wavenet"])
)
def test_a_training_on_sounds_is_the_one_that_was_not_cut_too(model, cache, tmp_path):
    sizes = ("sample_rate=4000", "length=512", "n_fft=64", "hop=32", "num_mels=16")
    sounds = [
        "data=audio_folder", f"data.path={write_tones(tmp_path / 'tones', per_class=50)}", "loader.batch_size=8",
        "trainer.limit_train_batches=10", *(f"data.{size}" for size in sizes),
    ]  # fmt: skip
    if is_of_tokens(model):
        sounds += ["model.window=64", "model.context=16"]
    require_same(model, cache, tmp_path, cut=13, also=sounds)


@pytest.mark.parametrize("model", ["vae", "gan"])
@pytest.mark.parametrize("how", ["trainer.precision=bf16-mixed", "training.accumulate_batches=2"])
def test_it_may_be_of_lower_precision_or_accumulate_batches(model, how, cache, tmp_path):
    require_same(model, cache, tmp_path, cut=14, also=[how])


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.random(), np.random.standard_normal(), float(torch.rand(()))]


class DrawAfter(L.Callback):
    """Draws from every global generator behind a step."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.drawn: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: TrainingModule, *_: object) -> None:
        if pl_module.step < self._step:
            draw()
        if pl_module.step == self._step:
            self.drawn = draw()


def test_the_global_generators_of_python_numpy_and_torch_go_on_too(cache, tmp_path):
    whole, resumed = DrawAfter(15), DrawAfter(15)
    trained("vae", cache, whole, SaveAfter(13, tmp_path / "cut.ckpt"))
    random.seed(3)
    trained("vae", cache, resumed, resume=tmp_path / "cut.ckpt")
    assert resumed.drawn == whole.drawn


def test_a_checkpoint_waits_for_the_end_of_its_round(cache, tmp_path):
    class Steps(LastAndBest):
        steps: ClassVar[list[int]] = []

        def _save_last(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:
            self.steps.append(pl_module.step)
            super()._save_last(trainer, pl_module)

    trained("gan", cache, Steps(tmp_path, "val/loss", every_minutes=0), also=["training.accumulate_batches=4"])
    assert sorted(set(Steps.steps)) == [4, 8, 12, 16, 20, 24]


def command(folder: Path, cache: Path) -> list[str]:
    return [
        *QUICK, "model=gan", f"trainer.max_steps={LONG}", "trainer.val_every_n_epochs=5", "metric=[cs]",
        "callback.light_evaluation.metrics=[]", f"data.cache={cache}", f"hydra.run.dir={folder}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGUSR1", "SIGUSR2", "SIGINT"))]
)
def test_a_run_that_is_asked_to_end_saves_itself_and_ends_as_it_would_have(name, cache, tmp_path):
    folder = tmp_path / "stopped"
    line = [sys.executable, "-m", "src.train", *command(folder, cache)]
    process = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.Signals[name])
    start = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - start < 10
    assert process.returncode != 0
    assert "Traceback" not in said
    run = Run.open(folder)
    assert run.status()["status"] == "interrupted"
    assert f"to go on: python -m src.train resume={folder}" in said
    step = torch.load(run.checkpoint("last"), weights_only=True)["progress"]["step"]
    assert 0 < step < LONG
    if name != "SIGTERM":
        return
    said = call("train", f"resume={folder}")
    assert said.code == 0, said.text
    assert call("train", *command(tmp_path / "whole", cache)).code == 0
    whole = Run.open(tmp_path / "whole")
    assert run.status()["status"] == "done"
    assert all(torch.equal(one, other) for one, other in zip(weights(run), weights(whole), strict=True))
    assert curves(run) == curves(whole)
    assert run.results()["metrics"]["cs"]["value"] == whole.results()["metrics"]["cs"]["value"]
    pictures, whole_pictures = ({file.name: file.read_bytes() for file in some.samples.iterdir()} for some in (run, whole))
    assert pictures == whole_pictures


@pytest.fixture
def stopped(trained_gan: Run, tmp_path: Path) -> Run:
    """A run that seems to have been interrupted."""
    shutil.copytree(trained_gan.path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    run.set_status("interrupted")
    return run


@pytest.fixture(scope="module")
def trained_gan(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("resumed") / "gan"
    assert call("train", *command(folder, cache), "trainer.max_steps=10").code == 0
    return Run.open(folder)


@pytest.mark.parametrize("given", ["optim.generator.lr=1", "model=vae", "seed=1", "~callback.pictures"])
def test_what_may_change_the_result_is_refused_by_its_name(given, stopped):
    said = call("train", f"resume={stopped.path}", given)
    assert said.code == 1
    assert given.lstrip("~").partition("=")[0] in said.text
    assert "allowed beside resume=: trainer.max_epochs" in said.text or "did you mean" in said.text
    assert stopped.status()["status"] == "interrupted"


@pytest.mark.parametrize("status", ["interrupted", "done"])
def test_a_run_may_be_made_longer(status, stopped):
    stopped.set_status(status)
    said = call("train", f"resume={stopped.path}", "trainer.max_steps=15")
    assert said.code == 0, said.text
    assert torch.load(stopped.checkpoint("last"), weights_only=True)["progress"]["step"] == 15


def test_a_run_that_is_done_or_running_or_none_is_not_resumed(stopped, tmp_path):
    stopped.set_status("done")
    assert "the run is done" in call("train", f"resume={stopped.path}").text
    stopped.set_status("running")
    with claim(stopped.path):
        said = call("train", f"resume={stopped.path}")
    assert said.code == 1
    assert f"{stopped.path} is being worked on by process {os.getpid()}" in said.text
    said = call("train", f"resume={tmp_path / 'nowhere'}")
    assert said.code == 1
    assert f"resume={tmp_path / 'nowhere'} does not exist" in said.text
    assert not (tmp_path / "nowhere").exists()


def test_a_run_that_was_killed_outright_goes_on(stopped):
    status = {"status": "running", "host": os.uname().nodename, "pid": "99999999"}
    (stopped.path / "status.json").write_text(json.dumps(status))
    before = weights(stopped)
    assert call("train", f"resume={stopped.path}").code == 0
    assert stopped.status()["status"] == "done"
    # it was killed behind its last step, so no step is done once more
    assert torch.load(stopped.checkpoint("last"), weights_only=True)["progress"]["step"] == 10
    assert all(torch.equal(one, other) for one, other in zip(weights(stopped), before, strict=True))


def test_no_row_of_a_table_is_lost_when_a_run_is_resumed(cache, tmp_path):
    line = [*command(tmp_path / "run", cache), "logger=[tensorboard,csv]", "metric=[]", "trainer.max_steps=7"]
    assert call("train", *line).code == 0
    for last_step in (12, 16):
        assert call("train", f"resume={tmp_path / 'run'}", f"trainer.max_steps={last_step}").code == 0
    tables = {file.name: rows(file) for file in (tmp_path / "run" / "csv").glob("*.csv")}
    assert tables.keys() == {"metrics_until_step_7.csv", "metrics_until_step_12.csv", "metrics.csv"}
    steps = [{int(row["step"]) for row in tables[name]} for name in sorted(tables, key=lambda name: int(rows_until(name)))]
    assert steps == [set(range(1, 8)), set(range(8, 13)), set(range(13, 17))]
    values = {int(row["step"]): float(row["train/generator_loss"]) for table in tables.values() for row in table
              if row["train/generator_loss"]}  # fmt: skip
    assert sorted(values.items()) == curves(Run.open(tmp_path / "run"))["train/generator_loss"]


def rows(table: Path) -> list[dict[str, str]]:
    with open(table) as file:
        return list(csv.DictReader(file))


def rows_until(name: str) -> str:
    """The step until which a table goes, by its name."""
    return "".join(filter(str.isdigit, name)) or "1000"


def test_a_checkpoint_comes_with_time_with_two_optimizers_too(cache, tmp_path):
    class Count(LastAndBest):
        num_saved = 0

        def _save(self, trainer: L.Trainer, name: str) -> None:
            Count.num_saved += 1
            super()._save(trainer, name)

    trained("gan", cache, Count(tmp_path, "val/loss", every_minutes=0))
    assert Count.num_saved >= NUM_STEPS
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["progress"]["step"] == NUM_STEPS
