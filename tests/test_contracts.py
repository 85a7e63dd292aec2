"""What every model promises, whatever its family: losses, gradients, samples, codes, refusals. One test for every YAML."""

import copy
import functools
import io
import itertools

import pytest
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from src.build import build_model
from src.core.batch import Batch
from src.core.errors import NotApplicable, UserError
from src.core.protocols import (
    Adversarial,
    CanBound,
    CanClassify,
    CanReconstruct,
    CanSample,
    CanScore,
    ExpectationMaximization,
    NeedsPreparation,
    Terms,
    Trainable,
)
from src.core.rng import Noise, SampleNoise, StreamNoise
from src.core.spec import CONTINUOUS, DISCRETE
from src.evaluation.protocol import draw_samples, spread_classes
from src.experiment import load_model
from tests.configs import (
    compose_model,
    is_of_another,
    is_of_tokens,
    is_of_waveforms,
    load_option,
    options,
    parts,
    small,
    target,
)
from tests.examples import RepeatingNoise, image_data, image_spec, token_data, token_spec, vector_spec, waveform_data

MODELS = options("model")
SHAPES = {"grey8": (1, 8, 8), "colour16": (3, 16, 16)}
NUM_CLASSES = 3
NUM_SAMPLES = 6


def models_with(method: str) -> list[str]:
    """The models whose class has a method."""
    return [name for name in MODELS if hasattr(target("model", name), method)]


@functools.cache
def composed(name: str) -> DictConfig:
    return compose_model(f"model={name}", *small(name))


def composed_with(name: str, likelihood: str, **model_keys: object) -> DictConfig:
    """As by `model=NAME likelihood=LIKELIHOOD model.KEY=VALUE`, without composing anew (that is slow)."""
    config = copy.deepcopy(composed(name))
    config.likelihood = load_option("likelihood", likelihood)
    config.model.update(model_keys)
    return config


class Setting:
    """A model's config, and random images that suit its likelihood, or random tokens or waveforms for a model of them.

    Args:
        name, config: the model.
        shape: of an image.
        values: the kind of its values; by default the first one that the likelihood is of.
        num_classes: 0 for images without labels.
    """

    def __init__(
        self,
        name: str,
        config: DictConfig | None = None,
        shape: tuple[int, ...] = SHAPES["grey8"],
        values: str | None = None,
        num_classes: int = NUM_CLASSES,
    ) -> None:
        self.keys = OmegaConf.to_container((config or composed(name)).model, resolve=True)
        likelihood = self.keys.get("likelihood")
        accepts = get_object(likelihood["_target_"]).accepts if likelihood else (DISCRETE,)
        self._name = name
        self._autoencoder = is_of_another(name)
        if is_of_tokens(name):
            self._data = token_data(num_classes)
        elif is_of_waveforms(name):
            self._data = waveform_data(num_classes)
        else:
            self._data = image_data(shape, values or accepts[0], num_classes)
        self.spec = self._data.spec

    def model(self, seed: int = 0) -> nn.Module:
        """As it is at the first step of a training on these images."""
        config = OmegaConf.create({"model": self.keys, "name": {"model": self._name}, "seed": seed})
        if self._autoencoder:
            keys = OmegaConf.to_container(composed("autoencoder").model, resolve=True)
            config.autoencoder = {"name": "autoencoder", "model": keys}
        train = [self._data.to_units(batch) for batch in self._data.held_out_loader("train")]
        return prepared(load_model(config, self.spec), train, seed)

    @property
    def latent_dim(self) -> int:
        """Of a flow as many as the data has dimensions."""
        keys = composed("autoencoder").model if self._autoencoder else self.keys
        return keys.get("latent_dim", self.spec.num_dims)

    def batch(self) -> Batch:
        return self._data.to_units(next(iter(self._data.train_dataloader())))

    def samples(self, model: nn.Module, seed: int = 0, batch_size: int = NUM_SAMPLES) -> Tensor:
        condition = spread_classes(self.spec, NUM_SAMPLES, torch.device("cpu")) if model.is_conditional else None
        return torch.cat(list(draw_samples(model.eval(), NUM_SAMPLES, batch_size, seed, condition)))


def prepared(model: nn.Module, train: list[Batch], seed: int = 0) -> nn.Module:
    """The model after it has seen its training data, if it needs to."""
    if isinstance(model, NeedsPreparation):
        model.prepare(lambda: train, generator=StreamNoise(seed))
    return model


