"""What changes in the course of a training, against its formula, and that it reaches the optimizers and the penalty."""

import functools
import math

import pytest
import torch
from torch import nn

from src.build import build, build_model
from src.core.errors import UserError
from src.training.fit import make_trainer, make_training_module
from src.training.gradient import GradientTraining
from src.training.schedules import Constant, Cosine, Linear, WarmUpCosine
from tests.configs import compose_model, load_option, options
from tests.examples import image_data


def adam(lr: float = 0.1, beta2: float = 0.9) -> torch.optim.Adam:
    return torch.optim.Adam(nn.Linear(1, 1).parameters(), lr, (0.5, beta2))


@pytest.mark.parametrize(
    ("schedule", "share"),
    [(Linear, lambda t: t), (Cosine, lambda t: (1 - math.cos(math.pi * t)) / 2)],
)
@pytest.mark.parametrize("seen", [0, 100, 250, 500, 1000, 5000])
def test_all_settings_go_the_same_way(schedule, share, seen):
    of = schedule(1000.0, lr_factor=0.25, penalty_factor=0.1, beta2=0.99)
    optimizer = adam()
    of.remember(optimizer)
    of.apply(optimizer, seen)
    t = share(min(1, seen / 1000))
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(0.1 * (1 + t * (0.25 - 1)))
    assert group["betas"] == pytest.approx((0.5, 0.9 + t * 0.09))
    assert of.penalty_factor(seen) == pytest.approx(1 + t * (0.1 - 1))


def test_a_constant_schedule_changes_nothing():
    optimizer = adam()
    Constant().remember(optimizer)
    Constant().apply(optimizer, 10**9)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert Constant().penalty_factor(10**9) == 1


def test_a_resumed_optimizer_goes_on_from_the_settings_as_they_were_given():
    of = Linear(1000.0, lr_factor=0.0, penalty_factor=1.0, beta2=None)
    first, second = adam(), adam()
    of.remember(first)
    of.apply(first, 500)
    of.remember(second)
    second.load_state_dict(first.state_dict())
    of.apply(second, 750)
    assert second.param_groups[0]["lr"] == pytest.approx(0.025)


def test_beta2_needs_an_optimizer_that_has_it():
    sgd = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    with pytest.raises(UserError, match="SGD has no betas"):
        Cosine(10.0, 1.0, 1.0, 0.99).remember(sgd)


@pytest.mark.parametrize(
    ("key", "value"), [("examples", 0.0), ("lr_factor", -1.0), ("penalty_factor", -0.1), ("beta2", 1.0), ("beta2", -0.1)]
)
def test_settings_that_make_no_sense_are_refused(key, value):
    good = {"examples": 10.0, "lr_factor": 1.0, "penalty_factor": 1.0, "beta2": 0.9}
    with pytest.raises(UserError, match=f"training.schedule.{key}={value}"):
        Linear(**good | {key: value})


@pytest.mark.parametrize("name", options("schedule"))
def test_every_schedule_is_built_from_its_yaml(name):
    if name in ("linear", "cosine"):  # what they change is for the user to say
        with pytest.raises(UserError, match=r"training\.schedule changes nothing"):
            build(load_option("schedule", name))
        return
    schedule = build(load_option("schedule", name))
    schedule.plan(1000, 10)
    assert 0 <= schedule.progress(10) <= 1


@pytest.mark.parametrize(("examples", "planned", "per_update"), [(1000.0, 77.0, 10), (None, 1000.0, 50)])
def test_warm_up_climbs_in_a_straight_line_and_then_falls_along_a_cosine_to_the_floor(examples, planned, per_update):
    schedule = WarmUpCosine(examples, warm_up=0.2, lr_factor=0.1)
    schedule.plan(planned, per_update)
    optimizer = adam()
    schedule.remember(optimizer)
    middle = 0.1 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    climb = [(seen, 0.1 * (seen + per_update) / (200 + per_update)) for seen in (0, 50, 100)]
    for seen, lr in (*climb, (200, 0.1), (400, middle), (600, 0.055), (1000, 0.01), (9000, 0.01)):
        schedule.apply(optimizer, seen)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr), seen
    assert schedule.penalty_factor(500) == 1


