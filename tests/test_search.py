"""Searches: the space, the life of a study, trainings that are given up, what is refused. Trainings are acted, but one."""

import csv
import importlib.util
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf

from src.core.errors import PrunedError, UserError
from src.runs import Run
from src.search_space import Space, read_space
from src.training.callbacks.held_out_means import HeldOutMeans, held_out_means
from tests.commands import ROOT, Said, call
from tests.configs import CONF, options

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


def test_numbers_are_short_and_stay_inside_their_interval():
    space = read_space({"a": "interval(0.9,0.99996)", "n": "int(interval(1,9))", "o": "x,y"}, [], None)
    assert space.overrides({"a": 0.912345, "n": 3, "o": "y"}) == ["a=0.9123", "n=3", "o=y"]
    assert space.overrides({"a": 0.99996, "n": 3, "o": "y"})[0] == "a=0.99996"


# --- the life of a study ---------------------------------------------------------------------------------------------

SEARCH = (
    "-m", "hydra/sweeper=optuna", "objective={val/loss:minimize}", "optim.lr=tag(log,interval(1e-4,1e-1))",
    "hydra.sweeper.n_startup_trials=3", "metric=[fd,kd]",
)  # fmt: skip


class Actor:
    """Ends trainings at once, as it is told; in place of `JobProcess`."""

    def __init__(self) -> None:
        self.trained: list[Path] = []
        self.act: Callable[[Run], None] = well

    def process(self, directory: Path, output: Path | None, environment: dict[str, str]) -> Mock:
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
def search(actor, tmp_path) -> Callable[..., Said]:
    return lambda *more: call("train", *SEARCH, f"hydra.sweep.dir={tmp_path}/sweep", *more)


def trials(tmp_path: Path) -> list[optuna.trial.FrozenTrial]:
    storage = open_storage(str(tmp_path / "sweep/study.journal"))
    return optuna.load_study(study_name="search", storage=storage).trials


def states(tmp_path: Path) -> list[str]:
    return [trial.state.name for trial in trials(tmp_path)]


def test_a_search_finds_the_best_and_says_how_to_train_it_once_more(search, actor, tmp_path):
    said = search("hydra.sweeper.n_trials=9", "seed=4")
    assert said.code == 0, said.text
    assert len(actor.trained) == 9
    best = min(trials(tmp_path), key=lambda trial: trial.value)
    assert best.value < 0.5
    (entry,) = OmegaConf.load(tmp_path / "sweep/best.yaml")
    assert entry.trial == best.number
    assert entry.command.startswith("python -m src.train model=vae data=digits 'metric=[fd,kd]' seed=4 optim.lr=")
    assert "beyond" not in entry
    assert f"best trial {best.number}: val/loss" in said.text
    rows = list(csv.DictReader((tmp_path / "sweep/trials.csv").open()))
    assert [row["state"] for row in rows] == ["complete"] * 9


def test_typed_again_it_runs_nothing_and_with_more_trials_the_rest(search, actor, tmp_path):
    search("hydra.sweeper.n_trials=3")
    assert "0 of 3 trials to run" in search("hydra.sweeper.n_trials=3").text
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
    said = search("hydra.sweeper.n_trials=5")
    assert "3 of 5 trials to run" in said.text
    assert states(tmp_path) == ["COMPLETE"] * 5
    assert actor.trained[2] == actor.trained[3]
    undisturbed = call("train", *SEARCH, f"hydra.sweep.dir={tmp_path}/other", "hydra.sweeper.n_trials=5")
    assert undisturbed.code == 0
    assert [path.name for path in actor.trained[-5:]] == list(dict.fromkeys(path.name for path in actor.trained[:6]))


