"""Tables: what is read from a file, how it is standardized and given back, and what cannot be used."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from src.core.errors import UserError
from src.core.rng import Noise
from src.core.spec import DataSpec
from src.data.arrays import Arrays
from src.data.loading import ArrayData
from src.data.table import table
from src.runs import Run
from tests.commands import QUICK, call
from tests.examples import vector_spec
from tests.measuring import image_set, make_inputs, make_metric

SPLITS = ("train", "val", "test")
NAMES = ("height", "weight, dry", "age")


def _values(rows: int = 60) -> np.ndarray:
    """Three columns of very different sizes."""
    random = np.random.default_rng(0)
    return random.normal(size=(rows, 3)) * [1e-3, 1.0, 5e4] + [7.0, -2.0, 1.6e9]


def _write(path: Path, rows: list[list[object]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def _made(path: Path, label: str | int | None = None, val: float = 0.1, test: float = 0.2) -> Arrays:
    return table(str(path), label, val, test, str(path.parent / "cache"))


def _assert_holds(arrays: Arrays, values: np.ndarray) -> None:
    """All rows are in a split, in the table's own units: to float32's precision of a standard deviation."""
    error = (_all_rows(arrays) - values[values[:, 0].argsort()]) / values.std(0)
    np.testing.assert_allclose(error, 0, atol=1e-6)


def _all_rows(arrays: Arrays) -> np.ndarray:
    """The rows of all splits in the table's own units, in order of the first column."""
    x = torch.from_numpy(np.concatenate([arrays.splits[split].x for split in SPLITS]))
    own = arrays.spec.to_own_units(x).numpy()
    return own[own[:, 0].argsort()]


def _as_text(values: np.ndarray) -> list[list[str]]:
    return [[repr(v) for v in row] for row in values.tolist()]


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("has_header", [True, False])
def test_csv_arrives_with_or_without_a_header_whatever_is_between_its_values(tmp_path, delimiter, has_header):
    values = _values()
    names = NAMES if delimiter == "," else [name.replace(",", "") for name in NAMES]
    rows = [list(names)] * has_header + _as_text(values)
    arrays = _made(_write(tmp_path / "some.csv", rows, delimiter))
    assert arrays.spec.own_units.columns == (tuple(names) if has_header else ("x0", "x1", "x2"))
    _assert_holds(arrays, values)
    assert arrays.spec.describe() == "vector 3, continuous values without bounds, no labels"
    assert {split: len(arrays.splits[split]) for split in SPLITS} == {"train": 42, "val": 6, "test": 12}


