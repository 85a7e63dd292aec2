"""The stability monitor: its quantities against closed forms, and that it says what is wrong when it is."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from src.build import build, build_model
from src.core.batch import Batch
from src.training.callbacks.light_evaluation import LightEvaluation
from src.training.callbacks.stability import _as_in_training, mean_distance, separation
from tests.commands import train
from tests.configs import compose_model, load_option, small
from tests.examples import image_data


def test_separation_is_the_share_of_pairs_in_the_right_order():
    real, fake = torch.tensor([0.0, 1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, -1.0])
    pairs = [float(a > b) + 0.5 * float(a == b) for a in real for b in fake]
    assert separation(real, fake) == pytest.approx(sum(pairs) / len(pairs))
    assert separation(real, real) == 0.5
    assert separation(real + 10, fake) == 1.0
    assert separation(fake, real + 10) == 0.0


def test_mean_distance_is_over_pairs_of_different_examples():
    assert mean_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])) == pytest.approx((5 + 0 + 5) / 3)


class Game(nn.Module):
    """A model of two players that says what it is told to.

    Args:
        logits: of training, held-out and generated examples, told apart by their first pixel.
        spread: of the generated examples.
    """

    is_conditional = False

    def __init__(self, data, logits: tuple[float, float, float], spread: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self._data, self._logits, self._spread = data, logits, spread

    def players(self):
        return self, self

    def discriminator_loss(self, batch: Batch, *, penalty_scale: float = 1.0, generator=None): ...
    def generator_loss(self, batch: Batch, *, generator=None): ...
    def refuse_training(self, precision: str, penalty_interval: int) -> None: ...

    def sample(self, n: int, condition=None, *, generator=None) -> Tensor:
        return self._spread * generator.uniform((n, 1, 8, 8), self.weight).mul(2).sub(1) + 100

    def logits(self, x: Tensor, condition=None, *, generator=None) -> Tensor:
        train = self._data.to_units(Batch(torch.from_numpy(self._data.arrays.splits["train"].x.copy()))).x
        is_train = (x[:, None] == train[None]).flatten(2).all(2).any(1)
        is_fake = x.flatten(1).mean(1) > 50
        base = torch.where(is_fake, self._logits[2], torch.where(is_train, self._logits[0], self._logits[1]))
        return base + 0.01 * torch.arange(len(x)).remainder(3)


LEARNT = {"shown": {}, "num_validations": 3, "was_diverse": True}


def monitored(logits: tuple[float, float, float], spread: float, caplog) -> tuple[dict[str, float], str]:
    data = image_data((1, 8, 8), "discrete", num_classes=0, count=64)
    other = image_data((1, 8, 8), "discrete", num_classes=0, count=128)
    data.arrays.splits["val"] = type(data.arrays.splits["val"])(other.arrays.splits["train"].x[64:], None)
    logged: dict[str, float] = {}
    module = SimpleNamespace(
        model=Game(data, logits, spread),
        device=torch.device("cpu"),
        weight_average=None,
        step=7,
        log_quantities=logged.update,
    )
    callback = build(load_option("callback", "default").stability)
    callback.load_state_dict(LEARNT)
    trainer = SimpleNamespace(is_global_zero=True, datamodule=data)
    with caplog.at_level(logging.INFO):
        callback.on_validation_end(trainer, module)
    return logged, caplog.text


def test_nothing_is_said_of_a_game_that_goes_well(caplog):
    logged, said = monitored((0.1, 0.1, 0.1), 1.0, caplog)
    assert logged["stability/separation"] == pytest.approx(0.5)
    assert logged["stability/diversity"] == pytest.approx(1, abs=0.05)
    assert "stability/overfit" not in logged  # no difference, no ratio
    assert said == ""


def test_an_overfitting_discriminator_is_named(caplog):
    logged, said = monitored((2.0, -0.5, -1.0), 1.0, caplog)
    assert logged["stability/overfit"] == pytest.approx(2.5 / 3, abs=0.02)
    assert "step 7: the discriminator overfits" in said


def test_a_saturated_discriminator_is_named(caplog):
    logged, said = monitored((3.0, 3.0, -3.0), 1.0, caplog)
    assert logged["stability/separation"] == 1
    assert abs(logged["stability/overfit"]) < 0.01
    assert "the discriminator is saturated" in said
    assert "overfits" not in said


def test_a_collapsed_generator_is_named(caplog):
    logged, said = monitored((0.1, 0.1, 0.1), 0.1, caplog)
    assert logged["stability/diversity"] == pytest.approx(0.1, abs=0.02)
    assert "the generator has collapsed" in said


def test_a_generator_that_has_not_learnt_yet_has_not_collapsed(caplog):
    callback = build(load_option("callback", "default").stability)
    data = image_data((1, 8, 8), "discrete", num_classes=0, count=64)
    module = SimpleNamespace(
        device=torch.device("cpu"), weight_average=None, step=1, log_quantities=lambda _: None,
        model=Game(data, (0.0, 0.0, 0.0), 0.1),
    )  # fmt: skip
    trainer = SimpleNamespace(is_global_zero=True, datamodule=data)
    with caplog.at_level(logging.INFO):
        for validation in range(1, 6):
            callback.on_validation_end(trainer, module)
            assert ("collapsed" in caplog.text) == (validation == 5), "by then it should have learnt"


def test_a_quantity_that_is_no_longer_measured_is_said_nothing_of(caplog, monkeypatch):
    callback = build(load_option("callback", "default").stability)
    module = SimpleNamespace(model=Game(None, (0.0, 0.0, 0.0), 1.0), step=1, log_quantities=lambda _: None)
    trainer = SimpleNamespace(is_global_zero=True, datamodule=None)
    with caplog.at_level(logging.INFO):
        for measured in ({"overfit": 0.9}, {}, {"overfit": 0.1}):
            monkeypatch.setattr(callback, "_measure", lambda *_, measured=measured: measured)
            callback.on_validation_end(trainer, module)
    assert caplog.text.count("the discriminator overfits") == 2
    assert caplog.text.count("no longer: the discriminator overfits") == 1


def test_the_discriminator_is_asked_as_in_training_and_left_as_it_was():
    model = build_model(compose_model("model=cgan", *small("cgan")).model, image_data((3, 16, 16), "discrete").spec, "x")
    discriminator = model.players()[1]
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    model.eval()
    x, classes = torch.rand(8, 3, 16, 16), torch.arange(8) % 3
    calm = model.logits(x, classes)
    with _as_in_training(discriminator):
        eager = model.logits(x, classes)
    assert not torch.allclose(calm, eager)
    assert not discriminator.training
    assert all(torch.equal(value, before[name]) for name, value in discriminator.state_dict().items())


def test_it_says_when_something_is_right_again_and_says_nothing_twice(caplog):
    callback = build(load_option("callback", "default").stability)
    callback.load_state_dict(LEARNT)
    data = image_data((1, 8, 8), "discrete", num_classes=0, count=64)
    module = SimpleNamespace(
        device=torch.device("cpu"), weight_average=None, step=1, log_quantities=lambda _: None,
        model=Game(data, (0.0, 0.0, 0.0), 0.1),
    )  # fmt: skip
    trainer = SimpleNamespace(is_global_zero=True, datamodule=data)
    with caplog.at_level(logging.INFO):
        callback.on_validation_end(trainer, module)
        callback.on_validation_end(trainer, module)
        again = build(load_option("callback", "default").stability)
        again.load_state_dict(callback.state_dict())
        module.model = Game(data, (0.0, 0.0, 0.0), 1.0)
        again.on_validation_end(trainer, module)
    assert caplog.text.count("the generator has collapsed") == 2
    assert caplog.text.count("no longer: the generator has collapsed") == 1


def test_other_models_are_left_alone():
    callback = build(load_option("callback", "default").stability)
    module = SimpleNamespace(model=nn.Linear(1, 1))
    callback.on_validation_end(SimpleNamespace(is_global_zero=True), module)


def test_a_training_shows_the_monitor(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = set(EventAccumulator(str(trained("gan").run.tensorboard)).Reload().Tags()["scalars"])
    assert {f"stability/{name}" for name in ("logit_train", "logit_held_out", "logit_generated", "separation")} <= tags
    assert {f"stability/{name}" for name in ("diversity", "averaging")} <= tags
    assert {f"stability/{player}_gradient_norm" for player in ("generator", "discriminator")} <= tags


@pytest.mark.slow
def test_the_monitor_changes_no_training(tmp_path, cache):
    states = []
    for name, more in (("with", ()), ("without", ("~callback.stability",))):
        run = train(tmp_path / name, cache, "model=dcgan", "trainer.max_steps=20", "metric=[]", *more).run
        states.append(torch.load(run.checkpoint("last"), weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# --- best, final, and their ratio -------------------------------------------------------------------------------------


def light(*values: tuple[float, float]) -> LightEvaluation:
    """After validations with so much fd (lower is better) and coverage (higher is better)."""
    queue = iter(values)

    def measure(model, num_samples, metrics):
        fd, coverage = next(queue)
        better = {"fd": "lower", "coverage": "higher", "c_t": "zero"}
        return {"fd": fd, "coverage": coverage, "c_t": 0.1}, better, []

    callback = LightEvaluation(measure, every_n_validations=2, num_samples=10, metrics=["fd", "coverage", "c_t"])
    module = SimpleNamespace(model=None, averaged_weights=torch.no_grad, step=0, log_quantities=lambda _: None)
    for epoch in range(2 * len(values) - 1):
        module.step = 10 * (epoch + 1)
        is_last = epoch == 2 * len(values) - 2
        trainer = SimpleNamespace(should_stop=is_last, current_epoch=epoch, max_epochs=-1, is_global_zero=True)
        callback.on_validation_end(trainer, module)
    return callback


def test_best_and_final_and_their_ratio_are_kept():
    course = light((8.0, 0.2), (4.0, 0.8), (6.0, 0.4)).course
    assert course["fd"] == {"best": {"value": 4.0, "step": 40}, "final": {"value": 6.0, "step": 50}, "ratio": 1.5}
    assert course["coverage"] == {"best": {"value": 0.8, "step": 40}, "final": {"value": 0.4, "step": 50}, "ratio": 2.0}
    assert "c_t" not in course
    assert light((8.0, 0.2), (-0.5, 0.8)).course["fd"]["ratio"] is None


def test_a_resumed_run_remembers_its_best():
    before = light((8.0, 0.2), (4.0, 0.8))
    after = light((6.0, 0.4))
    resumed = LightEvaluation(lambda *_: ({"fd": 6.0}, {"fd": "lower"}, []), 1, 10, ["fd"])
    resumed.load_state_dict(before.state_dict())
    module = SimpleNamespace(model=None, averaged_weights=torch.no_grad, step=99, log_quantities=lambda _: None)
    trainer = SimpleNamespace(should_stop=True, current_epoch=9, max_epochs=-1, is_global_zero=True)
    resumed.on_validation_end(trainer, module)
    assert resumed.course["fd"]["best"]["value"] == 4.0
    assert after.course["fd"]["best"]["value"] == 6.0


def test_a_run_says_and_writes_its_course(trained):
    import json

    one = trained("gan")
    course = json.loads((one.run.path / "course.json").read_text())
    assert "effective_support" in course or "fd" in course
    assert "light evaluations: fd best" in one.said.text
