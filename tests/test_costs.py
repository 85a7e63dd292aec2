"""What models cost: how sampling is measured, what results say of it, and what a comparison shows."""

import csv
import io
import json

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from src.core.devices import device_name
from src.core.rng import SampleNoise
from src.evaluation import costs as costs_module
from src.evaluation.costs import SamplingMeter, costs_in_words, costs_to_json
from src.evaluation.protocol import draw_samples
from src.run_comparison import compare_runs
from src.runs import Run
from tests.commands import call

CPU = torch.device("cpu")


class Plain(nn.Module):
    """Draws zeros, and does not count."""

    is_conditional = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2), requires_grad=False)
        self.network = nn.Linear(1, 1)

    def sample(self, n, condition=None, *, generator=None):
        return torch.zeros(n, 2)


class Counting(Plain):
    """Draws in seven evaluations, and says how."""

    num_evaluations = 0

    def sample(self, n, condition=None, *, generator=None):
        self.num_evaluations += 7 * n
        return torch.zeros(n, 2)

    def settings(self):
        return {"steps": 7}


class NoNetwork(Plain):
    """Has numbers, but no network."""

    def __init__(self) -> None:
        super().__init__()
        del self.network


class Behind(Plain):
    """Draws by another model, and then decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.density = Counting()

    def sample(self, n, condition=None, *, generator=None):
        return self.density.sample(n)


def drawn(model, num_samples=25, batch_size=10):
    meter = SamplingMeter(model)
    batches = list(meter.timed(draw_samples(model, num_samples, batch_size, 0, None)))
    assert sum(map(len, batches)) == num_samples
    return meter.to_json()


@pytest.mark.parametrize(
    ("model", "evaluations"), [(Plain(), 1.0), (Counting(), 7.0), (NoNetwork(), None), (Behind(), 8.0)]
)
def test_evaluations_per_sample_are_counted_or_one_pass_or_none(model, evaluations):
    assert drawn(model)["evaluations_per_sample"] == evaluations


def test_evaluations_from_before_are_not_counted_and_settings_are_told():
    model = Counting()
    model.sample(100)
    found = drawn(model)
    assert (found["evaluations_per_sample"], found["settings"]) == (7.0, {"steps": 7})
    assert found["device"] == device_name(CPU)
    assert f"({torch.get_num_threads()} threads)" in found["device"]


def test_time_is_that_of_the_drawing_without_the_first_batch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(costs_module.time, "perf_counter", lambda: now[0])

    class Slow(Plain):
        def sample(self, n, condition=None, *, generator=None):
            now[0] += 100.0 if n == 10 and now[0] == 0 else 2.0
            return torch.zeros(n, 2)

    model = Slow()
    meter = SamplingMeter(model)
    for _ in meter.timed(draw_samples(model, 25, 10, 0, None)):
        now[0] += 1000.0  # what is done with the samples does not count
    assert (meter.to_json()["seconds"], meter.to_json()["samples"]) == (4.0, 15)
    now[0] = 0.0
    alone = drawn(Slow(), num_samples=10)
    assert (alone["seconds"], alone["samples"]) == (100.0, 10)


def test_nothing_drawn_costs_nothing_and_leaves_what_was_known():
    assert SamplingMeter(Plain()).to_json() is None
    earlier = {"sampling": {"seconds": 1.0, "samples": 1}}
    assert costs_to_json(Plain(), None, None, earlier)["sampling"] == earlier["sampling"]
    assert costs_to_json(Plain(), None, None, {}) == {
        "parameters": 8,
        "training_seconds": None,
        "training_device": None,
        "sampling": None,
    }


def test_costs_in_words():
    sampling = {"seconds": 2.0, "samples": 500, "evaluations_per_sample": 7.0}
    costs = {"parameters": 1234, "training_seconds": 60.0, "training_device": "here", "sampling": sampling}
    words = "1,234 parameters; training took 60 s on here; 1,000 samples take 4 s, each with 7 evaluations of a network"
    assert costs_in_words(costs) == words
    none = costs | {"training_seconds": None, "sampling": sampling | {"evaluations_per_sample": None}}
    assert costs_in_words(none) == "1,234 parameters; 1,000 samples take 4 s"
    assert costs_in_words(costs | {"training_seconds": None, "sampling": None}) == "1,234 parameters"


def test_costs_in_words_name_what_the_autoencoder_cost_before():
    costs = costs_to_json(
        Plain(), (60.0, "here"), None, {}, {"parameters": 3, "training_seconds": 300.0} | {"training_device": "there"}
    )
    words = (
        "8 parameters, 3 of them the autoencoder's; training took 60 s on here after 300 s of the autoencoder's on there"
    )
    assert costs_in_words(costs) == f"{words}, 360 s in all"
    costs["autoencoder"]["training_seconds"] = None
    assert costs_in_words(costs).endswith("training took 60 s on here, without that of the autoencoder, which is not known")


def test_same_samples_with_a_meter():
    model = nn.Module()
    model.is_conditional = False
    model.weight = nn.Parameter(torch.zeros(()))
    model.sample = lambda n, condition, generator: generator.normal((n, 3), torch.zeros(()))
    metered = torch.cat(list(SamplingMeter(model).timed(draw_samples(model, 7, 3, 1, None))))
    assert torch.equal(metered, SampleNoise(1).normal((7, 3), torch.zeros(())))


# runs


def test_training_time_adds_up_and_outlives_a_change_of_the_status(tmp_path):
    run = Run(tmp_path)
    run.set_status("running")
    assert run.training_time() is None
    run.add_training_time(2.0, "here")
    run.set_status("interrupted")
    run.set_status("running")
    run.add_training_time(3.0, "there")
    run.set_status("done")
    assert run.training_time() == (5.0, "there")


def test_results_of_a_run_tell_what_it_cost(trained):
    run = trained("vae").run
    costs = run.results()["costs"]
    assert costs["training_seconds"] > 0
    assert costs["parameters"] > 10_000
    assert costs["sampling"]["evaluations_per_sample"] == 1.0
    assert costs["sampling"]["seconds"] > 0


# comparisons


def made(tmp_path, name, seed=0, model="vae", value=1.0, costs=None, settings=None):
    """A finished run by hand."""
    folder = tmp_path / "runs" / name
    folder.mkdir(parents=True)
    config = {"name": {"model": model, "data": "digits"}, "seed": seed, "model": {"_target_": f"src.models.{model}"}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    about = {"weights": "raw", "checkpoint": "last"} | ({} if settings is None else {"settings": settings})
    card = {"num_samples": 1000, "model": about, "software": {}}
    entry = {"value": value, "interval": None, "unit": "1", "better": "lower", "card": card, "anchors": {}, "parts": {}}
    (folder / "status.json").write_text(json.dumps({"status": "done", "time": "2026-01-01T12:00:00+00:00"}))
    results = {"schema": 2, "metrics": {"fd": entry}} | ({} if costs is None else {"costs": costs})
    (folder / "results.json").write_text(json.dumps(results))


def costs_of(seconds=30.0, device="CPU", per_sample=1.0, **settings):
    sampling = {"seconds": 2.0, "samples": 500, "evaluations_per_sample": per_sample, "device": "CPU", "settings": settings}
    return {"parameters": 1_234_567, "training_seconds": seconds, "training_device": device, "sampling": sampling}


def compared(tmp_path, form="markdown"):
    said = call("compare", str(tmp_path / "runs"), "--format", form)
    assert said.code == 0, said.text
    return said.text


def test_table_shows_costs_of_the_rows_and_of_older_runs_that_there_are_none(tmp_path):
    made(tmp_path, "a", seed=0, costs=costs_of(30.0))
    made(tmp_path, "b", seed=1, costs=costs_of(40.0))
    made(tmp_path, "c", model="old", value=2.0)
    table = compared(tmp_path).splitlines()
    costs = "| parameters | training [s] | sampling [s per 1,000] | evaluations [per sample] |"
    assert table[0].endswith(costs)
    assert table[2].endswith("| 1,234,567 | 35.0 ± 7.1 (2) | 4 | 1 |")
    assert table[3].endswith("| - | - | - | - |")
    assert table[0].count("|") == table[1].count("|")


def test_runs_without_costs_have_no_columns_for_them(tmp_path):
    made(tmp_path, "a")
    assert "parameters" not in compared(tmp_path)
    assert "Costs" not in compared(tmp_path, "text")


def test_costs_are_never_judged(tmp_path):
    for model, seconds in (("vae", 30.0), ("gan", 3000.0)):
        for seed in range(3):
            made(tmp_path, f"{model}{seed}", seed, model, value=1.0 + seed, costs=costs_of(seconds + seed))
    comparison = compare_runs([tmp_path / "runs"])
    assert {verdict.metric for verdict in comparison.verdicts} == {"fd"}
    assert "**3" not in compared(tmp_path)


def test_csv_has_a_line_for_each_cost_with_every_digit(tmp_path):
    made(tmp_path, "a", costs=costs_of(30.123456789))
    lines = [line for line in csv.DictReader(io.StringIO(compared(tmp_path, "csv"))) if line["verdict"] == "cost"]
    found = {(line["metric"], line["unit"]): line["value"] for line in lines}
    assert found == {
        ("parameters", ""): "1234567.0",
        ("training", "s"): "30.123456789",
        ("sampling", "s per 1,000"): "4.0",
        ("evaluations", "per sample"): "1.0",
    }
    assert {line["best"] for line in lines} == {"false"}


def test_devices_and_settings_behind_the_costs_are_told(tmp_path):
    made(tmp_path, "a", costs=costs_of())
    made(tmp_path, "b", model="flow", costs=costs_of(device="GPU", per_sample=99.0, steps=50, solver="heun"))
    text = compared(tmp_path, "text")
    for line in ("training on CPU: vae on digits", "training on GPU: flow on digits", "sampling on CPU"):
        assert line in text.splitlines()
    assert "sampling with steps=50, solver=heun: flow on digits" in text
    assert "99" in text


def test_values_drawn_with_other_settings_are_no_seed_of_the_same_row(tmp_path):
    for seed, steps in enumerate((50, 50, 10)):
        made(tmp_path, f"flow{seed}", seed, "flow", settings={"steps": steps})
    made(tmp_path, "vae")
    comparison = compare_runs([tmp_path / "runs"])
    assert [len(cell.values) for cell in comparison.columns[0].cells] == [2, 1]
    (refusal,) = comparison.refusals
    assert "flow2" in refusal
    assert 'its settings are {"steps":10}, the row\'s are {"steps":50}' in refusal
    assert [row.weights for row in comparison.rows] == ["raw, last", "raw, last"]


@pytest.mark.parametrize(
    "damage",
    [{"parameters": "many"}, {"sampling": {"seconds": 1.0}}, {"sampling": {"seconds": 1.0, "samples": 0}}, "x"],
)
def test_damaged_costs_leave_the_run_out(tmp_path, damage):
    made(tmp_path, "a", costs=costs_of())
    made(tmp_path, "b", model="gan", costs=damage)
    assert "its results.json or config.yaml is damaged" in compared(tmp_path)