def test_what_numpy_and_windows_write_as_text_is_read(tmp_path):
    values = _values()
    np.savetxt(tmp_path / "some.txt", values, header="a b c")
    arrays = _made(tmp_path / "some.txt")
    assert arrays.spec.own_units.columns == ("a", "b", "c")
    _assert_holds(arrays, values)
    lines = ["", "a,b,c", *(",".join(row) for row in _as_text(values)), "", ""]
    (tmp_path / "some.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert _made(tmp_path / "some.csv").fingerprint == arrays.fingerprint


@pytest.mark.parametrize("kind", ["npy", "npz"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16, np.bool_])
def test_numpy_files_arrive(tmp_path, kind, dtype):
    values = (np.random.default_rng(0).normal(size=(50, 2)) * 100).astype(np.int16) % 7
    values = values.astype(dtype)
    save = np.save if kind == "npy" else np.savez
    save(tmp_path / f"some.{kind}", values)
    arrays = _made(tmp_path / f"some.{kind}")
    found = _all_rows(arrays)
    expected = values.astype(float)
    assert sorted(map(tuple, found.round(4))) == sorted(map(tuple, expected))
    assert arrays.spec.own_units.columns == ("x0", "x1")


def test_column_of_any_table_can_be_the_classes(tmp_path):
    values, kinds = _values(), ["setosa", "virginica", "versicolor"]
    labels = [kinds[i % 3] for i in range(60)]
    rows = [[*row, label] for row, label in zip(_as_text(values), labels, strict=True)]
    with_header = _made(_write(tmp_path / "a.csv", [[*NAMES, "kind"], *rows]), label="kind")
    without = _made(_write(tmp_path / "b.csv", rows), label="x3")  # a header is not mistaken for one
    for arrays in (with_header, without):
        assert arrays.spec.class_names == ("setosa", "versicolor", "virginica")
        assert arrays.spec.shape == (3,)
        assert set(arrays.splits["train"].y.tolist()) == {0, 1, 2}
    assert with_header.spec.own_units.label == "kind"
    by_class = with_header.splits["train"]
    place = with_header.spec.to_own_units(torch.from_numpy(np.array(by_class.x)))[:, 0].numpy()
    known = {round(v, 8): label for v, label in zip(values[:, 0], labels, strict=True)}
    assert [known[round(v, 8)] for v in place] == [with_header.spec.class_names[k] for k in by_class.y]


def test_numbers_are_classes_in_their_order_and_an_array_of_its_own_may_hold_them(tmp_path):
    values, labels = _values(), np.array([2.0, 10.0, -1.0] * 20)
    np.savez(tmp_path / "a.npz", x=values, y=labels)
    np.save(tmp_path / "b.npy", np.column_stack([values, labels]))
    for arrays in (_made(tmp_path / "a.npz", label="y"), _made(tmp_path / "b.npy", label="x3")):
        assert arrays.spec.class_names == ("-1", "2", "10")
        assert arrays.spec.shape == (3,)


def test_splits_are_always_the_same_and_by_share_or_by_count(tmp_path):
    path = _write(tmp_path / "some.csv", _as_text(_values(200)))
    by_share, by_count = _made(path, val=0.1, test=0.2), _made(path, val=20, test=40)
    assert by_share.fingerprint == by_count.fingerprint
    rows = np.concatenate([by_share.splits[split].x for split in SPLITS])
    assert len(np.unique(rows, axis=0)) == 200
    copy = _write(tmp_path / "copy.csv", _as_text(_values(200)))
    assert _made(copy).fingerprint == by_share.fingerprint


def test_changed_file_is_read_anew(tmp_path):
    path = _write(tmp_path / "some.csv", _as_text(_values(60)))
    before = _made(path).fingerprint
    _write(path, _as_text(_values(61)))
    assert _made(path).fingerprint != before


# --- units -----------------------------------------------------------------------------------------------------------


def test_columns_are_standardized_by_the_training_rows(tmp_path):
    arrays = _made(_write(tmp_path / "some.csv", _as_text(_values(500))))
    train = arrays.splits["train"].x.astype(np.float64)
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(train.std(0), 1, rtol=1e-6)
    own = arrays.spec.own_units
    shift, scale = own.shift, own.scale
    np.testing.assert_allclose(arrays.spec.to_own_units(torch.zeros(1, 3)).numpy()[0], shift, rtol=1e-12)
    assert arrays.spec.log_scale == pytest.approx(sum(math.log(s) for s in scale))


def test_spec_with_units_survives_json_and_one_without_is_written_as_ever(tmp_path):
    spec = _made(_write(tmp_path / "some.csv", _as_text(_values()))).spec
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    plain = vector_spec(3)
    assert "own_units" not in plain.to_dict()
    assert DataSpec.from_dict(plain.to_dict()) == plain
    x = torch.ones(2, 3)
    assert plain.to_own_units(x) is x
    assert plain.log_scale == 0


class Normal(nn.Module):
    """The standard normal distribution, exactly and as a bound."""

    def log_prob(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        return -0.5 * x.square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)

    def log_prob_bound(self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None) -> Tensor:
        return self.log_prob(x)

    def log_prob_bound_terms(
        self, x: Tensor, condition: Tensor | None = None, *, generator: Noise | None = None
    ) -> dict[str, Tensor]:
        return {"all": self.log_prob(x)}


@pytest.mark.parametrize("name", ["log_likelihood", "bound"])
def test_likelihoods_are_in_the_tables_own_units(tmp_path, name):
    """A standardized column under N(0, 1) has, in its own units, the likelihood of the Gaussian fitted to it."""
    arrays = _made(_write(tmp_path / "some.csv", _as_text(_values(500))))
    data = ArrayData(arrays, batch_size=50, eval_batch_size=50, num_workers=0, seed=0)
    x = torch.cat([batch.x for batch in data.held_out_loader("test")])
    inputs = make_inputs(Normal(), x=x, reference=image_set(x))
    found = make_metric(name).measure(replace(inputs, spec=arrays.spec))
    own = arrays.spec.own_units
    expected = stats.norm.logpdf(arrays.spec.to_own_units(x).numpy(), own.shift, own.scale).sum(1).mean()
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.card["units"].startswith("the data's own: ")
    assert found.unit == "nats"
    if name == "bound":
        assert sum(found.parts.values()) == pytest.approx(found.value)
    inputs = make_inputs(Normal(), x=x, reference=image_set(x))  # what was kept for the other spec stays behind
    standardized = make_metric(name).measure(replace(inputs, spec=replace(arrays.spec, own_units=None)))
    assert standardized.value == pytest.approx(found.value + arrays.spec.log_scale)
    assert "units" not in standardized.card


# --- what cannot be used ---------------------------------------------------------------------------------------------


def _refused(path: Path, **keys: object) -> str:
    with pytest.raises(UserError) as error:
        _made(path, **keys)
    assert "\n" not in str(error.value)
    assert not list((path.parent / "cache").glob("table-*"))
    return str(error.value)


def _text_refused(tmp_path: Path, text: str | bytes, **keys: object) -> str:
    path = tmp_path / "some.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return _refused(path, **keys).replace(str(path), "FILE")


ROWS = "".join(f"{i},{i * i},{i % 3}\n" for i in range(30))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "data.path=FILE is empty; data.path= must be a CSV file in UTF-8, or an .npy or .npz file, of numbers"),
        ("\n \n", "data.path=FILE is empty"),
        ("a,b,c\n", "FILE has 0 rows; at least 20 are needed"),
        ("1,2,3\n", "FILE has 1 rows; at least 20 are needed"),
        ("a,b,c\n" + ROWS + "1,Paris,3\n", "line 32 of FILE has 'Paris' in column 'b', which is no number; mend it, remove "
         "the column, or take it for the classes with data.label=b"),
        (ROWS + "1,2\n", "line 31 of FILE has 2 values where line 1 has 3; mend or remove it"),
        ("a,b,c\n" + ROWS + "\n1,,3\n", "line 33 of FILE has nothing in column 'b'; fill it in, or remove the line"),
        ("a,b,c\n" + ROWS + "1,nan,3\n" + ROWS, "line 32 of FILE has nan in column 'b'; all values must be finite numbers"),
        ("a,b,c\n1,2,-inf\n" + ROWS, "line 2 of FILE has -inf in column 'c'; all values must be finite numbers"),
        ("a,b\n" + "1.5,2\n1.5,3\n" * 20, "column 'a' of FILE is 1.5 in all training rows; remove it"),
        ("a,b\n" + "".join(f"{i}e300,2\n1,3\n" for i in range(20)), "column 'a' of FILE cannot be standardized"),
        (",b\n" + "1,2\n" * 30, "line 1 of FILE gives column 1 no name; give it one, or remove it (pandas"),
        (b"\xff\xfe\x00a,b\n1,2\n", "data.path=FILE is not text in UTF-8"),
        ("1,,3\n" + ROWS, "line 1 of FILE has nothing in column 'x1'; fill it in, or remove the line"),
        (",2,3\n" + ROWS, "line 1 of FILE has nothing in column 'x0'"),
        (",,\n" + ROWS, "line 1 of FILE has nothing in column 'x0'"),
        ("1,NA,3\n" + ROWS, "line 1 of FILE has 'NA' in column 'x1', which is no number"),
        ("NA,n/a,?\n" + ROWS, "line 1 of FILE has 'NA' in column 'x0', which is no number but a missing value; fill it in"),
        ("id,2019,2020\n" + ROWS, "line 1 of FILE has 'id' in column 'x0', which is no number; mend it, remove the column, "
         "or take it for the classes with data.label=x0; if the line is a header, it may hold no numbers such as 2019 "
         "(write x2019)"),
        ("1,5;2\n" * 30, "line 1 of FILE has '1,5' in column 'x0', which is no number"),
    ],
)  # fmt: skip
def test_text_that_cannot_be_used_is_refused_with_its_line_and_column(tmp_path, text, sentence):
    assert sentence in _text_refused(tmp_path, text)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ("d", "data.label=d is no column of FILE; its columns are a, b, c"),
        ("a", "data.label=a has 30 different values in 30 rows of FILE; classes are from 2 to 15"),
        ("same", "data.label=same is more than one column of FILE"),
    ],
)
def test_label_that_cannot_be_used_is_refused(tmp_path, label, sentence):
    head = "same,same,c\n" if label == "same" else "a,b,c\n"
    assert sentence in _text_refused(tmp_path, head + ROWS, label=label)


