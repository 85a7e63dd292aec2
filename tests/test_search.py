"""Searches: the space, the life of a study, trainings that are given up, what is refused. Trainings are acted, but one."""

import copy
import csv
import functools
import importlib.util
import json
import logging
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from src.core.errors import PrunedError, UserError
from src.runs import Run, descriptive
from src.search import Search
from src.search_space import read_space
from src.training.callbacks.held_out_means import HeldOutMeans, held_out_means
from tests.commands import ROOT, call
from tests.configs import CONF, compose_config, options

optuna = pytest.importorskip("optuna")

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

from src.training.callbacks.light_evaluation import LightEvaluation  # noqa: E402
from src.training.callbacks.pruning import Prune  # noqa: E402
from src.training.study import open_storage, shown_storage  # noqa: E402

# --- the space -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "distribution"),
    [
        ("interval(1,5)", FloatDistribution(1, 5)),
        ("tag(log, interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("int(interval(4,64))", IntDistribution(4, 64)),
        ("tag(log, int(interval(4,64)))", IntDistribution(4, 64, log=True)),
        ("range(2,9,3)", IntDistribution(2, 8, step=3)),
        ("range(9,2,-3)", IntDistribution(3, 9, step=3)),
        ("range(0,0.5,0.1)", FloatDistribution(0, 0.4, step=0.1)),
        ("choice([400],[256,256])", CategoricalDistribution(["[400]", "[256,256]"])),
        ("10,20", CategoricalDistribution(["10", "20"])),
        ("range(3,4)", CategoricalDistribution(["3"])),
    ],
)
def test_sweep_expressions_are_distributions(expression, distribution):
    assert read_space({"a": expression}, [], None).distributions == {"a": distribution}


@pytest.mark.parametrize(
    ("expression", "sentence"),
    [
        ("interval(2,1)", "its first end is behind its second one"),
        ("tag(log, interval(0,1))", "there is no logarithm of 0.0"),
        ("range(0,0)", "names no value"),
        ("tag(log, range(1,9))", "a range has no tags"),
        ("[1", "hydra.sweeper.params: "),
        ([1, 2], "must be written as on the command line"),
    ],
)
def test_what_is_no_space_is_refused(expression, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_space({"a": expression}, [], None)


def test_the_command_line_replaces_a_key_of_the_yaml_and_adds_others():
    space = read_space({"a": "interval(0,1)", "b": "1,2", "c": 3}, ["a=0.5", "d=4,5", "c=6,7", "model=vae"], None)
    assert space.fixed == ["a=0.5", "model=vae"]
    assert set(space.distributions) == {"b", "c", "d"}
    assert read_space({}, ["a=1,2", "a=3"], None).fixed == ["a=3"]
    assert not read_space({}, ["a=3", "a=1,2"], None).fixed


def test_numbers_are_short_and_stay_inside_their_interval():
    space = read_space({"a": "interval(0.9,0.99996)", "n": "int(interval(1,9))", "o": "x,y"}, [], None)
    assert space.overrides({"a": 0.912345, "n": 3, "o": "y"}) == ["a=0.9123", "n=3", "o=y"]
    assert space.overrides({"a": 0.99996, "n": 3, "o": "y"})[0] == "a=0.99996"


# --- the life of a study ---------------------------------------------------------------------------------------------


class Composer:
    """In place of Hydra's config loader, which reads all YAMLs anew for every trial: sets values in a copy."""

    def load_sweep_config(self, config: DictConfig, overrides: list[str]) -> DictConfig:
        config = copy.deepcopy(config)
        OmegaConf.set_readonly(config.hydra, False)
        for override in OverridesParser.create().parse_overrides(overrides):
            OmegaConf.update(config, override.key_or_group, override.value())
        config.hydra.overrides.task = overrides
        config.hydra.sweep.subdir = " ".join(descriptive(overrides))
        return config

    def load_configuration(self, name: str, overrides: list[str], run_mode: RunMode) -> DictConfig:
        own = [line for line in overrides if not line.startswith(("model=", "data="))]
        return self.load_sweep_config(_composed(), own)


@functools.cache
def _composed() -> DictConfig:
    Plugins.instance().register(importlib.import_module("hydra_plugins.generative").LocalLauncher)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=["hydra/sweeper=optuna"], return_hydra_config=True)
    OmegaConf.set_struct(config, False)
    for part in config.keys() - {"hydra", "objective", "plan", "retry_failed", "seed"}:
        del config[part]  # to copy and to write less
    config.update(optim={"lr": 1e-3}, model={"latent_dim": 2}, trainer={"devices": 1, "num_nodes": 1})
    config.callback = {"light_evaluation": {"metrics": ["fd"]}}
    config.metric = {"fd": {}, "kd": {}}
    OmegaConf.set_struct(config, True)
    return config


