"""What a sweep costs: two workers against one, and what a job costs before its first step.

`python -m tests.benchmarks.sweep_cost`; with Ray installed it is measured, too. Nothing else may run meanwhile.
"""

import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.commands import ROOT

NUM_JOBS = 8
START_BOUND = 1.5  # of a bare `import lightning`
TWO_WORKERS_BOUND = 0.6  # of the time of one
JOB = (  # single-threaded, all alike
    *("trainer.accelerator=cpu", "trainer.max_steps=1500", "trainer.val_every_n_epochs=50", "metric=[cs]"),
    *("callback.light_evaluation.metrics=[]", "callback.checkpoint.every_minutes=null"),
)


def seconds(*command: str) -> float:
    """Wall time of a command, which must succeed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return time.perf_counter() - start


def sweep(folder: Path, *launcher: str) -> float:
    seeds = ",".join(map(str, range(NUM_JOBS)))
    directory = folder / "sweep"
    line = (
        "-m",
        "src.train",
        "-m",
        f"seed={seeds}",
        *JOB,
        f"data.cache={folder / 'cache'}",
        f"hydra.sweep.dir={directory}",
    )
    taken = seconds(*line, *launcher)
    shutil.rmtree(directory)
    return taken


def before_first_step(folder: Path, attempt: int) -> float:
    """Seconds from the start of a run to the checkpoint behind its first step."""
    run = folder / f"run-{attempt}"
    line = [sys.executable, "-m", "src.train", "trainer.accelerator=cpu", "trainer.max_steps=50", "metric=[]",
            "callback.light_evaluation.metrics=[]", "callback.checkpoint.every_minutes=0.0", f"hydra.run.dir={run}",
            f"data.cache={folder / 'cache'}"]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (run / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.005)
    taken = time.perf_counter() - start
    process.wait()
    return taken


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before_first_step(folder, 0)  # prepares the data, warms the disk
        bare, ours = [], []
        for attempt in range(1, 6):  # in turns
            bare.append(seconds("-c", "import lightning"))
            ours.append(before_first_step(folder, attempt))
        first, lightning = statistics.median(ours), statistics.median(bare)
        print(
            f"before the first step {first:.2f} s, a bare `import lightning` {lightning:.2f} s: {first / lightning:.2f} of "
            f"it (asked for: at most {START_BOUND})"
        )
        is_kept = first / lightning <= START_BOUND
        serial = sweep(folder)
        print(f"{NUM_JOBS} jobs, one after the other: {serial:.1f} s")
        launchers = {"two at a time": ("hydra.launcher.n_jobs=2",)}
        if importlib.util.find_spec("ray"):
            launchers["on Ray with two cores"] = ("hydra/launcher=ray", "hydra.launcher.num_cpus=2")
        for words, launcher in launchers.items():
            taken = sweep(folder, *launcher)
            is_kept &= taken / serial <= TWO_WORKERS_BOUND
            print(
                f"{NUM_JOBS} jobs, {words}: {taken:.1f} s, {taken / serial:.2f} of it "
                f"(asked for: at most {TWO_WORKERS_BOUND})"
            )
    sys.exit(not is_kept)


if __name__ == "__main__":
    main()
