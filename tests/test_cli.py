"""The command line: mistakes end in one sentence, at once; a config builds what it may name and nothing else."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from src.build import build, build_model
from src.core.errors import UserError
from tests.commands import ROOT, Said, call
from tests.configs import CONF, compose_model
from tests.examples import image_spec

LIMIT_S = 2

# --- mistyped names --------------------------------------------------------------------------------------------------


MISTAKES = [
    (["train", "model=vaee"], "model=vaee does not exist; did you mean vae?; allowed: audio_vae, "),
    (["train", "dta=mnist"], "dta is not a key of the config; did you mean data?"),
    (["train", "seeed=2"], "seeed is not a key of the config; did you mean seed?"),
    (["train", "model.latent_dimm=3"], "model.latent_dimm is not a key of the config; did you mean model.latent_dim?"),
    (["train", "-m", "model=vae,dcgann"], "model=dcgann does not exist; did you mean dcgan?"),
    (["train", "data=image_folder"], "data.path must be given: data.path=..."),
    (
        ["train", "callback.light_evaluation.metrics=[fd,fdd]"],
        "callback.light_evaluation.metrics: fdd is not a metric; allowed: accuracy, ",
    ),
    (["evaluate"], "run must be given: run=..."),
    (["sample", "run=/no/such/run"], "run=/no/such/run does not exist; give the directory of a run"),
]
HELPS = [[command, "--help"] for command in ("train", "evaluate", "sample")]


@pytest.fixture(scope="module")
def quick() -> Callable[[list[str]], Said]:
    """What a command says that must end before anything heavy is imported: all of them were called in one new process.

    (Their own seconds count, not those of a busy machine.)
    """
    lines = [line for line, _ in MISTAKES] + HELPS
    program = [sys.executable, "-m", "tests.light_process"]
    done = subprocess.run(
        program, cwd=ROOT, input=json.dumps(lines), capture_output=True, text=True, timeout=300, check=True
    )
    found = dict(zip(map(tuple, lines), json.loads(done.stdout), strict=True))

    def said(line: list[str]) -> Said:
        ended = found[tuple(line)]
        assert ended["imported"] == []
        assert ended["cpu_seconds"] < LIMIT_S
        return Said(ended["code"], ended["text"])

    return said


@pytest.mark.parametrize(
    ("arguments", "sentence"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_mistake_ends_at_once_before_torch_is_imported(quick, arguments, sentence):
    said = quick(arguments)
    assert said.code == 1
    assert said.text.startswith(f"error: {sentence}")
    assert said.text.count("\n") == 1


@pytest.mark.parametrize("line", HELPS, ids=" ".join)
def test_help_comes_at_once(quick, line):
    said = quick(line)
    assert said.code == 0
    assert "== Config ==" in said.text


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("data=digit", "data=digit does not exist; did you mean digits?"),
        ("likelihood=bernouli", "likelihood=bernouli does not exist; did you mean bernoulli?"),
        ("network@encoder=mpl", "network=mpl does not exist; did you mean mlp?"),
        ("model=gan optim@optim.generator=adm", "optim=adm does not exist; did you mean adam?"),
        ("metric=[fd,css]", "metric=css does not exist; did you mean cs?"),
        ("model=null", "model=None does not exist"),
        ("trainr.max_epochs=3", "trainr.max_epochs is not a key of the config; did you mean trainer.max_epochs?"),
        ("trainer.max_epoch=3", "trainer.max_epoch is not a key of the config; did you mean trainer.max_epochs?"),
        ("model=gan training.ncritic=2", "training.ncritic is not a key of the config; did you mean training.n_critic?"),
        ("model=gan optim.lr=1", "optim.lr is not a key of the config; did you mean optim.generator.lr?"),
        ("model=gan optim=adam", "optim is not a key of the config; did you mean optim@optim.generator?"),
        ("model=gmm optim=adam", "optim is not a key of the config\n"),
        ("optim@part=adam", "optim@part is not a key of the config; did you mean optim?"),
        ("model=gan network@encoder=mlp", "network@encoder is not a key of the config; did you mean network@generator?"),
        ("encoder.hiden=[3]", "encoder.hiden is not a key of the config; did you mean encoder.hidden?"),
        ("-m optim.lrr=1,2", "optim.lrr is not a key of the config; did you mean optim.lr?"),
        ("-m model=vae,gan data=digits,digts", "data=digts does not exist; did you mean digits?"),
        ("-m model=vae,gan optim.lr=1e-3", "optim.lr is not a key of the config"),
        ("-m model=glob(*) optim.lrr=1", "optim.lrr is not a key of the config"),
        ("-m hydra.job.num=0,1 model=vae,dcgann", "model=dcgann does not exist"),
        ("optim.lr=abc", "optim.lr=abc must be a number, as in optim.lr=0.001"),
        ("seed=", "seed= must be a whole number, as in seed=0"),
        ("seed=true", "seed=True must be a whole number, as in seed=0"),
        ("model.latent_dim=2.5", "model.latent_dim=2.5 must be a whole number, as in model.latent_dim=20"),
        ("-m trainer.max_epochs=2,1.5", "trainer.max_epochs=1.5 must be a whole number, as in trainer.max_epochs=200"),
        ("+trianer.max_epochs=3", "trianer is not a part of the config, so nothing would read it; did you mean trainer?"),
        ("++pictures.seed=3", "pictures is not a part of the config, so nothing would read it"),
        ("encoder.hidden=3", "encoder.hidden=3 must be a list, as in encoder.hidden=[400]"),
        ("data=mnist data.download=perhaps", "data.download=perhaps must be true or false"),
        ("seed=[1", "no viable alternative at input '[1'"),
    ],
)
def test_mistake_is_named_with_the_nearest_valid_name(tmp_path, overrides, sentence):
    said = call("train", *overrides.split(), f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/sweep")
    assert said.code == 1
    assert said.text.startswith(f"error: {sentence}")
    assert list(tmp_path.iterdir()) == []


def test_number_with_a_fraction_may_be_given_as_a_whole_one(tmp_path):
    said = call("train", "optim.lr=1", "training.ema_half_life_examples=1e4", "model=gan", "--cfg=job")
    assert "did you mean optim.generator.lr?" in said.text  # so that what follows is known to be checked
    said = call("train", "optim.generator.lr=1", "training.ema_half_life_examples=1e4", "model=gan", "--cfg=job")
    assert said.code == 0, said.text


@pytest.fixture
def experiment(tmp_path, monkeypatch) -> Callable[[str], str]:
    """`experiment(text)`: the override that chooses an experiment of that text, in a copy of the configs."""
    shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr("src.cli.CONF", tmp_path / "conf")

    def written(text: str) -> str:
        (tmp_path / "conf" / "experiment" / "this.yaml").write_text(f"# @package _global_\n{text}")
        return "experiment=this"

    return written


def test_unknown_part_in_an_experiment_is_named(tmp_path, experiment):
    said = call("train", experiment("trianer: {max_epochs: 1}"), "metric=[]", f"hydra.run.dir={tmp_path}/run")
    assert said.code == 1
    assert said.text.startswith(
        "error: trianer is not a part of the config, so nothing would read it; did you mean trainer?"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("addition", ["+callback.more._target_=x", "+encoder.depth=3", "data=mnist", "metric=[cs]"])
def test_experiment_and_additions_below_known_parts_are_taken(experiment, addition):
    chosen = experiment("defaults:\n  - override /model: gan\ngenerator: {hidden: [3]}\ntrainer: {max_epochs: 1}")
    few_metrics = () if "metric" in addition else ("metric=[]",)  # read faster than all
    said = call("train", chosen, addition.replace("encoder", "discriminator"), *few_metrics, "--cfg=job")
    assert said.code == 0, said.text
    assert "max_epochs: 1\n" in said.text


def test_arguments_with_dashes_are_hydras_own():
    said = call("train", "--config-name=config", "--cfg=job", "seed=3")
    assert said.code == 0, said.text
    assert "seed: 3\n" in said.text


@pytest.mark.parametrize("group", sorted(folder.name for folder in CONF.iterdir() if folder.is_dir()))
def test_unknown_option_of_any_group_is_refused(tmp_path, group):
    said = call("train", f"{group}=no_such_option", f"hydra.run.dir={tmp_path}/run")
    assert said.code == 1
    assert said.text.startswith(f"error: {group}=no_such_option does not exist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_directory_that_is_no_run_is_refused_and_left_alone(tmp_path, command):
    (tmp_path / "config.yaml").write_text("seed: 0")
    said = call(command, f"run={tmp_path}")
    assert said.code == 1
    assert said.text.startswith(f"error: run={tmp_path} is not a run directory (it has no status.json)")
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


# --- what a config may build -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.run",
        "hydra.utils.instantiate",
        "torch.load",
        "torch.hub.load",
        "src.runs.os.system",  # another package's, through ours
        "src.runs.subprocess.run",
        "src.build.instantiate",
        "torch.nn.functional.torch.load",
        "torch.optim.optimizer.torch.load",
        "lightning.pytorch.loggers.tensorboard.os.system",
        "lightning.pytorch.LightningModule.load_from_checkpoint",  # unpickles
        "lightning.pytorch.core.saving._load_from_checkpoint",
        "src.runs._git",  # git -c alias.x=!command x
        "src.runs.Run.create",
        "src.runs",
        "torch.nn",
    ],
)
@pytest.mark.parametrize("nest", [lambda node: node, lambda node: {"a": [{"b": node}]}], ids=["top", "nested"])
def test_only_own_parts_and_those_of_torch_are_built(target, nest):
    with pytest.raises(UserError, match=re.escape(f"_target_={target} may not be built; a config may name")):
        build(nest({"_target_": target, "_args_": ["touch pwned"]}))


def test_refusal_comes_before_anything_is_built():
    nodes = {"first": {"_target_": f"{__name__}.never"}, "second": {"_target_": "os.system", "_args_": ["true"]}}
    with pytest.raises(UserError, match="may not be built"):
        build(nodes)


@pytest.mark.parametrize("reference", ["${oc.create:{_target_:joblib.load}}", "${oc.env:HOME}", "${model}"])
def test_reference_that_would_be_resolved_after_the_check_is_refused(reference):
    for node in ({"batch_size": reference}, {"parts": [{"deep": reference}]}, {reference: 1}):
        with pytest.raises(UserError, match="holds a reference that is not resolved"):
            build(node)


def never() -> None:
    raise AssertionError("it was called")


@pytest.mark.parametrize("target", ["src.models.vae.VEA", "src.models.vea.VAE", "torch.nn.Liner", "src.models.vae..VAE"])
def test_target_that_does_not_exist_is_named(target):
    with pytest.raises(UserError, match=f"_target_={re.escape(target)} does not exist"):
        build({"_target_": target})


@pytest.mark.parametrize(
    ("node", "word"),
    [
        ({"_target_": "torch.nn.LeakyReLU", "slope": 0.1}, "slope"),
        ({"_target_": "src.networks.mlp.MLP", "hidden": [3]}, "in_shape"),
        ({"a": {"_target_": "src.data.digits.digits", "cash": "x", "values": "discrete"}}, "cash"),
    ],
)
def test_wrong_arguments_are_explained_in_one_sentence(node, word):
    with pytest.raises(UserError, match=word) as caught:
        build(node)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["seed=0,1 plan=true --multirun", "seed=0,1 -m plan=true"])
def test_the_flag_of_a_sweep_may_stand_anywhere(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call("train", *line.split())
    assert said.code == 0, said.text
    assert "plan: 2 of 2 jobs would run" in said.text


def test_wrong_argument_of_a_part_is_named_with_the_model_before_it_is_built():
    config = compose_model("model=vae", "+encoder.depth=3")
    with pytest.raises(UserError, match=r"model=vae .*encoder\.depth is not an argument of .*MLP; allowed: .*hidden"):
        build_model(config.model, image_spec((1, 8, 8), "discrete"), "vae")


def test_wrong_argument_of_what_is_called_later_is_named_at_once():
    with pytest.raises(UserError, match=r"momentum is not an argument of torch\.optim\.Adam; allowed: .*betas"):
        build(compose_model("model=vae", "+optim.momentum=0.9").optim)


def test_node_without_a_target_is_a_dict_of_what_it_holds():
    built = build({"lr": 0.1, "activation": {"_target_": "torch.nn.ReLU"}, "betas": [0.5, 0.9]})
    assert built["lr"] == 0.1
    assert type(built["activation"]).__name__ == "ReLU"
    assert type(built["betas"]) is list
