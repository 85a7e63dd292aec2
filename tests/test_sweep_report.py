"""The end of a sweep: what is written down and said of jobs in every state, and what is not fooled by damage."""

import csv
import json
import logging
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image, ImageFont

from src.claim import claim
from src.core.errors import UserError
from src.sweep_picture import MOST_TILES, Tile, arrange, newest_grid, paint
from src.sweep_report import SweepReport, write_report
from tests.test_compare import entry

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RED, BLUE = (200, 0, 0), (0, 0, 200)


@dataclass(frozen=True)
class Sweep:
    """A sweep made by hand."""

    path: Path

    def job(
        self,
        name: str,
        *overrides: str,
        status: dict[str, Any] | str = "done",
        lr: float = 0.1,
        commit: str = COMMIT,
        diff: str = "",
        **metrics: Any,
    ) -> Path:
        """A job; `overrides` are as typed, its results are written if there are any `metrics`."""
        given = dict(override.split("=", 1) for override in overrides)
        job = self.path / name
        (job / "samples").mkdir(parents=True)
        config = {
            "name": {"model": given.get("model", "vae"), "data": "digits"},
            "seed": int(given.get("seed", 0)),
            "model": {"_target_": given.get("model", "vae")},
            "optim": {"lr": float(given.get("optim.lr", lr))},
            "tag": given.get("tag"),
        }
        OmegaConf.save(OmegaConf.create(config), job / "config.yaml")
        write(job / "job.json", {"overrides": list(overrides)})
        about = {"status": status} if isinstance(status, str) else status
        write(job / "status.json", {"time": "2026-01-01T12:00:00+00:00"} | about)
        if about["status"] != "waiting":
            (job / "log.txt").write_text("a line\n")
            write(job / "environment.json", {"git_commit": commit, "git_diff": diff})
            draw(job / "samples" / "samples_epoch_0002.png", RED)
        if metrics:
            entries = {metric: value if isinstance(value, dict) else entry(value) for metric, value in metrics.items()}
            write(job / "results.json", {"schema": 2, "metrics": entries})
        return job

    def seeds(self, model: str, values: list[float], **others: Any) -> None:
        for seed, value in enumerate(values):
            self.job(f"{model}-{seed}", f"model={model}", f"seed={seed}", "trainer=debug", fd=value, **others)

    def rows(self, name: str = "jobs") -> list[dict[str, str]]:
        with open(self.path / f"{name}.csv", newline="") as file:
            return list(csv.DictReader(file))


def write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content))


def draw(file: Path, colour: tuple[int, int, int], size: tuple[int, int] = (265, 265)) -> None:
    Image.new("RGB", size, colour).save(file)


@pytest.fixture
def sweep(tmp_path) -> Sweep:
    return Sweep(tmp_path / "näme, of a sweep")


@pytest.fixture
def said(caplog) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def num_tiles(sweep: Sweep, colour: tuple[int, int, int]) -> int:
    """How many squares of a colour the picture shows, by its upper left corners."""
    with Image.open(sweep.path / "samples.png") as picture:
        pixels, (width, height) = picture.convert("RGB").load(), picture.size
    found = 0
    for y in range(1, height):
        for x in range(1, width):
            found += pixels[x, y] == colour and colour not in (pixels[x - 1, y], pixels[x, y - 1])
    return found


# jobs.csv


def test_every_job_is_a_row_with_what_was_swept_and_every_digit(sweep):
    value = 0.1 + 0.2
    sweep.job("a", "model=vae", "optim.lr=1e-3", "seed=0", "trainer=debug", fd=value, cs={"not_applicable": "why"})
    sweep.job("b", "model=gan, wide", "optim.lr=1e-2", "seed=1", "trainer=debug", kd=-1.5)
    write_report(sweep.path)
    first, second = sweep.rows()
    assert list(first) == [
        *("job", "status", "reason", "model", "optim.lr", "seed", "data"),
        "fd",
        "kd",
        "seconds",
        "commit",
        "log",
    ]
    assert [first[key] for key in ("job", "status", "model", "optim.lr", "seed", "data")] == [
        *("a", "done", "vae", "1e-3", "0", "digits")
    ]
    assert float(first["fd"]) == value
    assert (first["kd"], second["fd"], second["kd"]) == ("", "", "-1.5")
    assert second["model"] == "gan, wide"
    assert first["commit"] == COMMIT
    assert Path(first["log"]).read_text() == "a line\n"


