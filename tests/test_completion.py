"""Completing images from some of their quadrants: what is known, what is scored, and the three numbers it is scored by."""

from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import NotApplicable, UserError
from src.core.protocols import CanInpaint, CanSample, CanWeigh, HasBaseline, HasPrior
from src.core.rng import SampleNoise
from src.core.views import Viewer
from src.metrics.likelihood import BaselineLogLikelihood, Bound, BoundBitsPerDim, ImportanceWeightedBound, PriorMonteCarlo
from src.models.completion import CompletionVAE, known_quadrants
from src.networks.mlp import MLP
from src.objectives.likelihoods import Bernoulli
from src.sample_files import SampleFiles
from src.sample_pictures import PICTURES_OF_GIVEN, Given
from tests.examples import image_spec
from tests.measuring import make_inputs

pytestmark = pytest.mark.usefixtures("same_weights")


def small_model(num_known: int = 1, shape: tuple[int, int, int] = (1, 8, 8), std: float = 0.5) -> CompletionVAE:
    network = partial(MLP, hidden=[16], activation=nn.Tanh(), initial_std=std)
    return CompletionVAE(
        spec=image_spec(shape, "binary_static"),
        encoder=network,
        prior_network=network,
        decoder=network,
        baseline=network,
        likelihood=Bernoulli,
        latent_dim=2,
        num_known=num_known,
    ).eval()


def images(n: int, shape: tuple[int, int, int] = (1, 8, 8)) -> Tensor:
    u = SampleNoise(0).uniform((n, *shape), torch.zeros(()))
    return 2 * (u < 0.4).float() - 1


LEFT = ["##..", "##..", "##..", "##.."]
PICTURES = {1: ["....", "....", "##..", "##.."], 2: LEFT, 3: ["##..", "##..", "####", "####"]}


@pytest.mark.parametrize(("num_known", "picture"), PICTURES.items())
def test_known_quadrants_are_those_of_the_papers_protocol(num_known, picture):
    assert known_quadrants(4, 4, num_known).tolist() == [[c == "#" for c in row] for row in picture]


