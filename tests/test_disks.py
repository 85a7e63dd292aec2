"""What happens when the disk is full, or the folder of the runs cannot be written to: one sentence, and nothing is lost."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from src.launchers import ray
from src.runs import Run
from tests.commands import QUICK, call
from tests.killing import command

OVERRIDES = (*QUICK, "model=gan", "metric=[]", "callback.light_evaluation.metrics=[]")


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_folder_that_cannot_be_is_named_in_a_sentence(kind, cache, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ["-m", "seed=0,1"] if kind == "sweep" else []
    said = call("train", *flags, *OVERRIDES, f"hydra.{kind}.dir={tmp_path}/file/outputs", f"data.cache={cache}")
    assert said.code == 1
    assert f"cannot write to {tmp_path}/file/outputs: Not a directory (set hydra.{kind}.dir=)" in said.text
    assert "Traceback" not in said.text


def test_without_ray_the_extra_is_named(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(ray.importlib.util, "find_spec", lambda name: None)
    settings = ("hydra/launcher=ray", "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep", f"data.cache={cache}")
    said = call("train", "-m", *OVERRIDES, *settings)
    assert said.code == 1
    assert "error: hydra/launcher=ray needs Ray, which is not installed: make extra EXTRA=ray" in said.text
    assert "Traceback" not in said.text
    assert not (tmp_path / "sweep").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


@pytest.mark.slow
@pytest.mark.parametrize("is_sweep", [False, True])
def test_a_disk_that_fills_ends_the_run_in_a_sentence_and_keeps_its_last_checkpoint(is_sweep, small_disk, cache, tmp_path):
    outputs = small_disk / "outputs"
    where = ["-m", f"hydra.sweep.dir={outputs}"] if is_sweep else [f"hydra.run.dir={outputs}/run"]
    line = ["train", *where, *OVERRIDES, "trainer.max_steps=2000", "trainer.val_every_n_epochs=1", f"data.cache={cache}"]
    with command(*line, output=tmp_path / "said.txt") as one:
        one.wait_for(lambda: list(outputs.glob("*/checkpoints/last.ckpt")))
        fill(small_disk)
        assert one.code(120) == 1, one.text
    assert "No space left on device" in one.text
    assert "Traceback" not in one.text
    (file,) = outputs.glob("*/checkpoints/last.ckpt")
    step = torch.load(file, weights_only=True)["progress"]["step"]
    assert 0 < step < 2000
    (small_disk / "filler").unlink()
    run = file.parent.parent
    assert Run.open(run).status()["status"] in ("failed", "running")  # the word itself may have had no place
    with command("train", f"resume={run}", f"trainer.max_steps={step + 20}", output=tmp_path / "again.txt") as one:
        assert one.code(120) == 0, one.text
    assert Run.open(run).status()["status"] == "done"


@pytest.mark.slow
def test_a_limit_of_file_sizes_is_told_in_a_sentence(cache, tmp_path):
    limited = tmp_path / "limited.sh"
    limited.write_text('#!/bin/bash\nulimit -f 1000\nexec "$@"\n')
    line = ["train", *OVERRIDES, f"hydra.run.dir={tmp_path}/run", f"data.cache={cache}"]
    with command(*line, output=tmp_path / "said.txt", through=("bash", str(limited))) as one:
        assert one.code(120) == 1, one.text
    assert "error: File too large" in one.text
    assert "Traceback" not in one.text
