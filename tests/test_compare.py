"""`python -m src.compare`: its mathematics against closed forms, and what it puts side by side and what it does not."""

import csv
import io
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console
from scipy import stats

from src.compare import main
from src.evaluation.comparison_formats import print_text, sentences
from src.evaluation.significance import holm, independent_difference, paired_difference, sign_flip_p
from src.run_comparison import compare_runs
from tests.commands import Said, call, run_cli

PAIRS = [2.0, 1.1, 3.5, 0.4, 1.9]


@dataclass(frozen=True)
class Folder:
    """Where a test's runs lie, with a way to make one by hand."""

    path: Path
    settings: dict[str, Any] = field(default_factory=lambda: {"latent_dim": 20})
    rest: dict[str, Any] = field(default_factory=dict)  # of the config

    def run(self, name: str, model: str = "vae", seed: int = 0, time: str = "12:00", **metrics: Any) -> Path:
        """A finished run with results; each metric is a value or a whole entry."""
        config = self.rest | {
            "name": {"model": model, "data": "digits"},
            "seed": seed,
            "model": {"_target_": f"src.models.{model}"} | self.settings,
            "callback": {"pictures": {"every": seed}},
            "data": {"_target_": "src.data.digits.digits", "cache": f"somewhere/{name}"},
        }
        entries = {metric: value if isinstance(value, dict) else entry(value) for metric, value in metrics.items()}
        run = self.path / name
        run.mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(config), run / "config.yaml")
        write(run / "status.json", {"status": "done", "time": f"2026-01-01T{time}:00+00:00"})
        write(run / "results.json", {"schema": 2, "metrics": entries})
        return run

    def with_model(self, **settings: Any) -> "Folder":
        """The same folder, for runs with other settings of the model."""
        return Folder(self.path, settings)

    def seeds(self, model: str, values: list[float], **entries: Any) -> None:
        for seed, value in enumerate(values):
            self.run(f"{model}-{seed}", model, seed, fd=entry(value, **entries))

    def compare(self, *arguments: str) -> Said:
        return call("compare", str(self.path), *arguments)


def entry(
    value: float, interval: list[float] | None = None, better: str | None = "lower", **protocol: Any
) -> dict[str, Any]:
    """A metric in results.json."""
    card = {"num_samples": 1000, "seed": 0} | protocol
    return {
        "value": value,
        "interval": interval,
        "unit": "1",
        "better": better,
        "parts": {},
        "card": card | {"model": {"weights": "raw", "checkpoint": "best", "step": 5}, "software": {"torch": "2"}},
        "anchors": {},
        "finding": None,
    }


def of_weights(measured: dict[str, Any], **about: str) -> dict[str, Any]:
    """The entry as measured on other weights."""
    card = measured["card"]
    return measured | {"card": card | {"model": card["model"] | about}}


def write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content))


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "runs")


# mathematics


def test_paired_difference_is_the_paired_t_test():
    x = np.array([1.0, 4.0, 2.0, 8.0, 5.0])
    y = x + np.array(PAIRS)
    found, expected = paired_difference(PAIRS), stats.ttest_rel(y, x)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)
    assert found.value == pytest.approx(np.mean(PAIRS))


@pytest.mark.parametrize("differences", [[1.0, 1.0], [1.5] * 3, [0.0] * 3, [1.1 - 0.1, 1.2 - 0.2, 1.3 - 0.3]], ids=str)
def test_equal_differences_have_no_interval(differences):
    assert paired_difference(differences) is None


def test_the_smallest_spread_of_what_is_no_rounding_has_an_interval():
    found = paired_difference([1.0, 1.0 + 1e-6])
    assert found.low < 1 < found.high


@pytest.mark.parametrize("interval", [(1.0, 1.0), (0.0, 0.0), (0.1 + 0.2, 0.3)], ids=str)
def test_an_interval_of_no_width_gives_none_of_the_difference(interval):
    assert independent_difference(0.5, (0.4, 0.6), interval[0], interval) is None
    assert independent_difference(interval[0], interval, 0.5, (0.4, 0.6)) is None


def test_independent_difference_adds_standard_errors_in_quadrature():
    found = independent_difference(10.0, (7.0, 13.0), 4.0, (0.0, 8.0))
    assert (found.value, found.low, found.high) == pytest.approx((6.0, 1.0, 11.0))
    assert found.p == pytest.approx(2 * stats.norm.sf(6 / (5 / 1.96)))


def test_sign_flip_counts_the_sums_that_are_as_large():
    assert sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8  # only all plus and all minus reach 6
    assert sign_flip_p([1.0, 2.0, -3.0]) == 1.0  # every sum is at least 0
    assert sign_flip_p([3.0, 1.0, -1.0]) == 6 / 8  # of 8 sums: 5, 3, 3, 1 and their negatives; |sum| >= 3


