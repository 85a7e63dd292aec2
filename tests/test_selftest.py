"""The self-test: every quantity has its known value, and the command says so, or which one has not."""

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch

from src.build import build
from src.evaluate import _shipped_classifiers
from src.evaluation import autoregressive_oracles, mixture_oracles, selftest
from src.evaluation.selftest import CHECKS, METRIC_CHECKS, STORED, Oracle, classifier_oracles
from src.metrics.frozen_classifier import SHIPPED, write_frozen
from src.networks.classifier import SmallClassifier
from tests.commands import call

CLASSIFIERS = _shipped_classifiers()


@pytest.fixture
def only(monkeypatch, tmp_path) -> Callable[..., None]:
    """`only(oracle, ...)`: these are all oracles but those of the classifiers; and the command runs in an empty folder."""

    def these(*wanted: Oracle) -> None:
        def check() -> Iterator[Oracle]:
            yield from wanted

        monkeypatch.setattr(selftest, "CHECKS", (check,))
        monkeypatch.setattr("src.evaluate._shipped_classifiers", dict)

    monkeypatch.chdir(tmp_path)
    return these


# --- oracles ---------------------------------------------------------------------------------------------------------


@functools.cache
def found_by(check: Callable[[], Iterator[Oracle]]) -> list[Oracle]:
    return list(check())


OF_METRICS = (*METRIC_CHECKS, *mixture_oracles.CHECKS, *autoregressive_oracles.CHECKS)  # the others: with what they are of


@pytest.mark.parametrize("check", OF_METRICS, ids=lambda check: check.__name__)
def test_quantity_has_its_known_value(check):
    before = torch.get_rng_state()
    found = found_by(check)
    assert found
    assert [oracle for oracle in found if not oracle.holds] == []
    assert torch.equal(before, torch.get_rng_state())  # so the values are the same at every call


@pytest.mark.parametrize("file", CLASSIFIERS)
def test_shipped_classifier_is_the_one_that_its_data_ask_for_and_gives_the_stored_values(file):
    found = list(classifier_oracles(file, CLASSIFIERS[file], build))
    assert len(found) == 4
    assert [oracle for oracle in found if not oracle.holds] == []


def test_every_classifier_that_ships_is_tested():
    assert {file.name for file in SHIPPED.glob("*.safetensors")} == set(CLASSIFIERS) == set(STORED)


def test_no_name_occurs_twice():
    names = [oracle.name for check in OF_METRICS for oracle in found_by(check)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("expected", "got", "tolerance", "holds"),
    [
        (1.0, 1.0, 0.0, True),
        (1.0, 1.1, 0.2, True),
        (1.0, 0.7, 0.2, False),
        (1.0, math.nan, 0.2, False),
        (math.nan, math.nan, 0.2, False),
        (1.0, 1.0, math.nan, False),
        (1.0, math.inf, 0.2, False),
        ("ab", "ab", 0.0, True),
        ("ab", "abc", 0.0, False),
        ("none", 1.0, 0.0, False),
    ],
)
def test_oracle_holds_within_its_tolerance(expected, got, tolerance, holds):
    assert Oracle("some", expected, got, tolerance).holds is holds


@pytest.fixture
def shipped(monkeypatch, tmp_path) -> str:
    """The file name of another classifier in place of those that ship."""
    monkeypatch.setattr(selftest, "SHIPPED", tmp_path)
    network = {"_target_": "src.networks.classifier.SmallClassifier", "in_shape": [1, 8, 8], "num_classes": 10}
    names = [str(i) for i in range(10)]
    about = {"network": network, "data": "other", "in_shape": [1, 8, 8], "class_names": names, "accuracy": 0.1}
    torch.manual_seed(0)
    write_frozen(tmp_path / "digits.safetensors", SmallClassifier((1, 8, 8), 10), about)
    return "digits.safetensors"


def test_other_weights_fail_by_their_hash_and_by_every_value(shipped):
    found = list(classifier_oracles(shipped, CLASSIFIERS[shipped], build))
    assert [oracle.holds for oracle in found] == [False] * 4


def test_classifier_without_stored_values_fails_and_shows_those_to_store(shipped, monkeypatch):
    monkeypatch.setattr(selftest, "STORED", {})
    (of_file, *values) = classifier_oracles(shipped, "ab", build)
    assert of_file.expected == "ab"
    assert [oracle.expected for oracle in values] == ["not stored"] * 3
    assert all(isinstance(oracle.got, float) and not oracle.holds for oracle in values)


def test_classifier_that_is_not_there_fails_with_the_reason():
    (oracle,) = classifier_oracles("no_such_file", "ab", build)
    assert not oracle.holds
    assert "no_such_file is not a file" in oracle.name


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_shows_expected_beside_got_and_leaves_nothing_behind(only, tmp_path):
    only(Oracle("one", 11.25, 11.375, 0.5), Oracle("a word", "abcdef", "abcdef"))
    said = call("evaluate", "selftest=true")
    assert said.code == 0, said.text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.text.splitlines() if line.startswith("│")]
    assert rows == [["one", "11.25", "11.375", "0.5", "ok"], ["a word", "abcdef", "abcdef", "", "ok"]]
    for name in ("oracle", "expected", "got", "tolerance", "verdict", "2 of 2 are as expected", " s\n"):
        assert name in said.text
    assert list(tmp_path.iterdir()) == []


def test_command_with_a_wrong_oracle_names_it_and_fails(only, tmp_path):
    only(Oracle("right", 1.0, 1.0), Oracle("the wrong one", 1.0, 2.0, 0.5))
    said = call("evaluate", "selftest=true")
    assert said.code == 1
    assert "FAIL" in said.text
    assert "error: 1 of 2 are off: the wrong one\n" in said.text
    assert list(tmp_path.iterdir()) == []


def test_command_goes_through_all_checks_and_classifiers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    passed = []

    def noted(check: Callable[[], Iterator[Oracle]]) -> Callable[[], Iterator[Oracle]]:
        def noting() -> Iterator[Oracle]:
            passed.append(check)
            yield from ()

        return noting

    monkeypatch.setattr(selftest, "CHECKS", tuple(noted(check) for check in CHECKS))
    said = call("evaluate", "selftest=true")
    assert passed == list(CHECKS)
    assert all(f"KD on {file}" in said.text for file in CLASSIFIERS)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "run must be given: run=... (or selftest=true, which needs none)"),
        ("selftest=false", "run must be given: run=..."),
        ("run=null", "run must be given: run=..."),
        ("selftest=maybe", "selftest=maybe must be true or false"),
        ("selftest=1", "selftest=1 must be true or false"),
        ("selftst=true", "selftst is not a key of the config; did you mean selftest?"),
        ("selftest=true run=some/run", "selftest=true measures no run; leave out run=some/run"),
        ("selftest=true run=", "selftest=true measures no run; leave out run="),
        ("selftest=true evaluation.seed=1", "selftest=true takes no other setting; evaluation.seed=1 would have no effect"),
        ("metric=[fd] selftest=true", "selftest=true takes no other setting; metric=[fd] would have no effect"),
        ("++selftest=true seed=1", "seed is not a key of the config"),
        ("++selftest=true evaluation.seed=1", "selftest=true takes no other setting; evaluation.seed=1 would"),
    ],
)
def test_mistake_ends_in_one_sentence_and_leaves_nothing_behind(only, tmp_path, arguments, sentence):
    only(Oracle("one", 1.0, 1.0))
    said = call("evaluate", *arguments.split())
    assert said.code == 1
    assert said.text.startswith(f"error: {sentence}")
    assert said.text.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []
