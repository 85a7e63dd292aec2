"""The VQ-VAE: its codebook, the gradient through it, the prior over its codes, and the bound they give together."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from src.core.batch import Batch
from src.core.errors import UserError
from src.core.protocols import CanQuantize, CountsEvaluations, NeedsPreparation
from src.core.rng import SampleNoise, StreamNoise
from src.metrics.codebook import CodebookPerplexity, CodesUsed
from src.metrics.metric import Inputs
from src.models.vqvae import VQVAE
from src.networks.code_grids import ConvGridDecoder, ConvGridEncoder, SlotDecoder, SlotEncoder
from src.networks.pixelcnn import GatedPixelCNN
from src.objectives.likelihoods import Bernoulli, Gaussian
from src.objectives.quantization import Codebook, nearest_code, squared_distance
from src.samplers.autoregressive import ancestral_sample
from tests.examples import image_spec, vector_spec
from tests.measuring import make_inputs

pytestmark = pytest.mark.usefixtures("same_weights")

GRID, NUM_CODES, NUM_CLASSES = (2, 2), 3, 3


def small_vqvae(conditional: bool = False, num_codes: int = NUM_CODES, **keys: object) -> VQVAE:
    """On binary images of 8x8, with a grid of 2x2."""
    given = {"commitment": 0.25, "decay": 0.9, "revive_below": 0.0, "sample_pixels": False} | keys
    network = {"num_halvings": 2, "width": 8, "num_blocks": 1}
    return VQVAE(
        spec=image_spec((1, 8, 8), "binary_static"),
        encoder=partial(ConvGridEncoder, **network),
        decoder=partial(ConvGridDecoder, **network),
        likelihood=Bernoulli,
        code_prior=partial(GatedPixelCNN, width=8, num_layers=2, kernel_size=3),
        num_codes=num_codes,
        code_dim=4,
        conditional=conditional,
        **given,
    )


def images(n: int) -> Batch:
    u = SampleNoise(0).uniform((n, 1, 8, 8), torch.zeros(()))
    return Batch(2 * (u < 0.3).float() - 1, torch.arange(n) % NUM_CLASSES)


# --- the codebook ----------------------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> Tensor:
    return SampleNoise(seed).normal(shape, torch.zeros(()))


def test_nearest_code_is_the_nearest():
    z, codes = normal(50, 3), normal(7, 3, seed=1)
    assert torch.equal(nearest_code(z, codes), torch.cdist(z, codes).argmin(1))


def test_commitment_is_a_sum_of_each_example_with_gradient_to_the_encoder_alone():
    z, quantized = normal(4, 2, 2, 3).requires_grad_(), normal(4, 2, 2, 3, seed=1).requires_grad_()
    distance = squared_distance(z, quantized)
    torch.testing.assert_close(distance, (z - quantized).square().sum((1, 2, 3)))
    distance.sum().backward()
    torch.testing.assert_close(z.grad, 2 * (z - quantized).detach())
    assert quantized.grad is None


def test_first_update_is_the_moving_average_by_hand():
    codebook = Codebook(3, 2, decay=0.8, revive_below=0.0)
    start = codebook.vectors.clone()
    z = normal(6, 2)
    codebook.learn(z, torch.tensor([0, 0, 0, 0, 1, 1]), StreamNoise(0))
    first = (0.8 * start[0] + 0.2 * z[:4].sum(0)) / (0.8 + 0.2 * 4)
    torch.testing.assert_close(codebook.vectors[0], first)
    torch.testing.assert_close(codebook.vectors[2], start[2])  # out of use, it stays


def test_code_out_of_use_stays_where_it_is_however_long():
    codebook = Codebook(2, 2, decay=0.5, revive_below=0.0)
    start = codebook.vectors.clone()
    for _ in range(200):
        codebook.learn(normal(6, 2), torch.zeros(6, dtype=torch.int64), StreamNoise(0))
    torch.testing.assert_close(codebook.vectors[1], start[1])


def test_code_out_of_use_moves_onto_a_vector_of_the_batch_and_is_counted():
    codebook, z = Codebook(4, 2, decay=0.9, revive_below=0.1), normal(40, 2)
    noise, moved = StreamNoise(0), []
    for _ in range(40):
        moved.append(codebook.learn(z, torch.arange(40) % 2, noise))  # two of four in use
    assert moved[0] == 0  # each has a time to find its use
    assert sum(moved) >= 2
    assert set(moved) <= {0, 2}
    steps = torch.arange(1, 41)
    unused, mean = 0.9**steps, 0.9**steps + 10 * (1 - 0.9**steps)
    assert moved.index(2) == int((unused < 0.1 * mean).int().argmax())
    for vector in codebook.vectors[2:]:
        assert (z - vector).norm(dim=1).min() < 1e-5


@pytest.mark.parametrize(
    ("key", "value"), [("decay", 1.0), ("revive_below", 1.0), ("revive_below", -0.1), ("commitment", -1.0)]
)
def test_what_cannot_be_is_refused_by_its_key(key, value):
    with pytest.raises(UserError, match=rf"model\.{key}={value} must be"):
        small_vqvae(**{key: value})


# --- the prior over the codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 4), (1, 5)])
def test_logits_depend_on_the_codes_before_alone_and_on_all_of_them(grid):
    network = GatedPixelCNN(5, width=16, num_layers=4, kernel_size=3).double()
    height, width = grid
    x = network.embedding(torch.arange(height * width).reshape(1, *grid) % 5).detach().requires_grad_()
    network.embedding = nn.Identity()
    logits = network(x).sum(1).flatten()
    jacobian = torch.stack([torch.autograd.grad(one, x, retain_graph=True)[0].abs().sum(3).flatten() for one in logits])
    seen = jacobian > 0
    assert not seen.triu().any()
    if grid == (1, 5):
        assert torch.equal(seen, torch.ones(5, 5).tril(-1).bool())
    else:
        assert seen[-1, :-1].all()  # the last place sees all that comes before, none in a blind spot


def test_probabilities_of_all_grids_sum_to_one():
    network = GatedPixelCNN(3, width=4, num_layers=2, kernel_size=3, condition_dim=2).double()
    grids = torch.cartesian_prod(*[torch.arange(3)] * 4).reshape(-1, 2, 2)
    for one_hot in torch.eye(2):
        logits = network(grids, one_hot.expand(len(grids), 2))
        log_p = logits.log_softmax(1).gather(1, grids[:, None]).sum((1, 2, 3))
        torch.testing.assert_close(log_p.logsumexp(0), torch.zeros((), dtype=torch.float64))


def test_drawn_codes_occur_as_often_as_they_are_probable_whatever_their_batch():
    network = GatedPixelCNN(3, width=4, num_layers=2, kernel_size=3)
    n, like = 4000, torch.zeros(())
    codes = ancestral_sample(network, n, (1, 2), SampleNoise(0), like)
    again = torch.cat([ancestral_sample(network, 500, (1, 2), SampleNoise(0, 500 * i), like) for i in range(8)])
    assert torch.equal(codes, again)
    grids = torch.cartesian_prod(torch.arange(3), torch.arange(3)).reshape(-1, 1, 2)
    with torch.no_grad():
        p = network(grids).log_softmax(1).gather(1, grids[:, None]).sum((1, 2, 3)).exp()
    shares = torch.bincount(3 * codes[:, 0, 0] + codes[:, 0, 1], minlength=9) / n
    assert ((shares - p).abs() < 4.5 * (p * (1 - p) / n).sqrt()).all()


# --- the model -------------------------------------------------------------------------------------------------------


def test_bound_lies_below_the_sum_over_all_grids():
    model, batch = small_vqvae().eval(), images(4)
    grids = torch.cartesian_prod(*[torch.arange(NUM_CODES)] * 4).reshape(-1, *GRID)
    with torch.no_grad():
        bound = model.log_prob_bound(batch.x)
        joint = []
        for x in batch.x:
            likelihood = model._log_likelihood(x.expand(len(grids), -1, -1, -1), model.codebook.look_up(grids), None)
            joint.append(likelihood + model._log_prior(grids, None))
    joint = torch.stack(joint)
    assert (bound < joint.logsumexp(1)).all()
    assert (bound[:, None] - joint).abs().amin(1).max() < 1e-3  # one of the terms, that of its own codes
    assert torch.equal(bound, model.log_prob_bound(batch.x))  # without chance


def test_prior_gets_its_gradient_from_its_own_loss_and_gives_none_away():
    model, batch = small_vqvae(), images(6)
    terms = model.loss(batch, generator=StreamNoise(0))
    terms["code_nll"].sum().backward(retain_graph=True)
    autoencoder = [*model.encoder.parameters(), *model.decoder.parameters()]
    assert all(weight.grad is None for weight in autoencoder)
    assert any(weight.grad.any() for weight in model.code_prior.parameters())
    model.zero_grad()
    (terms["reconstruction"] + terms["distance"]).sum().backward()
    assert all(weight.grad is None for weight in model.code_prior.parameters())
    assert all(weight.grad.any() for weight in autoencoder)


def test_loss_of_an_example_does_not_depend_on_its_batch():
    model, batch = small_vqvae().eval(), images(6)
    together = model.loss(batch)["loss"]
    apart = torch.cat([model.loss(Batch(x[None]))["loss"] for x in batch.x])
    torch.testing.assert_close(apart, together)


def test_codebook_moves_in_training_and_at_no_other_time():
    model, batch = small_vqvae(), images(6)
    start = model.codebook.vectors.clone()
    model.eval()
    model.loss(batch)
    assert torch.equal(model.codebook.vectors, start)
    model.train()
    assert not model.loss(batch)["revived_codes"].any()
    assert not torch.equal(model.codebook.vectors, start)


def test_codes_start_at_vectors_of_the_encoder_whatever_batches_they_come_in():
    assert isinstance(small_vqvae(), NeedsPreparation)
    batch, model = images(12), small_vqvae()
    model.prepare(lambda: [batch], generator=StreamNoise(0))
    with torch.no_grad():
        z = model._vectors(batch.x, None).flatten(0, 2)
    assert (model.codebook.vectors[:, None] - z).norm(dim=2).amin(1).max() < 1e-6
    start = model.codebook.vectors.clone()
    parts = [Batch(x) for x in batch.x.split(4)]
    model.prepare(lambda: parts, generator=StreamNoise(0))
    torch.testing.assert_close(model.codebook.vectors, start)


def test_samples_are_drawn_place_by_place_and_counted():
    model = small_vqvae().eval()
    assert isinstance(model, CountsEvaluations)
    x = model.sample(5, generator=SampleNoise(0))
    assert x.shape == (5, 1, 8, 8)
    assert model.num_evaluations == 5 * (math.prod(GRID) + 1)  # and the decoder


def test_class_reaches_encoder_decoder_and_prior():
    model, batch = small_vqvae(conditional=True), images(6)
    terms = model.loss(batch, generator=StreamNoise(0))
    assert not torch.allclose(terms["loss"], model.loss(Batch(batch.x, batch.condition.roll(1)))["loss"])
    other = [model.code_prior(torch.zeros(1, *GRID, dtype=torch.int64), one[None]) for one in torch.eye(NUM_CLASSES)[:2]]
    assert not torch.allclose(*other)


def test_metrics_count_codes_over_the_whole_test_set():
    class Told(nn.Module):
        num_codes = 4

        def quantize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
            return x[:, 0, 0, :2].long()

    assert isinstance(Told(), CanQuantize)
    x = torch.zeros(6, 1, 8, 8)
    x[2:4] = 1
    x[4:] = 2

    def inputs(batch_size: int) -> Inputs:
        return make_inputs(Told(), x=x, batch_size=batch_size)

    for batch_size in (2, 6):  # a batch of two sees a single code
        assert CodebookPerplexity().measure(inputs(batch_size)).value == pytest.approx(3)
        assert CodesUsed().measure(inputs(batch_size)).value == pytest.approx(0.75)


def test_vectors_have_slots_of_codes():
    network = {"num_slots": 3, "hidden": [8]}
    model = VQVAE(
        vector_spec(5),
        encoder=partial(SlotEncoder, **network),
        decoder=partial(SlotDecoder, **network),
        likelihood=partial(Gaussian, scale=0.5),
        code_prior=partial(GatedPixelCNN, width=8, num_layers=3, kernel_size=3),
        num_codes=6,
        code_dim=2,
        commitment=0.25,
        decay=0.9,
        revive_below=0.0,
        conditional=False,
        sample_pixels=False,
    )
    x = normal(10, 5)
    assert model.quantize(x).shape == (10, 1, 3)
    assert model.loss(Batch(x), generator=StreamNoise(0))["elbo"].shape == (10,)
    assert model.sample(4, generator=SampleNoise(0)).shape == (4, 5)


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"sides are multiples of 4.*1x6x8.*encoder\.num_halvings"):
        ConvGridEncoder((1, 6, 8), 4, num_halvings=2, width=8, num_blocks=0)
    with pytest.raises(UserError, match=r"gives 5 .*network@encoder=slot_encoder"):
        ConvGridEncoder((5,), 4, num_halvings=2, width=8, num_blocks=0)


def test_training_learns_codes_that_tell_two_images_apart():
    model = small_vqvae(num_codes=4, revive_below=0.03)
    batch = Batch(images(2).x)
    model.prepare(lambda: [batch], generator=StreamNoise(0))
    optimizer, noise = torch.optim.Adam(model.parameters(), lr=1e-2), StreamNoise(0)
    for _ in range(100):
        optimizer.zero_grad()
        model.loss(batch, generator=noise)["loss"].mean().backward()
        optimizer.step()
    num_different = int((batch.x[0] != batch.x[1]).sum())
    bound = model.eval().log_prob_bound(batch.x)
    assert bound.mean() > -0.6 * num_different * math.log(2)  # what it costs to know nothing of these pixels
    assert bound.mean() < -math.log(2) + 0.1  # which of the two it is cannot be had for less
    assert not torch.equal(*model.quantize(batch.x))