def losses(model: nn.Module, batch: Batch, noise: Noise | None = None) -> list[tuple[nn.Module, Terms]]:
    """All that is minimised, each with the network that it trains."""
    if isinstance(model, ExpectationMaximization):
        return [(model, model.accumulate(batch, generator=noise))]
    if isinstance(model, Adversarial):
        generator, discriminator = model.players()
        return [
            (discriminator, model.discriminator_loss(batch, generator=noise)),
            (generator, model.generator_loss(batch, generator=noise)),
        ]
    return [(model, model.loss(batch, generator=noise))]


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """But for those that are frozen, as another model's inside this one."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def gradients(terms: Terms, network: nn.Module) -> dict[str, Tensor | None]:
    names, parameters = zip(*trained_parameters(network).items(), strict=True)
    return dict(zip(names, torch.autograd.grad(terms["loss"].mean(), parameters, allow_unused=True), strict=True))


def assert_gradient_everywhere(terms: Terms, network: nn.Module, but: str | None = None) -> None:
    idle = [name for name, gradient in gradients(terms, network).items() if gradient is None or not gradient.any()]
    assert set(idle) <= {but}


@torch.no_grad()
def awake(model: nn.Module) -> nn.Module:
    """The model after its blocks have left the identity: a last layer that begins at zero idles those before it."""
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():
            weight.copy_(0.1 * SampleNoise(0).normal(tuple(weight.shape), weight))
    return model


def level_that_does_not_count(model: nn.Module, terms: Terms, network: nn.Module) -> str | None:
    """The bias of the logit, if the loss does not change when all logits do: by pairs, or within the hinge's margins."""
    if not isinstance(model, Adversarial) or network is not model.players()[1]:
        return None
    shift = torch.zeros((), requires_grad=True)
    loss = model._loss.discriminator(terms["logit_real"] + shift, terms["logit_fake"] + shift).mean()
    (slope,) = torch.autograd.grad(loss, shift)
    head = model.discriminator.network.head
    is_flat = abs(float(slope)) < 1e-6
    return next(name for name, weight in network.named_parameters() if weight is head.bias) if is_flat else None


@pytest.fixture(params=[SHAPES["grey8"], pytest.param(SHAPES["colour16"], marks=pytest.mark.slow)], ids=list(SHAPES))
def setting(name: str, request: pytest.FixtureRequest) -> Setting:
    return Setting(name, shape=request.param)


every_model = pytest.mark.parametrize("name", MODELS)
every_trained_by_gradients = pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in models_with("maximize")]
)
every_adversarial = pytest.mark.parametrize("name", models_with("discriminator_loss"))
every_trained_by_maximization = pytest.mark.parametrize("name", models_with("maximize"))
every_density = pytest.mark.parametrize("name", [name for name in models_with("log_prob") if not is_of_tokens(name)])
every_other_than_of_tokens = pytest.mark.parametrize("name", [name for name in MODELS if not is_of_tokens(name)])
every_sampler = pytest.mark.parametrize("name", models_with("sample"))
every_encoder = pytest.mark.parametrize("name", models_with("encode"))


@every_model
def test_model_is_trained_in_exactly_one_way(setting):
    model = setting.model()
    assert sum(isinstance(model, way) for way in (Trainable, Adversarial, ExpectationMaximization)) == 1