def test_sign_flip_agrees_with_scipys_exact_permutations():
    differences = [*PAIRS, -0.7, 2.2]
    expected = stats.permutation_test((np.array(differences),), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(differences) == pytest.approx(expected.pvalue)


def test_holm_on_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


# rows


def test_seeds_are_one_row_with_mean_deviation_and_count(folder):
    folder.seeds("vae", [10.0, 12.0, 14.0])
    comparison = compare_runs([folder.path])
    assert [row.label for row in comparison.rows] == ["vae on digits"]
    assert "12.0 ± 2.0 (3)" in folder.compare().text


def test_rows_of_one_model_are_told_apart_by_the_setting_that_differs(folder):
    folder.run("a", fd=1.0)
    folder.with_model(latent_dim=8).run("b", fd=2.0)
    folder.run("c", "gan", fd=3.0)
    labels = [row.label for row in compare_runs([folder.path]).rows]
    assert labels == ["vae on digits model.latent_dim=20", "vae on digits model.latent_dim=8", "gan on digits"]


def test_a_grid_takes_two_settings_and_a_class_is_named_by_its_last_part(folder):
    for name, (prior, beta) in {"a": ("Flow", 1), "b": ("Flow", 4), "c": ("Normal", 1), "d": ("Normal", 4)}.items():
        folder.with_model(prior={"_target_": f"src.models.{prior}"}, beta=beta, same=beta).run(name, fd=1.0)
    labels = [row.label.removeprefix("vae on digits ") for row in compare_runs([folder.path]).rows]
    assert labels[0] == "model.beta=1 model.prior=Flow"
    assert len(set(labels)) == 4


def test_rows_that_take_too_many_settings_are_told_apart_by_their_directories(folder):
    for i in range(5):
        folder.with_model(**{f"switch_{j}": i == j for j in range(5)}).run(f"run{i}", fd=1.0)
    assert compare_runs([folder.path]).rows[2].label.endswith("run2")


def test_the_later_of_two_runs_of_a_seed_counts_and_the_other_is_named(folder):
    folder.run("a", time="13:00", fd=1.25)
    folder.run("b", time="12:00", fd=2.25)
    said = folder.compare()
    assert "1.250" in said.text
    assert f"vae ({folder.path / 'b'}): {folder.path / 'a'} is a later run of the same config and seed" in said.text


def test_runs_are_in_the_order_of_their_numbers(folder):
    for i, name in enumerate(["10-a", "2-long", "2-b", "1-a"]):
        folder.with_model(latent_dim=i).run(name, fd=1.0)
    names = [Path(row.runs[0].path).name for row in compare_runs([folder.path]).rows]
    assert names == ["1-a", "2-b", "2-long", "10-a"]


def test_a_run_given_twice_is_there_once(folder):
    run = folder.run("a", fd=1.0)
    comparison = compare_runs([run, folder.path])
    assert len(comparison.rows) == 1
    assert not comparison.left_out


@pytest.mark.parametrize(
    ("about", "shown"),
    [
        ({"weights": "averaged"}, "averaged, best"),
        ({"checkpoint": "last"}, "raw, last"),
        ({"classes": "given, as frequent as in the training data"}, "raw, best, classes given"),
    ],
    ids=str,
)
def test_the_weights_that_were_used_are_shown(folder, about, shown):
    folder.run("a", fd=of_weights(entry(1.0), **about))
    assert compare_runs([folder.path]).rows[0].weights == shown
    assert f" {shown} " in folder.compare().text


def test_rows_may_be_of_other_checkpoints_and_weights(folder):
    folder.run("a", fd=1.0)
    folder.run("b", "gan", fd=of_weights(entry(2.0), checkpoint="last", weights="averaged"))
    assert folder.compare().code == 0
    assert [row.weights for row in compare_runs([folder.path]).rows] == ["raw, best", "averaged, last"]


def test_a_row_without_values_names_no_weights(folder):
    folder.run("a", fd=1.0)
    folder.run("b", "gan", cs=1.0)
    assert [row.weights for row in compare_runs([folder.path], ["fd"]).rows] == ["raw, best", "-"]


# columns


def test_columns_are_in_the_order_of_the_first_run_or_as_asked_for(folder):
    folder.run("a", cs=1.0, fd=2.0)
    folder.run("b", "gan", bound=3.0, fd=2.0)
    assert [column.metric for column in compare_runs([folder.path]).columns] == ["cs", "fd", "bound"]
    assert [column.metric for column in compare_runs([folder.path], ["fd", "cs"]).columns] == ["fd", "cs"]


def test_a_single_run_shows_its_interval(folder):
    folder.run("a", fd=entry(11.6, [11.2, 12.0]))
    assert "11.60 [11.20, 12.00]" in folder.compare().text


def test_an_absent_value_gives_its_reason_once(folder):
    why = {"not_applicable": "no Inception weights"}
    folder.run("a", fd=1.0, fid=why, inception_score=why)
    folder.run("b", "gan", fd=1.0, fid=why, inception_score=why)
    folder.run("c", "cgan", fd=1.0, fid=5.0, inception_score=why)
    text = folder.compare().text
    assert text.count("no Inception weights") == 1
    assert "fid of vae on digits, gan on digits; inception_score: no Inception weights" in text


def test_a_metric_that_some_run_did_not_measure_is_said(folder):
    folder.run("a", fd=1.0)
    folder.run("b", "gan", fd=1.0, cs=2.0)
    assert "cs of vae on digits: not measured" in folder.compare().text


@pytest.mark.parametrize(
    ("value", "shown"), [(10.0, "10"), (0.0, "0"), (10, "10"), (49_995_000.0, "49,995,000"), (0.5, "0.5000"), (-2.0, "-2")]
)
def test_an_integer_without_an_interval_has_no_decimals(folder, value, shown):
    folder.run("a", fd=value)
    assert f"│ {shown} │" in " ".join(folder.compare().text.split())


def test_an_integer_that_is_the_same_for_all_seeds_has_no_decimals(folder):
    folder.seeds("vae", [10.0, 10.0, 10.0])
    assert "│ 10 ± 0 (3) │" in " ".join(folder.compare().text.split())


@pytest.mark.parametrize(
    ("better", "best"), [("lower", ["vae"]), ("higher", ["gan"]), ("zero", ["cgan"]), (None, [])], ids=str
)
def test_the_best_is_bold_as_the_metric_says(folder, better, best):
    for model, value in {"vae": -3.0, "gan": 2.0, "cgan": -1.0}.items():
        folder.run(model, model, fd=entry(value, better=better))
    lines = read_csv_of(folder)
    assert [line["model"] for line in lines if line["best"] == "true"] == best
    bold = [line for line in folder.compare("--format", "markdown").text.splitlines() if "**" in line]
    assert [line.split()[1] for line in bold] == best


def read_csv_of(folder: Folder) -> list[dict[str, str]]:
    file = folder.path / "table.csv"
    folder.compare("--format", "csv", "--out", str(file))
    return read_csv(file.read_text())


def test_floor_and_ceiling_come_from_the_anchors(folder):
    anchored = entry(5.0)
    anchored["anchors"] = {
        "held_out": {"value": 0.5, "interval": [0.4, 0.6], "count": 300},
        "noise": {"value": 600.0, "interval": None, "count": 1000},
    }
    why = entry(5.0) | {"anchors": {"held_out": {"not_applicable": "noise has no class"}}}
    folder.run("a", fd=anchored, cs=why)
    text = folder.compare().text
    assert "0.50 [0.40, 0.60] (of 300)" in text
    assert "noise (ceiling)" in text
    assert "600 " in text
    assert "cs of held-out real (floor): noise has no class" in text
    assert [line["floor"] for line in read_csv_of(folder)] == ["0.5", ""]


# refusals


def test_a_value_of_another_protocol_is_refused_with_field_values_and_command(folder):
    folder.run("a", fd=1.0)
    folder.run("b", "gan", fd=2.0)
    odd = folder.run("c", "cgan", fd=entry(0.1, num_samples=200))
    said = folder.compare()
    assert said.code == 1
    assert "refused" in said.text
    assert (
        f"fd of cgan ({odd}) is refused: its num_samples is 200, the column's is 1000; "
        f"measure it again: python -m src.evaluate run={odd} evaluation.num_samples=1000"
    ) in said.text
    assert read_csv_of(folder)[2]["verdict"] == "refused"


def test_a_nested_field_is_named_with_dots_and_is_no_setting(folder):
    folder.run("a", fd=entry(1.0, features={"layer": "pool", "of": [1, 2]}))
    odd = folder.run("b", "gan", fd=entry(2.0, features={"layer": "last"}))
    text = folder.compare().text
    assert "its features.layer is last, the column's is pool; its features.of is not given, the column's is [1,2]" in text
    assert f"gan ({odd}) is refused" in text
    assert "measure it again" not in text


def test_other_data_cannot_be_measured_again(folder):
    folder.run("a", fd=entry(1.0, data="abc"))
    folder.run("b", "gan", fd=entry(2.0, data="def"))
    text = folder.compare().text
    assert "its data is def, the column's is abc; values on other data cannot be compared" in text


@pytest.mark.parametrize("also", [{"objective": "hinge"}, {"num_samples": 200, "objective": "hinge"}], ids=str)
def test_no_command_is_offered_where_it_would_not_help(folder, also):
    folder.run("a", fd=entry(1.0, objective="minimax"))
    odd = folder.run("b", "gan", fd=entry(2.0, **also))
    text = folder.compare().text
    assert f"fd of gan ({odd}) is refused: its " in text
    assert "its objective is hinge, the column's is minimax\n" in text
    assert "src.evaluate" not in text


@pytest.mark.parametrize(
    ("configured", "told"),
    [
        ({"num_samples": None, "seed": 0, "checkpoint": "auto"}, "num_samples=1000 evaluation.seed=0"),
        ({"num_samples": 1000, "seed": 7, "checkpoint": "best"}, "seed=0"),
        ({"num_samples": 1000, "seed": 0, "checkpoint": "last"}, "seed=0 evaluation.checkpoint=best"),
    ],
    ids=str,
)
def test_the_command_says_what_the_runs_own_config_says_otherwise(folder, configured, told):
    folder.run("a", fd=1.0)
    odd = Folder(folder.path, rest={"evaluation": configured}).run("b", "gan", fd=entry(2.0, seed=1))
    assert f"python -m src.evaluate run={odd} evaluation.{told}\n" in folder.compare().text


def test_the_command_names_a_metric_that_the_run_does_not_measure_by_itself(folder):
    folder.run("a", fd=1.0)
    odd = Folder(folder.path, rest={"metric": {"cs": {}}}).run("b", "gan", fd=entry(2.0, seed=1))
    assert f"python -m src.evaluate run={odd} evaluation.seed=0 metric=[fd]\n" in folder.compare().text


def test_equal_weights_under_another_name_are_the_same_extractor(folder):
    folder.run("a", fd=entry(1.0, extractor="shipped", extractor_sha256="abc"))
    folder.run("b", "gan", fd=entry(2.0, extractor="made here", extractor_sha256="abc"))
    assert folder.compare().code == 0
    lines = read_csv_of(folder)
    assert lines[0]["protocol"] == lines[1]["protocol"]


@pytest.mark.parametrize("sha256", [{}, {"extractor_sha256": "none"}], ids=str)
def test_extractors_without_weights_go_by_their_names(folder, sha256):
    folder.run("a", fd=entry(1.0, extractor="pixels", **sha256))
    folder.run("b", "gan", fd=entry(2.0, extractor="small pixels", **sha256))
    text = folder.compare().text
    assert "its extractor is small pixels, the column's is pixels\n" in text


def test_other_weights_of_an_extractor_are_refused(folder):
    folder.run("a", fd=entry(1.0, extractor="one", extractor_sha256="abc"))
    folder.run("b", "gan", fd=entry(2.0, extractor="one", extractor_sha256="def"))
    assert "its extractor_sha256 is def, the column's is abc\n" in folder.compare().text


def test_a_seed_measured_at_another_checkpoint_is_not_in_the_mean(folder):
    folder.seeds("vae", [10.0, 14.0])
    odd = folder.run("c", seed=2, fd=of_weights(entry(0.0), checkpoint="last"))
    said = folder.compare()
    assert said.code == 1
    assert "12.0 ± 2.8 (2)" in said.text
    assert (
        f"fd of vae ({odd}) is refused: its checkpoint is last, the row's is best; "
        f"measure it again: python -m src.evaluate run={odd} evaluation.checkpoint=best\n"
    ) in said.text


@pytest.mark.parametrize("also", [{}, {"checkpoint": "last"}], ids=str)
def test_a_seed_of_other_weights_is_not_in_the_mean(folder, also):
    for seed, value in enumerate([10.0, 14.0]):
        folder.run(f"vae-{seed}", seed=seed, fd=of_weights(entry(value), weights="averaged"))
    folder.run("odd", seed=2, fd=of_weights(entry(0.0), **also))
    said = folder.compare()
    assert said.code == 1
    assert "12.0 ± 2.8 (2)" in said.text
    assert "its weights are raw, the row's are averaged" in said.text
    assert "src.evaluate" not in said.text


def test_a_seed_of_another_protocol_has_no_say_in_the_checkpoint_of_its_row(folder):
    folder.run("a", "gan", fd=1.0)
    folder.run("b", "cgan", fd=1.0)
    odd = folder.run("c-0", seed=0, fd=of_weights(entry(10.0, num_samples=200), checkpoint="last"))
    folder.run("c-1", seed=1, fd=12.5)
    assert compare_runs([folder.path]).rows[2].weights == "raw, best"
    assert "12.50 (1)" in folder.compare().text
    command = f"python -m src.evaluate run={odd} evaluation.num_samples=1000 evaluation.checkpoint=best\n"
    assert command in folder.compare().text


def test_values_of_one_run_are_of_one_checkpoint(folder):
    folder.run("a", fd=1.0, cs=of_weights(entry(2.0), checkpoint="last"), bound=1.0)
    assert "cs of vae" in folder.compare().text
    assert folder.compare("--metric", "cs").code == 0


def test_the_model_and_the_software_of_a_card_are_no_protocol(folder):
    other = entry(2.0)
    other["card"] |= {"model": {"weights": "averaged"}, "software": {"torch": "3"}, "evaluations_per_example": 90.5}
    folder.run("a", fd=1.0)
    folder.run("b", "gan", fd=other)
    assert folder.compare().code == 0


def test_a_seed_of_another_protocol_is_not_in_the_mean(folder):
    folder.seeds("vae", [10.0, 14.0])
    folder.run("c", seed=2, fd=entry(0.0, seed=1))
    said = folder.compare()
    assert said.code == 1
    assert "12.0 ± 2.8 (2)" in said.text
    assert "its seed is 1, the column's is 0" in said.text
    assert "evaluation.seed=0" in said.text


def test_values_of_other_units_are_refused(folder):
    folder.run("a", fd=1.0)
    folder.run("b", "gan", fd=entry(2.0) | {"unit": "nats"})
    assert "its unit is nats, the column's is 1" in folder.compare().text


# settings of drawing and of likelihoods

STEERED = {"solver": "euler", "steps": 50, "guidance": 1.0, "likelihood": {"solver": "heun", "steps": 99}}


def drawn(value: float, steps: int, **protocol: Any) -> dict[str, Any]:
    """A value measured on samples."""
    return of_weights(entry(value, **protocol), settings=STEERED | {"steps": steps})


def scored(value: float, num_examples: int = 500, steps: int = 50, **protocol: Any) -> dict[str, Any]:
    """A likelihood, computed when samples were drawn in so many steps."""
    card = {"num_samples": None, "split": "test", "num_examples": num_examples, "of": "x"} | protocol
    measured = drawn(value, steps, **card)
    del measured["card"]["num_samples"]
    return measured


def test_steps_of_samples_are_nothing_to_the_likelihoods_of_the_run(folder):
    folder.run("a", "flow", fd=drawn(1.0, steps=10), kd=drawn(1.0, steps=10), log_likelihood=scored(-2.0, steps=50))
    folder.run("b", "flow", seed=1, fd=drawn(2.0, steps=10), kd=drawn(1.0, steps=10), log_likelihood=scored(-3.0, steps=10))
    folder.run("c", "vae", fd=1.5, kd=1.0, log_likelihood=scored(-2.0))
    said = folder.compare()
    assert said.code == 0, said.text
    assert "1.50 ± 0.71 (2)" in said.text
    assert "-2.50 ± 0.71 (2)" in said.text


def test_energies_of_paths_depend_on_the_guidance_and_the_source_but_on_no_steps(folder):
    def moved(value: float, steps: int, source: str = "N(0, I)", guidance: float = 1.0) -> dict[str, Any]:
        card = {"num_samples": None, "num_paths": 500, "paths": {"source": source}}
        measured = of_weights(drawn(value, steps, **card), settings=STEERED | {"steps": steps, "guidance": guidance})
        del measured["card"]["num_samples"]
        return measured

    folder.run("a", "flow", fd=drawn(1.0, steps=1), path_energy=moved(1.0, steps=1))
    folder.run("b", "flow", seed=1, fd=drawn(2.0, steps=1), path_energy=moved(2.0, steps=100))
    said = folder.compare()
    assert said.code == 0, said.text
    assert said.text.count("1.50 ± 0.71 (2)") == 2
    folder.run("c", "flow", seed=2, fd=drawn(2.0, steps=1), path_energy=moved(2.0, steps=1, guidance=3.0))
    assert 'its path settings are {"guidance":3.0}, the row\'s are {"guidance":1.0}' in folder.compare().text
    folder.run("d", "other", path_energy=moved(2.0, steps=1, source="8 Gaussians"))
    assert "its paths.source is 8 Gaussians, the column's is N(0, I)" in folder.compare().text


def test_likelihoods_by_other_solvers_are_not_in_one_row(folder):
    folder.run("a", "flow", fd=drawn(1.0, steps=10), log_likelihood=scored(-2.0))
    coarse = of_weights(scored(-3.0), settings=STEERED | {"likelihood": {"solver": "heun", "steps": 3}})
    folder.run("b", "flow", seed=1, fd=drawn(2.0, steps=10), log_likelihood=coarse)
    said = folder.compare()
    assert said.code == 1
    assert "log_likelihood of flow" in said.text
    assert 'its likelihood settings are {"likelihood":{"solver":"heun","steps":3}}, the row\'s are' in said.text
    assert "fd of flow" not in said.text


def test_the_command_says_the_steps_that_the_row_was_drawn_in(folder):
    for seed in range(2):
        folder.run(f"flow-{seed}", "flow", seed, fd=drawn(1.0 + seed, steps=50), log_likelihood=scored(-1.0))
    odd = folder.run("flow-2", "flow", 2, fd=drawn(9.0, steps=10), log_likelihood=scored(-1.0, steps=10))
    said = folder.compare()
    assert said.code == 1
    assert f"measure it again: python -m src.evaluate run={odd} evaluation.steps=50\n" in said.text


@pytest.mark.parametrize(
    ("given", "wanted", "told"),
    [
        ({}, {}, "evaluation.num_likelihood_examples=500"),
        ({"examples": "evenly spread"}, {"examples": "evenly spread"}, "metric.iw_bound.num_examples=500"),
        ({"examples": "evenly spread"}, {"examples": "all"}, "metric.iw_bound.num_examples=null"),
    ],
    ids=str,
)
def test_the_command_says_of_how_many_examples_a_likelihood_is(folder, given, wanted, told):
    folder.run("a", iw_bound=scored(-2.0, **wanted))
    odd = folder.run("b", "gan", iw_bound=scored(-3.0, num_examples=100, **given))
    text = folder.compare().text
    assert "its num_examples is 100, the column's is 500" in text
    assert f"measure it again: python -m src.evaluate run={odd} {told}\n" in text


# latents of several autoencoders


def on_latents(folder: Folder, name: str, seed: int, of: int, value: float, lr: float = 0.1, **costs: Any) -> Path:
    """A run with this seed on the latents of an autoencoder of seed `of`."""
    about = {"run": f"outputs/{name}", "sha256": name, "seed": of, "model": {"dim": 2}, "training": {"optim": {"lr": lr}}}
    inner = Folder(folder.path, rest={"autoencoder": about | {"costs": {"training_seconds": float(of)}}})
    run = inner.run(name, "latent", seed, fd=value)
    if costs:
        results = json.loads((run / "results.json").read_text())
        write(run / "results.json", results | {"costs": costs})
    return run


def test_autoencoders_that_differ_in_the_seed_alone_give_one_row(folder):
    for seed, value in enumerate((1.0, 2.0, 3.0)):
        on_latents(folder, f"own-{seed}", seed=seed, of=seed, value=value)
    folder.seeds("vae", [2.0, 3.5, 4.0])
    comparison = compare_runs([folder.path])
    assert [len(row.runs) for row in comparison.rows] == [3, 3]
    assert comparison.verdicts[0].num_seeds == 3
    on_latents(folder, "longer", seed=0, of=0, value=9.0, lr=0.2)
    assert [row.label for row in compare_runs([folder.path]).rows if row.model == "latent"] == [
        "latent on digits autoencoder.training.optim.lr=0.2",
        "latent on digits autoencoder.training.optim.lr=0.1",
    ]


def test_runs_of_one_seed_go_by_the_seeds_of_their_autoencoders(folder):
    for of in range(3):
        on_latents(folder, f"of-{of}", seed=0, of=of, value=1.0 + of)
    (row,) = compare_runs([folder.path]).rows
    assert [run.seed for run in row.runs] == [0, 1, 2]
    on_latents(folder, "again", seed=0, of=1, value=5.0)
    comparison = compare_runs([folder.path])
    assert len(comparison.rows[0].runs) == 3
    assert "is a later run of the same config and seed" in comparison.left_out[0]


def test_where_both_seeds_vary_freely_each_autoencoder_is_a_row(folder):
    for seed in range(2):
        for of in range(2):
            on_latents(folder, f"{seed}-{of}", seed, of, value=1.0 + seed + 10 * of)
    rows = compare_runs([folder.path]).rows
    assert [row.label for row in rows] == ["latent on digits autoencoder.seed=0", "latent on digits autoencoder.seed=1"]
    assert [[run.seed for run in row.runs] for row in rows] == [[0, 1], [0, 1]]


def test_runs_on_one_autoencoder_are_no_independent_seeds_beside_another(folder):
    for seed, of in ((0, 0), (1, 0), (2, 1)):
        on_latents(folder, f"{seed}-{of}", seed, of, value=1.0 + seed)
    rows = compare_runs([folder.path]).rows
    assert [row.label for row in rows] == ["latent on digits autoencoder.seed=0", "latent on digits autoencoder.seed=1"]
    assert [[run.seed for run in row.runs] for row in rows] == [[0, 1], [2]]


def test_that_one_autoencoder_is_behind_all_seeds_is_said(folder):
    for seed in range(3):
        on_latents(folder, f"on-one-{seed}", seed, of=0, value=1.0 + 0.1 * seed)
    folder.seeds("vae", [2.0, 3.5, 4.0])
    comparison = compare_runs([folder.path])
    assert [[run.seed for run in row.runs] for row in comparison.rows] == [[0, 1, 2], [0, 1, 2]]
    (verdict,) = sentences(comparison)["Verdicts"]
    assert "the training of the autoencoder of latent on digits is not in the spread" in verdict


def test_training_of_the_autoencoder_is_part_of_the_costs(folder):
    before = {"parameters": 10, "training_seconds": 300.0, "training_device": "GPU"}
    costs = {"parameters": 15, "training_seconds": 20.0, "training_device": "CPU", "autoencoder": before}
    on_latents(folder, "a", seed=0, of=0, value=1.0, **costs)
    on_latents(folder, "b", seed=0, of=0, value=1.0, lr=0.2, parameters=15, training_seconds=20.0)
    folder.run("vae", fd=1.0)
    comparison = compare_runs([folder.path])
    found = {(cost.name, cost.unit): cost.values for cost in comparison.costs}
    assert found["training", "s"] == ((320.0,), (20.0,), ())
    assert found["of it the autoencoder's", "s"] == ((300.0,), (), ())
    first, second, _ = (row.label for row in comparison.rows)
    assert f"training of {first}: 20 s, after 300 s of its autoencoder: 320 s in all" in comparison.about_costs
    assert f"training of {second}: without that of its autoencoder, which is not known" in comparison.about_costs
    assert f"training of the autoencoder on GPU: {first}" in comparison.about_costs


# verdicts


def test_common_seeds_are_paired(folder):
    base = np.array([5.0, 9.0, 4.0, 7.0, 6.0])
    folder.seeds("vae", base.tolist())
    folder.seeds("gan", (base + PAIRS).tolist())
    (verdict,) = compare_runs([folder.path]).verdicts
    expected = stats.ttest_rel(base + PAIRS, base)
    assert verdict.word == "worse"
    assert verdict.num_seeds == 5
    assert verdict.difference.p == pytest.approx(expected.pvalue)
    assert verdict.p_holm == verdict.difference.p
    assert verdict.p_flip == 2 / 32
    text = folder.compare().text
    p = f"{expected.pvalue:.2g}"
    assert (
        f"fd: gan on digits is worse than vae on digits by 1.8 [0.3, 3.2], paired over 5 seeds, p = {p} (Holm {p})" in text
    )
    assert "sign-flip p = 0.062" in text


def test_seeds_that_are_not_common_are_left_out_of_the_difference(folder):
    folder.seeds("vae", [1.0, 2.0, 90.0])
    folder.seeds("gan", [3.0, 4.001])
    (verdict,) = compare_runs([folder.path]).verdicts
    assert verdict.num_seeds == 2
    assert verdict.word == "better"  # gan has the smaller mean, vae is better wherever both were trained
    assert (
        "vae on digits is better than gan on digits over the common seeds by 2.0005 [1.9941, 2.0069]"
        in folder.compare().text
    )


def test_the_sign_flips_of_many_seeds_are_not_computed(folder):
    folder.seeds("vae", list(map(float, range(17))))
    folder.seeds("gan", [i + 1 + i % 3 for i in map(float, range(17))])
    assert "sign-flip p not computed over 17 seeds" in folder.compare().text


@pytest.mark.parametrize(("vae", "gan"), [([1.0, 2.0], [2.0, 3.0]), ([5.0] * 5, [6.0] * 5), ([0.1, 0.2], [1.1, 1.2])])
def test_without_a_spread_over_the_seeds_nothing_is_certain(folder, vae, gan):
    folder.seeds("vae", vae)
    folder.seeds("gan", gan)
    (verdict,) = compare_runs([folder.path]).verdicts
    assert (verdict.word, verdict.difference, verdict.p_flip, verdict.p_holm) == ("no interval", None, None, None)
    text = folder.compare().text
    assert "fd: gan on digits against vae on digits: no interval: no spread over the seeds\n" in text
    assert "p <" not in text
    assert read_csv_of(folder)[0]["verdict"] == "no interval" or read_csv_of(folder)[1]["verdict"] == "no interval"


def test_a_share_of_exactly_one_is_no_certainty(folder):
    folder.run("a", fd=entry(1.0, [1.0, 1.0], "higher"))
    folder.run("b", "gan", fd=entry(0.5, [0.4, 0.6], "higher"))
    words = "no interval: that of a single value has no width; train several seeds"
    assert f"fd: gan on digits against vae on digits: {words}\n" in folder.compare().text


def test_a_zero_has_no_sign(folder):
    folder.run("a", fd=entry(0.5, [-7.0, 8.0], "higher"), cs=entry(-0.0001, [-3.0, 3.0]))
    folder.run("b", "gan", fd=entry(0.5, [-7.0, 8.0], "higher"), cs=entry(0.0, [-3.0, 3.0]))
    assert "-0.0" not in folder.compare().text
    assert {line["difference"] for line in read_csv_of(folder) if line["metric"] == "fd"} == {"", "0.0"}


@pytest.mark.parametrize("better", ["lower", "higher", "zero"])
def test_a_difference_whose_interval_holds_zero_is_inconclusive(folder, better):
    folder.run("a", fd=entry(10.0, [8.0, 12.0], better))
    folder.run("b", "gan", fd=entry(11.0, [9.0, 13.0], better))
    text = folder.compare().text
    assert "fd: inconclusive: " in text
    assert "covers the sampling of these checkpoints, not retraining" in text


def test_of_a_metric_that_is_better_when_higher_the_lower_is_worse(folder):
    folder.run("a", fd=entry(0.9, [0.89, 0.91], "higher"))
    folder.run("b", "gan", fd=entry(0.5, [0.49, 0.51], "higher"))
    assert "gan on digits is worse than vae on digits by 0.400 [0.386, 0.414]" in folder.compare().text
    line = read_csv_of(folder)[1]
    assert float(line["difference"]) == pytest.approx(-0.4)
    assert float(line["difference_low"]) < -0.4 < float(line["difference_high"]) < 0


def test_of_a_metric_that_is_best_at_zero_absolute_values_are_compared(folder):
    folder.seeds("vae", [-1.0, 1.0, -1.1], better="zero")
    folder.seeds("gan", [-3.0, 3.0, 3.2], better="zero")
    (verdict,) = compare_runs([folder.path]).verdicts
    assert verdict.difference.value == pytest.approx((2 + 2 + 2.1) / 3)
    assert "in absolute value" in folder.compare().text


def test_without_intervals_the_verdict_asks_for_seeds(folder):
    folder.run("a", fd=1.0)
    folder.run("b", "gan", fd=2.0)
    assert "fd: gan on digits against vae on digits: no interval: train several seeds" in folder.compare().text


def test_p_is_adjusted_over_all_comparisons_of_the_table(folder):
    for model, shift in {"vae": 0, "gan": 5, "cgan": 1}.items():
        narrow, wide = [shift - 2, shift + 2], [-1.0, 1.0]
        folder.run(model, model, fd=entry(shift, narrow), cs=entry(0.0, wide))
    verdicts = compare_runs([folder.path]).verdicts
    assert [verdict.p_holm for verdict in verdicts] == holm([verdict.difference.p for verdict in verdicts])
    assert len(verdicts) == 4


def test_rows_of_other_seeds_ask_for_common_ones(folder):
    folder.seeds("vae", [1.0, 2.0])
    for seed in (5, 6):
        folder.run(f"gan-{seed}", "gan", seed, fd=9.0)
    assert "no interval: train several seeds, the same of both" in folder.compare().text


# sentences


def test_alarms_are_said_and_other_findings_are_not(folder):
    bad = entry(8.0, better=None) | {"finding": {"words": "8 of 10 modes", "alarm": "modes"}}
    good = entry(10.0, better=None) | {"finding": {"words": "10 of 10 modes", "alarm": None}}
    run = folder.run("a", "gan", modes=bad, fd=1.0)
    folder.run("b", modes=good, fd=1.0)
    text = folder.compare("--metric", "fd").text
    assert f"ALARM gan ({run}): 8 of 10 modes" in text
    assert "10 of 10 modes" not in text


def test_a_failed_run_is_named_with_its_reason(folder):
    folder.run("a", fd=1.0)
    failed, unmeasured = folder.run("b", "gan"), folder.run("c", "cgan")
    for run in (failed, unmeasured):
        (run / "results.json").unlink()
    write(failed / "status.json", {"status": "failed", "time": "x", "reason": "loss is nan\n  at step 7"})
    said = folder.compare()
    assert said.code == 0
    assert f"{failed}: it has no results, its status is failed (loss is nan at step 7)" in said.text
    assert f"{unmeasured}: it has no results, its status is done; python -m src.evaluate run={unmeasured}" in said.text


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"status": "waiting"}, "it waits to be started"),
        ({"status": "pruned", "reason": "fd 9 at epoch 2"}, "it was pruned (fd 9 at epoch 2)"),
        ({"status": "pruned"}, "it was pruned"),
    ],
    ids=str,
)
def test_a_job_that_was_not_trained_to_its_end_is_named(folder, status, words):
    folder.run("a", fd=1.0)
    run = folder.run("b", "gan")
    (run / "results.json").unlink()
    write(run / "status.json", {"time": "x"} | status)
    assert f"{run}: {words}\n" in folder.compare().text