SETTINGS = ("objective={val/loss:minimize}", "hydra.sweeper.n_startup_trials=3")
SPACE = "optim.lr=tag(log,interval(1e-4,1e-1))"


def new_search(directory: Path, *overrides: str) -> Search:
    """What Hydra makes of `-m hydra/sweeper=optuna OVERRIDES`, but for the loader."""
    config = copy.deepcopy(_composed())
    OmegaConf.set_readonly(config.hydra, False)
    config.hydra.sweep.dir = str(directory)
    for override in OverridesParser.create().parse_overrides([*SETTINGS, *overrides]):
        if not override.is_sweep_override():
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
    search = Search(**{name: value for name, value in config.hydra.sweeper.items() if name != "_target_"})
    search.setup(hydra_context=SimpleNamespace(config_loader=Composer()), task_function=None, config=config)
    return search


class Actor:
    """Ends trainings at once, as it is told; in place of `JobProcess`."""

    def __init__(self) -> None:
        self.trained: list[Path] = []
        self.act: Callable[[Run], None] = well

    def process(self, directory: Path, output: Path | None, environment: dict[str, str], retry_failed: bool) -> Mock:
        self.trained.append(directory)
        self.act(Run(directory))
        return Mock(has_ended=lambda: True)


def loss(run: Run) -> float:
    return (math.log10(run.config().optim.lr) + 2) ** 2


def well(run: Run) -> None:
    run.write_validation({"val/loss": loss(run)})
    run.write_results(
        {"schema": 1, "metrics": {"fd": {"value": run.config().optim.lr}, "kd": {"not_applicable": "too few"}}}
    )
    run.set_status("done")


@pytest.fixture
def actor(monkeypatch) -> Actor:
    actor = Actor()
    monkeypatch.setattr("src.launchers.local.JobProcess", actor.process)
    monkeypatch.setattr("src.train._end_sweep", lambda *_: True)
    return actor


