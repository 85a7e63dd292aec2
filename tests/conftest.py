"""Fixtures that several test files use."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def float64() -> Iterator[None]:
    """Inside the test, new tensors and networks are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def same_weights() -> None:
    """Networks built in the test have the same initial weights in every session."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for prepared data and classifiers, so that each of them is made once for all tests."""
    return tmp_path_factory.mktemp("prepared")
