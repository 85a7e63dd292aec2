"""What a full evaluation costs: `make bench` with MNIST under DATA_ROOT.

Every sample metric that needs no download, of 10,000 samples (held-out digits with a little noise) against 60,000 training
and 10,000 held-out images, each evaluation in a process of its own: the first fills the reference store, the second finds
it filled and has other samples. The bounds are on the second; the exit code says whether they hold.
"""

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TIME_BOUND_S = 60
MEMORY_BOUND_GIB = 2.0


def main() -> None:
    root = Path(os.environ.get("DATA_ROOT", "data"))
    if not (root / "MNIST" / "raw").is_dir():
        print(f"no MNIST under {root} (set DATA_ROOT): the cost of an evaluation is not measured")
        return
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        figures = []
        for seed in (1, 2):
            with context.Pool(1) as pool:
                figures.append(pool.apply(_evaluate, (root, Path(folder), seed)))
    for label, (seconds, gib, num_computed) in zip(("first", "repeated"), figures, strict=True):
        print(f"{label:9s} evaluation {seconds:6.1f} s   {gib:.2f} GiB at most   {num_computed} quantities computed")
    seconds, gib, _ = figures[1]
    is_kept = seconds <= TIME_BOUND_S and gib <= MEMORY_BOUND_GIB
    verdict = "ok" if is_kept else "TOO MUCH"
    print(f"the repeated one shall take at most {TIME_BOUND_S} s and {MEMORY_BOUND_GIB:g} GiB: {verdict}")
    sys.exit(not is_kept)


def _evaluate(root: Path, folder: Path, seed: int) -> tuple[float, float, int]:
    """Seconds, largest memory of this process in GiB, and how many quantities had to be computed."""
    import torch

    from src.build import build
    from src.evaluation.protocol import evaluate
    from src.metrics.store import Store
    from tests.configs import compose_config
    from tests.mnist import Given, mnist_classifier, mnist_data, noisy

    data = mnist_data(root)
    samples = noisy(torch.from_numpy(data.arrays.splits["test"].x), sigma=0.02, seed=seed)
    metrics = build(compose_config("data=mnist").metric)
    store = Store(folder)
    start = time.perf_counter()
    results = evaluate(
        model=Given(samples),
        untrained=None,
        model_name="noisy digits",
        data=data,
        metrics=metrics,
        classifier=mnist_classifier,
        store=store,
        num_samples=10_000,
        batch_size=500,
        seed=0,
        about={},
    )
    seconds = time.perf_counter() - start
    absent: dict[str, Any] = {name: str(found) for name, found in results.items() if isinstance(found, Exception)}
    assert "fd" not in absent, absent
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, store.num_computed


if __name__ == "__main__":
    main()