def test_a_run_that_is_not_done_but_measured_is_marked(folder):
    run = folder.run("a", fd=1.0)
    write(run / "status.json", {"status": "interrupted", "time": "x"})
    assert f"vae ({run}) is not done, its status is interrupted" in folder.compare().text


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (1, "the run is from an older version of the framework and must be trained again to be compared"),
        (None, "the run is from an older version of the framework and must be trained again to be compared"),
        (3, "the run is from a newer version of the framework, which can compare it"),
    ],
)
def test_results_of_another_schema_are_refused(folder, schema, why):
    folder.run("a", fd=1.0)
    old = folder.run("b", "gan", fd=1.0)
    write(old / "results.json", {"schema": schema, "metrics": {}})
    said = folder.compare()
    assert said.code == 1
    assert f"results.json of {old} has schema {schema}, not 2: {why}\n" in said.text
    assert "src.evaluate" not in said.text


@pytest.mark.parametrize("content", ["[", "{}", '{"schema": 2, "metrics": {"fd": {"value": 1}}}'])
def test_a_damaged_run_is_named(folder, content):
    folder.run("a", fd=1.0)
    damaged = folder.run("b", "gan", fd=1.0)
    (damaged / "results.json").write_text(content)
    assert str(damaged) in folder.compare().text


