"""Densities on the latents of another run's autoencoder."""

import shutil

import pytest
import torch

from src.core.batch import Batch
from src.core.errors import UserError
from src.core.rng import SampleNoise, StreamNoise
from src.experiment import load_autoencoder, load_data, load_model, load_trained_model
from src.models.autoencoder import Autoencoder
from src.models.classifier import Classifier
from src.models.gmm import GaussianMixture
from src.models.latent import Latent, fit_on_latents
from src.networks.mlp import MLP
from src.runs import Run
from tests.commands import call
from tests.examples import vector_spec

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
    load_autoencoder(fresh, config)
    shutil.rmtree(given)
    model, _ = load_trained_model(run, config, data.spec, "auto")
    for name, weight in model.autoencoder.state_dict().items():
        assert torch.equal(weight, fresh.autoencoder.state_dict()[name]), name
    assert not of_first.path.exists()
    assert call("evaluate", f"run={folder}", "metric=[fd_pca]").code == 0
    assert call("sample", f"run={folder}", "n=4").code == 0