@pytest.mark.parametrize("num_known", [1, 2, 3])
def test_probabilities_of_all_completions_sum_to_one(num_known):
    shape = (1, 2, 2)
    model, known = small_model(num_known, shape), known_quadrants(2, 2, num_known)
    num_unknown = 4 - num_known
    all_of_them = images(1, shape).repeat(2**num_unknown, 1, 1, 1)
    all_of_them[:, :, ~known] = 2.0 * torch.cartesian_prod(*[torch.arange(2)] * num_unknown).reshape(-1, 1, num_unknown) - 1
    with torch.no_grad():
        baseline = model.baseline_log_prob(all_of_them)
        draws = torch.stack(
            [model.prior_log_likelihoods(x[None], num_samples=20, generator=SampleNoise(1))[0] for x in all_of_them]
        )
    torch.testing.assert_close(baseline.logsumexp(0), torch.zeros(()), atol=1e-5, rtol=0)
    torch.testing.assert_close(draws.logsumexp(0), torch.zeros(20), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_known", [1, 2, 3])
def test_nothing_but_the_posterior_sees_what_is_to_be_said(num_known):
    model, x = small_model(num_known), images(5)
    unknown = ~known_quadrants(8, 8, num_known)
    other = torch.where(unknown, -x, x)
    with torch.no_grad():
        completed, of_other = (model.complete(some, generator=SampleNoise(0)) for some in (x, other))
        known, of_other_known = (model._prior(model._parts(some)[0])[0] for some in (x, other))
    assert torch.equal(completed[:, :, unknown], of_other[:, :, unknown])
    assert torch.equal(completed[:, :, ~unknown], x[:, :, ~unknown])
    assert torch.equal(known, of_other_known)


def test_prior_sees_the_baselines_guess_without_giving_it_a_gradient():
    model, batch = small_model().train(), Batch(images(5))
    terms = model.loss(batch, generator=SampleNoise(0))
    (terms["kl"] + terms["reconstruction"]).sum().backward(retain_graph=True)
    assert all(weight.grad is None for weight in model.baseline.parameters())
    model.zero_grad()
    terms["baseline_nll"].sum().backward()
    own = {id(weight) for weight in model.baseline.parameters()}
    assert all((weight.grad is not None) == (id(weight) in own) for weight in model.parameters())


def test_three_numbers_are_three_and_meet_where_draws_are_many():
    model, x = small_model(std=0.2), images(8)
    assert isinstance(model, CanWeigh)
    assert isinstance(model, HasPrior)
    assert isinstance(model, HasBaseline)
    assert not isinstance(model, CanSample)
    inputs = make_inputs(model, x=x, values="binary_static")
    elbo, weighed, prior = (
        metric.measure(inputs) for metric in (Bound(), ImportanceWeightedBound(1000, None), PriorMonteCarlo(1000, None))
    )
    assert weighed.parts["L_1"] < weighed.value - 0.1
    assert weighed.parts["L_1"] == pytest.approx(elbo.value, abs=2.0)
    assert prior.value == pytest.approx(weighed.value, abs=0.1)  # both are nearly log p(y | x)
    baseline = BaselineLogLikelihood().measure(inputs)
    assert {one.card["of"] for one in (elbo, weighed, prior, baseline)} == {"the other pixels given the lower left"}
    assert prior.card["draws_of"] == "the prior"
    with pytest.raises(NotApplicable, match="bits per dimension are of whole examples"):
        BoundBitsPerDim().measure(inputs)


def test_it_completes_the_images_it_was_made_for_and_refuses_others():
    model, x = small_model(num_known=2), images(3)
    assert isinstance(model, CanInpaint)
    left = known_quadrants(8, 8, 2).expand_as(x)
    with torch.no_grad():
        assert torch.equal(model.inpaint(x, left, generator=SampleNoise(0))[left], x[left])
        with pytest.raises(NotApplicable, match="it completes images of which the left half is known"):
            model.inpaint(x, ~left)


@pytest.mark.parametrize(
    ("num_known", "words"), [(1, "the lower left"), (2, "the left half"), (3, "all but the upper right")]
)
def test_picture_of_completions_has_the_models_own_mask_unless_another_is_asked_for(tmp_path, num_known, words):
    model, x = small_model(num_known), images(4)
    spec, viewer = image_spec((1, 8, 8), "binary_static"), Viewer(model, 0, batch_size=100)
    files = SampleFiles(tmp_path, spec, lambda: None, is_of_run=False)
    given = Given(viewer, files, lambda n: Batch(x[:n]), spec, None)
    config = OmegaConf.create({"n": 3, "row_length": 5, "known": None})
    said = PICTURES_OF_GIVEN["inpainting"](given, config)
    assert said == f"inpainting.png with {words} of 3 test images, 3 completions of each, and the image,"
    mask, _ = viewer.own_mask()
    assert torch.equal(mask, known_quadrants(8, 8, num_known)[None])
    drawn = viewer.completions(Batch(x), mask, 2, blank=0.0)
    assert torch.equal(drawn[..., mask], x[:, None].expand(-1, 4, -1, -1, -1)[..., mask])
    config.known = "bottom"
    with pytest.raises(NotApplicable, match=rf"images of which {words} is known, and no others \(known=null\)"):
        PICTURES_OF_GIVEN["inpainting"](given, config)


def test_other_numbers_of_quadrants_are_refused():
    with pytest.raises(UserError, match=r"model\.num_known=4 must be 1, 2 or 3 quadrants"):
        small_model(num_known=4)


def test_wrong_known_quadrants_cost_the_trained_model_its_bound():
    """Images whose upper right is a copy of their lower left: with another image's lower left it cannot be said."""
    model = small_model(num_known=3).train()
    x = images(64)
    x[:, :, :4, 4:] = x[:, :, 4:, :4]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        model.loss(Batch(x), generator=SampleNoise(step))["loss"].mean().backward()
        optimizer.step()
    mixed = x.clone()
    mixed[:, :, 4:, :4] = x.roll(1, 0)[:, :, 4:, :4]
    model.eval()
    with torch.no_grad():
        bound, of_mixed = (model.log_prob_bound(some, generator=SampleNoise(0)).mean() for some in (x, mixed))
    assert of_mixed < bound - 2