def test_an_override_that_a_job_lacks_has_its_configs_value(sweep):
    sweep.job("a", "optim.lr=0.5", fd=1.0)
    sweep.job("b", "+experiment=small", lr=0.25, fd=1.0)
    write_report(sweep.path)
    assert [row["optim.lr"] for row in sweep.rows()] == ["0.5", "0.25"]
    assert [row["experiment"] for row in sweep.rows()] == ["", "small"]


def test_what_was_told_to_the_command_is_not_swept(sweep):
    sweep.job("a", "seed=0", "retry_failed=true", "hydra.launcher.jobs=2", fd=1.0)
    sweep.job("b", "seed=1", "sweep=name", fd=1.0)
    write_report(sweep.path)
    assert list(sweep.rows()[0])[3:6] == ["seed", "model", "data"]


def test_quotes_around_a_value_are_the_shells(sweep):
    sweep.job("a", "tag='x, y'", fd=1.0)
    sweep.job("b", "tag=z", fd=2.0)
    report = write_report(sweep.path)
    assert [row["tag"] for row in sweep.rows()] == ["x, y", "z"]
    assert [row.label for row in report.comparison.rows] == ["tag=x, y", "tag=z"]


def test_held_out_means_stand_beside_the_final_metrics(sweep, said):
    write(sweep.job("a", fd=1.0) / "validation.json", {"val/loss": 0.1})
    write_report(sweep.path, ["val/loss"])
    assert sweep.rows()[0]["val/loss"] == "0.1"
    assert "val/loss is no final metric: jobs.csv has its values" in said.text


def test_jobs_are_in_the_order_of_their_numbers(sweep):
    for name in ("10-a", "2-a", "1-a"):
        sweep.job(name, fd=1.0)
    assert [job.name for job in write_report(sweep.path).jobs] == ["1-a", "2-a", "10-a"]


# states


STATES = {
    "done": "done",
    "pruned": {"status": "pruned", "reason": "fd 9 at epoch 2"},
    "failed": {"status": "failed", "reason": "ValueError: loss is nan\n  at step 7"},
    "interrupted": "interrupted",
    "running": {"status": "running", "host": "elsewhere", "pid": "1"},
    "waiting": "waiting",
}


def test_all_states_are_counted_and_told_apart(sweep, said):
    for seed, (name, status) in enumerate(STATES.items()):
        job = sweep.job(name, f"seed={seed}", status=status, **({"fd": 1.0} if name == "done" else {}))
        if name == "running":
            write(job / ".claim.json", {"host": "elsewhere", "pid": 1})  # a sign of life of this moment
    report = write_report(sweep.path)
    assert report.counts == dict.fromkeys(["done", "pruned", "failed", "interrupted", "running", "waiting"], 1)
    assert not report.is_complete
    assert "6 jobs: 1 done, 1 pruned, 1 failed, 1 interrupted, 1 running elsewhere, 1 waiting" in said.text
    assert f"failed: ValueError: loss is nan at step 7 (log: {sweep.path / 'failed' / 'log.txt'})" in said.text
    assert {row["job"]: row["status"] for row in sweep.rows()} == {name: name for name in STATES}
    written = (sweep.path / "compare.md").read_text()
    assert "waiting: it waits to be started" in written
    assert "pruned: it was pruned (fd 9 at epoch 2)" in written


@pytest.mark.parametrize(("others", "is_complete"), [(["pruned"], True), (["waiting"], False), (["failed"], False)])
def test_a_sweep_is_complete_if_no_job_failed_and_none_is_left(sweep, others, is_complete):
    sweep.job("a", fd=1.0)
    for other in others:
        sweep.job(other, status=STATES[other])
    assert write_report(sweep.path).is_complete is is_complete