@pytest.fixture
def search(actor, tmp_path, caplog, monkeypatch) -> Callable[..., str]:
    """Runs a search in the folder `sweep`; gives what it said."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    caplog.set_level(logging.INFO, logger="src")

    def of(*overrides: str, folder: str = "sweep") -> str:
        caplog.clear()
        arguments = [line for line in (*SETTINGS, SPACE, *overrides) if not line.startswith("hydra.")]
        new_search(tmp_path / folder, *overrides).sweep(arguments)
        return "\n".join(caplog.messages)

    return of


def trials(tmp_path: Path) -> list[optuna.trial.FrozenTrial]:
    storage = open_storage(str(tmp_path / "sweep/study.journal"))
    return optuna.load_study(study_name="search", storage=storage).trials


def states(tmp_path: Path) -> list[str]:
    return [trial.state.name for trial in trials(tmp_path)]


def test_a_search_finds_the_best_and_lists_all(search, actor, tmp_path):
    said = search("hydra.sweeper.n_trials=9", "seed=4")
    assert len(actor.trained) == 9
    best = min(trials(tmp_path), key=lambda trial: trial.value)
    assert best.value < 0.5
    assert f"best trial {best.number}: val/loss" in said
    (entry,) = OmegaConf.load(tmp_path / "sweep/best.yaml")
    assert entry.trial == best.number
    rows = list(csv.DictReader((tmp_path / "sweep/trials.csv").open()))
    assert [row["state"] for row in rows] == ["complete"] * 9


def test_the_command_searches_a_shipped_space_and_says_how_to_train_the_best_once_more(actor, tmp_path):
    line = ("-m", "search=vae", "encoder.hidden=[8]", "decoder.hidden=[8]", f"hydra.sweep.dir={tmp_path}/sweep")
    said = call("train", *line, "model.latent_dim=4", "hydra.sweeper.n_trials=2")
    assert said.code == 0, said.text
    assert "search: 2 complete" in said.text
    (entry,) = OmegaConf.load(tmp_path / "sweep/best.yaml")
    words = shlex.split(entry.command)
    assert words[:3] == ["python", "-m", "src.train"]
    assert words[3:8] == ["model=vae", "data=digits", "encoder.hidden=[8]", "decoder.hidden=[8]", "model.latent_dim=4"]
    assert words[8:] == list(entry.params)
    assert "beyond" not in entry  # composed, the command is the run


def test_typed_again_it_runs_nothing_and_with_more_trials_the_rest(search, actor, tmp_path):
    search("hydra.sweeper.n_trials=3")
    assert "0 of 3 trials to run" in search("hydra.sweeper.n_trials=3")
    search("hydra.sweeper.n_trials=4")
    assert len(actor.trained) == 4


class Killed(BaseException):
    """Ends the search in the middle of a training, without a word to the study."""


def test_a_killed_search_goes_on_with_the_same_trial_and_draws_what_it_would_have_drawn(search, actor, tmp_path):
    def kill(run: Run) -> None:
        run.set_status("interrupted")
        raise Killed

    actor.act = lambda run: kill(run) if len(actor.trained) == 3 else well(run)
    with pytest.raises(Killed):
        search("hydra.sweeper.n_trials=5")
    assert states(tmp_path) == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert "3 of 5 trials to run" in search("hydra.sweeper.n_trials=5")
    assert states(tmp_path) == ["COMPLETE"] * 5
    assert actor.trained[2] == actor.trained[3]
    search("hydra.sweeper.n_trials=5", folder="other")
    assert [path.name for path in actor.trained[-5:]] == list(dict.fromkeys(path.name for path in actor.trained[:6]))


def test_a_training_that_ended_while_nobody_looked_is_told_without_another_one(search, actor, tmp_path):
    def end_and_kill(run: Run) -> None:
        well(run)
        raise Killed

    actor.act = end_and_kill
    with pytest.raises(Killed):
        search("hydra.sweeper.n_trials=1")
    search("hydra.sweeper.n_trials=1")
    assert states(tmp_path) == ["COMPLETE"]
    assert len(actor.trained) == 1


def test_failed_pruned_and_non_finite_trials_do_not_end_the_search(search, actor, tmp_path):
    def act(run: Run) -> None:
        match len(actor.trained):
            case 1:
                run.set_status("failed", "out of memory")
            case 2:
                run.set_status("pruned", "it is worse")
            case 3:
                well(run)
                (run.path / "validation.json").write_text('{"val/loss": NaN}')
            case _:
                well(run)

    actor.act = act
    said = search("hydra.sweeper.n_trials=4")
    assert states(tmp_path) == ["FAIL", "PRUNED", "FAIL", "COMPLETE"]
    assert "trial 0: failed (out of memory); the search goes on" in said
    assert "trial 2: failed (val/loss is nan); the search goes on" in said
    assert "search: 1 complete, 2 failed, 1 pruned" in said

    search("hydra.sweeper.n_trials=4")
    assert len(actor.trained) == 4
    search("hydra.sweeper.n_trials=4", "retry_failed=true")  # only that of the failed training
    assert states(tmp_path) == ["FAIL", "PRUNED", "FAIL", "COMPLETE", "COMPLETE"]
    assert actor.trained[4] == actor.trained[0]


def test_a_metric_that_does_not_apply_fails_the_trial_with_its_reason(search):
    said = search("hydra.sweeper.n_trials=1", "objective={val/loss:null,kd:minimize}")
    assert "trial 0: failed (kd is nan; too few)" in said
    assert "no trial has ended well" in said


def test_a_choice_by_the_test_images_is_warned_of_once(search, actor):
    def act(run: Run) -> None:
        well(run)
        run.write_results({"schema": 1, "metrics": {"fd": {"value": 1.0, "card": {"split": "test"}}}})

    actor.act = act
    said = search("hydra.sweeper.n_trials=2", "objective={val/loss:null,fd:minimize}")
    assert said.count("fd is measured on the test images") == 1


def test_the_same_parameters_are_trained_once(search, actor, tmp_path):
    search("hydra.sweeper.n_trials=5", "optim.lr=1e-3,1e-2", "hydra.launcher.n_jobs=2")
    assert states(tmp_path) == ["COMPLETE"] * 5
    assert len(actor.trained) == 2


def test_several_objectives_have_a_front(search, tmp_path):
    said = search("hydra.sweeper.n_trials=8", "objective={fd:maximize}", "hydra.sweeper.sampler=nsgaii")
    front = OmegaConf.load(tmp_path / "sweep/best.yaml")
    assert len(front) >= 2, said
    assert set(front[0]["values"]) == {"val/loss", "fd"}
    assert "are on the front" in said


def test_a_study_in_a_data_base_goes_on(search, tmp_path):
    storage = f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db"
    search("hydra.sweeper.n_trials=2", storage)
    assert "1 of 3 trials to run" in search("hydra.sweeper.n_trials=3", storage)
    assert not (tmp_path / "sweep/study.journal").exists()


def test_plan_writes_nothing(search, actor, tmp_path):
    storage = f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db"
    assert "a new study" in search("plan=true", storage)
    assert not list(tmp_path.iterdir())
    search("hydra.sweeper.n_trials=2")
    before = (tmp_path / "sweep/study.journal").read_bytes()
    said = search("plan=true", "hydra.sweeper.n_trials=5", "seed=4")
    assert "2 complete; 3 are left" in said
    assert "varied    optim.lr=tag(log,interval(1e-4,1e-1))" in said
    assert "fixed     seed=4" in said
    assert (tmp_path / "sweep/study.journal").read_bytes() == before
    assert len(actor.trained) == 2


def test_half_a_line_of_a_killed_process_does_not_damage_the_journal(search, tmp_path):
    search("hydra.sweeper.n_trials=1")
    with (tmp_path / "sweep/study.journal").open("a") as file:
        file.write('{"op_code": 4')
    search("hydra.sweeper.n_trials=2")
    assert states(tmp_path) == ["COMPLETE"] * 2


def test_under_a_launcher_that_is_not_ours_trials_go_in_batches(actor, tmp_path, caplog):
    """Hydra's `basic`, as `_launcher`: what its jobs return is read, and what gives nothing back has failed."""
    caplog.set_level(logging.INFO, logger="src")
    search, batches = new_search(tmp_path / "sweep", "hydra.sweeper.n_trials=3"), []

    def launch(batch: list[list[str]], initial_job_idx: int) -> list[SimpleNamespace]:
        batches.append(initial_job_idx)
        jobs = [search._compose(overrides) for overrides in batch]
        runs = [Run.prepare(make(tmp_path / "sweep" / job.hydra.sweep.subdir), job, []) for job in jobs]
        well(runs[0])
        lost = SimpleNamespace(hydra_cfg=None, _return_value="it was lost")
        ended = {"hydra": {"runtime": {"output_dir": str(runs[0].path)}}}
        return [SimpleNamespace(hydra_cfg=OmegaConf.create(ended)), lost][: len(batch)]

    search._launcher, search._num_places = Mock(launch=launch), 2
    search.sweep([SETTINGS[0], SPACE])
    assert batches == [0, 2]
    assert states(tmp_path) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "trial 1: failed (its launcher gave nothing back (it was lost)); the search goes on" in caplog.messages


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("hydra.sweeper.sampler=tpee", "hydra.sweeper.sampler=tpee is not known; allowed: tpe, random, gp, nsgaii"),
        ("hydra.sweeper.n_trials=x", "hydra.sweeper.n_trials=x must be a whole number"),
        ("hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials=0 must be at least 1"),
        ("hydra.sweeper.n_jobs=2", "hydra.sweeper.n_jobs=2, but the launcher has places for 1 jobs"),
        ("objective={val/loss:null}", "a search needs something to judge trials by"),
        ("objective={val/loss:down}", "objective={val/loss:down} is no direction; allowed: minimize, maximize"),
        ("objective={fdd:minimize}", "objective=fdd is neither a held-out mean"),
        ("objective={fd:minimize} hydra.sweeper.pruner=median", "hydra.sweeper.pruner=median judges a training by one"),
        ("objective={val/loss:null,kd:minimize} hydra.sweeper.pruner=median", "hydra.sweeper.pruner=median: kd is no"),
        ("trainer.devices=2 hydra.sweeper.pruner=median", "hydra.sweeper.pruner=median cannot prune a training on sev"),
        ("optim.lr=1e-3", "a search needs a space"),
        ("optim.lrr=1,2", "a trial cannot be composed: Key 'lrr' is not in struct"),
        ("hydra.sweeper.storage=sqlite://", "hydra.sweeper.storage=sqlite:// keeps nothing"),
        ("hydra.sweeper.storage=nosuch://x", "the study's storage nosuch://x cannot be opened"),
        ("hydra.sweeper.storage=mysql://a:b@c/d hydra.sweeper.pruner=median", "hydra.sweeper.storage= holds a password"),
    ],
)  # fmt: skip
def test_mistake_is_refused_before_anything_is_trained(search, actor, overrides, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        search(*overrides.split())
    assert not actor.trained


def test_pruning_needs_a_launcher_of_ours(tmp_path):
    search = new_search(tmp_path, "hydra.sweeper.pruner=median")
    search._launcher = Mock()
    with pytest.raises(UserError, match=r"hydra\.sweeper\.pruner=median needs a launcher of ours"):
        search.sweep([SETTINGS[0], SPACE])


def test_a_mistake_ends_the_command_in_one_sentence(tmp_path):
    line = ("-m", "hydra/sweeper=optuna", "optim.lr=1,2", "objective={fdd:minimize}", f"hydra.sweep.dir={tmp_path}/sweep")
    said = call("train", *line)
    assert said.code == 1
    assert said.text.startswith("error: objective=fdd is neither a held-out mean")
    assert said.text.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("search=vae", "search=vae is a sweep: python -m src.train -m search=vae"),
        ("-m search=vae,dcgan", "search=vae,dcgan is a sweep: one at a time"),
        ("-m search=vae model=dcgan", "optim.lr is not a key of the config; did you mean optim.generator.lr?"),
        (
            "-m optim.lr=interval(0,1)",
            "optim.lr=interval(0,1) has no end of values to try one by one; search it with",
        ),
        ("-m seed=range(0,0)", "seed=range(0,0) names no value"),
        ("-m model=glob(zzz*)", "model=glob(zzz*) names no value"),
        (
            "-m seed=choice()",
            "seed=choice() cannot be understood: ValueError while evaluating 'choice()': empty choice is not legal",
        ),
    ],
)
def test_what_is_no_sweep_ends_in_one_sentence(tmp_path, arguments, sentence):
    said = call("train", *arguments.split(), f"hydra.sweep.dir={tmp_path}/sweep", f"hydra.run.dir={tmp_path}/run")
    assert said.code == 1
    assert said.text.startswith(f"error: {sentence}")
    assert not list(tmp_path.iterdir())


