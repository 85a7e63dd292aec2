"""Points from known mixtures: their density and their draws against closed forms, and the metrics of modes on them."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from src.build import build_model
from src.core.errors import NotApplicable, UserError
from src.core.mixture import IsotropicMixture
from src.core.protocols import Adversarial, ExpectationMaximization, NeedsPreparation
from src.core.rng import SampleNoise, StreamNoise
from src.core.spec import DataSpec
from src.data.arrays import Arrays
from src.data.gaussian_mixtures import grid, ring
from src.data.loading import ArrayData
from src.evaluation.results import absences, findings
from src.metrics import mixture_modes
from src.metrics.metric import HELD_OUT, NOISE, UNTRAINED, Measurement
from src.metrics.mixture_modes import kl_by_luck, kl_floor, kl_to_weights, quality_ceiling
from src.metrics.store import Store
from src.runs import Run
from src.training.callbacks.point_pictures import point_picture
from tests.commands import Trained, call
from tests.configs import compose_model, load_option, models_by_themselves, options
from tests.evaluating import Draws, all_metrics, results_of
from tests.measuring import image_set, make_inputs, make_metric

SETS = {"ring": ring, "grid": grid}
METRICS = ("modes_covered", "high_quality", "reverse_kl")
CEILING = 1 - math.exp(-4.5)


@pytest.fixture(scope="module", params=SETS)
def arrays(request, tmp_path_factory) -> Arrays:
    return _as_configured(request.param, tmp_path_factory.getbasetemp() / "mixtures")


def _as_configured(name: str, cache, **keys: float) -> Arrays:
    node = dict(load_option("data", name).data)
    node.pop("_target_")
    return SETS[name](**(node | {"cache": str(cache)} | keys))


# --- the mixture -----------------------------------------------------------------------------------------------------

UNEVEN = IsotropicMixture(
    torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]], dtype=torch.float64),
    0.7,
    torch.tensor([0.25, 0.75], dtype=torch.float64),
)


def _by_torch(mixture: IsotropicMixture) -> MixtureSameFamily:
    components = Independent(Normal(mixture.means, torch.tensor(mixture.sigma, dtype=torch.float64)), 1)
    return MixtureSameFamily(Categorical(mixture.weights), components)


def test_density_is_that_of_torchs_mixture(arrays):
    for mixture in (arrays.density, UNEVEN):
        x = 3 * SampleNoise(0).normal((500, mixture.means.shape[1]), mixture.means)
        near = mixture.sample(500, SampleNoise(1))[0]
        for points in (x, near):
            torch.testing.assert_close(mixture.log_prob(points), _by_torch(mixture).log_prob(points))


def test_density_of_the_ring_integrates_to_one():
    mixture = ring_of(sigma=0.1)
    steps = torch.linspace(-2, 2, 401, dtype=torch.float64)
    points = torch.cartesian_prod(steps, steps)
    assert float(mixture.log_prob(points).exp().sum()) * 0.01**2 == pytest.approx(1, abs=1e-9)


def ring_of(sigma: float) -> IsotropicMixture:
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return IsotropicMixture(torch.stack([angle.cos(), angle.sin()], 1), sigma, torch.full((8,), 1 / 8, dtype=torch.float64))


def test_nearest_component_and_its_distance_in_sigmas():
    distance, component = UNEVEN.nearest(torch.tensor([[1.0, -2.0, 1.9], [0.0, 0.7, 0.0]]))
    assert component.tolist() == [1, 0]
    assert distance.tolist() == pytest.approx([2, 1])


def test_draws_of_an_uneven_mixture_have_its_weights_means_and_sigma():
    count = 40_000
    x, component = UNEVEN.sample(count, SampleNoise(3))
    assert float((component == 1).double().mean()) == pytest.approx(0.75, abs=4 * math.sqrt(0.25 * 0.75 / count))
    residual = (x - UNEVEN.means[component]) / UNEVEN.sigma
    assert residual.mean(0).abs().max() < 4 / math.sqrt(count)
    assert float(residual.square().mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / (3 * count)))


# --- the data --------------------------------------------------------------------------------------------------------


def test_points_have_pacgans_conventions(arrays):
    means = arrays.density.means
    if arrays.spec.name == "ring":
        expected = [(math.cos(math.pi * k / 4), math.sin(math.pi * k / 4)) for k in range(8)]
    else:
        expected = [(x, y) for y in (-4, -2, 0, 2, 4) for x in (-4, -2, 0, 2, 4)]
    torch.testing.assert_close(means, torch.tensor(expected, dtype=torch.float64))
    assert arrays.density.sigma == {"ring": 0.01, "grid": 0.05}[arrays.spec.name]
    assert {split: len(part) for split, part in arrays.splits.items()} == {"train": 100_000, "val": 10_000, "test": 10_000}
    assert {part.x.dtype for part in arrays.splits.values()} == {np.dtype("float32")}
    assert isinstance(arrays.splits["train"].x, np.memmap)
    assert arrays.spec.describe() == f"vector 2, continuous values without bounds, {len(means)} classes"


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_points_are_draws_of_the_mixture(arrays, split):
    mixture, part = arrays.density, arrays.splits[split]
    x, y = torch.from_numpy(np.array(part.x)).double(), torch.from_numpy(part.y)
    count, num_modes = len(x), mixture.num_components
    assert stats.chisquare(y.bincount(minlength=num_modes).numpy()).pvalue > 1e-4
    residual = (x - mixture.means[y]) / mixture.sigma
    assert residual.mean(0).abs().max() < 4 / math.sqrt(count)
    torch.testing.assert_close(torch.cov(residual.T), torch.eye(2, dtype=torch.float64), rtol=0, atol=5 / math.sqrt(count))
    assert stats.kstest(residual.flatten().numpy(), "norm").pvalue > 1e-4
    # with components apart, -log p is ln K + ln(2 pi sigma^2) + chi-square / 2, whose mean is 1 and whose variance is 1
    entropy = math.log(num_modes) + math.log(2 * math.pi * mixture.sigma**2) + 1
    assert float(-mixture.log_prob(x).mean()) == pytest.approx(entropy, abs=4 / math.sqrt(count))


def test_splits_share_no_point(arrays):
    x = np.concatenate([part.x for part in arrays.splits.values()])
    assert len(np.unique(x, axis=0)) > 0.999 * len(x)  # float32 has few values within a component's width


def test_same_points_are_drawn_everywhere_and_others_for_other_settings(tmp_path):
    here, there = (_as_configured("ring", tmp_path / name, num_train=50) for name in ("here", "there"))
    assert here.fingerprint == there.fingerprint
    wider = _as_configured("ring", tmp_path / "here", num_train=50, radius=2.0)
    assert wider.fingerprint != here.fingerprint
    assert np.linalg.norm(wider.splits["train"].x, axis=1).mean() == pytest.approx(2, abs=0.01)


def test_points_do_not_depend_on_the_machine(tmp_path):
    """The first ones as they were drawn once, on Linux with an x86-64 processor."""
    expected = [[0.9978526, 0.0189540], [0.6973963, -0.7039266], [1.0021837, -0.0064325]]
    np.testing.assert_allclose(_as_configured("ring", tmp_path).splits["train"].x[:3], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "key", "value", "sentence"),
    [
        ("ring", "num_modes", 0, "data.num_modes=0 must be at least 1"),
        ("ring", "radius", 0.0, "data.radius=0.0 must be a positive number"),
        ("ring", "sigma", -1, "data.sigma=-1 must be a positive number"),
        ("grid", "side", 0, "data.side=0 must be at least 1"),
        ("grid", "spacing", math.inf, "data.spacing=inf must be a positive number"),
        ("grid", "num_val", 1, "data.num_val=1 must be at least 2"),
    ],
)
def test_senseless_mixture_is_refused_by_its_key(tmp_path, name, key, value, sentence):
    with pytest.raises(UserError, match=sentence):
        _as_configured(name, tmp_path, **{key: value})


def test_batches_are_the_points_as_they_are(arrays):
    data = ArrayData(arrays, batch_size=100, eval_batch_size=512, num_workers=0, seed=0)
    batch = data.to_units(next(iter(data.train_dataloader())))
    assert batch.x.dtype == torch.float32
    known = {row.tobytes() for row in arrays.splits["train"].x}
    assert all(row.tobytes() in known for row in batch.x.numpy())
    held_out = torch.cat([data.to_units(some).x for some in data.held_out_loader("test")])
    assert torch.equal(held_out, torch.from_numpy(np.array(arrays.splits["test"].x)))


def test_unbounded_spec_survives_a_round_trip_through_json(arrays):
    assert DataSpec.from_dict(json.loads(json.dumps(arrays.spec.to_dict()))) == arrays.spec


# --- the metrics -----------------------------------------------------------------------------------------------------


def _measured(name: str, points: Tensor, arrays: Arrays) -> Measurement:
    inputs = make_inputs(generated=image_set(points.float(), batch_size=1000))
    return make_metric(name).measure(replace(inputs, spec=arrays.spec, density=arrays.density))


def test_true_draws_reach_the_ceiling_all_modes_and_the_floor(arrays):
    x, _ = arrays.density.sample(100_000, SampleNoise(7))
    quality = _measured("high_quality", x, arrays)
    assert quality.value == pytest.approx(CEILING, abs=4 * math.sqrt(CEILING * (1 - CEILING) / 1e5))
    assert quality.card["ceiling"] == pytest.approx(CEILING)
    assert "(ceiling 98.89%)" in quality.finding.words
    assert quality.interval[0] < quality.value < quality.interval[1]
    covered = _measured("modes_covered", x, arrays)
    num_modes = arrays.density.num_components
    assert (covered.value, covered.parts) == (num_modes, {"of": num_modes, "expected": pytest.approx(num_modes)})
    divergence = _measured("reverse_kl", x, arrays)
    num_good = divergence.parts["counted"]
    assert num_good == round(quality.value * 1e5)
    assert divergence.parts["floor"] == kl_floor(arrays.density.num_components, num_good)
    assert divergence.value < divergence.parts["at_most_by_luck"]
    assert {some.finding.alarm for some in (quality, covered, divergence)} == {None}


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_ceiling_is_that_of_the_chi_square(dim):
    assert quality_ceiling(dim) == pytest.approx(stats.chi2.cdf(9, dim), abs=1e-12)
    assert quality_ceiling(2) == pytest.approx(CEILING, abs=1e-12)


@pytest.mark.parametrize(("num_modes", "expected"), [(8, 0.0014), (25, 0.0048)])
def test_floor_of_the_divergence_is_what_true_draws_have_on_average(num_modes, expected):
    num_samples, num_repeats = 2500, 4000
    weights = torch.full((num_modes,), 1 / num_modes, dtype=torch.float64)
    counts = np.random.default_rng(0).multinomial(num_samples, weights.numpy(), size=num_repeats)
    found = torch.stack([kl_to_weights(row, weights) for row in torch.from_numpy(counts)])
    floor = kl_floor(num_modes, num_samples)
    assert floor == pytest.approx(expected, abs=5e-5)
    # 2 N KL is about chi-square with K - 1 degrees of freedom; the next term of the mean is of the order 1 / N^2
    tolerance = 4 * math.sqrt(2 * (num_modes - 1) / num_repeats) / (2 * num_samples) + num_modes**2 / num_samples**2
    assert float(found.mean()) == pytest.approx(floor, abs=tolerance)


@pytest.mark.parametrize(("num_modes", "num_samples"), [(8, 2500), (25, 2500), (1000, 1000), (1000, 2600), (1000, 26_000)])
def test_luck_explains_a_divergence_with_the_chance_it_is_given(num_modes, num_samples, monkeypatch):
    """By simulation, at a chance that can be simulated. For few samples a plain chi-square is off."""
    monkeypatch.setattr(mixture_modes, "chi_square_quantile", lambda dof: stats.chi2.isf(0.05, dof))
    weights = torch.full((num_modes,), 1 / num_modes, dtype=torch.float64)
    counts = np.random.default_rng(0).multinomial(num_samples, weights.numpy(), size=2000)
    bound = kl_by_luck(weights, num_samples)
    share = np.mean([float(kl_to_weights(row, weights)) > bound for row in torch.from_numpy(counts)])
    assert share == pytest.approx(0.05, abs=0.02)


def test_luck_of_often_drawn_modes_is_chi_square_whatever_their_weights():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert kl_by_luck(weights, 50_000) == pytest.approx(stats.chi2.isf(1e-4, 3) / 1e5, rel=1e-2)
    assert kl_by_luck(torch.ones(1, dtype=torch.float64), 100) == 0


def test_divergence_of_some_of_equal_modes_is_the_logarithm_of_their_ratio():
    weights = torch.full((8,), 1 / 8, dtype=torch.float64)
    assert float(kl_to_weights(torch.tensor([5, 5, 0, 0, 0, 0, 0, 0]), weights)) == pytest.approx(math.log(4))
    uneven = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert float(kl_to_weights(torch.tensor([1, 3]), uneven)) == 0
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(kl_to_weights(torch.tensor([7, 7]), uneven)) == pytest.approx(expected)


def test_hand_made_samples_are_counted_by_hand(arrays):
    """Two at mode 0 and one at mode 1, just inside three sigma; one just outside mode 2, and one far from everything."""
    means, sigma = arrays.density.means, arrays.density.sigma
    diagonal = torch.tensor([1, 1], dtype=torch.float64) / math.sqrt(2)
    inside, outside = 2.99 * sigma * diagonal, 3.01 * sigma * diagonal  # both inside the box of three sigma
    x = torch.stack([means[0], means[0] + inside, means[1] - inside, means[2] + outside, means[2] + 1e3])
    covered, quality, divergence = (_measured(name, x, arrays) for name in METRICS)
    num_modes = arrays.density.num_components
    assert (covered.value, covered.parts["of"], covered.finding.alarm) == (2, num_modes, None)
    assert "(in 5 samples, too few to call a mode missing; a perfect sampler reaches about " in covered.finding.words
    assert quality.value == 3 / 5
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert divergence.value == pytest.approx(math.log(num_modes) - entropy)
    assert (divergence.card["num_samples"], divergence.parts["counted"]) == (5, 3)
    assert divergence.parts["floor"] == pytest.approx(min((num_modes - 1) / 6, math.log(num_modes)))
    assert divergence.card["largest"] == pytest.approx(math.log(num_modes))
    assert covered.parts["expected"] == pytest.approx(num_modes * (1 - (1 - CEILING / num_modes) ** 5))
    by_nearest = arrays.density.nearest(x.float())[1].bincount(minlength=num_modes)
    assert divergence.parts["of_all_samples"] == pytest.approx(float(kl_to_weights(by_nearest, arrays.density.weights)))


def test_collapse_on_one_mode_is_an_alarm(arrays):
    x = arrays.density.means[:1] + arrays.density.sigma * SampleNoise(0).normal((2500, 2), arrays.density.means)
    covered, quality, divergence = (_measured(name, x, arrays) for name in METRICS)
    assert covered.value == 1
    missing = [name for name in covered.parts if name.startswith("missing_")]
    assert len(missing) == arrays.density.num_components - 1
    assert covered.finding.words.endswith("and 14 more)" if arrays.spec.name == "grid" else "5, 6, 7)")
    assert quality.value == pytest.approx(CEILING, abs=0.01)
    assert divergence.value == pytest.approx(math.log(arrays.density.num_components))
    assert [some.finding.alarm for some in (covered, quality, divergence)] == ["modes", None, "modes"]


def test_samples_between_the_modes_are_an_alarm_and_have_no_histogram(arrays):
    x = arrays.density.means + 5 * arrays.density.sigma
    points = x.repeat(100, 1)
    assert _measured("high_quality", points, arrays).finding.alarm == "underfit"
    assert _measured("modes_covered", points, arrays).value == 0
    with pytest.raises(NotApplicable, match=r"none of .* samples is within 3 sigma"):
        _measured("reverse_kl", points, arrays)


@pytest.mark.parametrize("name", METRICS)
def test_data_without_a_mixture_have_no_value_and_are_named(name):
    with pytest.raises(
        NotApplicable, match="it is of a known isotropic mixture or of stacked images; data=made_up is neither"
    ):
        make_metric(name).measure(make_inputs(generated=image_set(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))))


def test_metric_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"metric\.high_quality\.alarm_below=2 must be between 0 and 1"):
        make_metric("high_quality", alarm_below=2)
    with pytest.raises(UserError, match=r"metric\.reverse_kl\.alarm_above=-1 must be at least 0"):
        make_metric("reverse_kl", alarm_above=-1)


# --- whole evaluations -----------------------------------------------------------------------------------------------


def test_evaluation_of_a_perfect_sampler_has_all_rows_and_reasons(arrays):
    mixture = arrays.density
    perfect = Draws(lambda n, noise: mixture.sample(n, noise)[0].float())
    untrained = Draws(lambda n, noise: noise.normal((n, 2), torch.zeros(())))
    data = ArrayData(arrays, batch_size=100, eval_batch_size=512, num_workers=0, seed=0)
    metrics = all_metrics() | {"wasserstein": make_metric("wasserstein", num_points=200)}  # the cost grows with their cube
    results = results_of(perfect, Store(None), data, num_samples=2500, untrained=untrained, metrics=metrics)
    entries = results["metrics"]
    assert {name for name, entry in entries.items() if "value" in entry} == {*METRICS, "wasserstein"}
    of_images = {
        name for name, entry in entries.items() if entry.get("not_applicable", "").startswith("it is of images; data=")
    }
    assert {"fd", "modes", "class_kl", "copying_pixels", "fid", "precision"} <= of_images
    assert any(line.endswith(f"data={arrays.spec.name} gives vector") for line in absences(results))
    assert len(findings(results)) == 1  # no alarm
    for entry in (entries[name] for name in METRICS):
        assert {HELD_OUT, NOISE, UNTRAINED} == set(entry["anchors"])
        assert entry["card"]["quantisation"] == "none"
        assert entry["card"]["reference"] == "the mixture itself"
    quality = entries["high_quality"]["anchors"]
    assert quality[HELD_OUT]["value"] == pytest.approx(CEILING, abs=0.009)
    assert quality[NOISE]["value"] < 0.1
    assert entries["reverse_kl"]["anchors"][HELD_OUT]["value"] < 0.02


# --- training, pictures and samples ----------------------------------------------------------------------------------

ON_POINTS = {  # what each model that takes vectors is trained with
    "autoencoder": (),
    "cvae": ("likelihood=gaussian_learned_scale",),
    "diffusion": (),
    "flow": (),
    "flow_matching": (),
    "gan": (),
    "gmm": (),
    "iwae": ("likelihood=gaussian_learned_scale",),
    "pacgan": (),
    "vae": ("likelihood=gaussian_learned_scale",),
}
SMALL = ("data.num_train=400", "data.num_val=100", "data.num_test=100", "trainer.max_steps=4", "loader.batch_size=100")


@pytest.fixture(scope="module", params=[("gan", "grid"), ("cvae", "ring")], ids=lambda pair: "-".join(pair))
def trained(request, tmp_path_factory) -> tuple[str, Trained]:
    model, data = request.param
    folder, cache = tmp_path_factory.mktemp("points"), tmp_path_factory.getbasetemp() / "small_mixtures"
    arguments = (f"model={model}", f"data={data}", "trainer=debug", *SMALL, *ON_POINTS[model])
    said = call("train", *arguments, f"hydra.run.dir={folder / 'run'}", f"data.cache={cache}")
    assert said.code == 0, said.text
    return model, Trained(Run.open(folder / "run"), said)


def test_run_on_points_measures_modes_and_draws_pictures(trained):
    model, (run, said) = trained[0], (trained[1].run, trained[1].said)
    metrics = run.results()["metrics"]
    assert {"modes_covered", "high_quality"} <= {name for name, entry in metrics.items() if "value" in entry}
    assert "of high quality (ceiling 98.89%)" in said.text
    kinds = {"samples", "density"} | ({"reconstructions", "interpolations", "classes"} if model == "cvae" else set())
    kinds |= {"latent_interpolations"} if model != "cvae" else set()  # the prior of the cvae is not N(0, I)
    sizes = {file.name: Image.open(file).size for file in run.samples.glob("*.png")}
    assert {re.split("_(?:step|epoch)_", name)[0] for name in sizes} == kinds
    assert {size for name, size in sizes.items() if not name.startswith("density")} == {(512, 512)}
    if model == "cvae":
        assert metrics["bound"]["unit"] == "nats"
        assert "bits per dimension are of discrete values" in metrics["bound_bits_per_dim"]["not_applicable"]


def test_sampling_writes_points_that_depend_on_the_seed_alone(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("src.sample_pictures._DENSITY_SAMPLES", 1000)  # in batches of seven, too
    model, run = trained[0], trained[1].run
    for name, more in (("first", ["n=30"]), ("in_parts", ["n=30", "batch_size=7"]), ("other", ["n=30", "seed=1"])):
        said = call("sample", f"run={run.path}", f"out={tmp_path / name}", *more)
        assert said.code == 0, said.text
    assert sorted(file.name for file in (tmp_path / "first").iterdir()) == [
        ".drawn",
        "density.png",
        "points.csv",
        "points.npy",
        "points.png",
    ]
    first, in_parts, other = (np.load(tmp_path / name / "points.npy") for name in ("first", "in_parts", "other"))
    assert (first.shape, first.dtype) == ((30, 2), np.dtype("float32"))
    np.testing.assert_allclose(in_parts, first, rtol=0, atol=1e-5)
    assert not np.allclose(other, first)
    rows = [line.split(",") for line in (tmp_path / "first" / "points.csv").read_text().splitlines()]
    assert rows[0] == ["x0", "x1", *(["class"] if model == "cvae" else [])]
    np.testing.assert_array_equal(np.array([row[:2] for row in rows[1:]], dtype=np.float32), first)
    if model == "cvae":
        assert [row[2] for row in rows[1:]] == [str(i % 8) for i in range(30)]


def test_points_of_someone_else_are_left_alone(trained, tmp_path):
    (tmp_path / "points.npy").write_bytes(b"mine")
    said = call("sample", f"run={trained[1].run.path}", f"out={tmp_path}", "n=3")
    assert said.code == 1
    assert f"out={tmp_path} holds points.npy, which was not drawn by this program; give another folder" in said.text
    assert [file.name for file in tmp_path.iterdir()] == ["points.npy"]
    assert (tmp_path / "points.npy").read_bytes() == b"mine"


def _built_or_refused(config: DictConfig, arrays: Arrays, model: str) -> tuple[nn.Module | None, str]:
    try:
        return build_model(config.model, arrays.spec, model), ""
    except UserError as error:
        return None, str(error)


@pytest.mark.parametrize("model", models_by_themselves())
def test_every_model_learns_from_points_or_refuses_them(arrays, model):
    fits = ("likelihood=gaussian_learned_scale",) if "likelihood" in compose_model(f"model={model}") else ()
    config = compose_model(f"model={model}", *fits)
    built, refusal = _built_or_refused(config, arrays, model)
    if built is None:
        assert model not in ON_POINTS
        assert re.search(f"model={model} with data={arrays.spec.name}: .* (2|vector) ", refusal)
        return
    data = ArrayData(arrays, batch_size=64, eval_batch_size=512, num_workers=0, seed=0)
    batch = data.to_units(next(iter(data.train_dataloader())))
    if isinstance(built, NeedsPreparation):
        built.prepare(lambda: [batch], generator=StreamNoise(0))
    if isinstance(built, Adversarial):
        terms = [built.discriminator_loss(batch), built.generator_loss(batch)]
    elif isinstance(built, ExpectationMaximization):
        terms = [built.accumulate(batch)]
    else:
        terms = [built.loss(batch)]
    assert all(some["loss"].isfinite().all() for some in terms)


@pytest.mark.parametrize("likelihood", options("likelihood"))
def test_only_densities_are_likelihoods_of_points(arrays, likelihood):
    config = compose_model("model=vae", f"likelihood={likelihood}")
    if likelihood.startswith("gaussian"):
        assert build_model(config.model, arrays.spec, "vae").likelihood.is_normalised
    else:
        with pytest.raises(UserError, match=f"model=vae with data={arrays.spec.name}: .*choose .*likelihood="):
            build_model(config.model, arrays.spec, "vae")


def _is_red(picture: Tensor) -> Tensor:
    return picture[0].int() - picture[2].int() > 40


def test_picture_shows_every_point_at_its_place():
    data = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    picture = point_picture(torch.tensor([[1.0, -1.0], [0.0, 0.0]]), data)
    assert (picture.shape, picture.dtype) == ((3, 512, 512), torch.uint8)
    side, margin = 512, 512 * 0.15 / 1.3
    rows, columns = _is_red(picture).nonzero().unbind(1)
    assert set(((rows > side // 2 + 9).long() + 2 * (columns > side // 2 + 9).long()).tolist()) == {
        0,
        3,
    }  # middle; below right
    assert int(rows.max()) == pytest.approx(side - margin, abs=3)
    assert int(columns.max()) == pytest.approx(side - margin, abs=3)
    grey = (picture.sum(0) < 765) & ~_is_red(picture)
    assert grey[int(side - margin), int(margin)]
    assert grey[int(margin), int(side - margin)]


def test_picture_shows_points_outside_on_its_rim_and_none_that_are_no_numbers():
    data = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    far = _is_red(point_picture(torch.tensor([[1e9, 0.0], [0.0, math.nan]]), data))
    assert far[:, -1].any()
    assert not far[:, :-3].any()
    assert not _is_red(point_picture(torch.full((3, 2), math.nan), data)).any()
    assert point_picture(torch.zeros(1, 2), torch.zeros(4, 2)).shape == (3, 512, 512)  # data without any extent