def test_label_alone_leaves_nothing_to_learn(tmp_path):
    assert "data.label=a is the only column of FILE" in _text_refused(tmp_path, "a\n" + "1\n2\n" * 20, label="a")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"val": 0.0}, "data.val=0.0 must be a share of the rows between 0 and 1, or a whole number of rows"),
        ({"val": -3}, "data.val=-3 must be a share"),
        ({"test": 1.5}, "data.test=1.5 must be a share"),
        ({"test": math.nan}, "data.test=nan must be a share"),
        (
            {"val": 0.5, "test": 0.5},
            "data.val=0.5 and data.test=0.5 leave 0 of the 30 rows of FILE to train on; lower them",
        ),
        ({"val": 100}, "data.val=100 and data.test=0.2 leave 0 of the 30 rows"),
    ],
)
def test_split_that_cannot_be_is_refused(tmp_path, keys, sentence):
    assert sentence in _text_refused(tmp_path, ROWS, **keys)


def test_missing_file_and_folder_are_named(tmp_path):
    assert f"data.path={tmp_path / 'none.csv'} does not exist; data.path= must be" in _refused(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    assert f"data.path={tmp_path / 'folder.csv'} is no file" in _refused(tmp_path / "folder.csv")


class _Code:
    """An object whose unpickling would make a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self._file,)


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_objects_are_never_unpickled(tmp_path, kind):
    save = np.save if kind == "npy" else np.savez
    save(tmp_path / f"some.{kind}", np.array([[_Code(tmp_path / "pwned")] * 2] * 30, dtype=object))
    assert f"data.path={tmp_path / 'some'}.{kind} is broken, or holds Python objects" in _refused(tmp_path / f"some.{kind}")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros(30), "holds an array of the shape (30,); rows and columns are needed, (N, D)"),
        (np.zeros((30, 2, 2)), "holds an array of the shape (30, 2, 2)"),
        (np.zeros((30, 0)), "holds an array of the shape (30, 0)"),
        (np.zeros((30, 2), dtype=complex), "holds values of the type complex128; they must be real numbers"),
        (np.array([["a", "b"]] * 30), "holds values of the type <U1; they must be real numbers"),
        (np.array([[1.0, math.inf]] * 30), "row 0 (counted from 0) of FILE has inf in column 'x1'"),
        (np.arange(10.0).reshape(5, 2), "FILE has 5 rows; at least 20 are needed"),
    ],
)
def test_array_that_cannot_be_used_is_refused(tmp_path, array, sentence):
    path = tmp_path / "some.npy"
    np.save(path, array)
    assert sentence in _refused(path).replace(str(path), "FILE")


def test_archive_must_hold_one_array(tmp_path):
    path = tmp_path / "some.npz"
    np.savez(path, a=_values(), b=_values(), y=np.zeros(3))
    assert f"{path} holds 3 arrays (a, b, y); it must hold one, beside one of classes" in _refused(path)
    np.savez(path, a=_values(), y=np.zeros(3))
    assert f"the array y in {path} has the shape (3,); one class for each of 60 rows" in _refused(path, label="y")


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_broken_numpy_file_is_named(tmp_path, kind):
    path = tmp_path / f"some.{kind}"
    (np.save if kind == "npy" else np.savez)(path, _values())
    path.write_bytes(path.read_bytes()[:200])
    assert f"data.path={path} is broken" in _refused(path)
    path.write_text("this is text")
    assert f"data.path={path} is broken" in _refused(path)


def test_column_of_few_values_is_a_warning(tmp_path, caplog):
    _made(_write(tmp_path / "some.csv", [[v, i % 3] for i, v in enumerate(_values()[:, 1].tolist())]))
    assert "column 'x1' of " in caplog.text
    assert "has only 3 different values: a density may grow without bound" in caplog.text
    assert "'x0'" not in caplog.text


# --- from the command line -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A short training of a model on a table with classes."""
    folder = tmp_path_factory.mktemp("table")
    rows = [[*row, "ab"[i % 2]] for i, row in enumerate(_as_text(_values(300)))]
    path = _write(folder / "some.csv", [[*NAMES, "kind"], *rows])
    settings = ("model=vae", "likelihood=gaussian_learned_scale", "data=table", f"data.path={path}", "data.label=kind")
    small = ("trainer.max_steps=4", "encoder.hidden=[16]", "decoder.hidden=[16]", "callback.light_evaluation.metrics=[]")
    said = call("train", *QUICK, *settings, *small, f"data.cache={folder}", f"hydra.run.dir={folder / 'run'}")
    assert said.code == 0, said.text
    return Run.open(folder / "run")


def test_trained_table_has_its_likelihood_in_own_units_and_a_floor_of_wasserstein(run):
    metrics = run.results()["metrics"]
    units = json.loads((run.path / "spec.json").read_text())["own_units"]
    assert units["columns"] == list(NAMES)
    assert metrics["bound"]["card"]["units"].startswith("the data's own")
    assert metrics["bound"]["parts"]["own_units"] == pytest.approx(-sum(map(math.log, units["scale"])))
    assert metrics["wasserstein"]["anchors"]["held_out"]["value"] < metrics["wasserstein"]["anchors"]["noise"]["value"]
    assert "density is known; that of data=table is not" in metrics["forward_kl"]["not_applicable"]


def test_samples_are_written_in_the_tables_units_under_its_names(run, tmp_path):
    said = call("sample", f"run={run.path}", f"out={tmp_path / 'drawn'}", "n=50")
    assert said.code == 0, said.text
    with (tmp_path / "drawn" / "points.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(NAMES)
    x = np.array(rows[1:], dtype=float)
    np.testing.assert_array_equal(x, np.load(tmp_path / "drawn" / "points.npy"))
    own = json.loads((run.path / "spec.json").read_text())["own_units"]
    distance = np.abs(np.median(x, 0) - own["shift"]) / own["scale"]
    assert (distance < 5).all()


def test_table_without_a_path_and_with_a_wrong_one_is_told_in_one_line(tmp_path):
    assert "data.path must be given: data.path=..." in call("train", "data=table").text
    said = call("train", "data=table", "data.path=nowhere.csv", f"hydra.run.dir={tmp_path}")
    assert said.code == 1
    assert "data.path=nowhere.csv does not exist; data.path= must be a CSV file" in said.text
    assert "Traceback" not in said.text
