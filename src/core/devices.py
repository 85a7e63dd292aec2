"""Devices by the names that people know them by."""

import functools
import platform
from pathlib import Path

import torch

__all__ = ["device_name", "synchronize"]


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or `AMD EPYC 7B13 (2 threads)` with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_processor()} ({torch.get_num_threads()} threads)"
    return device.type


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given, so that a clock that is read then tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine() or "unknown processor"