def test_warm_up_needs_an_end():
    with pytest.raises(UserError, match=r"no planned end: set training\.schedule\.examples="):
        WarmUpCosine(None, 0.1, 0.1).plan(None, 10)


def nanogpt_lr(it: int, warmup_iters: int, lr_decay_iters: int, least: float) -> float:
    """`get_lr` of github.com/karpathy/nanoGPT/train.py, over the learning rate."""
    if it < warmup_iters:
        return (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return least
    share = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return least + 0.5 * (1.0 + math.cos(math.pi * share)) * (1 - least)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_warm_up_is_nanogpts_to_the_step_also_of_updates_of_several_batches(accumulated):
    batch, schedule = 12, WarmUpCosine(12.0 * accumulated * 200, warm_up=0.05, lr_factor=0.1)
    schedule.plan(None, batch * accumulated)
    for it in range(210):
        seen = batch * accumulated * it
        for i in range(accumulated):
            if it < 10 or i == 0:  # all batches of a round climb as one update
                assert schedule.lr_factor(seen + batch * i) == pytest.approx(nanogpt_lr(it, 10, 200, 0.1)), it


def test_resumed_training_keeps_the_plan_it_began_with():
    first, resumed, given = WarmUpCosine(None, 0.1, 0.1), WarmUpCosine(None, 0.1, 0.1), WarmUpCosine(500.0, 0.1, 0.1)
    first.plan(1000, 10)
    resumed.load_state_dict(first.state_dict())
    resumed.plan(3000, 10)
    assert resumed.examples == 1000
    assert given.state_dict() == {}


@pytest.mark.parametrize(("key", "value"), [("examples", 0.0), ("warm_up", 1.0), ("warm_up", -0.1), ("lr_factor", -1.0)])
def test_warm_up_that_makes_no_sense_is_refused(key, value):
    with pytest.raises(UserError, match=f"training.schedule.{key}={value}"):
        WarmUpCosine(**{"examples": 10.0, "warm_up": 0.1, "lr_factor": 0.1} | {key: value})


def test_weight_decay_is_of_matrices_alone_where_asked_for(caplog):
    caplog.set_level("INFO")
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 5), nn.LayerNorm(5))
    knobs = {"log_every_n_steps": 1, "ema_half_life_examples": None, "gradient_clip_norm": None, "accumulate_batches": 1}
    make = functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3)
    module = GradientTraining(model, make, Constant(), seed=0, **knobs, decay_matrices_only=True)
    decayed, others = module.configure_optimizers().param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0)
    assert [list(weight.shape) for weight in decayed["params"]] == [[3, 4], [5, 4]]
    assert [list(weight.shape) for weight in others["params"]] == [[5], [5], [5]]
    assert "weight decay 0.3 on 2 tensors of 32 values; none on 3 of 15" in caplog.text
    model[0].weight.requires_grad_(False)
    trained, _ = (
        GradientTraining(model, make, Constant(), seed=0, **knobs, decay_matrices_only=True)
        .configure_optimizers()
        .param_groups
    )
    assert [list(weight.shape) for weight in trained["params"]] == [[5, 4]]
    assert "weight decay 0.3 on 1 tensors of 20 values; none on 3 of 15; 1 are not trained" in caplog.text
    plain = GradientTraining(model, make, Constant(), seed=0, **knobs).configure_optimizers()
    assert [len(group["params"]) for group in plain.param_groups] == [5]


def test_weight_decay_of_matrices_needs_an_optimizer_that_decays():
    knobs = {"log_every_n_steps": 1, "ema_half_life_examples": None, "gradient_clip_norm": None, "accumulate_batches": 1}
    make = functools.partial(torch.optim.LBFGS, lr=0.1)
    with pytest.raises(UserError, match=r"training\.decay_matrices_only=true needs .*; LBFGS has none"):
        GradientTraining(
            nn.Linear(1, 1), make, Constant(), seed=0, **knobs, decay_matrices_only=True
        ).configure_optimizers()