def test_a_job_whose_process_is_gone_was_interrupted(sweep):
    for name in ("gone", "here"):
        job = sweep.job(name, status={"status": "running", "host": platform.node(), "pid": "123"})
        write(job / ".claim.json", {"host": platform.node(), "pid": os.getpid()})  # whoever has that number now
    with claim(job):
        gone, here = write_report(sweep.path).jobs
    assert (gone.status, gone.reason) == ("interrupted", "its process 123 has ended without a word")
    assert here.status == "running"


def test_a_crash_names_both_files_that_may_tell_why(sweep, said):
    job = sweep.job("a", status={"status": "failed", "reason": "its process was ended by SIGKILL"})
    (job / "output.txt").write_text("Traceback\n")
    write_report(sweep.path)
    assert f"a: its process was ended by SIGKILL (log: {job / 'log.txt'}, {job / 'output.txt'})" in said.text
    for name in ("log.txt", "output.txt"):
        (job / name).unlink()
    write_report(sweep.path)
    assert "(log: none was written)" in said.text


def test_jobs_that_lack_everything_are_still_told(sweep):
    for name in ("config", "status", "job"):
        (sweep.path / name).mkdir(parents=True)
    (sweep.path / "config" / "config.yaml").write_text("seed: 3")
    write(sweep.path / "job" / "job.json", {"overrides": ["seed=1"]})
    write(sweep.path / "status" / "status.json", {"status": "interrupted"})
    (sweep.path / "no job").mkdir()
    report = write_report(sweep.path)
    assert {job.name: job.status for job in report.jobs} == {"config": "damaged", "job": "damaged", "status": "interrupted"}
    assert [row["seed"] for row in sweep.rows()] == ["3", "1", ""]


@pytest.mark.parametrize("content", ["", "[", "[1]", "{}", '{"status": "odd", "overrides": 3, "metrics": [], "schema": 2}'])
@pytest.mark.parametrize("name", ["status.json", "job.json", "results.json", "environment.json", "config.yaml"])
def test_a_damaged_file_spoils_nothing_but_its_job(sweep, name, content):
    sweep.job("a", "seed=0", fd=1.0)
    (sweep.job("b", "seed=1", fd=2.0) / name).write_text(content)
    report = write_report(sweep.path)
    assert report.jobs[0].values == {"fd": 1.0}
    assert len(sweep.rows()) == 2
    assert report.is_complete is (name != "status.json")


def test_a_damaged_picture_is_named_in_its_place(sweep):
    sweep.job("a", "seed=0", fd=1.0)
    grid = sweep.job("b", "seed=1", fd=1.0) / "samples" / "samples_epoch_0002.png"
    grid.write_bytes(grid.read_bytes()[:40])
    write_report(sweep.path)
    assert num_tiles(sweep, RED) == 1


# comparison


def test_seeds_are_averaged_and_the_best_is_named(sweep, said):
    sweep.seeds("vae", [10.0, 12.0, 14.0])
    sweep.seeds("gan", [20.0, 22.5, 24.0])
    write_report(sweep.path)
    values = {row["row"]: (float(row["value"]), float(row["sd"]), row["seeds"]) for row in sweep.rows("compare")}
    assert values["model=vae"] == (12.0, 2.0, "3")
    assert "12.0 ± 2.0 (3)" in (sweep.path / "compare.md").read_text()
    assert "best by fd: model=vae, 12.0 ± 2.0 (3); the other: worse" in said.text