@pytest.mark.parametrize("content", ["seed: 0", "[1]", "a: ["])
def test_a_run_with_a_damaged_config_is_left_out(folder, content):
    folder.run("a", fd=1.0)
    damaged = folder.run("b", "gan", fd=1.0)
    (damaged / "config.yaml").write_text(content)
    said = folder.compare()
    assert said.code == 0
    assert f"{damaged}: " in said.text


# mistakes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--metric", "fad"), "metric=fad was measured in no run; allowed: fd, cs"),
        (("--format", "html"), "argument --format: invalid choice: 'html'"),
        (("--metrics", "fd"), "unrecognized arguments: --metrics fd"),
        (("--out", "/nowhere/table"), "--out=/nowhere/table cannot be written"),
        (("nowhere",), "nowhere is not a directory"),
    ],
)
def test_a_mistake_ends_in_one_sentence(folder, arguments, sentence):
    folder.run("a", fd=1.0, cs=1.0)
    said = folder.compare(*arguments)
    assert said.code == 1
    assert sentence in said.text
    assert "Traceback" not in said.text


def test_a_folder_without_runs_is_refused(tmp_path):
    said = call("compare", str(tmp_path))
    assert said.code == 1
    assert f"error: {tmp_path} holds no run" in said.text


def test_runs_that_all_have_no_results_are_an_error(folder):
    (folder.run("a") / "results.json").unlink()
    said = folder.compare()
    assert said.code == 1
    assert said.text.startswith("error: no run can be compared: ")