class Recorder(nn.Module):
    """Notes what penalty scales a model is asked with while it trains."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.scales: list[float] = []
        of = model.discriminator_loss

        def loss(batch, *, penalty_scale=1.0, generator=None):
            if torch.is_grad_enabled():
                self.scales.append(penalty_scale)
            return of(batch, penalty_scale=penalty_scale, generator=generator)

        model.discriminator_loss = loss


def fit(folder, num_steps: int, *overrides: str) -> tuple[nn.Module, Recorder, object]:
    config = compose_model("model=gan", "penalty=r1", *overrides)
    data = image_data((1, 8, 8), "discrete")
    model = build_model(config.model, data.spec, "gan")
    recorder = Recorder(model)
    module = make_training_module(model, build(config.optim), build(config.training), seed=0)
    settings = build(config.trainer) | {"accelerator": "cpu", "max_epochs": None, "max_steps": num_steps}
    make_trainer(folder, [], [], **settings | {"limit_val_batches": 0}).fit(module, datamodule=data)
    return model, recorder, module


def test_a_lazy_penalty_comes_on_every_kth_step_k_times_as_heavy(tmp_path):
    _, recorder, _ = fit(tmp_path, 7, "training.penalty_interval=3")
    assert recorder.scales == [3, 0, 0, 3, 0, 0, 3]


def test_a_lazy_penalty_counts_updates_not_batches(tmp_path):
    overrides = ("training.penalty_interval=2", "training.accumulate_batches=3", "trainer.max_steps=6")
    _, recorder, _ = fit(tmp_path, 6, *overrides)
    assert recorder.scales == [2, 2, 2, 0, 0, 0]


def test_the_schedule_reaches_penalty_and_optimizers(tmp_path):
    overrides = ("schedule@training.schedule=linear", "training.schedule.examples=80.0")
    keys = ("training.schedule.penalty_factor=0.0", "training.schedule.lr_factor=0.5", "training.schedule.beta2=0.5")
    _, recorder, module = fit(tmp_path, 6, *overrides, *keys)
    assert recorder.scales == pytest.approx([1 - 8 * step / 80 for step in range(6)])
    for optimizer in module.optimizers():
        group = optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(2e-4 * (1 - 0.5 * 40 / 80))
        assert group["betas"] == pytest.approx((0.5, 0.999 + (0.5 - 0.999) * 40 / 80))


def fit_vae(folder, *overrides: str, batch_size: int = 8):
    config = compose_model("model=vae", "encoder.hidden=[8]", "decoder.hidden=[8]", *overrides)
    data = image_data((1, 8, 8), "discrete", batch_size=batch_size)
    model = build_model(config.model, data.spec, "vae")
    module = make_training_module(model, build(config.optim), build(config.training), seed=0)
    settings = build(config.trainer) | {"accelerator": "cpu", "max_epochs": None, "max_steps": 5}
    make_trainer(folder, [], [], **settings | {"limit_val_batches": 0}).fit(module, datamodule=data)
    return module


def test_the_schedule_reaches_the_one_optimizer_of_a_model_with_a_loss(tmp_path):
    overrides = ("schedule@training.schedule=linear", "training.schedule.examples=80.0", "training.schedule.lr_factor=0.0")
    group = fit_vae(tmp_path, *overrides).optimizers().param_groups[0]
    assert group["lr"] == pytest.approx(1e-3 * (1 - 32 / 80))


@pytest.mark.parametrize("batch_size", [8, 128])
def test_schedule_is_planned_by_the_batches_that_there_are(tmp_path, batch_size):
    module = fit_vae(tmp_path, "schedule@training.schedule=warm_up_cosine", batch_size=batch_size)  # of 24 examples
    assert module.examples_seen == 5 * min(batch_size, 24)
    checkpoint: dict[str, object] = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["schedule"] == {"examples": module.examples_seen}


def test_a_schedule_of_a_penalty_is_refused_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match=r"training\.schedule\.penalty_factor is of the penalties"):
        fit_vae(tmp_path, "schedule@training.schedule=r3gan")