def test_a_training_that_ended_while_nobody_looked_is_told_without_another_one(search, actor, tmp_path):
    def end_and_kill(run: Run) -> None:
        well(run)
        raise Killed

    actor.act = end_and_kill
    with pytest.raises(Killed):
        search("hydra.sweeper.n_trials=1")
    assert search("hydra.sweeper.n_trials=1").code == 0
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
    assert "trial 0: failed (out of memory); the search goes on" in said.text
    assert "trial 2: failed (val/loss is nan); the search goes on" in said.text
    assert "search: 1 complete, 2 failed, 1 pruned" in said.text

    search("hydra.sweeper.n_trials=4")
    assert len(actor.trained) == 4
    search("hydra.sweeper.n_trials=4", "retry_failed=true")  # only that of the failed training
    assert states(tmp_path) == ["FAIL", "PRUNED", "FAIL", "COMPLETE", "COMPLETE"]
    assert actor.trained[4] == actor.trained[0]


def test_a_metric_that_does_not_apply_fails_the_trial_with_its_reason(search):
    said = search("hydra.sweeper.n_trials=1", "objective={val/loss:null,kd:minimize}")
    assert "trial 0: failed (kd is nan; too few)" in said.text
    assert "no trial has ended well" in said.text


def test_the_same_parameters_are_trained_once(search, actor, tmp_path):
    search("hydra.sweeper.n_trials=5", "optim.lr=1e-3,1e-2", "hydra.launcher.n_jobs=2")
    assert states(tmp_path) == ["COMPLETE"] * 5
    assert len(actor.trained) == 2


def test_several_objectives_have_a_front(search, tmp_path):
    said = search("hydra.sweeper.n_trials=8", "objective={fd:maximize}", "hydra.sweeper.sampler=nsgaii")
    front = OmegaConf.load(tmp_path / "sweep/best.yaml")
    assert len(front) >= 2, said.text
    assert set(front[0]["values"]) == {"val/loss", "fd"}
    assert "are on the front" in said.text


def test_a_study_in_a_data_base_goes_on(search, actor, tmp_path):
    storage = f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db"
    assert search("hydra.sweeper.n_trials=2", storage).code == 0
    assert "1 of 3 trials to run" in search("hydra.sweeper.n_trials=3", storage).text
    assert not (tmp_path / "sweep/study.journal").exists()


def test_plan_writes_nothing(search, actor, tmp_path):
    storage = f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db"
    assert "a new study" in search("plan=true", storage).text
    assert not list(tmp_path.iterdir())
    search("hydra.sweeper.n_trials=2")
    before = (tmp_path / "sweep/study.journal").read_bytes()
    said = search("plan=true", "hydra.sweeper.n_trials=5")
    assert "2 complete; 3 are left" in said.text
    assert "varied    optim.lr=tag(log,interval(1e-4,1e-1))" in said.text
    assert (tmp_path / "sweep/study.journal").read_bytes() == before
    assert len(actor.trained) == 2