def test_nothing_heavy_is_imported_and_errors_go_to_stderr(folder):
    folder.run("a", fd=1.0)
    heavy = "torch lightning hydra scipy numpy torchmetrics"
    program = f"""
import sys
sys.argv = ["compare", {str(folder.path)!r}]
from src.compare import main
main()
print([name for name in {heavy.split()!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"
    start = time.monotonic()
    said = run_cli("compare", "nowhere")
    assert said.text == "error: nowhere is not a directory; give runs or a folder of runs, as in outputs/digits\n"
    assert said.code == 1
    assert time.monotonic() - start < 5  # about 0.5 s on a machine that does nothing else


# formats


def test_csv_holds_every_digit_and_each_row_and_metric(folder):
    value, interval = 0.1 + 0.2, [0.1 + 0.1 / 3, 2 / 3]
    folder.run("a", fd=entry(value, interval), cs=1e-17)
    folder.run("b", "gan, wide", fd=entry(1 / 3, interval))
    lines = read_csv_of(folder)
    assert [(line["model"], line["metric"]) for line in lines] == [
        ("vae", "fd"),
        ("vae", "cs"),
        ("gan, wide", "fd"),
        ("gan, wide", "cs"),
    ]
    assert (float(lines[0]["value"]), float(lines[0]["low"]), float(lines[0]["high"])) == (value, *interval)
    assert float(lines[1]["value"]) == 1e-17
    assert [line["verdict"] for line in lines] == ["best", "", "inconclusive", "no value"]
    assert lines[0]["protocol"] == lines[2]["protocol"]
    assert len(lines[0]["protocol"]) == 12
    (verdict,) = compare_runs([folder.path]).verdicts
    assert float(lines[2]["p"]) == verdict.difference.p


def test_csv_on_stdout_is_nothing_but_csv(folder, capsys):
    folder.run("a", fd=1.0)
    folder.run("b", "gan", fd=entry(2.0, num_samples=3))
    before, sys.argv = sys.argv, ["compare", str(folder.path), "--format", "csv"]
    try:
        with pytest.raises(SystemExit):
            main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    assert {line["metric"] for line in read_csv(out)} == {"fd"}
    assert "is refused" in err


def test_the_markdown_table_is_well_formed(folder):
    folder.with_model(prior="a|b").run("a", fd=1.25)
    folder.with_model(prior="c").run("b", fd=2.0)
    lines = folder.compare("--format", "markdown").text.split("\n\n")[0].splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert {line.replace("\\|", "").count("|") for line in lines} == {5}
    assert lines[2] == "| vae on digits model.prior=a\\|b | 1 | raw, best | **1.250** |"


@pytest.mark.parametrize("form", ["text", "csv", "markdown"])
def test_the_file_holds_the_table_even_if_a_value_is_refused(folder, form):
    folder.run("a", fd=1.0)
    folder.run("b", "gan", fd=entry(2.0, num_samples=3))
    file = folder.path / "table"
    said = folder.compare("--format", form, "--out", str(file))
    assert said.code == 1
    assert file.read_text() in said.text
    assert "refused" in file.read_text()


def test_best_values_are_bold_on_a_terminal(folder):
    folder.run("a", fd=1.25)
    folder.run("b", "gan", fd=2.5)
    console = Console(force_terminal=True, width=100, color_system="standard", file=io.StringIO())
    with console.capture() as capture:
        print_text(compare_runs([folder.path]), console)
    assert "\x1b[1m1.250\x1b[0m" in capture.get()
    assert "\x1b[1m2.500" not in capture.get()
