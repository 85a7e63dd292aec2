"""What a cache saves in drawing 256 tokens, of each network that keeps one: `python -m tests.benchmarks.decoding_cost`.

Each network is asked for four texts of 256 characters, with its state and without, in turns; the quickest counts.
Both draw the same tokens. The exit code says whether the bound holds.
"""

import sys
import time
from importlib.util import find_spec

import torch

from src.build import build
from src.core.rng import SampleNoise
from src.core.tokens import TokenChoice
from src.samplers.autoregressive import continue_tokens
from tests.configs import load_option

__all__ = ["BOUND", "decoding_ratio"]

BOUND = 3.0
NUM_TOKENS, NUM_TEXTS, NUM_TURNS = 256, 4, 2
VOCABULARY = 65  # that of tiny Shakespeare
NETWORKS = ("transformer", "lstm", "gpt2")  # of their sizes in conf/network


def main() -> None:
    holds = True
    for name in NETWORKS:
        if name == "gpt2" and find_spec("transformers") is None:
            print(f"{name:12s} not measured: transformers is not installed (make extra EXTRA=text)")
            continue
        ratio, seconds = decoding_ratio(name)
        holds = holds and ratio >= BOUND
        print(f"{name:12s} {ratio:5.1f} times as fast with a cache, {seconds:.2f} s (bound {BOUND:g})", flush=True)
    sys.exit(0 if holds else 1)


def decoding_ratio(name: str) -> tuple[float, float]:
    """Time without a cache over that with one, and the latter in seconds of this process."""
    torch.manual_seed(0)
    network = build(load_option("network", name))(num_tokens=VOCABULARY, length=NUM_TOKENS, condition_dim=0).eval()
    prompt = torch.zeros(NUM_TEXTS, 1, dtype=torch.int64)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    drawn = {}
    for _ in range(NUM_TURNS):
        for cached, of_turns in seconds.items():
            start = time.process_time()
            drawn[cached] = continue_tokens(network, prompt, NUM_TOKENS, TokenChoice(), SampleNoise(0), cached=cached)
            of_turns.append(time.process_time() - start)
    assert all(torch.equal(a, b) for a, b in zip(drawn[True], drawn[False], strict=True))
    with_cache, without = (min(seconds[cached]) for cached in (True, False))
    return without / with_cache, with_cache


if __name__ == "__main__":
    main()
