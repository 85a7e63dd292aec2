"""A sweep in the queue of Slurm: what is asked of it, and that a job that must make place comes back and goes on."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from src.core.errors import UserError
from src.jobs import Job
from src.launchers import slurm
from src.launchers.slurm import SlurmJobs
from src.runs import Run
from tests.commands import QUICK
from tests.configs import CONF
from tests.killing import command

pytest.importorskip("submitit")

# What stands for Slurm: srun runs its command; sbatch keeps its file, and runs it if it is told to, as an array of jobs.
SRUN = f"""#!/bin/bash
while [ "$1" != {sys.executable} ]; do shift; done
exec "$@"
"""
SBATCH = """#!/bin/bash
cp "$1" "$SLURM/submitted.sh"
echo "Submitted batch job 77"
[ -e "$SLURM/works" ] || exit 0
last=$(sed -n 's/#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
for i in $(seq 0 "$last"); do "$SLURM/bin/start" $i; done
"""
START = """#!/bin/bash
export SLURM_JOB_ID=$((78 + $1)) SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$1 SLURM_NTASKS=1 SLURM_PROCID=0
export SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_LOCALID=0 SLURM_JOB_NAME=sweep
nohup bash "$SLURM/submitted.sh" >> "$SLURM/said_$1.txt" 2>&1 < /dev/null &
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$SLURM/requeued.txt"
"$SLURM/bin/start" "${2#*_}"
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a Slurm that is none."""
    folder = tmp_path / "slurm"
    (folder / "bin").mkdir(parents=True)
    for name, script in {"srun": SRUN, "sbatch": SBATCH, "start": START, "scontrol": SCONTROL}.items():
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("SLURM", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    return folder


def launcher(directory: Path, **settings: Any) -> SlurmJobs:
    default = OmegaConf.load(CONF / "hydra" / "launcher" / "slurm.yaml")
    given = {name: value for name, value in OmegaConf.to_container(default).items() if name != "_target_"}
    made = SlurmJobs(**given | settings)
    made.setup(
        hydra_context=None, task_function=None, config=OmegaConf.create({"hydra": {"sweep": {"dir": str(directory)}}})
    )
    return made


def jobs(directory: Path, num_jobs: int) -> list[Job]:
    return [
        Job(i, Run(directory / f"job {i}"), [], OmegaConf.create(), OmegaConf.create({"retry_failed": False}))
        for i in range(num_jobs)
    ]


def submitted(fake: Path, num_jobs: int, **settings: Any) -> tuple[dict[str, str], str]:
    """What sbatch is asked for, by name; and all of its file."""
    made = launcher(fake / "sweep", **settings)
    made.open()
    assert len(made.start(jobs(fake / "sweep", num_jobs))) == num_jobs
    text = (fake / "submitted.sh").read_text()
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}, text


def test_the_defaults_ask_for_an_array_of_jobs_with_one_gpu_each(fake):
    asked, text = submitted(fake, 3)
    expected = {
        "array": "0-2%3", "nodes": "1", "ntasks-per-node": "1", "gpus-per-node": "1", "cpus-per-task": "4",
        "time": "240", "signal": "USR2@120", "job-name": "sweep",
    }  # fmt: skip
    assert expected.items() <= asked.items()
    assert not {"partition", "account", "qos", "mem"} & asked.keys()
    assert f"{sys.executable} -u -m submitit.core._submit {fake}/sweep/slurm/%j" in text


def test_what_is_set_is_asked_for(fake):
    asked, text = submitted(
        fake, 5, partition="gpu", account="lab", qos="low", timeout_min=30, gpus_per_job=2, cpus_per_job=8, mem_gb=16,
        max_jobs=2, signal_delay_s=60, setup=["module load cuda", "export A=1"],
        sbatch={"constraint": "a100", "mail-user": "me@lab"},
    )  # fmt: skip
    expected = {
        "partition": "gpu", "account": "lab", "qos": "low", "time": "30", "gpus-per-node": "2", "cpus-per-task": "8",
        "mem": "16GB", "array": "0-4%2", "signal": "USR2@60", "constraint": "a100", "mail-user": "me@lab",
    }  # fmt: skip
    assert expected.items() <= asked.items()
    assert text.index("module load cuda\nexport A=1\n") < text.index("srun")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cluster": "slrum"}, "hydra.launcher.cluster=slrum is not known; allowed: slurm, local"),
        ({"timeout_min": 0}, "hydra.launcher.timeout_min=0 must be at least 1"),
        ({"gpus_per_job": -1}, "hydra.launcher.gpus_per_job=-1 must be at least 0"),
        ({"max_jobs": 0}, "hydra.launcher.max_jobs=0 must be at least 1"),
    ],
)
def test_senseless_settings_are_refused(settings, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence.replace(".", r"\.")):
        launcher(tmp_path, **settings)


def test_without_slurm_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match='submitit refuses: Could not detect "srun"'):
        launcher(tmp_path).open()


def test_without_submitit_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs submitit, which is not installed: make extra EXTRA=slurm"):
        launcher(tmp_path)


# --- real jobs -------------------------------------------------------------------------------------------------------


def sweep(directory: Path, cache: Path, *overrides: str) -> list[str]:
    return [
        "train", "-m", "hydra/launcher=slurm", *QUICK, "model=vae", "seed=0,1", "trainer.max_steps=400",
        "trainer.val_every_n_epochs=20", "metric=[]", "callback.light_evaluation.metrics=[]",
        "callback.checkpoint.every_minutes=0", f"data.cache={cache}", f"hydra.sweep.dir={directory}", *overrides,
    ]  # fmt: skip


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_a_job_that_must_make_place_saves_itself_comes_back_and_goes_on(cluster, fake, cache, tmp_path):
    (fake / "works").touch()
    directory = tmp_path / "sweep"
    with command(*sweep(directory, cache, f"hydra.launcher.cluster={cluster}"), output=tmp_path / "said.txt") as one:
        one.wait_for(lambda: len(list(directory.glob("*/checkpoints/last.ckpt"))) == 2)
        moved, other = (Run(file.parent.parent) for file in sorted(directory.glob("*/checkpoints/last.ckpt")))
        pid = json.loads((moved.path / ".claim.json").read_text())["pid"]
        os.kill(parent(pid), signal.SIGUSR2)  # as Slurm does before it takes the machine away
        assert one.code(600) == 0, one.text
    assert "2 jobs: 2 done" in one.text
    logs = [(run.path / "log.txt").read_text() for run in (moved, other)]
    assert [text.count(": done: the run lies in") for text in logs] == [1, 1]
    assert [text.count("saved the last checkpoint") for text in logs] == [1, 0]
    assert [text.count("going on with") for text in logs] == [1, 0]
    if cluster == "slurm":
        assert (fake / "requeued.txt").read_text().split()[0] == "requeue"