@every_model
def test_every_term_of_the_loss_is_one_finite_number_per_example(setting):
    for _, terms in losses(setting.model(), setting.batch(), SampleNoise(0)):
        assert "loss" in terms
        for term, values in terms.items():
            assert values.shape == (8 // setting.keys.get("packing", 1),), term
            assert values.isfinite().all(), term


@every_model
def test_loss_needs_no_generator(setting):
    assert all(terms["loss"].isfinite().all() for _, terms in losses(setting.model(), setting.batch()))


@every_model
def test_repeating_every_example_leaves_the_mean_losses_unchanged(setting):
    batch = setting.batch()
    twice = Batch(torch.cat([batch.x, batch.x]), batch.condition.repeat(2))
    once_terms, twice_terms = (losses(setting.model(), some, RepeatingNoise(len(batch))) for some in (batch, twice))
    for (_, expected), (_, terms) in zip(once_terms, twice_terms, strict=True):
        for term in expected:
            torch.testing.assert_close(terms[term].mean(), expected[term].mean(), rtol=1e-4, atol=1e-5)


@every_trained_by_gradients
def test_gradients_reach_every_parameter(setting):
    model = awake(setting.model())
    trained = losses(model, setting.batch(), SampleNoise(0))
    for network, terms in trained:
        assert_gradient_everywhere(terms, network, but=level_that_does_not_count(model, terms, network))
    assert sum(len(trained_parameters(network)) for network, _ in trained) == len(trained_parameters(model))


@every_trained_by_maximization
def test_maximization_lowers_the_objective_of_its_examples_and_begins_anew(setting):
    model, batch = setting.model(), setting.batch()
    before = losses(model, batch, SampleNoise(0))[0][1]["loss"].mean()
    model.maximize()
    assert not model.statistics.any()
    assert model.negative_log_likelihood(batch, generator=SampleNoise(0))["loss"].mean() < before


@every_adversarial
def test_players_share_no_parameter(setting):
    generator, discriminator = setting.model().players()
    assert not {id(p) for p in generator.parameters()} & {id(p) for p in discriminator.parameters()}


@every_adversarial
def test_discriminator_loss_gives_the_generator_no_gradient(setting):
    model = setting.model()
    generator, _ = model.players()
    terms = model.discriminator_loss(setting.batch(), generator=SampleNoise(0))
    assert all(gradient is None for gradient in gradients(terms, generator).values())


@every_adversarial
def test_generator_loss_passes_through_a_frozen_discriminator(setting):
    model = awake(setting.model())
    generator, discriminator = model.players()
    discriminator.requires_grad_(False)
    terms = model.generator_loss(setting.batch(), generator=SampleNoise(0))
    terms["loss"].mean().backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert all(parameter.grad.any() for parameter in generator.parameters())


@every_model
def test_initial_weights_depend_on_the_seed_alone(setting):
    torch.manual_seed(1)
    first = setting.model(seed=0).state_dict()
    torch.manual_seed(2)
    again, other = setting.model(seed=0).state_dict(), setting.model(seed=1).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@every_model
def test_state_holds_only_tensors(setting):
    assert all(isinstance(value, Tensor) for value in setting.model().state_dict().values())


@every_sampler
def test_samples_are_finite_data(setting):
    model = setting.model()
    assert isinstance(model, CanSample)
    x = setting.samples(model)
    values = setting.spec.values
    assert x.shape == (NUM_SAMPLES, *setting.spec.shape)
    assert x.isfinite().all()
    assert values.low <= x.min() <= x.max() <= values.high


@every_sampler
@pytest.mark.parametrize("batch_size", [1, 4])
def test_sample_does_not_depend_on_its_batch(setting, batch_size):
    model = setting.model()
    together, apart = setting.samples(model), setting.samples(model, batch_size=batch_size)
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)