def test_the_wanted_metrics_come_first(sweep, said):
    metrics = {f"metric_{i}": float(i) for i in range(9)}
    for i, model in enumerate(("vae", "gan")):
        sweep.job(model, f"model={model}", **{name: entry(value + i, better="higher") for name, value in metrics.items()})
    report = write_report(sweep.path, ["metric_7", "metric_4", "nothing"])
    names = [column.metric for column in report.comparison.columns]
    assert names[:4] == ["metric_7", "metric_4", "metric_0", "metric_1"]
    assert sorted(names) == sorted(metrics)
    assert "best by metric_7: model=gan, 8" in said.text
    assert "nothing has no value in any job" in said.text


def test_the_table_on_the_screen_fits_and_says_what_it_leaves_out(sweep, said):
    for i in range(23):
        sweep.job(f"{i}", f"optim.lr={i}", **{f"metric_{k}": 1000.0 * k + (i * 7) % 23 + 0.125 for k in range(12)})
    write_report(sweep.path)
    table = next(record.message for record in said.records if "┏" in record.message).splitlines()
    assert max(map(len, table)) <= 120
    assert "metric_0" in table[1]
    assert "optim.lr=0 " in table[3]
    assert len(table) == 20 + 4
    assert not any(f"optim.lr={i} " in line for i in range(23) if (i * 7) % 23 >= 20 for line in table)
    assert "in compare.md: more rows: 3, " in said.text


def test_without_results_that_is_said(sweep, said):
    sweep.job("a", status="waiting")
    write_report(sweep.path)
    assert "no job has results" in said.text
    assert "No job has results." in (sweep.path / "compare.md").read_text()
    assert sweep.rows("compare") == []
    assert sweep.rows()[0]["status"] == "waiting"


def test_rows_that_differ_in_more_than_was_swept_have_names_of_their_own(sweep):
    sweep.job("a", "model=vae", "seed=0", lr=0.1, fd=1.0)
    sweep.job("b", "model=vae", "seed=1", lr=0.2, fd=1.0)  # a default was changed meanwhile
    labels = [row.label for row in write_report(sweep.path).comparison.rows]
    assert labels == ["vae on digits (a)", "vae on digits (b)"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({}, ""),
        ({"commit": "f" * 40}, "0123456 (3), fffffff (1)"),
        ({"diff": "+ a line"}, "0123456 (3), 0123456+changes-"),
    ],
    ids=str,
)
def test_results_of_different_code_are_warned_of(sweep, said, other, words):
    sweep.seeds("vae", [1.0, 2.0, 3.0])
    sweep.job("late", "model=gan", "seed=0", fd=4.0, **other)
    sweep.job("failed", "model=gan", "seed=1", status="failed", commit="e" * 40)
    write_report(sweep.path)
    assert ("results of different code are compared" in said.text) is bool(words)
    assert words in said.text


# picture


def test_every_job_has_a_tile_and_a_failed_one_an_empty_one(sweep):
    sweep.seeds("vae", [1.0, 2.0])
    sweep.job("gan-0", "model=gan", "seed=0", status=STATES["failed"])
    sweep.job("gan-1", "model=gan", "seed=1", status="interrupted")
    write_report(sweep.path)
    assert num_tiles(sweep, RED) == 3
    assert num_tiles(sweep, (236, 236, 236)) >= 1


def test_the_newest_grid_counts_and_reconstructions_where_there_are_no_samples(sweep):
    samples = sweep.job("a", "seed=0", fd=1.0) / "samples"
    for name in ("samples_epoch_0010", "samples_epoch_9999", "samples_epoch_10000", "samples_step_0000512"):
        draw(samples / f"{name}.png", BLUE)
    assert newest_grid(samples).name == "samples_epoch_10000.png"
    for file in samples.iterdir():
        file.unlink()
    assert newest_grid(samples) is None
    draw(samples / "reconstructions_epoch_0001.png", BLUE)
    assert newest_grid(samples).name == "reconstructions_epoch_0001.png"


