"""Densities on the latents of another run's autoencoder."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from src.build import build
from src.claim import claim
from src.core.batch import Batch
from src.core.drawing import Sampler
from src.core.errors import UserError
from src.core.protocols import CanDecode, CanEncode
from src.core.rng import SampleNoise, StreamNoise
from src.core.spec import BINARY_STATIC, DISCRETE
from src.experiment import load_autoencoder, load_data, load_data_of, load_model, load_trained_model, require_same_data
from src.jobs import named
from src.models.autoencoder import Autoencoder
from src.models.classifier import Classifier
from src.models.gmm import GaussianMixture
from src.models.latent import Latent, fit_on_latents
from src.networks.mlp import MLP
from src.runs import Run
from tests.commands import Said, call
from tests.configs import compose_config, compose_model
from tests.examples import image_spec, vector_spec

SHORT = ("trainer.max_steps=6", "metric=[fd_pca]", "callback.light_evaluation.metrics=[]", "evaluation.num_samples=50")


def mlp(in_shape, out_shape, condition_dim=0):
    return MLP(in_shape, out_shape, hidden=[8], activation=torch.nn.SiLU(), condition_dim=condition_dim)


def latent_of_vectors() -> Latent:
    spec = vector_spec(5)
    autoencoder = Autoencoder(spec, mlp, mlp, latent_dim=3)
    return fit_on_latents(spec, autoencoder, "autoencoder", lambda latents: GaussianMixture(latents, num_components=2))


def examples(count: int = 200) -> list[Batch]:
    x = 3 + 2 * SampleNoise(1).normal((count, 5), torch.zeros(()))
    return [Batch(part) for part in x.split(64)]


def test_density_sees_standardized_latents(same_weights):
    model = latent_of_vectors()
    batches = examples()
    model.prepare(lambda: batches, generator=StreamNoise(0))
    z = torch.cat([model.encode(batch.x) for batch in batches])
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_codes_and_decodings_are_the_autoencoders_but_for_the_scale(same_weights):
    model = latent_of_vectors()
    batches = examples()
    model.prepare(lambda: batches, generator=StreamNoise(0))
    x = batches[0].x
    torch.testing.assert_close(model.reconstruct(x), model.autoencoder.reconstruct(x))


def test_the_autoencoder_stays_as_it_is(same_weights):
    model = latent_of_vectors().train()
    assert model.density.training
    assert not model.autoencoder.training
    assert not any(weight.requires_grad for weight in model.autoencoder.parameters())


def test_a_model_without_a_decoder_is_refused():
    with pytest.raises(UserError, match=r"autoencoder= must be the run .* model=classifier has no CanEncode"):
        fit_on_latents(vector_spec(5), torch.nn.Linear(5, 3), "classifier", lambda latents: GaussianMixture(latents, 2))
    assert not hasattr(Classifier, "decode")


def test_run_must_be_given_and_be_one_of_the_same_data(trained, tmp_path):
    said = call("train", "model=latent", f"hydra.run.dir={tmp_path / 'a'}")
    assert said.code == 1
    assert "autoencoder must be given: autoencoder=..." in said.text
    said = call("train", "model=latent", f"autoencoder={tmp_path / 'none'}", f"hydra.run.dir={tmp_path / 'b'}")
    assert said.code == 1
    assert f"autoencoder={tmp_path / 'none'} does not exist" in said.text
    run = trained("autoencoder").run.path
    said = call("train", "model=latent", f"autoencoder={run}", "data=ring", f"hydra.run.dir={tmp_path / 'c'}")
    assert said.code == 1
    assert "was trained on data=digits" in said.text


def test_run_holds_all_that_it_needs(trained, cache, tmp_path):
    given = tmp_path / "autoencoder"
    shutil.copytree(trained("autoencoder").run.path, given)
    folder = tmp_path / "run"
    said = call(
        "train", "model=latent", f"autoencoder={given}", "model.num_components=3", *SHORT,
        f"data.cache={cache}", f"hydra.run.dir={folder}",
    )  # fmt: skip
    assert said.code == 0, said.text
    run, of_first = Run.open(folder), Run.open(given)
    config = run.config()
    data = load_data(config)
    fresh = load_model(config, data.spec)
    load_autoencoder(fresh, config, data)
    shutil.rmtree(given)
    model, _ = load_trained_model(run, config, data.spec, "auto")
    for name, weight in model.autoencoder.state_dict().items():
        assert torch.equal(weight, fresh.autoencoder.state_dict()[name]), name
    assert not of_first.path.exists()
    assert call("evaluate", f"run={folder}", "metric=[fd_pca]").code == 0
    assert call("sample", f"run={folder}", "n=4").code == 0
    costs = run.results()["costs"]
    before = costs["autoencoder"]
    assert before["parameters"] == sum(weight.numel() for weight in model.autoencoder.parameters()) < costs["parameters"]
    assert before["training_seconds"] > 0
    assert "of the autoencoder's on" in said.text


# --- codes ------------------------------------------------------------------------------------------------------------


def on_latents_of_vectors(model: str, *overrides: str) -> Latent:
    """The density of a model's config on latents `(B, 3)` of vectors."""
    spec, keys = vector_spec(5), compose_model(f"model={model}", *overrides).model
    torch.manual_seed(0)
    latent = fit_on_latents(spec, Autoencoder(spec, mlp, mlp, latent_dim=3), "autoencoder", lambda of: build(keys)(spec=of))
    latent.prepare(lambda: examples(), generator=StreamNoise(0))
    return latent.eval()