def test_half_a_line_of_a_killed_process_does_not_damage_the_journal(search, tmp_path):
    search("hydra.sweeper.n_trials=1")
    with (tmp_path / "sweep/study.journal").open("a") as file:
        file.write('{"op_code": 4')
    assert search("hydra.sweeper.n_trials=2").code == 0
    assert states(tmp_path) == ["COMPLETE"] * 2


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("hydra.sweeper.sampler=tpee", "hydra.sweeper.sampler=tpee is not known; allowed: tpe, random, gp, nsgaii"),
        ("hydra.sweeper.n_trials=x", "hydra.sweeper.n_trials=x must be a whole number"),
        ("hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials=0 must be at least 1"),
        ("hydra.sweeper.n_jobs=2", "hydra.sweeper.n_jobs=2, but the launcher has places for 1 jobs"),
        ("hydra.sweeper.samplerr=x", "hydra.sweeper.samplerr is not a key of the config; did you mean hydra.sweeper.s"),
        ("objective={val/loss:null}", "a search needs something to judge trials by"),
        ("objective={val/loss:down}", "objective={val/loss:down} is no direction; allowed: minimize, maximize"),
        ("objective={fdd:minimize}", "objective=fdd is neither a held-out mean"),
        ("objective={fd:minimize} hydra.sweeper.pruner=median", "hydra.sweeper.pruner=median judges a training by one"),
        ("objective={val/loss:null,kd:minimize} hydra.sweeper.pruner=median", "hydra.sweeper.pruner=median: kd is no"),
        ("hydra.sweeper.pruner=median hydra/launcher=basic", "hydra.sweeper.pruner=median needs a launcher of ours"),
        ("hydra.sweeper.storage=sqlite://", "hydra.sweeper.storage=sqlite:// keeps nothing"),
        ("hydra.sweeper.storage=nosuch://x", "the study's storage nosuch://x cannot be opened"),
        ("hydra.sweeper.storage=mysql://a:b@c/d hydra.sweeper.pruner=median", "hydra.sweeper.storage= holds a password"),
    ],
)  # fmt: skip
def test_mistake_ends_in_one_sentence(search, actor, tmp_path, overrides, sentence):
    said = search(*overrides.split())
    assert said.code == 1
    assert said.text.strip().startswith(f"error: {sentence}")
    assert not actor.trained


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
        ("-m hydra/sweeper=optuna objective={val/loss:minimize} seed=1", "a search needs a space"),
        ("-m seed=range(0,0)", "seed=range(0,0) names no value"),
        ("-m model=glob(zzz*)", "model=glob(zzz*) names no value"),
        ("-m seed=choice()", "ValueError while evaluating 'choice()': empty choice is not legal"),
    ],
)
def test_what_is_no_sweep_ends_in_one_sentence(tmp_path, arguments, sentence):
    said = call("train", *arguments.split(), f"hydra.sweep.dir={tmp_path}/sweep", f"hydra.run.dir={tmp_path}/run")
    assert said.code == 1
    assert said.text.startswith(f"error: {sentence}")
    assert not list(tmp_path.iterdir())


def test_without_optuna_one_sentence_names_the_command(search, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "optuna" else found(name, *more))
    assert search().text.strip() == "error: hydra/sweeper=optuna needs Optuna: make extra EXTRA=optuna"


def test_another_objective_or_other_options_need_another_study(search, tmp_path):
    search("hydra.sweeper.n_trials=1", "model.latent_dim=2,3")
    assert "differs from what the study has tried" in search("hydra.sweeper.n_trials=2", "model.latent_dim=2,4").text
    said = search("hydra.sweeper.n_trials=2", "model.latent_dim=2,3", "objective={fd:minimize}")
    assert "the study is judged by val/loss minimize, not by val/loss minimize, fd minimize" in said.text


def test_a_password_is_not_shown():
    assert shown_storage("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"


# --- trainings that are given up -------------------------------------------------------------------------------------


def trainer_of(epoch: int, **measured: float) -> SimpleNamespace:
    light = LightEvaluation(Mock(), every_n_validations=1, num_samples=2, metrics=["fd"])
    light.latest = {name: value for name, value in measured.items() if name == "fd"}
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
    assert len(actor.trained) == 1


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


def test_a_run_keeps_the_means_of_its_best_checkpoint(trained):
    run = trained("vae").run
    assert run.validation() == held_out_means(run.checkpoint("auto"))
    assert run.validation()["val/loss"] > 0


# --- the shipped searches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", options("search"))
def test_shipped_search_is_ready(name, tmp_path):
    said = call("train", "-m", f"search={name}", "plan=true", f"hydra.sweep.dir={tmp_path}/sweep")
    assert said.code == 0, said.text
    assert "a new study" in said.text
    assert "pruner median by" in said.text
    params = OmegaConf.load(CONF / "search" / f"{name}.yaml").hydra.sweeper.params
    space = read_space(params, [], None)
    assert isinstance(space, Space)
    assert not space.fixed


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