@pytest.mark.parametrize("num_jobs", [1, 4, 7, 30, 100, MOST_TILES + 5])
@pytest.mark.parametrize("num_seeds", [1, 2, 40])
def test_tiles_and_labels_stay_within_the_picture_and_apart(num_jobs, num_seeds):
    label = "model=vae optim.lr=0.0001 encoder.hidden=[400,400,400,400,400,400,400] tag=" + "ü名x" * 40
    tiles = [Tile(f"{label} {i // num_seeds}", f"seed={i} (interrupted)", None, label) for i in range(num_jobs)]
    sheet = arrange(tiles, "sweep " + "name" * 60)
    assert [placed.tile for placed in sheet.tiles] == tiles[:MOST_TILES]
    assert any("5 more jobs are not shown" in text.line for text in sheet.texts) is (num_jobs > MOST_TILES)
    assert sheet.width <= 1900
    boxes = [(placed.x, placed.y, sheet.side, sheet.tile_height) for placed in sheet.tiles]
    for text in sheet.texts:
        long = ImageFont.load_default(text.size).getlength(text.line)
        assert long <= text.width
        boxes.append((text.x, text.y, int(long), text.size))
    assert all(x >= 0 and y >= 0 and x + w <= sheet.width and y + h <= sheet.height for x, y, w, h in boxes)
    assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


@pytest.mark.parametrize("size", [(265, 265), (2000, 500), (265, 34), (5000, 1)])
def test_pictures_of_any_size_fit_into_their_tiles(tmp_path, size):
    draw(tmp_path / "a.png", BLUE, size)
    sheet = arrange([Tile("a", "", tmp_path / "a.png", "")] * 2, "title")
    image = paint(sheet)
    assert image.size == (sheet.width, sheet.height)
    assert image.getpixel((sheet.tiles[1].x, sheet.tiles[1].y)) == BLUE
    assert sheet.side <= 528
    shown = min(528, max(size)) * size[1] / max(size)  # high
    assert sheet.tile_height == max(136, round(shown))  # no higher than what is shown, or than words


# TensorBoard


def test_the_hparams_page_has_a_row_a_job_and_shows_first_what_differs(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.backend_context import Context

    from src.training.final_metrics import log_final_metrics, log_hyper_parameters

    for seed, (model, metrics) in enumerate({"vae": {"fd": 2.5, "bound": 1.0}, "gan": {"fd": 3.5}}.items()):
        logger = TensorBoardLogger(tmp_path / model, name="tensorboard", version="", default_hp_metric=False)
        settings = {"model": model, "seed": seed, "optim": {"lr": 0.1}} | ({"beta": 4.0} if model == "vae" else {})
        log_hyper_parameters([logger], settings, metrics)
        log_final_metrics([logger], metrics, "| table |", 7)
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    page = Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(tmp_path))))
    content = page.hparams_metadata(RequestContext(), "")
    experiment = page.experiment_from_metadata(RequestContext(), "", True, content, [])
    assert set(content) == {"vae/tensorboard", "gan/tensorboard"}
    assert [info.name for info in experiment.hparam_infos] == ["model", "seed", "beta", "optim.lr"]
    assert [info.name.tag for info in experiment.metric_infos] == ["final/bound", "final/fd"]


# mistakes


def test_a_directory_without_jobs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no job of a sweep"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        write_report(tmp_path / "nowhere")


def test_what_cannot_be_written_is_a_sentence(sweep):
    sweep.job("a", fd=1.0)
    (sweep.path / "jobs.csv").mkdir()
    with pytest.raises(UserError, match=r"jobs\.csv cannot be written: "):
        write_report(sweep.path)


def test_a_report_replaces_the_one_before_and_leaves_nothing_else(sweep):
    sweep.job("a", fd=1.0)
    assert isinstance(write_report(sweep.path), SweepReport)
    sweep.job("b", fd=1.0)
    write_report(sweep.path)
    files = {file.name for file in sweep.path.iterdir() if file.is_file()}
    assert files == {"jobs.csv", "compare.md", "compare.csv", "samples.png"}
    assert len(sweep.rows()) == 2


def test_importing_it_is_cheap():
    heavy = "torch lightning hydra scipy numpy torchmetrics PIL"
    program = f"import sys, src.sweep_report; print([name for name in {heavy.split()!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