@pytest.mark.parametrize("name", ["flow", "flow_matching", "vae"])
@torch.no_grad()
def test_where_the_density_decodes_noise_so_does_the_whole_and_between_samples_there_is_a_way(name):
    model = on_latents_of_vectors(name, *(["likelihood=gaussian"] if name == "vae" else []))
    assert isinstance(model, CanDecode)
    e = SampleNoise(0).normal((4, model.latent_dim), torch.zeros(()))
    assert torch.equal(model.decode(e), model.sample(4, generator=SampleNoise(0)))
    z = model.density.sample(4, generator=SampleNoise(0))
    assert torch.equal(model.decode(e), model.autoencoder.decode(model.mean + model.scale * z))
    rows = Sampler(model, 0, seed=0, batch_size=8).interpolations(2, 5)
    torch.testing.assert_close(rows[:, 0], model.sample(2, generator=SampleNoise(0)))
    torch.testing.assert_close(rows[:, -1], model.sample(4, generator=SampleNoise(0))[2:])
    truncated = Sampler(model, 0, seed=0, batch_size=8, truncation=0.0).samples(3)
    torch.testing.assert_close(truncated, model.decode(torch.zeros(3, model.latent_dim)))


@torch.no_grad()
def test_code_of_a_flow_on_latents_is_the_noise_that_gives_the_example():
    model, x = on_latents_of_vectors("flow"), examples()[0].x
    torch.testing.assert_close(model.decode(model.encode(x)), model.autoencoder.reconstruct(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.reconstruct(x), model.decode(model.encode(x)))


@torch.no_grad()
def test_where_the_density_has_no_such_noise_the_code_is_the_latent():
    for name, overrides in (("gmm", ()), ("ddpm", ("sampler=ancestral", "network=time_mlp"))):
        model, x = on_latents_of_vectors(name, *overrides), examples()[0].x
        assert isinstance(model, CanEncode), name
        assert not isinstance(model, CanDecode), name
        torch.testing.assert_close(model.decode(model.encode(x)), model.autoencoder.reconstruct(x))
    assert not isinstance(on_latents_of_vectors("flow_matching"), CanEncode)


def test_a_density_without_samples_or_a_loss_is_refused():
    spec = vector_spec(5)
    with pytest.raises(UserError, match=r"must draw samples and have a loss; choose gmm"):
        fit_on_latents(spec, Autoencoder(spec, mlp, mlp, 3), "autoencoder", lambda of: Autoencoder(of, mlp, mlp, 2))


# --- the other run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("table") / "some.npy", seed=0)


def write_table(path: Path, seed: int, unit: float = 1.0) -> Path:
    np.save(path, unit * np.random.default_rng(seed).normal(size=(80, 4)))
    return path


def tiny(directory: Path, cache: Path, table: Path, *overrides: str) -> Said:
    """Two steps on a table."""
    short = ("trainer.max_steps=2", "trainer.accelerator=cpu", "callback.light_evaluation.metrics=[]", "logger=csv")
    of_data = ("data=table", f"data.path={table}", f"data.cache={cache}", "metric=[reconstruction_error]")
    return call("train", *short, *of_data, f"hydra.run.dir={directory}", *overrides)


@pytest.fixture(scope="module")
def autoencoder(table, cache, tmp_path_factory) -> Run:
    """Of a table. Look at it, leave it as it is."""
    folder = tmp_path_factory.mktemp("of_table") / "autoencoder"
    small = ("model=autoencoder", "model.latent_dim=2", "encoder.hidden=[8]", "decoder.hidden=[8]")
    said = tiny(folder, cache, table, *small)
    assert said.code == 0, said.text
    return Run.open(folder)


def test_data_of_both_runs_are_the_same_to_the_byte(autoencoder, table, cache, tmp_path):
    cut = ("model=latent", f"autoencoder={autoencoder.path}", "model.num_components=2", "data.test=0.2")
    said = tiny(tmp_path / "cut", cache, table, *cut)
    assert said.code == 1
    assert "was trained on other data than this run: the fingerprint of the prepared examples was" in said.text
    assert Run(tmp_path / "cut").status()["status"] == "failed"


def test_data_that_changed_after_the_training_are_refused(autoencoder, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(autoencoder.path, run.path)
    moved, config = write_table(tmp_path / "some.npy", seed=0), run.config()
    config.data.path = str(moved)
    OmegaConf.save(config, run.path / "config.yaml")
    load_data_of(run, config)  # the same data elsewhere
    write_table(moved, seed=0, unit=2.0)  # the same standardized values
    own_units = r"have changed since its training: own_units\.shift \(in spec\.json\) was \(.* \.\.\., now \(.* \.\.\.; "
    with pytest.raises(UserError, match=own_units):
        load_data_of(run, config)
    write_table(moved, seed=1)
    sentence = "have changed since its training: the fingerprint of the prepared examples was"
    for command in (("evaluate", f"run={run.path}"), ("train", f"resume={run.path}", "trainer.max_steps=3")):
        said = call(*command)
        assert said.code == 1
        assert sentence in said.text
    old = json.loads((run.path / "spec.json").read_text())
    del old["fingerprint"]  # as in a run of an older version
    (run.path / "spec.json").write_text(json.dumps(old))
    load_data_of(run, config)


def test_other_values_of_the_same_data_are_named_by_their_key(tmp_path):
    run = Run(tmp_path)
    OmegaConf.save({}, tmp_path / "config.yaml")
    run.write_spec(image_spec((1, 8, 8), BINARY_STATIC).to_dict(), "f")
    now = SimpleNamespace(arrays=SimpleNamespace(fingerprint="f"), spec=image_spec((1, 8, 8), DISCRETE))
    with pytest.raises(UserError, match=r"since its training: data\.values was binary_static, now discrete; restore"):
        require_same_data(run, now)


def latent_of(path: Path | str, table: Path, job: Run | None = None, data: str = "table") -> DictConfig:
    """The config of a run on the latents of another one, as it is written down."""
    given = ("data=table", f"data.path={table}", "model=latent", f"autoencoder={path}", "model.num_components=2")
    hydra = OmegaConf.create({"runtime": {"choices": {"model": "latent", "data": data}}})
    return named(compose_config(*given), hydra, job)


def test_the_other_runs_checkpoint_is_pinned(autoencoder, table, cache, tmp_path, monkeypatch):
    given = tmp_path / "given"
    shutil.copytree(autoencoder.path, given)
    monkeypatch.chdir(tmp_path)
    config = latent_of("given", table)
    config.data.cache = str(cache)
    assert config.autoencoder.run == str(given)
    assert config.autoencoder.sha256 == latent_of(autoencoder.path, table).autoencoder.sha256
    monkeypatch.chdir("/")
    data = load_data(config)
    model = load_model(config, data.spec)
    load_autoencoder(model, config, data)
    Run(given).set_status("interrupted")
    load_autoencoder(model, config, data)
    with Run(given).checkpoint("auto").open("ab") as changed:
        changed.write(b"more")
    with pytest.raises(UserError, match=r"given has other weights .* begin a new run"):
        load_autoencoder(model, config, data)


def test_a_finished_job_needs_the_other_run_no_more(autoencoder, table, tmp_path):
    given, job = tmp_path / "given", Run(tmp_path / "job")
    shutil.copytree(autoencoder.path, given)
    job.path.mkdir()
    config = latent_of(given, table, job)
    Run.prepare(job.path, config, [])
    shutil.move(given, tmp_path / "away")
    with pytest.raises(UserError, match="does not exist"):  # it still waits
        latent_of(given, table, job)
    job.set_status("done")
    again = latent_of(given, table, job)
    assert again == config
    Run.prepare(job.path, again, [])
    with pytest.raises(UserError, match="does not exist"):
        latent_of(tmp_path / "another", table, job)
    shutil.move(tmp_path / "away", given)
    Run(given).set_status("running")
    with claim(given):  # it is trained further
        assert latent_of(given, table, job) == config
    Run(given).set_status("done")
    with Run(given).checkpoint("auto").open("ab") as changed:
        changed.write(b"more")
    with pytest.raises(
        UserError, match=r"has other weights than when .*job was trained on its latents; give the sweep another"
    ):
        latent_of(given, table, job)
    job.set_status("interrupted")
    (job.checkpoints / "last.ckpt").touch()
    shutil.rmtree(given)
    assert latent_of(given, table, job) == config


def test_the_place_of_the_other_run_and_its_costs_do_not_make_another_config(autoencoder, table, tmp_path):
    job = tmp_path / "job"
    job.mkdir()
    first = latent_of(autoencoder.path, table)
    Run.prepare(job, first, [])
    moved = first.copy()
    moved.autoencoder.run, moved.autoencoder.costs = "elsewhere", {}
    Run.prepare(job, moved, [])
    moved.autoencoder.sha256 = "another"
    with pytest.raises(UserError, match="holds a run of another config"):
        Run.prepare(job, moved, [])


def test_a_run_that_cannot_be_the_other_one_is_refused_in_a_sentence(autoencoder, table, tmp_path):
    given = Run(tmp_path / "given")
    shutil.copytree(autoencoder.path, given.path)
    given.set_status("running")
    latent_of(given.path, table)  # it was killed, and has a checkpoint
    with claim(given.path), pytest.raises(UserError, match="is still being trained; wait until it is done"):
        latent_of(given.path, table)
    with pytest.raises(UserError, match="was trained on data=table; choose it, instead of data=ring"):
        latent_of(given.path, table, data="ring")
    shutil.rmtree(given.checkpoints)
    with pytest.raises(UserError, match=r"has no checkpoint \(its status is running\); give a run that is done"):
        latent_of(given.path, table)
    OmegaConf.save(latent_of(autoencoder.path, table), given.path / "config.yaml")
    with pytest.raises(UserError, match="models the latents of another run"):
        latent_of(given.path, table)
