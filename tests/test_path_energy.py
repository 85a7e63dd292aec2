"""The energy of paths, of models whose paths are known."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from src.core.errors import NotApplicable, UserError
from src.core.protocols import Terms
from src.core.rng import Noise, SampleNoise
from src.core.spec import OwnUnits
from src.metrics.metric import LOWER, STANDARDIZED
from src.metrics.path_energy import PathEnergy
from tests.examples import vector_spec
from tests.measuring import byte_images, image_set, make_inputs, make_metric


class Moves(nn.Module):
    """The displacement of path i is a draw of its noise, squared; what it bends is its class, or 2."""

    is_conditional = False

    def path_energy_terms(self, n: int, condition: Tensor | None = None, *, generator: Noise) -> Terms:
        z = generator.normal((n,), torch.zeros((), dtype=torch.float64))
        bend = torch.full((n,), 2.0) if condition is None else condition.float()
        return {"displacement": z.square(), "bend": bend}

    def path_settings(self) -> dict[str, object]:
        return {"solver": "by heart"}


class MovesByClass(Moves):
    is_conditional = True


def test_energy_is_the_mean_of_its_parts_with_an_interval():
    measured = PathEnergy(1200).measure(make_inputs(Moves(), seed=3))
    assert measured.parts["bend"] == 2
    assert measured.value == pytest.approx(measured.parts["displacement"] + 2)
    assert measured.parts["displacement"] == pytest.approx(1, abs=0.15)
    z = SampleNoise(3).normal((1200,), torch.zeros((), dtype=torch.float64))
    half = stats.norm.ppf(0.975) * stats.sem(z.square().numpy())
    assert measured.interval == pytest.approx((measured.value - half, measured.value + half))
    assert (measured.unit, measured.better) == ("data units^2", LOWER)
    assert measured.card == {"num_paths": 1200, "seed": 3, "paths": {"solver": "by heart"}}


def test_energy_of_a_table_is_in_units_of_its_standardized_columns():
    spec = replace(vector_spec(2), own_units=OwnUnits(("a", "b"), (0.0, 0.0), (1.0, 9.0)))
    measured = PathEnergy(2).measure(replace(make_inputs(Moves()), spec=spec))
    assert (measured.unit, measured.card["units"]) == ("standardized units^2", STANDARDIZED)


def test_paths_of_a_conditional_model_have_the_classes_of_the_samples():
    labels = torch.tensor([0, 1, 2, 2, 2, 2])
    generated = image_set(byte_images(6), labels, batch_size=4)
    measure = PathEnergy(4).measure(make_inputs(MovesByClass(), generated=generated))
    assert (measure.parts["bend"], measure.card["num_paths"]) == (5 / 4, 4)
    assert PathEnergy(100).measure(make_inputs(MovesByClass(), generated=generated)).card["num_paths"] == 6


def test_models_without_paths_have_no_energy():
    with pytest.raises(NotApplicable, match="fake has no HasPaths"):
        PathEnergy(10).measure(make_inputs(nn.Identity()))


@pytest.mark.parametrize("num_paths", [1, 2.5])
def test_too_few_paths_are_refused(num_paths):
    with pytest.raises(UserError, match=rf"metric\.path_energy\.num_paths={num_paths} must be a whole number"):
        PathEnergy(num_paths)


def test_the_yaml_makes_it():
    assert isinstance(make_metric("path_energy"), PathEnergy)