@every_sampler
def test_samples_depend_on_the_seed(setting):
    model = setting.model()
    first, again, other = (setting.samples(model, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not any(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(first, other, strict=True))
    assert not torch.allclose(first[0], first[NUM_CLASSES], rtol=0, atol=1e-7)  # two samples of one class


@every_sampler
def test_saved_state_gives_the_same_samples(setting):
    trained, fresh = setting.model(seed=0), setting.model(seed=1)
    losses(trained, setting.batch(), SampleNoise(0))  # moves batch norm's statistics
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(setting.samples(fresh), setting.samples(trained))


@every_encoder
def test_codes_and_reconstructions_have_their_shapes_and_no_noise(setting):
    model, batch = setting.model().eval(), setting.batch()
    z = model.encode(batch.x, batch.condition)
    assert z.shape == (len(batch), setting.latent_dim)
    rebuilt = model.reconstruct(batch.x, batch.condition) if isinstance(model, CanReconstruct) else batch.x
    assert rebuilt.shape == batch.x.shape
    assert rebuilt.isfinite().all()
    torch.testing.assert_close(model.decode(z, batch.condition), rebuilt)


@every_density
@pytest.mark.parametrize("values", [DISCRETE, CONTINUOUS])
def test_model_scores_continuous_values_and_bounds_discrete_ones(name, values):
    setting = Setting(name, values=values)
    model, batch = setting.model().eval(), setting.batch()
    assert isinstance(model, CanScore)
    assert isinstance(model, CanBound)
    given = {"condition": batch.condition, "generator": SampleNoise(0)}
    answering, refusing = (model.log_prob, model.log_prob_bound)[:: 1 if values == CONTINUOUS else -1]
    likelihood = answering(batch.x, **given)
    assert likelihood.shape == (len(batch),)
    assert likelihood.isfinite().all()
    with pytest.raises(NotApplicable):
        refusing(batch.x, **given)
    if values == DISCRETE:
        assert (likelihood < 0).all()  # of a probability
        terms = model.log_prob_bound_terms(batch.x, **(given | {"generator": SampleNoise(0)}))
        torch.testing.assert_close(sum(terms.values()), likelihood)


@pytest.mark.parametrize("name", models_with("classify"))
def test_classifier_gives_every_example_its_logits_whatever_its_batch(setting):
    model, batch = setting.model().eval(), setting.batch()
    assert isinstance(model, CanClassify)
    assert not isinstance(model, CanSample)
    logits = model.classify(batch.x)
    assert logits.shape == (len(batch), NUM_CLASSES)
    torch.testing.assert_close(torch.cat([model.classify(x[None]) for x in batch.x]), logits, rtol=0, atol=1e-5)


def is_conditional(name: str) -> bool:
    """Whether the model of a YAML is told the classes, by its key or by its conditioning."""
    is_told = load_option("model", name).model.get("conditional")
    return bool(is_told) or parts(name).get("conditioning", "none") != "none"


every_conditional = pytest.mark.parametrize("name", [name for name in MODELS if is_conditional(name)])


@every_conditional
def test_same_noise_gives_another_sample_for_each_class(name):
    model = awake(Setting(name).model()).eval()
    assert model.is_conditional
    x = model.sample(NUM_CLASSES, torch.arange(NUM_CLASSES), generator=RepeatingNoise(period=1))
    differences = [(x[i] - x[j]).abs().max() for i, j in itertools.combinations(range(NUM_CLASSES), 2)]
    assert min(differences) > 1e-6


may_have_a_mixture_for_each_class = pytest.mark.parametrize(
    "name", [name for name in models_with("maximize") if not is_conditional(name)]
)


def told_the_classes(name: str, num_classes: int = NUM_CLASSES) -> Setting:
    """As by `model=NAME model.conditional=true`."""
    config = copy.deepcopy(composed(name))
    config.model.conditional = True
    return Setting(name, config, num_classes=num_classes)


@may_have_a_mixture_for_each_class
def test_model_that_is_told_the_classes_trains_and_draws_another_sample_for_each(name):
    setting = told_the_classes(name)
    model = setting.model()
    assert model.is_conditional
    for _, terms in losses(model, setting.batch(), SampleNoise(0)):
        assert terms["loss"].isfinite().all()
    x = model.eval().sample(NUM_CLASSES, torch.arange(NUM_CLASSES), generator=RepeatingNoise(period=1))
    differences = [(x[i] - x[j]).abs().max() for i, j in itertools.combinations(range(NUM_CLASSES), 2)]
    assert min(differences) > 1e-6
    together, apart = setting.samples(model), setting.samples(model, batch_size=4)
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)


@may_have_a_mixture_for_each_class
def test_model_that_is_told_the_classes_refuses_unlabelled_data(name):
    with pytest.raises(UserError, match=r"needs labelled data; data=made_up(-latents)? has no labels"):
        told_the_classes(name, num_classes=0).model()


@may_have_a_mixture_for_each_class
def test_maximization_in_every_class_lowers_the_objective(name):
    setting = told_the_classes(name)
    model, batch = setting.model(), setting.batch()
    before = losses(model, batch, SampleNoise(0))[0][1]["loss"].mean()
    model.maximize()
    assert not model.statistics.any()
    assert model.negative_log_likelihood(batch, generator=SampleNoise(0))["loss"].mean() < before


def needs_labels(name: str) -> bool:
    return is_conditional(name) or name in models_with("classify")


@pytest.mark.parametrize("name", [name for name in MODELS if needs_labels(name)])
def test_model_that_needs_labels_refuses_unlabelled_data_and_names_it(name):
    with pytest.raises(UserError, match=f"model={name} with data=made_up: .* data=made_up has no labels"):
        Setting(name, num_classes=0).model()


@pytest.mark.parametrize("name", [name for name in MODELS if not needs_labels(name)])
def test_any_other_model_needs_no_labels(name):
    setting = Setting(name, num_classes=0)
    batch = setting.batch()
    assert batch.condition is None
    assert all(terms["loss"].isfinite().all() for _, terms in losses(setting.model(), batch))


@every_other_than_of_tokens
def test_model_refuses_tokens_and_names_the_data(name):
    with pytest.raises(UserError, match=f"model={name} with data=made_up: .* data=made_up gives tokens"):
        build_model(composed(name).model, token_spec(), name)


@pytest.mark.parametrize("name", [name for name in MODELS if is_of_tokens(name)])
def test_model_of_tokens_refuses_images_and_names_the_data(name):
    with pytest.raises(UserError, match=f"model={name} with data=made_up: .* data=made_up gives image"):
        build_model(composed(name).model, image_spec(SHAPES["grey8"], DISCRETE), name)


def uses_images_only(config: DictConfig) -> bool:
    networks = OmegaConf.to_yaml(config.model, resolve=True)
    of_images = ("convolutional", "code_grids", "classifier", "residual", "norm_free", "style", "unet", "coupling_flow")
    of_images = (*of_images, "convolutional_1d")
    return any(f"src.networks.{module}." in networks for module in of_images) or "src.models.completion." in networks


@every_other_than_of_tokens
def test_model_trains_on_vectors_or_refuses_them_by_name(name):
    config = composed_with(name, "gaussian") if "likelihood" in composed(name) else composed(name)
    spec = vector_spec(5, NUM_CLASSES)
    batch = Batch(SampleNoise(0).normal((8, 5), torch.zeros(())), torch.arange(8) % NUM_CLASSES)
    if uses_images_only(config):
        with pytest.raises(UserError, match=f"model={name} with data=made_up: .* gives (5|vector) "):
            build_model(config.model, spec, name)
    else:
        model = prepared(build_model(config.model, spec, name), [batch])
        assert all(terms["loss"].isfinite().all() for _, terms in losses(model, batch))


BOUNDED_BY_A_LIKELIHOOD = [name for name in models_with("log_prob_bound") if "likelihood" in parts(name)]
LIKELIHOOD_CASES = [
    (name, likelihood, values)
    for name, likelihood in itertools.product(BOUNDED_BY_A_LIKELIHOOD, options("likelihood"))
    for values in target("likelihood", likelihood).accepts
    if (values == CONTINUOUS if is_of_waveforms(name) else likelihood != "spectral")
]


@pytest.mark.parametrize(("name", "likelihood", "values"), LIKELIHOOD_CASES)
def test_every_likelihood_trains_on_the_values_it_accepts(name, likelihood, values):
    setting = Setting(name, composed_with(name, likelihood), values=values)
    model, batch = setting.model(), setting.batch()
    is_normalised = model.likelihood.is_normalised
    if is_normalised:  # before the loss, which may move a codebook
        bound = model.log_prob_bound(batch.x, batch.condition, generator=SampleNoise(0))
        parts = model.log_prob_bound_terms(batch.x, batch.condition, generator=SampleNoise(0))
        torch.testing.assert_close(sum(parts.values()), bound)
    terms = model.loss(batch, generator=SampleNoise(0))
    assert all(values.shape == (8,) and values.isfinite().all() for values in terms.values())
    assert_gradient_everywhere(terms, model)
    assert ("elbo" in terms) == is_normalised
    if is_normalised:
        torch.testing.assert_close(bound, terms["elbo"])


@pytest.mark.parametrize(
    ("name", "likelihood", "values"), [case for case in LIKELIHOOD_CASES if case[0] in models_with("sample")]
)
@pytest.mark.parametrize("sample_pixels", [True, False])
def test_every_likelihood_gives_finite_samples(name, likelihood, values, sample_pixels):
    setting = Setting(name, composed_with(name, likelihood, sample_pixels=sample_pixels), values=values)
    assert setting.samples(setting.model()).isfinite().all()


@pytest.mark.parametrize("name", [name for name in MODELS if "beta" in load_option("model", name).model])
def test_beta_weighs_the_kl_in_the_loss_but_not_in_the_bound(name):
    setting = Setting(name, composed_with(name, "gaussian", beta=4))
    terms = setting.model().loss(setting.batch(), generator=SampleNoise(0))
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 4 * terms["kl"])
    torch.testing.assert_close(terms["elbo"], -terms["reconstruction"] - terms["kl"])


def test_objective_of_a_vae_says_what_its_loss_depends_on():
    weighed = composed_with("vae", "gaussian", beta=4)
    configs = {"vae": [composed("vae"), composed_with("vae", "gaussian"), weighed], "cvae": [composed("cvae")]}
    models = [Setting(name, config).model() for name in configs for config in configs[name]]
    assert len({model.objective for model in models}) == len(models)


def test_conditional_prior_is_refused_without_a_conditional_model():
    config = copy.deepcopy(composed("vae"))
    config.prior = load_option("prior", "conditional_gaussian")
    with pytest.raises(UserError, match=r"model\.conditional=true.*prior=standard_normal"):
        Setting("vae", config).model()