def test_without_optuna_one_sentence_names_the_command(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "optuna" else found(name, *more))
    with pytest.raises(UserError, match=r"^hydra/sweeper=optuna needs Optuna: make extra EXTRA=optuna$"):
        new_search(tmp_path)


def test_another_objective_or_other_options_need_another_study(search):
    search("hydra.sweeper.n_trials=1", "model.latent_dim=2,3")
    with pytest.raises(UserError, match="differs from what the study has tried"):
        search("hydra.sweeper.n_trials=2", "model.latent_dim=2,4")
    with pytest.raises(UserError, match="is judged by val/loss minimize, not by val/loss minimize, fd minimize"):
        search("hydra.sweeper.n_trials=2", "model.latent_dim=2,3", "objective={fd:minimize}")


def test_a_password_is_not_shown():
    assert shown_storage("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"


# --- trainings that are given up -------------------------------------------------------------------------------------


def trainer_of(epoch: int, **measured: float) -> SimpleNamespace:
    light = LightEvaluation(Mock(), every_n_validations=1, num_samples=2, metrics=["fd"])
    light.latest = {name: value for name, value in measured.items() if name == "fd"} or None
    values = {f"val/{name}": torch.tensor(value) for name, value in measured.items() if name != "fd"}
    return SimpleNamespace(
        world_size=1, current_epoch=epoch - 1, max_epochs=9, should_stop=False, callback_metrics=values, callbacks=[light]
    )


def prune_of(storage: str, trial: int, quantity: str = "val/loss") -> Prune:
    return Prune(storage, "s", trial, quantity, "median", n_startup_trials=1, n_warmup_epochs=0)


@pytest.fixture
def storage(tmp_path) -> str:
    """A study of one finished trial, whose loss was 3, 2, 1 at epochs 1, 2, 3, and of two that run."""
    path = str(tmp_path / "study.journal")
    study = optuna.create_study(study_name="s", storage=open_storage(path))
    finished = study.ask()
    for epoch in (1, 2, 3):
        finished.report(4.0 - epoch, epoch)
    study.tell(finished, 1.0)
    study.ask()
    study.ask()
    return path


def validate(callback: Prune, trainer: SimpleNamespace) -> None:
    callback.on_validation_end(trainer, None)
    callback.on_train_epoch_end(trainer, None)


@pytest.mark.parametrize(("quantity", "name"), [("val/loss", "loss"), ("light_evaluation/fd", "fd")])
def test_a_training_worse_than_the_median_is_given_up(storage, quantity, name):
    callback = prune_of(storage, 1, quantity)
    callback.on_fit_start(trainer_of(1), None)
    validate(callback, trainer_of(1, **{name: 2.5}))
    with pytest.raises(PrunedError, match=f"{quantity} 2.4 at epoch 2, by the median pruner"):
        validate(callback, trainer_of(2, **{name: 2.4}))
    trial = optuna.load_study(study_name="s", storage=open_storage(storage)).trials[1]
    assert trial.intermediate_values == pytest.approx({1: 2.5, 2: 2.4})


def test_a_training_is_not_given_up_at_its_end_or_after_its_trial(storage):
    callback = prune_of(storage, 1)
    callback.on_fit_start(trainer_of(1), None)
    validate(callback, trainer_of(9, loss=99.0))
    late = prune_of(storage, 0)
    late.on_fit_start(trainer_of(1), None)
    validate(late, trainer_of(2, loss=99.0))


def test_a_validation_without_light_evaluation_reports_nothing(storage):
    callback = prune_of(storage, 1, "light_evaluation/fd")
    callback.on_fit_start(trainer_of(1), None)
    validate(callback, trainer_of(2))
    assert not optuna.load_study(study_name="s", storage=open_storage(storage)).trials[1].intermediate_values


def test_what_cannot_be_reported_is_said(storage, tmp_path):
    callback = prune_of(storage, 1, "val/los")
    callback.on_fit_start(trainer_of(1), None)
    with pytest.raises(UserError, match="a search cannot prune by val/los, which is not measured; allowed: val/loss"):
        validate(callback, trainer_of(2, loss=1.0))
    too_few = trainer_of(2)
    too_few.callbacks[0].latest = {}
    callback = prune_of(storage, 2, "light_evaluation/fd")
    callback.on_fit_start(too_few, None)
    with pytest.raises(UserError, match=r"light_evaluation/fd, which is not measured; allowed: none \(some need more sam"):
        validate(callback, too_few)
    with pytest.raises(UserError, match="has no trial 7"):
        prune_of(storage, 7).on_fit_start(trainer_of(1), None)
    several = trainer_of(1)
    several.world_size = 2
    with pytest.raises(UserError, match="a training on 2 devices is not pruned"):
        prune_of(storage, 1).on_fit_start(several, None)


def test_the_search_gives_its_trainings_a_pruner_without_changing_what_they_are(search, actor, tmp_path):
    search("hydra.sweeper.n_trials=1", "hydra.sweeper.pruner=median")
    (path,) = actor.trained
    given = Run(path).config().callback.prune
    assert (given.trial, given.quantity) == (0, "val/loss")
    search("hydra.sweeper.n_trials=1")
    assert len(actor.trained) == 1  # the same run


# --- held-out means --------------------------------------------------------------------------------------------------


def test_held_out_means_are_those_of_the_checkpoint(tmp_path):
    callback = HeldOutMeans()
    callback.on_validation_end(
        SimpleNamespace(callback_metrics={"val/loss": torch.tensor(2.0), "train_epoch/loss": 3}), None
    )
    torch.save({"callbacks": {HeldOutMeans().state_key: callback.state_dict()}}, tmp_path / "best.ckpt")
    assert held_out_means(tmp_path / "best.ckpt") == {"val/loss": 2.0}
    resumed = HeldOutMeans()
    resumed.load_state_dict(callback.state_dict())
    assert resumed.state_dict() == {"val/loss": 2.0}
    assert isinstance(resumed, L.Callback)


# --- the shipped searches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", options("search"))
def test_shipped_search_is_ready(name):
    """Its space is one, and its corners can be composed; it is pruned by what its trainings measure."""
    written = OmegaConf.load(CONF / "search" / f"{name}.yaml")
    space = read_space(written.hydra.sweeper.params, [], None)
    assert not space.fixed
    for end in (0, -1):
        corner = {key: _values(distribution)[end] for key, distribution in space.distributions.items()}
        config = compose_config(f"search={name}", *space.overrides(corner))
    assert written.hydra.sweeper.pruner == "median"
    (objective,) = config.objective
    assert objective.startswith("val/") or (
        objective in config.metric and objective in config.callback.light_evaluation.metrics
    )


def _values(distribution: Any) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [distribution.low, distribution.high]


@pytest.mark.slow
def test_a_killed_search_of_real_trainings_goes_on_and_prunes(tmp_path):
    command = [
        sys.executable, "-m", "src.train", "-m", "search=vae", "trainer.max_epochs=12", "trainer.val_every_n_epochs=2",
        "trainer.accelerator=cpu", "metric=[test_loss]", "callback.light_evaluation.metrics=[]", "hydra.sweeper.n_trials=6",
        "hydra.sweeper.n_startup_trials=2", f"hydra.sweep.dir={tmp_path}/sweep",
    ]  # fmt: skip
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while time.monotonic() < end and len(list(tmp_path.glob("sweep/*/checkpoints/last.ckpt"))) < 2:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert "RUNNING" in states(tmp_path)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = trials(tmp_path)
    assert len(found) == 6
    assert {trial.state for trial in found} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert len(list(tmp_path.glob("sweep/*/status.json"))) == 6
    pruned = [json.loads(file.read_text()) for file in tmp_path.glob("sweep/*/status.json") if "pruned" in file.read_text()]
    assert all("by the median pruner" in status["reason"] for status in pruned)
    assert pruned


@pytest.mark.parametrize("content", ["SQLite format 3\x00", "a note", '{"a": 1}', "[]"])
def test_a_file_that_is_no_study_is_refused_and_left_as_it_is(content, tmp_path):
    file = tmp_path / "study.db"
    file.write_text(content)
    for may_write in (True, False):
        with pytest.raises(UserError, match="is no journal of a study, and is left as it is"):
            open_storage(str(file), may_write)
    assert file.read_text() == content
