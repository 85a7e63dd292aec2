"""The game between two networks: penalties against closed forms, packing, and which player learns from what."""

import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from src.build import build, build_model
from src.core.batch import Batch
from src.core.errors import UserError
from src.core.rng import StreamNoise
from src.core.spec import CONTINUOUS, DISCRETE, DataSpec, Values
from src.models.gan import GAN
from src.objectives.penalties import GradientPenalty, Judged, NoPenalty, ZeroCentred, judge, squared_gradient_norm
from tests.commands import call
from tests.configs import compose_model, load_option, options, small, target

A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
PLANE = DataSpec("plane", "vector", (2,), Values(CONTINUOUS, -float("inf"), float("inf"), None))


def bowl(x: Tensor) -> Tensor:
    """x' A x / 2, whose gradient is A x."""
    return 0.5 * ((x @ A) * x).sum(1)


def points(seed: int) -> Tensor:
    return torch.randn(64, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def judged(critic, x: Tensor, for_slope: bool = False) -> Judged:
    return judge(critic, x, for_slope)


def penalty_of(penalty, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    return penalty(bowl, judged(bowl, real), judged(bowl, fake), StreamNoise(0))


# --- penalties -------------------------------------------------------------------------------------------------------


def test_the_squared_gradient_norm_is_the_closed_form():
    x = points(0)
    torch.testing.assert_close(squared_gradient_norm(bowl, x), (x @ A).square().sum(1), rtol=1e-12, atol=1e-12)


def test_zero_centred_penalties_are_half_gamma_times_it_at_their_places():
    real, fake = points(0), points(1)
    both = penalty_of(ZeroCentred(3.0, 5.0), real, fake)
    assert list(both) == ["r1", "r2"]
    torch.testing.assert_close(both["r1"], 1.5 * (real @ A).square().sum(1))
    torch.testing.assert_close(both["r2"], 2.5 * (fake @ A).square().sum(1))
    assert list(penalty_of(ZeroCentred(3.0, 0.0), real, fake)) == ["r1"]
    assert list(penalty_of(ZeroCentred(0.0, 3.0), real, fake)) == ["r2"]
    assert penalty_of(NoPenalty(), real, fake) == {}


def test_the_gradient_penalty_is_that_of_the_places_between():
    real, fake = points(0), points(1)
    u = StreamNoise(0).uniform((64, 1), like=real)
    between = u * real + (1 - u) * fake
    expected = 10 * ((between @ A).square().sum(1).sqrt() - 1).square()
    torch.testing.assert_close(penalty_of(GradientPenalty(10.0), real, fake)["gradient_penalty"], expected)


def test_the_gradient_penalty_has_a_finite_slope_where_the_critic_is_flat():
    weight = torch.zeros(2, 1, requires_grad=True)

    def critic(x: Tensor) -> Tensor:
        return (x @ weight).squeeze(1)

    real, fake = judged(critic, torch.ones(4, 2)), judged(critic, torch.zeros(4, 2))
    flat = GradientPenalty(10.0)(critic, real, fake, StreamNoise(0))
    torch.testing.assert_close(flat["gradient_penalty"], torch.full((4,), 10.0), rtol=1e-4, atol=0)
    (slope,) = torch.autograd.grad(flat["gradient_penalty"].sum(), weight)
    assert slope.isfinite().all()


@pytest.mark.parametrize("for_slope", [False, True])
@pytest.mark.parametrize("name", options("penalty"))
def test_penalties_teach_the_discriminator_as_autograd_says(name, for_slope):
    """Their gradients by the weights equal finite differences, so the second derivative is there."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    penalty = build(load_option("penalty", name))

    def value() -> Tensor:
        def of(x: Tensor) -> Tensor:
            return critic(x).squeeze(1)

        parts = penalty(of, judged(of, points(0), for_slope), judged(of, points(1), for_slope), StreamNoise(0))
        return sum((part.sum() for part in parts.values()), torch.zeros((), dtype=torch.float64))

    if name == "none":
        assert not value().requires_grad
        return
    weight = critic[0].weight
    (gradient,) = torch.autograd.grad(value(), weight)
    step = torch.zeros_like(weight)
    step[3, 1] = 1e-6
    with torch.no_grad():
        weight += step
        above = value()
        weight -= 2 * step
        below = value()
    assert float(gradient[3, 1]) == pytest.approx(float(above - below) / 2e-6, rel=1e-5)


def test_penalties_are_measured_without_recording_too():
    with torch.no_grad():
        measured = penalty_of(ZeroCentred(2.0, 0.0), points(0), points(1))["r1"]
    assert not measured.requires_grad
    torch.testing.assert_close(measured, (points(0) @ A).square().sum(1))


def test_penalties_are_computed_in_32_bits_under_mixed_precision():
    critic = nn.Linear(2, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm = squared_gradient_norm(lambda x: critic(x).squeeze(1), torch.ones(3, 2))
    torch.testing.assert_close(norm, critic.weight.square().sum().expand(3))


# --- the model -------------------------------------------------------------------------------------------------------


def gan(*overrides: str, spec: DataSpec = PLANE) -> nn.Module:
    config = compose_model("model=gan", *overrides)
    torch.manual_seed(0)
    return build_model(config.model, spec, "gan")


def batch(size: int = 12) -> Batch:
    return Batch(points(2)[:size].float(), None)


def test_packing_shows_the_discriminator_several_examples_at_a_time():
    model = gan("model.packing=3")
    assert model.discriminator.network.layers[0].in_features == 6
    terms = model.discriminator_loss(batch(12), generator=StreamNoise(0))
    assert {name: tuple(values.shape) for name, values in terms.items()} == dict.fromkeys(
        ("loss", "logit_real", "logit_fake"), (4,)
    )
    packed = model._pack(batch(13).x)
    assert packed.shape == (4, 6)  # the thirteenth is left out
    torch.testing.assert_close(packed[1], batch(13).x[3:6].flatten())
    images = torch.arange(2 * 3 * 4.0).view(2, 3, 2, 2)
    assert gan("model.packing=2")._pack(images).equal(images.reshape(1, 6, 2, 2))


def test_packing_of_one_is_none():
    model = gan("model.packing=1")
    assert model._pack(batch().x).equal(batch().x)


def test_packing_of_classes_is_refused():
    config = compose_model("model=cgan", "model.packing=2", "data=digits")
    spec = DataSpec("digits", "image", (1, 8, 8), Values(CONTINUOUS, -1, 1, None), tuple("0123456789"))
    with pytest.raises(UserError, match=r"model.packing=2: examples of different classes are not packed"):
        build_model(config.model, spec, "cgan")


@pytest.mark.parametrize("penalty", options("penalty"))
@pytest.mark.parametrize("loss", options("adversarial_loss"))
def test_every_game_can_be_played_in_the_plane(loss, penalty):
    model = gan(f"adversarial_loss={loss}", f"penalty={penalty}", "model.packing=2", "model.allow_known_bad=true")
    generator, discriminator = model.players()
    terms = model.discriminator_loss(batch(), generator=StreamNoise(0))
    assert all(values.shape == (6,) and values.isfinite().all() for values in terms.values())
    terms["loss"].mean().backward()
    assert all(weight.grad is None for weight in generator.parameters())
    assert any(float(weight.grad.abs().sum()) > 0 for weight in discriminator.parameters())
    discriminator.requires_grad_(False)
    before = [weight.grad.clone() for weight in discriminator.parameters()]
    model.generator_loss(batch(), generator=StreamNoise(0))["loss"].mean().backward()
    assert all(float(weight.grad.abs().sum()) > 0 for weight in generator.parameters())
    assert all(weight.grad.equal(old) for weight, old in zip(discriminator.parameters(), before, strict=True))


def test_the_loss_is_the_game_and_the_penalty():
    model, plain = gan("penalty=r1_r2"), gan()
    terms, without = (some.discriminator_loss(batch(), generator=StreamNoise(0)) for some in (model, plain))
    torch.testing.assert_close(terms["loss"], without["loss"] + terms["r1"] + terms["r2"])


# --- parts that combine ----------------------------------------------------------------------------------------------

SHAPES = (("grey8", (1, 8, 8)), ("colour16", (3, 16, 16)))
GREY, COLOUR = (DataSpec(name, "image", shape, Values(DISCRETE, -1, 1, 256), tuple("abc")) for name, shape in SHAPES)
LABELLED_PLANE = replace(PLANE, class_names=tuple("abc"))
OF_IMAGES = [
    ("conv_decoder", "conv_encoder"),
    ("residual_generator", "residual_discriminator"),
    ("norm_free_generator", "norm_free_discriminator"),
    ("style_generator", "style_discriminator"),
]
NETWORKS = [("mlp", "mlp"), ("mlp", "maxout_mlp"), *OF_IMAGES, ("style_generator", "conv_encoder"), ("mlp", "conv_encoder")]


def node(group: str, name: str, **keys: object) -> dict:
    option = OmegaConf.to_container(load_option(group, name), resolve=True)
    return option | {key: value for key, value in keys.items() if key in option}


def game(networks: tuple[str, str], spec: DataSpec, network_keys: dict | None = None, **parts: object) -> GAN:
    """A GAN of small networks with the parts `adversarial_loss=`, `penalty=`, `augmentation=`, `conditioning=` by name."""
    chosen = {"adversarial_loss": "hinge", "penalty": "none", "augmentation": "none", "conditioning": "none"} | {
        key: value for key, value in parts.items() if isinstance(value, str)
    }
    keys = {"latent_dim": 4, "packing": 1, "spectral_norm": False, "allow_known_bad": False} | {
        key: value for key, value in parts.items() if not isinstance(value, str)
    }
    size = {"width": 16, "max_width": 16, "num_blocks": 1, "hidden": [16], "style_dim": 8} | (network_keys or {})
    torch.manual_seed(0)
    generator, discriminator = (build(node("network", name, **size)) for name in networks)
    built = {group: build(node(group, name)) for group, name in chosen.items()}
    return GAN(spec, generator, discriminator, **built, **keys)


def step_of(model: GAN, spec: DataSpec, size: int = 4) -> dict[str, Tensor]:
    """Both losses of a batch, after checking that each player gets gradients from its own."""
    x = torch.rand(size, *spec.shape) * 2 - 1
    condition = torch.arange(size) % spec.num_classes if spec.num_classes else None
    terms = model.discriminator_loss(Batch(x, condition), generator=StreamNoise(0))
    terms["loss"].mean().backward()
    assert all(weight.grad is None for weight in model.generator.parameters())
    assert any(weight.grad is not None and weight.grad.any() for weight in model.discriminator.parameters())
    model.discriminator.requires_grad_(False)
    of_generator = model.generator_loss(Batch(x, condition), generator=StreamNoise(0))
    of_generator["loss"].mean().backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in model.generator.parameters())
    everything = {**terms, **{f"generator_{name}": value for name, value in of_generator.items()}}
    assert all(value.isfinite().all() for value in everything.values())
    return everything


@pytest.mark.parametrize("conditioning", options("conditioning"))
@pytest.mark.parametrize("networks", NETWORKS, ids="-".join)
@pytest.mark.parametrize("spec", [GREY, COLOUR, LABELLED_PLANE], ids=lambda spec: spec.name)
def test_networks_and_conditionings_combine(networks, conditioning, spec):
    if spec is LABELLED_PLANE and not set(networks) <= {"mlp", "maxout_mlp"}:
        with pytest.raises(UserError, match="square images with a side of 8 to 128 pixels"):
            game(networks, spec, conditioning=conditioning)
        return
    model = game(networks, spec, conditioning=conditioning, penalty="r1")
    assert model.is_conditional == (conditioning != "none")
    terms = step_of(model, spec)
    assert ("class_real" in terms) == ("generator_class" in terms) == (conditioning == "auxiliary_classifier")


@pytest.mark.parametrize("augmentation", options("augmentation"))
@pytest.mark.parametrize("penalty", options("penalty"))
@pytest.mark.parametrize("loss", options("adversarial_loss"))
@pytest.mark.parametrize("spec", [GREY, COLOUR], ids=lambda spec: spec.name)
def test_losses_penalties_augmentations_and_packing_combine(loss, penalty, augmentation, spec):
    parts = {"adversarial_loss": loss, "penalty": penalty, "augmentation": augmentation}
    model = game(("mlp", "mlp"), spec, **parts, packing=2, allow_known_bad=True)
    assert all(value.shape == (2,) for value in step_of(model, spec).values())


@pytest.mark.parametrize("networks", NETWORKS, ids="-".join)
def test_spectral_norm_is_of_every_discriminator(networks):
    if networks[1] == "norm_free_discriminator":
        with pytest.raises(UserError, match="zero"):
            game(networks, GREY, spectral_norm=True)
        return
    model = game(networks, GREY, spectral_norm=True)
    step_of(model, GREY)
    assert any("parametrizations" in name for name, _ in model.discriminator.named_parameters())
    plain = game(networks, GREY)
    assert not any(".original0" in name and "style" not in networks[0] for name, _ in plain.generator.named_parameters())


def test_a_projection_adds_the_inner_product_of_class_and_features():
    model = game(("mlp", "mlp"), GREY, conditioning="projection")
    x, classes = torch.rand(5, *GREY.shape), torch.tensor([0, 1, 2, 1, 0])
    network = model.discriminator.network
    features = network.features(x)
    expected = network.head(features)[:, 0] + torch.stack(
        [model.discriminator.embedding.weight[k] @ row for k, row in zip(classes.tolist(), features, strict=True)]
    )
    torch.testing.assert_close(model.logits(x, classes), expected)


def test_an_auxiliary_classifier_is_judged_by_cross_entropy_in_both_losses():
    model, plain = (game(("mlp", "mlp"), GREY, conditioning=kind) for kind in ("auxiliary_classifier", "none"))
    x, classes = torch.rand(5, *GREY.shape), torch.tensor([0, 1, 2, 1, 0])
    logits = model.discriminator(x, classes).class_logits
    expected = -logits.log_softmax(1)[torch.arange(5), classes]
    terms = model.discriminator_loss(Batch(x, classes), generator=StreamNoise(0))
    torch.testing.assert_close(terms["class_real"], expected)
    game_alone = model._loss.discriminator(terms["logit_real"], terms["logit_fake"])
    torch.testing.assert_close(terms["loss"], game_alone + terms["class_real"] + terms["class_fake"])
    assert "class_real" not in plain.discriminator_loss(Batch(x, classes), generator=StreamNoise(0))


def test_the_weight_of_the_penalty_is_in_the_loss_and_not_in_its_parts():
    model, some = gan("penalty=r1"), batch()
    whole, half, none = (
        model.discriminator_loss(some, penalty_scale=scale, generator=StreamNoise(0)) for scale in (1.0, 0.5, 0.0)
    )
    torch.testing.assert_close(half["r1"], whole["r1"])
    torch.testing.assert_close(whole["loss"] - half["loss"], 0.5 * whole["r1"])
    assert "r1" not in none
    torch.testing.assert_close(whole["loss"] - whole["r1"], none["loss"])


@pytest.mark.parametrize("name", ["r1", "r2", "r1_r2"])
def test_a_penalty_at_the_examples_needs_no_further_pass_through_the_discriminator(name):
    model, calls = gan(f"penalty={name}"), []
    model.discriminator.register_forward_hook(lambda *_: calls.append(1))
    shared = model.discriminator_loss(batch(), generator=StreamNoise(0))
    assert len(calls) == 2
    with torch.no_grad():
        apart = model.discriminator_loss(batch(), generator=StreamNoise(0))
    assert len(calls) > 4
    torch.testing.assert_close({k: v.detach() for k, v in shared.items()}, apart)


# --- what is known to fail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("networks", "parts", "source"),
    [
        (OF_IMAGES[0], {"penalty": "r1_r2"}, r"penalty=r1_r2 is known to fail.*arXiv:2501\.05441, appendix E"),
        (OF_IMAGES[0], {"penalty": "gradient_penalty"}, r"gradient_penalty is known to fail.*arXiv:1704\.00028"),
        (("mlp", "mlp"), {"adversarial_loss": "wasserstein", "spectral_norm": True}, r"logits.*arXiv:1710\.10196"),
        (("mlp", "mlp"), {"adversarial_loss": "wasserstein"}, r"slope.*arXiv:1701\.07875"),
    ],
)
def test_parts_that_are_known_to_fail_together_are_refused_with_reason_and_source(networks, parts, source):
    with pytest.raises(UserError, match=f"{source}.*model.allow_known_bad=true"):
        game(networks, COLOUR, network_keys={"batch_norm": True}, **parts)
    step_of(game(networks, COLOUR, network_keys={"batch_norm": True}, **parts, allow_known_bad=True), COLOUR)


def test_ways_of_training_that_are_known_to_fail_are_refused_with_reason_and_source():
    pairs = game(("mlp", "mlp"), GREY, adversarial_loss="relativistic", penalty="r1_r2")
    pairs.refuse_training("16-mixed", 1)
    with pytest.raises(UserError, match="penalty_interval=2 has nothing to act on: penalty=none"):
        game(("mlp", "mlp"), GREY).refuse_training("32-true", 2)
    with pytest.raises(UserError, match=r"penalty_interval=16 with adversarial_loss=relativistic is known to fail"):
        pairs.refuse_training("32-true", 16)
    norm_free = game(OF_IMAGES[2], GREY, penalty="r1")
    norm_free.refuse_training("bf16-mixed", 16)
    with pytest.raises(UserError, match=r"precision=16-mixed .* known to fail: .*2501\.05441, appendix E"):
        norm_free.refuse_training("16-mixed", 1)
    game(OF_IMAGES[2], GREY, allow_known_bad=True).refuse_training("16-mixed", 1)
    relativistic = {"adversarial_loss": "relativistic", "penalty": "r1"}
    game(("mlp", "mlp"), GREY, **relativistic, allow_known_bad=True).refuse_training("32-true", 16)


def test_a_known_bad_way_ends_a_command_in_a_sentence(cache, tmp_path):
    arguments = ("model=r3gan", *small("r3gan"), "training.penalty_interval=4", f"hydra.run.dir={tmp_path}")
    said = call("train", *arguments, f"data.cache={cache}", "trainer.accelerator=cpu", "trainer.max_steps=2")
    assert said.code == 1
    assert "known to fail" in said.text
    assert "Traceback" not in said.text


# --- recipes and the options of their groups, as on the command line ---------------------------------------------------

RECIPES = sorted(name for name in options("model") if target("model", name) is GAN)
CHOICES = [
    *(f"network@generator={name}" for name in options("network") if name.endswith(("mlp", "generator", "conv_decoder"))),
    *(f"network@discriminator={name}" for name in options("network") if name.endswith(("mlp", "discriminator", "critic"))),
    *(f"adversarial_loss={name}" for name in options("adversarial_loss")),
    *(f"penalty={name}" for name in options("penalty")),
    *(f"conditioning={name}" for name in options("conditioning")),
    *(f"schedule@training.schedule={name}" for name in options("schedule")),
    "augmentation=diffaugment",
    "model.spectral_norm=true",
]
EXPECTED = r"known to fail|not packed|starts? at zero|schedule changes nothing|is given no class"


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("recipe", ["dcgan"])
def test_a_recipe_takes_every_option(recipe, choice):
    takes(recipe, choice)


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_every_option(recipe, choice):
    takes(recipe, choice)


def takes(recipe: str, choice: str) -> None:
    """Build a recipe with another option; it may be refused for what is known of the two, never for a key."""
    config = compose_model(f"model={recipe}", choice)
    spec = DataSpec("made_up", "image", (1, 16, 16), Values(DISCRETE, -1, 1, 256), tuple("abc"))
    try:
        with torch.device("meta") if not config.model.spectral_norm else nullcontext():
            build_model(config.model, spec, recipe)
        build(config.training)
    except UserError as error:
        assert re.search(EXPECTED, str(error)), error  # noqa: PT017 - either way is right


@pytest.mark.parametrize(
    ("model", "mistake", "words"),
    [
        ("dcgan", "discriminator.width=null", r"width=null, which must be a whole number of at least 1"),
        ("r3gan", "generator.num_blocks=0", r"num_blocks=0, which must be"),
        ("r3gan", "generator.group_size=0", r"group_size=0, which must be"),
        ("stylegan2", "generator.style_dim=0", r"style_dim=0, which must be"),
        ("pacgan", "discriminator.num_pieces=0", r"num_pieces=0, which must be"),
        ("gan", "model.latent_dim=null", r"model\.latent_dim=null must be a number of at least 1"),
        ("wgan_gp", "penalty.weight=null", r"penalty\.weight=null must be a number of at least 0"),
        ("wgan_gp", "adversarial_loss.drift=-1.0", r"adversarial_loss\.drift=-1\.0 must be at least 0"),
        ("projection_gan", "network@discriminator=small_classifier", r"parts do not fit together: .*unexpected keyword"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_a_sentence(model, mistake, words):
    config = compose_model(f"model={model}", mistake)
    spec = DataSpec("made_up", "image", (1, 16, 16), Values(DISCRETE, -1, 1, 256), tuple("abc"))
    with pytest.raises(UserError, match=words):
        build_model(config.model, spec, model)


def test_a_batch_without_a_whole_pack_is_refused_and_a_held_out_one_counts_for_nothing(cache, tmp_path):
    arguments = ("model=gan", "model.packing=7", f"data.cache={cache}", "trainer.accelerator=cpu", "metric=[]")
    said = call("train", *arguments, "loader.batch_size=4", f"hydra.run.dir={tmp_path / 'small'}", "trainer.max_steps=2")
    assert said.code == 1
    assert "loader.batch_size=4 is too small for a whole pack; set it to at least model.packing" in said.text
    left = ("loader.eval_batch_size=199", "trainer.max_steps=2", f"hydra.run.dir={tmp_path / 'left'}")  # of 200
    said = call("train", *arguments, *left)
    assert said.code == 0, said.text
